"""Keep a few batches as the user's pipeline composed them, without drawing one more from it.

TensorFlow's trainer compiles two functions: an inner one for a step on a batch (under XLA where asked for), and an
outer one that draws the batch and calls the inner one. Between the two, in ordinary TensorFlow, the batch can be
stored: a flag on the host decides, and on the steps between nothing is copied.
"""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import keras
import numpy as np
import tensorflow as tf

from bnwatch.evidence import Examples, ExperimentNotPossibleError, class_indices
from bnwatch.keras.slots import outside_of_functions

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from contextlib import AbstractContextManager

    from bnwatch.evidence import Split

EXAMPLES = 2048
"""Examples kept of a split: a share of 1/2 is then known to about 2 percentage points."""
BYTES = 64 * 2**20
"""Memory that the kept batches of a split may take; the newest batch is kept whatever it takes."""


@dataclass(frozen=True, slots=True)
class Batch(Examples):
    """A batch together with its targets as the loss takes them."""

    targets: Any = None


def batch_of(data: Any, origin: str) -> Batch:
    """Return a batch of ``(inputs, targets)`` or ``(inputs, targets, weights)``.

    Raises:
        ExperimentNotPossibleError: the targets are no classes of single examples.
    """
    inputs, targets, _ = keras.utils.unpack_x_y_sample_weight(data)
    if targets is None or keras.tree.is_nested(targets):
        what = "several targets" if targets is not None else "no targets"
        msg = f"the {origin} data have {what} for an example: the accuracy experiments need one class for each"
        raise ExperimentNotPossibleError(msg)
    return Batch(inputs, class_indices(np.asarray(targets)), origin, targets)


class Kept:
    """The newest batches of a split, bounded in examples and in bytes."""

    def __init__(self) -> None:
        """Begin with none."""
        self._batches: list[Any] = []

    def add(self, data: Any) -> None:
        """Keep a batch, and give up the oldest ones that exceed the bounds."""
        self._batches.append(data)
        while len(self._batches) > 1 and (self.examples > EXAMPLES or self._bytes > BYTES):
            del self._batches[0]

    @property
    def examples(self) -> int:
        """Return how many examples are kept."""
        return sum(map(size, self._batches))

    @property
    def _bytes(self) -> int:
        return sum(map(_bytes, self._batches))

    @property
    def largest(self) -> int:
        """Return the examples of the largest batch kept; 0 when none is."""
        return max(map(size, self._batches), default=0)

    @property
    def full(self) -> bool:
        """Return whether one more batch would push out the oldest."""
        return (
            self.examples + self.largest > EXAMPLES or self._bytes + max(map(_bytes, self._batches), default=0) > BYTES
        )

    def batches(self, split: Split, limit: int) -> Sequence[Batch]:
        """Return the newest whole batches of at most ``limit`` examples, one at least, in the order they came.

        Raises:
            ExperimentNotPossibleError: none was kept, or their targets are no classes.
        """
        if not self._batches:
            msg = f"no {split} batch could be kept: give probe=(x, y)"
            raise ExperimentNotPossibleError(msg)
        chosen = [batch_of(self._batches[-1], split)]
        for data in reversed(self._batches[:-1]):
            if size(data) + sum(len(batch.labels) for batch in chosen) > limit:
                break
            chosen.append(batch_of(data, split))
        return chosen[::-1]


def size(data: Any) -> int:
    """Return how many examples a batch holds."""
    return int(next(leaf for leaf in keras.tree.flatten(data) if leaf is not None).shape[0])


def _bytes(data: Any) -> int:
    leaves = [leaf for leaf in keras.tree.flatten(data) if leaf is not None]
    return sum(int(np.prod(leaf.shape)) * tf.as_dtype(leaf.dtype).size for leaf in leaves)


