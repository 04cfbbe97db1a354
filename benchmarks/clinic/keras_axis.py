"""Batch norm over an axis that is not the channels'."""

from __future__ import annotations

from typing import TYPE_CHECKING

import keras
import numpy as np
from keras import layers

from benchmarks.clinic.case import case
from benchmarks.clinic.data import digits
from benchmarks.clinic.keras_parts import CLASSES, compiled

if TYPE_CHECKING:
    from benchmarks.clinic.case import Run


@case("BN-079", expects="BN102", framework="keras", fast=True)
def axis_of_the_mel_bands(run: Run) -> None:
    """Batch norm with ``axis=1`` on channels-last input: https://github.com/DCASE-REPO/dcase2018_baseline/issues/18."""
    x, y, xv, yv = digits()
    model = keras.Sequential(
        [
            keras.Input((8, 8, 1)),
            layers.Conv2D(16, 3, padding="same"),
            layers.BatchNormalization(axis=1),
            layers.ReLU(),
            layers.Conv2D(32, 3, padding="same"),
            layers.BatchNormalization(axis=1),
            layers.ReLU(),
            layers.MaxPooling2D(),
            layers.Flatten(),
            layers.Dense(CLASSES),
        ]
    )
    run.fit(compiled(model), x, y, validation_data=(xv, yv), epochs=10, batch_size=32)


@case("BN-083", expects="BN102", framework="keras")
def default_axis_on_channels_first(run: Run) -> None:
    """A channels-first tower with the default axis: https://github.com/Zeta36/chess-alpha-zero/pull/90."""
    rng = np.random.default_rng(run.seed)
    planes = (rng.random((1800, 8, 8, 18)) < 0.2).astype("float32")
    mine, theirs = planes[..., :9].sum((1, 2, 3)), planes[..., 9:].sum((1, 2, 3))
    y = (mine > theirs).astype("int64")
    x = planes.transpose(0, 3, 1, 2)
    h = inputs = keras.Input((18, 8, 8))
    for _ in range(2):
        h = layers.Conv2D(8, 3, padding="same", use_bias=False, data_format="channels_first")(h)
        h = layers.ReLU()(layers.BatchNormalization()(h))
    model = keras.Model(inputs, layers.Dense(2)(layers.Flatten()(h)))
    run.fit(compiled(model), x[:1400], y[:1400], validation_data=(x[1400:], y[1400:]), epochs=10, batch_size=32)
