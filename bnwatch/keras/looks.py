"""A look through the network: what every layer's output looks like on one batch."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace
from math import prod
from typing import TYPE_CHECKING, Any

import numpy as np

from bnwatch.evidence import NEAR_BOUND, SAMPLE, LayerLook, Seen, Updates, bounds_of, spread_over
from bnwatch.keras.keep import array_of, leaves
from bnwatch.keras.layers import children
from bnwatch.keras.library import library_of
from bnwatch.keras.swap import batch_everywhere, forward, normalizing, replaced

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from bnwatch.keras.backends.base import Backend
    from bnwatch.keras.layers import Watched

TINY = 1e-30
"""Stands for an output of size zero in a division whose result is not used."""


class Looking:
    """Looks at the output of every layer, in the order of execution; compiled once."""

    def __init__(self, backend: Backend, layers: Sequence[Watched], updates: Updates, *, gradients: bool) -> None:
        """Prepare; nothing is compiled before the first look."""
        self._backend, self._layers, self._gradients = backend, layers, gradients
        self._updates, self._priced = updates, False
        self._names: list[tuple[str, Any, int]] = []
        self._function = backend.quiet(self._body, layers)

    def __call__(self, inputs: Any, targets: Any, step: int | None) -> Seen:
        """Return what is seen on a batch, tensors; ``step`` as `bnwatch.evidence.Laboratory` says."""
        table, gradients, loss = (self._backend.to_numpy(part) for part in self._function(inputs, targets))
        looks = []
        for (path, layer, units), row, gradient in zip(self._names, table, gradients, strict=True):
            known, kind = self._gradients and bool(layer.trainable_weights), kind_of(layer)
            zero, dead, spread, scale, bounds = map(float, row)
            largest, bounded = float(gradient) if known else None, bounds_of(kind) is not None
            looks.append(LayerLook(path, kind, units, zero, dead, spread, largest, scale, bounds if bounded else None))
        moved = {} if step is None else self._moved(step)
        return Seen(
            layers=tuple(replace(one, update=moved.get(one.path)) for one in looks),
            entry=_entry(inputs),
            loss=float(loss) if self._priced else None,
            learning_rate=learning_rate(self._backend),
        )

    def _moved(self, step: int) -> Mapping[str, float]:
        """Return how far the parameters of each layer moved since the look before."""
        own = {path: layer.trainable_weights for path, layer, _ in self._names if layer.trainable_weights}
        weights = list({id(w): w for each in own.values() for w in each}.values())
        samples = self._backend.samples(weights, SAMPLE)
        known = {id(w): (sample, prod(w.shape)) for w, sample in zip(weights, samples, strict=True)}
        return self._updates.since(step, {path: [known[id(w)] for w in each] for path, each in own.items()})

    def _loss(self, inputs: Any, targets: Any, predicted: Any) -> Any:
        """Return the loss of a batch; what it is where there is none, or where it cannot be had, is of no use."""
        self._priced = False
        value = None
        model = self._backend.model
        own = type(model).compute_loss is not self._backend.library.Model.compute_loss
        with suppress(Exception):  # one that wants more than these targets
            if own or getattr(model, "loss", None) is not None or model.losses:
                value = self._backend.loss(inputs, targets, predicted)
        if value is None or len(value.shape):
            return self._backend.ops.zeros(())
        self._priced = True
        return self._backend.ops.cast(value, "float32")

    def _body(self, inputs: Any, targets: Any) -> tuple[Any, Any, Any]:
        ops = self._backend.ops
        if not self._gradients:
            predicted, table = self._numbers(inputs)
            return table, ops.zeros((len(self._names),)), self._loss(inputs, targets, predicted)
        layers = [layer for _, layer in observable(self._backend.model)]
        weights = list({id(w): w for layer in layers for w in layer.trainable_weights}.values())

        def loss() -> tuple[Any, Any]:
            predicted, table = self._numbers(inputs)
            value = ops.cast(self._backend.loss(inputs, targets, predicted), "float32")
            return self._backend.scaled(value), (table, value)

        (table, value), gradients = self._backend.differentiated(loss, weights)
        self._priced = True
        largest = {id(w): ops.max(ops.abs(ops.cast(g, "float32"))) for w, g in zip(weights, gradients, strict=True)}
        scale, none = self._backend.scaled(ops.ones(())), ops.zeros(())
        own = [[largest[id(w)] for w in layer.trainable_weights] for _, layer, _ in self._names]
        return table, ops.stack([ops.max(ops.stack(each)) / scale if each else none for each in own]), value

    def _numbers(self, inputs: Any) -> tuple[Any, Any]:
        """Return the model's outputs, and a row of numbers for every layer's."""
        seen: list[tuple[str, Any, Any]] = []
        place = self._backend.place()
        leaves = observable(self._backend.model)

        def observed(layer: Any, path: str) -> Callable[..., Any]:
            own = layer.call

            def call(*args: Any, **kwargs: Any) -> Any:
                output = own(*args, **kwargs)
                if self._backend.visible(output, place) and len(output.shape) and "float" in str(output.dtype):
                    seen.append((path, layer, output))
                return output

            return call

        with normalizing(self._backend, self._layers, batch_everywhere):  # noqa: SIM117 - the order counts
            # every call is replaced once more: the statistics first, the observation around them
            with replaced({layer: observed(layer, path) for path, layer in leaves}, "call"):
                predicted = forward(self._backend.model, inputs)
        self._names = _named(seen)
        rows = [_numbers(self._backend.ops, output, bounds_of(kind_of(layer))) for _, layer, output in seen]
        return predicted, self._backend.ops.stack(rows)


def observable(model: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the layers of a model and of the models inside it; any other composite layer counts as one."""
    seen = set[int]()
    library = library_of(model)
    for layer in children(model):
        if id(layer) in seen or isinstance(layer, library.layers.InputLayer):
            continue
        seen.add(id(layer))
        if isinstance(layer, library.Model):
            yield from observable(layer, f"{prefix}{layer.name}/")
        else:
            yield f"{prefix}{layer.name}", layer


