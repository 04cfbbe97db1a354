"""Named quantities derived from what was seen, with bounded history: the only thing a rule reads.

A sample becomes a `SignalTable`, one float32 row per call site. The table is what the record on disk holds, and rules
read nothing finer, so a log replays to the diagnoses of the live run.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter, deque
from dataclasses import dataclass, field, replace
from enum import IntFlag
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import numpy as np

from bnwatch import moments
from bnwatch.evidence import Attribution, Composition, Entering, Look
from bnwatch.records import Attachment, CallSite, EvaluationRecord, Structure

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from numpy.typing import DTypeLike, NDArray

    from bnwatch.evidence import Cells, Split
    from bnwatch.records import CallRecord, LayerSpec, StepSnapshot

    Float32 = NDArray[np.float32]
    Float64 = NDArray[np.float64]
    Floats = NDArray[np.floating]
    Layout = tuple[tuple[CallSite, int], ...]
    Held = Mapping[str, Sequence[tuple[Floats, Floats]]]
    _Held = tuple[int, Floats, Float64, Float64]  # step, running mean, average of the running variance, updates

Group = TypeVar("Group", bound="_SiteGroup")

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
    "zero_variance",
    "unexplained",
    "recovered_std",
)
"""Columns of a `SignalTable`.

count: elements per channel; updates: of the running statistics, NaN when unknown; batch_mean, running_mean: averaged
over channels; batch_std, running_std: root of the variance averaged over channels; mean_shift: root mean square over
channels of (batch - running mean) in running standard deviations (d of Ioffe 2017, arXiv:1702.03275, eq. 2);
std_ratio: geometric mean over channels of batch / running standard deviation (r of the same); effective_samples: from
the spread of batch means over steps, NaN until there are two samples; non_finite: channels with NaN or infinity in
batch or running statistics; flags: a `Flag`; zero_variance: channels whose batch variance is nothing but rounding;
unexplained: root mean square over channels of what the running mean moved beyond the call of this step, in running
standard deviations, NaN unless the step before was sampled too and the layer is called once a step; recovered_std: root
of the mean over channels of the batch variance in the updates since the last sample, averaged as the moving average
weighs them and solved from it, NaN where the number of updates is unknown.
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
in which they differ most, and its statistics at each site. Of `Replicas` the rows are the replicas, and the first two
are taken from their running statistics.
"""

WINDOW = 16
"""Samples that windowed signals look back on: enough for a variance, short against the drift of the parameters."""

CHOSEN = 3
"""Layers that stay the same through the run: those farthest off when the first `WINDOW` samples are in."""

DOMINANT = 1e6
"""Ratio of a sum that leaves a window to the rest of it beyond which the rest is added up anew."""

HISTORY = 256
"""Tables, evaluations and looks that are kept: bounds memory, and covers any rule's window."""


WORST, GAP = "bnwatch/worst/", "bnwatch/accuracy/gap"
"""Names under which numbers are shown beside those of the training: what is farthest off, and the accuracy gap."""


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
    HALF = 64
    """The running statistics are kept in float16."""
    UNMOVED_VARIANCE = 128
    """The running variance is bitwise that of the first sample, and the running mean is not."""


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
class Replicas:
    """How far apart the running statistics of the replicas are when they evaluate; layers in network order."""

    step: int
    epoch: int
    layers: tuple[SharedSites, ...]


