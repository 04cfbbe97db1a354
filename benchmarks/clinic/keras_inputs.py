"""Evaluation inputs that are distributed otherwise than training inputs."""

from __future__ import annotations

from typing import TYPE_CHECKING

import keras
import numpy as np
from keras import layers

from benchmarks.clinic.case import case
from benchmarks.clinic.data import digits
from benchmarks.clinic.keras_parts import CLASSES, batch_norm, cnn, compiled

if TYPE_CHECKING:
    from benchmarks.clinic.case import Run


@case("BN-085", expects="BN304", framework="keras", fast=True)
def validation_not_scaled(run: Run) -> None:
    """Training images are divided by 16 and validation images are not: https://github.com/mlpack/examples/pull/213."""
    x, y, xv, yv = digits()
    run.fit(compiled(cnn()), x, y, validation_data=(16 * xv, yv), epochs=8, batch_size=32)


@case("BN-088", expects="BN304", framework="keras")
def validation_scaled_twice(run: Run) -> None:
    """Validation images are scaled down twice: https://github.com/GoogleCloudPlatform/asl-ml-immersion/pull/424."""
    x, y, xv, yv = digits(flat=True)
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
    run.fit(compiled(model), x, y, validation_data=(xv / 16, yv), epochs=10, batch_size=32)


@case("BN-092", expects="BN304", framework="keras")
def other_cameras(run: Run) -> None:
    """Validation images have less contrast and are brighter: https://github.com/dvl-tum/GHOST/issues/4."""
    x, y, xv, yv = digits()
    run.fit(compiled(cnn()), x, y, validation_data=(np.clip(0.4 * xv + 0.55, 0.0, 1.0), yv), epochs=8, batch_size=32)
