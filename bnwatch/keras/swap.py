"""Other statistics for a while: what batch-normalization layers do inside an experiment."""

from __future__ import annotations

import inspect
import random
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from bnwatch.keras.backends.base import Backend
    from bnwatch.keras.layers import Watched

    Pair = tuple[Any, Any]
    """Mean and variance, tensors of shape ``(channels,)``."""
    Choose = Callable[[int, Pair, Pair], Pair]
    """Returns what the n-th call normalizes with, from the statistics of the batch and the running ones."""


@dataclass(frozen=True, slots=True)
class Call:
    """What entered a layer at one call: mean, biased variance and elements per channel, as tensors."""

    watched: Watched
    mean: Any
    var: Any
    count: Any


def batch_everywhere(_: int, batch: Pair, running: Pair) -> Pair:  # noqa: ARG001 - as `Choose` asks
    """Choose the statistics of the batch."""
    return batch


@contextmanager
def normalizing(backend: Backend, layers: Sequence[Watched], choose: Choose) -> Iterator[list[Call]]:
    """Return a context in which every layer normalizes with chosen statistics, whatever it is called with.

    The layer's own inference does it, so what a subclass adds is kept; nothing is updated. A frozen layer takes part:
    Keras would let it ignore ``training=True``. The list that is returned fills with what entered at every call.
    """
    calls: list[Call] = []
    with replaced({watched.layer: _call(backend, watched, choose, calls) for watched in layers}, "call"):
        yield calls


@contextmanager
def replaced(values: dict[Any, Any], name: str) -> Iterator[None]:
    """Return a context in which an attribute of layers is another one, past all tracking; what was there comes back."""
    absent = object()
    before = {layer: layer.__dict__.get(name, absent) for layer in values}
    for layer, value in values.items():
        layer.__dict__[name] = value
    try:
        yield
    finally:
        for layer, value in before.items():
            if value is absent:
                del layer.__dict__[name]
            else:
                layer.__dict__[name] = value


def _call(backend: Backend, watched: Watched, choose: Choose, calls: list[Call]) -> Callable[..., Any]:
    layer, own = watched.layer, getattr(watched.layer.call, "bnwatch_own", watched.layer.call)
    signature = inspect.signature(own)

    def call(*args: Any, **kwargs: Any) -> Any:
        bound = signature.bind(*args, **kwargs)
        inputs = next(iter(bound.arguments.values()))
        mean, var, count = backend.batch_moments(layer, inputs, bound.arguments.get("mask"))
        calls.append(Call(watched, mean, var, count))
        running = tuple(backend.ops.convert_to_tensor(v) for v in (layer.moving_mean, layer.moving_variance))
        chosen = choose(len(calls) - 1, (mean, var), (running[0], running[1]))
        if "training" in signature.parameters:
            bound.arguments["training"] = False
        with ExitStack() as stack:
            for name, value in zip(("moving_mean", "moving_variance"), chosen, strict=True):
                stack.enter_context(replaced({layer: value}, name))
            return own(*bound.args, **bound.kwargs)

    return call


@contextmanager
def undrawn() -> Iterator[None]:
    """Return a context after which the global generators of Python and NumPy go on as if nobody had drawn from them.

    A user's layer or pipeline may draw there; those of the backend are the business of `Backend.quiet`.
    """
    python, legacy = random.getstate(), np.random.get_state()  # noqa: NPY002 - the global one is meant
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(legacy)  # noqa: NPY002 - likewise


def forward(model: Any, inputs: Any) -> Any:
    """Return the model's outputs in inference mode."""
    takes = getattr(model, "_call_has_training_arg", getattr(model, "_expects_training_arg", True))
    return model(inputs, training=False) if takes else model(inputs)
