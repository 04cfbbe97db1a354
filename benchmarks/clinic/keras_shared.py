"""One batch normalization at several places of the network."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import keras
import numpy as np
import tensorflow as tf
from keras import layers, ops

from benchmarks.clinic.case import case
from benchmarks.clinic.data import digits, table

if TYPE_CHECKING:
    from benchmarks.clinic.case import Run


def pairs(x: np.ndarray, y: np.ndarray, number: int, rng: np.random.Generator) -> tuple[np.ndarray, ...]:
    """Return pairs of examples, half of them of the same class, and whether they are."""
    first = rng.integers(0, len(x), number)
    same = rng.random(number) < 0.5
    second = np.array([rng.choice(np.flatnonzero((y == y[i]) == s)) for i, s in zip(first, same, strict=True)])
    return x[first], x[second], same.astype(np.float32)


def encoder(widths: tuple[int, ...], momentum: float) -> Any:
    """Return Dense-BN-ReLU for each width."""
    model = keras.Sequential(name="encoder")
    for width in widths:
        model.add(layers.Dense(width))
        model.add(layers.BatchNormalization(momentum=momentum))
        model.add(layers.ReLU())
    return model


@case("BN-001", expects="BN101", framework="keras", fast=True)
def siamese_sensors(run: Run) -> None:
    """Two sensors of different scale go through one encoder; https://github.com/keras-team/keras/issues/8794."""
    data, rng = digits(flat=True), np.random.default_rng(run.seed)
    left, right, same = pairs(data.x, data.y, 4000, rng)
    left_v, right_v, same_v = pairs(data.xv, data.yv, 800, rng)
    shared = encoder((64, 64), 0.9)
    one, other = keras.Input((64,)), keras.Input((64,))
    distance = ops.abs(shared(one) - shared(other))
    model = keras.Model([one, other], layers.Dense(1, activation="sigmoid")(distance))
    model.compile(keras.optimizers.Adam(1e-3), "binary_crossentropy", metrics=["accuracy"])
    validation = [left_v, 4 * right_v + 3], same_v
    run.fit(model, [left, 4 * right + 3], same, validation_data=validation, epochs=10, batch_size=64)


@case("BN-003", expects="BN101", framework="keras")
def tower_of_two_kinds(run: Run) -> None:
    """Images of two kinds go through one convolutional tower; https://github.com/keras-team/keras/issues/6623."""
    data, rng = digits(), np.random.default_rng(run.seed)
    clean, other, same = pairs(data.x, data.y, 2000, rng)
    clean_v, other_v, same_v = pairs(data.xv, data.yv, 400, rng)
    tower = keras.Sequential([
        layers.Conv2D(16, 3, padding="same"), layers.BatchNormalization(), layers.ReLU(), layers.MaxPooling2D(),
        layers.Conv2D(16, 3, padding="same"), layers.BatchNormalization(), layers.ReLU(), layers.MaxPooling2D(),
        layers.Flatten(),
    ])  # fmt: skip
    first, second = keras.Input((8, 8, 1)), keras.Input((8, 8, 1))
    difference = ops.abs(tower(first) - tower(second))
    model = keras.Model([first, second], layers.Dense(1, activation="sigmoid")(difference))
    model.compile("adam", "binary_crossentropy", metrics=["accuracy"])
    validation = [clean_v, 1 - 0.5 * other_v], same_v
    run.fit(model, [clean, 1 - 0.5 * other], same, validation_data=validation, epochs=8, batch_size=32)


