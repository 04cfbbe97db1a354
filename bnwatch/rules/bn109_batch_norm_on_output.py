"""BN109: batch normalization makes the output of the model."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from bnwatch.diagnosis import Quantity, Severity, Skipped
from bnwatch.rules import _settling
from bnwatch.rules._base import Finding, Limits, Threshold, blind, rule

if TYPE_CHECKING:
    from collections.abc import Iterator

    from bnwatch.signals import Signals

SQUARED = frozenset({"mse", "meansquarederror"})
"""Losses whose root is a distance between output and target; letters only, without case."""


@rule(
    "BN109",
    "batch-norm-on-output",
    severity=Severity.WARNING,
    far=Threshold(3.0, "derived", "root of the squared error in sizes of the output: targets are twice as large"),
)
def batch_norm_on_output(signals: Signals, limits: Limits) -> Iterator[Finding | Skipped]:
    """Batch normalization stands on the output of the model: it normalizes scores or probabilities."""
    yield from blind("BN109", signals)
    found: dict[str, int] = {}
    for layer, place in signals.structure.places() if signals.structure else ():
        if place.output:
            found[layer.path] = found.get(layer.path, 0) + 1
    reach = _reach(signals, limits["far"]) if len(found) == 1 else None
    late = reach is not None and _late(signals, reach[0])
    for path, outputs in found.items():
        yield Finding(
            subject=path,
            severity=None if late else Severity.INFO,
            message=f"`{path}` normalizes an output of the model"
            + (f", and its scale and offset do not reach the targets: {_sizes(signals)}" if late else ""),
            evidence={
                "outputs": Quantity(outputs, "of the model made by this layer"),
                **({} if reach is None else {"error": Quantity(reach[1], "root of the mean squared error")}),
                **({} if reach is None else {"reaches_at": Quantity(reach[0], "step, at the pace so far")}),
            },
            notes=(
                *((_pace(reach[0]),) if late and reach is not None else ()),
                (
                    "every output then has the same mean and variance over a batch, whatever the share of its class, "
                    "and the prediction for one example depends on the others of its batch in training"
                ),
            ),
            helps=(
                "end the model with the layer that makes the scores, without batch normalization behind it",
                *(("or scale the targets to mean 0 and variance 1",) * late),
            ),
        )


def _reach(signals: Signals, far: float) -> tuple[float, float] | None:
    """Return the step at which the output is as large as the targets, and its error now; None where it is not far off.

    The error is at most the size of the output plus that of the targets, so these are larger than the output by what
    the error is beyond twice the output. That the output grows on as it did gives the step.
    """
    output = signals.structure.output if signals.structure is not None else None
    looks = [look for look in signals.looks if look.layers]
    if output is None or _letters(output.loss) not in SQUARED or not looks or looks[0].step == looks[-1].step:
        return None
    first, last = looks[0], looks[-1]
    loss, size = last.loss if last.loss is not None else math.nan, last.layers[-1].scale
    if not loss >= 0.0 or math.sqrt(loss) <= far * size:
        return None
    pace = (size - first.layers[-1].scale) / (last.step - first.step)
    missing = math.sqrt(loss) - 2.0 * size
    return (last.step + missing / pace if pace > 0.0 else math.inf), math.sqrt(loss)


def _late(signals: Signals, step: float) -> bool:
    """Return whether training ends before a step; as long as its end is not known, it may not."""
    steps = _settling.planned(signals)
    return signals.ended or (steps is not None and step > steps)


def _sizes(signals: Signals) -> str:
    last = signals.looks[-1]
    error = math.sqrt(last.loss or 0.0)
    return f"error {error:.3g} with outputs of size {last.layers[-1].scale:.3g} on {last.examples:,} training examples"


def _pace(step: float) -> str:
    when = "and the output does not grow" if math.isinf(step) else f"so the output is large enough at step {step:,.0f}"
    return (
        f"nothing but gamma and beta gives the output its size; they move by about the learning rate a step, {when}, "
        "while the weights of a dense layer make its output larger all together"
    )


def _letters(name: str | None) -> str:
    return "".join(c for c in (name or "").lower() if c.isalpha())
