"""Where the statistics of a call site wait on the device until a sampled step reads them."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, TypeVar
from weakref import WeakKeyDictionary

import numpy as np
import tensorflow as tf

from bnwatch.keras.backends.base import Deferred, Reading, Stored

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Mapping

    from bnwatch.keras.backends.tensorflow.replicas import Replicas
    from bnwatch.keras.layers import Watched


T = TypeVar("T")

WORDS, WORD = 2, 2**24
"""Numbers that a count takes, and the first integer beyond each of them."""


def outside_of_functions(create: Callable[[], T]) -> T:
    """Return what ``create`` returns, run outside of any function that TensorFlow is tracing.

    Variables made under ``tf.init_scope`` still pass the creators of the function being traced, and make TensorFlow
    trace it once more. Another thread stands in no scope at all, nor in that of a distribution strategy.
    """
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(create).result()


def raw(variable: Any) -> Any:
    """Return the TensorFlow variable behind a variable of Keras 3; one of Keras 2 is its own."""
    return variable if isinstance(variable, tf.Variable) else variable.value


def copies(variable: Any) -> tuple[Any, ...]:
    """Return the TensorFlow variables behind a variable: one for each replica that this process runs."""
    found = raw(variable)
    return tuple(getattr(found, "values", None) or (found,))


class Slot:
    """The last batch statistics of one call site on one replica, in a variable that no Keras object tracks."""

    def __init__(self, watched: Watched, replica: int, variable: Any) -> None:
        """Take a variable that holds mean, variance and the words of the count."""
        self.watched, self.replica, self.variable = watched, replica, variable
        self.counters: list[Any] = []
        self.eager_calls = 0

    def assign(self, mean: Any, var: Any, count: Any) -> None:
        """Store the statistics of a call; runs eagerly or becomes part of the function being traced.

        Every step pays for each operation here, so there are few: no gradient passes an assignment, and a count that
        is known when the function is traced is a constant. A count has no place in one float32 beyond 2^24.
        """
        parts = [tf.reshape(tf.cast(part, tf.float32), (-1,)) for part in (mean, var)]
        self.variable.assign(tf.concat([*parts, _words(count)], 0))


def _words(count: Any) -> Any:
    """Return a count as two numbers that a float32 holds exactly.

    Its bits would not do: as a float32 they are denormal, and XLA takes a constant that differs from 0 by that for 0.
    """
    if isinstance(count, int):
        return np.array([count % WORD, count // WORD], np.float32)
    wide = tf.cast(count, tf.int64)
    return tf.cast(tf.stack([wide % WORD, wide // WORD]), tf.float32)


def elements_per_channel(inputs: Any, mask: Any, channels: int) -> Any:
    """Return over how many elements a channel's statistics are taken; masked elements do not count."""
    if mask is None and inputs.shape.is_fully_defined():
        return inputs.shape.num_elements() // channels
    if mask is None:
        return tf.size(inputs, out_type=tf.int64) // channels
    kept = tf.broadcast_to(tf.expand_dims(tf.cast(mask, tf.bool), -1), tf.shape(inputs))
    return tf.math.count_nonzero(kept) // channels


