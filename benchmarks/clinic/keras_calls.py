"""Forward passes in the wrong mode, too many of them, or none that update."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import keras
import numpy as np
import tensorflow as tf
from keras import layers

from benchmarks.clinic.case import case
from benchmarks.clinic.data import digits
from benchmarks.clinic.keras_parts import CLASSES, backbone, batch_norm, batches, cnn, compiled, mlp

if TYPE_CHECKING:
    from benchmarks.clinic.case import Run


@case("BN-151", expects="BN103", framework="keras")
def exported_in_training_mode(run: Run) -> None:
    """The serving function was traced with ``training=True``: https://github.com/tensorflow/tensorflow/issues/26075."""
    x, y, xv, yv = digits(flat=True)
    rng = np.random.default_rng(run.seed)
    model = mlp()
    optimizer = keras.optimizers.Adam(1e-3)
    loss_of = keras.losses.SparseCategoricalCrossentropy(from_logits=True)

    @tf.function
    def step(xb: Any, yb: Any) -> tuple[Any, Any]:
        with tf.GradientTape() as tape:
            logits = model(xb, training=True)
            loss = loss_of(yb, logits)
        optimizer.apply(tape.gradient(loss, model.trainable_variables), model.trainable_variables)
        return loss, tf.reduce_mean(tf.cast(tf.argmax(logits, -1) == tf.cast(yb, tf.int64), tf.float32))

    serve = tf.function(lambda image: tf.argmax(model(image, training=True), -1))
    with run.loop(model) as watch:
        for _ in range(6):
            for xb, yb in batches(rng, x, y, size=32):
                loss, right = step(tf.constant(xb), tf.constant(yb))
                watch.step(accuracy=right, loss=loss, examples=len(xb), batch=(xb, yb))
            served = np.concatenate([serve(tf.constant(xv[i : i + 1])).numpy() for i in range(len(xv))])
            accuracy = float(np.mean(served == yv))
            watch.evaluation(accuracy=accuracy, examples=len(xv), classes=CLASSES, data=(xv, yv))
    run.measure(served=accuracy)
    run.subject(model, train=(x, y), evaluation=(xv, yv))


class Adversarial(keras.Model):
    """Generator and discriminator in one model: both steps run everything in training mode."""

    def __init__(self, generator: Any, discriminator: Any) -> None:
        super().__init__()
        self.generator, self.discriminator = generator, discriminator
        self.noise = keras.random.SeedGenerator(1)

    def compile(self, rate: float) -> None:
        """Take an optimizer for each."""
        super().compile()
        self.of_g, self.of_d = keras.optimizers.Adam(rate), keras.optimizers.Adam(rate)
        self.loss_of = keras.losses.BinaryCrossentropy(from_logits=True)

    def train_step(self, real: Any) -> Any:
        """Take a step of the discriminator and one of the generator."""
        zeros, ones = tf.zeros((tf.shape(real)[0], 1)), tf.ones((tf.shape(real)[0], 1))
        noise = keras.random.normal((tf.shape(real)[0], 16), seed=self.noise)
        with tf.GradientTape() as tape:
            both = tf.concat([self.generator(noise, training=True), real], axis=0)
            d_loss = self.loss_of(tf.concat([zeros, ones], 0), self.discriminator(both, training=True))
        weights = self.discriminator.trainable_weights
        self.of_d.apply(tape.gradient(d_loss, weights), weights)
        noise = keras.random.normal((tf.shape(real)[0], 16), seed=self.noise)
        with tf.GradientTape() as tape:
            g_loss = self.loss_of(ones, self.discriminator(self.generator(noise, training=True), training=True))
        weights = self.generator.trainable_weights
        self.of_g.apply(tape.gradient(g_loss, weights), weights)
        return {"d_loss": d_loss, "g_loss": g_loss}


@case("BN-156", expects="BN106", framework="keras")
def both_steps_update_the_generator(run: Run) -> None:
    """Both steps update the statistics: https://github.com/carpedm20/DCGAN-tensorflow/issues/289."""
    x, *_ = digits(flat=True)
    generator = keras.Sequential(
        [
            keras.Input((16,)),
            layers.Dense(64, use_bias=False),
            batch_norm(),
            layers.ReLU(),
            layers.Dense(64, activation="sigmoid"),
        ]
    )
    discriminator = keras.Sequential(
        [
            keras.Input((64,)),
            layers.Dense(64),
            layers.LeakyReLU(),
            layers.Dense(1),
        ]
    )
    model = Adversarial(generator, discriminator)
    model.compile(1e-3)
    run.fit(model, x, epochs=10, batch_size=64)


