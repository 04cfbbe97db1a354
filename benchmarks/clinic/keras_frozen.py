"""Layers that are meant to be frozen, and go on normalizing with the statistics of each batch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import keras
import numpy as np
import tensorflow as tf
from keras import layers

from benchmarks.clinic.case import case
from benchmarks.clinic.data import digits
from benchmarks.clinic.keras_parts import backbone, batches, compiled

if TYPE_CHECKING:
    from benchmarks.clinic.case import Run

FEW = 600


def pretrained(**arguments: Any) -> Any:
    """Return the features of a network that was trained on the digits as they are, its batch norms of ``arguments``."""
    x, y, *_ = digits()
    inputs = keras.Input((8, 8, 1))
    features = keras.Model(inputs, layers.Flatten()(layers.MaxPooling2D()(backbone(inputs, **arguments))))
    classifier = keras.Sequential([features, layers.Dense(10)])
    compiled(classifier).fit(x, y, epochs=10, batch_size=32, verbose=0)
    return features


def head(outputs: int = 2) -> Any:
    """Return a new classifier of the features."""
    return keras.Sequential([layers.Dense(32, activation="relu"), layers.Dense(outputs)], name="head")


def darker() -> tuple[Any, ...]:
    """Return few inverted digits of little contrast and whether they are odd."""
    x, y, xv, yv = digits()
    return 0.3 * (1 - x[:FEW]) + 0.1, y[:FEW] % 2, 0.3 * (1 - xv) + 0.1, yv % 2


def brighter() -> tuple[Any, ...]:
    """Return few bright digits of little contrast and whether they are odd."""
    x, y, xv, yv = digits()
    return 0.25 * x[:FEW] + 0.6, y[:FEW] % 2, 0.25 * xv + 0.6, yv % 2


def accuracy(model: Any, x: Any, y: Any) -> float:
    """Return the share of right answers in inference mode."""
    return float(np.mean(np.argmax(model.predict(x, verbose=0), axis=-1) == y))


class HeadOnly(keras.Model):
    """Trains the head on features of a backbone that is called as the rest of the model is."""

    def __init__(self, features: Any, classifier: Any) -> None:
        super().__init__()
        self.features, self.classifier = features, classifier

    def call(self, inputs: Any, training: bool = False) -> Any:
        """Return the logits."""
        return self.classifier(self.features(inputs, training=training))

    def train_step(self, data: Any) -> Any:
        """Take one step with the variables of the head."""
        x, y = data
        with tf.GradientTape() as tape:
            logits = self(x, training=True)
            loss = self.compute_loss(x, y, logits)
        variables = self.classifier.trainable_variables
        self.optimizer.apply(tape.gradient(loss, variables), variables)
        for metric in self.metrics:
            if metric.name == "loss":
                metric.update_state(loss)
            else:
                metric.update_state(y, logits)
        return self.get_metrics_result()


@case("BN-121", expects="BN105", framework="keras")
def statistics_pinned(run: Run) -> None:
    """All parameters are frozen and the moving averages pinned: https://github.com/keras-team/keras/pull/9965.

    Keras 3 freezes a batch norm by ``trainable=False``; here each piece was frozen by hand, as Keras 2.1 did.
    """
    x, y, xv, yv = darker()
    features = pretrained()
    for layer in features.layers:
        if isinstance(layer, layers.BatchNormalization):
            layer.momentum = 1.0
            layer.gamma.trainable = layer.beta.trainable = False
        else:
            layer.trainable = False
    model = keras.Sequential([features, head()])
    run.fit(compiled(model), x, y, validation_data=(xv, yv), epochs=12, batch_size=32)


@case("BN-121/loop", expects="BN105", framework="keras")
def backbone_called_in_training_mode(run: Run) -> None:
    """A loop trains the head alone and calls the backbone in training mode: the same fault, by hand."""
    x, y, xv, yv = darker()
    rng = np.random.default_rng(run.seed)
    features, top = pretrained(momentum=0.99), head()
    model = keras.Sequential([features, top])
    model.build((None, 8, 8, 1))
    optimizer = keras.optimizers.Adam(1e-3)
    loss_of = keras.losses.SparseCategoricalCrossentropy(from_logits=True)

    @tf.function
    def step(xb: Any, yb: Any) -> tuple[Any, Any]:
        with tf.GradientTape() as tape:
            logits = top(features(xb, training=True), training=True)
            loss = loss_of(yb, logits)
        optimizer.apply(tape.gradient(loss, top.trainable_variables), top.trainable_variables)
        return loss, tf.reduce_mean(tf.cast(tf.argmax(logits, -1) == tf.cast(yb, tf.int64), tf.float32))

    with run.loop(model) as watch:
        for _ in range(6):
            for xb, yb in batches(rng, x, y, size=32):
                loss, right = step(tf.constant(xb), tf.constant(yb))
                watch.step(accuracy=right, loss=loss, examples=len(xb), batch=(xb, yb))
            watch.evaluation(accuracy=accuracy(model, xv, yv), examples=len(xv), classes=2, data=(xv, yv))
    run.measure(train=accuracy(model, x, y), val=accuracy(model, xv, yv))
    run.subject(model, train=(x, y), evaluation=(xv, yv))


@case("BN-124", expects="BN105", framework="keras")
def convolutions_frozen(run: Run) -> None:
    """Two of three blocks are frozen, batch norm by gamma and beta: https://github.com/keras-team/keras/issues/10214."""
    x, y, xv, yv = darker()
    features = pretrained(momentum=0.99)
    for layer in features.layers[:7]:
        if isinstance(layer, layers.BatchNormalization):
            layer.gamma.trainable = layer.beta.trainable = False
        else:
            layer.trainable = False
    model = keras.Sequential([features, head()])
    run.fit(compiled(model), x, y, validation_data=(xv, yv), epochs=5, batch_size=32)


