"""Builders and fakes for those who write rules or taps.

`layer`, `call` and `snapshot` build records from plain numbers, `place` and `usage` what a graph says, `look`, `cells`,
`attribution` and `entering` the results of experiments, `signals` feeds any of them to the rules, `train` simulates the
statistics of a training run, and `FakeLaboratory` is a small model with batch normalization, for experiments without a
framework.
"""

from __future__ import annotations

import itertools
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from bnwatch import moments
from bnwatch.evidence import (
    Attribution,
    Cell,
    Cells,
    Composition,
    Difference,
    Entering,
    Examples,
    ExperimentNotPossibleError,
    LayerLook,
    Look,
    Seen,
    SiteComposition,
    SiteCost,
    SiteMoments,
    SiteShift,
    Updates,
    recalibrate,
    spread_over,
)
from bnwatch.records import (
    Attachment,
    BatchStatistics,
    CallRecord,
    CallSite,
    EvaluationRecord,
    LayerSpec,
    Place,
    RunningStatistics,
    StepSnapshot,
    Structure,
    Usage,
)
from bnwatch.signals import Signals

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator, Mapping, Sequence

    from numpy.typing import ArrayLike, NDArray

    from bnwatch.evidence import MeanAndVariance, Split, Statistics

    Draw = Callable[[np.random.Generator], NDArray[np.float64]]


def layer(
    path: str = "bn",
    channels: int = 4,
    *,
    epsilon: float = 1e-3,
    decay: float = 0.9,
    bessel_corrected: bool = False,
    trainable: bool = True,
    initial: tuple[float, float] = (0.0, 1.0),
) -> LayerSpec:
    """Return a layer."""
    return LayerSpec(
        path, "BatchNormalization", channels, epsilon, decay, bessel_corrected, trainable, initial=initial
    )  # fmt: skip


def place(path: str = "bn", index: int = 0, **facts: Any) -> Place:
    """Return what the graph says of one call site; ``facts`` are fields of `bnwatch.records.Place`."""
    return Place(CallSite(path, index), **facts)


def usage(path: str = "bn", *places: Place, decay: float = 0.9, trainable: bool = True) -> Usage:
    """Return how a model uses one layer."""
    return Usage(path, "BatchNormalization", decay, trainable, places)


def call(
    spec: LayerSpec,
    *,
    mean: ArrayLike = 0.0,
    var: ArrayLike = 1.0,
    running_mean: ArrayLike = 0.0,
    running_var: ArrayLike = 1.0,
    count: int = 64,
    updates: int | None = None,
    site: int = 0,
    replica: int = 0,
) -> CallRecord:
    """Return a call; a single number stands for all channels."""

    def spread(value: ArrayLike) -> NDArray[np.float32]:
        return np.array(np.broadcast_to(np.asarray(value, dtype=np.float32), spec.channels))

    return CallRecord(
        spec,
        CallSite(spec.path, site, replica),
        BatchStatistics(spread(mean), spread(var), count),
        RunningStatistics(spread(running_mean), spread(running_var), spec.decay, updates, spec.bessel_corrected),
    )


def snapshot(
    step: int,
    *calls: CallRecord,
    epoch: int = 0,
    accuracy: float | None = None,
    loss: float | None = None,
    examples: int = 0,
    idle: tuple[str, ...] = (),
) -> StepSnapshot:
    """Return what was seen at one step."""
    return StepSnapshot(step, epoch, calls, accuracy, loss, examples, idle)


def layer_look(
    path: str,
    *,
    zero: float = 0.0,
    spread: float = 0.5,
    gradient: float | None = None,
    units: int = 10,
    kind: str = "Dense",
    dead_units: float | None = None,
    **measured: Any,
) -> LayerLook:
    """Return a look at one layer: ``zero`` is the share of examples with all units zero, ``spread`` over examples.

    ``measured`` are further fields of `bnwatch.evidence.LayerLook`.
    """
    dead = zero if dead_units is None else dead_units
    return LayerLook(path, kind, units, zero, dead, spread, gradient, **measured)


def look(step: int, *layers: LayerLook, examples: int = 100, epoch: int = 0, **measured: Any) -> Look:
    """Return a look through a network; ``measured`` are further fields of `bnwatch.evidence.Look`."""
    return Look(step, epoch, examples, layers, **measured)


