"""Where the statistics of a call site wait on the device until a sampled step reads them."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import tensorflow as tf

from bnwatch.records import BatchStatistics, CallRecord, CallSite, RunningStatistics

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from bnwatch.keras.layers import Watched


T = TypeVar("T")


def outside_of_functions(create: Callable[[], T]) -> T:
    """Return what ``create`` returns, run outside of any function that TensorFlow is tracing.

    Variables made under ``tf.init_scope`` still pass the creators of the function being traced, and make TensorFlow
    trace it once more. Another thread stands in no scope at all.
    """
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(create).result()


class Slot:
    """The last batch statistics of one call site, in two variables that no Keras object tracks."""

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


@dataclass(frozen=True, slots=True)
class Reading:
    """Everything the slots held at one moment: rows parallel to the slots, statistics by layer."""

    slots: tuple[Slot, ...]
    moments: tuple[np.ndarray[Any, Any], ...]
    counts: np.ndarray[Any, Any]
    running: dict[int, tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]]

    def calls(self) -> dict[int, int]:
        """Return how often each slot was written, by its identity."""
        return {id(slot): int(row[1]) for slot, row in zip(self.slots, self.counts, strict=True)}


class Reader:
    """Reads all slots and running statistics with one transfer to the host."""

    def __init__(self, slots: Sequence[Slot]) -> None:
        """Take the slots to read, in the order of the forward pass."""
        self.slots = tuple(slots)
        self.layers = list({id(slot.watched): slot.watched for slot in slots}.values())
        self._gather = tf.function(self._concatenated)

    def read(self) -> Reading:
        """Return what the slots hold now."""
        flat, counts = (part.numpy() for part in self._gather())
        sizes = [2 * int(slot.moments.shape[1]) for slot in self.slots]
        sizes += [2 * int(watched.layer.moving_mean.shape[0]) for watched in self.layers]
        parts = [part.reshape(2, -1) for part in np.split(flat, np.cumsum(sizes)[:-1])]
        running = zip(self.layers, parts[len(self.slots) :], strict=True)
        return Reading(
            slots=self.slots,
            moments=tuple(parts[: len(self.slots)]),
            counts=counts.reshape(-1, 2),
            running={id(watched): (part[0], part[1]) for watched, part in running},
        )

    def _concatenated(self) -> tuple[Any, Any]:
        stored = [slot.moments for slot in self.slots]
        for watched in self.layers:
            stored += [watched.layer.moving_mean.value, watched.layer.moving_variance.value]
        flat = [tf.reshape(tf.cast(value, tf.float32), (-1,)) for value in stored]
        return tf.concat(flat, 0), tf.stack(
            [counter.read_value() for slot in self.slots for counter in (slot.elements, slot.calls)]
        )


def call_records(reading: Reading, before: dict[int, int]) -> tuple[CallRecord, ...]:
    """Return a record of every call site that was called since ``before``, the calls of an earlier reading."""
    calls = reading.calls()
    total: dict[int, int] = {}
    for slot in reading.slots:
        total[id(slot.watched)] = total.get(id(slot.watched), 0) + calls[id(slot)]
    records, index = [], dict[int, int]()
    for slot, (mean, var), count in zip(reading.slots, reading.moments, reading.counts[:, 0], strict=True):
        watched = slot.watched
        if calls[id(slot)] == before.get(id(slot), 0):
            continue
        site = index.setdefault(id(watched), 0)
        index[id(watched)] += 1
        spec = watched.spec()
        running_mean, running_var = reading.running[id(watched)]
        updates = None if watched.updates is None else watched.updates + total[id(watched)]
        records.append(
            CallRecord(
                spec=spec,
                site=CallSite(watched.path, site),
                batch=BatchStatistics(mean, var, int(count)),
                running=RunningStatistics(running_mean, running_var, spec.decay, updates, bessel_corrected=False),
            ),
        )
    return tuple(records)
