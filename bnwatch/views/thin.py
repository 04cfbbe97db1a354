"""Fewer points for a picture, extremes kept."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Floats = NDArray[np.floating]


def thin(count: int, limit: int, *criteria: Floats) -> NDArray[np.intp]:
    """Return which of ``count`` points to show, in order, ``limit`` at most.

    Of every bucket of neighbouring points the smallest and the largest of each criterion, an array of shape
    ``(count,)``, stay; NaN is neither. The first and the last point stay too.
    """
    if count <= limit:
        return np.arange(count)
    buckets = max((limit - 2) // max(2 * len(criteria), 1), 1)
    edges = [number * count // buckets for number in range(buckets + 1)]
    kept = [0, count - 1]
    if not criteria:
        kept += edges[:-1]
    for criterion in criteria:
        unknown = np.isnan(criterion)
        low, high = np.where(unknown, np.inf, criterion), np.where(unknown, -np.inf, criterion)
        for start, stop in itertools.pairwise(edges):
            kept += [start + int(low[start:stop].argmin()), start + int(high[start:stop].argmax())]
    return np.unique(kept)


def numbers(values: Floats, digits: int = 6, *, unknown: NDArray[np.bool_] | None = None) -> Any:
    """Return nested lists of numbers with so many significant digits, as JSON can hold them.

    Those that it lacks become texts, as `bnwatch.render.json_number` writes them; what is not known becomes null.
    """
    wide = np.asarray(values, np.float64)
    finite = np.isfinite(wide)
    with np.errstate(all="ignore"):
        # numbers below 1e-290 would need a factor that float64 does not have
        size = np.clip(np.where(finite, np.abs(wide), 1.0), 1e-290, None)
        factor = 10.0 ** (digits - 1 - np.floor(np.log10(size)))
        rounded = np.round(wide * factor) / factor
    rounded = np.where(np.isfinite(rounded), rounded, wide)
    if finite.all() and unknown is None:
        return rounded.tolist()
    named = rounded.astype(object)
    named[np.isnan(wide)] = "NaN"
    named[np.isposinf(wide)] = "Infinity"
    named[np.isneginf(wide)] = "-Infinity"
    if unknown is not None:
        named[unknown] = None
    return named.tolist()


def numbers_or_none(values: Floats, digits: int = 6) -> Any:
    """Return `numbers` with null for NaN, which here means not known."""
    return numbers(values, digits, unknown=np.isnan(values))
