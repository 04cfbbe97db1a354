"""The compiled functions of a model: made anew while it is watched, put back afterwards."""

from __future__ import annotations

from types import FunctionType
from typing import TYPE_CHECKING, Any

import tensorflow as tf

from bnwatch.keras.backends.base import trainable_toggled

if TYPE_CHECKING:
    from collections.abc import Iterator

    from bnwatch.keras.backends.tensorflow.keeper import TensorFlowKeeper

STEP = "one_step_on_data"
"""What Keras calls the function that runs a step on a batch."""


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
        model.make_train_function(force=True)
        model.make_test_function(force=True)
        self._made = (model.train_function, model.test_function)
        for function, keeper in zip(self._made, (training, evaluation), strict=True):
            if keeper is not None:
                pass_by(function, keeper)

    def restore(self) -> None:
        """Put the functions back; those that somebody else made meanwhile are left to be made again without the tap."""
        for name, saved, made in zip(("train_function", "test_function"), self._saved, self._made, strict=True):
            now = getattr(self._model, name)
            if now is made and made is not None:
                setattr(self._model, name, saved)
            elif now is not None and now is not saved:
                setattr(self._model, name, None)


def pass_by(function: Any, keeper: TensorFlowKeeper) -> None:
    """Have every batch of a train or test function that was not traced yet pass by a keeper.

    In every Keras 3 the step on a batch is a function of its own, compiled by itself, that the others find in their
    closure: exchanged there, the batch can be stored in ordinary TensorFlow, also where the step is under XLA.
    """
    for name, cell in _closure(function, set()):
        if name == STEP:
            cell.cell_contents = keeper.passing(cell.cell_contents)
            return


def _closure(function: Any, seen: set[int]) -> Iterator[tuple[str, Any]]:
    """Yield name and cell of everything that a function and those inside it were made with."""
    python_function = getattr(function, "python_function", function)
    if id(python_function) in seen or not isinstance(python_function, FunctionType):
        return
    seen.add(id(python_function))
    cells = list(zip(python_function.__code__.co_freevars, python_function.__closure__ or (), strict=True))
    yield from cells
    for _, cell in cells:
        yield from _closure(cell.cell_contents, seen)


def retracing_changes_training(model: Any) -> bool:
    """Return whether a train function traced anew could train other layers than the one the model already has.

    Keras goes on with a function traced earlier although ``trainable`` was set since; only ``compile`` makes it look
    again.
    """
    return trainable_toggled(model) and _traced(model.train_function)


def _traced(function: Any) -> bool:
    """Return whether a train function was traced; True also where that cannot be seen."""
    found = [function, *(cell.cell_contents for _, cell in _closure(function, set()))]
    counts = [one.experimental_get_tracing_count() for one in found if isinstance(one, _PolymorphicFunction)]
    return any(counts) or (not counts and function is not None)


_PolymorphicFunction = type(tf.function(lambda: None))
