"""Named quantities derived from what was seen, with bounded history: the only thing a rule reads.

A sample becomes a `SignalTable`, one float32 row per call site. The table is what the record on disk holds, and rules
read nothing finer, so a log replays to the diagnoses of the live run.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass, field, replace
from enum import IntFlag
from typing import TYPE_CHECKING

import numpy as np

from bnwatch import moments

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from numpy.typing import DTypeLike, NDArray

    from bnwatch.evidence import Attribution, Cells, Entering, Look
    from bnwatch.records import Attachment, CallRecord, CallSite, EvaluationRecord, LayerSpec, StepSnapshot, Structure

    Float32 = NDArray[np.float32]
    Float64 = NDArray[np.float64]
    Floats = NDArray[np.floating]

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

SITE_STATISTICS = (
    "between_shift",
    "between_scale",
    "between_ratio",
    "steps",
    "channel",
    "batch_mean",
    "batch_std",
    "running_mean",
    "running_std",
)
"""Columns of a `SharedSites` table.

between_shift: standard deviation between the sites' batch means, in standard deviations of the activations, noise
taken out, root mean square over channels; between_scale: the same of their log standard deviations; between_ratio: the
F ratio (between sites / over steps) of the two, whichever is larger; steps: sampled steps behind it; then the channel
in which they differ most, and its statistics at each site.
"""

WINDOW = 16
"""Samples that windowed signals look back on: enough for a variance, short against the drift of the parameters."""

DOMINANT = 1e6
"""Ratio of a sum that leaves a window to the rest of it beyond which the rest is added up anew."""

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


TESTS = 2
"""Call sites are compared in their means and in their spreads."""

LEARNING_ALPHA = 1e-6
"""Probability of a guesser reaching the training accuracy, below which the network is said to learn."""


@dataclass(frozen=True, slots=True)
class SharedSites:
    """How far apart the call sites of one layer are; ``values`` is ``(sites, len(SITE_STATISTICS))``."""

    layer: str
    values: Float32

    def __getitem__(self, statistic: str) -> float:
        """Return a statistic of the layer as a whole, one of the first five of `SITE_STATISTICS`."""
        return float(self.values[0, SITE_STATISTICS.index(statistic)])

    def differ(self, alpha: float) -> bool:
        """Return whether the sites see different data, at ``alpha`` false alarms a look."""
        return self["between_ratio"] > moments.same_sites_limit(alpha / TESTS, len(self.values), int(self["steps"]))

    @property
    def p_value(self) -> float:
        """Return the p-value that the sites see the same data, corrected for testing both means and spreads."""
        p = moments.same_sites_p(self["between_ratio"], len(self.values), int(self["steps"]))
        return min(1.0, TESTS * p)

    def rows(self) -> Iterator[dict[str, float]]:
        """Yield the statistics of each call site by name."""
        for row in self.values:
            yield dict(zip(SITE_STATISTICS, row.tolist(), strict=True))


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
    structure: Structure | None = None
    """What is known before the first step; None where the framework does not tell."""
    framework: str = ""
    """Framework of a model that is not being trained; in training the attachment names it."""
    tables: deque[SignalTable] = field(default_factory=lambda: deque(maxlen=HISTORY))
    evaluations: deque[EvaluationRecord] = field(default_factory=lambda: deque(maxlen=HISTORY))
    looks: deque[Look] = field(default_factory=lambda: deque(maxlen=HISTORY))
    cells: Cells | None = None
    attribution: Attribution | None = None
    """To which layers the cost that the cells show was attributed; its step is that of the cells."""
    entering: Entering | None = None
    """What enters each layer, evaluation against training examples, as last measured together with the cells."""
    refused: str | None = None
    """Why the last experiment was not possible."""
    faults: list[str] = field(default_factory=list)
    """Internal errors of the watch itself."""
    unused_allowances: tuple[str, ...] = ()
    """Patterns of ``allow`` that matched nothing, known when the run ends."""
    samples: int = 0
    """Sampled steps seen in all."""
    evaluated: int = 0
    """Evaluations seen in all."""
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

    @property
    def chance(self) -> float | None:
        """Return the accuracy of always naming the most frequent class; None while classes are not known.

        The largest share of a class among labels that were seen, else one over the number of classes.
        """
        if self.cells is not None:
            for _, row in self.cells.rows():
                return max(next(iter(row.values())).majority, 1.0 / self.cells.classes)
        for evaluation in reversed(self.evaluations):
            if evaluation.majority is not None:
                return evaluation.majority
            if evaluation.classes > 1:
                return 1.0 / evaluation.classes
        outputs = self.looks[-1].layers[-1].units if self.looks and self.looks[-1].layers else 0
        return 1.0 / outputs if outputs > 1 else None

    @property
    def learning(self) -> bool:
        """Return whether the latest training accuracy is beyond what guessing gives."""
        table, chance = self.table, self.chance
        if table is None or table.accuracy is None or not table.examples or chance is None:
            return False
        right = round(table.accuracy * table.examples)
        return moments.binomial_survival(right, table.examples, chance) < LEARNING_ALPHA

    @property
    def adapter(self) -> str | None:
        """Return the module whose repairs fit this model, ``bnwatch.keras`` or ``bnwatch.chainer``; None by hand."""
        name = (self.framework if self.attachment is None else self.attachment.framework).partition(" ")[0]
        return f"bnwatch.{name}" if name in {"keras", "chainer"} else None

    def attach(self, attachment: Attachment) -> None:
        """Learn which layers are watched."""
        self.attachment = attachment
        self.specs.update({spec.path: spec for spec in attachment.layers})

    def observe(self, snapshot: StepSnapshot) -> SignalTable:
        """Turn a snapshot into the next table; an accuracy that is no share counts as unknown."""
        if self._history is None:
            self._history = _History()
        self.specs.update({call.spec.path: call.spec for call in snapshot.calls if call.spec.path not in self.specs})
        table = self._history.table(snapshot)
        self.tables.append(table)
        self.samples += 1
        return table

    def evaluate(self, record: EvaluationRecord) -> None:
        """Take an evaluation; an accuracy that is no share counts as unknown."""
        known = share(record.accuracy), share(record.train_accuracy)
        if known != (record.accuracy, record.train_accuracy):
            record = replace(record, accuracy=known[0], train_accuracy=known[1])
        self.evaluations.append(record)
        self.evaluated += 1

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


def share(accuracy: float | None) -> float | None:
    """Return an accuracy that lies in [0, 1], None for anything else."""
    return accuracy if accuracy is not None and 0.0 <= accuracy <= 1.0 else None


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
        self._layout: tuple[tuple[CallSite, int], ...] = ()

    def table(self, snapshot: StepSnapshot) -> SignalTable:
        calls = snapshot.calls
        values: Float32 = np.zeros((0, len(STATISTICS)), np.float32)
        shared: tuple[SharedSites, ...] = ()
        if calls:
            layout = tuple((call.site, len(call.batch.mean)) for call in calls)
            if layout != self._layout:
                self._reset(layout)
            with np.errstate(all="ignore"):
                values, shared = self._values(calls)
        return SignalTable(
            step=snapshot.step,
            epoch=snapshot.epoch,
            sites=tuple(call.site for call in calls),
            values=values,
            shared=shared,
            accuracy=share(snapshot.accuracy),
            loss=snapshot.loss,
            examples=snapshot.examples,
        )

    def _reset(self, layout: tuple[tuple[CallSite, int], ...]) -> None:
        self._layout = layout
        self._channels = np.array([channels for _, channels in layout])
        self._starts = np.concatenate([[0], np.cumsum(self._channels)[:-1]]).astype(np.intp)
        self._first: list[NDArray[np.floating]] | None = None
        self._left_initial: NDArray[np.bool_] | None = None
        self._previous: Floats | None = None
        self._noise: deque[Float64] = deque(maxlen=WINDOW)
        self._groups = _site_groups(layout, self._starts)

    def _spread(self, per_site: Sequence[float], dtype: DTypeLike) -> Floats:
        """Repeat one value a site over the site's channels."""
        return np.repeat(np.asarray(per_site, dtype=dtype), self._channels)

    def _average(self, per_channel: Floats) -> Float64:
        average: Float64 = np.add.reduceat(per_channel, self._starts, dtype=np.float64) / self._channels
        return average

    def _any(self, per_channel: NDArray[np.bool_]) -> NDArray[np.bool_]:
        found: NDArray[np.bool_] = np.logical_or.reduceat(per_channel, self._starts)
        return found

    def _values(self, calls: Sequence[CallRecord]) -> tuple[Float32, tuple[SharedSites, ...]]:
        raw = [
            np.concatenate([call.batch.mean for call in calls]),
            np.concatenate([call.batch.var for call in calls]),
            np.concatenate([call.running.mean for call in calls]),
            np.concatenate([call.running.var for call in calls]),
        ]
        if self._first is None:
            self._first = [part.copy() for part in raw]
        # float16 is widened; float32 stays: what comes in was rounded to it, and averages are taken in float64
        mean, var, running_mean, stored_var = (
            part.astype(np.result_type(part, np.float32), copy=False) for part in raw
        )
        count = np.array([call.batch.count for call in calls], dtype=np.float64)
        corrected = [moments.bessel_factor(c.batch.count) if c.running.bessel_corrected else 1.0 for c in calls]
        epsilon = self._spread([call.spec.epsilon for call in calls], mean.dtype)
        running_var = stored_var / self._spread(corrected, mean.dtype)
        wide, running_wide = var + epsilon, running_var + epsilon
        finite = np.isfinite(mean) & np.isfinite(var), np.isfinite(running_mean) & np.isfinite(stored_var)
        flags = (
            Flag.NON_FINITE_BATCH * self._any(~finite[0])
            + Flag.NON_FINITE_RUNNING * self._any(~finite[1])
            + Flag.UNMOVED * ~self._any((raw[2] != self._first[2]) | (raw[3] != self._first[3]))
            + Flag.INITIAL * self._initial(calls, raw)
            + Flag.NEGATIVE_VARIANCE * self._any(stored_var < 0)
            + Flag.BATCH_VARIED * self._any((raw[0] != self._first[0]) | (raw[1] != self._first[1]))
        )
        columns = {
            "count": count,
            "updates": [math.nan if call.running.updates is None else call.running.updates for call in calls],
            "batch_mean": self._average(mean),
            "batch_std": np.sqrt(self._average(var)),
            "running_mean": self._average(running_mean),
            "running_std": np.sqrt(self._average(running_var)),
            "mean_shift": np.sqrt(self._average(np.square(mean - running_mean) / running_wide)),
            "std_ratio": np.exp(self._average(np.log(wide / running_wide)) / 2.0),
            "effective_samples": self._effective_samples(mean, wide),
            "non_finite": np.add.reduceat(~(finite[0] & finite[1]), self._starts, dtype=np.float64),
            "flags": flags,
        }
        values = np.stack([np.asarray(columns[name], dtype=np.float32) for name in STATISTICS], axis=1)
        shared = [s for group in self._groups for s in group.update(mean, wide, running_mean, running_var)]
        return values, tuple(shared)

    def _initial(self, calls: Sequence[CallRecord], raw: Sequence[NDArray[np.floating]]) -> NDArray[np.bool_]:
        """Return which sites hold exactly their initial values; one that left them is not looked at again."""
        if self._left_initial is None:
            self._left_initial = np.zeros(len(calls), dtype=bool)
        for number in np.flatnonzero(~self._left_initial).tolist():
            part = slice(self._starts[number], self._starts[number] + self._channels[number])
            mean, var = calls[number].spec.initial
            self._left_initial[number] = bool((raw[2][part] != mean).any() or (raw[3][part] != var).any())
        return ~self._left_initial

    def _effective_samples(self, mean: Floats, var: Floats) -> Float64:
        """Return m with Var(batch mean) = var / m, from successive differences of the batch mean.

        Successive differences (von Neumann 1941) leave out the slow drift that training causes.
        """
        if self._previous is not None:
            self._noise.append(self._average(np.square(mean - self._previous) / (2.0 * var)))
        self._previous = mean
        if not self._noise:
            return np.full(len(self._channels), math.nan)
        samples: Float64 = 1.0 / np.mean(self._noise, axis=0)
        return samples


