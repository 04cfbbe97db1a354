"""The laboratory: the user's model on the same examples under other statistics, without a trace."""

from __future__ import annotations

import itertools
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal

import chainer
import numpy as np
from chainer import backend

from bnwatch import evidence
from bnwatch.chainer.arrays import array_of, to_host
from bnwatch.chainer.forward import ForwardCall, Kept, model_call, rearranged
from bnwatch.chainer.layers import Layers, axes_of
from bnwatch.chainer.looks import look_through
from bnwatch.chainer.quiet import batch_statistics, replaced, statistics_of, undisturbed
from bnwatch.chainer.scores import scores_of
from bnwatch.evidence import PROBE_BATCH, Examples, ExperimentNotPossibleError, SiteMoments, Updates, class_indices
from bnwatch.moments import Moments
from bnwatch.records import CallSite

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence

    from numpy.typing import NDArray

    from bnwatch.evidence import Attribution, Cells, Localisation, MeanAndVariance, Recalibration, Seen, Split
    from bnwatch.records import LayerSpec

    Data = tuple[Any, Any]
    Source = Callable[[Split, int], Sequence[Examples]]


class ChainerLaboratory:
    """A `bnwatch.evidence.Laboratory` for the watched models."""

    def __init__(self, layers: Layers, source: Source) -> None:
        """Take examples from ``source(split, limit)``."""
        self._layers, self._source = layers, source
        self._models = list(layers.models.values())
        self._updates = Updates()
        self._paths = {id(link): path for path, link in layers.named()}

    def examples(self, split: Split, limit: int) -> Sequence[Examples]:
        """Return whole batches of at most ``limit`` examples (one batch at least).

        Raises:
            ExperimentNotPossibleError: there are none.
        """
        self.refuse_sharing()
        with undisturbed(self._models), _refusals():  # datasets may draw random numbers
            return self._source(split, limit)

    def refuse_sharing(self) -> None:
        """Refuse what experiments cannot hold apart.

        Raises:
            ExperimentNotPossibleError: two links have the same arrays of running statistics.
        """
        for path, origin in self._layers.sharing.items():
            msg = f"`{path}` has the running statistics of `{origin}` (link.copy('share')): make it one link"
            raise ExperimentNotPossibleError(msg)

    def reshuffled(self, batches: Sequence[Examples], order: NDArray[np.intp]) -> Sequence[Examples]:
        """Return the same examples in another order, in batches of the same sizes.

        Raises:
            ExperimentNotPossibleError: the model is called with something else than arrays of one row an example.
        """
        rows = [len(batch.labels) for batch in batches]
        calls = rearranged([batch.inputs for batch in batches], rows, order)
        labels = np.split(np.concatenate([batch.labels for batch in batches])[order], np.cumsum(rows)[:-1])
        return [Examples(call, own, batch.origin) for call, own, batch in zip(calls, labels, batches, strict=True)]

    def outputs(
        self, batch: Examples, statistics: Literal["batch", "running"], other: Collection[CallSite] = ()
    ) -> NDArray[np.floating]:
        """Return the scores of one batch, shape ``(n, classes)``; ``other`` call sites use the other statistics.

        Raises:
            ExperimentNotPossibleError: the outputs are no scores of classes.
        """
        places = {layer.path: place for place, layer in enumerate(self._layers.watched)}
        calls = {(places[site.layer], site.index) for site in other}
        with undisturbed(self._models), _refusals(), statistics_of(self._layers.links, statistics, calls):
            return scores_of(batch.inputs, len(batch.labels))

    def inputs(self, batch: Examples, statistics: Literal["batch", "running"] = "running") -> Sequence[SiteMoments]:
        """Return the moments of what enters each call of a batch-normalization link, in the order of the calls.

        Raises:
            ExperimentNotPossibleError: the model cannot be called on this batch.
        """
        paths = {id(layer.link): layer.path for layer in self._layers.watched}
        entered: list[SiteMoments] = []

        def observed(link: Any, forward: Callable[..., Any]) -> Callable[..., Any]:
            calls = itertools.count()

            def observed_forward(*args: Any, **kwargs: Any) -> Any:
                output = forward(*args, **kwargs)  # makes the statistics of a link that was never called
                site = CallSite(paths[id(link)], next(calls))
                entered.append(SiteMoments(site, _entering(link, *args, **kwargs)))
                return output

            return observed_forward

        links = self._layers.links
        with undisturbed(self._models), _refusals(), statistics_of(links, statistics), replaced(links, observed):
            _run(batch)
        return entered

    def specs(self) -> Mapping[str, LayerSpec]:
        """Return every watched link by its path."""
        return {layer.path: layer.spec() for layer in self._layers.watched}

    def running(self) -> Mapping[str, MeanAndVariance]:
        """Return the running mean and variance of every link that has some, copied to float64."""
        layers = [layer for layer in self._layers.watched if layer.link.avg_mean is not None]
        host = to_host([array for layer in layers for array in (layer.link.avg_mean, layer.link.avg_var)])
        wide = [array.ravel().astype(np.float64) for array in host]
        return {layer.path: (wide[2 * n], wide[2 * n + 1]) for n, layer in enumerate(layers)}

    def assign(self, statistics: Mapping[str, MeanAndVariance]) -> None:
        """Set the running mean and variance of these links for good, in the arrays that they have."""
        for layer in self._layers.watched:
            if layer.path in statistics:
                arrays = layer.link.avg_mean, layer.link.avg_var
                for array, values in zip(arrays, statistics[layer.path], strict=True):
                    backend.copyto(array, values.reshape(array.shape).astype(array.dtype))

    @contextmanager
    def population(self, batches: Sequence[Examples]) -> Iterator[None]:
        """Re-estimate the running statistics by Chainer's finetuning, until the context ends."""
        with undisturbed(self._models):  # takes the estimates back
            with batch_statistics(self._layers.links, estimate=True), _refusals():
                for batch in batches:
                    scores_of(batch.inputs, len(batch.labels))
            yield

    def look(self, batch: Examples, *, gradients: bool, step: int | None = None) -> Seen:
        """Return what every function gives on one batch under batch statistics, in the order of execution."""
        with undisturbed(self._models), _refusals(), batch_statistics(self._layers.links):
            return look_through(self._paths, batch, self._updates, gradients=gradients, step=step)


