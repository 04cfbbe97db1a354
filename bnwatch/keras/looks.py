"""A look through the network: what every layer's output looks like on one batch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import keras
import tensorflow as tf

from bnwatch.evidence import LayerLook
from bnwatch.keras.layers import children
from bnwatch.keras.passes import Quiet, forward
from bnwatch.keras.swap import normalizing, replaced

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from bnwatch.keras.layers import Watched


class Looking:
    """Looks at the output of every layer, in the order of execution; compiled once."""

    def __init__(self, model: Any, layers: Sequence[Watched], *, gradients: bool) -> None:
        """Prepare; nothing is compiled before the first look."""
        self._model, self._layers, self._gradients = model, layers, gradients
        self._names: list[tuple[str, Any, int]] = []
        self._function = Quiet(model, self._body, layers)

    def __call__(self, inputs: Any, targets: Any) -> tuple[LayerLook, ...]:
        """Return the looks on a batch."""
        table, gradients = self._function(inputs, targets)
        looks = []
        for (path, layer, units), row, gradient in zip(self._names, table.numpy(), gradients.numpy(), strict=True):
            known = self._gradients and bool(layer.trainable_weights)
            zero, dead, spread = map(float, row)
            largest = float(gradient) if known else None
            looks.append(LayerLook(path, kind_of(layer), units, zero, dead, spread, largest))
        return tuple(looks)

    def _body(self, inputs: Any, targets: Any) -> tuple[Any, Any]:
        seen: list[tuple[str, Any, Any]] = []
        graph = tf.compat.v1.get_default_graph()
        leaves = dict(observable(self._model))
        with tf.GradientTape(watch_accessed_variables=self._gradients) as tape:
            with normalizing(self._layers, "batch"):  # noqa: SIM117 - the second takes what the first put in place
                # every call is replaced once more: the statistics first, the observation around them
                with replaced({layer: _observed(layer, path, seen, graph) for path, layer in leaves.items()}):
                    predicted = forward(self._model, inputs)
            loss = self._loss(inputs, targets, predicted) if self._gradients else None
        self._names = _named(seen)
        table = tf.stack([_numbers(output) for _, _, output in seen])
        return table, self._largest(tape, loss, [layer for _, layer, _ in seen])

    def _loss(self, inputs: Any, targets: Any, predicted: Any) -> Any:
        loss = self._model.compute_loss(inputs, targets, predicted, None, training=False)
        return self._scale(tf.cast(loss, tf.float32))

    def _scale(self, value: Any) -> Any:
        # a half-precision gradient that underflows would look like one that is exactly zero
        return self._model.optimizer.scale_loss(value) if self._model.optimizer is not None else value

    def _largest(self, tape: Any, loss: Any, layers: list[Any]) -> Any:
        if loss is None:
            return tf.zeros((len(layers),))
        weights = [[weight.value for weight in layer.trainable_weights] for layer in layers]
        gradients = tape.gradient(loss, weights, unconnected_gradients=tf.UnconnectedGradients.ZERO)
        scale = self._scale(tf.constant(1.0))
        largest = [
            [tf.reduce_max(tf.abs(tf.cast(tf.convert_to_tensor(g), tf.float32))) for g in own] for own in gradients
        ]
        return tf.stack([tf.reduce_max(tf.stack(own)) / scale if own else tf.constant(0.0) for own in largest])


def observable(model: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the layers of a model and of the models inside it; any other composite layer counts as one."""
    seen = set[int]()
    for layer in children(model):
        if id(layer) in seen or isinstance(layer, keras.layers.InputLayer):
            continue
        seen.add(id(layer))
        if isinstance(layer, keras.Model):
            yield from observable(layer, f"{prefix}{layer.name}/")
        else:
            yield f"{prefix}{layer.name}", layer


def kind_of(layer: Any) -> str:
    """Return the class name, with the activation where the layer has one: ``Dense relu``."""
    activation = getattr(getattr(layer, "activation", None), "__name__", "linear")
    return type(layer).__name__ if activation == "linear" else f"{type(layer).__name__} {activation}"


def _observed(layer: Any, path: str, seen: list[tuple[str, Any, Any]], graph: Any) -> Callable[..., Any]:
    own = layer.call

    def observed(*args: Any, **kwargs: Any) -> Any:
        output = own(*args, **kwargs)
        # what is inside a loop or a condition does not exist outside of it
        if isinstance(output, tf.Tensor) and output.graph is graph and output.shape.rank and output.dtype.is_floating:
            seen.append((path, layer, output))
        return output

    return observed


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


def _numbers(output: Any) -> Any:
    """Return the shares of zero samples and dead units, and the spread, as `LayerLook` defines them."""
    wide = tf.cast(output, tf.float32)
    flat = tf.reshape(wide, (tf.shape(wide)[0], -1))
    zero = tf.equal(flat, 0.0)
    # differences from the first example: equal outputs give exactly 0, whatever their size
    deviation = tf.sqrt(tf.reduce_mean(tf.math.reduce_variance(flat - flat[:1], axis=0)))
    return tf.stack(
        [
            tf.reduce_mean(tf.cast(tf.reduce_all(zero, axis=1), tf.float32)),
            tf.reduce_mean(tf.cast(tf.reduce_all(zero, axis=0), tf.float32)),
            tf.math.divide_no_nan(deviation, tf.sqrt(tf.reduce_mean(tf.square(flat)))),
        ]
    )
