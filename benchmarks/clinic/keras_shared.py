"""One batch normalization at several places of the network."""

from __future__ import annotations

from typing import TYPE_CHECKING

import keras
import numpy as np
from keras import layers

from benchmarks.clinic.case import case
from benchmarks.clinic.data import digits

if TYPE_CHECKING:
    from benchmarks.clinic.case import Run


def pairs(x: np.ndarray, y: np.ndarray, number: int, rng: np.random.Generator) -> tuple[np.ndarray, ...]:
    """Return pairs of examples, half of them of the same class, and whether they are."""
    first = rng.integers(0, len(x), number)
    same = rng.random(number) < 0.5
    second = np.array([rng.choice(np.flatnonzero((y == y[i]) == s)) for i, s in zip(first, same, strict=True)])
    return x[first], x[second], same.astype(np.float32)


@case("BN-001", expects="BN101", framework="keras")
def siamese_sensors(run: Run) -> None:
    """Two sensors of different scale go through one encoder; https://github.com/keras-team/keras/issues/8794."""
    data = digits(flat=True)
    rng = np.random.default_rng(run.seed)
    left, right, same = pairs(data.x, data.y, 4000, rng)
    left_v, right_v, same_v = pairs(data.xv, data.yv, 800, rng)
    encoder = keras.Sequential(name="encoder")
    for _ in range(2):
        encoder.add(layers.Dense(64))
        encoder.add(layers.BatchNormalization(momentum=0.9))
        encoder.add(layers.ReLU())
    one, other = keras.Input((64,)), keras.Input((64,))
    distance = layers.Lambda(lambda ab: keras.ops.abs(ab[0] - ab[1]))([encoder(one), encoder(other)])
    model = keras.Model([one, other], layers.Dense(1, activation="sigmoid")(distance))
    model.compile(keras.optimizers.Adam(1e-3), "binary_crossentropy", metrics=["accuracy"])
    run.fit(
        model, [left, 4 * right + 3], same, validation_data=([left_v, 4 * right_v + 3], same_v), epochs=10,
        batch_size=64,
    )  # fmt: skip
