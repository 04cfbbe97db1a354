"""How far a call site is off, in units of what matters: 1 is a rule's business, below it a layer is healthy.

Every term is a measured number over the limit of the rule that is about it, so the limits are those of the catalogue:

* *mean* and *spread*: |batch - running|, in running standard deviations or as logarithm of the ratio of standard
  deviations, over the root of (noise band)^2 + (`BN201.shift`)^2. The noise band is what a healthy layer shows:
  `NOISE` times `moments.shift_noise`, the standard deviation of batch mean minus running mean under its moving
  average and its effective samples; a logarithm of a standard deviation scatters by 1/sqrt(2) of it. `NOISE` is the
  number of standard deviations beyond which a normal value lies with the probability `BN101.alpha`, the false alarms a
  layer and look that the catalogue allows; independent channels scatter less. The shift is the least that moves the
  normalized output: less is no news however certain.
* *initial values*: as BN201 fires, on the share of them that is left over `BN201.weight`, as far as they move the
  output by `BN201.shift`.
* *call sites*: as BN101 fires, on the distance between them over `BN101.shift`, as far as it is beyond chance.
* *few elements*: `BN204.few` over the elements a channel; *constant channels*: their share over `BN404.share`;
  *epsilon*: its share of the variance over `BN405.share`; *moved*: what moved the running mean outside of the training
  step over `BN106.unexplained`.
* NaN, infinity or a negative variance are exact facts, without a unit: they count as `MOST`.
"""

from __future__ import annotations

from functools import cached_property
from statistics import NormalDist
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from bnwatch import moments
from bnwatch.render import number
from bnwatch.rules import CATALOGUE
from bnwatch.signals import STATISTICS, TESTS, Flag

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from numpy.typing import NDArray

    from bnwatch.records import CallSite, LayerSpec
    from bnwatch.signals import SharedSites

    Float32 = NDArray[np.float32]
    Float64 = NDArray[np.float64]
    Floats = NDArray[np.floating]

_LIMITS = {f"{rule.id}.{name}": threshold.value for rule in CATALOGUE for name, threshold in rule.thresholds.items()}

NOISE = NormalDist().inv_cdf(1.0 - _LIMITS["BN101.alpha"] / 2.0)
"""Half-width of the noise band in standard deviations."""

MOST = 100.0
"""What an exact fault counts as, and the most that anything does."""

_ALL = 1 << 16
"""Beyond all flags."""

_BROKEN = int(Flag.NON_FINITE_BATCH | Flag.NON_FINITE_RUNNING | Flag.NEGATIVE_VARIANCE)


class Worst(NamedTuple):
    """The term that is farthest off at each call site, shape ``(sites,)``: how far, which, and its number."""

    matters: Float64
    term: NDArray[np.intp]
    measured: Float64


class Concern:
    """Judges the samples of call sites that are known by layer, in rows of one order."""

    def __init__(self, sites: Sequence[CallSite], specs: Mapping[str, LayerSpec]) -> None:
        """Take what does not change from sample to sample from the specifications of the layers."""
        known = [specs.get(site.layer) for site in sites]
        # float32, as the tables are: many samples are judged at once
        with np.errstate(over="ignore"):
            self.decay, self.epsilon, self.channels, self.initial = (
                np.array(
                    [
                        (np.nan,) * 4 if spec is None else (spec.decay, spec.epsilon, spec.channels, spec.initial[1])
                        for spec in known
                    ],
                    np.float32,
                )
                .reshape(-1, 4)
                .T
            )
        self._sites = tuple(sites)

    def noise(self, values: Float32, rows: slice = slice(None)) -> Floats:
        """Return the half-width of the noise band of |batch mean - running mean|, in running standard deviations.

        ``values`` is ``(..., sites, statistics)``, of all call sites or of these rows; NaN where it is not known, as at
        the first sample.
        """
        with np.errstate(all="ignore"):
            noise = _band(self.decay[rows], values[..., STATISTICS.index("effective_samples")])
        unknown: Floats = np.where(np.isfinite(noise), noise, np.nan)
        return unknown

    def matters(self, values: Float32) -> Float32:
        """Return how far each call site is off in each sample, shape ``(..., sites)``, distances between them aside."""
        most = np.zeros(values.shape[:-1], np.float32)
        with np.errstate(all="ignore"):
            seen = _Seen(self, values)
            for term in _TERMS.values():
                np.fmax(most, term(seen)[1], out=most)
        np.minimum(most, np.float32(MOST), out=most)
        return most

    def worst(self, values: Float32, shared: Sequence[SharedSites] = ()) -> Worst:
        """Return what is farthest off in one sample; ``shared`` are the distances between its call sites."""
        with np.errstate(all="ignore"):
            seen = _Seen(self, values)
            terms = [term(seen) for term in _TERMS.values()]
        measured, off = (np.stack(parts).astype(np.float64) for parts in zip(*terms, strict=True))
        self._apart(shared, measured[_APART], off[_APART])
        off = np.minimum(np.fmax(off, 0.0), MOST)
        term = off.argmax(axis=0)
        return Worst(off.max(axis=0), term, np.take_along_axis(measured, term[None], axis=0)[0])

    def _apart(self, shared: Sequence[SharedSites], measured: Float64, off: Float64) -> None:
        """Enter how far call sites are apart at the rows of their layers."""
        rows: dict[str, list[int]] = {}
        for row, site in enumerate(self._sites):
            if site.replica == 0:
                rows.setdefault(site.layer, []).append(row)
        for one in shared:
            if one["steps"] >= _LIMITS["BN101.samples"] and len(one.values) > 1:
                limit = moments.same_sites_limit(_LIMITS["BN101.alpha"] / TESTS, len(one.values), int(one["steps"]))
                apart = max(one["between_shift"], one["between_scale"])
                measured[rows.get(one.layer, [])] = apart
                off[rows.get(one.layer, [])] = min(apart / _LIMITS["BN101.shift"], one["between_ratio"] / limit)


