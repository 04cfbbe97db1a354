"""Padding, replicas and parts of a batch: statistics of something other than the batch the user thinks of."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import keras
import numpy as np
import tensorflow as tf
from keras import layers

from benchmarks.clinic.case import case
from benchmarks.clinic.data import digits
from benchmarks.clinic.keras_parts import batch_norm, compiled, mlp

if TYPE_CHECKING:
    from benchmarks.clinic.case import Run

STEPS = 40


def sequences(number: int, rng: np.random.Generator, *, longest: int = 10) -> tuple[Any, Any]:
    """Return sequences of 3 to ``longest`` of 40 steps, zeros behind; they lie around 2 or around 3, which is asked."""
    lengths = rng.integers(3, longest + 1, number)
    y = rng.integers(0, 2, number)
    x = 2.0 + y[:, None, None] + rng.normal(0.0, 1.0, (number, STEPS, 3))
    return (x * (np.arange(STEPS) < lengths[:, None])[:, :, None]).astype("float32"), y


def tagger(*, masking: bool) -> Any:
    """Return a classifier of sequences, which marks padding or does not."""
    x = inputs = keras.Input((STEPS, 3))
    if masking:
        x = layers.Masking()(x)
    for _ in range(2):
        x = layers.ReLU()(batch_norm()(layers.Conv1D(16, 3, padding="same")(x)))
    return keras.Model(inputs, layers.Dense(2)(layers.GlobalAveragePooling1D()(x)))


@case("BN-130", expects=("BN214", "BN207"), framework="keras")
def padding_by_length(run: Run) -> None:
    """Batches of like lengths, all padded to the longest; the mask is lost on the way to batch norm.

    https://github.com/cooijmanstim/recurrent-batch-normalization/issues/2; the padded share differs between batches,
    and with it what the same number is normalized to.
    """
    rng = np.random.default_rng(run.seed)
    x, y = sequences(1400, rng, longest=STEPS)
    xv, yv = sequences(400, rng, longest=STEPS)
    order = np.argsort((x != 0).any(-1).sum(-1), kind="stable").reshape(-1, 35)
    model = compiled(tagger(masking=True))
    run.fit(model, Bucketed(x, y, order, rng), validation_data=(xv, yv), epochs=8)
    run.subject(model, train=(x, y), evaluation=(xv, yv))


class Bucketed(keras.utils.PyDataset):
    """Batches of like lengths in random order."""

    def __init__(self, x: Any, y: Any, order: Any, rng: np.random.Generator) -> None:
        super().__init__()
        self.x, self.y, self.order, self.rng = x, y, order, rng

    def __len__(self) -> int:
        """Return the number of batches."""
        return len(self.order)

    def __getitem__(self, number: int) -> tuple[Any, Any]:
        """Return a batch."""
        rows = self.order[number]
        return self.x[rows], self.y[rows]

    def on_epoch_end(self) -> None:
        """Shuffle."""
        self.rng.shuffle(self.order)


@case("OK-12", expects=None, framework="keras")
def padding_alone(run: Run) -> None:
    """Zero-padded sequences that are well mixed: padding alone was harmless."""
    rng = np.random.default_rng(run.seed)
    x, y = sequences(1400, rng)
    xv, yv = sequences(400, rng)
    run.fit(compiled(tagger(masking=False)), x, y, validation_data=(xv, yv), epochs=8, batch_size=32)


@case("OK-12/masked", expects=None, framework="keras")
def padding_masked(run: Run) -> None:
    """Batches of like lengths whose mask reaches batch norm, which Keras then leaves padding out of."""
    rng = np.random.default_rng(run.seed)
    x, y = sequences(1400, rng, longest=STEPS)
    xv, yv = sequences(400, rng, longest=STEPS)
    order = np.argsort((x != 0).any(-1).sum(-1), kind="stable").reshape(-1, 35)
    h = inputs = keras.Input((STEPS, 3))
    h = layers.Masking()(h)
    for _ in range(2):
        h = layers.ReLU()(batch_norm()(layers.Dense(16)(h)))
    model = compiled(keras.Model(inputs, layers.Dense(2)(layers.GlobalAveragePooling1D()(h))))
    run.fit(model, Bucketed(x, y, order, rng), validation_data=(xv, yv), epochs=8)


@case("BN-135", expects="BN212", framework="keras")
def a_sensor_a_replica(run: Run) -> None:
    """Each replica normalizes its own shard: https://github.com/chainer/chainermn/issues/62."""
    cpu = tf.config.list_physical_devices("CPU")[0]
    tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)
    x, y, xv, yv = digits(flat=True)
    rows = np.arange(len(x)) % 64 < 32
    x[rows] = 2.0 * x[rows] + 1.0
    both = np.concatenate([xv, 2.0 * xv + 1.0]), np.concatenate([yv, yv])
    with tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"]).scope():
        model = compiled(mlp())
    run.fit(model, x, y, validation_data=both, epochs=8, batch_size=64, shuffle=False)


def accumulating(model: Any, parts: int) -> Any:
    """Return the model with a step that adds up the gradients of parts of the batch."""

    class Accumulating(keras.Model):
        def train_step(self, data: Any) -> Any:
            x, y = data
            variables = self.trainable_variables
            total = [tf.zeros_like(v) for v in variables]
            for xb, yb in zip(tf.split(x, parts), tf.split(y, parts), strict=True):
                with tf.GradientTape() as tape:
                    logits = self(xb, training=True)
                    loss = self.compute_loss(xb, yb, logits)
                total = [t + g / parts for t, g in zip(total, tape.gradient(loss, variables), strict=True)]
                for metric in self.metrics:
                    metric.update_state(*((loss,) if metric.name == "loss" else (yb, logits)))
            self.optimizer.apply(total, variables)
            return self.get_metrics_result()

    return Accumulating(model.inputs, model.outputs)


@case("BN-137", expects="BN213", framework="keras")
def sixteen_parts_of_two(run: Run) -> None:
    """Gradients of sixteen parts of two: https://github.com/andreped/GradientAccumulator/issues/6."""
    x, y, xv, yv = digits(flat=True)
    x, y = x[:1376], y[:1376]
    model = compiled(accumulating(mlp(), 16))
    run.fit(model, x, y, validation_data=(xv, yv), epochs=6, batch_size=32)


@case("BN-137/optimizer", expects=("BN213", "BN204"), framework="keras")
def accumulation_by_the_optimizer(run: Run) -> None:
    """``gradient_accumulation_steps=16`` at batch size 2: the optimizer sees 32 examples, batch norm sees 2."""
    x, y, xv, yv = digits(flat=True)
    optimizer = keras.optimizers.Adam(1e-3, gradient_accumulation_steps=16)
    run.fit(compiled(mlp(), optimizer=optimizer), x, y, validation_data=(xv, yv), epochs=4, batch_size=2)
