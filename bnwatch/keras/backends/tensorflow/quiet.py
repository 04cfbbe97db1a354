"""Functions for experiments: compiled once, and without a trace in the model."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import tensorflow as tf

from bnwatch.keras.backends.base import refused
from bnwatch.keras.backends.tensorflow.slots import copies
from bnwatch.keras.keep import mapped

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from bnwatch.keras.layers import Watched


class Quiet:
    """A function on a model, compiled once, after which every variable holds what it held before.

    Inference may move state that training uses: a layer that always samples advances its seed, a loss of several
    outputs keeps means. Which variables a function can reach at all is read off its graph; most reach none that could
    move.
    """

    def __init__(self, body: Callable[..., Any], state: Callable[[], list[Any]], known: Sequence[Watched]) -> None:
        """Take the body to compile, what there is to preserve, and layers whose statistics it is known not to move."""
        self._function = tf.function(body, reduce_retracing=True)
        self._variables = state
        self._known = {id(v) for watched in known for v in watched.layer.non_trainable_variables}
        self._state: dict[int, list[Any]] = {}

    def __call__(self, *arguments: Any) -> Any:
        """Run the function.

        Raises:
            ExperimentNotPossibleError: the model cannot be run like this.
        """
        with refused():
            # asked for first: the trace alone shows what there is to preserve
            graph = self._function.get_concrete_function(*_any_batch(arguments)).graph
            if id(graph) not in self._state:
                self._state[id(graph)] = self._reached(graph)
            with preserved(self._state[id(graph)]):
                return self._function(*arguments)

    def _reached(self, graph: Any) -> list[Any]:
        reached = {id(outside) for outside, _ in graph.captures}
        state = [copy for v in self._variables() if id(v) not in self._known for copy in copies(v)]
        return [variable for variable in state if id(variable.handle) in reached]


def _any_batch(arguments: Any) -> Any:
    """Return the types of the arguments for any number of examples: the odd last batch needs no trace of its own."""
    return mapped(lambda leaf: tf.TensorSpec([None, *leaf.shape[1:]] if leaf.shape.rank else [], leaf.dtype), arguments)


@contextmanager
def preserved(variables: Sequence[Any]) -> Iterator[None]:
    """Return a context after which TensorFlow variables hold what they held before."""
    before = [tf.identity(variable) for variable in variables]
    try:
        yield
    finally:
        for variable, value in zip(variables, before, strict=True):
            variable.assign(value)
