"""Evaluation with the statistics of its own batches."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import keras
import numpy as np
from keras import layers, ops

from benchmarks.clinic.case import case
from benchmarks.clinic.data import digits, table
from benchmarks.clinic.keras_nets import classifying, cnn, mlp

if TYPE_CHECKING:
    from benchmarks.clinic.case import Run


class AlwaysTraining(keras.Model):
    """A network whose batch normalization is told to train, always."""

    def __init__(self, classes: int = 10, dropout: float = 0.0) -> None:
        super().__init__()
        self.convolutions = [layers.Conv2D(width, 3, padding="same") for width in (16, 32, 32)]
        self.norms = [layers.BatchNormalization() for _ in range(3)]
        self.pool, self.flatten = layers.MaxPooling2D(), layers.Flatten()
        self.dropout, self.head = layers.Dropout(dropout), layers.Dense(classes)

    def call(self, x: Any) -> Any:
        for convolution, norm in zip(self.convolutions, self.norms, strict=True):
            x = ops.relu(norm(convolution(x), training=True))
        return self.head(self.dropout(self.flatten(self.pool(x)), training=True))


def one_at_a_time(model: Any, x: Any, y: Any) -> float:
    """Return the accuracy of predictions that are made for one example each."""
    return float(np.mean(model.predict(x[:100], batch_size=1, verbose=0).argmax(axis=1) == y[:100]))


@case("BN-046", expects="BN103", framework="keras", fast=True)
def training_written_out(run: Run) -> None:
    """`training=True` in the calls of a subclassed model.

    https://community.deeplearning.ai/t/keras-predict-giving-different-results-depending-on-how-used/87440
    """
    data = digits()
    model = classifying(AlwaysTraining(), 3e-3)
    run.fit(model, data.x, data.y, validation_data=(data.xv, data.yv), epochs=5, batch_size=64)
    run.measure(one_at_a_time=one_at_a_time(model, data.xv, data.yv))


@case("BN-047", expects="BN103", framework="keras")
def image_by_image(run: Run) -> None:
    """Odd or even; wrong for one image, right for 50; https://github.com/vlfeat/matconvnet/issues/506."""
    data = digits()
    model = classifying(AlwaysTraining(classes=2), 3e-3)
    run.fit(model, data.x, data.y % 2, validation_data=(data.xv, data.yv % 2), epochs=6, batch_size=50)
    run.measure(one_at_a_time=one_at_a_time(model, data.xv, data.yv % 2))


@case("BN-049", expects="BN103", framework="keras")
def sorted_test_set(run: Run) -> None:
    """Its own test step in training mode, a sorted test set.

    https://github.com/SimKarras/Amend-Representation-Module/issues/17
    """
    data = digits()

    class Wrong(keras.Sequential):
        def test_step(self, batch: Any) -> Any:
            x, y = batch
            logits = self(x, training=True)
            for metric in self.metrics:
                if metric.name == "loss":
                    metric.update_state(self.compute_loss(x, y, logits))
                else:
                    metric.update_state(y, logits)
            return self.get_metrics_result()

    order = np.argsort(data.yv)
    model = classifying(Wrong(cnn(0.9).layers), 3e-3)
    run.fit(model, data.x, data.y, validation_data=(data.xv[order], data.yv[order]), epochs=5, batch_size=64)


class OfTheBatch(layers.BatchNormalization):
    """A batch normalization that keeps no running statistics."""

    def call(self, inputs: Any, training: bool | None = None, mask: Any = None) -> Any:  # noqa: ARG002
        mean, variance = self._moments(inputs, mask)
        return ops.batch_normalization(
            inputs, mean, variance, axis=-1, offset=self.beta, scale=self.gamma, epsilon=self.epsilon
        )


