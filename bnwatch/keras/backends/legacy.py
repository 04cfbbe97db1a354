"""Keras 2: that of TensorFlow 2.15, and the package tf-keras.

The fused kernel, which images pass, blends the running statistics itself: the mean of a batch never is a tensor. It is
solved from the running statistics before and after the call, where they are assigned, and its variance is freed of
Bessel's correction. Elsewhere the layer shows what it measured.
"""

from __future__ import annotations

import threading
from contextlib import nullcontext
from importlib import import_module
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import tensorflow as tf

from bnwatch.keras.backends.tensorflow import TensorFlowBackend
from bnwatch.keras.backends.tensorflow.functions import TensorFlowFunctions
from bnwatch.keras.layers import walk

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from contextlib import AbstractContextManager

    from bnwatch.keras.backends.base import Functions, Guard, Record, Storage
    from bnwatch.keras.backends.tensorflow.keeper import TensorFlowKeeper
    from bnwatch.keras.layers import Watched
    from bnwatch.records import Source

OPS = SimpleNamespace(
    abs=tf.abs,
    all=tf.reduce_all,
    cast=tf.cast,
    convert_to_numpy=np.asarray,
    convert_to_tensor=tf.convert_to_tensor,
    equal=tf.equal,
    max=tf.reduce_max,
    maximum=tf.maximum,
    mean=tf.reduce_mean,
    ones=tf.ones,
    reshape=tf.reshape,
    shape=tf.shape,
    sqrt=tf.sqrt,
    square=tf.square,
    stack=tf.stack,
    var=tf.math.reduce_variance,
    where=tf.where,
    zeros=tf.zeros,
)
"""What the experiments need of ``keras.ops``, which Keras 2 lacks."""