@dataclass(frozen=True, slots=True)
class SignalTable:
    """One sample: ``values`` is ``(len(sites), len(STATISTICS))``, float32; ``idle`` as in `StepSnapshot`."""

    step: int
    epoch: int
    sites: tuple[CallSite, ...]
    values: Float32
    shared: tuple[SharedSites, ...] = ()
    accuracy: float | None = None
    loss: float | None = None
    examples: int = 0
    idle: tuple[str, ...] = ()

    def column(self, statistic: str) -> Float32:
        """Return one statistic of every site, shape ``(sites,)``."""
        column: Float32 = self.values[:, STATISTICS.index(statistic)]
        return column

    def distances(self) -> dict[str, Float32]:
        """Return by name how far the batch statistics of every site are from the running ones, shape ``(sites,)``."""
        with np.errstate(all="ignore"):
            return {
                "mean_shift": np.abs(self.column("mean_shift")),
                "log_std_ratio": np.abs(np.log(self.column("std_ratio"))),
            }

    def distance(self) -> Float32:
        """Return the larger of the `distances` of every site; what is not finite is farther than anything."""
        larger: Float32 = np.nan_to_num(np.maximum(*self.distances().values()), nan=np.inf, posinf=np.inf)
        return larger


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
    def epsilon_share(self) -> float:
        """Return the share of epsilon in what the batch is divided by: epsilon / (mean batch variance + epsilon)."""
        return self.spec.epsilon / (self.batch_std**2 + self.spec.epsilon)

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
    composition: Composition | None = None
    """How the training batches are composed, as last measured together with the cells."""
    replicas: Replicas | None = None
    """How far apart the replicas were when they last evaluated."""
    refused: str | None = None
    """Why the last experiment was not possible."""
    faults: list[str] = field(default_factory=list)
    """Internal errors of the watch itself."""
    ended: bool = False
    """Training has ended: what is wrong now stays wrong."""
    unused_allowances: tuple[str, ...] = ()
    """Patterns of ``allow`` that matched nothing, known when the run ends."""
    normalized: dict[str, int] = field(default_factory=dict)
    """The last sampled step at which a layer normalized with batch statistics, by path."""
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

    def chance_on(self, split: Split) -> float | None:
        """Return `chance` of one split: the two may hold the classes in other shares."""
        rows = dict(self.cells.rows()) if self.cells is not None else {}
        if self.cells is None or split not in rows:
            return self.chance
        return max(next(iter(rows[split].values())).majority, 1.0 / self.cells.classes)

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

    def take(self, item: Any) -> None:
        """Take what came out of a training or of an experiment: a record of `records`, of `evidence`, or a sample."""
        if isinstance(item, SignalTable):
            self.remember(item)
            self.samples += 1
        elif isinstance(item, EvaluationRecord):
            self.evaluate(item)
        elif isinstance(item, Attachment):
            self.attach(item)
        elif isinstance(item, Look):
            self.looks.append(item)
        else:
            setattr(self, next((name for kind, name in _LATEST.items() if isinstance(item, kind)), "cells"), item)

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
        self.remember(table)
        self.samples += 1
        return table

    def remember(self, table: SignalTable) -> None:
        """Take a sample that was made before."""
        self.tables.append(table)
        self.normalized.update((site.layer, table.step) for site in table.sites)

    def evaluate(self, record: EvaluationRecord) -> None:
        """Take an evaluation; an accuracy that is no share counts as unknown."""
        known = share(record.accuracy), share(record.train_accuracy)
        if known != (record.accuracy, record.train_accuracy):
            record = replace(record, accuracy=known[0], train_accuracy=known[1])
        self.evaluations.append(record)
        self.evaluated += 1

    @property
    def replicated(self) -> int:
        """Return how many replicas the latest sample is of."""
        return 1 + max((site.replica for site in self.table.sites), default=0) if self.table is not None else 1

    def compare(self, step: int, epoch: int, held: Held | None = None) -> Replicas | None:
        """Compare the running statistics of the replicas, and return how far they are apart.

        Args:
            step: training steps finished when they are held.
            epoch: epoch of that step.
            held: mean and variance on each replica by layer; those of the latest sample if None.

        Returns:
            None where there is nothing to compare: one replica, a single sample, or values that are not finite.
        """
        if self._history is None:
            return None
        with np.errstate(all="ignore"):
            layers = self._history.compare(held)
        if layers:
            self.replicas = Replicas(step, epoch, layers)
        return self.replicas if layers else None

    def columns(self, statistic: str, samples: int = HISTORY) -> Float32:
        """Return a statistic of the last samples in a row with the call sites of the latest, ``(samples, sites)``."""
        now = self.table.sites if self.table is not None else ()
        alike = itertools.takewhile(lambda table: table.sites is now or table.sites == now, reversed(self.tables))
        return stacked(statistic, list(itertools.islice(alike, samples))[::-1])

    def moved(self, statistic: str, samples: int) -> NDArray[np.bool_]:
        """Return at which call sites a statistic changed by a bit at least within the last samples."""
        columns = self.columns(statistic, samples)
        changed: NDArray[np.bool_] = (columns != columns[:1]).any(axis=0)
        return changed

    @property
    def memory(self) -> dict[str, Any] | None:
        """Return what no table holds, numbers and arrays by name: the last samples, channel by channel."""
        return None if self._history is None else self._history.memory

    def recall(self, memory: Mapping[str, Any] | None) -> None:
        """Go on from a `memory`.

        Raises:
            KeyError, TypeError, ValueError: it is none.
        """
        self._history = None if memory is None else _History.recalled(memory)

    def sites(self, flag: Flag | None = None) -> Iterator[SiteSignals]:
        """Yield the call sites of the latest sample, in the order of the forward pass; only those with a flag."""
        table = self.table
        if table is None:
            return
        if flag is not None:
            yield from self.at(table.column("flags").astype(np.int64) & int(flag) > 0)
            return
        for n, site in enumerate(table.sites):
            yield SiteSignals(site, self.specs[site.layer], table.values[n])

    def at(self, rows: NDArray[np.bool_]) -> Iterator[SiteSignals]:
        """Yield the call sites of the latest sample in these rows, so that a column decides and nothing is looped."""
        table = self.table
        if table is None:
            return
        for n in np.flatnonzero(rows).tolist():
            site = table.sites[n]
            yield SiteSignals(site, self.specs[site.layer], table.values[n])

    def of_layers(self, attribute: str) -> Float64:
        """Return a number of `LayerSpec` for the layer of each call site of the latest sample, shape ``(sites,)``."""
        sites = self.table.sites if self.table is not None else ()
        return np.array([getattr(self.specs[site.layer], attribute) for site in sites], np.float64)

    def shared(self) -> Iterator[tuple[LayerSpec, list[SiteSignals], SharedSites | None]]:
        """Yield layers with two call sites or more on one replica, their sites, and how far apart these are."""
        table = self.table
        if table is None or len({site.layer for site in table.sites}) == len(table.sites):
            return
        apart = {shared.layer: shared for shared in table.shared}
        by_layer: dict[str, list[SiteSignals]] = {}
        for site in self.sites():
            if site.site.replica == 0:
                by_layer.setdefault(site.site.layer, []).append(site)
        for layer, sites in by_layer.items():
            if len(sites) > 1:
                yield self.specs[layer], sites, apart.get(layer)


