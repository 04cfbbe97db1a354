"""The laboratory on Keras: the same model on the same examples under other statistics."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np

from bnwatch import evidence, moments
from bnwatch.evidence import ExperimentNotPossibleError
from bnwatch.keras.backends import backend_of
from bnwatch.keras.keep import Batch, batch_of, mapped, size
from bnwatch.keras.layers import find_layers
from bnwatch.keras.looks import Looking
from bnwatch.keras.swap import forward, normalizing
from bnwatch.records import CallSite

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence

    from numpy.typing import NDArray

    from bnwatch.evidence import Cells, Examples, LayerLook, Split
    from bnwatch.keras.backends.base import Backend
    from bnwatch.keras.layers import Watched
    from bnwatch.keras.swap import Moments
    from bnwatch.records import LayerSpec

    Mode = Literal["batch", "running"]


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
        return (_cut(arrays, slice(start, start + self._batch_size)) for start in starts)


def _cut(arrays: Any, rows: slice) -> Any:
    return mapped(lambda leaf: leaf[rows], arrays)


class KerasLaboratory:
    """Runs experiments on a Keras model; see `bnwatch.evidence.Laboratory` for what it promises."""

    def __init__(self, backend: Backend, shelves: dict[Split, Shelf]) -> None:
        """Take the model and the examples; functions are compiled when first needed."""
        self._backend, self._shelves = backend, shelves
        self._layers: list[Watched] = find_layers(backend)[0]
        self._passing: Callable[..., Any] | None = None
        self._sites: tuple[CallSite, ...] = ()
        self._looking: dict[bool, Looking] = {}

    def release(self) -> None:
        """Let go of everything that was compiled."""
        self._passing = None
        self._looking.clear()

    def examples(self, split: Split, limit: int) -> Sequence[Examples]:
        """Return whole batches of at most ``limit`` examples, one at least."""
        if split not in self._shelves:
            msg = f"there are no {split} examples"
            raise ExperimentNotPossibleError(msg)
        return self._shelves[split].batches(split, limit)

    def outputs(self, batch: Examples, statistics: Mode, other: Collection[CallSite] = ()) -> NDArray[np.floating]:
        """Return the scores of one batch, shape ``(n, classes)``; the sites in ``other`` use the other statistics."""
        outputs, _ = self._pass(batch, statistics, other)
        if isinstance(outputs, tuple | list | dict):
            msg = "the model has several outputs: the accuracy experiments need one"
            raise ExperimentNotPossibleError(msg)
        return class_scores(self._backend.model, self._backend.to_numpy(outputs), batch.labels)

    def inputs(self, batch: Examples, statistics: Mode = "running") -> Sequence[tuple[CallSite, moments.Moments]]:
        """Return what entered every call of a batch-normalization layer, in call order."""
        return self._pass(batch, statistics)[1]

    @contextmanager
    def population(self, batches: Sequence[Examples]) -> Iterator[None]:
        """Return a context in which the running statistics are those of ``batches``, as training would see them."""
        pooled: dict[str, moments.Moments] = {}
        for batch in batches:
            for site, found in self.inputs(batch, "batch"):
                pooled[site.layer] = moments.pool(pooled[site.layer], found) if site.layer in pooled else found
        before = self.running()
        try:
            self.assign({path: (found.mean, found.var) for path, found in pooled.items() if found.count})
            yield
        finally:
            self.assign({path: before[path] for path in pooled})

    def look(self, batch: Examples, *, gradients: bool) -> tuple[LayerLook, ...]:
        """Return what every layer's output looks like on one batch, in execution order."""
        if gradients not in self._looking:
            self._looking[gradients] = Looking(self._backend, self._layers, gradients=gradients)
        targets = batch.targets if isinstance(batch, Batch) else batch.labels
        return self._looking[gradients](self._backend.tensors(batch.inputs), self._backend.tensors(targets))

    def specs(self) -> dict[str, LayerSpec]:
        """Return the description of every layer by its path."""
        return {watched.path: watched.spec() for watched in self._layers if watched.built}

    def running(self) -> dict[str, tuple[NDArray[np.floating], NDArray[np.floating]]]:
        """Return the running mean and variance of every layer by its path."""
        return {watched.path: watched.statistics() for watched in self._layers if watched.built}

    def assign(self, statistics: Mapping[str, tuple[Any, Any]]) -> None:
        """Set running means and variances, by the path of the layer."""
        found = [watched for watched in self._layers if watched.path in statistics]
        for watched in found:
            mean, var = statistics[watched.path]
            self._backend.assign(watched.layer.moving_mean, mean)
            self._backend.assign(watched.layer.moving_variance, var)

    def _pass(
        self, batch: Examples, statistics: Mode, other: Collection[CallSite] = ()
    ) -> tuple[Any, list[tuple[CallSite, moments.Moments]]]:
        """Return the outputs, and what entered every call."""
        if self._passing is None:
            self._passing = self._backend.quiet(self._body, self._layers)
        flags = np.asarray(statistics == "batch")
        if other:
            flags = np.array([(site in other) != bool(flags) for site in self._sites])
        outputs, found = self._passing(self._backend.tensors(batch.inputs), self._backend.tensors(flags))
        arrays = [tuple(map(self._backend.to_numpy, row)) for row in found]
        calls = [moments.Moments(m.astype(np.float64), v.astype(np.float64), int(n)) for m, v, n in arrays]
        return outputs, list(zip(self._sites, calls, strict=True))

    def _body(self, inputs: Any, batch: Any) -> tuple[Any, list[tuple[Any, Any, Any]]]:
        where, convert = self._backend.ops.where, self._backend.ops.convert_to_tensor

        def choose(n: int, own: Moments, running: Moments) -> Moments:
            flag = batch if not len(batch.shape) else batch[n]
            mean, var = (where(flag, a, self._backend.ops.cast(b, a.dtype)) for a, b in zip(own, running, strict=True))
            return mean, var

        with normalizing(self._backend, self._layers, choose) as calls:
            outputs = forward(self._backend.model, inputs)
        index: dict[str, int] = {}
        sites = []
        for call in calls:
            path = call.watched.path
            index[path] = index.get(path, -1) + 1
            sites.append(CallSite(path, index[path]))
        self._sites = tuple(sites)
        return outputs, [(call.mean, call.var, convert(call.count)) for call in calls]


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
    lab = KerasLaboratory(backend_of(model), shelves)
    try:
        return evidence.crosscheck(lab)
    finally:
        lab.release()


def probes(probe: tuple[Any, Any]) -> dict[Split, Shelf]:
    """Return the user's ``probe`` in place of both splits."""
    given = Given(tuple(probe), "probe", evidence.PROBE_BATCH)
    return {"training": given, "evaluation": given}
