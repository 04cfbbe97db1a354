"""BN401: NaN or infinity in batch or running statistics."""

from __future__ import annotations

from typing import TYPE_CHECKING

from bnwatch.diagnosis import Quantity, Severity, Skipped
from bnwatch.rules._base import Finding, Limits, rule
from bnwatch.signals import Flag

if TYPE_CHECKING:
    from collections.abc import Iterator

    from bnwatch.signals import Signals


@rule("BN401", "non-finite-statistics", severity=Severity.ERROR)
def non_finite_statistics(signals: Signals, _: Limits) -> Iterator[Finding | Skipped]:
    """NaN or infinity in batch or running statistics."""
    broken = list(signals.sites(Flag.NON_FINITE_BATCH | Flag.NON_FINITE_RUNNING))
    if not broken:
        return
    first = next((s for s in broken if s.flag & Flag.NON_FINITE_BATCH), broken[0])
    in_batch = bool(first.flag & Flag.NON_FINITE_BATCH)
    yield Finding(
        subject=first.spec.path,
        message=f"`{first.spec.path}` has NaN or infinity in its {'batch' if in_batch else 'running'} statistics",
        evidence={
            "non_finite": Quantity(first.non_finite, f"of {first.spec.channels} channels"),
            "sites": Quantity(len(broken), "call sites affected"),
        },
        notes=(
            (
                "it is the first of these layers in the forward pass: what breaks lies in front of it, inputs, "
                "activations, or weights that too large a step has broken"
                if in_batch
                else "a single bad batch is enough: a moving average never forgets NaN. Training goes on with batch "
                "statistics and its loss may look healthy, while evaluation gives NaN"
            ),
        ),
        helps=(
            "check inputs and labels for NaN, lower the learning rate, or clip gradients",
            "after mending the cause, reset or re-estimate the running statistics: they do not recover by themselves",
        ),
    )