def stacked(statistic: str, tables: Sequence[SignalTable]) -> Float32:
    """Return a statistic of samples with the same call sites, ``(samples, sites)``."""
    return np.stack([table.column(statistic) for table in tables]) if tables else np.zeros((0, 0), np.float32)


_LATEST: dict[type, str] = {
    Structure: "structure",
    Replicas: "replicas",
    Attribution: "attribution",
    Composition: "composition",
    Entering: "entering",
}
"""What is known of which only the latest counts, by the name of the attribute."""


def worst(distances: Mapping[str, Float32], rows: NDArray[np.bool_] | None = None) -> dict[str, float]:
    """Return by name the largest finite distance of these rows, or of all; nothing where there is none."""
    found = {name: values if rows is None else values[rows] for name, values in distances.items()}
    finite = {name: values[np.isfinite(values)] for name, values in found.items()}
    return {name: float(values.max()) for name, values in finite.items() if values.size}


def chosen_layers(table: SignalTable, samples: int) -> tuple[str, ...]:
    """Return the paths of the `CHOSEN` layers after so many samples, the one farthest off first; none if too few."""
    if samples < WINDOW and len({site.layer for site in table.sites}) > CHOSEN:
        return ()
    layers = dict.fromkeys(table.sites[n].layer for n in np.argsort(-table.distance(), kind="stable"))
    return tuple(layers)[:CHOSEN]


