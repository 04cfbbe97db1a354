"""Running statistics that no update ever reaches."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import keras
import numpy as np
from keras import layers, ops

from benchmarks.clinic.case import case
from benchmarks.clinic.data import digits, table
from benchmarks.clinic.keras_nets import classifying, cnn

if TYPE_CHECKING:
    from benchmarks.clinic.case import Run


@case("BN-033", expects="BN203", framework="keras", fast=True)
def updates_not_run(run: Run) -> None:
    """The updates are never executed; https://github.com/tensorflow/tensorflow/issues/11965."""
    data = digits(raw=True)
    model = classifying(cnn(1.0), 3e-3)
    run.fit(model, data.x, data.y, validation_data=(data.xv, data.yv), epochs=5, batch_size=64)


class MeanOnly(layers.BatchNormalization):
    """A batch normalization that keeps a mean, and forgets the variance."""

    def call(self, inputs: Any, training: bool | None = None, mask: Any = None) -> Any:
        """Normalize."""
        if not training:
            return super().call(inputs, training=False, mask=mask)
        mean, variance = self._moments(inputs, mask)
        self.moving_mean.assign(self.momentum * self.moving_mean + (1 - self.momentum) * mean)
        return ops.batch_normalization(
            inputs, mean, variance, axis=-1, offset=self.beta, scale=self.gamma, epsilon=self.epsilon
        )


@case("BN-037", expects="BN203", framework="keras")
def variance_forgotten(run: Run) -> None:
    """Only the mean is updated; https://github.com/keras-team/keras-core/issues/338."""
    data = digits(raw=True)
    model = classifying(cnn(0.9, norm=MeanOnly), 3e-3)
    run.fit(model, data.x, data.y, validation_data=(data.xv, data.yv), epochs=5, batch_size=64)


class OwnMeanOnly(MeanOnly):
    """The same, with moments of its own."""

    def _moments(self, inputs: Any, mask: Any) -> Any:  # noqa: ARG002
        return ops.moments(inputs, list(range(len(inputs.shape) - 1)))


@case("BN-037/binary", expects="BN203", framework="keras")
def variance_forgotten_again(run: Run) -> None:
    """The same in a binary classifier of vectors."""
    data = table("breast_cancer")
    x, xv = (50 + 30 * part for part in (data.x, data.xv))
    model = keras.Sequential([
        keras.Input((30,)), layers.Dense(32), OwnMeanOnly(momentum=0.9), layers.ReLU(),
        layers.Dense(32), OwnMeanOnly(momentum=0.9), layers.ReLU(), layers.Dense(1, activation="sigmoid"),
    ])  # fmt: skip
    model.compile(keras.optimizers.Adam(3e-3), "binary_crossentropy", metrics=["accuracy"])
    run.fit(model, x, data.y, validation_data=(xv, data.yv), epochs=10, batch_size=32)


@case("BN-039", expects="BN203", framework="keras")
def momentum_of_one(run: Run) -> None:
    """PyTorch's 0 ported as 1, standardised inputs; https://github.com/svishwa/crowdcount-mcnn/issues/64."""
    data = digits()
    mean, std = data.x.mean(), data.x.std()
    x, xv = (data.x - mean) / std, (data.xv - mean) / std
    run.fit(classifying(cnn(1.0), 3e-3), x, data.y, validation_data=(xv, data.yv), epochs=5, batch_size=64)


@case("BN-149", expects="BN203", framework="keras", also=("BN103",))
def looked_right_until_restored(run: Run) -> None:
    """Never updated, and evaluated in training mode; https://github.com/tensorflow/tensorflow/issues/3926."""
    data = digits(raw=True)

    class Wrong(keras.Model):
        def __init__(self) -> None:
            super().__init__()
            self.body = cnn(1.0)

        def call(self, x: Any) -> Any:
            return self.body(x, training=True)

    model = classifying(Wrong(), 3e-3)
    run.fit(model, data.x, data.y, validation_data=(data.xv, data.yv), epochs=5, batch_size=64)


@case("BN-033/loop", expects="BN203", framework="keras")
def updates_thrown_away(run: Run) -> None:
    """A loop written by hand puts the old statistics back after each step; the mechanism of BN-033."""
    import tensorflow as tf

    data, rng = table("wine"), np.random.default_rng(run.seed)
    data = data._replace(x=3 * data.x + 5, xv=3 * data.xv + 5)
    model = keras.Sequential([keras.Input((13,))])
    for _ in range(2):
        model.add(layers.Dense(32))
        model.add(layers.BatchNormalization(momentum=0.9))
        model.add(layers.ReLU())
    model.add(layers.Dense(3))
    optimizer = keras.optimizers.Adam(3e-3)
    loss_of = keras.losses.SparseCategoricalCrossentropy(from_logits=True)

    @tf.function
    def train_step(x: Any, y: Any) -> Any:
        kept = [tf.identity(v.value) for v in model.non_trainable_variables]
        with tf.GradientTape() as tape:
            logits = model(x, training=True)
            loss = loss_of(y, logits)
        weights = model.trainable_variables
        optimizer.apply_gradients(zip(tape.gradient(loss, weights), weights, strict=True))
        for variable, value in zip(model.non_trainable_variables, kept, strict=True):
            variable.assign(value)
        return loss, tf.reduce_mean(tf.cast(tf.argmax(logits, 1, tf.int32) == y, tf.float32))

    with run.loop(model) as watch:
        for _ in range(15):
            order = rng.permutation(len(data.x))
            for start in range(0, len(order) - 15, 16):
                x, y = data.x[order[start : start + 16]], data.y[order[start : start + 16]]
                loss, accuracy = train_step(tf.constant(x), tf.constant(y))
                watch.step(loss=loss, accuracy=accuracy, examples=16, batch=(x, y))
            right = np.mean(model.predict(data.xv, verbose=0).argmax(axis=1) == data.yv)
            watch.evaluation(accuracy=right, examples=len(data.yv), classes=3, data=(data.xv, data.yv))
    run.measure(accuracy=accuracy, val_accuracy=right)