def _site_groups(layout: tuple[tuple[CallSite, int], ...], starts: NDArray[np.intp]) -> list[_SiteGroup]:
    """Group the shared layers by how many call sites they have on the first replica."""
    places: dict[str, list[int]] = {}
    for number, (site, _) in enumerate(layout):
        if site.replica == 0:
            places.setdefault(site.layer, []).append(number)
    by_sites: dict[int, dict[str, list[int]]] = {}
    for layer, numbers in places.items():
        if len(numbers) > 1:
            by_sites.setdefault(len(numbers), {})[layer] = numbers
    return [
        _SiteGroup(
            list(layers),
            np.array([layout[numbers[0]][1] for numbers in layers.values()]),
            np.concatenate(
                [starts[numbers][:, None] + np.arange(layout[numbers[0]][1]) for numbers in layers.values()], axis=1
            ),
        )
        for layers in by_sites.values()
    ]


class _SiteGroup:
    """All layers with the same number of call sites: sums over a window of how far each site is from their mean."""

    def __init__(self, layers: list[str], channels: NDArray[np.intp], index: NDArray[np.intp]) -> None:
        self._layers, self._index = layers, index
        self._starts = np.concatenate([[0], np.cumsum(channels)[:-1]]).astype(np.intp)
        self._window: deque[Float64] = deque()
        self._sum = np.zeros((2, *index.shape))
        self._squares = np.zeros((2, index.shape[1]))

    def update(self, mean: Floats, var: Floats, running_mean: Floats, running_var: Floats) -> list[SharedSites]:
        """Add a sample; return one table a layer once there are two samples. ``var`` has epsilon added."""
        site_mean, site_var = mean[self._index], var[self._index]
        values = np.stack([site_mean, 0.5 * np.log(site_var)])
        if not np.isfinite(values).all():
            return []
        deviation = values - values.mean(axis=1, keepdims=True, dtype=np.float64)
        self._add(deviation)
        steps, sites = len(self._window), len(self._index)
        if steps < 2:  # noqa: PLR2004 - a spread needs two
            return []
        pooled = site_var.mean(axis=0, dtype=np.float64)
        tests = [moments.site_variances(self._sum[q], self._squares[q], steps) for q in (0, 1)]
        # in units of each channel, or the widest would decide alone
        tests[0] = tests[0][0] / pooled, tests[0][1] / pooled
        apart = [np.maximum(between - within, 0.0) / steps for between, within in tests]
        channels = np.diff(np.append(self._starts, len(pooled)))
        ratio = np.fmax(*(self._total(between) / self._total(within) for between, within in tests))
        shift, scale = (np.sqrt(self._total(one) / channels) for one in apart)
        distance = np.abs(deviation[0]).max(axis=0) / np.sqrt(pooled)
        ends = zip(self._starts, self._starts + channels, strict=True)
        worst = np.array([distance[start:stop].argmax() for start, stop in ends])
        chosen = self._index[:, self._starts + worst]
        of_layer = np.stack([shift, scale, ratio, np.full(len(worst), steps), worst])
        of_site = np.stack([mean[chosen], np.sqrt(var[chosen]), running_mean[chosen], np.sqrt(running_var[chosen])])
        tables = np.concatenate([np.repeat(of_layer[:, None], sites, axis=1), of_site]).astype(np.float32)
        return [SharedSites(layer, tables[:, :, n].T) for n, layer in enumerate(self._layers)]

    def _total(self, per_channel: Float64) -> Float64:
        total: Float64 = np.add.reduceat(per_channel, self._starts)
        return total

    def _add(self, deviation: Float64) -> None:
        self._window.append(deviation)
        self._sum += deviation
        self._squares += np.einsum("qsc,qsc->qc", deviation, deviation)
        if len(self._window) > WINDOW:
            oldest = self._window.popleft()
            self._sum -= oldest
            gone = np.einsum("qsc,qsc->qc", oldest, oldest)
            self._squares -= gone
            # What is left of a sum after something far larger is taken out of it is rounding
            if (gone > DOMINANT * self._squares).any():
                kept = np.stack(self._window)
                self._sum, self._squares = kept.sum(axis=0), np.einsum("wqsc,wqsc->qc", kept, kept)
