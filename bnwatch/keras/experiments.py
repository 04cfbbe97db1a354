"""The laboratory on Keras: the same model on the same examples under other statistics."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Protocol

import keras
import numpy as np

from bnwatch import evidence, moments
from bnwatch.evidence import ExperimentNotPossibleError
from bnwatch.keras.keep import Batch, batch_of, size
from bnwatch.keras.layers import find_layers
from bnwatch.keras.looks import Looking
from bnwatch.keras.passes import preserved, scoring, tensors

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from numpy.typing import NDArray

    from bnwatch.evidence import Cells, Examples, LayerLook, Split
    from bnwatch.keras.layers import Watched
    from bnwatch.keras.passes import Quiet
    from bnwatch.keras.swap import Mode


class Shelf(Protocol):
    """Where examples of a split come from."""

    def batches(self, split: Split, limit: int) -> Sequence[Batch]:
        """Return whole batches of at most ``limit`` examples, one at least."""


class Given:
    """Examples that the user gave."""

    def __init__(self, data: Any, origin: str, batch_size: int) -> None:
        """Take ``(x, y)`` or an iterable of such batches; nothing is read yet."""
        self._data, self._origin, self._batch_size = data, origin, batch_size

    def batches(self, split: Split, limit: int) -> Sequence[Batch]:
        """Return whole batches of at most ``limit`` examples, one at least.

        Raises:
            ExperimentNotPossibleError: there are none, or their targets are no classes.
        """
        chosen: list[Batch] = []
        for data in self._composed():
            if chosen and size(data) + sum(len(batch.labels) for batch in chosen) > limit:
                break
            chosen.append(batch_of(data, self._origin))
        if not chosen:
            msg = f"there are no {split} examples"
            raise ExperimentNotPossibleError(msg)
        return chosen

    def _composed(self) -> Iterable[Any]:
        if not isinstance(self._data, tuple | list):
            batches: Iterable[Any] = self._data
            return batches
        arrays = tuple(self._data)
        starts = range(0, size(arrays), self._batch_size)
        return (
            keras.tree.map_structure(
                lambda leaf, at=start: None if leaf is None else leaf[at : at + self._batch_size], arrays
            )
            for start in starts
        )


class KerasLaboratory:
    """Runs experiments on a Keras model; see `bnwatch.evidence.Laboratory` for what it promises."""

    def __init__(self, model: Any, shelves: dict[Split, Shelf]) -> None:
        """Take the model and the examples; functions are compiled when first needed."""
        self._model, self._shelves = model, shelves
        self._layers: list[Watched] = find_layers(model)[0]
        self._scoring: dict[Mode, Quiet] = {}
        self._looking: dict[bool, Looking] = {}

    def release(self) -> None:
        """Let go of everything that was compiled."""
        self._scoring.clear()
        self._looking.clear()

    def examples(self, split: Split, limit: int) -> Sequence[Examples]:
        """Return whole batches of at most ``limit`` examples, one at least."""
        if split not in self._shelves:
            msg = f"there are no {split} examples"
            raise ExperimentNotPossibleError(msg)
        return self._shelves[split].batches(split, limit)

    def outputs(self, batch: Examples, statistics: Mode) -> NDArray[np.floating]:
        """Return the scores of one batch, shape ``(n, classes)``."""
        outputs, _ = self._score(batch, statistics)
        if keras.tree.is_nested(outputs):
            msg = "the model has several outputs: the accuracy experiments need one"
            raise ExperimentNotPossibleError(msg)
        return class_scores(self._model, outputs.numpy(), batch.labels)

    @contextmanager
    def population(self, batches: Sequence[Examples]) -> Iterator[None]:
        """Return a context in which the running statistics are those of ``batches``, as training would see them."""
        pooled: dict[int, moments.Moments] = {}
        for batch in batches:
            for index, mean, var, count in self._score(batch, "batch")[1]:
                new = moments.Moments(mean.numpy().astype(np.float64), var.numpy().astype(np.float64), int(count))
                key = int(index)
                pooled[key] = moments.pool(pooled[key], new) if key in pooled else new
        measured = [(self._layers[index].layer, found) for index, found in pooled.items() if found.count]
        state = [v.value for layer, _ in measured for v in (layer.moving_mean, layer.moving_variance)]
        with preserved(state):
            for layer, found in measured:
                layer.moving_mean.assign(found.mean)
                layer.moving_variance.assign(found.var)
            yield

    def look(self, batch: Examples, *, gradients: bool) -> tuple[LayerLook, ...]:
        """Return what every layer's output looks like on one batch, in execution order."""
        if gradients not in self._looking:
            self._looking[gradients] = Looking(self._model, self._layers, gradients=gradients)
        targets = batch.targets if isinstance(batch, Batch) else batch.labels
        return self._looking[gradients](tensors(batch.inputs), tensors(targets))

    def _score(self, batch: Examples, mode: Mode) -> Any:
        if mode not in self._scoring:
            self._scoring[mode] = scoring(self._model, self._layers, mode)
        return self._scoring[mode](tensors(batch.inputs))