class Slots(Deferred):
    """The slots of a model, made when a call site is first met: a function that is being traced can take them in."""

    outgrown = False

    def __init__(self, replicas: Replicas) -> None:
        """Begin with none."""
        self._replicas = replicas
        self._slots: dict[tuple[Hashable, int], Slot] = {}
        self._counters: WeakKeyDictionary[Any, dict[int, Any]] = WeakKeyDictionary()
        self._reader: _Reader | None = None

    def put(self, key: Hashable, watched: Watched, mean: Any, var: Any, count: Callable[[], Any]) -> None:
        """Store the statistics of a call and count it."""
        replica = self._replicas.here()
        slot = self._slots.get((key, replica))
        if slot is None:
            size = 2 * int(watched.layer.moving_mean.shape[0]) + WORDS
            slot = self._slots[key, replica] = Slot(watched, replica, self._variable(lambda: tf.zeros(size), replica))
            self._reader = None
        slot.assign(mean, var, count())
        self._count(slot)

    def _count(self, slot: Slot) -> None:
        """Count a call: whatever is called in one graph is called together, so one counter does for all of it."""
        if tf.executing_eagerly():
            slot.eager_calls += 1
            return
        counters = self._counters.setdefault(tf.compat.v1.get_default_graph(), {})
        if slot.replica not in counters:
            counters[slot.replica] = self._variable(lambda: tf.zeros((), tf.int64), slot.replica)
            counters[slot.replica].assign_add(1)
        if not any(counter is counters[slot.replica] for counter in slot.counters):
            slot.counters.append(counters[slot.replica])
            self._reader = None

    def _variable(self, initial: Callable[[], Any], replica: int) -> Any:
        device = self._replicas.device(replica)

        def create() -> Any:
            with tf.device(device):
                return tf.Variable(initial(), trainable=False, name="bnwatch")

        return outside_of_functions(create)

    def begun(self) -> Callable[[], Reading]:
        """Copy everything on the device; return what moves it to the host."""
        if self._reader is None:
            self._reader = _Reader(self._slots, self._replicas)
        return self._reader.begin()

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

    def __init__(self, slots: Mapping[tuple[Hashable, int], Slot], replicas: Replicas) -> None:
        # one replica after the other, each in the order of its forward pass
        self._slots = sorted(((key, slot) for (key, _), slot in slots.items()), key=lambda item: item[1].replica)
        self._replicas = replicas
        self._running = list({(id(slot.watched), slot.replica): slot.watched for _, slot in self._slots}.items())
        self._counters = list({id(counter): counter for _, slot in self._slots for counter in slot.counters}.values())
        self._gather = tf.function(self._concatenated)

    def begin(self) -> Callable[[], Reading]:
        """Copy everything on the device, and return what moves it to the host."""
        copied, eager = self._gather(), [slot.eager_calls for _, slot in self._slots]
        return lambda: self._reading(copied, eager)

    def _reading(self, copied: Any, eager: list[int]) -> Reading:
        sizes = [slot.variable.shape[0] for _, slot in self._slots]
        sizes += [2 * int(watched.layer.moving_mean.shape[0]) for _, watched in self._running]
        *parts, counted = np.split(copied.numpy(), np.cumsum(sizes))
        calls = dict(zip(map(id, self._counters), counted.view(np.int64).tolist(), strict=True))
        rows = [part.reshape(2, -1) for part in parts[len(self._slots) :]]
        running = {place: (mean, var) for (place, _), (mean, var) in zip(self._running, rows, strict=True)}
        stored = tuple(
            Stored(
                key,
                slot.watched,
                mean=part[: len(part) // 2 - 1],
                var=part[len(part) // 2 - 1 : -WORDS],
                count=int(part[-2]) + WORD * int(part[-1]),
                # a graph that was traced since has counted nothing then
                calls=called + sum(calls.get(id(counter), 0) for counter in slot.counters),
                replica=slot.replica,
                running=running[id(slot.watched), slot.replica],
            )
            for (key, slot), part, called in zip(self._slots, parts, eager, strict=False)
        )
        first = {watched: statistics for (watched, replica), statistics in running.items() if not replica}
        return Reading(self._replicas.counted_together(stored), first)

    def _concatenated(self) -> Any:
        values = [slot.variable for _, slot in self._slots]
        for (_, replica), watched in self._running:
            values += [_copy(watched.layer.moving_mean, replica), _copy(watched.layer.moving_variance, replica)]
        values += [tf.bitcast(counter, tf.float32) for counter in self._counters]
        return tf.concat([tf.cast(value, tf.float32) for value in values], 0)


def _copy(variable: Any, replica: int) -> Any:
    found = copies(variable)
    return found[min(replica, len(found) - 1)]
