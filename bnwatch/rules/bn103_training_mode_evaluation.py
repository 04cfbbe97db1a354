"""BN103: evaluation normalizes with batch statistics."""

from __future__ import annotations

from typing import TYPE_CHECKING

from bnwatch.diagnosis import Quantity, Severity, Skipped
from bnwatch.rules._base import Finding, Limits, rule

if TYPE_CHECKING:
    from collections.abc import Iterator

    from bnwatch.signals import Signals


HOW = {
    "bnwatch.chainer": "Chainer: evaluate inside `with chainer.using_config('train', False):`",
    "bnwatch.keras": "Keras: call the model with `training=False`, and do not pass `training=True` inside `call`",
}


@rule("BN103", "training-mode-evaluation", severity=Severity.ERROR)
def training_mode_evaluation(signals: Signals, _: Limits) -> Iterator[Finding | Skipped]:
    """Evaluation normalizes with the statistics of its own batches."""
    if not signals.evaluations:
        yield Skipped("BN103", "no evaluation was seen")
        return
    layers = signals.evaluations[-1].batch_statistics
    if not layers:
        return
    first = f"`{layers[0]}`" + (f" and {len(layers) - 1} more" if len(layers) > 1 else "")
    yield Finding(
        subject=layers[0] if len(layers) == 1 else "model",
        message=f"evaluation ran in training mode: {first} normalized with batch statistics",
        evidence={
            "layers": Quantity(len(layers), "in training mode during evaluation"),
            "watched": Quantity(len(signals.specs), "layers"),
        },
        notes=(
            (
                "the result of each example then depends on the other examples of its batch, and, where the layer also "
                "updates, evaluation data leak into the running statistics"
            ),
            *_otherwise(signals),
        ),
        helps=tuple(how for adapter, how in HOW.items() if signals.adapter in {adapter, None}),
    )


def _otherwise(signals: Signals) -> tuple[str, ...]:
    """Return what accuracy the same network has with running statistics, where that was measured.

    The cell of batch statistics is of them in every layer: an evaluation that used them in some gave another accuracy.
    """
    row, last = signals.cells.evaluation if signals.cells is not None else None, signals.evaluations[-1]
    if not row:
        return ()
    if not signals.specs.keys() <= set(last.batch_statistics):
        reported = "" if last.accuracy is None else f"the evaluation reported {last.accuracy:.1%}; "
        return (
            f"{reported}{row['running'].examples:,} of its examples give {row['running'].accuracy:.1%} with running "
            "statistics in every layer",
        )
    return (
        (
            f"the same {row['running'].examples:,} evaluation examples give {row['batch'].accuracy:.1%} with the "
            f"statistics of their batches and {row['running'].accuracy:.1%} with running statistics in every layer"
        ),
    )
