"""Forward passes for experiments: compiled, without dropout, and without a trace in the model."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import keras
import tensorflow as tf

from bnwatch.evidence import ExperimentNotPossibleError
from bnwatch.keras.swap import normalizing

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from bnwatch.keras.layers import Watched
    from bnwatch.keras.swap import Mode


ESSENCE = 200
"""Characters of an error message that are passed on."""


class Quiet:
    """A function on a model, compiled once, after which every variable holds what it held before.

    Inference may move state that training uses: a layer that always samples advances its seed, a loss of several
    outputs keeps means. Which variables a function can reach at all is read off its graph; most reach none that could
    move.
    """

    def __init__(self, model: Any, body: Callable[..., Any], known: Sequence[Watched]) -> None:
        """Take the body to compile, and the layers whose statistics it is known not to move."""
        self._model = model
        self._function = tf.function(body, reduce_retracing=True)
        self._known = {id(v) for watched in known for v in watched.layer.non_trainable_variables}
        self._state: dict[int, list[Any]] = {}

    def __call__(self, *arguments: Any) -> Any:
        """Run the function.

        Raises:
            ExperimentNotPossibleError: the model cannot be run like this.
        """
        try:
            # asked for first: the trace alone shows what there is to preserve
            graph = self._function.get_concrete_function(*_any_batch(arguments)).graph
            if id(graph) not in self._state:
                self._state[id(graph)] = self._reached(graph)
            with preserved(self._state[id(graph)]):
                return self._function(*arguments)
        except Exception as error:  # a user's model may do anything: that it cannot be tried is a finding, no failure
            msg = f"the model could not be run for an experiment ({type(error).__name__}: {_essence(str(error))})"
            raise ExperimentNotPossibleError(msg) from error

    def _reached(self, graph: Any) -> list[Any]:
        reached = {id(outside) for outside, _ in graph.captures}
        state = [v for v in _state_of(self._model) if id(v) not in self._known]
        return [v.value for v in state if id(v.value.handle) in reached]


def _essence(message: str) -> str:
    """Return on one line what went wrong in a user's layer; Keras and autograph tell where it was around that."""
    told = " ".join(message.split()).partition("Arguments received")[0].strip()
    return told if len(told) <= ESSENCE else f"...{told[-ESSENCE:]}"


def _any_batch(arguments: Any) -> Any:
    """Return the types of the arguments for any number of examples: the odd last batch needs no trace of its own."""
    return keras.tree.map_structure(
        lambda leaf: None if leaf is None else tf.TensorSpec([None, *leaf.shape[1:]], leaf.dtype), arguments
    )


@contextmanager
def preserved(variables: Sequence[Any]) -> Iterator[None]:
    """Return a context after which TensorFlow variables hold what they held before."""
    before = [tf.identity(variable) for variable in variables]
    try:
        yield
    finally:
        for variable, value in zip(variables, before, strict=True):
            variable.assign(value)


def _state_of(model: Any) -> list[Any]:
    loss = getattr(model, "_compile_loss", None)
    metrics = [*getattr(model, "metrics", ()), *getattr(loss, "metrics", ())]
    found = [*model.non_trainable_variables, *(v for metric in metrics for v in metric.variables)]
    return list({id(v): v for v in found}.values())


def forward(model: Any, inputs: Any) -> Any:
    """Return the model's outputs in inference mode."""
    return model(inputs, training=False) if getattr(model, "_call_has_training_arg", True) else model(inputs)


def scoring(model: Any, layers: Sequence[Watched], mode: Mode) -> Quiet:
    """Return a function from inputs to the outputs and the batch statistics of every call of a layer."""

    def body(inputs: Any) -> Any:
        with normalizing(layers, mode) as seen:
            outputs = forward(model, inputs)
        order = {id(watched): n for n, watched in enumerate(layers)}
        statistics = [(tf.constant(order[id(w)]), mean, var, count) for w, mean, var, count in seen]
        return outputs, statistics

    return Quiet(model, body, layers)


def tensors(data: Any) -> Any:
    """Return the same nest with tensors for arrays, so that a compiled function is traced once for all of them."""
    return keras.tree.map_structure(lambda leaf: None if leaf is None else _floating(tf.convert_to_tensor(leaf)), data)


def _floating(tensor: Any) -> Any:
    wanted = keras.config.floatx()
    return tf.cast(tensor, wanted) if tensor.dtype.is_floating and tensor.dtype != wanted else tensor
