"""Experiments, framework-free: what they return, and how they are run through a laboratory.

An experiment asks a *laboratory* (one in each adapter) for the outputs of the same model on the same examples under
other statistics. Nothing is updated, dropout is off, and everything is restored: `Laboratory` says who promises what.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np

from bnwatch import moments

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
    from contextlib import AbstractContextManager

    from numpy.typing import NDArray

    from bnwatch.moments import Moments
    from bnwatch.records import CallSite, LayerSpec

    MeanAndVariance = tuple[NDArray[np.float64], NDArray[np.float64]]
    """Shape ``(channels,)`` each."""

Statistics = Literal["batch", "running", "population"]
Split = Literal["training", "evaluation"]
SPLITS: tuple[Split, ...] = ("training", "evaluation")


EXAMPLES = 2000
"""Examples of a split that an experiment measures at most: an accuracy good to about one point."""

ENOUGH = 256
"""Examples of a split that are worth their time in any case: they show a loss of ten points."""

PROBE_BATCH = 128
"""Examples a batch where the user gives arrays that come in no batches."""

LASTING_SHARE, LEAST_SECONDS = 0.05, 2.0
"""An experiment may take this share of the training it follows, and these seconds in any case."""

MATRIX = 2
"""Dimensions of one-hot targets."""


class ExperimentNotPossibleError(RuntimeError):
    """An experiment lacks what it needs; the message says what, and how to supply it."""


@dataclass(frozen=True, slots=True)
class Examples:
    """One batch as it was composed by the user's pipeline.

    Attributes:
        inputs: what the model is called with, in the framework's own form.
        labels: class indices, shape ``(n,)``.
        origin: ``training``, ``evaluation`` or ``probe``.
    """

    inputs: Any
    labels: NDArray[np.int64]
    origin: str


@dataclass(frozen=True, slots=True)
class SiteMoments:
    """What entered one call of a batch-normalization layer on one batch; ``moments.count`` is elements per channel."""

    site: CallSite
    moments: Moments


class Laboratory(Protocol):
    """What an adapter offers to experiments.

    Every method but `assign` leaves the model, its state and all randomness unchanged, also when it raises.
    """

    def examples(self, split: Split, limit: int) -> Sequence[Examples]:
        """Return whole batches of at most ``limit`` examples (one batch at least).

        Raises:
            ExperimentNotPossibleError: there are none.
        """

    def outputs(
        self, batch: Examples, statistics: Literal["batch", "running"], other: Collection[CallSite] = ()
    ) -> NDArray[np.floating]:
        """Return the scores of one batch, shape ``(n, classes)``, dropout off, nothing updated.

        The call sites in ``other`` normalize with the other kind of statistics. The largest score is the predicted
        class. A model with one output column (two classes) gives two columns: the negated logit and the logit, or the
        probability of class 0 and of class 1.

        Raises:
            ExperimentNotPossibleError: the outputs are no scores of classes.
        """

    def inputs(self, batch: Examples, statistics: Literal["batch", "running"] = "running") -> Sequence[SiteMoments]:
        """Return the moments of what enters each call of a batch-normalization layer, in the order of the calls.

        Every layer normalizes with ``statistics``; dropout is off. Moments are float64, the variance is biased.

        Raises:
            ExperimentNotPossibleError: the model cannot be called on this batch.
        """

    def specs(self) -> Mapping[str, LayerSpec]:
        """Return every batch-normalization layer by its path, in the order of the network."""

    def running(self) -> Mapping[str, MeanAndVariance]:
        """Return the running mean and variance of every layer as the framework stores them, copied to float64."""

    def assign(self, statistics: Mapping[str, MeanAndVariance]) -> None:
        """Set the running mean and variance of these layers for good, in place, cast to the type they are stored in."""

    def population(self, batches: Sequence[Examples]) -> AbstractContextManager[None]:
        """Return a context in which the running statistics are re-estimated from ``batches``; restored on exit."""

    def look(self, batch: Examples, *, gradients: bool) -> tuple[LayerLook, ...]:
        """Return what every layer's output looks like on one batch under batch statistics, in execution order."""


@dataclass(frozen=True, slots=True)
class Cell:
    """One cell of the experiment: per example, which class was predicted and whether that is right."""

    predicted: NDArray[np.int64]
    labels: NDArray[np.int64]

    @property
    def examples(self) -> int:
        """Return how many examples were measured."""
        return len(self.labels)

    @property
    def correct(self) -> NDArray[np.bool_]:
        """Return which examples are right, shape ``(n,)``."""
        right: NDArray[np.bool_] = self.predicted == self.labels
        return right

    @property
    def accuracy(self) -> float:
        """Return the share of right predictions, in [0, 1]."""
        return float(self.correct.mean())

    @property
    def interval(self) -> tuple[float, float]:
        """Return the 95 % interval of the accuracy (Wilson, 1927)."""
        return moments.binomial_interval(self.accuracy, self.examples)

    @property
    def largest_share(self) -> float:
        """Return the share of the most predicted class: 1 for a constant predictor."""
        return float(np.bincount(self.predicted).max() / self.examples)

    @property
    def majority(self) -> float:
        """Return the share of the most frequent label: what a constant predictor can reach."""
        return float(np.bincount(self.labels).max() / self.examples)

    def gain_over(self, other: Cell) -> tuple[float, float]:
        """Return accuracy gained over another cell on the same examples, and the paired one-sided p-value (McNemar)."""
        mine, theirs = self.correct, other.correct
        p = moments.mcnemar(int((mine & ~theirs).sum()), int((theirs & ~mine).sum()))
        return self.accuracy - other.accuracy, p