def cells(
    step: int = 0,
    *,
    training: Mapping[Statistics, float] | None = None,
    evaluation: Mapping[Statistics, float] | None = None,
    examples: int = 1000,
    classes: int = 10,
    missing: str | None = None,
) -> Cells:
    """Return cells of the given accuracies.

    The same examples come right first in every cell, so two cells differ in as few examples as their accuracies allow.
    """
    labels = np.arange(examples, dtype=np.int64) % classes

    def row(accuracies: Mapping[Statistics, float] | None) -> dict[Statistics, Cell]:
        right = {name: np.arange(examples) < round(share * examples) for name, share in (accuracies or {}).items()}
        return {name: Cell(np.where(r, labels, (labels + 1) % classes), labels) for name, r in right.items()}

    return Cells(step, 0, classes, row(training), row(evaluation), missing)


def difference(gained: float, examples: int = 1000) -> Difference:
    """Return the difference of two passes, the worse of which is right in no example that the better gets wrong."""
    only, both = round(abs(gained) * examples), examples // 2 - round(abs(gained) * examples) // 2
    pair = (only, 0) if gained >= 0.0 else (0, only)
    interval = moments.paired_interval(both, *pair, examples - both - only)
    return Difference(gained, interval, moments.mcnemar(*pair))


def attribution(
    step: int = 0,
    *,
    cost: float,
    recovered: Mapping[str, float],
    split: Split = "evaluation",
    examples: int = 1000,
    unmeasured: tuple[str, ...] = (),
) -> Attribution:
    """Return an attribution of ``cost`` to layers, or to call sites such as ``bn#1``, by what each alone recovers."""
    costs = []
    for subject, share in sorted(recovered.items(), key=lambda item: -item[1]):
        path, _, index = subject.partition("#")
        found = difference(share, examples)
        costs.append(SiteCost(path, int(index) if index else None, 1.0, found, found))
    total = difference(cost, examples)
    return Attribution(step, 0, split, examples, 0.9 - cost, 0.9, total, tuple(costs), unmeasured)


def entering(step: int = 0, *sites: SiteShift, examples: int = 512, untold: str | None = None) -> Entering:
    """Return what enters each layer in evaluation against training."""
    return Entering(step, 0, examples, examples, sites, untold)


def site_shift(
    layer: str = "bn",
    *,
    shift: float = 0.0,
    ratio: float = 1.0,
    p: float | None = 1e-9,
    index: int | None = None,
    held: tuple[float, float] = (0.0, 1.0),
    awakened: int = 0,
) -> SiteShift:
    """Return how differently evaluation examples enter one call site; ``held``: ``held_shift`` and ``held_ratio``."""
    return SiteShift(layer, index, shift, ratio, p, *held, awakened)


def composition(
    step: int = 0,
    *sites: SiteComposition,
    batches: int = 32,
    examples: int = 1024,
    smallest: int | None = None,
    median: int | None = None,
    purity: tuple[float, float] | None = None,
) -> Composition:
    """Return how batches are composed; ``purity`` is as it was and of random batches."""
    size = examples // batches
    found, expected = purity or (None, None)
    return Composition(
        step, 0, batches, examples, smallest or size, median or size, found, expected, sites
    )  # fmt: skip


def site_composition(
    layer: str = "bn",
    *,
    dispersion: float = 1.0,
    p: float = 0.5,
    clusters: float = 0.3,
    smaller: float = 0.5,
    tail: float = 1.5,
    index: int | None = None,
) -> SiteComposition:
    """Return how far apart the batches are in what enters one call site."""
    return SiteComposition(layer, index, dispersion, p, clusters, smaller, tail)


def signals(
    *items: StepSnapshot
    | EvaluationRecord
    | Attachment
    | Structure
    | Look
    | Cells
    | Attribution
    | Composition
    | Entering,
) -> Signals:
    """Return signals that were fed with the items in turn."""
    fed = Signals()
    for item in items:
        if isinstance(item, StepSnapshot):
            fed.observe(item)
        else:
            fed.take(item)
    return fed


def normal(channels: int, count: int, mean: float = 0.0, std: float = 1.0) -> Draw:
    """Return a draw of independent normal activations, shape ``(count, channels)``."""
    return lambda rng: rng.normal(mean, std, (count, channels))


