"""BN211: trained parameters, and running statistics that are the initial values."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from bnwatch.diagnosis import Quantity, Severity, Skipped
from bnwatch.rules._base import Finding, Limits, Threshold, fitting, named, refresh, rule

if TYPE_CHECKING:
    from collections.abc import Iterator

    from bnwatch.signals import Signals

HOW = {
    "bnwatch.chainer": (
        "Chainer: copy with `link.copyparams(other)`, which copies persistent values unless `copy_persistent=False`; "
        "save and load with `serializers.save_npz` and `load_npz` of the whole model",
    ),
    "bnwatch.keras": (
        "Keras: copy with `model.set_weights(other.get_weights())`, save with `model.save` or `model.save_weights`: "
        "`trainable_weights` leave the moving statistics out",
    ),
}


@rule(
    "BN211",
    "statistics-not-restored",
    severity=Severity.ERROR,
    weight=Threshold(0.05, "convention", "share of the initial values that may be left once updates have run"),
)
def statistics_not_restored(signals: Signals, limits: Limits) -> Iterator[Finding | Skipped]:
    """Scale and offset are trained, and the running statistics are exactly the initial values."""
    if signals.attachment is None:
        yield Skipped("BN211", "what the layers held when the watch began is not known")
        return
    if not signals.attachment.unrestored:
        return
    moved = {path for evaluation in signals.evaluations for path in evaluation.moved}
    mended = {s.spec.path for s in signals.sites() if _left(s.initial_weight) <= limits["weight"]}
    lost = [path for path in signals.attachment.unrestored if path not in moved | mended]
    if not lost:
        return
    many, layers = len(lost) > 1, len(signals.attachment.layers)
    yield Finding(
        subject="model" if many else lost[0],
        message=f"{len(lost)} of {layers} layers ha{'ve' if many else 's'} trained scale and offset and running "
        f"statistics that began as exactly the initial values: {named(lost)}",
        evidence={
            "layers": Quantity(len(lost), f"of {layers} without the statistics of their parameters"),
            "evaluations": Quantity(signals.evaluated, "ran with them"),
        },
        notes=(
            "parameters were loaded or copied, and the statistics that belong to them were not: evaluation subtracts "
            "the initial mean and divides by the initial spread",
            "training in training mode replaces them in time",
        ),
        helps=(*fitting(HOW, signals), f"or {refresh(signals)}"),
    )


def _left(weight: float) -> float:
    """Return the share of the initial values that is left, all of it where updates are not known."""
    return 1.0 if math.isnan(weight) else weight
