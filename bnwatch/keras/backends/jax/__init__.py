"""Keras 3 on JAX."""

from __future__ import annotations

from contextlib import contextmanager
from functools import partial
from itertools import chain
from typing import TYPE_CHECKING, Any

import jax
import jax.extend.core
import jax.numpy as jnp
import numpy as np

from bnwatch.evidence import entries
from bnwatch.keras.backends.base import TOGGLED, Backend, trainable_toggled
from bnwatch.keras.backends.jax.functions import STATE, JaxFunctions, copied, traced
from bnwatch.keras.backends.jax.quiet import Quiet
from bnwatch.keras.backends.jax.sites import call_sites
from bnwatch.keras.backends.jax.slots import JaxSlots, elements_per_channel
from bnwatch.keras.keep import HostKeeper, array_of, leaves, mapped

if TYPE_CHECKING:
    from collections import Counter
    from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence

    from numpy.typing import NDArray

    from bnwatch.keras.backends.base import Functions, Guard, Keeper, Record
    from bnwatch.keras.layers import Watched

DIFFERENTIATED = {"JVPTracer", "LinearizeTracer"}
"""What JAX passes through a function of which it takes gradients."""
SPARE = 2
"""Places for a layer in a hand-written loop, in multiples of its calls in the model: a step may call it twice."""


