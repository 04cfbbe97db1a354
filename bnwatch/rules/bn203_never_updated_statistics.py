"""BN203: the running statistics do not move."""

from __future__ import annotations

from itertools import takewhile
from typing import TYPE_CHECKING

from bnwatch.diagnosis import Quantity, Severity, Skipped
from bnwatch.rules._base import Finding, Limits, Threshold, rule
from bnwatch.signals import Flag

if TYPE_CHECKING:
    from collections.abc import Iterator

    from bnwatch.signals import Signals


@rule(
    "BN203",
    "never-updated-statistics",
    severity=Severity.ERROR,
    samples=Threshold(3, "convention", "sampled steps over which the statistics must not have moved"),
)
def never_updated_statistics(signals: Signals, limits: Limits) -> Iterator[Finding | Skipped]:
    """Batch statistics vary from step to step, and the running statistics are bitwise unmoved."""
    stuck = [s for s in signals.sites(Flag.UNMOVED) if s.flag & Flag.BATCH_VARIED and s.site.index == 0]
    seen = len(signals.tables)
    if stuck and signals.table is not None:
        # flags count from the first sample with these layers
        now = signals.table.sites
        seen = sum(1 for _ in takewhile(lambda table: table.sites == now, reversed(signals.tables)))
    if signals.table is not None and signals.table.sites and seen < limits["samples"]:
        yield Skipped("BN203", f"{seen} of {limits['samples']:.0f} samples seen")
        return
    for site in stuck:
        initial = bool(site.flag & Flag.INITIAL)
        frozen = not site.spec.trainable
        yield Finding(
            subject=site.spec.path,
            severity=Severity.INFO if frozen else Severity.ERROR,
            message=f"the running statistics of `{site.spec.path}` have not moved in {seen} sampled steps, "
            "while its batch statistics did" + (": they are still the initial values" if initial else ""),
            evidence={
                "samples": Quantity(seen, "sampled steps without movement"),
                "steps": Quantity(signals.step, "training steps"),
                "decay": Quantity(site.spec.decay, "weight of the old value"),
            },
            notes=(
                (
                    "training normalizes with batch statistics, evaluation with running statistics that take in "
                    "nothing of these data"
                ),
            ),
            helps=(
                ("a decay of 1 never takes anything in: use 0.9 to 0.99",)
                if site.spec.decay >= 1.0
                else (
                    (
                        "check that the update of the running statistics runs in each training step "
                        "(TensorFlow 1: the update ops; a loop of your own on JAX: assign the new "
                        "non-trainable variables)"
                    ),
                )
            ),
        )