class Monitor(keras.callbacks.Callback):
    """Looks at the spread of the outputs under dropout on strange images, and so calls the network as in training."""

    def __init__(self, images: Any) -> None:
        super().__init__()
        self.images = images

    def on_test_begin(self, logs: Any = None) -> None:  # noqa: ARG002 - Keras's signature
        """Measure the spread of 30 passes."""
        spread = np.std([self.model(self.images, training=True) for _ in range(30)])
        assert np.isfinite(spread)


@case("BN-156/monitor", expects="BN106", framework="keras")
def passes_of_a_monitor(run: Run) -> None:
    """A callback draws from dropout with ``training=True`` before each validation, on images of pure noise."""
    x, y, xv, yv = digits()
    inputs = keras.Input((8, 8, 1))
    h = layers.Dropout(0.2)(layers.Flatten()(layers.MaxPooling2D()(backbone(inputs))))
    model = compiled(keras.Model(inputs, layers.Dense(CLASSES)(h)))
    noise = np.random.default_rng(run.seed).random((32, 8, 8, 1)).astype("float32")
    run.fit(model, x, y, validation_data=(xv, yv), epochs=6, batch_size=32, callbacks=[Monitor(noise)])


@case("BN-158", expects=None, innocent=True, framework="keras")
def unlabelled_half(run: Run) -> None:
    """Half of each batch is unlabelled and of another kind.

    https://github.com/brain-research/realistic-ssl-evaluation/issues/6
    """
    x, y, xv, yv = digits()
    pairs = np.empty((2 * len(x), *x.shape[1:]), "float32")
    pairs[0::2], pairs[1::2] = x, 0.6 * (1.0 - x)
    labels = np.repeat(y, 2)
    weights = np.tile(np.array([1.0, 0.0], "float32"), len(x))
    order = np.random.default_rng(run.seed).permutation(len(x))
    rows = np.stack([2 * order, 2 * order + 1], 1).reshape(-1)
    model = cnn()
    run.fit(
        compiled(model, metrics=[], weighted_metrics=["accuracy"]),
        pairs[rows], labels[rows], sample_weight=weights[rows], validation_data=(xv, yv), epochs=8, batch_size=64,
    )  # fmt: skip


class Segmenter(keras.Model):
    """Remembers in which mode it is, as a network in PyTorch does."""

    def __init__(self) -> None:
        super().__init__()
        self.mode = True
        inputs = keras.Input((8, 8, 1))
        h = layers.MaxPooling2D()(backbone(inputs, momentum=0.99))
        self.net = keras.Model(inputs, layers.Dense(CLASSES)(layers.Flatten()(h)))

    def call(self, inputs: Any) -> Any:
        """Return the logits."""
        return self.net(inputs, training=self.mode)


@case("BN-161", expects="BN107", framework="keras")
def never_switched_back(run: Run) -> None:
    """The first validation leaves inference mode on: https://github.com/wkentaro/pytorch-fcn/issues/57."""
    x, y, xv, yv = digits()
    rng = np.random.default_rng(run.seed)
    model = Segmenter()
    optimizer = keras.optimizers.Adam(1e-3)
    loss_of = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    steps = 0
    losses = []

    def validate() -> float:
        model.mode = False
        return float(np.mean(np.argmax(model(xv).numpy(), -1) == yv))

    with run.loop(model) as watch:
        for _ in range(5):
            for xb, yb in batches(rng, x, y, size=32):
                with tf.GradientTape() as tape:
                    logits = model(xb)
                    loss = loss_of(yb, logits)
                optimizer.apply(tape.gradient(loss, model.trainable_variables), model.trainable_variables)
                right = np.mean(np.argmax(logits.numpy(), -1) == yb)
                losses.append(float(loss))
                watch.step(accuracy=right, loss=loss, examples=len(xb), batch=(xb, yb))
                steps += 1
                if steps % 40 == 20:
                    accuracy = validate()
                    watch.evaluation(accuracy=accuracy, examples=len(xv), classes=CLASSES, data=(xv, yv))
    run.measure(before=losses[19], behind=losses[20], last=losses[-1], val=accuracy)
    run.subject(model, train=(x, y), evaluation=(xv, yv))