def spaced(samples: int, octave: int) -> bool:
    """Return whether the ``samples``-th sample, counted from 1, is one of about ``octave`` while their number doubles.

    ``octave`` is a power of 2; the first twice as many are all of them.
    """
    return samples % (1 << max(samples.bit_length() - (2 * octave).bit_length() + 1, 0)) == 0


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
        self._layout: Layout = ()
        self._replicas: list[_ReplicaGroup] = []

    def table(self, snapshot: StepSnapshot) -> SignalTable:
        calls = snapshot.calls
        values: Float32 = np.zeros((0, len(STATISTICS)), np.float32)
        shared: tuple[SharedSites, ...] = ()
        if calls:
            layout = tuple((call.site, len(call.batch.mean)) for call in calls)
            if layout != self._layout:
                self._reset(layout)
            with np.errstate(all="ignore"):
                values, shared = self._values(calls, snapshot.step)
        return SignalTable(
            step=snapshot.step,
            epoch=snapshot.epoch,
            sites=self._sites if calls else (),
            values=values,
            shared=shared,
            accuracy=share(snapshot.accuracy),
            loss=snapshot.loss,
            examples=snapshot.examples,
            idle=snapshot.idle,
        )

    def _reset(self, layout: Layout) -> None:
        self._layout = layout
        self._sites = tuple(site for site, _ in layout)  # one for all tables, so that they compare at once
        self._channels = np.array([channels for _, channels in layout])
        self._starts = np.concatenate([[0], np.cumsum(self._channels)[:-1]]).astype(np.intp)
        self._first: list[NDArray[np.floating]] | None = None
        self._left_initial: NDArray[np.bool_] | None = None
        self._previous: Floats | None = None
        self._held: _Held | None = None
        calls = Counter(site.layer for site, _ in layout)
        self._single = np.array([calls[site.layer] == 1 for site, _ in layout])
        self._noise: deque[Float64] = deque(maxlen=WINDOW)
        self._groups = _site_groups(layout, self._starts)
        self._replicas = _replica_groups(layout, self._starts)

    @property
    def memory(self) -> dict[str, Any]:
        """Return everything but what `_reset` makes of the layout."""
        if not self._layout:
            return {"layout": []}
        return {
            "layout": [[site.layer, site.index, site.replica, channels] for site, channels in self._layout],
            "first": self._first,
            "left_initial": self._left_initial,
            "previous": self._previous,
            "held": None if self._held is None else list(self._held),
            "noise": list(self._noise),
            "groups": [group.memory for group in (*self._groups, *self._replicas)],
        }

    @classmethod
    def recalled(cls, memory: Mapping[str, Any]) -> _History:
        """Return the history that a `memory` is of."""
        history = cls()
        layout = tuple((CallSite(layer, index, replica), int(n)) for layer, index, replica, n in memory["layout"])
        if not layout:
            return history
        history._reset(layout)
        shape = (int(history._channels.sum()),)
        history._first = memory["first"]
        history._left_initial = memory["left_initial"]
        history._previous = memory["previous"]
        held = memory.get("held")
        if held is not None:
            last, mean, var, counted = held
            for array, length in ((mean, shape), (var, (len(layout),)), (counted, (len(layout),))):
                _check_shape(array, length)
            history._held = int(last), mean, var, counted
        history._noise.extend(memory["noise"])
        for array in (*(history._first or ()), *([] if history._previous is None else [history._previous])):
            _check_shape(array, shape)
        for array in (*([] if history._left_initial is None else [history._left_initial]), *history._noise):
            _check_shape(array, (len(layout),))
        for group, part in zip((*history._groups, *history._replicas), memory["groups"], strict=True):
            group.recall(part)
        return history

    def _spread(self, per_site: Sequence[float] | Float64, dtype: DTypeLike) -> Floats:
        """Repeat one value a site over the site's channels."""
        return np.repeat(np.asarray(per_site, dtype=dtype), self._channels)

    def _average(self, per_channel: Floats) -> Float64:
        average: Float64 = _totals(per_channel, self._starts) / self._channels
        return average

    def _count(self, per_channel: NDArray[np.bool_]) -> Float64:
        return _totals(per_channel, self._starts) if per_channel.any() else np.zeros(len(self._starts))

    def _any(self, per_channel: NDArray[np.bool_]) -> NDArray[np.bool_]:
        found: NDArray[np.bool_] = np.logical_or.reduceat(per_channel, self._starts)
        return found

    def _values(self, calls: Sequence[CallRecord], step: int) -> tuple[Float32, tuple[SharedSites, ...]]:
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
        moved = [self._any(raw[part] != self._first[part]) for part in (2, 3)]
        flags = (
            Flag.NON_FINITE_BATCH * self._any(~finite[0])
            + Flag.NON_FINITE_RUNNING * self._any(~finite[1])
            + Flag.UNMOVED * ~(moved[0] | moved[1])
            + Flag.INITIAL * self._initial(calls, raw)
            + Flag.NEGATIVE_VARIANCE * self._any(stored_var < 0)
            + Flag.BATCH_VARIED * self._any((raw[0] != self._first[0]) | (raw[1] != self._first[1]))
            + Flag.HALF * np.array([call.running.var.dtype == np.float16 for call in calls])
            + Flag.UNMOVED_VARIANCE * (moved[0] & ~moved[1])
        )
        constant = var <= moments.ROUNDING * np.square(mean)
        updates = np.array([math.nan if c.running.updates is None else c.running.updates for c in calls], np.float64)
        decay = np.array([call.running.decay for call in calls], np.float64)
        running_average = self._average(running_var)
        unexplained, recovered = self._moved(
            (step, running_mean, running_average, updates), decay=decay, mean=mean, running_var=running_var
        )
        columns = {
            "count": count,
            "updates": updates,
            "batch_mean": self._average(mean),
            "batch_std": np.sqrt(self._average(var)),
            "running_mean": self._average(running_mean),
            "running_std": np.sqrt(running_average),
            "mean_shift": np.sqrt(self._average(np.square(mean - running_mean) / running_wide)),
            "std_ratio": np.exp(self._average(np.log(wide / running_wide)) / 2.0),
            "effective_samples": self._effective_samples(mean, wide),
            "non_finite": self._count(~(finite[0] & finite[1])),
            "flags": flags,
            "zero_variance": self._count(constant),
            "unexplained": unexplained,
            "recovered_std": recovered,
        }
        values = np.stack([np.asarray(columns[name], dtype=np.float32) for name in STATISTICS], axis=1)
        shared = [s for group in self._groups for s in group.update(mean, wide, running_mean, running_var)]
        for replicas in self._replicas:
            replicas.update(mean, wide, running_mean, running_var)
            replicas.decay = self._spread([call.spec.decay for call in calls], np.float64)
            replicas.epsilon = epsilon
        return values, tuple(shared)

    def _moved(self, now: _Held, *, decay: Float64, mean: Floats, running_var: Floats) -> tuple[Float64, Float64]:
        """Return what the call of this step leaves unexplained of the running mean, and the recovered deviation."""
        before, self._held = self._held, now
        beyond = unknown = np.full(len(decay), math.nan)
        if before is None:
            return unknown, unknown
        (step, running_mean, average, updates), (last, held_mean, held_average, counted) = now, before
        if step == last + 1 and self._single.any():
            # of differences, which are as exact as the running mean itself
            moved = (mean - held_mean) * self._spread(decay - 1.0, mean.dtype)
            moved += running_mean - held_mean
            moved *= moved / running_var
            beyond = np.where(self._single, np.sqrt(self._average(moved)), math.nan)
        kept = np.where(updates > counted, decay ** (updates - counted), math.nan)
        return beyond, np.sqrt(np.maximum((average - kept * held_average) / (1.0 - kept), 0.0))

    def compare(self, held: Held | None) -> tuple[SharedSites, ...]:
        """Return how far the replicas of each layer are apart in what they hold."""
        return tuple(shared for replicas in self._replicas for shared in replicas.compare(held))

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


