"""BN203: the running statistics do not move."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from bnwatch.diagnosis import Quantity, Severity, Skipped
from bnwatch.rules._base import Finding, Limits, Threshold, rule
from bnwatch.signals import Flag

if TYPE_CHECKING:
    from collections.abc import Iterator

    from bnwatch.signals import Signals, SiteSignals

Half = Literal["mean", "variance"]


@rule(
    "BN203",
    "never-updated-statistics",
    severity=Severity.ERROR,
    samples=Threshold(3, "convention", "sampled steps over which the statistics must not have moved"),
)
def never_updated_statistics(signals: Signals, limits: Limits) -> Iterator[Finding | Skipped]:
    """Batch statistics vary from step to step, and the running statistics are bitwise unmoved, both or one of them."""
    stuck: list[tuple[SiteSignals, Half | None]] = [
        (s, None) for s in signals.sites(Flag.UNMOVED) if s.flag & Flag.BATCH_VARIED and s.site.index == 0
    ]
    stuck += _halves(signals, int(limits["samples"]))
    # flags count from the first sample with these layers
    seen = len(signals.columns("flags")) if stuck else len(signals.tables)
    if signals.table is not None and signals.table.sites and seen < limits["samples"]:
        yield Skipped("BN203", f"{seen} of {limits['samples']:.0f} samples seen")
        return
    for site, half in stuck:
        initial = bool(site.flag & Flag.INITIAL)
        frozen = not site.spec.trainable
        yield Finding(
            subject=site.spec.path,
            severity=Severity.INFO if frozen else Severity.ERROR,
            message=f"the running {half or 'statistics'} of `{site.spec.path}` ha{'s' if half else 've'} not moved in "
            f"{seen} sampled steps, while its batch {half or 'statistics'} did"
            + (": they are still the initial values" if initial else ""),
            evidence={
                "samples": Quantity(seen, "sampled steps without movement"),
                "steps": Quantity(signals.step, "training steps"),
                "decay": Quantity(site.spec.decay, "weight of the old value"),
            },
            notes=(
                (
                    "training normalizes with batch statistics, evaluation with running statistics that take in "
                    + ("nothing of these data" if half is None else f"nothing of the {half} of these data")
                ),
            ),
            helps=(_help(site, half),),
        )


def _help(site: SiteSignals, half: Half | None) -> str:
    if site.spec.decay >= 1.0:
        return "a decay of 1 never takes anything in: use 0.9 to 0.99"
    if half is not None:
        return f"check that a layer of your own updates its running {half} where it updates the other statistic"
    return (
        "check that the update of the running statistics runs in each training step (TensorFlow 1: the update ops; a "
        "loop of your own on JAX: assign the new non-trainable variables)"
    )


def _halves(signals: Signals, samples: int) -> list[tuple[SiteSignals, Half | None]]:
    """Return the sites of which one half of the running statistics moves and the other does not, though batches vary.

    Only a variance has a flag of its own. A mean stands still where its average over the channels does, to the bit.
    """
    known = signals.columns("flags", samples)
    if len(known) < samples:
        return []

    flags = known[-1].astype(int)
    variance = (flags & Flag.UNMOVED_VARIANCE > 0) & (flags & Flag.UNMOVED == 0) & signals.moved("batch_std", samples)
    mean = signals.moved("running_std", samples) & ~signals.moved("running_mean", samples)
    mean &= signals.moved("batch_mean", samples)
    halves: list[tuple[SiteSignals, Half | None]] = []
    for number, site in enumerate(signals.sites() if (variance | mean).any() else ()):
        if site.site.index == 0 and (variance[number] or mean[number]):
            halves.append((site, "variance" if variance[number] else "mean"))
    return halves
