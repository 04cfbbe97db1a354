"""Recalibration: running statistics that are those of the training data under the weights as they are now."""

from __future__ import annotations

import difflib
import itertools
import math
from collections import Counter
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Literal

import numpy as np

from bnwatch import moments

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Mapping, Sequence

    from bnwatch.evidence.laboratory import Examples, Laboratory, MeanAndVariance, Progress
    from bnwatch.moments import Moments, Vector
    from bnwatch.records import CallSite, LayerSpec

SITE_BATCHES = 4
"""Batches from which call sites can be compared: fewer say too little about the spread over batches."""

SITE_ALPHA = 0.01
"""False refusals per layer: a mixture assigned for good is worse than one refusal in a hundred."""

SITE_TESTS = 2
"""Call sites are compared in their means and in their spreads."""

SITE_SHIFT = 0.1
"""Standard deviations between call sites below which one set of statistics fits them all."""


@dataclass(frozen=True, slots=True)
class LayerChange:
    """What a recalibration did to one layer.

    Attributes:
        layer: its path.
        mean_shift: root mean square over channels of (new - old running mean), in old running standard deviations.
        std_ratio: geometric mean over channels of new / old running standard deviation.
        count: elements per channel behind the new statistics.
    """

    layer: str
    mean_shift: float
    std_ratio: float
    count: int


@dataclass(frozen=True, slots=True)
class Recalibration:
    """What `recalibrate` did.

    Attributes:
        layers: the layers that have new running statistics, in the order of their first call.
        uncalled: layers that were to have some and were not called on these batches; they are as they were.
        examples: how many were seen.
        batches: how many.
        exact: whether each layer was measured behind layers that normalize with their new statistics.
    """

    layers: tuple[LayerChange, ...]
    uncalled: tuple[str, ...]
    examples: int
    batches: int
    exact: bool

    def __str__(self) -> str:
        """Return what was done in a sentence."""
        first = max(self.layers, key=lambda change: change.mean_shift + abs(math.log(change.std_ratio)))
        many = "1 layer" if len(self.layers) == 1 else f"{len(self.layers):,} layers"
        return (
            f"re-estimated the running statistics of {many} over {self.examples:,} examples; `{first.layer}` changed "
            f"most: its means by {first.mean_shift:.3g} standard deviations, these by a factor of {first.std_ratio:.3g}"
        )


def recalibrate(
    lab: Laboratory,
    batches: Iterable[Examples],
    layers: Collection[str] | None = None,
    *,
    exact: bool = False,
    progress: Progress | None = None,
) -> Recalibration:
    """Set running statistics to the mean and variance over batches, with the weights as they are.

    As in PreciseBN (Wu and Johnson 2021, arXiv:2105.07576): moments are pooled over all batches, in float64. Where a
    framework averages batch variances with Bessel's correction, m / (m - 1) for m elements per channel of a batch, it
    estimates the variance of the population without bias. So does n / (n - 1) times the pooled variance of all n
    elements per channel, and that is stored.

    Args:
        lab: the laboratory of the model.
        batches: training batches, as large and as composed as those of the training.
        layers: paths of layers, or patterns such as ``encoder/*``; all layers if None.
        exact: measure layer by layer, each behind layers that normalize with their new running statistics, as they
            will in evaluation: one pass over the batches a call site. Else one pass in which every layer normalizes
            with batch statistics.
        progress: shows how far it is.

    Raises:
        ValueError: there are no batches; a name fits no layer; none of the layers is called on the batches; statistics
            are not finite; a layer is called at several sites that see different data, or too few batches are given to
            tell. Nothing is changed then.
        ExperimentNotPossibleError: the model cannot be called on a batch. Nothing is changed then.
    """
    batches = list(batches)
    if not batches:
        msg = "recalibrate needs training batches, got none"
        raise ValueError(msg)
    specs = lab.specs()
    chosen = _chosen(specs, layers)
    before = {layer: statistics for layer, statistics in lab.running().items() if layer in chosen}
    seen = _Pass(lab, batches, "batch", chosen, _steps(progress, "every layer", len(batches)))
    if not seen.pooled:
        msg = f"none of these layers is called on the batches: {', '.join(chosen)}"
        raise ValueError(msg)
    for site in seen.pooled:
        if site.layer not in before:
            msg = f"`{site.layer}` has no running statistics before its first call"
            raise ValueError(msg)
    for layer, sites in seen.shared.items():
        _check_sites(sites, specs[layer])
    estimated: dict[str, Moments] = {}
    try:
        if exact:
            tick = _steps(progress, "layer by layer", len(batches) * len(seen.pooled))
            for site in seen.pooled:
                one = _Pass(lab, batches, "running", {site.layer}, tick).pooled[site]
                estimated[site.layer] = _joined(estimated.get(site.layer), one)
                lab.assign({site.layer: _stored(estimated[site.layer], specs[site.layer])})
        else:
            for site, one in seen.pooled.items():
                estimated[site.layer] = _joined(estimated.get(site.layer), one)
            lab.assign({layer: _stored(moments_, specs[layer]) for layer, moments_ in estimated.items()})
    except BaseException:
        lab.assign(before)
        raise
    return Recalibration(
        layers=tuple(_change(specs[layer], before[layer], found) for layer, found in estimated.items()),
        uncalled=tuple(layer for layer in chosen if layer not in estimated),
        examples=sum(len(batch.labels) for batch in batches),
        batches=len(batches),
        exact=exact,
    )