def _totals(per_channel: Floats | NDArray[np.bool_], starts: NDArray[np.intp]) -> Float64:
    """Return the sum of each part that begins at these places; parts of one length are summed four times as fast."""
    if len(per_channel) % len(starts) == 0:
        length = len(per_channel) // len(starts)
        if (starts == length * np.arange(len(starts))).all():
            together: Float64 = per_channel.reshape(-1, length).sum(axis=1, dtype=np.float64)
            return together
    total: Float64 = np.add.reduceat(per_channel, starts, dtype=np.float64)
    return total


def _check_shape(array: Any, shape: tuple[int, ...]) -> None:
    if np.shape(array) != shape:
        msg = f"an array of shape {np.shape(array)} stands where {shape} belongs"
        raise ValueError(msg)


def _site_groups(layout: Layout, starts: NDArray[np.intp]) -> list[_SiteGroup]:
    """Group the shared layers by how many call sites they have on the first replica."""
    return _groups(
        _SiteGroup, [(n, site.layer) for n, (site, _) in enumerate(layout) if not site.replica], layout, starts
    )


def _replica_groups(layout: Layout, starts: NDArray[np.intp]) -> list[_ReplicaGroup]:
    """Group the layers by on how many replicas their first call site is."""
    return _groups(
        _ReplicaGroup, [(n, site.layer) for n, (site, _) in enumerate(layout) if not site.index], layout, starts
    )


