"""Arrays from any device, brought to the host together: one concatenation and one copy a device."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any

import numpy as np
from chainer import backend

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray


def array_of(value: Any) -> Any:
    """Return the array of a Variable, or the value itself, so that no computational graph is kept alive."""
    return getattr(value, "array", value)


def to_host(arrays: Sequence[Any]) -> list[NDArray[Any]]:
    """Return copies on the host, in the same order, each of its own type and shape.

    Floating-point arrays of one device come together: the widest type holds the others exactly. Integers come apart
    from them, as no floating-point type holds all of them.
    """
    host: list[Any] = [None] * len(arrays)
    groups: dict[tuple[str, str], list[int]] = {}
    for index, array in enumerate(arrays):
        device = None if isinstance(array, _ON_HOST) else backend.get_device_from_array(array)
        if device is None or device.xp is np:  # iDeep's arrays live on the host
            host[index] = np.array(array)
        else:
            kind = "f" if array.dtype.kind == "f" else array.dtype.str
            groups.setdefault((device.name, kind), []).append(index)
    for indices in groups.values():
        group = [arrays[i] for i in indices]
        device = backend.get_device_from_array(group[0])
        with device.create_context():
            flat = [array.ravel() for array in group]
            together = backend.CpuDevice().send(flat[0] if len(flat) == 1 else device.xp.concatenate(flat))
        start = 0
        for i, array in zip(indices, group, strict=True):
            part = together[start : start + array.size]
            host[i] = part.reshape(array.shape).astype(array.dtype)
            start += array.size
    return host


def collect(arrays: Sequence[Any], *averages: Average) -> list[NDArray[Any]]:
    """Return copies of the arrays on the host, and settle the averages: with one copy a device for all of them."""
    waiting = [average.take() for average in averages]
    host = to_host([*arrays, *itertools.chain.from_iterable(waiting)])
    start = len(arrays)
    for average, values in zip(averages, waiting, strict=True):
        average.settle(host[start : start + len(values)])
        start += len(values)
    return host[: len(arrays)]


def to_float(value: Any) -> float:
    """Return a number, a Variable or an array (its mean) as a float."""
    return _scalar(to_host([array_of(value)])[0])


_ON_HOST = (np.ndarray, np.generic, float, int)


def _scalar(value: NDArray[Any]) -> float:
    return float(value.item() if value.size == 1 else np.mean(value))


class Average:
    """A mean over steps. Values are kept as they are given and read together, so that no device waits for them."""

    def __init__(self) -> None:
        self._pending: list[Any] = []
        self._total = 0.0
        self._count = 0

    def add(self, value: Any) -> None:
        """Take in one value; None is none."""
        if value is not None:
            self._pending.append(array_of(value))

    def take(self) -> list[Any]:
        """Return the values that wait to be read, wherever they are, for `settle`."""
        waiting, self._pending = self._pending, []
        return waiting

    def settle(self, values: Sequence[NDArray[Any]]) -> None:
        """Take in values that came to the host."""
        self._total += sum(map(_scalar, values))
        self._count += len(values)

    def read(self) -> float | None:
        """Return the mean so far; None without values. Waits for the device."""
        collect((), self)
        return self._total / self._count if self._count else None

    @property
    def memory(self) -> tuple[float, int, list[float]]:
        """Return total and count of what was read, and what was not: adding up earlier would round otherwise."""
        return self._total, self._count, [_scalar(value) for value in to_host(self._pending)]

    def recall(self, memory: tuple[float, int, list[float]]) -> None:
        """Go on from a `memory`."""
        self._total, self._count, self._pending = memory[0], memory[1], list(memory[2])

    def clear(self) -> None:
        """Begin anew."""
        self._pending, self._total, self._count = [], 0.0, 0
