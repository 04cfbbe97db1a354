"""Named quantities derived from what was seen, with bounded history: the only thing a rule reads.

A sample becomes a `SignalTable`, one float32 row per call site. The table is what the record on disk holds, and rules
read nothing finer, so a log replays to the diagnoses of the live run.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass, field
from enum import IntFlag
from typing import TYPE_CHECKING

import numpy as np

from bnwatch import moments

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from numpy.typing import NDArray

    from bnwatch.evidence import Cells, Look
    from bnwatch.records import Attachment, CallRecord, CallSite, EvaluationRecord, LayerSpec, StepSnapshot

    Float32 = NDArray[np.float32]

STATISTICS = (
    "count",
    "updates",
    "batch_mean",
    "batch_std",
    "running_mean",
    "running_std",
    "mean_shift",
    "std_ratio",
    "effective_samples",
    "non_finite",
    "flags",
)
"""Columns of a `SignalTable`.

count: elements per channel; updates: of the running statistics, NaN when unknown; batch_mean, running_mean: averaged
over channels; batch_std, running_std: root of the variance averaged over channels; mean_shift: root mean square over
channels of (batch - running mean) in running standard deviations (d of Ioffe 2017, arXiv:1702.03275, eq. 2);
std_ratio: geometric mean over channels of batch / running standard deviation (r of the same); effective_samples: from
the spread of batch means over steps, NaN until there are two samples; non_finite: channels with NaN or infinity in
batch or running statistics; flags: a `Flag`.
"""

SITE_STATISTICS = ("between_shift", "between_p", "channel", "batch_mean", "batch_std", "running_mean", "running_std")
"""Columns of a `SharedSites` table: the systematic difference between the sites of a layer in standard deviations
(root mean square over channels), the p-value of no difference, then the most different channel and its statistics."""

WINDOW = 16
"""Samples that windowed signals look back on: enough for a variance, short against the drift of the parameters."""

HISTORY = 256
"""Tables, evaluations and looks that are kept: bounds memory, and covers any rule's window."""


class Flag(IntFlag):
    """Exact facts about one call site, as bits of the ``flags`` column."""

    NON_FINITE_BATCH = 1
    NON_FINITE_RUNNING = 2
    UNMOVED = 4
    """The running statistics are bitwise those of the first sample."""
    INITIAL = 8
    """The running statistics are bitwise their initial values."""
    NEGATIVE_VARIANCE = 16
    BATCH_VARIED = 32
    """The batch statistics changed since the first sample."""


@dataclass(frozen=True, slots=True)
class SharedSites:
    """How far apart the call sites of one layer are; ``values`` is ``(sites, len(SITE_STATISTICS))``."""

    layer: str
    values: Float32


@dataclass(frozen=True, slots=True)
class SignalTable:
    """One sample: ``values`` is ``(len(sites), len(STATISTICS))``, float32."""

    step: int
    epoch: int
    sites: tuple[CallSite, ...]
    values: Float32
    shared: tuple[SharedSites, ...] = ()
    accuracy: float | None = None
    loss: float | None = None
    examples: int = 0

    def column(self, statistic: str) -> Float32:
        """Return one statistic of every site, shape ``(sites,)``."""
        column: Float32 = self.values[:, STATISTICS.index(statistic)]
        return column


@dataclass(frozen=True, slots=True)
class SiteSignals:
    """The signals of one call site in the latest sample."""

    site: CallSite
    spec: LayerSpec
    row: Float32

    def __getattr__(self, name: str) -> float:
        """Return the statistic of that name, one of `STATISTICS`."""
        try:
            return float(self.row[STATISTICS.index(name)])
        except ValueError:
            raise AttributeError(name) from None

    @property
    def flag(self) -> Flag:
        """Return the exact facts."""
        return Flag(int(self.row[STATISTICS.index("flags")]))

    @property
    def initial_weight(self) -> float:
        """Return the share of the initial values left in the running statistics; NaN when updates are unknown."""
        return moments.initial_weight(self.spec.decay, self.updates)


