"""Functions for experiments: compiled once, and without a trace in the model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import jax

from bnwatch.keras.backends.base import refused

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from bnwatch.keras.backends.jax import JaxBackend


class Quiet:
    """A pure function on a model: every variable is an argument, and what the body assigns is dropped."""

    def __init__(self, backend: JaxBackend, body: Callable[..., Any]) -> None:
        """Take the body; it is compiled where training is."""
        self._backend, self._body = backend, body
        self._variables: list[Any] = []
        model = backend.model
        self._function = jax.jit(self._pure) if model.jit_compile and not model.run_eagerly else self._pure

    def __call__(self, *arguments: Any) -> Any:
        """Run the function.

        Raises:
            ExperimentNotPossibleError: the model cannot be run like this.
        """
        with refused():
            variables = self._backend.state()
            pairs = zip(variables, self._backend.arrays(variables), strict=True)
            # a pure loop may have given away what the model had of its optimizer
            now = [(variable, array) for variable, array in pairs if not array.is_deleted()]
            self._variables = [variable for variable, _ in now]
            return self._function([array for _, array in now], *arguments)

    def _pure(self, values: Sequence[Any], *arguments: Any) -> Any:
        with self._backend.holding(dict(zip(map(id, self._variables), values, strict=True)), self._variables):
            return self._body(*arguments)
