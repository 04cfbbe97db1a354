"""Batches of two populations in turn."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import keras
import numpy as np
from keras import layers

from benchmarks.clinic.case import case
from benchmarks.clinic.data import digits

if TYPE_CHECKING:
    from benchmarks.clinic.case import Run


def discriminator() -> Any:
    """Return a discriminator with batch normalization."""
    model = keras.Sequential([keras.Input((64,))])
    for _ in range(2):
        model.add(layers.Dense(64))
        model.add(layers.BatchNormalization(momentum=0.9))
        model.add(layers.LeakyReLU())
    model.add(layers.Dense(2, activation="softmax"))
    model.compile(keras.optimizers.Adam(1e-3), "sparse_categorical_crossentropy", metrics=["accuracy"])
    return model


@case("BN-008", expects="BN208", framework="keras")
def real_then_fake(run: Run) -> None:
    """Real and fake batches in turn; https://github.com/carpedm20/DCGAN-tensorflow/issues/266."""
    data, rng = digits(flat=True), np.random.default_rng(run.seed)

    def fake(x: Any) -> Any:
        return (0.6 * x + 0.5 + rng.normal(0, 0.1, x.shape)).astype(np.float32)

    model = discriminator()
    validation = np.concatenate([data.xv, fake(data.xv)]), np.repeat([1, 0], len(data.xv))
    with run.loop(model) as watch:
        for iteration in range(300):
            real = data.x[rng.integers(0, len(data.x), 32)]
            for x, label in ((real, 1), (fake(data.x[rng.integers(0, len(data.x), 32)]), 0)):
                y = np.full(32, label)
                loss, accuracy = model.train_on_batch(x, y)
                watch.step(loss=loss, accuracy=accuracy, examples=32, batch=(x, y))
            if iteration % 50 == 49:
                right = np.mean(model.predict(validation[0], verbose=0).argmax(axis=1) == validation[1])
                watch.evaluation(accuracy=right, examples=len(validation[1]), classes=2, data=validation)
    run.measure(accuracy=accuracy, val_accuracy=right)
    run.subject(model, train=(np.concatenate([data.x, fake(data.x)]), np.repeat([1, 0], 1400)), evaluation=validation)


class PureBatches(keras.utils.PyDataset):
    """Batches that are all real or all fake, at random."""

    def __init__(self, x: Any, fake: Any, seed: int) -> None:
        super().__init__()
        self.kinds, self.rng = (fake, x), np.random.default_rng(seed)

    def __len__(self) -> int:
        return 60

    def __getitem__(self, _: int) -> Any:
        label = int(self.rng.random() < 0.5)
        rows = self.rng.integers(0, len(self.kinds[label]), 32)
        return self.kinds[label][rows], np.full(32, label)


@case("BN-010", expects="BN208", framework="keras")
def all_real_or_all_fake(run: Run) -> None:
    """Each batch is all real or all fake, which differ mildly; https://github.com/soumith/ganhacks/issues/52."""
    data, rng = digits(flat=True), np.random.default_rng(run.seed)
    fake, fake_v = (
        (x + 0.2 + rng.normal(0, 0.05, x.shape)).astype(np.float32) for x in (data.x, data.xv)
    )  # fmt: skip
    model = discriminator()
    validation = np.concatenate([data.xv, fake_v]), np.repeat([1, 0], len(data.xv))
    run.fit(model, PureBatches(data.x, fake, run.seed), validation_data=validation, epochs=10)
    run.subject(model, train=(np.concatenate([data.x, fake]), np.repeat([1, 0], 1400)), evaluation=validation)


class TwoDomains(keras.utils.PyDataset):
    """A batch of the one camera, then a batch of the other."""

    def __init__(self, domains: tuple[Any, Any], y: Any, seed: int) -> None:
        super().__init__()
        self.domains, self.y, self.rng = domains, y, np.random.default_rng(seed)

    def __len__(self) -> int:
        return 88

    def __getitem__(self, index: int) -> Any:
        rows = self.rng.integers(0, len(self.y), 32)
        return self.domains[index % 2][rows], self.y[rows]


@case("BN-008/domains", expects="BN208", framework="keras")
def two_cameras_in_turn(run: Run) -> None:
    """A convolutional net gets a batch of the one camera, then one of the other, and is to classify both."""
    data = digits()
    model = keras.Sequential([
        keras.Input((8, 8, 1)),
        layers.Conv2D(16, 3, padding="same"), layers.BatchNormalization(momentum=0.9), layers.ReLU(),
        layers.MaxPooling2D(),
        layers.Conv2D(32, 3, padding="same"), layers.BatchNormalization(momentum=0.9), layers.ReLU(),
        layers.GlobalAveragePooling2D(), layers.Dense(10, activation="softmax"),
    ])  # fmt: skip
    model.compile(keras.optimizers.Adam(3e-3), "sparse_categorical_crossentropy", metrics=["accuracy"])
    validation = np.concatenate([data.xv, 2 - 3 * data.xv]), np.tile(data.yv, 2)
    train = TwoDomains((data.x, 2 - 3 * data.x), data.y, run.seed)
    run.fit(model, train, validation_data=validation, epochs=8)
    run.subject(model, train=(np.concatenate(train.domains), np.tile(data.y, 2)), evaluation=validation)
