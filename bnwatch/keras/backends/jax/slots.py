"""Where the statistics of a call site wait on the device until a sampled step reads them.

Keras trains on JAX with pure functions: what a step changes must be among the variables that go in and come out. A
layer's random seeds are, and are neither weights nor metrics nor part of a saved file. So a slot looks like one.
"""

from __future__ import annotations

from contextlib import suppress
from functools import wraps
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from bnwatch.keras.backends.base import Deferred, Reading, Stored

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Sequence

    from bnwatch.keras.backends.base import Guard
    from bnwatch.keras.backends.jax import JaxBackend
    from bnwatch.keras.layers import Watched

LARGEST = 2**31 - 1
"""More elements than this are told as this many: JAX has no wider integer unless it is asked for."""
COUNTERS = 2
"""Numbers of a slot behind its statistics: elements per channel, and calls."""


class Slot:
    """The last batch statistics of one call site: the bits of float32 mean and variance, elements and calls.

    Keras asks an entry of ``_seed_generators`` for its ``state`` and for nothing else.
    """

    def __init__(self, watched: Watched, index: int, library: Any) -> None:
        """Create the variable, and hang it on the layer, which is built."""
        self.watched = watched
        self.state = library.Variable(
            "zeros",
            shape=(2 * int(watched.layer.moving_mean.shape[0]) + COUNTERS,),
            dtype="int32",
            trainable=False,
            autocast=False,
            # a name of its own, since one that Keras chose would change those it chooses later
            name=f"bnwatch_{watched.path.replace('/', '_')}_{index}",
        )
        watched.layer._seed_generators.append(self)  # noqa: SLF001 - see above

    def assign(self, mean: Any, var: Any, count: Any) -> None:
        """Store the statistics of a call and count it; runs eagerly or becomes part of the function being traced."""
        moments = jnp.concatenate([jnp.reshape(mean, -1), jnp.reshape(var, -1)]).astype(jnp.float32)
        known = min(count, LARGEST) if isinstance(count, int) else count
        counters = jnp.stack([jnp.asarray(known, jnp.int32), self.state.value[-1] + 1])
        self.state.assign(jnp.concatenate([_bits(jax.lax.stop_gradient(moments)), counters]))

    def remove(self) -> None:
        """Take the slot off the layer."""
        generators = self.watched.layer._seed_generators  # noqa: SLF001 - see above
        generators[:] = [generator for generator in generators if generator is not self]


def elements_per_channel(inputs: Any, mask: Any, channels: int) -> Any:
    """Return over how many elements a channel's statistics are taken; masked elements do not count."""
    if mask is None:
        return int(inputs.size) // channels
    return jnp.count_nonzero(jnp.broadcast_to(jnp.expand_dims(mask, -1), inputs.shape)) // channels


class JaxSlots(Deferred):
    """The slots of a model, made before a function is traced: what is not among its arguments cannot be assigned."""

    def __init__(self, backend: JaxBackend, guard: Guard) -> None:
        """Begin with none."""
        self.guard = guard
        self._backend = backend
        self._made: dict[int, list[Slot]] = {}
        self._slots: dict[Hashable, Slot] = {}
        self._missing: dict[Hashable, Watched] = {}
        self._builds: list[tuple[Any, Any]] = []

    def prepare(self, watched: Watched, places: int) -> None:
        """Make ``places`` slots for a layer; as soon as it is built where it is not."""
        if watched.built:
            self._add(watched, places)
            return
        build = watched.layer.build

        @wraps(build)
        def building(*args: Any, **kwargs: Any) -> Any:
            built = build(*args, **kwargs)
            with self.guard("making place for call sites"):
                if watched.built and id(watched) not in self._made:
                    self._add(watched, places)
            return built

        watched.layer.__dict__["build"] = building
        self._builds.append((watched.layer, build))

    def put(self, key: Hashable, watched: Watched, mean: Any, var: Any, count: Callable[[], Any]) -> None:
        """Store the statistics of a call and count it."""
        slot = self._slots.get(key) or self._next(watched)
        if slot is None:
            self._missing[key] = watched
            return
        self._slots[key] = slot
        slot.assign(mean, var, count())

    def begun(self) -> Callable[[], Reading]:
        """Copy everything on the device, for a step gives its arguments away; return what moves it to the host."""
        layers = list({id(slot.watched): slot.watched for slot in self._slots.values()}.values())
        variables = [slot.state for slot in self._slots.values()]
        for watched in layers:
            variables += [watched.layer.moving_mean, watched.layer.moving_variance]
        arrays = self._backend.arrays(variables)
        copied, sizes = _joined(arrays), [int(array.size) for array in arrays]
        slots = tuple(self._slots.items())
        return lambda: _reading(np.split(np.asarray(copied), np.cumsum(sizes)[:-1]), slots, layers)

    @property
    def recorded(self) -> bool:
        """Return whether anything was ever stored."""
        return bool(self._slots)

    @property
    def outgrown(self) -> bool:
        """Return whether a call site was met for which there is no slot."""
        return bool(self._missing)

    def grow(self) -> None:
        """Make a slot for every call site that was met; the next trace finds all of them, in its order."""
        self._backend.synchronize()
        missing, self._missing = self._missing, {}
        for watched in missing.values():
            self._add(watched, 1)
        self._slots = {}

    def release(self) -> None:
        """Take everything off the model, which may be in the middle of an epoch or of nothing any more."""
        for layer, build in self._builds:
            layer.__dict__["build"] = build
        # what a step that failed has left is not to be had
        with suppress(Exception):
            self._backend.synchronize()
        for slot in [slot for slots in self._made.values() for slot in slots]:
            slot.remove()
        self._made, self._slots, self._missing, self._builds = {}, {}, {}, []

    def _add(self, watched: Watched, places: int) -> None:
        slots = self._made.setdefault(id(watched), [])
        slots += [Slot(watched, len(slots) + n, self._backend.library) for n in range(places)]

    def _next(self, watched: Watched) -> Slot | None:
        taken = {id(slot) for slot in self._slots.values()}
        return next((slot for slot in self._made.get(id(watched), ()) if id(slot) not in taken), None)


def _bits(array: Any) -> Any:
    return jax.lax.bitcast_convert_type(array.astype(jnp.float32), jnp.int32)


def _concatenated(arrays: Sequence[Any]) -> Any:
    """Return everything in one array: slots as they are, of running statistics the bits of their float32."""
    return jnp.concatenate([array if array.dtype == jnp.int32 else _bits(array) for array in arrays])


_joined = jax.jit(_concatenated)


def _reading(
    parts: Sequence[np.ndarray[Any, Any]], slots: Sequence[tuple[Hashable, Slot]], layers: Sequence[Watched]
) -> Reading:
    stored = tuple(
        Stored(key, slot.watched, *_moments(part), *map(int, part[-COUNTERS:]))
        for (key, slot), part in zip(slots, parts, strict=False)
    )
    running = [part.view(np.float32) for part in parts[len(slots) :]]
    pairs = zip(running[::2], running[1::2], strict=True)
    return Reading(stored, {id(watched): pair for watched, pair in zip(layers, pairs, strict=True)})


def _moments(part: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Return mean and variance."""
    return part[:-COUNTERS].view(np.float32).reshape(2, -1)
