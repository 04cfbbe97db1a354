"""A look through the network: what every layer's output looks like on one batch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from bnwatch.evidence import LayerLook
from bnwatch.keras.layers import children
from bnwatch.keras.library import library_of
from bnwatch.keras.swap import batch_everywhere, forward, normalizing, replaced

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from bnwatch.keras.backends.base import Backend
    from bnwatch.keras.layers import Watched

TINY = 1e-30
"""Stands for an output of size zero in a division whose result is not used."""


class Looking:
    """Looks at the output of every layer, in the order of execution; compiled once."""

    def __init__(self, backend: Backend, layers: Sequence[Watched], *, gradients: bool) -> None:
        """Prepare; nothing is compiled before the first look."""
        self._backend, self._layers, self._gradients = backend, layers, gradients
        self._names: list[tuple[str, Any, int]] = []
        self._function = backend.quiet(self._body, layers)

    def __call__(self, inputs: Any, targets: Any) -> tuple[LayerLook, ...]:
        """Return the looks on a batch."""
        table, gradients = (self._backend.to_numpy(part) for part in self._function(inputs, targets))
        looks = []
        for (path, layer, units), row, gradient in zip(self._names, table, gradients, strict=True):
            known = self._gradients and bool(layer.trainable_weights)
            zero, dead, spread = map(float, row)
            largest = float(gradient) if known else None
            looks.append(LayerLook(path, kind_of(layer), units, zero, dead, spread, largest))
        return tuple(looks)

    def _body(self, inputs: Any, targets: Any) -> tuple[Any, Any]:
        ops = self._backend.ops
        if not self._gradients:
            _, table = self._numbers(inputs)
            return table, ops.zeros((len(self._names),))
        layers = [layer for _, layer in observable(self._backend.model)]
        weights = list({id(w): w for layer in layers for w in layer.trainable_weights}.values())

        def loss() -> tuple[Any, Any]:
            predicted, table = self._numbers(inputs)
            value = self._backend.loss(inputs, targets, predicted)
            return self._backend.scaled(ops.cast(value, "float32")), table

        table, gradients = self._backend.differentiated(loss, weights)
        largest = {id(w): ops.max(ops.abs(ops.cast(g, "float32"))) for w, g in zip(weights, gradients, strict=True)}
        scale, none = self._backend.scaled(ops.ones(())), ops.zeros(())
        own = [[largest[id(w)] for w in layer.trainable_weights] for _, layer, _ in self._names]
        return table, ops.stack([ops.max(ops.stack(each)) / scale if each else none for each in own])

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
        return predicted, self._backend.ops.stack([_numbers(self._backend.ops, output) for _, _, output in seen])


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


def _numbers(ops: Any, output: Any) -> Any:
    """Return the shares of zero samples and dead units, and the spread, as `LayerLook` defines them."""
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
        ]
    )