@dataclass(slots=True)
class Signals:
    """Everything a rule may look at. Fed by `Watch` (live) or from a record (replay)."""

    specs: dict[str, LayerSpec] = field(default_factory=dict)
    attachment: Attachment | None = None
    tables: deque[SignalTable] = field(default_factory=lambda: deque(maxlen=HISTORY))
    evaluations: deque[EvaluationRecord] = field(default_factory=lambda: deque(maxlen=HISTORY))
    looks: deque[Look] = field(default_factory=lambda: deque(maxlen=HISTORY))
    cells: Cells | None = None
    refused: str | None = None
    """Why the last experiment was not possible."""
    faults: list[str] = field(default_factory=list)
    """Internal errors of the watch itself."""
    unused_allowances: tuple[str, ...] = ()
    """Patterns of ``allow`` that matched nothing, known when the run ends."""
    _history: _History | None = None

    @property
    def table(self) -> SignalTable | None:
        """Return the latest sample."""
        return self.tables[-1] if self.tables else None

    @property
    def step(self) -> int:
        """Return the latest step anything was seen at."""
        seen = [deq[-1].step for deq in (self.tables, self.evaluations, self.looks) if deq]
        return max(seen, default=0)

    @property
    def epoch(self) -> int:
        """Return the latest epoch anything was seen at."""
        seen = [deq[-1].epoch for deq in (self.tables, self.evaluations, self.looks) if deq]
        return max(seen, default=0)

    def attach(self, attachment: Attachment) -> None:
        """Learn which layers are watched."""
        self.attachment = attachment
        self.specs.update({spec.path: spec for spec in attachment.layers})

    def observe(self, snapshot: StepSnapshot) -> SignalTable:
        """Turn a snapshot into the next table."""
        if self._history is None:
            self._history = _History()
        self.specs.update({call.spec.path: call.spec for call in snapshot.calls if call.spec.path not in self.specs})
        table = self._history.table(snapshot)
        self.tables.append(table)
        return table

    def sites(self, flag: Flag | None = None) -> Iterator[SiteSignals]:
        """Yield the call sites of the latest sample, in the order of the forward pass; only those with a flag."""
        table = self.table
        if table is None:
            return
        rows = range(len(table.sites))
        if flag is not None:
            rows = np.flatnonzero(table.column("flags").astype(np.int64) & int(flag)).tolist()
        for n in rows:
            site = table.sites[n]
            yield SiteSignals(site, self.specs[site.layer], table.values[n])

    def shared(self) -> Iterator[tuple[LayerSpec, list[SiteSignals], SharedSites | None]]:
        """Yield layers with two call sites or more on one replica, their sites, and how far apart these are."""
        table = self.table
        if table is None:
            return
        apart = {shared.layer: shared for shared in table.shared}
        by_layer: dict[str, list[SiteSignals]] = {}
        for site in self.sites():
            if site.site.replica == 0:
                by_layer.setdefault(site.site.layer, []).append(site)
        for layer, sites in by_layer.items():
            if len(sites) > 1:
                yield self.specs[layer], sites, apart.get(layer)

    def samples_with(self, site: CallSite, flag: Flag, last: int) -> int:
        """Return in how many of the ``last`` samples a site carried a flag."""
        found = 0
        for table in list(self.tables)[-last:]:
            if site in table.sites:
                found += bool(int(table.values[table.sites.index(site), STATISTICS.index("flags")]) & int(flag))
        return found


def gap(evaluation: EvaluationRecord) -> tuple[float, float] | None:
    """Return training minus evaluation accuracy and the one-sided p-value that sampling alone explains it.

    The p-value is of a two-proportion z test. None where an accuracy or a number of examples is unknown.
    """
    train, held, n, m = evaluation.train_accuracy, evaluation.accuracy, evaluation.train_examples, evaluation.examples
    if train is None or held is None or not n or not m:
        return None
    pooled = (train * n + held * m) / (n + m)
    error = math.sqrt(pooled * (1.0 - pooled) * (1.0 / n + 1.0 / m))
    if error == 0.0:
        return train - held, 1.0
    return train - held, 0.5 * math.erfc((train - held) / error / math.sqrt(2.0))