@dataclass(frozen=True, slots=True)
class Cells:
    """The table {training data, evaluation data} x {batch, running, population statistics}.

    ``population`` statistics are re-estimated on training data for both rows. A cell is None where its data were not
    to be had; ``missing`` then says why. ``seconds`` leaves out the first batch, at which a framework compiles.
    """

    step: int
    epoch: int
    classes: int
    training: dict[Statistics, Cell]
    evaluation: dict[Statistics, Cell]
    missing: str | None = None
    seconds: float = 0.0

    def rows(self) -> Iterator[tuple[Split, dict[Statistics, Cell]]]:
        """Yield the rows that were measured."""
        if self.training:
            yield "training", self.training
        if self.evaluation:
            yield "evaluation", self.evaluation


@dataclass(frozen=True, slots=True)
class LayerLook:
    """What one layer gives on one batch.

    Attributes:
        path: the layer.
        kind: its class name, with the activation where it has one: ``Dense relu``.
        units: outputs per example.
        zero_samples: share of examples for which every unit is exactly zero.
        dead_units: share of units that are exactly zero for every example.
        spread: root mean square over units of the standard deviation across examples, divided by the root mean square
            of the output; 0 when the output is the same for every example.
        gradient: largest absolute gradient of the loss with respect to the layer's own parameters; None when it has
            none or they were not asked for.
    """

    path: str
    kind: str
    units: int
    zero_samples: float
    dead_units: float
    spread: float
    gradient: float | None = None

    @classmethod
    def of(cls, path: str, kind: str, output: NDArray[np.floating], gradient: float | None = None) -> LayerLook:
        """Return the look of an output of shape ``(n, ...)``, n >= 2."""
        flat = np.asarray(output, dtype=np.float64).reshape(len(output), -1)
        zero = flat == 0.0
        scale = float(np.sqrt(np.mean(np.square(flat))))
        spread = float(np.sqrt(np.mean(np.var(flat, axis=0)))) / scale if scale > 0.0 else 0.0
        return cls(
            path=path,
            kind=kind,
            units=flat.shape[1],
            zero_samples=float(zero.all(axis=1).mean()),
            dead_units=float(zero.all(axis=0).mean()),
            spread=spread,
            gradient=gradient,
        )


@dataclass(frozen=True, slots=True)
class Look:
    """One look through the network, layer by layer in execution order, on ``examples`` training examples."""

    step: int
    epoch: int
    examples: int
    layers: tuple[LayerLook, ...]

    def up_to(self, path: str) -> tuple[LayerLook, ...]:
        """Return the layers up to and including the one of that path."""
        for number, layer in enumerate(self.layers, start=1):
            if layer.path == path:
                return self.layers[:number]
        return self.layers

    def first_constant(self, spread: float) -> LayerLook | None:
        """Return the first layer from which on no output varies by more than ``spread`` over examples."""
        found = None
        for layer in reversed(self.layers):
            if layer.spread >= spread:
                break
            found = layer
        return found


@dataclass(slots=True)
class Budget:
    """Bounds on one experiment: examples a split, and seconds; ``seconds=None`` is unbounded.

    ``enough`` examples a split are measured whatever the time, so a table too dear for its time is a small one, not a
    worthless one.
    """

    examples: int = EXAMPLES
    enough: int = ENOUGH
    seconds: float | None = None
    clock: Callable[[], float] = time.perf_counter
    _start: float = field(default=0.0, init=False)

    def start(self) -> None:
        """Start the clock."""
        self._start = self.clock()

    @property
    def spent(self) -> float:
        """Return the seconds since the start."""
        return self.clock() - self._start

    def share(self, part: float) -> bool:
        """Return whether more than ``part`` (0 to 1) of the time is spent."""
        return self.seconds is not None and self.spent > part * self.seconds


def seconds_after(lasted: float, least: float = LEAST_SECONDS) -> float:
    """Return how long an experiment may take after ``lasted`` seconds of training."""
    return max(least, LASTING_SHARE * lasted)


class Progress(Protocol):
    """Shows how far an experiment is."""

    def __call__(self, what: str, done: int, total: int) -> None:
        """Show that ``done`` of ``total`` batches are measured."""


