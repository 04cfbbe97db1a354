"""BN402: a running variance below zero."""

from __future__ import annotations

from typing import TYPE_CHECKING

from bnwatch.diagnosis import Quantity, Severity, Skipped
from bnwatch.rules._base import Finding, Limits, decay_argument, named, rule
from bnwatch.signals import Flag

if TYPE_CHECKING:
    from collections.abc import Iterator

    from bnwatch.signals import Signals


@rule("BN402", "negative-running-variance", severity=Severity.ERROR)
def negative_running_variance(signals: Signals, _: Limits) -> Iterator[Finding | Skipped]:
    """A running variance is below zero, so evaluation takes the root of a negative number."""
    broken = list(signals.sites(Flag.NEGATIVE_VARIANCE))
    if not broken:
        return
    first = broken[0].spec
    outside = not 0.0 <= first.decay <= 1.0
    yield Finding(
        subject=first.path,
        message=f"the running variance is below zero at {named(s.spec.path for s in broken)}",
        evidence={
            "sites": Quantity(len(broken), "call sites affected"),
            "decay": Quantity(first.decay, "weight of the old value"),
            "epsilon": Quantity(first.epsilon, "added before the root is taken"),
        },
        notes=(
            "evaluation divides by the root of variance plus epsilon, which is NaN below zero; training normalizes "
            "with batch statistics and goes on as if nothing were wrong",
            f"a decay of {first.decay:g} lies outside 0 to 1, so the average is none"
            if outside
            else "an average of variances cannot be negative, so something else wrote it",
        ),
        helps=(
            *((f"build the layer with {decay_argument(signals, '0.9')}",) * outside),
            "look at what assigns the running variance: an update of your own, as the mean of squares minus the "
            "square of the mean is, or values that were loaded or averaged",
            "then reset or re-estimate the running statistics: they do not recover by themselves",
        ),
    )
