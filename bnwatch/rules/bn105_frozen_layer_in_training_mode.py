"""BN105: a frozen layer normalizes with batch statistics."""

from __future__ import annotations

from typing import TYPE_CHECKING

from bnwatch.diagnosis import Quantity, Severity, Skipped
from bnwatch.rules._base import Finding, Limits, Threshold, fitting, named, rule
from bnwatch.signals import Flag

if TYPE_CHECKING:
    from collections.abc import Iterator

    from bnwatch.signals import Signals

HOW = {
    "bnwatch.chainer": (
        "Chainer: call the frozen part inside `with chainer.using_config('train', False):`; `disable_update()` freezes "
        "parameters and nothing else",
    ),
    "bnwatch.keras": (
        "Keras: call the frozen part with `training=False`: `x = base(x, training=False)`",
        "or set `layer.trainable = False` on it, and compile again; leaving its weights out of the gradient is not "
        "enough",
    ),
}


@rule(
    "BN105",
    "frozen-layer-in-training-mode",
    severity=Severity.WARNING,
    samples=Threshold(3, "convention", "sampled steps in which the layer used batch statistics"),
    dead=Threshold(0.99, "measured", "share of examples with all units zero: what feeds it gets no gradient (BN306)"),
)
def frozen_layer_in_training_mode(signals: Signals, limits: Limits) -> Iterator[Finding | Skipped]:
    """A layer whose scale and offset are frozen normalizes with batch statistics in training."""
    if signals.table is None:
        yield Skipped("BN105", "no training step was seen")
        return
    still = signals.evaluations[-1].still if signals.evaluations else ()
    if still and (_dead(signals, limits["dead"]) or _single(signals)):
        still = ()
    if not still and all(spec.trainable for spec in signals.specs.values()):
        return
    sites = {s.spec.path: s for s in signals.sites() if s.site.index == 0 and s.site.replica == 0}
    frozen = [path for path, s in sites.items() if not s.spec.trainable or path in still]
    if not frozen:
        return
    seen = sum(any(site.layer == frozen[0] for site in table.sites) for table in signals.tables)
    if seen < limits["samples"]:
        yield Skipped("BN105", f"{seen} of {limits['samples']:.0f} samples seen")
        return
    kept = all(sites[path].flag & Flag.UNMOVED for path in frozen)
    many = len(frozen) > 1
    yield Finding(
        subject="model" if many else frozen[0],
        message=f"{named(frozen)} {'are' if many else 'is'} frozen and still normalize{'' if many else 's'} with batch "
        f"statistics in training; {'their' if many else 'its'} running statistics {'stay' if kept else 'move on'}",
        evidence={
            "layers": Quantity(len(frozen), f"of {len(sites)} that use batch statistics are frozen"),
            "untrainable": Quantity(sum(not sites[path].spec.trainable for path in frozen), "of them set to be frozen"),
            "mean_shift": Quantity(
                max(sites[path].mean_shift for path in frozen), "running standard deviations to the batch mean, at most"
            ),
        },
        notes=(
            (
                "what is trained behind these layers learns from batch statistics of the new data; evaluation gives it "
                "the kept statistics of the old data"
                if kept
                else "the frozen part changes with every batch: its running statistics follow the new data, so it is "
                "no longer what was trained"
            ),
        ),
        helps=fitting(HOW, signals),
    )


def _dead(signals: Signals, limit: float) -> bool:
    """Return whether parameters stand still because no gradient reaches them."""
    return bool(signals.looks) and any(layer.zero_samples >= limit for layer in signals.looks[-1].layers)


def _single(signals: Signals) -> bool:
    """Return whether a layer only ever normalized one element a channel (BN205).

    Its input is 0 then whatever comes in, so no gradient reaches its scale or what feeds it.
    """
    counted = [(table.sites, table.column("count") == 1) for table in signals.tables]
    once = {sites[n].layer for sites, single in counted for n in single.nonzero()[0].tolist()}
    if not once:
        return False
    more = {
        site.layer for sites, single in counted for site, one in zip(sites, single.tolist(), strict=True) if not one
    }
    return bool(once - more)
