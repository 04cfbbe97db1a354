"""What experiments stand on: the laboratory that an adapter offers, examples, and bounds on time."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeAlias

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping, Sequence
    from contextlib import AbstractContextManager

    import numpy as np
    from numpy.typing import NDArray

    from bnwatch.evidence.looks import Seen
    from bnwatch.moments import Moments
    from bnwatch.records import CallSite, LayerSpec

Statistics = Literal["batch", "running", "population", "reshuffled"]
"""What a cell is measured with; ``reshuffled``: batch statistics of the same examples put into batches at random."""
Split = Literal["training", "evaluation"]
SPLITS: tuple[Split, ...] = ("training", "evaluation")
MeanAndVariance: TypeAlias = "tuple[NDArray[np.float64], NDArray[np.float64]]"
"""A mean and a variance, shape ``(channels,)`` each."""

EXAMPLES = 2000
"""Examples of a split that an experiment measures at most: an accuracy good to about one point."""

ENOUGH = 256
"""Examples of a split that are worth their time in any case: they show a loss of ten points."""

PROBE_BATCH = 128
"""Examples a batch where the user gives arrays that come in no batches."""

LASTING_SHARE, LEAST_SECONDS = 0.05, 2.0
"""An experiment may take this share of the training it follows, and these seconds in any case."""


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


class AtSite:
    """What is about a call site; or about a layer as a whole, whose ``index`` is None."""

    __slots__ = ()
    layer: str
    index: int | None

    @property
    def subject(self) -> str:
        """Return the layer's path, or the name of the call site: ``bn#0``."""
        return self.layer if self.index is None else f"{self.layer}#{self.index}"


class Laboratory(Protocol):
    """What an adapter offers to experiments.

    Every method but `assign` leaves the model, its state and all randomness unchanged, also when it raises.
    """

    def examples(self, split: Split, limit: int) -> Sequence[Examples]:
        """Return whole batches of at most ``limit`` examples (one batch at least).

        Raises:
            ExperimentNotPossibleError: there are none.
        """

    def reshuffled(self, batches: Sequence[Examples], order: NDArray[np.intp]) -> Sequence[Examples]:
        """Return the same examples in another order, in batches of the same sizes.

        Args:
            batches: the batches.
            order: a permutation: the n-th example of the result is number ``order[n]`` of the batches in turn.

        Raises:
            ExperimentNotPossibleError: these inputs cannot be taken apart.
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
        """Return every watched layer by its path."""

    def running(self) -> Mapping[str, MeanAndVariance]:
        """Return the running mean and variance of every layer as the framework stores them, copied to float64.

        A layer that has none before its first call is left out.
        """

    def assign(self, statistics: Mapping[str, MeanAndVariance]) -> None:
        """Set the running mean and variance of these layers for good, in place, cast to the type they are stored in."""

    def population(self, batches: Sequence[Examples]) -> AbstractContextManager[None]:
        """Return a context in which the running statistics are re-estimated from ``batches``; restored on exit."""

    def look(self, batch: Examples, *, gradients: bool, step: int | None = None) -> Seen:
        """Return what a look through the network sees on one batch under batch statistics.

        Args:
            batch: the batch.
            gradients: whether to take those of the loss.
            step: training steps finished, to compare the parameters with those at the look before; None leaves
                `LayerLook.update` out, and is no look that a later one is compared with.
        """


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
