"""Training batches that do not represent the training data."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import keras
import numpy as np
from keras import layers

from benchmarks.clinic.case import case
from benchmarks.clinic.data import digits
from benchmarks.clinic.keras_nets import classifying, mlp

if TYPE_CHECKING:
    from benchmarks.clinic.case import Run


class Grouped(keras.utils.PyDataset):
    """Batches of one group each, in random order, drawn anew in each epoch."""

    def __init__(self, x: Any, y: Any, groups: Any, size: int, seed: int) -> None:
        super().__init__()
        self.x, self.y, self.groups, self.size = x, y, groups, size
        self.rng = np.random.default_rng(seed)
        self.on_epoch_end()

    def on_epoch_end(self) -> None:
        self.batches = []
        for group in np.unique(self.groups):
            rows = self.rng.permutation(np.flatnonzero(self.groups == group))
            self.batches += [rows[i : i + self.size] for i in range(0, len(rows) - self.size + 1, self.size)]
        self.rng.shuffle(self.batches)

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, index: int) -> Any:
        rows = self.batches[index]
        return self.x[rows], self.y[rows]


def sequences(number: int, rng: np.random.Generator, windows: int = 32) -> tuple[Any, Any, Any]:
    """Return windows of sequences that have an offset and a scale of their own, two classes, and the sequence of each.

    The class of a window is whether a short event is in it.
    """
    time = np.arange(40)
    x, y, groups = [], [], []
    for sequence in range(number):
        offset, scale = rng.normal(0, 2), np.exp(rng.normal(0, 0.7))
        for _ in range(windows):
            label = int(rng.random() < 0.5)
            event = label * 2.0 * np.exp(-((time - rng.uniform(8, 32)) ** 2) / 8)
            x.append(offset + scale * (event + rng.normal(0, 0.6, 40)))
            y.append(label)
            groups.append(sequence)
    return np.asarray(x, np.float32)[..., None], np.asarray(y, np.int32), np.asarray(groups)


@case("BN-072", expects="BN207", framework="keras")
def windows_of_a_sequence(run: Run) -> None:
    """A batch is the windows of one sequence; https://github.com/pytorch/pytorch/issues/4741."""
    rng = np.random.default_rng(run.seed)
    x, y, groups = sequences(40, rng)
    xv, yv, _ = sequences(12, rng)
    model = keras.Sequential([
        keras.Input((40, 1)),
        layers.Conv1D(16, 7, padding="same"), layers.BatchNormalization(momentum=0.9), layers.ReLU(),
        layers.Conv1D(16, 7, padding="same"), layers.BatchNormalization(momentum=0.9), layers.ReLU(),
        layers.GlobalMaxPooling1D(), layers.Dense(2),
    ])  # fmt: skip
    classifying(model, 3e-3)
    run.fit(model, Grouped(x, y, groups, 32, run.seed), validation_data=(xv, yv), epochs=10)
    run.measure(train_eval=model.evaluate(x, y, verbose=0)[1])
    run.subject(model, train=(x, y), evaluation=(xv, yv))


@case("BN-073", expects="BN207", framework="keras")
def one_class(run: Run) -> None:
    """One class a batch; https://github.com/vlfeat/matconvnet/issues/393."""
    data = digits(flat=True)
    model = classifying(mlp(0.9))
    run.fit(model, Grouped(data.x, data.y, data.y, 32, run.seed), validation_data=(data.xv, data.yv), epochs=15)
    run.subject(model, train=(data.x, data.y), evaluation=(data.xv, data.yv))


@case("BN-077", expects="BN207", framework="keras")
def two_classes(run: Run) -> None:
    """Two classes a batch; https://github.com/happynear/NormFace/issues/4."""
    data = digits(flat=True)
    model = classifying(mlp(0.9, widths=(128, 128)))
    batches = Grouped(data.x, data.y, data.y // 2, 32, run.seed)
    run.fit(model, batches, validation_data=(data.xv, data.yv), epochs=12)
    run.subject(model, train=(data.x, data.y), evaluation=(data.xv, data.yv))


@case("BN-073/sorted", expects="BN207", framework="keras")
def sorted_files(run: Run) -> None:
    """Files sorted by class are read in order, without a shuffle; the mechanism of BN-073."""
    data = digits(flat=True)
    order = np.argsort(data.y, kind="stable")
    model = classifying(mlp(0.9, widths=(128,)), 3e-3)
    run.fit(
        model, data.x[order], data.y[order], shuffle=False, validation_data=(data.xv, data.yv), epochs=10,
        batch_size=32,
    )  # fmt: skip
