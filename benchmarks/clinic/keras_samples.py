"""Batches with too few samples for statistics: small ones, single ones, and odd last ones."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import keras
import numpy as np
from keras import layers, ops

from benchmarks.clinic.case import case
from benchmarks.clinic.data import digits, table
from benchmarks.clinic.keras_nets import classifying, mlp

if TYPE_CHECKING:
    from benchmarks.clinic.case import Run


@case("BN-055", expects="BN204", framework="keras")
def two_images(run: Run) -> None:
    """Batches of two images; https://github.com/keras-team/keras/issues/8837."""
    data = digits()
    model = keras.Sequential([
        keras.Input((8, 8, 1)),
        layers.Conv2D(16, 3, padding="same"), layers.BatchNormalization(), layers.ReLU(), layers.MaxPooling2D(),
        layers.Conv2D(32, 3, padding="same"), layers.BatchNormalization(), layers.ReLU(), layers.MaxPooling2D(),
        layers.Conv2D(32, 3, padding="same"), layers.BatchNormalization(), layers.ReLU(),
        layers.GlobalAveragePooling2D(), layers.Dense(10),
    ])  # fmt: skip
    classifying(model)
    run.fit(model, data.x[:600], data.y[:600], validation_data=(data.xv[:200], data.yv[:200]), epochs=4, batch_size=2)


@case("BN-061", expects="BN204", framework="keras")
def half_the_variance(run: Run) -> None:
    """Batches of two rows of N(0, 1) leave half the variance; https://github.com/keras-team/keras/issues/8982."""
    rng = np.random.default_rng(run.seed)
    x = rng.normal(size=(1250, 16)).astype(np.float32)
    y = np.tanh(x[:, :4].sum(axis=1)) + x[:, 5]
    model = keras.Sequential([
        keras.Input((16,)), layers.BatchNormalization(), layers.Dense(32, activation="relu"),
        layers.BatchNormalization(), layers.Dense(1),
    ])  # fmt: skip
    model.compile(keras.optimizers.Adam(1e-3), "mse")
    run.fit(model, x[:1000], y[:1000], validation_data=(x[1000:], y[1000:]), epochs=3, batch_size=2)
    run.measure(running_variance=float(np.mean(model.layers[0].moving_variance)))


@case("BN-062", expects="BN204", framework="keras")
def deep_at_four(run: Run) -> None:
    """Ten normalized convolutions, batches of four; https://github.com/leondgarse/keras_efficientnet_v2/issues/12."""
    data = digits()
    model = keras.Sequential([keras.Input((8, 8, 1))])
    for number in range(10):
        model.add(layers.Conv2D(16 + 8 * (number // 3), 3, strides=2 if number in {1, 3, 5} else 1, padding="same"))
        model.add(layers.BatchNormalization(momentum=0.9))
        model.add(layers.Activation("swish"))
    model.add(layers.Flatten())
    model.add(layers.Dense(10))
    model = classifying(model, 3e-3)
    run.fit(model, data.x[:600], data.y[:600], validation_data=(data.xv, data.yv), epochs=4, batch_size=4)


@case("BN-063/keras", expects="BN205", framework="keras", fast=True)
def one_row(run: Run) -> None:
    """One example a batch, as https://github.com/chainer/chainer/pull/3996, in Keras."""
    data = digits(flat=True)
    model = classifying(mlp(0.99))
    run.fit(model, data.x[:120], data.y[:120], validation_data=(data.xv[:100], data.yv[:100]), epochs=2, batch_size=1)


@case("BN-063/pooled", expects="BN205", framework="keras")
def one_pooled_image(run: Run) -> None:
    """One image a batch, and one value a channel after the pooling; a binary classifier."""
    data = digits()
    model = keras.Sequential([
        keras.Input((8, 8, 1)), layers.Conv2D(16, 3, activation="relu"), layers.Conv2D(32, 3, activation="relu"),
        layers.GlobalAveragePooling2D(), layers.BatchNormalization(), layers.Dense(32, activation="relu"),
        layers.Dense(1, activation="sigmoid"),
    ])  # fmt: skip
    model.compile("adam", "binary_crossentropy", metrics=["accuracy"])
    y, yv = data.y % 2, data.yv % 2
    run.fit(model, data.x[:250], y[:250], validation_data=(data.xv[:100], yv[:100]), epochs=2, batch_size=1)


class Fused(layers.BatchNormalization):
    """A batch normalization that keeps the corrected variance, n / (n - 1), as the fused kernel does."""

    def call(self, inputs: Any, training: bool | None = None, mask: Any = None) -> Any:
        if not training:
            return super().call(inputs, training=False, mask=mask)
        mean, variance = self._moments(inputs, mask)
        count = ops.cast(ops.prod(ops.shape(inputs)[:3]), "float32")
        self.moving_mean.assign(self.momentum * self.moving_mean + (1 - self.momentum) * mean)
        corrected = variance * (count / (count - 1))
        self.moving_variance.assign(self.momentum * self.moving_variance + (1 - self.momentum) * corrected)
        return ops.batch_normalization(
            inputs, mean, variance, axis=-1, offset=self.beta, scale=self.gamma, epsilon=self.epsilon
        )


@case("BN-066", expects="BN401", framework="keras", also=("BN205",))
def corrected_with_nothing(run: Run) -> None:
    """The fused kernel divides by n - 1 = 0; https://github.com/tensorflow/tensorflow/issues/34062."""
    data = digits()
    model = keras.Sequential([
        keras.Input((8, 8, 1)), layers.Conv2D(16, 3, activation="relu"), layers.Conv2D(32, 3, activation="relu"),
        layers.GlobalAveragePooling2D(keepdims=True), Fused(), layers.Conv2D(10, 1), layers.Flatten(),
    ])  # fmt: skip
    model = classifying(model)
    run.fit(model, data.x[:150], data.y[:150], validation_data=(data.xv[:100], data.yv[:100]), epochs=2, batch_size=1)


@case("BN-068", expects="BN206", framework="keras")
def one_left_over(run: Run) -> None:
    """1345 examples in batches of 64 leave one; https://github.com/fastai/fastai/pull/1095."""
    data = digits(flat=True)
    model = classifying(mlp(0.5))
    run.fit(model, data.x[:1345], data.y[:1345], validation_data=(data.xv, data.yv), epochs=12, batch_size=64)


@case("BN-071", expects="BN206", framework="keras")
def one_left_over_unnoticed(run: Run) -> None:
    """What PyTorch refuses and Keras does not; https://github.com/pytorch/pytorch/issues/4534."""
    data = digits(flat=True)
    model = classifying(mlp(0.5, widths=(128, 64)), 2e-3)
    run.fit(model, data.x[:1281], data.y[:1281], validation_data=(data.xv, data.yv), epochs=10, batch_size=128)


@case("BN-068/regression", expects="BN206", framework="keras")
def two_left_over(run: Run) -> None:
    """A regression on a table of 386 rows, batches of 32 leave two; the mechanism of BN-068."""
    data = table("breast_cancer")
    target, target_v = (np.float32(part[:, :5].sum(axis=1) + 2 * part[:, 7]) for part in (data.x, data.xv))
    model = mlp(0.5, widths=(64, 64), inputs=30, classes=1)
    model.compile(keras.optimizers.Adam(3e-3), "mse")
    run.fit(model, data.x[:386], target[:386], validation_data=(data.xv, target_v), epochs=15, batch_size=32)