class LegacyBackend(TensorFlowBackend):
    """Keras 2; statistics wait, and batches are kept, as for Keras 3 on TensorFlow."""

    def __init__(self, model: Any) -> None:
        """Bind to a model; nothing is touched."""
        super().__init__(model)
        self._guard: Guard = lambda _: nullcontext()
        self._steps: tuple[Any, int] = (None, 1)

    @property
    def ops(self) -> Any:
        """Return the array operations, under the names of ``keras.ops``."""
        return OPS

    # what cannot be watched

    def why_not(self) -> str | None:
        """Return in a sentence why training of this model cannot be watched; None when it can."""
        if not tf.compat.v1.executing_eagerly_outside_functions():
            return "TensorFlow 2 behaviour is switched off; this training goes on unwatched"
        return super().why_not()

    def why_not_layer(self, layer: Any) -> str | None:
        """Return why a layer that normalizes cannot be watched; None when it can."""
        kind = self.library.layers.BatchNormalization
        if not isinstance(layer, (kind, *(base for base in kind.__mro__ if base.__name__ == "BatchNormalizationBase"))):
            return f"{type(layer).__name__} is no {self.library.__name__}.layers.BatchNormalization"
        if layer.virtual_batch_size is not None:
            return f"it normalizes every {layer.virtual_batch_size} examples of a batch on their own"
        if isinstance(layer.axis, list | tuple) and len(layer.axis) > 1:
            return f"it keeps statistics along {len(layer.axis)} axes at once"
        if layer.fused is not False and _is_number(layer.momentum) and float(layer.momentum) == 1.0:
            return "with momentum 1.0 the fused kernel of Keras 2 shows nothing of the batch statistics"
        return None

    # the tap

    def storage(self, guard: Guard) -> Storage:
        """Return an empty storage."""
        self._guard = guard
        return super().storage(guard)

    def hooks(self, watched: Watched, record: Record) -> dict[str, Callable[..., Any]]:
        """Return methods to put on a layer, by name, that call ``record`` for every call in training mode."""
        return _Hooks(self, watched.layer, record, self._guard).methods()

    def source(self, layer: Any) -> Source:
        """Return how the batch statistics of a layer are had."""
        return "recovered" if layer.fused and _is_number(layer.momentum) else "measured"

    def bessel_corrected(self, layer: Any) -> bool:
        """Return whether the running variance of a layer is kept with m/(m-1)."""
        return bool(layer.fused)

    def saving(self) -> bool:
        """Return whether Keras traces the model for a file: what is recorded there would be in the file."""
        utilities = import_module(f"{self.library.__name__}.src.engine.base_layer_utils")
        return bool(utilities.call_context().saving)

    # training

    def functions(self) -> Functions:
        """Return the functions of the model."""
        return _Functions(self.model)

    @property
    def steps_per_execution(self) -> int:
        """Return how many steps one call of the train function takes; read from the device once."""
        variable = self.model._steps_per_execution  # noqa: SLF001 - Keras 2 has no other place
        if variable is None:
            return 1
        if variable is not self._steps[0] or self.model.autotune_steps_per_execution:
            self._steps = variable, int(variable.numpy())
        return self._steps[1]

    def examples_behind(self) -> int:
        """Return over how many examples the loss was averaged since the metrics were reset; 0 when unknown."""
        mean = getattr(getattr(self.model, "compiled_loss", None), "_total_loss_mean", None)
        return 0 if mean is None else int(mean.count.numpy())

    @property
    def evaluation_batches(self) -> int:
        """Return how many batches the evaluation that begins has; 0 when unknown."""
        return getattr(getattr(self.model, "_eval_data_handler", None), "_inferred_steps", None) or 0

    @property
    def evaluation_labels(self) -> Any | None:
        """Return the labels of the evaluation data where they are at hand as an array."""
        adapter = getattr(getattr(self.model, "_eval_data_handler", None), "_adapter", None)
        if type(adapter).__name__ != "TensorLikeDataAdapter":
            return None
        given = next((data for data in _pipeline(adapter.get_dataset()) if hasattr(data, "_tensors")), None)
        parts = None if given is None else tf.nest.pack_sequence_as(given.element_spec, given._tensors)  # noqa: SLF001
        return parts[1] if isinstance(parts, tuple) and len(parts) > 1 else None

    # experiments

    def quiet(self, body: Callable[..., Any], known: Sequence[Watched]) -> Callable[..., Any]:
        """Return ``body`` compiled, and without a trace in the model."""
        function = super().quiet(tf.autograph.experimental.do_not_convert(body), known)

        def quiet(*arguments: Any) -> Any:
            # tracing alone moves on the seeds that Keras 2 counts in Python
            seeds = [(source, source._seed) for source in self._random_sources()]  # noqa: SLF001
            try:
                return function(*arguments)
            finally:
                for source, seed in seeds:
                    source._seed = seed  # noqa: SLF001

        return quiet

    def _state(self) -> list[Any]:
        generators = (getattr(source, "_generator", None) for source in self._random_sources())
        return [*super()._state(), *(generator.state for generator in generators if generator is not None)]

    def _random_sources(self) -> list[Any]:
        found = (getattr(layer, "_random_generator", None) for _, layer in walk(self.model))
        return [source for source in found if hasattr(source, "_seed")]

    def calling(self, layer: Any) -> Callable[..., Any]:
        """Return the ``call`` of a layer as Keras calls it: with the control flow of users' layers converted."""
        own: Callable[..., Any] = layer._autographed_call()  # noqa: SLF001
        return own

    def loss(self, inputs: Any, targets: Any, predicted: Any) -> Any:
        """Return the loss that training would minimize on this batch."""
        return self.model.compute_loss(inputs, targets, predicted, None)

    def scaled(self, loss: Any) -> Any:
        """Return a loss as the optimizer scales it: a half-precision gradient that underflows would look like zero."""
        optimizer: Any = getattr(self.model, "optimizer", None)
        return optimizer.get_scaled_loss(loss) if hasattr(optimizer, "get_scaled_loss") else loss

    def batch_moments(self, layer: Any, inputs: Any, mask: Any) -> tuple[Any, Any, Any]:
        """Return mean, biased variance and elements per channel of what enters a layer, past the hooks of a tap."""
        inputs = tf.cast(inputs, layer.compute_dtype)
        mask = None if layer.fused else mask  # the fused kernel takes none
        wide = tf.cast(inputs, tf.float64 if inputs.dtype == tf.float64 else tf.float32)
        axes = [axis for axis in range(len(inputs.shape)) if axis not in layer.axis]
        if mask is None:
            mean, var = tf.nn.moments(wide, axes)
        else:
            weights = tf.expand_dims(tf.cast(mask, wide.dtype), -1)
            mean, var = tf.nn.weighted_moments(wide, axes, frequency_weights=weights)
        return mean, var, self.elements_per_channel(inputs, mask, int(mean.shape[0]))