@case("BN-005", expects="BN101", framework="keras")
def triplets(run: Run) -> None:
    """Anchor, positive and negative of different brightness; https://github.com/keras-team/keras/issues/11927."""
    data, rng = digits(flat=True, raw=True), np.random.default_rng(run.seed)
    shared = encoder((64, 64), 0.99)
    inputs = [keras.Input((64,)) for _ in range(3)]
    model = keras.Model(inputs, ops.stack([shared(one) for one in inputs], axis=1))

    def triplet_loss(_: Any, codes: Any) -> Any:
        anchor, positive, negative = codes[:, 0], codes[:, 1], codes[:, 2]
        near = ops.sum(ops.square(anchor - positive), axis=-1)
        far = ops.sum(ops.square(anchor - negative), axis=-1)
        return ops.maximum(near - far + 1.0, 0.0)

    model.compile(keras.optimizers.Adam(1e-3), triplet_loss)
    chosen = rng.integers(0, len(data.x), 2400)
    positive = [rng.choice(np.flatnonzero(data.y == data.y[i])) for i in chosen]
    negative = [rng.choice(np.flatnonzero(data.y != data.y[i])) for i in chosen]
    x = [16 * data.x[chosen], 32 * data.x[positive], 160 * data.x[negative]]
    run.fit(model, x, np.zeros(2400, np.float32), epochs=3, batch_size=8, validation_split=0.1)


@case("BN-001/regression", expects="BN101", framework="keras")
def before_and_after(run: Run) -> None:
    """The same, as a regression: how far apart two measurements are; one of them comes in other units."""
    data, rng = table("breast_cancer"), np.random.default_rng(run.seed)
    shared = encoder((32,), 0.9)
    before, after = keras.Input((30,)), keras.Input((30,))
    both = layers.Concatenate()([shared(before), shared(after)])
    model = keras.Model([before, after], layers.Dense(1)(layers.Dense(32, activation="relu")(both)))
    model.compile(keras.optimizers.Adam(3e-3), "mse")
    i, j = rng.integers(0, len(data.x), (2, 2000))
    target = (data.x[i] - data.x[j])[:, :5].mean(axis=1)
    iv, jv = rng.integers(0, len(data.xv), (2, 400))
    target_v = (data.xv[iv] - data.xv[jv])[:, :5].mean(axis=1)
    validation = [data.xv[iv], 3 * data.xv[jv] + 5], target_v
    run.fit(model, [data.x[i], 3 * data.x[j] + 5], target, validation_data=validation, epochs=8, batch_size=32)


@case("BN-003/loop", expects="BN101", framework="keras")
def two_views_by_hand(run: Run) -> None:
    """Two views through one subclassed encoder, in a loop written by hand; the mechanism of BN-003."""
    data, rng = digits(flat=True), np.random.default_rng(run.seed)

    class TwoViews(keras.Model):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = encoder((48, 48), 0.9)
            self.head = layers.Dense(10)

        def call(self, views: Any, training: bool | None = None) -> Any:
            return self.head(sum(self.encoder(view, training=training) for view in views))

    model, optimizer = TwoViews(), keras.optimizers.Adam(2e-3)
    loss_of = keras.losses.SparseCategoricalCrossentropy(from_logits=True)

    @tf.function
    def train_step(first: Any, second: Any, y: Any) -> Any:
        with tf.GradientTape() as tape:
            logits = model((first, second), training=True)
            loss = loss_of(y, logits)
        weights = model.trainable_variables
        optimizer.apply_gradients(zip(tape.gradient(loss, weights), weights, strict=True))
        return loss, tf.reduce_mean(tf.cast(tf.argmax(logits, 1, tf.int32) == y, tf.float32))

    with run.loop(model) as watch:
        for _ in range(8):
            order = rng.permutation(len(data.x))
            for start in range(0, len(order) - 31, 32):
                rows = order[start : start + 32]
                first, second = data.x[rows], 2.5 * data.x[rows][:, ::-1] + 1
                y = tf.constant(data.y[rows])
                loss, accuracy = train_step(tf.constant(first), tf.constant(second), y)
                watch.step(accuracy=accuracy, loss=loss, examples=32, batch=((first, second), data.y[rows]))
            validation = data.xv, 2.5 * data.xv[:, ::-1] + 1
            right = np.mean(np.argmax(model(validation, training=False), axis=1) == data.yv)
            watch.evaluation(accuracy=right, examples=len(data.yv), classes=10, data=(validation, data.yv))
    run.measure(accuracy=accuracy, val_accuracy=right)
