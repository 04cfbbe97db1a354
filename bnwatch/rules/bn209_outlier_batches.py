"""BN209: a few examples dominate the running variance."""

from __future__ import annotations

import math
from collections import Counter
from statistics import median
from typing import TYPE_CHECKING, NamedTuple

from bnwatch.diagnosis import Quantity, Severity, Skipped
from bnwatch.rules import _settling
from bnwatch.rules._base import (
    Finding,
    Limits,
    Threshold,
    cells_table,
    costs,
    refresh,
    restless,
    rule,
    within_epochs,
)
from bnwatch.signals import stacked

if TYPE_CHECKING:
    from collections.abc import Iterator

    from bnwatch.signals import Signals

RECENT = 16
"""Samples that are looked back on."""


class _Wide(NamedTuple):
    """A layer whose running deviation is not that of its batches."""

    layer: str
    wide: float
    largest: float
    usual: float


@rule(
    "BN209",
    "outlier-batches",
    severity=Severity.WARNING,
    samples=Threshold(6.0, "convention", "sampled steps behind the usual spread of a batch"),
    wide=Threshold(2.0, "convention", "running standard deviation, in that of the usual batch"),
    tail=Threshold(10.0, "convention", "variance of the batch that did it, in that of the usual batch"),
    cost=Threshold(0.01, "convention", "share of the examples: a smaller loss is not worth a warning"),
    alpha=Threshold(1e-3, "convention", "false alarms per experiment (paired test on the same examples)"),
)
def outlier_batches(signals: Signals, limits: Limits) -> Iterator[Finding | Skipped]:
    """A few examples dominate the running variance, so that evaluation normalizes all others to next to nothing."""
    found = [] if restless(signals) else list(_wide(signals, limits))
    if not found:
        return
    worst = max(found, key=lambda one: one.wide)
    cells = signals.cells
    if cells is None:
        yield Skipped("BN209", "whether the wide running variance costs accuracy is not measured yet", needs="cells")
    rows = dict(cells.rows()) if cells is not None else {}
    lost = [
        (split, row["batch"].gain_over(row["running"]))
        for split, row in rows.items()
        if costs(row, limits["cost"], limits["alpha"])
    ]
    cost = ""
    if lost:
        split, (gained, p) = lost[-1]
        cost = f", which costs {100 * gained:.1f} points of {split} accuracy"
    yield Finding(
        subject=worst.layer,
        # before the first evaluation it harms nobody, and the experiment that follows this one may refute it
        severity=None if lost or (cells is None and (signals.evaluated or signals.ended)) else Severity.INFO,
        message=f"rare batches widen the running statistics of `{worst.layer}` to {worst.wide:.3g} times the standard "
        f"deviation of the usual batch{cost}",
        evidence={
            "wide": Quantity(worst.wide, "running standard deviation / that of the usual batch"),
            "tail": Quantity(worst.largest**2, "variance of the widest batch / that of the usual one"),
            "usual": Quantity(worst.usual, "standard deviation of the usual batch"),
            "layers": Quantity(len(found), "of which this is so"),
            **(
                {"cost": Quantity(gained, f"of {split} accuracy"), "p_value": Quantity(p, "of the paired test")}
                if lost
                else {}
            ),
        },
        table=cells_table(cells) if cells is not None else None,
        notes=(
            (
                "a variance is a mean of squares: one example a thousand times as large as the others outweighs a "
                "million of them, and the running variance keeps it for as long as its memory is"
            ),
            f"evaluation divides by it, so usual examples come out {1.0 / worst.wide:.2g} times as wide as in training",
        ),
        helps=(
            "look for examples that are far out of range: the largest absolute value of each, as the model gets them",
            "clip or leave out such examples, or take the logarithm of what spans several orders of magnitude",
            refresh(signals) + ", after that",
        ),
    )


def _wide(signals: Signals, limits: Limits) -> Iterator[_Wide]:
    """Yield the layers whose running variance holds a variance that the usual batch does not have.

    What the moving average took in between two samples is solved from it, so a batch need not be sampled to be seen.
    """
    last = signals.table
    tables = [t for t in list(signals.tables)[-RECENT:] if last is not None and t.sites == last.sites]
    within = (within_epochs(signals) or tables)[-RECENT:]
    if last is None or len(within) < limits["samples"]:
        return
    # the ends of epochs may be all that is sampled, and hold the same batch each time
    usual_of = stacked("batch_std", within)
    batch, taken = (stacked(name, tables) for name in ("batch_std", "recovered_std"))
    candidates = last.column("running_std") > limits["wide"] * usual_of.min(axis=0)
    calls = Counter(site.layer for site in last.sites) if candidates.any() else Counter[str]()
    numbers = candidates.nonzero()[0].tolist()
    for number, site in zip(numbers, signals.at(candidates), strict=True):
        left = _settling.held(site, site.updates)
        settled = left <= _settling.WEIGHT or math.isnan(left)
        own, usual = batch[:, number].tolist(), median(usual_of[:, number].tolist())
        if calls[site.spec.path] > 1 or not settled or not usual > 0.0 or not all(map(math.isfinite, own)):
            continue
        if _drifts(usual_of[:, number].tolist(), limits["wide"]):
            continue
        known = [*own, *filter(math.isfinite, taken[1:, number].tolist())]
        largest, wide = max(known) / usual, site.running_std / usual
        if wide > limits["wide"] and largest**2 > limits["tail"]:
            yield _Wide(site.spec.path, wide, largest, usual)


def _drifts(deviations: list[float], apart: float) -> bool:
    """Return whether batches on the whole are others now than in the first half, so that none is the usual one."""
    half = len(deviations) // 2
    less, more = sorted((median(deviations[:half]), median(deviations[half:])))
    return more > apart * less