def train(spec: LayerSpec, *sites: Draw, steps: int, every: int = 1, seed: int = 0) -> Iterator[StepSnapshot]:
    """Yield the snapshots of a training: each step calls the layer once a site, in turn, and updates its statistics.

    Args:
        spec: the layer; its decay, initial values and Bessel's correction are obeyed.
        sites: one draw a call site, giving that call's activations, shape ``(count, channels)``.
        steps: training steps.
        every: each how many steps one is sampled.
        seed: of the generator given to the draws.
    """
    rng = np.random.default_rng(seed)
    mean, var = (np.full(spec.channels, value, dtype=np.float64) for value in spec.initial)
    for step in range(1, steps + 1):
        batches = []
        for draw in sites:
            values = draw(rng)
            batch = (values.mean(axis=0), values.var(axis=0), len(values))
            kept = batch[1] * (moments.bessel_factor(batch[2]) if spec.bessel_corrected else 1.0)
            mean = spec.decay * mean + (1.0 - spec.decay) * batch[0]
            var = spec.decay * var + (1.0 - spec.decay) * kept
            batches.append(batch)
        if step % every == 0:
            yield snapshot(
                step,
                *(
                    call(
                        spec, mean=b[0], var=b[1], count=b[2], site=site,
                        running_mean=mean, running_var=var, updates=step * len(sites),
                    )
                    for site, b in enumerate(batches)
                ),
            )  # fmt: skip