def _groups(kind: type[Group], chosen: list[tuple[int, str]], layout: Layout, starts: NDArray[np.intp]) -> list[Group]:
    places: dict[str, list[int]] = {}
    for number, layer in chosen:
        places.setdefault(layer, []).append(number)
    by_sites: dict[int, dict[str, list[int]]] = {}
    for layer, numbers in places.items():
        if len(numbers) > 1 and len({layout[n][1] for n in numbers}) == 1:
            by_sites.setdefault(len(numbers), {})[layer] = numbers
    return [
        kind(
            list(layers),
            np.array([layout[numbers[0]][1] for numbers in layers.values()]),
            np.concatenate(
                [starts[numbers][:, None] + np.arange(layout[numbers[0]][1]) for numbers in layers.values()], axis=1
            ),
        )
        for layers in by_sites.values()
    ]


class _Site(NamedTuple):
    """The statistics of a group's sites, each of shape ``(sites, channels)``; ``var`` has epsilon added."""

    mean: Floats
    var: Floats
    running_mean: Floats
    running_var: Floats


def _deviation(mean: Floats, var: Floats) -> Float64 | None:
    """Return how far means and log spreads of each site are from those of all; None where one is not finite."""
    values = np.stack([mean, 0.5 * np.log(var)])
    if not np.isfinite(values).all():
        return None
    deviation: Float64 = values - values.mean(axis=1, keepdims=True, dtype=np.float64)
    return deviation


class _SiteGroup:
    """All layers with the same number of call sites: sums over a window of how far each site is from their mean."""

    def __init__(self, layers: list[str], channels: NDArray[np.intp], index: NDArray[np.intp]) -> None:
        self._layers, self._index = layers, index
        self._starts = np.concatenate([[0], np.cumsum(channels)[:-1]]).astype(np.intp)
        self._window: deque[Float64] = deque()
        self._sum = np.zeros((2, *index.shape))
        self._squares = np.zeros((2, index.shape[1]))

    @property
    def memory(self) -> dict[str, Any]:
        """Return the window and its sums; these are not those of the window to the last bit."""
        return {"window": list(self._window), "sum": self._sum, "squares": self._squares}

    def recall(self, memory: Mapping[str, Any]) -> None:
        """Go on from a `memory`."""
        for array in (*memory["window"], memory["sum"]):
            _check_shape(array, self._sum.shape)
        _check_shape(memory["squares"], self._squares.shape)
        self._window = deque(memory["window"])
        self._sum, self._squares = memory["sum"], memory["squares"]

    def update(self, mean: Floats, var: Floats, running_mean: Floats, running_var: Floats) -> list[SharedSites]:
        """Add a sample; return one table a layer once there are two samples. ``var`` has epsilon added."""
        site_var = var[self._index]
        deviation = _deviation(mean[self._index], site_var)
        if deviation is None:
            return []
        self._add(deviation)
        if len(self._window) < 2:  # noqa: PLR2004 - a spread needs two
            return []
        tests, pooled = self._tests(site_var)
        apart = [np.maximum(between - within, 0.0) / len(self._window) for between, within in tests]
        worst = self._worst(np.abs(deviation[0]).max(axis=0) / np.sqrt(pooled))
        chosen = self._index[:, self._starts + worst]
        site = _Site(*(values[chosen] for values in (mean, var, running_mean, running_var)))
        return self._tables(apart, tests, worst, site)

    def _tests(self, var: Floats) -> tuple[list[tuple[Float64, Float64]], Float64]:
        """Return the mean squares between sites and within them, of means and of spreads, and the pooled variance."""
        pooled: Float64 = var.mean(axis=0, dtype=np.float64)
        tests = [moments.site_variances(self._sum[q], self._squares[q], len(self._window)) for q in (0, 1)]
        # in units of each channel, or the widest would decide alone
        tests[0] = tests[0][0] / pooled, tests[0][1] / pooled
        return tests, pooled

    def _worst(self, distance: Float64) -> NDArray[np.intp]:
        """Return the channel of each layer in which the sites are farthest apart."""
        ends = zip(self._starts, [*self._starts[1:], len(distance)], strict=True)
        return np.array([distance[start:stop].argmax() for start, stop in ends])

    def _tables(
        self,
        apart: Sequence[Float64],
        tests: list[tuple[Float64, Float64]],
        worst: NDArray[np.intp],
        site: _Site,
    ) -> list[SharedSites]:
        """Return a table a layer, from what is known a channel; ``site`` is of the worst channels alone."""
        channels = np.diff(np.append(self._starts, len(apart[0])))
        ratio = np.fmax(*(self._total(between) / self._total(within) for between, within in tests))
        shift, scale = (np.sqrt(self._total(one) / channels) for one in apart)
        of_layer = np.stack([shift, scale, ratio, np.full(len(worst), len(self._window)), worst])
        of_site = np.stack([site.mean, np.sqrt(site.var), site.running_mean, np.sqrt(site.running_var)])
        tables = np.concatenate([np.repeat(of_layer[:, None], len(self._index), axis=1), of_site]).astype(np.float32)
        return [SharedSites(layer, tables[:, :, n].T) for n, layer in enumerate(self._layers)]

    def _total(self, per_channel: Float64) -> Float64:
        return _totals(per_channel, self._starts)

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