def kind_of(layer: Any) -> str:
    """Return the class name, with the activation where the layer has one: ``Dense relu``."""
    activation = getattr(getattr(layer, "activation", None), "__name__", "linear")
    return type(layer).__name__ if activation == "linear" else f"{type(layer).__name__} {activation}"


def _named(seen: list[tuple[str, Any, Any]]) -> list[tuple[str, Any, int]]:
    calls: dict[str, int] = {}
    named = []
    for path, layer, output in seen:
        k = calls[path] = calls.get(path, -1) + 1
        units = 1
        for side in output.shape[1:]:
            units *= side or 0
        named.append((f"{path}#{k}" if k else path, layer, units))
    return named


def _entry(inputs: Any) -> float | None:
    """Return the relative spread of the inputs over examples, side by side; None where they are no numbers."""
    arrays = [array_of(leaf) for leaf in leaves(inputs)]
    if not arrays or not all(array.dtype.kind in "biuf" for array in arrays):
        return None
    return spread_over(np.concatenate([array.reshape(len(array), -1) for array in arrays], axis=1))


def learning_rate(backend: Backend) -> float | None:
    """Return the rate of the model's optimizer now; None where it has none, or where a loop has given it away."""
    optimizer: Any = getattr(backend.model, "optimizer", None)
    optimizer = getattr(optimizer, "inner_optimizer", optimizer)
    rate = getattr(optimizer, "_learning_rate", None)
    if rate is None:
        rate = getattr(optimizer, "learning_rate", None)
    try:
        if optimizer is not None and callable(rate):
            rate = rate(backend.values([optimizer.iterations])[0])
        elif hasattr(rate, "shape"):
            (rate,) = backend.values([rate])
        return None if rate is None else float(array_of(rate))
    except (RuntimeError, ValueError, TypeError):
        return None


def _numbers(ops: Any, output: Any, bounds: tuple[float, float] | None) -> Any:
    """Return what `LayerLook` says of an output: zero samples, dead units, spread, scale, share at the bounds."""
    wide = ops.cast(output, "float32")
    flat = ops.reshape(wide, (ops.shape(wide)[0], -1))
    zero = ops.equal(flat, 0.0)
    # differences from the first example: equal outputs give exactly 0, whatever their size
    deviation = ops.sqrt(ops.mean(ops.var(flat - flat[:1], axis=0)))
    size = ops.sqrt(ops.mean(ops.square(flat)))
    return ops.stack(
        [
            ops.mean(ops.cast(ops.all(zero, axis=1), "float32")),
            ops.mean(ops.cast(ops.all(zero, axis=0), "float32")),
            ops.where(size > 0.0, deviation / ops.maximum(size, TINY), 0.0),
            size,
            ops.zeros(()) if bounds is None else ops.mean(ops.cast(_at(flat, *bounds), "float32")),
        ]
    )


def _at(flat: Any, low: float, high: float) -> Any:
    return (flat - low <= NEAR_BOUND) | (high - flat <= NEAR_BOUND)
