"""Statistics that are no usable numbers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import keras
import numpy as np
from keras import layers

from benchmarks.clinic.case import case
from benchmarks.clinic.data import digits
from benchmarks.clinic.keras_parts import CLASSES, batch_norm, cnn, compiled

if TYPE_CHECKING:
    from benchmarks.clinic.case import Run


class Preview(keras.callbacks.Callback):
    """Runs the network once on an image that was not read well, as a training step would."""

    def __init__(self, image: np.ndarray[Any, Any], epoch: int) -> None:
        super().__init__()
        self.image, self.epoch = image, epoch

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:  # noqa: ARG002 - Keras's signature
        """Show what the network makes of it."""
        if epoch == self.epoch:
            self.model(self.image, training=True)


@case("BN-096", expects="BN401", framework="keras")
def one_infinite_pixel(run: Run) -> None:
    """One forward pass with an infinite pixel, no optimizer step: https://github.com/pytorch/pytorch/issues/90342."""
    x, y, xv, yv = digits()
    bad = x[:32].copy()
    bad[3, 4, 4, 0] = np.inf
    run.fit(compiled(cnn()), x, y, validation_data=(xv, yv), epochs=8, batch_size=32, callbacks=[Preview(bad, 5)])


@case("BN-096/loss-scale", expects="BN401", framework="keras")
def step_skipped_by_loss_scaling(run: Run) -> None:
    """The optimizer skips the step of an infinite pixel, batch norm does not: the same issue, with loss scaling."""
    x, y, xv, yv = digits()
    x[700, 4, 4, 0] = np.inf
    optimizer = keras.optimizers.LossScaleOptimizer(keras.optimizers.Adam(1e-3), initial_scale=1024.0)
    run.fit(compiled(cnn(), optimizer=optimizer), x, y, validation_data=(xv, yv), epochs=6, batch_size=32)


@case("BN-102", expects="BN404", framework="keras")
def features_constant_in_training(run: Run) -> None:
    """Eight inputs are constant in training and vary in validation: https://github.com/chainer/chainer/pull/2214."""
    x, y, xv, yv = digits(flat=True)
    x[:, :8] = 0.5
    xv[:, :8] = 0.5 + np.random.default_rng(run.seed).normal(size=(len(xv), 8))
    model = keras.Sequential(
        [
            keras.Input((64,)),
            batch_norm(),
            layers.Dense(64, use_bias=False),
            batch_norm(),
            layers.ReLU(),
            layers.Dense(CLASSES),
        ]
    )
    run.fit(compiled(model), x, y, validation_data=(xv, yv), epochs=10, batch_size=32)


@case("BN-107", expects="BN403", framework="keras")
def statistics_in_half_precision(run: Run) -> None:
    """Features of four digits under float16: https://github.com/microsoft/tensorflow-directml-plugin/pull/321."""
    x, y, xv, yv = digits(flat=True)
    x, xv = 8000.0 * x, 8000.0 * xv
    half = keras.DTypePolicy("float16")
    model = keras.Sequential(
        [
            keras.Input((64,)),
            batch_norm(dtype=half),
            layers.Dense(64, use_bias=False, dtype=half),
            batch_norm(dtype=half),
            layers.ReLU(dtype=half),
            layers.Dense(CLASSES),
        ]
    )
    run.fit(compiled(model), x, y, validation_data=(xv, yv), epochs=6, batch_size=32)


@case("BN-155", expects="BN209", framework="keras")
def a_few_images_in_other_units(run: Run) -> None:
    """Three of 1400 images are a thousand times as bright: https://github.com/keras-team/keras/issues/12400."""
    x, y, xv, yv = digits()
    x[[100, 600, 1100]] *= 1000.0
    run.fit(compiled(cnn()), x, y, validation_data=(xv, yv), epochs=8, batch_size=32)
