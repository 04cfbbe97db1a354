"""The layer x step picture of one statistic, folded sample by sample into a bounded number of columns."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from typing import TYPE_CHECKING, Any

import numpy as np

from bnwatch.sinks.tensorboard.follow import alike, read_rows
from bnwatch.views.statistics import judged

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from bnwatch.records import CallSite
    from bnwatch.sinks.tensorboard.file import Sample
    from bnwatch.views.concern import Concern

COLUMNS = 400
"""Columns at most."""

_CELLS = 2_000_000
"""Cells at most, 8 bytes each: a network of so many call sites gets fewer columns."""

_CHUNK = 8_000_000
"""Bytes read at a time."""


_MEMORY = 64_000_000
"""Bytes of the heatmaps that are kept, of all runs together."""


class Heats:
    """The heatmaps that were asked for last, of all runs: what is folded is not folded again."""

    def __init__(self) -> None:
        """Keep none yet."""
        self._kept: OrderedDict[tuple[Path, str], Heat] = OrderedDict()
        self._lock = threading.Lock()

    def take(self, run: Path, statistic: str) -> Heat | None:
        """Take one out, if it is there."""
        with self._lock:
            return self._kept.pop((run, statistic), None)

    def put(self, run: Path, statistic: str, heat: Heat) -> None:
        """Keep one, at the cost of those that were not asked for longest."""
        with self._lock:
            self._kept[run, statistic] = heat
            while len(self._kept) > 1 and sum(kept.nbytes for kept in self._kept.values()) > _MEMORY:
                self._kept.popitem(last=False)


class Heat:
    """Keeps of each call site and column the value that is the farthest from healthy."""

    def __init__(self, statistic: str, sites: Sequence[CallSite]) -> None:
        """Begin with nothing folded."""
        self.sites = list(sites)
        self._statistic = statistic
        self._rows = {site: row for row, site in enumerate(sites)}
        self._columns = max(min(COLUMNS, _CELLS // max(len(sites), 1)) // 2 * 2, 2)
        self._values = np.full((len(sites), self._columns), np.nan, np.float32)
        self._distance = np.full((len(sites), self._columns), -np.inf, np.float32)
        self._width = 1
        self._folded = 0
        self._last: Sample | None = None
        self._layout: object = None

    @property
    def nbytes(self) -> int:
        """Return the memory that it takes."""
        return self._values.nbytes + self._distance.nbytes

    def follows(self, samples: Sequence[Sample]) -> bool:
        """Return whether what was folded is still the beginning of these samples."""
        return self._folded == 0 or (self._folded <= len(samples) and samples[self._folded - 1] is self._last)

    def fold(self, samples: Sequence[Sample], concern: Callable[[Sample], Concern], seconds: float) -> float:
        """Fold samples for so long, and return which share of them has been.

        Raises:
            GoneError: one is not there any more.
        """
        end = time.monotonic() + seconds
        while self._folded == 0 and len(samples) > self._columns * self._width:
            self._width *= 2
        while self._folded < len(samples):
            self._chunk(samples, concern)
            if time.monotonic() >= end:
                break
        return self._folded / len(samples) if samples else 1.0

    def _chunk(self, samples: Sequence[Sample], concern: Callable[[Sample], Concern]) -> None:
        """Fold the next few samples."""
        while self._folded >= self._columns * self._width:
            self._halve()
        first = self._folded
        size = 4 * len(samples[first].sites) * max(samples[first].layout.width, 1)
        stop = min(self._columns * self._width, first + max(_CHUNK // max(size, 1), 1))
        part = next(alike(samples[first:stop]))
        some = samples[first : first + part.stop]
        values, distance = judged(self._statistic, read_rows(some, 0, len(some[0].sites)), concern(some[0]))
        rows, start = self._rows_of(some[0]), 0
        while start < len(some):
            column = (first + start) // self._width
            end = min((column + 1) * self._width - first, len(some))
            self._merge(column, rows, values[start:end], distance[start:end])
            start = end
        self._folded += len(some)
        self._last = some[-1]

    def _merge(self, column: int, rows: NDArray[np.intp], values: NDArray[Any], distance: NDArray[Any]) -> None:
        """Take the farthest of some samples, ``(samples, sites)``, into a column, where it is farther than what is."""
        farthest, every = distance.argmax(axis=0), np.arange(len(rows))
        found, far = values[farthest, every], distance[farthest, every]
        better = far > self._distance[rows, column]
        self._values[rows[better], column], self._distance[rows[better], column] = found[better], far[better]

    def _rows_of(self, sample: Sample) -> NDArray[np.intp]:
        layout = sample.layout
        if self._layout is not layout:
            self._layout = layout
            self._places = np.array([self._rows[site] for site in layout.sites], np.intp)
        return self._places

    def _halve(self) -> None:
        """Make one column of two."""
        half = self._columns // 2
        second = self._distance[:, 1::2] > self._distance[:, ::2]
        for array, empty in ((self._values, np.nan), (self._distance, -np.inf)):
            array[:, :half] = np.where(second, array[:, 1::2], array[:, ::2])
            array[:, half:] = empty
        self._width *= 2

    def columns_so_far(self, samples: Sequence[Sample]) -> tuple[list[int], NDArray[np.float32], NDArray[np.bool_]]:
        """Return the first step of each column, the values, shape ``(sites, columns)``, and which of them are known."""
        used = -(-self._folded // self._width)
        steps = [samples[number * self._width].step for number in range(used)]
        return steps, self._values[:, :used], self._distance[:, :used] > -np.inf