def normalized_by(norm: Any, width: int, *, inputs: int, classes: int) -> Any:
    """Return an MLP of two layers that a class of its own normalizes."""
    model = keras.Sequential([keras.Input((inputs,))])
    for _ in range(2):
        model.add(layers.Dense(width))
        model.add(norm())
        model.add(layers.ReLU())
    model.add(layers.Dense(classes))
    return model


@case("BN-051", expects="BN103", framework="keras", also=("BN203",))
def no_running_statistics(run: Run) -> None:
    """A layer that always takes the batch; https://github.com/keras-team/keras/issues/3085."""
    data = digits(flat=True)
    model = classifying(normalized_by(OfTheBatch, 64, inputs=64, classes=10), 3e-3)
    run.fit(model, data.x, data.y, validation_data=(data.xv, data.yv), epochs=5, batch_size=64)
    run.measure(one_at_a_time=one_at_a_time(model, data.xv, data.yv))


class OfTheBatchAlone(layers.BatchNormalization):
    """The same, with moments of its own."""

    def call(self, inputs: Any, training: bool | None = None, mask: Any = None) -> Any:  # noqa: ARG002
        mean, variance = ops.moments(inputs, axes=[0], keepdims=True)
        return self.gamma * (inputs - mean) / ops.sqrt(variance + self.epsilon) + self.beta


@case("BN-051/alone", expects="BN103", framework="keras", also=("BN203",))
def no_running_statistics_at_all(run: Run) -> None:
    """The same in a binary classifier, by a layer that shows nothing of what it does."""
    data = table("breast_cancer")
    model = classifying(normalized_by(OfTheBatchAlone, 32, inputs=30, classes=2), 3e-3)
    run.fit(model, data.x, data.y, validation_data=(data.xv, data.yv), epochs=5, batch_size=64)
    run.measure(one_at_a_time=one_at_a_time(model, data.xv, data.yv))


@case("BN-053", expects="BN103", framework="keras")
def dropout_as_well(run: Run) -> None:
    """Dropout stays on as well; https://github.com/tensorflow/models/pull/2776."""
    data = digits()
    model = classifying(AlwaysTraining(dropout=0.4), 3e-3)
    run.fit(model, data.x, data.y, validation_data=(data.xv, data.yv), epochs=5, batch_size=64)
    run.measure(one_at_a_time=one_at_a_time(model, data.xv, data.yv))


@case("BN-046/regression", expects="BN103", framework="keras")
def loop_evaluates_in_training_mode(run: Run) -> None:
    """A regression in a loop by hand that evaluates as it trains; the mechanism of BN-046."""
    import tensorflow as tf

    data, rng = table("breast_cancer"), np.random.default_rng(run.seed)
    model, optimizer = mlp(0.9, widths=(48, 48), inputs=30, classes=1), keras.optimizers.Adam(3e-3)
    target, target_v = (np.float32(part[:, :5].sum(axis=1) * part[:, 5]) for part in (data.x, data.xv))

    @tf.function
    def loss_of(x: Any, y: Any) -> Any:
        return tf.reduce_mean(tf.square(model(x, training=True)[:, 0] - y))

    @tf.function
    def train_step(x: Any, y: Any) -> Any:
        with tf.GradientTape() as tape:
            loss = loss_of(x, y)
        weights = model.trainable_variables
        optimizer.apply_gradients(zip(tape.gradient(loss, weights), weights, strict=True))
        return loss

    with run.loop(model) as watch:
        for _ in range(15):
            order = rng.permutation(len(data.x))
            for start in range(0, len(order) - 15, 16):
                x, y = data.x[order[start : start + 16]], target[order[start : start + 16]]
                watch.step(loss=train_step(tf.constant(x), tf.constant(y)), examples=16, batch=(x, y))
            loss = np.mean([loss_of(*map(tf.constant, pair)) for pair in zip(data.xv[:160].reshape(20, 8, 30),
                            target_v[:160].reshape(20, 8), strict=True)])  # fmt: skip
            watch.evaluation(loss=loss, examples=160, data=(data.xv, target_v))
    run.measure(val_loss=loss)