def _run(batch: Examples) -> None:
    with chainer.no_backprop_mode():
        batch.inputs()


def _entering(link: Any, x: Any, *_args: Any, **_kwargs: Any) -> Moments:
    """Return the moments of the input of a link that was called."""
    values = to_host([array_of(x)])[0].astype(np.float64)
    # without axes, those that the statistics have follow the batch axis
    axes = axes_of(link) or (0, *range(link.avg_mean.ndim + 1, values.ndim))
    mean, var = values.mean(axis=axes).ravel(), values.var(axis=axes).ravel()
    return Moments(mean, var, values.size // mean.size)


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
    train: Data | None = None,
    eval: Data | None = None,  # noqa: A002 - the name users know
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
    lab, examples = _laboratory(model, train, eval, batch_size)
    return evidence.crosscheck(lab, budget=evidence.Budget(examples=examples), progress=None)


def attribute(model: Any, data: Data, *, batch_size: int = PROBE_BATCH) -> Attribution:
    """Measure at which layer and call site the running statistics cost accuracy, on ``(inputs, labels)``.

    Every layer is tried alone, with the other kind of statistics than the rest. The model is left as it was.

    Raises:
        ExperimentNotPossibleError: there are no examples, they are no classification, or no layer normalizes them.
    """
    lab, examples = _laboratory(model, None, data, batch_size)
    return evidence.attribute(lab, budget=evidence.Budget(examples=examples))


def localise(model: Any, data: Data, *, batch_size: int = PROBE_BATCH) -> Localisation:
    """Find the first layer from which on the output does not vary across examples, on ``(inputs, labels)``.

    Raises:
        ExperimentNotPossibleError: there are no examples, or one a batch.
    """
    lab, examples = _laboratory(model, data, None, batch_size)
    return evidence.localise(lab, examples=examples)


def recalibrate(
    model: Any, batches: Iterable[Any], layers: Collection[str] | None = None, *, exact: bool = False
) -> Recalibration:
    """Set the running statistics to those of the training data under the weights as they are, for good.

    Args:
        model: the model; it may be on a device.
        batches: training batches, each an array, or a tuple of the arguments that the model is called with.
        layers: paths of links, or patterns such as ``encoder/*``; all links if None.
        exact: measure each layer behind layers that normalize with their new statistics: slower, and closer to what
            evaluation will see.

    Raises:
        ValueError: there are no batches, a name fits no layer, or one set of statistics fits no layer's call sites.
        ExperimentNotPossibleError: the model cannot be called on a batch. Nothing is changed then either.
    """
    lab = ChainerLaboratory(Layers({"": model}), lambda _split, _limit: ())
    lab.refuse_sharing()
    return evidence.recalibrate(lab, (_unlabelled(model, batch) for batch in batches), layers, exact=exact)


def _unlabelled(model: Any, batch: Any) -> Examples:
    args = tuple(array_of(arg) for arg in (batch if isinstance(batch, tuple) else (batch,)))
    kept = tuple(Kept(array, model.device, variable=False) for array in to_host(args))
    return Examples(ForwardCall(model, "__call__", kept), np.zeros(len(kept[0].array), np.int64), "training")


def _laboratory(model: Any, train: Data | None, evaluation: Data | None, size: int) -> tuple[ChainerLaboratory, int]:
    """Return a laboratory with the examples that were given, and how many these are."""
    given = {
        "training": batches_of(model, train, "training", size) if train is not None else [],
        "evaluation": batches_of(model, evaluation, "evaluation", size) if evaluation is not None else [],
    }

    def source(split: Split, limit: int) -> Sequence[Examples]:
        if not given[split]:
            msg = f"no {split} examples were given"
            raise ExperimentNotPossibleError(msg)
        return within(given[split], limit)

    total = sum(len(batch.labels) for batches in given.values() for batch in batches)
    return ChainerLaboratory(Layers({"": model}), source), max(1, total)