def crosscheck(
    lab: Laboratory,
    *,
    step: int = 0,
    epoch: int = 0,
    budget: Budget | None = None,
    progress: Progress | None = None,
) -> Cells:
    """Measure the cells: the same examples under batch, running and re-estimated statistics.

    The first pass (running statistics) stops when its share of the time is spent; all later cells measure the examples
    that it reached, so that cells compare in pairs.

    Raises:
        ExperimentNotPossibleError: there are neither training nor evaluation examples, or they are no classification.
    """
    budget = budget or Budget()
    budget.start()
    splits: dict[Split, Sequence[Examples]] = {}
    missing = None
    for split in SPLITS:
        try:
            splits[split] = lab.examples(split, budget.examples)
        except ExperimentNotPossibleError as error:
            missing = str(error)
    if not splits:
        raise ExperimentNotPossibleError(missing or "no examples")
    bench = _Bench(lab, budget, progress, total=3 * sum(map(len, splits.values())))
    cells: dict[Split, dict[Statistics, Cell]] = {split: {} for split in SPLITS}
    for number, (split, batches) in enumerate(splits.items(), start=1):
        cells[split]["running"] = bench.measure(split, batches, "running", until=number / (3 * len(splits)))
        splits[split] = batches[: bench.reached]
        cells[split]["batch"] = bench.measure(split, splits[split], "batch")
    if "training" in splits:
        with lab.population(splits["training"]):
            for split, batches in splits.items():
                cells[split]["population"] = bench.measure(split, batches, "population")
    return Cells(
        step=step,
        epoch=epoch,
        classes=bench.classes,
        training=cells["training"],
        evaluation=cells["evaluation"],
        missing=missing,
        seconds=budget.spent,
    )


class _Bench:
    """Measures cells one after the other, with progress and within the budget."""

    def __init__(self, lab: Laboratory, budget: Budget, progress: Progress | None, total: int) -> None:
        self.lab, self.budget, self.progress, self.total = lab, budget, progress, total
        self.done = 0
        self.reached = 0
        self.classes = 2

    def measure(self, split: Split, batches: Sequence[Examples], statistics: Statistics, until: float = 1e9) -> Cell:
        predicted: list[NDArray[np.int64]] = []
        examples = 0
        for batch in batches:
            if predicted and examples >= self.budget.enough and self.budget.share(until):
                break
            scores = self.lab.outputs(batch, "batch" if statistics == "batch" else "running")
            self.classes = max(self.classes, scores.shape[1])
            if batch.labels.max() >= scores.shape[1]:
                msg = f"labels go up to {batch.labels.max()}, and the model scores {scores.shape[1]} classes"
                raise ExperimentNotPossibleError(msg)
            predicted.append(scores.argmax(axis=1).astype(np.int64))
            examples += len(batch.labels)
            self.done += 1
            if self.done == 1:
                self.budget.start()  # frameworks compile at the first batch, which is no measure of the others
            if self.progress is not None:
                self.progress(f"{split} data, {statistics} statistics", self.done, self.total)
        self.reached = len(predicted)
        self.total -= 3 * (len(batches) - self.reached)
        labels = [batch.labels for batch in batches[: self.reached]]
        return Cell(np.concatenate(predicted), np.concatenate(labels))


def look(lab: Laboratory, *, step: int, epoch: int, gradients: bool) -> Look:
    """Look through the network on the first kept training batch; with gradients on the latest, for a second opinion.

    Raises:
        ExperimentNotPossibleError: no training batch of two examples or more was kept.
    """
    batch = lab.examples("training", EXAMPLES if gradients else 1)[-1]
    if len(batch.labels) < 2:  # noqa: PLR2004 - variation needs two
        msg = "the kept training batch holds one example: whether outputs vary across examples cannot be seen"
        raise ExperimentNotPossibleError(msg)
    return Look(step, epoch, len(batch.labels), lab.look(batch, gradients=gradients))


def two_columns(scores: NDArray[np.floating], *, probabilities: bool) -> NDArray[np.floating]:
    """Return the scores of both classes where a single column holds that of class 1; others as they are.

    Args:
        scores: shape ``(n,)``, ``(n, 1)``, or anything else, which is returned.
        probabilities: the column holds probabilities of class 1, not logits.
    """
    if scores.ndim == 1:
        scores = scores[:, None]
    if scores.ndim != MATRIX or scores.shape[1] != 1:
        return scores
    return np.concatenate([1 - scores if probabilities else -scores, scores], axis=1)


def class_indices(targets: NDArray[Any]) -> NDArray[np.int64]:
    """Return class indices of integer, one-hot or binary targets, shape ``(n,)``.

    Raises:
        ExperimentNotPossibleError: the targets are no classes of single examples.
    """
    array = np.asarray(targets)
    if array.ndim == MATRIX and array.shape[1] == 1:
        array = array[:, 0]
    numbers = array.size > 0 and array.dtype.kind in "buif" and bool(np.isfinite(array).all())
    if array.ndim == 1 and numbers and np.all(array == np.round(array)) and array.min() >= 0:
        return array.astype(np.int64)
    if array.ndim == MATRIX and numbers and np.all((array == 0) | (array == 1)) and np.all(array.sum(axis=1) == 1):
        classes: NDArray[np.int64] = array.argmax(axis=1)
        return classes
    msg = (
        f"targets of shape {array.shape} and type {array.dtype} are not one class an example; "
        "the accuracy experiments need class indices or one-hot rows"
    )
    raise ExperimentNotPossibleError(msg)
