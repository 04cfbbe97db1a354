"""Other statistics for a while: what batch-normalization layers do inside an experiment."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal

from keras import ops

from bnwatch.keras.slots import elements_per_channel

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from bnwatch.keras.layers import Watched

Mode = Literal["batch", "running"]
Moments = tuple["Watched", Any, Any, Any]
"""A layer, the mean and variance of a batch, and the elements behind them, as tensors."""


@contextmanager
def normalizing(layers: Sequence[Watched], mode: Mode) -> Iterator[list[Moments]]:
    """Return a context in which every layer normalizes with the statistics of ``mode``, whatever it is called with.

    Nothing is updated. A frozen layer takes part: Keras would let it ignore ``training=True``. The list that is
    returned fills with the batch statistics of every call under ``batch``.
    """
    seen: list[Moments] = []
    with replaced({watched.layer: _call(watched, mode, seen) for watched in layers}):
        yield seen


@contextmanager
def replaced(calls: dict[Any, Callable[..., Any]]) -> Iterator[None]:
    """Return a context in which layers are called in another way; what a user put on an instance comes back."""
    before = {layer: layer.__dict__.get("call") for layer in calls}
    for layer, call in calls.items():
        layer.__dict__["call"] = call
    try:
        yield
    finally:
        for layer, call in before.items():
            if call is None:
                del layer.__dict__["call"]
            else:
                layer.__dict__["call"] = call


def _call(watched: Watched, mode: Mode, seen: list[Moments]) -> Callable[..., Any]:
    layer, own = watched.layer, watched.layer.call

    def running(inputs: Any, training: Any = None, mask: Any = None) -> Any:  # noqa: ARG001 - Keras's signature
        return own(inputs, training=False, mask=mask)

    def batch(inputs: Any, training: Any = None, mask: Any = None) -> Any:  # noqa: ARG001 - Keras's signature
        wide = ops.cast(inputs, "float64" if inputs.dtype == "float64" else "float32")
        # past the hook of the tap: these moments are no part of the training
        mean, var = type(layer)._moments(layer, wide, mask)  # noqa: SLF001 - the layer's own way to its moments
        seen.append((watched, mean, var, elements_per_channel(inputs, mask, int(mean.shape[0]))))
        normalized = ops.batch_normalization(
            wide, mean, var, axis=layer.axis, offset=layer.beta, scale=layer.gamma, epsilon=layer.epsilon
        )
        return ops.cast(normalized, layer.compute_dtype)

    return batch if mode == "batch" else running
