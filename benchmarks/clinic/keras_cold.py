"""Evaluation while the running statistics still hold their initial values."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import keras
import numpy as np
from keras import layers

from benchmarks.clinic.case import case
from benchmarks.clinic.data import digits, table
from benchmarks.clinic.keras_nets import classifying, cnn

if TYPE_CHECKING:
    from benchmarks.clinic.case import Run


@case("BN-013", expects="BN201", framework="keras", fast=True)
def one_batch(run: Run) -> None:
    """One batch is learnt by heart, and validated on itself; https://github.com/keras-team/keras/issues/7265."""
    data = digits(raw=True)
    x, y = data.x[:128], data.y[:128]
    model = keras.Sequential([
        keras.Input((8, 8, 1)),
        layers.Conv2D(16, 3), layers.BatchNormalization(), layers.ReLU(),
        layers.Conv2D(32, 3), layers.BatchNormalization(), layers.ReLU(),
        layers.Flatten(), layers.Dense(10),
    ])  # fmt: skip
    run.fit(classifying(model, 1e-2), x, y, validation_data=(x, y), epochs=25, batch_size=128)


def coloured(x: Any) -> Any:
    """Return digits as images of 32 by 32 pixels in three colours."""
    return np.repeat(x.repeat(4, axis=1).repeat(4, axis=2), 3, axis=3) * 2 - 1


@case("BN-018", expects="BN201", framework="keras")
def mobilenet_from_scratch(run: Run) -> None:
    """MobileNetV2 without weights, little data; https://github.com/tensorflow/tensorflow/issues/36065."""
    data = digits()
    x, y = coloured(data.x[:700]), data.y[:700]
    model = keras.applications.MobileNetV2((32, 32, 3), alpha=0.35, weights=None, classes=10)
    model.compile(keras.optimizers.Adam(2e-3), "sparse_categorical_crossentropy", metrics=["accuracy"])
    run.fit(model, x, y, validation_data=(coloured(data.xv), data.yv), epochs=3, batch_size=32)


@case("BN-019", expects="BN201", framework="keras")
def mobilenet_of_two_classes(run: Run) -> None:
    """The same with two classes: half right for ever; https://github.com/tensorflow/tpu/issues/567."""
    data = digits()
    x, y = coloured(data.x[:700]), data.y[:700] % 2
    model = keras.applications.MobileNetV2((32, 32, 3), alpha=0.35, weights=None, classes=2)
    model.compile(keras.optimizers.Adam(2e-3), "sparse_categorical_crossentropy", metrics=["accuracy"])
    run.fit(model, x, y, validation_data=(coloured(data.xv), data.yv % 2), epochs=3, batch_size=32)


@case("BN-021", expects="BN201", framework="keras")
def chairs_and_lamps(run: Run) -> None:
    """32 chairs and 32 lamps in 0-255, evaluated on themselves; https://github.com/keras-team/keras/issues/6014."""
    data = digits()
    rows = np.concatenate([np.flatnonzero(data.y == label)[:32] for label in (3, 8)])
    x, y = 255 * (1 - data.x[rows]), np.float32(data.y[rows] == 8)
    model = keras.Sequential([
        keras.Input((8, 8, 1)),
        layers.Conv2D(5, 3), layers.LeakyReLU(), layers.Conv2D(10, 3), layers.BatchNormalization(), layers.LeakyReLU(),
        layers.Flatten(), layers.Dense(1, activation="sigmoid"),
    ])  # fmt: skip
    model.compile("adam", "binary_crossentropy", metrics=["accuracy"])
    run.fit(model, x, y, validation_data=(x, y), epochs=5, batch_size=8)


@case("BN-026", expects="BN201", framework="keras", fast=True)
def not_as_in_chainer(run: Run) -> None:
    """Keras's .99 where Chainer has .9, 30 steps; https://github.com/keras-team/keras/issues/10666."""
    data = digits(raw=True)
    model = classifying(cnn(0.99), 3e-3)
    run.fit(model, data.x[:640], data.y[:640], validation_data=(data.xv, data.yv), epochs=3, batch_size=64)


@case("BN-013/regression", expects="BN201", framework="keras")
def few_rows(run: Run) -> None:
    """A regression on a small table in its own units, with a few dozen updates; the mechanism of BN-013."""
    data, rng = table("wine"), np.random.default_rng(run.seed)
    weights = rng.normal(size=13)
    scale = np.geomspace(1, 100, 13)
    model = keras.Sequential([keras.Input((13,))])
    for _ in range(2):
        model.add(layers.Dense(64))
        model.add(layers.BatchNormalization())
        model.add(layers.ELU())
    model.add(layers.Dense(1))
    model.compile(keras.optimizers.Adam(1e-2), "mse")
    x, xv = ((10 + part) * scale for part in (data.x, data.xv))
    validation = xv, data.xv @ weights
    run.fit(model, x, data.x @ weights, validation_data=validation, epochs=10, batch_size=32)


@case("BN-026/binary", expects="BN201", framework="keras")
def slow_momentum(run: Run) -> None:
    """A binary classifier with momentum .999 copied from a large project, a short training; as BN-018."""
    data = table("breast_cancer")
    model = keras.Sequential([keras.Input((30,))])
    for _ in range(3):
        model.add(layers.Dense(64, use_bias=False))
        model.add(layers.BatchNormalization(momentum=0.999))
        model.add(layers.Activation("relu"))
    model.add(layers.Dense(1, activation="sigmoid"))
    model.compile(keras.optimizers.Adam(3e-3), "binary_crossentropy", metrics=["accuracy"])
    x, xv = 100 + 20 * data.x, 100 + 20 * data.xv
    run.fit(model, x, data.y, validation_data=(xv, data.yv), epochs=8, batch_size=32)
