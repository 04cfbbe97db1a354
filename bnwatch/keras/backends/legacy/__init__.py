"""Keras 2: that of TensorFlow 2.15, and the package tf-keras."""

from __future__ import annotations

from contextlib import nullcontext
from importlib import import_module
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import tensorflow as tf

from bnwatch.keras.backends.legacy.functions import LegacyFunctions, draws_from_its_own_stream
from bnwatch.keras.backends.legacy.hooks import Hooks, is_number
from bnwatch.keras.backends.tensorflow import TensorFlowBackend
from bnwatch.keras.layers import walk

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from bnwatch.keras.backends.base import Functions, Guard, Record, Storage
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
    def symbolic(self) -> bool:
        """Return False: Keras 2 builds a layer without calling it."""
        return False

    @property
    def ops(self) -> Any:
        """Return the array operations, under the names of ``keras.ops``."""
        return OPS

    # what cannot be watched

    def why_not(self) -> str | None:
        """Return in a sentence why training of this model cannot be watched; None when it can."""
        if not tf.compat.v1.executing_eagerly_outside_functions():
            return "TensorFlow 2 behaviour is switched off; this training goes on unwatched"
        if self.model.distribute_strategy.num_replicas_in_sync > 1:
            return "bnwatch does not watch Keras 2 on several replicas; this training goes on unwatched"
        if draws_from_its_own_stream(self.model.train_function):
            return (
                "random numbers of Keras 2 come from a stream inside of the train function, which has run already, "
                "and watching would begin it anew: call compile() again; this training goes on unwatched"
            )
        return super().why_not()

    def why_not_layer(self, layer: Any) -> str | None:
        """Return why a layer that normalizes cannot be watched; None when it can."""
        own = self.library.layers.BatchNormalization
        # that of TensorFlow 1 and SyncBatchNormalization share its base alone
        kinds: Any = tuple(kind for kind in own.__mro__ if kind.__name__ in {own.__name__, "BatchNormalizationBase"})
        if not isinstance(layer, kinds):
            return f"{type(layer).__name__} is no {self.library.__name__}.layers.BatchNormalization"
        if layer.virtual_batch_size is not None:
            return f"it normalizes every {layer.virtual_batch_size} examples of a batch on their own"
        if isinstance(layer.axis, list | tuple) and len(layer.axis) > 1:
            return f"it keeps statistics along {len(layer.axis)} axes at once"
        if layer.fused is not False and is_number(layer.momentum) and float(layer.momentum) == 1.0:
            return "with momentum 1.0 the fused kernel of Keras 2 shows nothing of the batch statistics"
        return None

    def own_way(self, layer: Any) -> None:  # noqa: ARG002
        """Return None: whether a call is one of training may not be known before it runs."""
        return

    # the tap

    def storage(self, guard: Guard) -> Storage:
        """Return an empty storage."""
        self._guard = guard
        return super().storage(guard)

    def hooks(self, watched: Watched, record: Record) -> dict[str, Callable[..., Any]]:
        """Return methods to put on a layer, by name, that call ``record`` for every call in training mode."""
        return Hooks(self, watched.layer, record, self._guard).methods()

    def source(self, layer: Any) -> Source:
        """Return how the batch statistics of a layer are had."""
        return "recovered" if layer.fused and is_number(layer.momentum) else "measured"

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
        return LegacyFunctions(self.model)

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
        adapter: Any = getattr(getattr(self.model, "_eval_data_handler", None), "_adapter", None)
        if type(adapter).__name__ != "TensorLikeDataAdapter":
            return None
        given = next((data for data in _pipeline(adapter.get_dataset()) if hasattr(data, "_tensors")), None)
        parts = None if given is None else tf.nest.pack_sequence_as(given.element_spec, given._tensors)  # noqa: SLF001
        return parts[1] if isinstance(parts, tuple) and len(parts) > 1 else None

    # experiments

    def quiet(self, body: Callable[..., Any], known: Sequence[Watched]) -> Callable[..., Any]:
        """Return ``body`` compiled, and without a trace in the model."""
        function = super().quiet(body, known)

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


def _pipeline(dataset: Any) -> Iterator[Any]:
    """Yield a dataset and all that it is made from."""
    yield dataset
    for source in dataset._inputs():  # noqa: SLF001
        yield from _pipeline(source)