class _ReplicaGroup(_SiteGroup):
    """All layers on the same number of replicas."""

    decay: Floats
    epsilon: Floats
    _latest: _Site | None = None

    def update(self, mean: Floats, var: Floats, running_mean: Floats, running_var: Floats) -> list[SharedSites]:
        """Add a sample, to be compared when the replicas evaluate."""
        self._latest = _Site(*(values[self._index] for values in (mean, var, running_mean, running_var)))
        deviation = _deviation(self._latest.mean, self._latest.var)
        if deviation is not None:
            self._add(deviation)
        return []

    @property
    def memory(self) -> dict[str, Any]:
        """Return what the sites have, and the latest sample."""
        latest = None if self._latest is None else list(self._latest)
        return {**super().memory, "latest": latest, "decay": self.decay, "epsilon": self.epsilon}

    def recall(self, memory: Mapping[str, Any]) -> None:
        """Go on from a `memory`."""
        super().recall(memory)
        if memory["latest"] is not None:
            for array in memory["latest"]:
                _check_shape(array, self._index.shape)
            self._latest = _Site(*memory["latest"])
        self.decay, self.epsilon = memory["decay"], memory["epsilon"]

    def compare(self, held: Held | None) -> list[SharedSites]:
        """Return one table a layer: how far running statistics are apart beyond what averages of the same data are.

        The test is that of the batch statistics over steps: the memory of a moving average is too short for one.
        """
        site = self._latest
        if site is None or len(self._window) < 2:  # noqa: PLR2004 - a spread needs two
            return []
        if held is not None:
            if any(len(held.get(layer, ())) != len(self._index) for layer in self._layers):
                return []
            parts = zip(*(zip(*held[layer], strict=True) for layer in self._layers), strict=True)
            running = [np.concatenate([np.stack(one) for one in part], axis=1) for part in parts]
            site = site._replace(running_mean=running[0], running_var=running[1])
        of_group = self._index[0]
        deviation = _deviation(site.running_mean, site.running_var + self.epsilon[of_group])
        if deviation is None:
            return []
        tests, pooled = self._tests(site.var)
        deviation[0] /= np.sqrt(pooled)
        noise = moments.average_noise(self.decay[of_group])
        between = np.square(deviation).sum(axis=1) / (len(self._index) - 1)
        apart = [np.maximum(between[q] - noise * tests[q][1], 0.0) for q in (0, 1)]
        worst = self._worst(np.abs(deviation[0]).max(axis=0))
        return self._tables(apart, tests, worst, _Site(*(part[:, self._starts + worst] for part in site)))
