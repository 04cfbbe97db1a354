"""Where the statistics of a call site wait on the device until a sampled step reads them."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import tensorflow as tf

from bnwatch.keras.backends.base import Reading, Stored

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Sequence

    from bnwatch.keras.layers import Watched


T = TypeVar("T")


def outside_of_functions(create: Callable[[], T]) -> T:
    """Return what ``create`` returns, run outside of any function that TensorFlow is tracing.

    Variables made under ``tf.init_scope`` still pass the creators of the function being traced, and make TensorFlow
    trace it once more. Another thread stands in no scope at all.
    """
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(create).result()


def raw(variable: Any) -> Any:
    """Return the TensorFlow variable behind a variable of Keras 3; one of Keras 2 is its own."""
    return variable if isinstance(variable, tf.Variable) else variable.value


class Slot:
    """The last batch statistics of one call site, in variables that no Keras object tracks."""

    def __init__(self, watched: Watched, channels: int) -> None:
        """Create the variables outside of any function that is being traced."""
        self.watched = watched
        self.moments, self.elements, self.calls = outside_of_functions(
            lambda: (
                tf.Variable(tf.zeros((2, channels)), trainable=False, name="bnwatch_moments"),
                tf.Variable(tf.zeros((), tf.int64), trainable=False, name="bnwatch_elements"),
                tf.Variable(tf.zeros((), tf.int64), trainable=False, name="bnwatch_calls"),
            )
        )

    def assign(self, mean: Any, var: Any, count: Any) -> None:
        """Store the statistics of a call and count it; runs eagerly or becomes part of the function being traced.

        Every step pays for each operation here, so there are few: no gradient passes an assignment, and a count that
        is known when the function is traced is a constant.
        """
        self.moments.assign(tf.reshape(tf.cast(tf.stack([mean, var]), tf.float32), self.moments.shape))
        self.elements.assign(tf.cast(count, tf.int64))
        self.calls.assign_add(1)


def elements_per_channel(inputs: Any, mask: Any, channels: int) -> Any:
    """Return over how many elements a channel's statistics are taken; masked elements do not count."""
    if mask is None and inputs.shape.is_fully_defined():
        return inputs.shape.num_elements() // channels
    if mask is None:
        return tf.size(inputs, out_type=tf.int64) // channels
    kept = tf.broadcast_to(tf.expand_dims(tf.cast(mask, tf.bool), -1), tf.shape(inputs))
    return tf.math.count_nonzero(kept) // channels


class Slots:
    """The slots of a model, made when a call site is first met: a function that is being traced can take them in."""

    outgrown = False

    def __init__(self) -> None:
        """Begin with none."""
        self._slots: dict[Hashable, Slot] = {}
        self._reader: _Reader | None = None

    def put(self, key: Hashable, watched: Watched, mean: Any, var: Any, count: Callable[[], Any]) -> None:
        """Store the statistics of a call and count it."""
        slot = self._slots.get(key)
        if slot is None:
            slot = self._slots[key] = Slot(watched, int(watched.layer.moving_mean.shape[0]))
            self._reader = None
        slot.assign(mean, var, count())

    def read(self) -> Reading:
        """Return what is stored now."""
        if self._reader is None:
            self._reader = _Reader(tuple(self._slots.items()))
        return self._reader.read()

    @property
    def recorded(self) -> bool:
        """Return whether anything was ever stored."""
        return bool(self._slots)

    def grow(self) -> None:
        """Nothing is to be made ahead."""

    def release(self) -> None:
        """Nothing hangs on the model."""


class _Reader:
    """Reads all slots and running statistics with one transfer to the host."""

    def __init__(self, slots: Sequence[tuple[Hashable, Slot]]) -> None:
        self._slots = slots
        self._layers = list({id(slot.watched): slot.watched for _, slot in slots}.values())
        self._gather = tf.function(self._concatenated)

    def read(self) -> Reading:
        flat, counts = (part.numpy() for part in self._gather())
        sizes = [2 * int(slot.moments.shape[1]) for _, slot in self._slots]
        sizes += [2 * int(watched.layer.moving_mean.shape[0]) for watched in self._layers]
        parts = [part.reshape(2, -1) for part in np.split(flat, np.cumsum(sizes)[:-1])]
        rows = zip(self._slots, parts, counts.reshape(-1, 2), strict=False)
        stored = tuple(
            Stored(key, slot.watched, mean, var, int(elements), int(calls))
            for (key, slot), (mean, var), (elements, calls) in rows
        )
        running = zip(self._layers, parts[len(self._slots) :], strict=True)
        return Reading(stored, {id(watched): (mean, var) for watched, (mean, var) in running})

    def _concatenated(self) -> tuple[Any, Any]:
        values = [slot.moments for _, slot in self._slots]
        for watched in self._layers:
            values += [raw(watched.layer.moving_mean), raw(watched.layer.moving_variance)]
        flat = [tf.reshape(tf.cast(value, tf.float32), (-1,)) for value in values]
        counters = [counter.read_value() for _, slot in self._slots for counter in (slot.elements, slot.calls)]
        return tf.concat(flat, 0), tf.stack(counters)
