"""The laboratory: the user's model on the same examples under other statistics, without a trace."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from bnwatch import evidence
from bnwatch.chainer.arrays import array_of, to_host
from bnwatch.chainer.forward import model_call
from bnwatch.chainer.layers import Layers
from bnwatch.chainer.looks import look_through
from bnwatch.chainer.quiet import batch_statistics, undisturbed
from bnwatch.chainer.scores import scores_of
from bnwatch.evidence import PROBE_BATCH, Examples, ExperimentNotPossibleError, class_indices

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from numpy.typing import NDArray

    from bnwatch.evidence import Cells, LayerLook, Split

    Source = Callable[[Split, int], Sequence[Examples]]


class ChainerLaboratory:
    """A `bnwatch.evidence.Laboratory` for the watched models."""

    def __init__(self, layers: Layers, source: Source) -> None:
        """Take examples from ``source(split, limit)``."""
        self._layers, self._source = layers, source
        self._models = list(layers.models.values())
        self._paths = {id(link): path for path, link in layers.named()}

    def examples(self, split: Split, limit: int) -> Sequence[Examples]:
        """Return whole batches of at most ``limit`` examples (one batch at least).

        Raises:
            ExperimentNotPossibleError: there are none.
        """
        with undisturbed(self._models), _refusals():  # datasets may draw random numbers
            return self._source(split, limit)

    def outputs(self, batch: Examples, statistics: Literal["batch", "running"]) -> NDArray[np.floating]:
        """Return the scores of one batch, shape ``(n, classes)``.

        Raises:
            ExperimentNotPossibleError: the outputs are no scores of classes.
        """
        with undisturbed(self._models), _refusals():
            if statistics == "running":
                return scores_of(batch.inputs, len(batch.labels))
            with batch_statistics(self._layers.links):
                return scores_of(batch.inputs, len(batch.labels))

    @contextmanager
    def population(self, batches: Sequence[Examples]) -> Iterator[None]:
        """Re-estimate the running statistics by Chainer's finetuning, until the context ends."""
        with undisturbed(self._models):  # takes the estimates back
            with batch_statistics(self._layers.links, estimate=True), _refusals():
                for batch in batches:
                    scores_of(batch.inputs, len(batch.labels))
            yield

    def look(self, batch: Examples, *, gradients: bool) -> tuple[LayerLook, ...]:
        """Return what every function gives on one batch under batch statistics, in the order of execution."""
        with undisturbed(self._models), _refusals(), batch_statistics(self._layers.links):
            return look_through(self._paths, batch, gradients=gradients)


@contextmanager
def _refusals() -> Iterator[None]:
    """Say what went wrong: a model that is called outside of its training may refuse in many ways."""
    try:
        yield
    except ExperimentNotPossibleError:
        raise
    except Exception as error:
        msg = f"calling the model again failed: {type(error).__name__}: {error}"
        raise ExperimentNotPossibleError(msg) from error


def batches_of(model: Any, data: tuple[Any, Any], origin: str, size: int) -> list[Examples]:
    """Return inputs and labels as batches that the model can be called with.

    Raises:
        ExperimentNotPossibleError: the labels are no classes, or their number differs from that of the inputs.
    """
    inputs, labels = data
    parts = inputs if isinstance(inputs, tuple) else (inputs,)
    arrays = [to_host([array_of(part)])[0] for part in parts]
    targets = to_host([array_of(labels)])[0] if hasattr(array_of(labels), "shape") else np.asarray(labels)
    classes = class_indices(targets)
    if any(len(array) != len(classes) for array in arrays):
        msg = f"{len(classes)} labels for inputs of shape {', '.join(str(a.shape) for a in arrays)}"
        raise ExperimentNotPossibleError(msg)
    batches = []
    for start in range(0, len(classes), size):
        rows = slice(start, start + size)
        call = model_call(model, tuple(array[rows] for array in arrays), targets[rows])
        batches.append(Examples(call, classes[rows], origin))
    return batches


def within(batches: Sequence[Examples], limit: int) -> Sequence[Examples]:
    """Return batches spread evenly over all, of about ``limit`` examples, one at least: data may be sorted."""
    total = sum(len(batch.labels) for batch in batches)
    if total <= limit:
        return batches
    count = max(1, limit * len(batches) // total)
    return [batches[int(i)] for i in np.linspace(0, len(batches) - 1, count)]


def crosscheck(
    model: Any,
    train: tuple[Any, Any] | None = None,
    eval: tuple[Any, Any] | None = None,  # noqa: A002 - the name users know
    *,
    batch_size: int = PROBE_BATCH,
) -> Cells:
    """Measure accuracy on the same examples under batch, running and re-estimated statistics.

    Dropout is off, nothing is updated, and the model is left as it was.

    Args:
        model: a link that returns scores of classes for inputs, or an `L.Classifier`.
        train: ``(inputs, labels)`` of training data; the statistics are re-estimated on them.
        eval: the same of evaluation data.
        batch_size: examples a batch: batch statistics depend on it, so give that of the training.

    Raises:
        ExperimentNotPossibleError: there are no examples, or they are no classification.
    """
    layers = Layers({"": model})
    given = {
        "training": batches_of(model, train, "training", batch_size) if train is not None else [],
        "evaluation": batches_of(model, eval, "evaluation", batch_size) if eval is not None else [],
    }

    def source(split: Split, limit: int) -> Sequence[Examples]:
        if not given[split]:
            msg = f"no {split} examples were given"
            raise ExperimentNotPossibleError(msg)
        return within(given[split], limit)

    total = sum(len(batch.labels) for batches in given.values() for batch in batches)
    return evidence.crosscheck(
        ChainerLaboratory(layers, source), budget=evidence.Budget(examples=max(1, total)), progress=None
    )
