"""The functions of a model, made anew while it is watched, and the batches that pass through them."""

from __future__ import annotations

from functools import wraps
from itertools import chain
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from bnwatch.keras.keep import leaves, mapped

if TYPE_CHECKING:
    from collections.abc import Iterator

    from bnwatch.keras.backends.jax import JaxBackend
    from bnwatch.keras.keep import HostKeeper

FUNCTIONS = ("train_function", "test_function", "predict_function")
STATE = ("trainable_variables", "non_trainable_variables", "optimizer_variables", "metrics_variables")
"""What a training step takes and returns, in this order."""


class OutgrownError(BaseException):
    """A step that was traced met more call sites than have a place; past whatever a user's layer may catch."""


def copied(batch: Any) -> Any | None:
    """Return a copy of a batch, or None if some of it is no array; what JAX holds nobody writes to."""
    if not all(isinstance(leaf, np.ndarray | jax.Array) for leaf in leaves(batch)):
        return None
    return mapped(lambda leaf: leaf.copy() if isinstance(leaf, np.ndarray) else leaf, batch)


class _Draws:
    """The batches of one execution: an iterator, in older Keras a list."""

    def __init__(self, batches: Any, keeper: HostKeeper | None) -> None:
        self._batches, self._keeper = batches, keeper
        self._drawn: list[Any] = []

    def given(self) -> Any:
        """Return what to give to Keras's function."""
        if not isinstance(self._batches, list):
            return self
        self._note(self._batches[-1])
        return self._batches

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        batch = next(self._batches)
        self._drawn.append(batch)
        self._note(batch)
        return batch

    def _note(self, batch: Any) -> None:
        if self._keeper is not None:
            self._keeper.note(batch)

    @property
    def repeatable(self) -> bool:
        """Return whether no step of this execution has run yet, while one is being traced."""
        return len(self._drawn) <= 1

    def again(self) -> Any:
        """Return the same batches, to be drawn once more."""
        return self._batches if isinstance(self._batches, list) else chain(self._drawn, self._batches)


class JaxFunctions:
    """Replaces the functions that run the steps of a model by ones that contain the tap.

    A step that meets more call sites than have a place is stopped before anything has run, and traced once more with a
    place for each.
    """

    def __init__(self, backend: JaxBackend) -> None:
        """Remember the functions as they are."""
        self._backend, self._model = backend, backend.model
        model = self._model
        self._saved = {name: getattr(model, name) for name in FUNCTIONS}
        self._made = self._saved
        self._draws: _Draws | None = None
        self._keepers: tuple[HostKeeper | None, HostKeeper | None] = (None, None)
        self._stuck = False

    def make(self, training: HostKeeper | None, evaluation: HostKeeper | None) -> None:
        """Make the functions; they are traced when they first run."""
        model = self._model
        self._keepers = (training, evaluation)
        self._watch_step()
        record = getattr(model, "_record_training_state_sharding_spec", None)
        if record is not None:  # Keras up to 3.5 looks up there where each variable lies
            record()
        model.make_train_function(force=True)
        model.train_function = self._training(model.train_function, training)
        model.make_test_function(force=True)
        if evaluation is not None:
            model.test_function = _noting(model.test_function, evaluation)
        # one that was made for fewer variables does not fit where they are distributed
        model.predict_function = None
        self._made = {name: getattr(model, name) for name in FUNCTIONS}

    def restore(self) -> None:
        """Put the functions back; those that somebody else made meanwhile are left to be made again without the tap."""
        self._backend.slots.release()
        for name, saved in self._saved.items():
            now = getattr(self._model, name)
            if now is self._made[name]:
                setattr(self._model, name, saved)
            elif now is not saved:
                setattr(self._model, name, None)

    def _watch_step(self) -> None:
        step = getattr(self._model.train_step, "__wrapped__", self._model.train_step)

        @wraps(step)
        def stepping(*args: Any, **kwargs: Any) -> Any:
            found = step(*args, **kwargs)
            repeatable = self._draws is not None and self._draws.repeatable
            if self._backend.slots.outgrown and repeatable and not self._stuck:
                raise OutgrownError
            return found

        self._model.__dict__["train_step"] = stepping

    def _training(self, function: Any, keeper: HostKeeper | None) -> Any:
        def train(state: Any, batches: Any) -> Any:
            draws = self._draws = _Draws(batches, keeper)
            try:
                return function(state, draws.given())
            except OutgrownError:
                pass
            finally:
                self._draws = None
            return self._once_more(state, draws)

        return train

    def _once_more(self, state: Any, draws: _Draws) -> Any:
        model = self._model
        # nothing has run: the variables get back what Keras took out of them for the step
        model._jax_state, model._jax_state_synced = dict(zip(STATE, state, strict=True)), False  # noqa: SLF001
        model.jax_state_sync()
        self._stuck = True
        with self._backend.slots.guard("making place for call sites"):
            self._backend.slots.grow()
            self.make(*self._keepers)
            self._stuck = False
        state = model._get_jax_state(**dict.fromkeys(STATE, True), purge_model_variables=True)  # noqa: SLF001
        model._jax_state_synced = False  # noqa: SLF001
        return model.train_function(state, draws.again())


def _noting(function: Any, keeper: HostKeeper) -> Any:
    return lambda state, batches: function(state, _Draws(batches, keeper).given())


def traced(function: Any) -> bool:
    """Return whether a function of a model is compiled, and was traced already."""
    cells = [function, *(cell.cell_contents for cell in getattr(function, "__closure__", None) or ())]
    return any(cell._cache_size() for cell in cells if hasattr(cell, "_cache_size"))  # noqa: SLF001 - there is no other
