"""The laboratory on Keras: the same model on the same examples under other statistics."""

from __future__ import annotations

from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np

from bnwatch import evidence
from bnwatch.evidence import ExperimentNotPossibleError, SiteMoments, Updates
from bnwatch.keras.keep import Batch, array_of, leaves, mapped
from bnwatch.keras.layers import find_layers
from bnwatch.keras.looks import Looking
from bnwatch.keras.swap import forward, normalizing, undrawn
from bnwatch.moments import Moments, pool
from bnwatch.records import CallSite

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator, Mapping, Sequence

    from numpy.typing import NDArray

    from bnwatch.evidence import Examples, MeanAndVariance, Seen, Split
    from bnwatch.keras.backends.base import Backend
    from bnwatch.keras.layers import Watched
    from bnwatch.keras.swap import Pair
    from bnwatch.records import LayerSpec

    Mode = Literal["batch", "running"]


class Shelf(Protocol):
    """Where examples of a split come from."""

    def batches(self, split: Split, limit: int) -> Sequence[Examples]:
        """Return whole batches of at most ``limit`` examples, one at least."""


class KerasLaboratory:
    """Runs experiments on a Keras model; see `bnwatch.evidence.Laboratory` for what it promises."""

    def __init__(self, backend: Backend, shelves: dict[Split, Shelf]) -> None:
        """Take the model and the examples; functions are compiled when first needed."""
        self._backend, self._shelves = backend, shelves
        self._layers: list[Watched] = find_layers(backend)[0]
        self._passing: dict[bool, Callable[..., Any]] = {}
        self._sites: tuple[CallSite, ...] = ()
        self._looking: dict[bool, Looking] = {}
        self._updates = Updates()

    def release(self) -> None:
        """Let go of everything that was compiled."""
        self._passing.clear()
        self._looking.clear()

    def examples(self, split: Split, limit: int) -> Sequence[Examples]:
        """Return whole batches of at most ``limit`` examples, one at least."""
        reason = self._backend.why_no_experiments()
        if reason is None and split not in self._shelves:
            reason = f"there are no {split} examples"
        if reason is not None:
            raise ExperimentNotPossibleError(reason)
        with undrawn():
            return self._shelves[split].batches(split, limit)

    def reshuffled(self, batches: Sequence[Examples], order: NDArray[np.intp]) -> Sequence[Examples]:
        """Return the same examples in another order, in batches of the same sizes."""
        ends = np.cumsum([len(batch.labels) for batch in batches])[:-1]
        columns = zip(*(map(array_of, leaves(batch.inputs)) for batch in batches), strict=True)
        try:
            mixed = [np.split(np.concatenate(column)[order], ends) for column in columns]
        except ValueError:
            msg = "examples of different shapes cannot be put into other batches"
            raise ExperimentNotPossibleError(msg) from None
        labels = np.split(np.concatenate([batch.labels for batch in batches])[order], ends)
        found = []
        for number, batch in enumerate(batches):
            parts = iter([column[number] for column in mixed])
            inputs = mapped(partial(_next, parts), batch.inputs)
            found.append(evidence.Examples(inputs, labels[number], batch.origin))
        return found

    def outputs(self, batch: Examples, statistics: Mode, other: Collection[CallSite] = ()) -> NDArray[np.floating]:
        """Return the scores of one batch, shape ``(n, classes)``; the sites in ``other`` use the other statistics."""
        outputs, _ = self._pass(batch, statistics, other)
        if isinstance(outputs, tuple | list | dict):
            msg = "the model has several outputs: the accuracy experiments need one"
            raise ExperimentNotPossibleError(msg)
        return class_scores(self._backend.model, self._backend.to_numpy(outputs), batch.labels)

    def inputs(self, batch: Examples, statistics: Mode = "running") -> Sequence[SiteMoments]:
        """Return the moments of what entered each call of a batch-normalization layer, in the order of the calls."""
        return self._pass(batch, statistics)[1]

    @contextmanager
    def population(self, batches: Sequence[Examples]) -> Iterator[None]:
        """Return a context in which the running statistics are those of ``batches``, as training would see them."""
        pooled: dict[str, Moments] = {}
        for batch in batches:
            for seen in self.inputs(batch, "batch"):
                known = pooled.get(seen.site.layer)
                pooled[seen.site.layer] = seen.moments if known is None else pool(known, seen.moments)
        layers = [watched.layer for watched in self._layers if watched.path in pooled]
        # replicas may keep running statistics of their own
        with self._backend.preserving([v for layer in layers for v in (layer.moving_mean, layer.moving_variance)]):
            self.assign({path: (found.mean, found.var) for path, found in pooled.items() if found.count})
            yield

    def look(self, batch: Examples, *, gradients: bool, step: int | None = None) -> Seen:
        """Return what a look through the network sees on one batch."""
        if gradients not in self._looking:
            self._looking[gradients] = Looking(self._backend, self._layers, self._updates, gradients=gradients)
        targets = batch.targets if isinstance(batch, Batch) else batch.labels
        with undrawn():
            return self._looking[gradients](self._backend.tensors(batch.inputs), self._backend.tensors(targets), step)

    def specs(self) -> dict[str, LayerSpec]:
        """Return the description of every layer by its path."""
        return {watched.path: watched.spec() for watched in self._layers if watched.built}

    def running(self) -> dict[str, MeanAndVariance]:
        """Return the running mean and variance of every layer as it is stored, in float64."""
        built = [watched for watched in self._layers if watched.built]
        found = {watched.path: watched.statistics() for watched in built}
        return {path: (mean.astype(np.float64), var.astype(np.float64)) for path, (mean, var) in found.items()}

    def assign(self, statistics: Mapping[str, MeanAndVariance]) -> None:
        """Set the running mean and variance of these layers for good."""
        found = [watched for watched in self._layers if watched.path in statistics]
        for watched in found:
            mean, var = statistics[watched.path]
            self._backend.assign(watched.layer.moving_mean, mean)
            self._backend.assign(watched.layer.moving_variance, var)

    def _pass(
        self, batch: Examples, statistics: Mode, other: Collection[CallSite] = ()
    ) -> tuple[Any, list[SiteMoments]]:
        """Return the outputs, and what entered every call."""
        # one function for all places alike, and one that is told for each: how many there are shows in the first
        each = bool(other)
        if each not in self._passing:
            self._passing[each] = self._backend.quiet(self._each if each else self._alike, self._layers)
        own = statistics == "batch"
        flags = np.array([(site in other) != own for site in self._sites]) if each else np.asarray(own)
        with undrawn():
            outputs, found = self._passing[each](self._backend.tensors(batch.inputs), self._backend.tensors(flags))
        arrays = [tuple(map(self._backend.to_numpy, row)) for row in found]
        calls = [Moments(m.astype(np.float64), v.astype(np.float64), int(n)) for m, v, n in arrays]
        return outputs, [SiteMoments(site, call) for site, call in zip(self._sites, calls, strict=True)]

    def _alike(self, inputs: Any, batch: Any) -> Any:
        return self._run(inputs, lambda _: batch)

    def _each(self, inputs: Any, batch: Any) -> Any:
        return self._run(inputs, lambda n: batch[n])

    def _run(self, inputs: Any, uses_batch: Callable[[int], Any]) -> tuple[Any, list[tuple[Any, Any, Any]]]:
        where, convert = self._backend.ops.where, self._backend.ops.convert_to_tensor

        def choose(n: int, own: Pair, running: Pair) -> Pair:
            flag = uses_batch(n)
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


def _next(parts: Iterator[NDArray[Any]], _: Any) -> NDArray[Any]:
    return next(parts)


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
