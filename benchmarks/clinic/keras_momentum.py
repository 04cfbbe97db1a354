"""A momentum of the other convention."""

from __future__ import annotations

from typing import TYPE_CHECKING

import keras
import numpy as np
from keras import layers

from benchmarks.clinic.case import case
from benchmarks.clinic.data import digits
from benchmarks.clinic.keras_nets import classifying, mlp

if TYPE_CHECKING:
    from benchmarks.clinic.case import Run


@case("BN-029", expects="BN202", framework="keras")
def momentum_of_a_hundredth(run: Run) -> None:
    """PyTorch's .01 as momentum; https://github.com/r9y9/tacotron_pytorch/issues/19."""
    data = digits(raw=True)
    model = keras.Sequential([keras.Input((8, 8, 1))])
    for width in (16, 32, 32):
        model.add(layers.Conv2D(width, 3, padding="same"))
        model.add(layers.BatchNormalization(momentum=0.01))
        model.add(layers.ReLU())
    model.add(layers.GlobalAveragePooling2D())
    model.add(layers.Dense(10))
    classifying(model)
    run.fit(model, data.x[:640], data.y[:640], validation_data=(data.xv, data.yv), epochs=3, batch_size=8)


def signals(number: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Return signals of 8 channels, 100 samples long, in four classes of frequency."""
    y = rng.integers(0, 4, number).astype(np.int32)
    time = np.arange(100) / 100
    phase = rng.uniform(0, 2 * np.pi, (number, 1, 8))
    gain = rng.uniform(0.5, 2, (number, 1, 8))
    wave = gain * np.sin(2 * np.pi * (3 + 3 * y)[:, None, None] * time[None, :, None] + phase)
    return (wave + rng.normal(0, 1.5, wave.shape)).astype(np.float32), y


@case("BN-030", expects="BN202", framework="keras")
def ported_eeg(run: Run) -> None:
    """A network for EEG with PyTorch's .1, batches of 4; https://github.com/vlawhern/arl-eegmodels/issues/39."""
    rng = np.random.default_rng(run.seed)
    x, y = signals(1000, rng)
    model = keras.Sequential([
        keras.Input((100, 8)),
        layers.Conv1D(16, 16, padding="same"), layers.BatchNormalization(momentum=0.1), layers.ELU(),
        layers.AveragePooling1D(4),
        layers.Conv1D(16, 8, padding="same"), layers.BatchNormalization(momentum=0.1), layers.ELU(),
        layers.GlobalAveragePooling1D(), layers.Dense(4),
    ])  # fmt: skip
    run.fit(classifying(model), x, y, validation_data=signals(400, rng), epochs=4, batch_size=4)


@case("BN-029/vectors", expects="BN202", framework="keras")
def paper_says_a_tenth(run: Run) -> None:
    """A network of dense layers with PyTorch's .1; the mechanism of BN-029."""
    data = digits(flat=True)
    model = classifying(mlp(0.1, widths=(128, 64)))
    run.fit(model, data.x, data.y, validation_data=(data.xv, data.yv), epochs=5, batch_size=16)