class JaxBackend(Backend):
    """Statistics wait in variables that travel through the pure functions of a step among the random seeds.

    In the middle of an epoch the variables of the model are empty, and what they would hold is in ``_jax_state``; in a
    hand-written loop that is pure it is where the user has it.
    """

    name = "jax"
    slots: JaxSlots
    """Of the watch that is on the model."""

    def __init__(self, model: Any) -> None:
        """Bind to a model; nothing is touched."""
        super().__init__(model)
        self._sites: Counter[int] | None = None
        self._places = SPARE
        self._held: Sequence[Any] | None = None
        self._assigned: dict[int, Any] = {}
        self._scopes: list[tuple[list[Any], Any]] = []

    def why_not(self) -> str | None:
        """Return in a sentence why training of this model cannot be watched; None when it can."""
        nnx = getattr(self.library.config, "is_nnx_enabled", None)
        if nnx is not None and nnx():
            return "bnwatch does not watch Keras on JAX with Flax NNX; this training goes on unwatched"
        return TOGGLED if trainable_toggled(self.model) and traced(self.model.train_function) else None

    # the tap

    def storage(self, guard: Guard) -> JaxSlots:
        """Return an empty storage."""
        self.slots = JaxSlots(self, guard)
        return self.slots

    def hooks(self, watched: Watched, record: Record) -> dict[str, Callable[..., Any]]:
        """Return methods to put on a layer, and make place for what they record: a trace cannot."""
        if self._sites is None:
            self._sites = call_sites(self.model)
        self.slots.prepare(watched, self._places * max(1, self._sites[id(watched.layer)]))
        return super().hooks(watched, record)

    def calls_last(self) -> Hashable:
        """Return one and the same: a step is traced before it runs, and functions are not told apart."""
        return "traced"

    def differentiates(self, inputs: Any) -> bool:
        """Return whether what a layer is called with, or what the model trains, stands for a value and its gradient."""
        trained = (variable.value for variable in self.model.trainable_variables)
        return any(type(value).__name__ in DIFFERENTIATED for value in chain(leaves(inputs), trained))

    def elements_per_channel(self, inputs: Any, mask: Any, channels: int) -> Any:
        """Return over how many elements a channel's statistics are taken; masked elements do not count."""
        return elements_per_channel(inputs, mask, channels)

    # training

    def functions(self) -> Functions:
        """Return the functions of the model, which make place where a step needs more of it."""
        self._places = 1
        return JaxFunctions(self)

    def keeper(self, guard: Guard) -> Keeper:
        """Return a keeper that has nothing."""
        return HostKeeper(guard, copied)

    def metrics(self) -> Mapping[str, Any]:
        """Return the running means of the metrics; reads from the device."""
        variables = self.model.metrics_variables
        with self.holding(dict(zip(map(id, variables), self.arrays(variables), strict=True)), variables):
            return super().metrics()

    # state

    def hold(self, state: Any) -> None:
        """Take the values of the model's variables where a loop keeps them; None lets go of them."""
        self._held, self._assigned = None if state is None else tuple(state)[:2], {}

    @property
    def unseen(self) -> str:
        """Return what to do where a hand-written loop shows nothing in its first step."""
        return (
            f"{super().unseen}; where the loop is pure, collect the variables of the built model inside watch(), and "
            "give step() the state that comes out"
        )

    def values(self, variables: Sequence[Any]) -> list[NDArray[Any]]:
        """Return what variables of the model hold now, in memory of their own: a step gives its arguments away."""
        return [np.array(array) for array in self.arrays(variables)]

    def samples(self, variables: Sequence[Any], limit: int) -> list[NDArray[Any]]:
        """Return at most ``limit`` entries of each variable."""
        return [np.asarray(sample) for sample in _sampled(self.arrays(variables), limit)]

    def arrays(self, variables: Sequence[Any]) -> list[Any]:
        """Return the arrays that variables of the model hold now, also in the middle of an epoch."""
        now = self._now()
        # a variable without a value cannot even be asked for it
        return [v.value if (array := now.get(id(v))) is None else array for v in variables]

    def assign(self, variable: Any, value: NDArray[Any]) -> None:
        """Give a variable of the model another value, between steps."""
        if self._held is not None:
            self._assigned[id(variable)] = jnp.asarray(value)
            return
        self.synchronize()
        variable.assign(value)

    def synchronize(self) -> None:
        """Have the variables hold what Keras keeps elsewhere in the middle of an epoch."""
        self.model.jax_state_sync()

    def state(self) -> list[Any]:
        """Return every variable that a forward pass or a loss could look at."""
        model = self.model
        loss, optimizer = getattr(model, "_compile_loss", None), getattr(model, "optimizer", None)
        metrics = [*getattr(model, "metrics", ()), *getattr(loss, "metrics", ())]
        found = [
            *model.variables,
            *getattr(optimizer, "variables", ()),
            *(variable for metric in metrics for variable in metric.variables),
        ]
        return list({id(v): v for v in found}.values())

    def _now(self) -> dict[int, Any]:
        """Return by the identity of the variable what it would hold, where it does not."""
        if self._held is not None:
            return {**self._paired(dict(zip(STATE, self._held, strict=False))), **self._assigned}
        if self.model._jax_state_synced:  # noqa: SLF001 - the trainer's own flag
            return {}
        return self._paired(getattr(self.model, "_jax_state", None) or {})

    def _paired(self, state: Mapping[str, Sequence[Any]]) -> dict[int, Any]:
        found: dict[int, Any] = {}
        for name, values in state.items():
            variables = self.model.optimizer.variables if name == "optimizer_variables" else getattr(self.model, name)
            if len(variables) != len(values):
                msg = f"the state has {len(values)} {name}, the model has {len(variables)}"
                raise ValueError(msg)
            found.update(zip(map(id, variables), values, strict=True))
        return found

    # experiments

    def tensors(self, data: Any) -> Any:
        """Return the same nest with tensors for arrays."""
        return mapped(self._tensor, data)

    def _tensor(self, leaf: Any) -> Any:
        tensor = leaf if isinstance(leaf, jax.Array) else jnp.asarray(array_of(leaf))
        return tensor.astype(self.library.config.floatx()) if jnp.issubdtype(tensor.dtype, jnp.floating) else tensor

    def quiet(self, body: Callable[..., Any], known: Sequence[Watched]) -> Callable[..., Any]:  # noqa: ARG002
        """Return ``body`` compiled, and without a trace in the model."""
        return Quiet(self, body)

    @contextmanager
    def holding(self, values: Mapping[int, Any], variables: Sequence[Any]) -> Iterator[None]:
        """Return a context in which variables hold other values, by identity; what is assigned in it is dropped."""
        pairs = [(variable, values[id(variable)]) for variable in variables]
        with self.library.StatelessScope(state_mapping=pairs, initialize_variables=False) as scope:
            self._scopes.append((list(variables), scope))
            try:
                yield
            finally:
                self._scopes.pop()

    def differentiated(self, compute: Callable[[], tuple[Any, Any]], weights: Sequence[Any]) -> tuple[Any, list[Any]]:
        """Return what ``compute`` returns beside a loss, and the gradients of the loss."""
        variables, scope = self._scopes[-1]
        now = {id(variable): scope.get_current_value(variable) for variable in variables}

        def loss(values: list[Any]) -> tuple[Any, Any]:
            with self.holding({**now, **dict(zip(map(id, weights), values, strict=True))}, variables):
                return compute()

        (_, found), gradients = jax.value_and_grad(loss, has_aux=True)([now[id(weight)] for weight in weights])
        return found, gradients

    def place(self) -> Any:
        """Return the trace that is under way."""
        return _trace()

    def visible(self, output: Any, place: Any) -> bool:
        """Return whether a layer's output is of that trace: what is inside a loop is of its own."""
        return super().visible(output, place) and bool(_trace() == place)


@partial(jax.jit, static_argnums=1)
def _sampled(arrays: Sequence[Any], limit: int) -> list[Any]:
    return [array.reshape(-1)[entries(array.size, limit)] for array in arrays]


def _trace() -> Any:
    """Return something that is equal within one trace."""
    return _trace_state(convention="nnx")


# older JAX has it there
_trace_state = getattr(jax.extend.core, "get_opaque_trace_state", None) or jax.core.get_opaque_trace_state