@dataclass
class FakeLaboratory:
    """A laboratory over batch normalizations, each followed by a ReLU, and a dense layer, in float64.

    Attributes:
        weights: of the dense layer, shape ``(channels, classes)``.
        data: the batches of each split; a split that is not there cannot be had.
        mean: running means, shape ``(channels,)`` or ``(layers, channels)``.
        var: running variances, likewise.
        gradient: what is reported as the gradient of the dense layer.
        calls: the layer that normalizes at each call site, in the order of the calls.
        bessel_corrected: what the layers are said to keep.
        asked: names of the methods called, in order.
        updates: of the dense layer, from look to look.
    """

    weights: NDArray[np.float64]
    data: Mapping[Split, Sequence[Examples]]
    mean: NDArray[np.float64]
    var: NDArray[np.float64]
    gradient: float = 1.0
    epsilon: float = 1e-3
    calls: tuple[str, ...] = ("bn",)
    bessel_corrected: bool = False
    asked: list[str] = field(default_factory=list)
    updates: Updates = field(default_factory=Updates)

    @classmethod
    def separable(cls, *, batches: int = 4, size: int = 32, classes: int = 4, seed: int = 0) -> FakeLaboratory:
        """Return a model that is nearly always right under batch statistics, its running statistics still initial."""
        rng = np.random.default_rng(seed)

        def batch(origin: Split) -> Examples:
            labels = np.arange(size, dtype=np.int64) % classes
            return Examples(5.0 + 4.0 * np.eye(classes)[labels] + rng.normal(0.0, 0.3, (size, classes)), labels, origin)

        splits: tuple[Split, Split] = ("training", "evaluation")
        data = {split: [batch(split) for _ in range(batches)] for split in splits}
        # Unequal columns, so that an offset which all features share changes which score is the largest.
        weights = np.eye(classes) * np.linspace(0.5, 2.0, classes)
        return cls(weights, data, np.zeros(classes), np.ones(classes))

    @classmethod
    def stacked(cls, *calls: str, batches: int = 6, size: int = 64, seed: int = 0) -> FakeLaboratory:
        """Return a model that calls these layers in turn, its running statistics those of the training data."""
        lab = cls.separable(batches=batches, size=size, seed=seed)
        shape = len(set(calls)), len(lab.weights)
        lab.calls, lab.mean, lab.var = calls, np.zeros(shape), np.ones(shape)
        found: dict[str, moments.Moments] = {}
        for one in itertools.chain.from_iterable(lab.inputs(batch, "batch") for batch in lab.data["training"]):
            known = found.get(one.site.layer)
            found[one.site.layer] = one.moments if known is None else moments.pool(known, one.moments)
        lab.assign({name: (one.mean, one.var) for name, one in found.items()})
        lab.asked.clear()
        return lab

    def examples(self, split: Split, limit: int) -> Sequence[Examples]:
        """Return whole batches of at most ``limit`` examples, one at least."""
        self.asked.append("examples")
        batches = self.data.get(split)
        if not batches:
            msg = f"no {split} examples"
            raise ExperimentNotPossibleError(msg)
        sizes = itertools.accumulate(len(batch.labels) for batch in batches)
        return batches[: max(1, sum(size <= limit for size in sizes))]

    def reshuffled(self, batches: Sequence[Examples], order: NDArray[np.intp]) -> Sequence[Examples]:
        """Return the same examples in another order, in batches of the same sizes."""
        self.asked.append("reshuffled")
        ends = np.cumsum([len(batch.labels) for batch in batches])[:-1]
        inputs = np.concatenate([batch.inputs for batch in batches])[order]
        labels = np.concatenate([batch.labels for batch in batches])[order]
        parts = zip(batches, np.split(inputs, ends), np.split(labels, ends), strict=True)
        return [Examples(x, y, batch.origin) for batch, x, y in parts]

    def outputs(
        self, batch: Examples, statistics: Literal["batch", "running"], other: Collection[CallSite] = ()
    ) -> NDArray[np.float64]:
        """Return the scores of one batch."""
        self.asked.append("outputs")
        return self._forward(batch, statistics, other)[-1][1]

    def inputs(self, batch: Examples, statistics: Literal["batch", "running"] = "running") -> Sequence[SiteMoments]:
        """Return the moments of what enters each call."""
        self.asked.append("inputs")
        entered: list[SiteMoments] = []
        self._forward(batch, statistics, entered=entered)
        return entered

    def specs(self) -> Mapping[str, LayerSpec]:
        """Return the layers by path."""
        names, channels = dict.fromkeys(self.calls), len(self.weights)
        return {
            name: layer(name, channels, epsilon=self.epsilon, bessel_corrected=self.bessel_corrected) for name in names
        }

    def running(self) -> Mapping[str, MeanAndVariance]:
        """Return copies of the running statistics."""
        rows = zip(np.atleast_2d(self.mean).copy(), np.atleast_2d(self.var).copy(), strict=True)
        return dict(zip(dict.fromkeys(self.calls), rows, strict=True))

    def assign(self, statistics: Mapping[str, MeanAndVariance]) -> None:
        """Set running statistics in place."""
        self.asked.append("assign")
        for number, name in enumerate(dict.fromkeys(self.calls)):
            if name in statistics:
                np.atleast_2d(self.mean)[number], np.atleast_2d(self.var)[number] = statistics[name]

    @contextmanager
    def population(self, batches: Sequence[Examples]) -> Iterator[None]:
        """Re-estimate the running statistics from ``batches``; restore them on exit."""
        self.asked.append("population")
        kept = self.mean, self.var
        self.mean, self.var = self.mean.copy(), self.var.copy()
        try:
            recalibrate(self, batches)
            yield
        finally:
            self.mean, self.var = kept

    def look(self, batch: Examples, *, gradients: bool, step: int | None = None) -> Seen:
        """Return looks at each call, its ReLU and ``dense``."""
        self.asked.append("look")
        kinds = {"bn": "BatchNormalization", "relu": "ReLU", "dense": "Dense"}
        own = {"dense": [(self.weights.ravel().copy(), self.weights.size)]}
        moved = {} if step is None else self.updates.since(step, own)
        layers = (
            LayerLook.of(path, kinds[kind], output, self.gradient if gradients and path == "dense" else None)
            for (path, kind), output in self._forward(batch, "batch")
        )
        return Seen(tuple(replace(one, update=moved.get(one.path)) for one in layers), spread_over(batch.inputs))

    def _forward(
        self,
        batch: Examples,
        statistics: Literal["batch", "running"],
        other: Collection[CallSite] = (),
        entered: list[SiteMoments] | None = None,
    ) -> list[tuple[tuple[str, str], NDArray[np.float64]]]:
        """Return every output with its path and kind."""
        active = np.asarray(batch.inputs, dtype=np.float64)
        running, outputs = self.running(), []
        for number, name in enumerate(self.calls):
            site = CallSite(name, self.calls[:number].count(name))
            own = moments.Moments(active.mean(axis=0), active.var(axis=0), len(active))
            if entered is not None:
                entered.append(SiteMoments(site, own))
            by_batch = (statistics == "batch") is not (site in other)
            mean, var = (own.mean, own.var) if by_batch else running[name]
            normalized = (active - mean) / np.sqrt(var + self.epsilon)
            active = np.maximum(normalized, 0.0)
            places = name if self.calls.count(name) == 1 else str(site), f"relu{number or ''}"
            outputs += [((places[0], "bn"), normalized), ((places[1], "relu"), active)]
        return [*outputs, (("dense", "dense"), active @ self.weights)]