class _Store:
    """Variables on the host that hold the last batch of one structure."""

    def __init__(self, data: Any) -> None:
        dtypes = [leaf.dtype for leaf in _tensors(data)]
        self.filled, *self.leaves = outside_of_functions(lambda: _variables(dtypes))
        # the structure alone is needed later on: tensors of a traced function must not outlive it
        self.like = keras.tree.map_structure(lambda leaf: None if leaf is None else leaf.dtype, data)

    def assign(self, data: Any) -> Any:
        writes = [variable.assign(leaf) for variable, leaf in zip(self.leaves, _tensors(data), strict=True)]
        with tf.control_dependencies([write.op for write in writes] if not tf.executing_eagerly() else []):
            self.filled.assign(True)
        return tf.constant(True)

    def take(self) -> Any | None:
        """Return the batch if one was stored since the last call, and let go of it."""
        if not bool(self.filled.numpy()):
            return None
        self.filled.assign(False)
        leaves = iter([variable.read_value() for variable in self.leaves])
        for variable in self.leaves:
            variable.assign(_nothing(variable.dtype))
        return keras.tree.map_structure(lambda dtype: None if dtype is None else next(leaves), self.like)


class Keeper:
    """Stores the batch of a step where the host asks for it before that step."""

    def __init__(self, guard: Callable[[str], AbstractContextManager[None]]) -> None:
        """Ask for nothing yet."""
        self.kept = Kept()
        self._guard = guard
        self._wanted = False
        self._eager: Any = None
        self._stores: dict[str, _Store] = {}
        with tf.device("CPU:0"):
            self._flag = tf.Variable(False, trainable=False, name="bnwatch_keep")

    @contextmanager
    def installed(self, model: Any) -> Iterator[None]:
        """Return a context in which functions that the model makes pass their batches by this keeper."""
        convert = getattr(model, "_autoconvert_optionals", None)
        if convert is None:
            yield
            return
        model.__dict__["_autoconvert_optionals"] = lambda step: convert(self._passing(step))
        try:
            yield
        finally:
            del model.__dict__["_autoconvert_optionals"]

    def want(self, *, wanted: bool) -> None:
        """Ask for the batch of the next step, or no longer."""
        if wanted != self._wanted:
            self._wanted = wanted
            self._flag.assign(wanted)

    @property
    def wanted(self) -> bool:
        """Return whether the next batch is asked for."""
        return self._wanted

    def collect(self) -> None:
        """Take the batch that was asked for."""
        found = [self._eager, *(store.take() for store in self._stores.values())]
        self._eager = None
        for data in found:
            if data is not None:
                self.kept.add(data)

    def _passing(self, step: Any) -> Any:
        def passing(data: Any) -> Any:
            with self._guard("keeping a batch"):
                self._offer(data)
            return step(data)

        return passing

    def _offer(self, data: Any) -> None:
        if not all(isinstance(leaf, tf.Tensor) for leaf in keras.tree.flatten(data) if leaf is not None):
            return
        if tf.executing_eagerly():
            self._eager = data if self._wanted else None
            return
        store = self._store(data)
        tf.cond(self._flag, lambda: store.assign(data), lambda: tf.constant(False))

    def _store(self, data: Any) -> _Store:
        like = str(keras.tree.map_structure(lambda leaf: None if leaf is None else leaf.dtype.name, data))
        if like not in self._stores:
            self._stores[like] = _Store(data)
        return self._stores[like]


def _tensors(data: Any) -> list[Any]:
    return [leaf for leaf in keras.tree.flatten(data) if leaf is not None]


def _variables(dtypes: list[Any]) -> list[Any]:
    """Return a flag and a variable of any shape for each type, on the host."""
    with tf.device("CPU:0"):
        leaves = [
            tf.Variable(_nothing(dtype), trainable=False, shape=tf.TensorShape(None), name="bnwatch_batch")
            for dtype in dtypes
        ]
        return [tf.Variable(False, trainable=False, name="bnwatch_filled"), *leaves]


def _nothing(dtype: Any) -> Any:
    return tf.fill((0,), "") if dtype == tf.string else tf.zeros((0,), dtype)