class _Hooks:
    """The hooks of one layer, which see a call of it in several pieces."""

    def __init__(self, backend: LegacyBackend, layer: Any, record: Record, guard: Guard) -> None:
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
            if layer.fused and not self._backend.saving():
                with self._watching():
                    self._half(variable, unblended(value, variable, layer.momentum))
            return new_value(variable, value)

        def assign_moving_average(variable: Any, value: Any, *args: Any) -> Any:
            with self._watching():
                if layer.fused:
                    self._half(variable, value)
                elif variable is layer.moving_mean:  # with renorm the variance is assigned as a deviation
                    self._whole()
            return moving_average(variable, value, *args)

        return {
            "_fused_batch_norm": fused_batch_norm,
            "_moments": measured,
            "_assign_new_value": assign_new_value,
            "_assign_moving_average": assign_moving_average,
        }

    def _watching(self) -> AbstractContextManager[None]:
        return self._guard("recording batch statistics")

    def _whole(self) -> None:
        if not self._backend.saving():
            self._record(*self._call.moments, self._count)
        self._call.__dict__.clear()

    def _half(self, variable: Any, value: Any) -> None:
        """Take the mean of a batch, then its corrected variance."""
        if variable is self._layer.moving_mean:
            self._call.mean = value
        elif variable is self._layer.moving_variance and not self._backend.saving():
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


class _Functions(TensorFlowFunctions):
    """Keras 2 keeps the train function in a second place, and nothing lies between drawing a batch and the step."""

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        self._saved_inner, self._made_inner = model.train_tf_function, None

    def make(self, training: TensorFlowKeeper | None, evaluation: TensorFlowKeeper | None) -> None:
        """Make both functions; they are traced when they first run."""
        if not self._model.jit_compile:  # what XLA compiles stores nothing on the host
            _passing(self._model, "train_step", training)
            _passing(self._model, "test_step", evaluation)
        super().make(None, None)
        self._made_inner = self._model.train_tf_function

    def restore(self) -> None:
        """Put the functions back; those that somebody else made meanwhile are left to be made again without the tap."""
        super().restore()
        if self._model.train_tf_function is self._made_inner:
            self._model.train_tf_function = self._saved_inner


def _passing(model: Any, name: str, keeper: TensorFlowKeeper | None) -> None:
    """Have a step that the tap has wrapped pass its batches by a keeper; the tap takes both off again."""
    if keeper is None:
        return
    wrapped = model.__dict__[name]
    step = getattr(wrapped, "bnwatch_step", wrapped)
    passing = keeper.passing(step)
    passing.bnwatch_step, passing.bnwatch_tap = step, step.bnwatch_tap
    model.__dict__[name] = passing


def _pipeline(dataset: Any) -> Iterator[Any]:
    """Yield a dataset and all that it is made from."""
    yield dataset
    for source in dataset._inputs():  # noqa: SLF001
        yield from _pipeline(source)


def _is_number(momentum: Any) -> bool:
    """Return whether the fused kernel takes this momentum; by any other Keras blends the statistics itself."""
    return isinstance(momentum, int | float)
