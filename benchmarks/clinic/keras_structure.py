"""Where batch norm stands: behind dropout, on the output, behind an activation that died."""

from __future__ import annotations

from typing import TYPE_CHECKING

import keras
import numpy as np
from keras import layers

from benchmarks.clinic.case import case
from benchmarks.clinic.data import digits
from benchmarks.clinic.keras_parts import CLASSES, batch_norm, compiled

if TYPE_CHECKING:
    from benchmarks.clinic.case import Run


@case("BN-110", expects="BN108", framework="keras")
def dropout_in_front_of_every_layer(run: Run) -> None:
    """Dropout of .7 in front of four normalized layers: https://github.com/keras-team/keras/issues/8542."""
    x, y, xv, yv = digits(flat=True)
    model = keras.Sequential([keras.Input((64,)), layers.Dense(256, activation="relu")])
    for _ in range(4):
        model.add(layers.Dropout(0.7))
        model.add(layers.Dense(256, use_bias=False))
        model.add(batch_norm())
        model.add(layers.ReLU())
    model.add(layers.Dense(CLASSES))
    run.fit(compiled(model, 2e-3), x, y, validation_data=(xv, yv), epochs=10, batch_size=64)


@case("BN-114", expects="BN109", framework="keras", fast=True)
def regression_of_normalized_outputs(run: Run) -> None:
    """Four numbers up to 200 are regressed, the last layer is batch norm.

    https://discuss.tensorflow.org/t/applying-batch-normalization-on-the-output-layer-in-a-regression-problem/14056
    """
    x, _, xv, _ = digits(flat=True)
    parts = np.kron(np.eye(4), np.ones((16, 1)))
    y, yv = 16.0 * x @ parts, 16.0 * xv @ parts
    model = keras.Sequential(
        [keras.Input((64,)), layers.Dense(64, activation="relu"), layers.Dense(4), layers.BatchNormalization()]
    )
    model.compile("adam", "mse")
    run.fit(model, x, y, validation_data=(xv, yv), epochs=20, batch_size=16)


@case("BN-116", expects="BN109", framework="keras")
def normalized_in_front_of_the_sigmoid(run: Run) -> None:
    """An image-to-image regression normalizes in front of its sigmoid: https://github.com/fastai/fastai2/issues/107."""
    x, _, xv, _ = digits(flat=True)
    model = keras.Sequential(
        [
            keras.Input((64,)),
            layers.Dense(32, activation="relu"),
            layers.Dense(64),
            layers.BatchNormalization(),
            layers.Activation("sigmoid"),
        ]
    )
    model.compile(keras.optimizers.Adam(1e-3), "mse")
    run.fit(model, x, x, validation_data=(xv, xv), epochs=20, batch_size=32)


@case("BN-118", expects="BN306", framework="keras", fast=True)
def bottleneck_of_one_dead_unit(run: Run) -> None:
    """A ReLU bottleneck of one unit dies on unscaled inputs: https://github.com/keras-team/keras/issues/3752."""
    x, y, xv, yv = digits(flat=True, raw=True)
    model = keras.Sequential(
        [
            keras.Input((64,)),
            layers.Dense(32, activation="relu"),
            layers.Dense(1, activation="relu", bias_initializer=keras.initializers.Constant(-30.0)),
            layers.BatchNormalization(),
            layers.Dense(32, activation="relu"),
            layers.Dense(CLASSES, activation="softmax"),
        ]
    )
    loss = keras.losses.SparseCategoricalCrossentropy()
    run.fit(compiled(model, 1e-2, loss=loss), x, y, validation_data=(xv, yv), epochs=5, batch_size=32)
