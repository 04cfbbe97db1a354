"""Composition: whether training batches are random parts of the training data."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from bnwatch import moments
from bnwatch.evidence.laboratory import AtSite, Budget, ExperimentNotPossibleError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from bnwatch.evidence.laboratory import Examples, Laboratory, Progress
    from bnwatch.moments import Moments
    from bnwatch.records import CallSite

    Calls = dict[CallSite, list[Moments]]
    Rows = NDArray[np.float64]

LEAST_BATCHES = 8
"""Batches that are measured whatever the time, where there are so many: two groups show in no fewer."""

RESHUFFLES = 4
"""Times that the examples are put into other batches: more would hardly sharpen what random batches give."""

SAME = 4
"""Decimals, in standard deviations, to which the mean of the same examples comes out the same."""

LABEL_DRAWS = 20
"""Random batches, of labels alone, behind the expected purity."""


@dataclass(frozen=True, slots=True)
class SiteComposition(AtSite):
    """How far apart the batches are in what enters one call site, under running statistics.

    Attributes:
        layer: the layer's path.
        index: the call site; None for a layer that is called once a pass.
        dispersion: spread between batch means, relative to that of the same examples put into batches at random: the
            ratio of the sums over channels of the variances, each in units of the channel and each mean weighted by
            the elements of its batch. About 1 for random batches.
        p_value: that the batches are random parts of these examples.
        clusters: share of the spread between batch means that two groups of batches account for.
        smaller: share of the batches that are in the smaller of the two groups.
        tail: largest batch variance over the median one, averaged over channels before.
    """

    layer: str
    index: int | None
    dispersion: float
    p_value: float
    clusters: float
    smaller: float
    tail: float


@dataclass(frozen=True, slots=True)
class Composition:
    """How kept training batches are composed, against the same examples in random batches.

    Attributes:
        step: training steps finished.
        epoch: epoch of that step, from 0.
        batches: how many were measured.
        examples: how many they hold.
        smallest: examples of the smallest batch.
        median: examples of the median batch.
        purity: share of the most frequent class within a batch, averaged over batches; None without labels.
        expected: the same of random batches.
        sites: the call sites in the order of the forward pass.
        seconds: how long it took, without the first batch.
    """

    step: int
    epoch: int
    batches: int
    examples: int
    smallest: int
    median: int
    purity: float | None
    expected: float | None
    sites: tuple[SiteComposition, ...]
    seconds: float = 0.0


def composition(
    lab: Laboratory,
    *,
    step: int = 0,
    epoch: int = 0,
    budget: Budget | None = None,
    progress: Progress | None = None,
) -> Composition:
    """Measure whether the kept training batches differ more than random batches of the same examples do.

    Batches are taken evenly from those that were kept, until half of the time is spent; then the same examples pass in
    random batches of the same sizes, once at least. A batch that was kept several times counts once.

    Args:
        lab: the laboratory.
        step: training steps finished.
        epoch: epoch of that step, from 0.
        budget: bounds on examples and time.
        progress: shows how far it is.

    Raises:
        ExperimentNotPossibleError: there are fewer than two training batches, or they cannot be taken apart.
    """
    budget = budget or Budget()
    budget.start()
    batches = _scattered(lab.examples("training", budget.examples))
    if len(batches) < 2:  # noqa: PLR2004 - a spread needs two
        msg = "fewer than two training batches: how they are composed shows in their differences"
        raise ExperimentNotPossibleError(msg)
    rng = np.random.default_rng(0)
    total = len(batches) * (1 + RESHUFFLES)
    composed: Calls = {}
    reached = done = 0
    for batch in batches:
        if reached >= LEAST_BATCHES and budget.share(0.5):
            break
        _collect(lab, batch, composed)
        reached += 1
        done += 1
        if done == 1:
            budget.start()  # frameworks compile at the first batch
        if progress is not None:
            progress("training data, batches as they were", done, total)
    batches, composed = _once_each(batches[:reached], composed)
    reached = len(batches)
    total = done + reached * RESHUFFLES
    sizes = np.array([len(batch.labels) for batch in batches])
    random: list[Calls] = []
    for _ in range(RESHUFFLES):
        if random and budget.share(1.0):
            break
        random.append({})
        for batch in lab.reshuffled(batches, rng.permutation(int(sizes.sum()))):
            _collect(lab, batch, random[-1])
            done += 1
            if progress is not None:
                progress("training data, random batches", done, total)
    labels = [batch.labels for batch in batches]
    known = len(np.unique(np.concatenate(labels))) > 1
    return Composition(
        step=step,
        epoch=epoch,
        batches=reached,
        examples=int(sizes.sum()),
        smallest=int(sizes.min()),
        median=int(np.median(sizes)),
        purity=_purity(labels) if known else None,
        expected=_expected_purity(labels, rng) if known else None,
        sites=tuple(_sites(composed, random, reached)),
        seconds=budget.spent,
    )


def _scattered(batches: Sequence[Examples]) -> list[Examples]:
    """Return the batches in an order of which every beginning is spread evenly: by the golden ratio.

    Weyl (1916): the multiples of an irrational number are spread evenly between whole numbers.
    """
    order = np.argsort(np.arange(len(batches)) * ((5**0.5 - 1.0) / 2.0) % 1.0, kind="stable")
    return [batches[number] for number in np.argsort(order, kind="stable")]


def _once_each(batches: list[Examples], calls: Calls) -> tuple[list[Examples], Calls]:
    """Return the batches and their calls without those that came before: a training in a fixed order repeats its own.

    A batch is taken for one that came before where labels and the batch means at a call site are the same. Where all
    are, they are left as they are: then nothing tells them apart.
    """
    every = {site: own for site, own in calls.items() if len(own) == len(batches)}
    own = next(iter(every.values()), None)
    if own is None:
        return batches, calls
    unit = np.sqrt(np.mean([one.var for one in own], axis=0))
    with np.errstate(all="ignore"):
        means = [np.round(one.mean / unit, SAME).tobytes() for one in own]
    labels = [np.sort(batch.labels).tobytes() for batch in batches]
    known = sorted({pair: n for n, pair in enumerate(zip(means, labels, strict=True))}.values())
    if len(known) in {1, len(batches)}:
        return batches, calls
    return [batches[n] for n in known], {site: [own[n] for n in known] for site, own in every.items()}


def _collect(lab: Laboratory, batch: Examples, calls: Calls) -> None:
    for one in lab.inputs(batch, "running"):
        if one.moments.count:
            calls.setdefault(one.site, []).append(one.moments)


def _purity(labels: Sequence[NDArray[np.int64]]) -> float:
    return float(np.mean([np.bincount(own).max() / len(own) for own in labels]))


def _expected_purity(labels: Sequence[NDArray[np.int64]], rng: np.random.Generator) -> float:
    ends, every = np.cumsum([len(own) for own in labels])[:-1], np.concatenate(labels)
    return float(np.mean([_purity(np.split(rng.permutation(every), ends)) for _ in range(LABEL_DRAWS)]))


def _sites(composed: Calls, random: Sequence[Calls], batches: int) -> list[SiteComposition]:
    """Return every call site that each batch reaches and that holds numbers."""
    several = {site.layer for site in composed if site.index}
    found = []
    for site, own in composed.items():
        every = [own, *(calls.get(site, []) for calls in random)]
        if any(len(one) != batches or not _finite(one) for one in every):
            continue
        dispersion, p, clusters, smaller = _compare(every)
        spreads = np.array([float(one.var.mean()) for one in own])
        middle = float(np.median(spreads))
        found.append(
            SiteComposition(
                layer=site.layer,
                index=site.index if site.layer in several else None,
                dispersion=dispersion,
                p_value=p,
                clusters=clusters,
                smaller=smaller,
                tail=float(spreads.max()) / middle if middle > 0.0 else 1.0,
            )
        )
    return found


def _finite(own: Sequence[Moments]) -> bool:
    return all(bool(np.isfinite(one.mean).all() and np.isfinite(one.var).all()) for one in own)


def _compare(every: Sequence[Sequence[Moments]]) -> tuple[float, float, float, float]:
    """Return dispersion, its p-value, clusters and the smaller share; ``every`` is batches as they were, then random.

    The ratio is held against F. Degrees of freedom are those of independent channels that would scatter as much
    (Satterthwaite 1946): (tr S)^2 / tr S^2 of the covariance S of random batches, for each batch but one. Estimated
    from few batches tr S^2 comes out too large, which errs on the safe side.
    """
    pooled = functools.reduce(moments.pool, every[0])
    varies = pooled.var > moments.ROUNDING * np.square(pooled.mean)
    composed, *random = (_deviations(own, pooled.var, varies) for own in every)
    drawn = np.concatenate(random)
    between, expected = float(np.square(composed).sum()), float(np.square(drawn).sum()) / len(random)
    if expected <= 0.0:
        return 1.0, 1.0, 0.0, 0.0
    channels = float(np.square(drawn).sum()) ** 2 / float(np.square(drawn @ drawn.T).sum())
    freedom = channels * (len(composed) - 1)
    p = moments.f_survival(between / expected, freedom, freedom * len(random))
    return between / expected, p, *_two_groups(composed)


def _deviations(own: Sequence[Moments], unit: Rows, varies: NDArray[np.bool_]) -> Rows:
    """Return how far each batch mean is from that of all, shape ``(batches, channels)``: each of the same variance.

    A mean of n elements scatters with 1/n, whence the root of n: a small batch is not far off for being small.
    """
    count = np.array([one.count for one in own], dtype=np.float64)[:, None]
    mean = np.array([one.mean[varies] for one in own])
    centre = (count * mean).sum(axis=0) / count.sum()
    deviations: Rows = np.sqrt(count) * (mean - centre) / np.sqrt(unit[varies])
    return deviations


def _two_groups(deviations: Rows) -> tuple[float, float]:
    """Return the share of the spread that two groups of batches account for, and the share of batches in the smaller.

    The groups are those along the first principal component that account for most of it.
    """
    total = float(np.square(deviations).sum())
    if total <= 0.0:
        return 0.0, 0.0
    values, vectors = np.linalg.eigh(deviations @ deviations.T)
    order = np.argsort(vectors[:, -1] * values[-1] ** 0.5)
    ahead = np.cumsum(deviations[order], axis=0)[:-1]
    everything = deviations.sum(axis=0)
    first = np.arange(1, len(order), dtype=np.float64)
    last = len(order) - first
    explained = np.square(ahead).sum(axis=1) / first + np.square(everything - ahead).sum(axis=1) / last
    best = int(explained.argmax())
    return min(1.0, float(explained[best]) / total), min(best + 1, len(order) - best - 1) / len(order)