def class_scores(model: Any, outputs: NDArray[Any], labels: NDArray[np.int64]) -> NDArray[np.floating]:
    """Return scores of classes, shape ``(n, classes)``; a single output column becomes two.

    Raises:
        ExperimentNotPossibleError: the outputs are no scores of classes.
    """
    scores: NDArray[np.floating] = outputs.astype(np.float64)
    if scores.ndim == 1:
        scores = scores[:, None]
    if scores.ndim != 2 or len(scores) != len(labels):  # noqa: PLR2004 - examples and classes
        msg = f"the model's outputs of shape {outputs.shape} are not one score a class for each example"
        raise ExperimentNotPossibleError(msg)
    if scores.shape[1] == 1:
        scores = evidence.two_columns(scores, probabilities=not _single_column_is_logit(model))
    if labels.max(initial=0) >= scores.shape[1]:
        msg = f"label {labels.max()} has no score among the model's {scores.shape[1]} outputs"
        raise ExperimentNotPossibleError(msg)
    return scores


def _single_column_is_logit(model: Any) -> bool:
    loss = getattr(model, "loss", None)
    from_logits = getattr(loss, "from_logits", getattr(loss, "_fn_kwargs", {}).get("from_logits"))
    if from_logits is not None:
        return bool(from_logits)
    name = loss if isinstance(loss, str) else getattr(loss, "name", getattr(loss, "__name__", ""))
    last = getattr(getattr((getattr(model, "layers", None) or [None])[-1], "activation", None), "__name__", "")
    if last == "sigmoid" or name in {"binary_crossentropy", "bce", "binary_focal_crossentropy"}:
        return False
    if "hinge" in str(name):
        return True
    msg = "the model's single output is neither a probability nor a logit, as far as its loss and last activation tell"
    raise ExperimentNotPossibleError(msg)


def crosscheck(model: Any, *, train: Any = None, eval: Any = None, batch_size: int = 32) -> Cells:  # noqa: A002
    """Measure the accuracy on the same examples with batch, running and re-estimated statistics.

    Nothing is changed: not the weights, not the running statistics, not any random state.

    Args:
        model: a built Keras model that classifies.
        train: training data as ``(x, y)``, or an iterable of such batches composed as in training.
        eval: evaluation data, likewise.
        batch_size: examples a batch where arrays are given; use that of the training.

    Raises:
        ExperimentNotPossibleError: there are no data, or they are no classification.
    """
    given = {"training": train, "evaluation": eval}
    shelves: Any = {split: Given(data, split, batch_size) for split, data in given.items() if data is not None}
    lab = KerasLaboratory(model, shelves)
    try:
        return evidence.crosscheck(lab)
    finally:
        lab.release()


def probes(probe: tuple[Any, Any]) -> dict[Split, Shelf]:
    """Return the user's ``probe`` in place of both splits."""
    given = Given(tuple(probe), "probe", evidence.PROBE_BATCH)
    return {"training": given, "evaluation": given}