class _Seen:
    """Samples of some call sites, column by column, each of shape ``(..., sites)``."""

    def __init__(self, concern: Concern, values: Float32) -> None:
        # side by side in memory, since every column is gone through several times
        self._columns = np.ascontiguousarray(np.moveaxis(values, -1, 0))
        self.concern = concern

    def __getitem__(self, statistic: str) -> Float32:
        column: Float32 = self._columns[STATISTICS.index(statistic)]
        return column

    @cached_property
    def band(self) -> Floats:
        return _band(self.concern.decay, self["effective_samples"])

    @cached_property
    def flags(self) -> NDArray[np.int32]:
        flags = self["flags"]
        return np.where(np.abs(flags) < _ALL, flags, 0).astype(np.int32)


def _band(decay: Floats, effective_samples: Floats) -> Floats:
    band: Floats = np.float32(NOISE) * np.sqrt(2.0 / ((1.0 + np.minimum(decay, np.float32(1.0))) * effective_samples))
    return band


def _broken(seen: _Seen) -> tuple[Floats, Floats]:
    count = seen["non_finite"]
    return np.fmax(count, 0.0), np.where((count > 0) | ((seen.flags & _BROKEN) > 0), np.float32(MOST), 0.0)


def _mean(seen: _Seen) -> tuple[Floats, Floats]:
    shift = np.abs(seen["mean_shift"])
    return shift, shift / np.hypot(seen.band, np.float32(_LIMITS["BN201.shift"]))


def _spread(seen: _Seen) -> tuple[Floats, Floats]:
    ratio = seen["std_ratio"]
    limit = np.hypot(seen.band / np.float32(2.0**0.5), np.float32(_LIMITS["BN201.shift"]))
    return ratio, np.abs(np.log(ratio)) / limit


def _unsettled(seen: _Seen) -> tuple[Floats, Floats]:
    decay, initial = seen.concern.decay, seen.concern.initial
    weight = decay ** seen["updates"]
    held = np.minimum(1.0, np.fmax(weight, weight * initial / np.square(seen["running_std"]) / 4.0))
    moved = np.fmax(np.abs(seen["std_ratio"] - 1.0), seen["mean_shift"])
    fixed = ((seen.flags & Flag.UNMOVED) > 0) | (decay >= 1.0)
    off = np.minimum(held / _LIMITS["BN201.weight"], moved / _LIMITS["BN201.shift"])
    return held, np.where(fixed, 0.0, off)


def _apart(seen: _Seen) -> tuple[Floats, Floats]:
    none = np.zeros_like(seen["count"])
    return none, none


def _few(seen: _Seen) -> tuple[Floats, Floats]:
    return seen["count"], _LIMITS["BN204.few"] / seen["count"]


def _constant(seen: _Seen) -> tuple[Floats, Floats]:
    share = seen["zero_variance"] / seen.concern.channels
    return share, np.where(seen["count"] > 1, share / _LIMITS["BN404.share"], 0.0)


def _epsilon(seen: _Seen) -> tuple[Floats, Floats]:
    share = seen.concern.epsilon / (np.square(seen["batch_std"]) + seen.concern.epsilon)
    varying = (seen["count"] > 1) & (seen["zero_variance"] < seen.concern.channels)
    return share, np.where(varying, share / _LIMITS["BN405.share"], 0.0)


def _moved(seen: _Seen) -> tuple[Floats, Floats]:
    moved = np.abs(seen["unexplained"])
    return moved, moved / _LIMITS["BN106.unexplained"]


_TERMS: dict[str, Callable[[_Seen], tuple[Floats, Floats]]] = {
    "NaN, infinity or a negative variance": _broken,
    "batch mean {} running standard deviations off": _mean,
    "batch standard deviation {} times the running one": _spread,
    "{:.0%} of the initial values left": _unsettled,
    "call sites {} standard deviations apart": _apart,
    "{:.0f} elements a channel": _few,
    "{:.0%} of the channels constant": _constant,
    "epsilon is {:.0%} of the variance": _epsilon,
    "running mean moved {} standard deviations outside of the step": _moved,
}
"""The terms by how their number is said."""

_WORDS = tuple(_TERMS)
_APART = _WORDS.index("call sites {} standard deviations apart")


def why(term: int, measured: float) -> str:
    """Return the number of a term in words; empty where it is not known."""
    if np.isnan(measured):
        return ""
    words = _WORDS[term]
    return words.format(number(measured)) if "{}" in words else words.format(measured)