class _Pass:
    """The moments of what entered each call site over all batches; of shared layers also batch by batch."""

    def __init__(
        self,
        lab: Laboratory,
        batches: Sequence[Examples],
        statistics: Literal["batch", "running"],
        layers: Collection[str],
        tick: Callable[[], None],
    ) -> None:
        self.pooled: dict[CallSite, Moments] = {}
        self.shared: dict[str, dict[CallSite, list[Moments]]] = {}
        for batch in batches:
            found = [seen for seen in lab.inputs(batch, statistics) if seen.site.layer in layers]
            calls = Counter(seen.site.layer for seen in found)
            for seen in found:
                self.pooled[seen.site] = _joined(self.pooled.get(seen.site), seen.moments)
                if calls[seen.site.layer] > 1:
                    self.shared.setdefault(seen.site.layer, {}).setdefault(seen.site, []).append(seen.moments)
            tick()


def _steps(progress: Progress | None, what: str, total: int) -> Callable[[], None]:
    done = itertools.count(1)
    return lambda: None if progress is None else progress(f"re-estimating {what}", next(done), total)


def _joined(known: Moments | None, new: Moments) -> Moments:
    return new if known is None else moments.pool(known, new)


def _chosen(specs: Mapping[str, LayerSpec], layers: Collection[str] | None) -> list[str]:
    """Return the paths of the layers that were asked for.

    Raises:
        ValueError: a name or a pattern fits none.
    """
    if not specs:
        msg = "the model has no batch-normalization layer"
        raise ValueError(msg)
    if layers is None:
        return list(specs)
    patterns = [layers] if isinstance(layers, str) else list(layers)
    if not patterns:
        msg = "layers names no layer: leave it out for all of them"
        raise ValueError(msg)
    for pattern in patterns:
        if not any(_fits(path, pattern) for path in specs):
            near = difflib.get_close_matches(pattern, specs, 3, cutoff=0.5) or list(specs)[:3]
            msg = f"no batch-normalization layer fits {pattern!r}; near misses: {', '.join(map(repr, near))}"
            raise ValueError(msg)
    return [path for path in specs if any(_fits(path, pattern) for pattern in patterns)]


def _fits(path: str, pattern: str) -> bool:
    return path == pattern or fnmatchcase(path, pattern)


def _check_sites(sites: Mapping[CallSite, Sequence[Moments]], spec: LayerSpec) -> None:
    """Refuse a layer whose call sites see different data, by the test of BN101 over the batches.

    Raises:
        ValueError: they do, or there are too few batches to tell.
    """
    names = ", ".join(map(str, sites))
    batches = min(map(len, sites.values()))
    if batches < SITE_BATCHES:
        msg = (
            f"`{spec.path}` is called at {len(sites)} sites ({names}), and {batches} batches cannot tell whether one "
            f"set of running statistics fits them: give {SITE_BATCHES} or more"
        )
        raise ValueError(msg)
    mean, var = (
        np.stack([[getattr(one, part) for one in own[:batches]] for own in sites.values()], axis=1)
        for part in ("mean", "var")
    )
    shift, scale, ratio = moments.sites_apart(mean, var + spec.epsilon)
    p = moments.same_sites_p(ratio, len(sites), batches)
    if max(shift, scale) <= SITE_SHIFT or SITE_TESTS * p >= SITE_ALPHA:
        return
    first, second, shift, scale = _farthest(list(sites), mean.mean(axis=0), var.mean(axis=0) + spec.epsilon)
    msg = (
        f"`{spec.path}` is called at {len(sites)} sites that see different data: {first} and {second} are "
        f"{shift:.2f} standard deviations apart in their means, and their spreads differ by a factor of {scale:.2f} "
        f"(p = {SITE_TESTS * p:.1g}); one set of running statistics fits neither"
    )
    raise ValueError(msg)


def _farthest(sites: Sequence[CallSite], mean: Vector, var: Vector) -> tuple[CallSite, CallSite, float, float]:
    """Return the two sites that are farthest apart, by how many deviations, and the factor between their spreads.

    Moments are of shape ``(sites, channels)``; the distance is a root mean square over channels, the factor geometric.
    """

    def distance(a: int, b: int) -> tuple[float, float]:
        shift = np.square(mean[a] - mean[b]) / ((var[a] + var[b]) / 2.0)
        return float(np.sqrt(np.mean(shift))), float(np.mean(np.abs(np.log(var[a] / var[b]))) / 2.0)

    (shift, scale), a, b = max((distance(a, b), a, b) for a, b in itertools.combinations(range(len(sites)), 2))
    return sites[a], sites[b], shift, math.exp(scale)


def _stored(found: Moments, spec: LayerSpec) -> MeanAndVariance:
    """Return running statistics as the framework stores them.

    Raises:
        ValueError: they are not finite.
    """
    if not (np.isfinite(found.mean).all() and np.isfinite(found.var).all()):
        msg = f"what enters `{spec.path}` is not finite on these batches"
        raise ValueError(msg)
    return found.mean, found.var * (moments.bessel_factor(found.count) if spec.bessel_corrected else 1.0)


def _change(spec: LayerSpec, before: MeanAndVariance, found: Moments) -> LayerChange:
    mean, var = before
    new_mean, new_var = _stored(found, spec)
    with np.errstate(all="ignore"):
        shift = float(np.sqrt(np.mean(np.square(new_mean - mean) / (var + spec.epsilon))))
        ratio = float(np.exp(np.mean(np.log((new_var + spec.epsilon) / (var + spec.epsilon))) / 2.0))
    return LayerChange(spec.path, shift, ratio, found.count)
