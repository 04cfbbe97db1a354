"""The compiled functions of a model: made anew while it is watched, put back afterwards."""

from __future__ import annotations

from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import tensorflow as tf

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from bnwatch.keras.backends.tensorflow.keeper import TensorFlowKeeper


class TensorFlowFunctions:
    """Replaces the functions that run the steps of a model by ones that contain the tap."""

    def __init__(self, model: Any) -> None:
        """Remember the functions as they are."""
        self._model = model
        self._saved = (model.train_function, model.test_function)
        self._made: tuple[Any, Any] = (None, None)

    def make(self, training: TensorFlowKeeper | None, evaluation: TensorFlowKeeper | None) -> None:
        """Make both functions; they are traced when they first run."""
        model = self._model
        with _installed(training, model):
            model.make_train_function(force=True)
        with _installed(evaluation, model):
            model.make_test_function(force=True)
        self._made = (model.train_function, model.test_function)

    def restore(self) -> None:
        """Put the functions back; those that somebody else made meanwhile are left to be made again without the tap."""
        for name, saved, made in zip(("train_function", "test_function"), self._saved, self._made, strict=True):
            now = getattr(self._model, name)
            if now is made and made is not None:
                setattr(self._model, name, saved)
            elif now is not None and now is not saved:
                setattr(self._model, name, None)


def _installed(keeper: TensorFlowKeeper | None, model: Any) -> AbstractContextManager[None]:
    return nullcontext() if keeper is None else keeper.installed(model)


def retracing_changes_training(model: Any) -> bool:
    """Return whether a train function traced anew could train other layers than the one the model already has.

    Keras goes on with a function traced earlier although ``trainable`` was set since; only ``compile`` makes it look
    again.
    """
    compiled = getattr(model, "_compiled_trainable_state", None)
    if compiled is None or all(layer.trainable == trainable for layer, trainable in compiled.items()):
        return False
    return _traced(model.train_function)


def _traced(function: Any) -> bool:
    """Return whether a train function was traced; True also where that cannot be seen."""
    cells = [function, *(cell.cell_contents for cell in getattr(function, "__closure__", None) or ())]
    counts = [cell.experimental_get_tracing_count() for cell in cells if isinstance(cell, _PolymorphicFunction)]
    return any(counts) or (not counts and function is not None)


_PolymorphicFunction = type(tf.function(lambda: None))
