"""A device that is none: arrays that behave as CuPy's do towards the host, and say what is done to them.

`connect` puts `DeviceArray` where Chainer keeps the class of CuPy's arrays, so that Chainer's own functions for devices
(`backend.get_device_from_array`, `CpuDevice.send`, `backend.copyto`) take it for one. What it cannot show is what real
kernels compute, and what is asynchronous: that is for `benchmarks/gpu_check.py`, on a machine that has a GPU.
"""

from __future__ import annotations

from types import FunctionType, SimpleNamespace
from typing import Any

import chainer
import numpy as np
from chainer import backend
from chainer.backends import cuda

log: list[tuple[str, int]] = []
"""What was done, and on which device: ``kernel``, ``concatenate``, ``to host`` (which waits) or ``to device``."""

_current = [0]


class Device(cuda.Device):
    """Stands for `cupy.cuda.Device`."""

    def __init__(self, device: int = 0) -> None:
        self.id = int(device)

    def __enter__(self) -> None:
        _current.append(self.id)

    def __exit__(self, *error: object) -> None:
        _current.pop()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Device) and other.id == self.id

    def __hash__(self) -> int:
        return self.id


class DeviceArray:
    """Stands for `cupy.ndarray`; shape, type and views are free, as they are there."""

    __array_ufunc__ = None  # NumPy must not compute with it

    def __init__(self, values: Any, device: int = 0) -> None:
        self._values, self.device = np.asarray(values), Device(device)

    shape = property(lambda self: self._values.shape)
    dtype = property(lambda self: self._values.dtype)
    size = property(lambda self: self._values.size)
    ndim = property(lambda self: self._values.ndim)
    flags = property(lambda self: self._values.flags)

    def __len__(self) -> int:
        return len(self._values)

    def __getitem__(self, index: Any) -> DeviceArray:
        return DeviceArray(self._values[index], self.device.id)

    def ravel(self) -> DeviceArray:
        return DeviceArray(self._values.ravel(), self.device.id)

    def reshape(self, *shape: Any) -> DeviceArray:
        return DeviceArray(self._values.reshape(*shape), self.device.id)

    def get(self) -> np.ndarray:
        assert _current[-1] == self.device.id
        log.append(("to host", self.device.id))
        return np.array(self._values)

    def set(self, values: np.ndarray) -> None:
        log.append(("to device", self.device.id))
        self._values[...] = values

    def copy(self) -> DeviceArray:
        return self._kernel(np.array(self._values))

    def __sub__(self, other: Any) -> DeviceArray:
        return self._kernel(self._values - other._values)

    def __mul__(self, other: Any) -> DeviceArray:
        return self._kernel(self._values * other._values)

    def _kernel(self, values: Any) -> DeviceArray:
        assert _current[-1] == self.device.id, "launched on another device than that of its arrays"
        log.append(("kernel", self.device.id))
        return DeviceArray(values, self.device.id)

    def __array__(self, *_: Any, **__: Any) -> Any:
        msg = "Implicit conversion to a NumPy array is not allowed."
        raise TypeError(msg)

    def __float__(self) -> float:
        return float(self.get())

    def __bool__(self) -> bool:
        return bool(self.get())


def concatenate(arrays: list[DeviceArray]) -> DeviceArray:
    (device,) = {array.device.id for array in arrays}
    assert _current[-1] == device
    log.append(("concatenate", device))
    return DeviceArray(np.concatenate([array._values for array in arrays]), device)


def copyto(target: DeviceArray, source: DeviceArray) -> None:
    log.append(("kernel", target.device.id))
    target._values[...] = source._values


def connect(monkeypatch: Any) -> dict[int, Any]:
    """Let Chainer believe that it has CuPy, and return its random generators, by device."""
    generators: dict[int, Any] = {}
    get_random_state = FunctionType((lambda: None).__code__, {"_random_states": generators})
    cupy = SimpleNamespace(
        ndarray=DeviceArray,
        concatenate=concatenate,
        copyto=copyto,
        random=SimpleNamespace(get_random_state=get_random_state),
        get_array_module=lambda *arrays: cupy if any(isinstance(a, DeviceArray) for a in arrays) else np,
    )
    for name, value in {"available": True, "cudnn_enabled": True, "ndarray": DeviceArray, "Device": Device}.items():
        monkeypatch.setattr(cuda, name, value)
    monkeypatch.setattr(cuda, "cupy", cupy)
    monkeypatch.setattr(backend.GpuDevice, "xp", cupy)
    monkeypatch.setattr(backend.GpuDevice, "supported_array_types", (DeviceArray,))
    monkeypatch.setattr(chainer, "_array_types", None)  # remembered from the first time that somebody asks
    log.clear()
    return generators
