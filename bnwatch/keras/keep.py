"""Batches that are kept for the experiments, as the user's pipeline composed them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from bnwatch.evidence import Examples, ExperimentNotPossibleError, class_indices

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray

    from bnwatch.evidence import Split
    from bnwatch.keras.backends.base import Guard

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
    inputs, targets, *_ = (*data, None) if isinstance(data, tuple | list) else (data, None)
    if targets is None or isinstance(targets, dict | list | tuple):
        what = "several targets" if targets is not None else "no targets"
        msg = f"the {origin} data have {what} for an example: the accuracy experiments need one class for each"
        raise ExperimentNotPossibleError(msg)
    return Batch(inputs, class_indices(array_of(targets)), origin, targets)


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


class HostKeeper:
    """Keeps the batch of a step where it is asked for before that step, and passes by on the host."""

    def __init__(self, guard: Guard, copied: Callable[[Any], Any | None]) -> None:
        """Ask for nothing yet.

        Args:
            guard: context that swallows an internal failure.
            copied: returns a copy of a batch in memory of its own, None of one that cannot be kept.
        """
        self.kept = Kept()
        self.wanted = False
        self._guard, self._copied = guard, copied
        self._batch: Any = None

    def want(self, *, wanted: bool) -> None:
        """Ask for the batch of the next step, or no longer."""
        self.wanted = wanted

    def note(self, batch: Any) -> None:
        """Take the batch of a step if it is asked for: a generator may fill its memory with the next."""
        if self.wanted:
            with self._guard("keeping a batch"):
                self._batch = self._copied(batch)

    def collect(self) -> None:
        """Keep the batch that was asked for."""
        batch, self._batch = self._batch, None
        if batch is not None:
            self.kept.add(batch)


def size(data: Any) -> int:
    """Return how many examples a batch holds."""
    return int(leaves(data)[0].shape[0])


def leaves(data: Any) -> list[Any]:
    """Return the arrays or tensors of a batch; what is None has none."""
    if data is None:
        return []
    if isinstance(data, dict):
        return [leaf for part in data.values() for leaf in leaves(part)]
    if isinstance(data, tuple | list):
        return [leaf for part in data for leaf in leaves(part)]
    return [data]


def mapped(function: Callable[[Any], Any], data: Any) -> Any:
    """Return the same nest with ``function`` of every array or tensor."""
    if data is None:
        return None
    if isinstance(data, dict):
        return {name: mapped(function, part) for name, part in data.items()}
    if isinstance(data, tuple | list):
        parts = [mapped(function, part) for part in data]
        return type(data)(*parts) if hasattr(data, "_fields") else type(data)(parts)
    return function(data)


def array_of(tensor: Any) -> NDArray[Any]:
    """Return an array or a tensor of any framework as an array."""
    return np.asarray(tensor.detach().cpu() if hasattr(tensor, "detach") else tensor)


def _bytes(data: Any) -> int:
    return sum(int(np.prod(leaf.shape)) * _item_bytes(leaf) for leaf in leaves(data))


def _item_bytes(leaf: Any) -> int:
    """Return the bytes of a number; TensorFlow tells them by its type, NumPy, JAX and torch by the array."""
    return int(getattr(leaf, "itemsize", None) or leaf.dtype.size)