class _History:
    """Per-channel memory of the last samples, flat over all sites so that every signal is a few array operations."""

    def __init__(self) -> None:
        self.sites: tuple[CallSite, ...] = ()
        self.starts = np.zeros(0, dtype=np.intp)
        self.first: tuple[NDArray[np.floating], ...] | None = None
        self.previous: NDArray[np.float64] | None = None
        self.noise: deque[NDArray[np.float64]] = deque(maxlen=WINDOW)
        self.windows: dict[str, deque[NDArray[np.float64]]] = {}

    def table(self, snapshot: StepSnapshot) -> SignalTable:
        calls = snapshot.calls
        sites = tuple(call.site for call in calls)
        if not calls:
            return SignalTable(
                snapshot.step, snapshot.epoch, (), np.zeros((0, len(STATISTICS)), np.float32),
                accuracy=snapshot.accuracy, loss=snapshot.loss, examples=snapshot.examples,
            )  # fmt: skip
        channels = np.array([len(call.batch.mean) for call in calls])
        if sites != self.sites or len(self.starts) != len(channels) or int(channels.sum()) != self._total:
            self._reset(sites, channels)
        with np.errstate(all="ignore"):
            values = self._values(calls, channels)
        return SignalTable(
            snapshot.step, snapshot.epoch, sites, values, self._shared(calls),
            snapshot.accuracy, snapshot.loss, snapshot.examples,
        )  # fmt: skip

    def _reset(self, sites: tuple[CallSite, ...], channels: NDArray[np.intp]) -> None:
        self.sites = sites
        self.starts = np.concatenate([[0], np.cumsum(channels)[:-1]]).astype(np.intp)
        self._total = int(channels.sum())
        self.first = self.previous = None
        self.noise.clear()
        self.windows.clear()

    def _values(self, calls: Sequence[CallRecord], channels: NDArray[np.intp]) -> Float32:
        raw = tuple(
            np.concatenate(parts)
            for parts in (
                [c.batch.mean for c in calls],
                [c.batch.var for c in calls],
                [c.running.mean for c in calls],
                [c.running.var for c in calls],
            )
        )
        mean, var, running_mean, stored_var = (part.astype(np.float64) for part in raw)
        repeat = channels.tolist()
        count = np.array([c.batch.count for c in calls], dtype=np.float64)
        bessel = np.where([c.running.bessel_corrected for c in calls], count / np.maximum(count - 1.0, 1.0), 1.0)
        running_var = stored_var / np.repeat(bessel, repeat)
        epsilon = np.repeat([c.spec.epsilon for c in calls], repeat)

        def average(x: NDArray[np.float64]) -> NDArray[np.float64]:
            return np.add.reduceat(x, self.starts) / channels

        shift = np.square(mean - running_mean) / (running_var + epsilon)
        ratio = np.log((var + epsilon) / (running_var + epsilon))
        broken_batch = ~(np.isfinite(mean) & np.isfinite(var))
        broken_running = ~(np.isfinite(running_mean) & np.isfinite(stored_var))

        def any_of(x: NDArray[np.bool_]) -> NDArray[np.bool_]:
            return np.logical_or.reduceat(x, self.starts)

        if self.first is None:
            self.first = tuple(part.copy() for part in raw)
        differs = [a != b for a, b in zip(raw, self.first, strict=True)]
        initial = np.array([c.spec.initial for c in calls])
        at_initial = (running_mean == np.repeat(initial[:, 0], repeat)) & (stored_var == np.repeat(initial[:, 1], repeat))
        flags = (
            Flag.NON_FINITE_BATCH * any_of(broken_batch)
            + Flag.NON_FINITE_RUNNING * any_of(broken_running)
            + Flag.UNMOVED * ~any_of(differs[2] | differs[3])
            + Flag.INITIAL * ~any_of(~at_initial)
            + Flag.NEGATIVE_VARIANCE * any_of(stored_var < 0)
            + Flag.BATCH_VARIED * any_of(differs[0] | differs[1])
        )
        columns = {
            "count": count,
            "updates": np.array([math.nan if c.running.updates is None else c.running.updates for c in calls]),
            "batch_mean": average(mean),
            "batch_std": np.sqrt(average(var)),
            "running_mean": average(running_mean),
            "running_std": np.sqrt(average(running_var)),
            "mean_shift": np.sqrt(average(shift)),
            "std_ratio": np.exp(average(ratio) / 2.0),
            "effective_samples": self._effective_samples(mean, var + epsilon, average),
            "non_finite": np.add.reduceat((broken_batch | broken_running).astype(np.float64), self.starts),
            "flags": flags.astype(np.float64),
        }
        return np.stack([columns[name] for name in STATISTICS], axis=1).astype(np.float32)

    def _effective_samples(self, mean: NDArray[np.float64], var: NDArray[np.float64], average: object) -> object:
        raise NotImplementedError

    def _shared(self, calls: Sequence[CallRecord]) -> tuple[SharedSites, ...]:
        raise NotImplementedError