@case("BN-124/convolutions", expects=("BN105", "BN202"), framework="keras")
def only_convolutions_frozen(run: Run) -> None:
    """Every convolution is frozen, and batch norm forgotten: the same, as many write it."""
    x, y, xv, yv = darker()
    features = pretrained(momentum=0.99)
    for layer in features.layers:
        if isinstance(layer, layers.Conv2D):
            layer.trainable = False
    model = keras.Sequential([features, head()])
    run.fit(compiled(model), x, y, validation_data=(xv, yv), epochs=5, batch_size=32)


@case("BN-125", expects="BN105", framework="keras")
def train_step_of_the_head(run: Run) -> None:
    """A train_step for the head only: https://github.com/fchollet/deep-learning-models/issues/96."""
    x, y, xv, yv = brighter()
    model = HeadOnly(pretrained(momentum=0.99), head())
    run.fit(compiled(model), x, y, validation_data=(xv, yv), epochs=5, batch_size=32)


@case("BN-128", expects="BN105", framework="keras")
def freezing_undone(run: Run) -> None:
    """Batch norm is frozen, then all is set trainable: https://github.com/poppinace/indexnet_matting/issues/35."""
    x, y, xv, yv = brighter()
    features = pretrained(momentum=0.99)
    features.trainable = False
    model = HeadOnly(features, head())
    for layer in features.layers:
        layer.trainable = True
    run.fit(compiled(model), x, y, validation_data=(xv, yv), epochs=5, batch_size=32)


@case("OK-09", expects=None, framework="keras")
def frozen_on_purpose(run: Run) -> None:
    """A backbone that is frozen as Keras has it, on data unlike its own: https://keras.io/guides/transfer_learning/."""
    x, y, xv, yv = darker()
    features = pretrained()
    features.trainable = False
    model = keras.Sequential([features, head()])
    run.fit(compiled(model), x, y, validation_data=(xv, yv), epochs=12, batch_size=32)


@case("OK-09/fine-tuned", expects=None, framework="keras")
def frozen_then_fine_tuned(run: Run) -> None:
    """The head first, then everything at a small rate with the backbone in inference mode, as the guide has it."""
    x, y, xv, yv = digits()
    features = pretrained(momentum=0.99)
    features.trainable = False
    inputs = keras.Input((8, 8, 1))
    model = keras.Model(inputs, head()(features(inputs, training=False)))
    run.fit(compiled(model), x, y % 2, validation_data=(xv, yv % 2), epochs=5, batch_size=32)
    features.trainable = True
    run.fit(compiled(model, 1e-5), x, y % 2, validation_data=(xv, yv % 2), epochs=3, batch_size=32)
