"""The cells: the same examples under batch, running and re-estimated statistics."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, Literal, Protocol, TypeVar

import numpy as np

from bnwatch import moments
from bnwatch.evidence.laboratory import SPLITS, Budget, ExperimentNotPossibleError

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Mapping, Sequence

    from numpy.typing import NDArray

    from bnwatch.evidence.laboratory import Examples, Laboratory, Progress, Split, Statistics
    from bnwatch.records import CallSite


ABSENT = 1e-3
"""Probability that any class is missing among the training labels by chance, below which it counts as missing."""


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
        return self.accuracy - other.accuracy, moments.mcnemar(self.wins_over(other), other.wins_over(self))

    def wins_over(self, other: Cell) -> int:
        """Return how many examples are right here and wrong there."""
        return int((self.correct & ~other.correct).sum())


class Measured(Protocol):
    """A cell, of an experiment or of a record."""

    @property
    def examples(self) -> int:
        """Return how many examples were measured."""

    def wins_over(self, other: Any, /) -> int:
        """Return how many examples are right here and wrong there."""


C = TypeVar("C", bound=Measured)


class Rows(Generic[C]):
    """The rows of cells."""

    __slots__ = ()
    training: Mapping[Statistics, C]
    evaluation: Mapping[Statistics, C]

    def rows(self) -> Iterator[tuple[Split, Mapping[Statistics, C]]]:
        """Yield the rows that were measured."""
        if self.training:
            yield "training", self.training
        if self.evaluation:
            yield "evaluation", self.evaluation

    def gain(self, one: Statistics, other: Statistics) -> tuple[float, float] | None:
        """Return accuracy that one kind of statistics gains over another on the examples of all rows, and its p-value.

        The p-value is paired and one-sided (McNemar, 1947). None where a row that was measured lacks one of them.
        """
        rows = [row for _, row in self.rows()]
        if not rows or any(one not in row or other not in row for row in rows):
            return None
        won = sum(row[one].wins_over(row[other]) for row in rows)
        lost = sum(row[other].wins_over(row[one]) for row in rows)
        return (won - lost) / sum(row[one].examples for row in rows), moments.mcnemar(won, lost)


@dataclass(frozen=True, slots=True)
class Cells(Rows[Cell]):
    """The table {training data, evaluation data} x {batch, running, population statistics}.

    ``population`` statistics are re-estimated on training data for both rows. The training row has a fourth cell where
    its batches can be taken apart: ``reshuffled``, batch statistics of random batches of the same sizes. A cell is None
    where its data were not to be had; ``missing`` then says why. ``seconds`` leaves out the first batch, at which a
    framework compiles. ``swapped``: whether the trained parameters were others than the last training step left, as
    averages or loaded weights are; None when unknown. ``moved``: layers whose running statistics were not what the
    last training step, or an evaluation after it, left.
    """

    step: int
    epoch: int
    classes: int
    training: dict[Statistics, Cell]
    evaluation: dict[Statistics, Cell]
    missing: str | None = None
    seconds: float = 0.0
    swapped: bool | None = None
    moved: tuple[str, ...] = ()

    @property
    def unseen(self) -> float | None:
        """Return the share of evaluation labels whose class should be among the training labels and is not.

        Of a class that makes up a share q of the evaluation labels, n training labels hold none with probability
        (1 - q)^n: rare classes may be missing by chance, and do not count.
        """
        if not (self.training and self.evaluation):
            return None
        known, new = (next(iter(row.values())).labels for row in (self.training, self.evaluation))
        shares = np.bincount(new) / len(new)
        absent = ~np.isin(np.arange(len(shares)), known)
        with np.errstate(divide="ignore"):
            by_chance = len(known) * np.log1p(-shares) > np.log(ABSENT / len(shares))
        return float(shares[absent & ~by_chance].sum())


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
    mixed = len(splits.get("training", ())) > 1
    passes = {split: 4 if split == "training" and mixed else 3 for split in splits}
    bench = Bench(lab, budget, progress, total=sum(passes[split] * len(batches) for split, batches in splits.items()))
    cells: dict[Split, dict[Statistics, Cell]] = {split: {} for split in SPLITS}
    before = 0
    for split, batches in splits.items():
        until = (before + 1) / sum(passes.values())
        before, bench.passes = passes[split] - 1, passes[split]
        cells[split]["running"] = bench.measure(f"{split} data, running statistics", batches, "running", until=until)
        splits[split] = batches[: bench.reached]
        cells[split]["batch"] = bench.measure(f"{split} data, batch statistics", splits[split], "batch")
        if split == "training" and mixed:
            cells[split].update(_reshuffled(lab, bench, splits[split]))
    if "training" in splits:
        with lab.population(splits["training"]):
            for split, batches in splits.items():
                cells[split]["population"] = bench.measure(f"{split} data, population statistics", batches, "running")
    return Cells(
        step=step,
        epoch=epoch,
        classes=bench.classes,
        training=cells["training"],
        evaluation=cells["evaluation"],
        missing=missing,
        seconds=budget.spent,
    )


def _reshuffled(lab: Laboratory, bench: Bench, batches: Sequence[Examples]) -> dict[Statistics, Cell]:
    """Return the cell of the same examples in random batches, in their order; none where they cannot be taken apart."""
    labels = np.concatenate([batch.labels for batch in batches])
    order = np.random.default_rng(0).permutation(len(labels))
    try:
        random = lab.reshuffled(batches, order)
    except ExperimentNotPossibleError:
        bench.total -= len(batches)
        return {}
    cell = bench.measure("training data, random batches", random, "batch")
    predicted = np.empty_like(cell.predicted)
    predicted[order] = cell.predicted
    return {"reshuffled": Cell(predicted, labels)}


class Bench:
    """Measures cells one after the other, with progress and within the budget.

    Attributes:
        total: passes over single batches, for the progress; it shrinks where time cuts a measurement short.
        passes: cells that leave out each batch that a first cell does not reach.
        reached: batches of the last cell.
        classes: scores an example, of all that was measured.
    """

    def __init__(self, lab: Laboratory, budget: Budget, progress: Progress | None, total: int, passes: int = 1) -> None:
        """Begin."""
        self._lab, self._budget, self._progress = lab, budget, progress
        self._done = 0
        self.total, self.passes, self.reached, self.classes = total, passes, 0, 2

    def measure(
        self,
        what: str,
        batches: Sequence[Examples],
        statistics: Literal["batch", "running"],
        other: Collection[CallSite] = (),
        until: float | None = None,
    ) -> Cell:
        """Return the cell of these batches; past the share ``until`` of the time, of those that are enough."""
        predicted: list[NDArray[np.int64]] = []
        examples = 0
        for batch in batches:
            if until is not None and predicted and examples >= self._budget.enough and self._budget.share(until):
                break
            scores = self._lab.outputs(batch, statistics, other)
            self.classes = max(self.classes, scores.shape[1])
            if batch.labels.max() >= scores.shape[1]:
                msg = f"labels go up to {batch.labels.max()}, and the model scores {scores.shape[1]} classes"
                raise ExperimentNotPossibleError(msg)
            predicted.append(scores.argmax(axis=1).astype(np.int64))
            examples += len(batch.labels)
            self.tick(what)
        self.reached = len(predicted)
        self.total -= self.passes * (len(batches) - self.reached)
        labels = [batch.labels for batch in batches[: self.reached]]
        return Cell(np.concatenate(predicted), np.concatenate(labels))

    def tick(self, what: str) -> None:
        """Count one pass over a batch."""
        self._done += 1
        if self._done == 1:
            self._budget.start()  # frameworks compile at the first batch, which is no measure of the others
        if self._progress is not None:
            self._progress(what, self._done, self.total)
