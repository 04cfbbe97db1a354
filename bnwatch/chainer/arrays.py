"""Arrays from any device, brought to the host together: one concatenation and one copy a device."""

from __future__ import annotations

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
    """Return copies on the host, in the same order, each of its own type and shape."""
    host: list[Any] = [None] * len(arrays)
    devices: dict[str, list[int]] = {}
    for index, array in enumerate(arrays):
        if isinstance(array, _ON_HOST):
            host[index] = np.array(array)
        else:
            devices.setdefault(backend.get_device_from_array(array).name, []).append(index)
    for indices in devices.values():
        group = [arrays[i] for i in indices]
        device = backend.get_device_from_array(group[0])
        if device.xp is np:  # iDeep's arrays live on the host
            flat = [np.array(array).ravel() for array in group]
            together = np.concatenate(flat)
        else:
            with device.create_context():
                together = backend.CpuDevice().send(device.xp.concatenate([array.ravel() for array in group]))
        start = 0
        for i, array in zip(indices, group, strict=True):
            part = together[start : start + array.size]
            host[i] = part.reshape(array.shape).astype(array.dtype)
            start += array.size
    return host


def to_float(value: Any) -> float:
    """Return a number, a Variable or an array (its mean) as a float."""
    return _scalar(to_host([array_of(value)])[0])


_ON_HOST = (np.ndarray, np.generic, float, int)


def _scalar(value: Any) -> float:
    return float(value.item() if getattr(value, "size", 0) == 1 else np.mean(value))


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

    def read(self) -> float | None:
        """Return the mean so far; None without values. Waits for the device."""
        if self._pending:
            elsewhere = [value for value in self._pending if not isinstance(value, _ON_HOST)]
            here = [value for value in self._pending if isinstance(value, _ON_HOST)]
            self._total += sum(map(_scalar, [*here, *to_host(elsewhere)]))
            self._count += len(self._pending)
            self._pending = []
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
