"""The compiled functions of a model of Keras 2."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import tensorflow as tf

from bnwatch.keras.backends.tensorflow.functions import TensorFlowFunctions

if TYPE_CHECKING:
    from bnwatch.keras.backends.tensorflow.keeper import TensorFlowKeeper


class LegacyFunctions(TensorFlowFunctions):
    """Keras 2 keeps the train function in a second place, and nothing lies between drawing a batch and the step."""

    def __init__(self, model: Any) -> None:
        """Remember the functions as they are."""
        super().__init__(model)
        if not _traced(model.test_function):
            # `evaluate` took it before any callback began, and is about to trace it with the tap inside
            self._saved = (self._saved[0], None)
        self._saved_inner, self._made_inner = model.train_tf_function, None

    def make(self, training: TensorFlowKeeper | None, evaluation: TensorFlowKeeper | None) -> None:
        """Make both functions; they are traced when they first run."""
        if not self._model.jit_compile:  # what XLA compiles stores nothing on the host
            _passing(self._model, "train_step", training)
            _passing(self._model, "test_step", evaluation)
        super().make(None, None)
        self._made_inner = self._model.train_tf_function

    def restore(self) -> None:
        """Put the functions back; those that somebody else made meanwhile are left to be made again without the tap."""
        super().restore()
        if self._model.train_tf_function is self._made_inner:
            self._model.train_tf_function = self._saved_inner


def draws_from_its_own_stream(function: Any) -> bool:
    """Return whether a train function was traced, and holds an operation with a random stream of its own."""
    graphs = [concrete.graph for concrete in _traced(function)]
    definitions = (graph.as_graph_def() for graph in graphs)
    nodes = (node for d in definitions for part in (d.node, *(f.node_def for f in d.library.function)) for node in part)
    return any({"seed", "seed2"} <= set(node.attr) for node in nodes)


def _traced(function: Any) -> list[Any]:
    return list(getattr(function, "_list_all_concrete_functions", list)())


def _passing(model: Any, name: str, keeper: TensorFlowKeeper | None) -> None:
    """Have a step that the tap has wrapped pass its batches by a keeper; the tap takes both off again."""
    if keeper is None:
        return
    wrapped = model.__dict__[name]
    step = getattr(wrapped, "bnwatch_step", wrapped)
    # autograph may convert a step that the user wrote, so it sees what is around it as well
    offer = tf.autograph.experimental.do_not_convert(keeper.offer)

    def passing(data: Any) -> Any:
        offer(data)
        return step(data)

    hook: Any = passing
    hook.bnwatch_step, hook.bnwatch_tap = step, step.bnwatch_tap
    model.__dict__[name] = hook
