"""BN108: dropout in front of batch normalization."""

from __future__ import annotations

from typing import TYPE_CHECKING

from bnwatch.diagnosis import Quantity, Severity, Skipped
from bnwatch.rules._base import Finding, Limits, Threshold, blind, named, rule

if TYPE_CHECKING:
    from collections.abc import Iterator

    from bnwatch.records import Place
    from bnwatch.signals import Signals


@rule(
    "BN108",
    "dropout-before-batch-norm",
    severity=Severity.INFO,
    shift=Threshold(0.1, "convention", "relative excess of the standard deviation in training over that in evaluation"),
)
def dropout_before_batch_norm(signals: Signals, limits: Limits) -> Iterator[Finding | Skipped]:
    """Dropout widens what batch normalization sees in training, and evaluation has no dropout."""
    yield from blind("BN108", signals)
    found: dict[str, Place] = {}
    for layer, place in signals.structure.places() if signals.structure else ():
        if layer.trainable and _excess(place.rate) > limits["shift"]:
            found.setdefault(layer.path, place)
    if not found:
        return
    worst = max(found, key=lambda path: found[path].rate)
    place = found[worst]
    by = f": `{signals.adapter}.recalibrate(model, batches)`" if signals.adapter else ""
    yield Finding(
        subject=worst if len(found) == 1 else "model",
        message=f"dropout comes before batch normalization at {named(found)}: running statistics are likely too wide "
        "for evaluation",
        evidence={
            "layers": Quantity(len(found), "of batch normalization behind a dropout"),
            "rate": Quantity(place.rate, f"set to zero by {place.dropout}"),
            "excess": Quantity(_excess(place.rate), "of the standard deviation in training"),
        },
        notes=(
            (
                "dropout of rate p multiplies the variance of inputs of mean zero by 1/(1-p) in training and is "
                "absent in evaluation, but the running variance is that of training; whether it matters depends on "
                "the weights in between"
            ),
            "what decides: accuracy with running statistics against statistics re-estimated with dropout off (BN301)",
        ),
        helps=(
            "put dropout behind the last batch normalization",
            f"or re-estimate the running statistics without dropout after training{by}",
        ),
    )


def _excess(rate: float) -> float:
    """Return the excess of the standard deviation behind inverted dropout, for inputs of mean zero."""
    return (1.0 - rate) ** -0.5 - 1.0 if rate < 1.0 else 0.0
