"""The hooks on a layer of Keras 2, and what they solve for.

The fused kernel, which images pass, blends the running statistics itself: the mean of a batch never is a tensor. It is
solved from the running statistics before and after the call, where they are assigned, and its variance is freed of
Bessel's correction. Elsewhere the layer shows what it measured.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

import numpy as np
import tensorflow as tf

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import AbstractContextManager

    from bnwatch.keras.backends.base import Guard, Record
    from bnwatch.keras.backends.legacy import LegacyBackend


class Hooks:
    """The hooks of one layer, which see a call of it in several pieces."""

    def __init__(self, backend: LegacyBackend, layer: Any, record: Record, guard: Guard) -> None:
        """Take what ``record`` is called for; nothing is put on the layer."""
        self._backend, self._layer, self._guard = backend, layer, guard
        self._record = tf.autograph.experimental.do_not_convert(record)
        # replicas of a model run in threads of their own
        self._call = threading.local()

    def methods(self) -> dict[str, Callable[..., Any]]:
        """Return the hooks by the names of the methods that they stand for."""
        layer, call = self._layer, self._call
        fused, moments = layer._fused_batch_norm, layer._moments  # noqa: SLF001
        new_value, moving_average = layer._assign_new_value, layer._assign_moving_average  # noqa: SLF001

        def fused_batch_norm(inputs: Any, *args: Any, **kwargs: Any) -> Any:
            call.inputs, call.mask = inputs, None  # the fused kernel takes no mask
            try:
                return fused(inputs, *args, **kwargs)
            finally:
                call.__dict__.clear()

        def measured(inputs: Any, *args: Any, **kwargs: Any) -> Any:
            call.moments = moments(inputs, *args, **kwargs)
            call.inputs, call.mask = inputs, kwargs.get("mask")
            return call.moments

        def assign_new_value(variable: Any, value: Any) -> Any:
            with self._watching():
                if layer.fused and not self._backend.saving():
                    self._half(variable, unblended(value, variable, layer.momentum))
            return new_value(variable, value)

        def assign_moving_average(variable: Any, value: Any, *args: Any) -> Any:
            with self._watching():
                if layer.fused and not self._backend.saving():
                    self._half(variable, value)
                elif variable is layer.moving_mean and not self._backend.saving():
                    # once for both: with renorm the variance is assigned as a deviation
                    self._record(*call.moments, self._count)
                    call.__dict__.clear()
            return moving_average(variable, value, *args)

        return {
            "_fused_batch_norm": fused_batch_norm,
            "_moments": measured,
            "_assign_new_value": assign_new_value,
            "_assign_moving_average": assign_moving_average,
        }

    def _watching(self) -> AbstractContextManager[None]:
        return self._guard("recording batch statistics")

    def _half(self, variable: Any, value: Any) -> None:
        """Take the mean of a batch, then its corrected variance."""
        if variable is self._layer.moving_mean:
            self._call.mean = value
        elif variable is self._layer.moving_variance:
            self._record(self._call.mean, biased(value, self._count()), self._count)

    def _count(self) -> Any:
        channels = int(self._layer.moving_mean.shape[0])
        return self._backend.elements_per_channel(self._call.inputs, self._call.mask, channels)


def unblended(new: Any, variable: Any, momentum: float) -> Any:
    """Return the statistics of a batch, given what the running ones become by it and, in the variable, what they were.

    The kernel rounds ``1 - momentum`` to float32, so it is rounded here.
    """
    weight = np.float32(1.0 - momentum)
    if weight == 1.0:
        return new
    return (new - (np.float32(1.0) - weight) * tf.convert_to_tensor(variable)) / weight


def biased(var: Any, count: Any) -> Any:
    """Return a variance over ``count`` elements without the correction of the fused kernel, m/max(m-1, 1)."""
    if isinstance(count, int):
        return var * np.float32(max(count - 1, 1) / max(count, 1))
    elements = tf.cast(count, tf.float32)
    return var * tf.math.divide_no_nan(tf.maximum(elements - 1.0, 1.0), elements)


def is_number(momentum: Any) -> bool:
    """Return whether the fused kernel takes this momentum; by any other Keras blends the statistics itself."""
    return isinstance(momentum, int | float)
