"""Keep a few batches as the user's pipeline composed them, without drawing one more from it.

TensorFlow's trainer compiles two functions: an inner one for a step on a batch (under XLA where asked for), and an
outer one that draws the batch and calls the inner one. Between the two, in ordinary TensorFlow, the batch can be
stored: a flag on the host decides, and on the steps between nothing is copied.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import tensorflow as tf

from bnwatch.keras.backends.tensorflow.slots import outside_of_functions
from bnwatch.keras.keep import Kept, leaves, mapped

if TYPE_CHECKING:
    from collections.abc import Callable

    from bnwatch.keras.backends.base import Guard
    from bnwatch.keras.backends.tensorflow.replicas import Replicas


class _Store:
    """Variables on the host that hold the last batch of one structure."""

    def __init__(self, data: Any) -> None:
        dtypes = [leaf.dtype for leaf in leaves(data)]
        self.filled, *self.leaves = outside_of_functions(lambda: _variables(dtypes))
        # the structure alone is needed later on: tensors of a traced function must not outlive it
        self.like = mapped(lambda leaf: leaf.dtype, data)

    def assign(self, data: Any) -> Any:
        writes = [variable.assign(leaf) for variable, leaf in zip(self.leaves, leaves(data), strict=True)]
        with tf.control_dependencies([write.op for write in writes] if not tf.executing_eagerly() else []):
            self.filled.assign(True)
        return tf.constant(True)

    def take(self) -> Any | None:
        """Return the batch if one was stored since the last call, and let go of it."""
        if not bool(self.filled.numpy()):
            return None
        self.filled.assign(False)
        values = iter([variable.read_value() for variable in self.leaves])
        for variable in self.leaves:
            variable.assign(_nothing(variable.dtype))
        return mapped(lambda _: next(values), self.like)


class TensorFlowKeeper:
    """Stores the batch of a step where the host asks for it before that step."""

    def __init__(self, guard: Guard, replicas: Replicas) -> None:
        """Ask for nothing yet."""
        self.kept = Kept()
        self._guard = guard
        self._wanted = False
        self._replicas = replicas
        self._eager: dict[int, Any] = {}
        self._stores: dict[tuple[str, int], _Store] = {}
        with tf.device("CPU:0"):
            self._flag = tf.Variable(False, trainable=False, name="bnwatch_keep")

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
        found = [*self._eager.values(), *(store.take() for store in self._stores.values())]
        self._eager.clear()
        for data in found:
            if data is not None:
                self.kept.add(data)

    def passing(self, step: Callable[[Any], Any]) -> Any:
        """Return a step on a batch that has the batch stored first where it is asked for."""

        def passing(data: Any) -> Any:
            self.offer(data)
            return step(data)

        return tf.autograph.experimental.do_not_convert(passing)

    def offer(self, data: Any) -> None:
        """Store a batch where it is asked for; called for each replica, or once for all of them."""
        with self._guard("keeping a batch"):
            for replica, part in self._replicas.parts(data).items():
                self._offer_part(part, replica)

    def _offer_part(self, data: Any, replica: int) -> None:
        # Keras turns what a generator gives as None into an empty Optional
        data = mapped(lambda leaf: None if isinstance(leaf, tf.experimental.Optional) else leaf, data)
        if not all(isinstance(leaf, tf.Tensor) for leaf in leaves(data)):
            return
        if tf.executing_eagerly():
            if self._wanted:
                self._eager[replica] = data
            return
        store = self._store(data, replica)
        tf.cond(self._flag, lambda: store.assign(data), lambda: tf.constant(False))

    def _store(self, data: Any, replica: int) -> _Store:
        like = (str(mapped(lambda leaf: leaf.dtype.name, data)), replica)
        if like not in self._stores:
            self._stores[like] = _Store(data)
        return self._stores[like]


def _variables(dtypes: list[Any]) -> list[Any]:
    """Return a flag and a variable of any shape for each type, on the host."""
    with tf.device("CPU:0"):
        stores = [
            tf.Variable(_nothing(dtype), trainable=False, shape=tf.TensorShape(None), name="bnwatch_batch")
            for dtype in dtypes
        ]
        return [tf.Variable(False, trainable=False, name="bnwatch_filled"), *stores]


def _nothing(dtype: Any) -> Any:
    return tf.fill((0,), "") if dtype == tf.string else tf.zeros((0,), dtype)
