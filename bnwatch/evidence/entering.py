"""What enters batch normalization in evaluation, against what enters it in training."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from bnwatch import moments
from bnwatch.evidence.laboratory import ENOUGH, SPLITS, AtSite, Budget

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

    from bnwatch.evidence.laboratory import Examples, Laboratory, MeanAndVariance, Progress, Split
    from bnwatch.moments import Moments
    from bnwatch.records import CallSite, LayerSpec

    Seen = Mapping[Split, Mapping[CallSite, Sequence[Moments]]]

BATCHES = 8
"""Batches of a split that are measured, more where they are small: the F test then has 7 degrees of freedom, and a
difference of six standard errors is found at p = 1e-3."""

LEAST_BATCHES = 4
"""Batches of a split that are measured whatever the time: with fewer, only gross differences are found."""

TESTS = 2
"""Splits are compared in their means and in their spreads."""


@dataclass(frozen=True, slots=True)
class SiteShift(AtSite):
    """How differently evaluation examples enter one call site than training examples do.

    Attributes:
        layer: the layer's path.
        index: the call site; None for a layer that is called once a pass.
        mean_shift: root mean square over channels of (evaluation - training mean), in training standard deviations.
        std_ratio: geometric mean over channels of evaluation / training standard deviation; channels that are constant
            in either are left out.
        p_value: that both are drawn from one population; None where that cannot be told.
        held_shift: root mean square over channels of (training - running mean), in running standard deviations.
        held_ratio: geometric mean over channels of training / running standard deviation: what enters from training
            examples in evaluation, against what the running statistics hold; None where a layer has none yet.
        awakened: channels that are constant over training examples and vary over evaluation examples.
    """

    layer: str
    index: int | None
    mean_shift: float
    std_ratio: float
    p_value: float | None
    held_shift: float | None = None
    held_ratio: float | None = None
    awakened: int = 0


@dataclass(frozen=True, slots=True)
class Entering:
    """The moments of what enters every call site, evaluation against training examples, under running statistics.

    Attributes:
        step: training steps finished.
        epoch: epoch of that step, from 0.
        training: training examples that were measured.
        evaluation: evaluation examples that were measured.
        sites: the call sites in the order of the forward pass.
        untold: why p-values are missing; None where they are not.
        seconds: how long it took, without the first batch.
    """

    step: int
    epoch: int
    training: int
    evaluation: int
    sites: tuple[SiteShift, ...]
    untold: str | None = None
    seconds: float = 0.0


def entering(
    lab: Laboratory,
    *,
    step: int = 0,
    epoch: int = 0,
    budget: Budget | None = None,
    progress: Progress | None = None,
) -> Entering:
    """Measure how differently evaluation examples enter each call site than training examples do.

    Both pass through the network as it is evaluated: running statistics, dropout off. Batches are taken evenly from
    those that were kept, of both splits in turn, until they are enough or the time is spent.

    Args:
        lab: the laboratory.
        step: training steps finished.
        epoch: epoch of that step, from 0.
        budget: bounds on examples and time.
        progress: shows how far it is.

    Raises:
        ExperimentNotPossibleError: there are no training or no evaluation examples, or the model cannot be called.
    """
    budget = budget or Budget()
    budget.start()
    splits = {split: _spread(lab.examples(split, budget.examples)) for split in SPLITS}
    total = sum(map(len, splits.values()))
    seen: dict[Split, dict[CallSite, list[Moments]]] = {split: {} for split in SPLITS}
    examples = dict.fromkeys(SPLITS, 0)
    done = 0
    for number in range(max(map(len, splits.values()))):
        if number >= LEAST_BATCHES and budget.share(1.0):
            break
        for split, batches in splits.items():
            for batch in batches[number : number + 1]:
                for one in lab.inputs(batch, "running"):
                    if one.moments.count:
                        seen[split].setdefault(one.site, []).append(one.moments)
                examples[split] += len(batch.labels)
                done += 1
                if done == 1:
                    budget.start()  # frameworks compile at the first batch
                if progress is not None:
                    progress(f"{split} data, what enters each layer", done, total)
    sites = tuple(_shifts(seen, lab.specs(), lab.running()))
    return Entering(
        step=step,
        epoch=epoch,
        training=examples["training"],
        evaluation=examples["evaluation"],
        sites=sites,
        untold=_untold(seen, sites),
        seconds=budget.spent,
    )


def _spread(batches: Sequence[Examples]) -> list[Examples]:
    """Return as many batches as the test needs, evenly from all: what comes sorted is not judged by its beginning."""
    sizes = sum(len(batch.labels) for batch in batches)
    wanted = min(len(batches), max(BATCHES, -(-ENOUGH * len(batches) // max(sizes, 1))))
    return [batches[number * len(batches) // wanted] for number in range(wanted)]


def _shifts(seen: Seen, specs: Mapping[str, LayerSpec], running: Mapping[str, MeanAndVariance]) -> list[SiteShift]:
    training, evaluation = (seen[split] for split in SPLITS)
    sites = [site for site in training if site in evaluation]
    several = {site.layer for site in sites if site.index}
    return [
        SiteShift(
            site.layer,
            site.index if site.layer in several else None,
            *_compare(training[site], evaluation[site], specs[site.layer].epsilon),
            *_held(training[site], specs[site.layer], running.get(site.layer)),
            _awakened(training[site], evaluation[site]),
        )
        for site in sites
    ]


def _held(
    training: Sequence[Moments], spec: LayerSpec, held: MeanAndVariance | None
) -> tuple[float | None, float | None]:
    """Return shift of the means and ratio of the deviations against the running statistics, epsilon added to both."""
    if held is None:
        return None, None
    corrected = moments.bessel_factor(float(np.median([one.count for one in training])))
    mean, var = held[0], held[1] / (corrected if spec.bessel_corrected else 1.0) + spec.epsilon
    known = functools.reduce(moments.pool, training)
    with np.errstate(all="ignore"):
        shift = float(np.sqrt(np.mean(np.square(known.mean - mean) / var)))
        return shift, float(np.exp(np.mean(np.log((known.var + spec.epsilon) / var)) / 2.0))


def _awakened(training: Sequence[Moments], evaluation: Sequence[Moments]) -> int:
    """Return how many channels are constant over training examples and vary over evaluation examples."""
    known, new = functools.reduce(moments.pool, training), functools.reduce(moments.pool, evaluation)
    return int((_constant(known) & ~_constant(new) & np.isfinite(new.var)).sum())


def _constant(one: Moments) -> NDArray[np.bool_]:
    return one.var <= moments.ROUNDING * np.square(one.mean)


def _untold(seen: Seen, sites: Sequence[SiteShift]) -> str | None:
    """Return why p-values are missing, None where none is."""
    if sites and all(site.p_value is not None for site in sites):
        return None
    for split, calls in seen.items():
        if max(map(len, calls.values()), default=0) < 2:  # noqa: PLR2004 - a spread needs two
            return f"fewer than two {split} batches: a difference is held against the spread from batch to batch"
    return "what enters a layer is not finite" if sites else "no call site is common to training and evaluation"


def _compare(
    training: Sequence[Moments], evaluation: Sequence[Moments], epsilon: float
) -> tuple[float, float, float | None]:
    """Return shift of the means, ratio of the deviations, and the p-value that both are one population."""
    known, new = functools.reduce(moments.pool, training), functools.reduce(moments.pool, evaluation)
    with np.errstate(all="ignore"):
        shift = float(np.sqrt(np.mean(np.square(new.mean - known.mean) / (known.var + epsilon))))
        vary = ~(_constant(known) | _constant(new))
        ratio = float(np.exp(np.mean(np.log(new.var[vary] / known.var[vary])) / 2.0)) if vary.any() else 1.0
        p = _same_population(training, evaluation, known, new, epsilon)
    return shift, ratio, p


def _same_population(
    training: Sequence[Moments], evaluation: Sequence[Moments], known: Moments, new: Moments, epsilon: float
) -> float | None:
    """Return the p-value that both splits, pooled ``known`` and ``new``, are one population: the test of call sites.

    Groups of batches are its steps, the splits its sites. Spreads are compared as mean squares about the midpoint of
    the two means: other than a variance or its logarithm, these expect the same whatever the size of a batch.
    """
    steps = min(len(training), len(evaluation))
    if steps < 2:  # noqa: PLR2004 - a spread needs two
        return None
    groups = [[functools.reduce(moments.pool, own[n::steps]) for own in (training, evaluation)] for n in range(steps)]
    mean, var = (np.array([[getattr(one, part) for one in group] for group in groups]) for part in ("mean", "var"))
    if not (np.isfinite(mean).all() and np.isfinite(var).all()):
        return None
    unit = (known.var + new.var) / 2.0 + epsilon
    squares = (var + np.square(mean - (known.mean + new.mean) / 2.0)) / unit
    ratios = [_ratio(value) for value in (mean / np.sqrt(unit), squares)]
    return min(1.0, TESTS * moments.same_sites_p(float(np.fmax.reduce(ratios)), len(SPLITS), steps))


def _ratio(value: NDArray[np.float64]) -> float:
    """Return the F ratio of values of shape ``(steps, splits, channels)``."""
    between, within = moments.between_and_within(value)
    return float(between.sum() / within.sum())
