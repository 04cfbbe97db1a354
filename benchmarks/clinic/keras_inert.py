"""Batch normalization that runs in inference mode while the network trains."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import keras
import numpy as np
import tensorflow as tf
from keras import layers

from benchmarks.clinic.case import case
from benchmarks.clinic.data import digits
from benchmarks.clinic.keras_nets import classifying

if TYPE_CHECKING:
    from benchmarks.clinic.case import Run


@case("BN-041", expects="BN104", framework="keras", fast=True)
def never_in_training_mode(run: Run) -> None:
    """The flag is written out as False; https://github.com/keras-team/keras-io/issues/198."""
    data = digits(raw=True)

    class Net(keras.Model):
        def __init__(self) -> None:
            super().__init__()
            self.convolutions = [layers.Conv2D(width, 3, padding="same") for width in (16, 32, 32)]
            self.norms = [layers.BatchNormalization() for _ in range(3)]
            self.pool, self.flatten, self.head = layers.MaxPooling2D(), layers.Flatten(), layers.Dense(10)

        def call(self, x: Any) -> Any:
            for convolution, norm in zip(self.convolutions, self.norms, strict=True):
                x = keras.ops.relu(norm(convolution(x), training=False))
            return self.head(self.flatten(self.pool(x)))

    model = classifying(Net(), 3e-3)
    run.fit(model, data.x, data.y, validation_data=(data.xv, data.yv), epochs=5, batch_size=64)


@case("BN-044", expects="BN104", framework="keras")
def flag_not_passed(run: Run) -> None:
    """A loop by hand does not pass the flag, the net is depthwise.

    https://github.com/michalfaber/tensorflow_Realtime_Multi-Person_Pose_Estimation/issues/13
    """
    data, rng = digits(), np.random.default_rng(run.seed)
    inputs = x = keras.Input((8, 8, 1))
    for number, width in enumerate((16, 32, 32)):
        if number:
            x = layers.DepthwiseConv2D(3, padding="same", use_bias=False)(x)
            x = layers.ReLU()(layers.BatchNormalization()(x))
        x = layers.Conv2D(width, 1 if number else 3, padding="same", use_bias=False)(x)
        x = layers.ReLU()(layers.BatchNormalization()(x))
    outputs = layers.Dense(10)(layers.GlobalAveragePooling2D()(x))
    model = keras.Model(inputs, outputs)
    optimizer = keras.optimizers.Adam(3e-3)
    loss_of = keras.losses.SparseCategoricalCrossentropy(from_logits=True)

    @tf.function
    def train_step(x: Any, y: Any) -> Any:
        with tf.GradientTape() as tape:
            logits = model(x)
            loss = loss_of(y, logits)
        weights = model.trainable_variables
        gradients = tape.gradient(loss, weights)
        optimizer.apply_gradients(zip(gradients, weights, strict=True))
        return loss, tf.reduce_mean(tf.cast(tf.argmax(logits, 1, tf.int32) == y, tf.float32))

    with run.loop(model) as watch:
        for _ in range(6):
            order = rng.permutation(len(data.x))
            for start in range(0, len(order) - 31, 32):
                x, y = data.x[order[start : start + 32]], data.y[order[start : start + 32]]
                loss, accuracy = train_step(tf.constant(x), tf.constant(y))
                watch.step(loss=loss, accuracy=accuracy, examples=32, batch=(x, y))
            right = np.mean(model.predict(data.xv, verbose=0).argmax(axis=1) == data.yv)
            watch.evaluation(accuracy=right, examples=len(data.yv), classes=10, data=(data.xv, data.yv))
    run.measure(accuracy=accuracy, val_accuracy=right)
    run.subject(model, train=(data.x, data.y), evaluation=(data.xv, data.yv))


@case("BN-041/critic", expects="BN104", framework="keras")
def own_train_step(run: Run) -> None:
    """A regression whose own train_step forgets the flag, as the critic of BN-041 does."""
    data = digits(flat=True)

    class Critic(keras.Model):
        def train_step(self, batch: Any) -> Any:
            x, y = batch
            with tf.GradientTape() as tape:
                loss = tf.reduce_mean(tf.square(self(x)[:, 0] - y))
            weights = self.trainable_variables
            self.optimizer.apply_gradients(zip(tape.gradient(loss, weights), weights, strict=True))
            return {"loss": loss}

    inputs = x = keras.Input((64,))
    for _ in range(2):
        x = layers.Dense(64, activation="relu")(x)
        x = layers.BatchNormalization()(x)
    model = Critic(inputs, layers.Dense(1)(x))
    model.compile(keras.optimizers.Adam(1e-3), "mse")
    y, yv = (np.float32(part[:, :32].sum(axis=1) - part[:, 32:].sum(axis=1)) for part in (data.x, data.xv))
    run.fit(model, data.x, y, validation_data=(data.xv, yv), epochs=10, batch_size=32)
