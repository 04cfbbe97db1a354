"""Attribution: at which layer, and at which of its call sites, running statistics cost accuracy."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from bnwatch import moments
from bnwatch.evidence.cells import Bench
from bnwatch.evidence.laboratory import AtSite, Budget, ExperimentNotPossibleError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from bnwatch.evidence.cells import Cell
    from bnwatch.evidence.laboratory import Examples, Laboratory, MeanAndVariance, Progress, Split
    from bnwatch.moments import Moments
    from bnwatch.records import CallSite

LEAST_SUSPECTS = 3
"""Suspects that are measured whatever the time: a ranking of the worst few is worth more than none."""


@dataclass(frozen=True, slots=True)
class Difference:
    """How much better one pass is than another on the same examples.

    Attributes:
        gained: accuracy of the one minus that of the other.
        interval: its 95 % interval (Newcombe 1998, method 10).
        p_value: paired and one-sided, that the one is no better (McNemar).
    """

    gained: float
    interval: tuple[float, float]
    p_value: float

    @classmethod
    def between(cls, one: Cell, other: Cell) -> Difference:
        """Return how much better ``one`` is than ``other``."""
        mine, theirs = one.correct, other.correct
        counts = (int(part.sum()) for part in (mine & theirs, mine & ~theirs, theirs & ~mine, ~mine & ~theirs))
        gained, p = one.gain_over(other)
        return cls(gained, moments.paired_interval(*counts), p)


@dataclass(frozen=True, slots=True)
class SiteCost(AtSite):
    """What the running statistics of one layer, or those at one of its call sites, cost.

    Attributes:
        layer: the layer's path.
        index: the call site; None for the layer as a whole, at all of its sites.
        distance: from the running statistics to what enters under batch statistics: root mean square over channels of
            the distance of the means in running standard deviations and of the log of the ratio of the deviations.
        recovered: accuracy that batch statistics win back here, with running statistics everywhere else.
        lost: accuracy that running statistics lose here, with batch statistics everywhere else.
    """

    layer: str
    index: int | None
    distance: float
    recovered: Difference
    lost: Difference


@dataclass(frozen=True, slots=True)
class Attribution:
    """Which layers and call sites cost how much, on the same examples.

    Attributes:
        step: training steps finished.
        epoch: epoch of that step, from 0.
        split: whose examples.
        examples: how many.
        running: accuracy with running statistics everywhere.
        batch: accuracy with batch statistics everywhere.
        cost: what running statistics cost everywhere.
        costs: by what batch statistics alone recover, the most first. A layer that is called once a pass is there as a
            whole, one that is called at several sites as a whole and site by site.
        unmeasured: what there was no time for, the most suspicious first.
        seconds: how long it took, without the first batch.
    """

    step: int
    epoch: int
    split: Split
    examples: int
    running: float
    batch: float
    cost: Difference
    costs: tuple[SiteCost, ...]
    unmeasured: tuple[str, ...] = ()
    seconds: float = 0.0

    def explained(self, share: float) -> SiteCost | None:
        """Return the first of ``costs`` if it alone recovers more than ``share`` of what is lost, else None."""
        first = self.costs[0] if self.costs else None
        return first if first is not None and first.recovered.gained > share * max(self.cost.gained, 0.0) else None

    def __str__(self) -> str:
        """Return the result in a sentence."""
        text = (
            f"running statistics cost {100 * self.cost.gained:.1f} points of {self.split} accuracy "
            f"on {self.examples:,} examples"
        )
        if not self.costs:
            return text
        first = self.costs[0]
        return f"{text}; batch statistics at `{first.subject}` alone win back {100 * first.recovered.gained:.1f}"


@dataclass(frozen=True, slots=True)
class _Suspect(AtSite):
    layer: str
    index: int | None
    sites: tuple[CallSite, ...]
    distance: float


def attribute(
    lab: Laboratory,
    split: Split | None = None,
    *,
    step: int = 0,
    epoch: int = 0,
    budget: Budget | None = None,
    progress: Progress | None = None,
) -> Attribution:
    """Measure what the running statistics cost at each layer and call site, one at a time.

    Every pass measures the same examples. The most suspicious, by what enters them, come first; the time decides how
    many examples are measured, and what is left out at the end.

    Args:
        lab: the laboratory.
        split: whose examples to measure; evaluation examples where there are any if None.
        step: training steps finished.
        epoch: epoch of that step, from 0.
        budget: bounds on examples and time.
        progress: shows how far it is.

    Raises:
        ExperimentNotPossibleError: there are no examples, they are no classification, or no layer normalizes them.
    """
    budget = budget or Budget()
    budget.start()
    split, batches = _examples(lab, split, budget.examples)
    suspects = _suspects(lab, batches[: _enough(batches, budget.enough)])
    passes = 2 * (len(suspects) + 1)
    bench = Bench(lab, budget, progress, total=passes * len(batches), passes=passes)
    running = bench.measure(f"{split} data, running statistics", batches, "running", until=1.0 / passes)
    batches = batches[: bench.reached]
    batch = bench.measure(f"{split} data, batch statistics", batches, "batch")
    costs: list[SiteCost] = []
    for suspect in suspects:
        if len(costs) >= LEAST_SUSPECTS and budget.share(1.0):
            break
        subject = suspect.subject
        repaired = bench.measure(f"batch statistics at {subject} alone", batches, "running", suspect.sites)
        damaged = bench.measure(f"running statistics at {subject} alone", batches, "batch", suspect.sites)
        recovered, lost = Difference.between(repaired, running), Difference.between(batch, damaged)
        costs.append(SiteCost(suspect.layer, suspect.index, suspect.distance, recovered, lost))
    unmeasured = tuple(suspect.subject for suspect in suspects[len(costs) :])
    # of two that recover the same, the one farther off is likelier at fault, and a call site says more than its layer
    costs.sort(key=lambda cost: (-cost.recovered.gained, -cost.lost.gained, -cost.distance, cost.index is None))
    return Attribution(
        step=step,
        epoch=epoch,
        split=split,
        examples=running.examples,
        running=running.accuracy,
        batch=batch.accuracy,
        cost=Difference.between(batch, running),
        costs=tuple(costs),
        unmeasured=unmeasured,
        seconds=budget.spent,
    )


def _examples(lab: Laboratory, split: Split | None, limit: int) -> tuple[Split, Sequence[Examples]]:
    if split is not None:
        return split, lab.examples(split, limit)
    try:
        return "evaluation", lab.examples("evaluation", limit)
    except ExperimentNotPossibleError:
        return "training", lab.examples("training", limit)


def _enough(batches: Sequence[Examples], examples: int) -> int:
    """Return how many batches hold that many examples; one at least."""
    sizes = np.cumsum([len(batch.labels) for batch in batches])
    return int(np.searchsorted(sizes, examples)) + 1


def _suspects(lab: Laboratory, batches: Sequence[Examples]) -> list[_Suspect]:
    """Return layers and the call sites of shared ones, the farthest from their running statistics first."""
    pooled: dict[CallSite, Moments] = {}
    for batch in batches:
        for seen in lab.inputs(batch, "batch"):
            known = pooled.get(seen.site)
            pooled[seen.site] = seen.moments if known is None else moments.pool(known, seen.moments)
    if not pooled:
        msg = "no batch-normalization layer is called on these examples"
        raise ExperimentNotPossibleError(msg)
    specs, running = lab.specs(), lab.running()
    sites: dict[str, dict[CallSite, float]] = {}
    for site, found in pooled.items():
        if site.layer not in running:
            msg = f"`{site.layer}` has no running statistics before its first call"
            raise ExperimentNotPossibleError(msg)
        distance = _distance(found, running[site.layer], specs[site.layer].epsilon)
        sites.setdefault(site.layer, {})[site] = distance
    suspects = []
    for layer, own in sorted(sites.items(), key=lambda item: -max(item[1].values())):
        suspects.append(_Suspect(layer, None, tuple(own), max(own.values())))
        if len(own) > 1:
            nearest_last = sorted(own.items(), key=lambda item: -item[1])
            suspects += [_Suspect(layer, site.index, (site,), distance) for site, distance in nearest_last]
    return suspects


def _distance(seen: Moments, running: MeanAndVariance, epsilon: float) -> float:
    """Return how far moments are from running statistics; infinite where either is not finite.

    Bessel's correction is left alone: with it, running variances estimate that of the pooled examples.
    """
    mean, var = running
    with np.errstate(all="ignore"):
        shift = np.square(seen.mean - mean) / (var + epsilon)
        scale = np.square(0.5 * np.log((seen.var + epsilon) / (var + epsilon)))
        distance = float(np.sqrt(np.mean(shift + scale)))
    return distance if math.isfinite(distance) else math.inf
