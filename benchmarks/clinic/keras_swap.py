"""Weights that are swapped or copied, and statistics that stay what they were."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import keras
import numpy as np
from keras import layers, ops

from benchmarks.clinic.case import case
from benchmarks.clinic.data import digits
from benchmarks.clinic.keras_parts import cnn, compiled, mlp

if TYPE_CHECKING:
    from benchmarks.clinic.case import Run


class Snapshots(keras.callbacks.Callback):
    """Keeps the trainable weights of the last six epochs and, when training ends, sets their mean."""

    def __init__(self) -> None:
        super().__init__()
        self.kept: list[list[np.ndarray[Any, Any]]] = []

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:  # noqa: ARG002 - Keras's signature
        """Keep the weights."""
        self.kept = [*self.kept[-5:], [v.numpy() for v in self.model.trainable_variables]]

    def on_train_end(self, logs: Any = None) -> None:  # noqa: ARG002 - Keras's signature
        """Set the mean."""
        for variable, values in zip(self.model.trainable_variables, zip(*self.kept, strict=True), strict=True):
            variable.assign(np.mean(values, axis=0))


class AveragedForValidation(Snapshots):
    """Validates the mean of the snapshots, and trains on with the weights themselves."""

    def on_test_begin(self, logs: Any = None) -> None:  # noqa: ARG002 - Keras's signature
        """Set the mean of what was kept."""
        self.own = [v.numpy() for v in self.model.trainable_variables]
        for variable, values in zip(
            self.model.trainable_variables, zip(*self.kept, self.own, strict=True), strict=True
        ):
            variable.assign(np.mean(values, axis=0))

    def on_test_end(self, logs: Any = None) -> None:  # noqa: ARG002 - Keras's signature
        """Set the weights back."""
        for variable, value in zip(self.model.trainable_variables, self.own, strict=True):
            variable.assign(value)


class Reestimated(Snapshots):
    """Makes the statistics anew for the mean of the weights."""

    def __init__(self, x: np.ndarray[Any, Any]) -> None:
        super().__init__()
        self.x = x

    def on_train_end(self, logs: Any = None) -> None:
        """Set the mean, and run over the training data with a cumulative average."""
        super().on_train_end(logs)
        norms = [layer for layer in self.model.layers if isinstance(layer, layers.BatchNormalization)]
        own = [layer.momentum for layer in norms]
        for number, start in enumerate(range(0, len(self.x) - 99, 100)):
            for layer in norms:
                layer.momentum = number / (number + 1)
            self.model(self.x[start : start + 100], training=True)
        for layer, momentum in zip(norms, own, strict=True):
            layer.momentum = momentum


class MeanTeacher(keras.Model):
    """Trains a student; a second copy with moving averages of the weights answers in evaluation."""

    def __init__(self, student: Any, teacher: Any, decay: float = 0.95) -> None:
        super().__init__()
        self.student, self.teacher, self.decay = student, teacher, decay
        self.teacher.set_weights(self.student.get_weights())

    def call(self, inputs: Any, training: bool = False) -> Any:
        """Return the logits, the student's in training and the teacher's otherwise."""
        return self.student(inputs, training=True) if training else self.teacher(inputs, training=False)

    def train_step(self, data: Any) -> Any:
        """Train the student, and let the teacher follow."""
        import tensorflow as tf

        x, y = data
        with tf.GradientTape() as tape:
            logits = self(x, training=True)
            loss = self.compute_loss(x, y, logits)
        variables = self.student.trainable_variables
        self.optimizer.apply(tape.gradient(loss, variables), variables)
        for slow, quick in zip(self.teacher.trainable_variables, variables, strict=True):
            slow.assign(self.decay * slow + (1.0 - self.decay) * quick)
        for metric in self.metrics:
            if metric.name == "loss":
                metric.update_state(loss)
            else:
                metric.update_state(y, logits)
        return self.get_metrics_result()


def deep() -> Any:
    """Return a deep network, in which what averaged weights change adds up, trained at a large rate."""
    return mlp((64,) * 8)


@case("BN-140", expects="BN210", framework="keras")
def mean_of_six_snapshots(run: Run) -> None:
    """Weights are averaged, statistics are not.

    https://github.com/kristpapadopoulos/keras-stochastic-weight-averaging/issues/4
    """
    x, y, xv, yv = digits(flat=True)
    model = compiled(deep(), 1e-2)
    run.fit(model, x, y, validation_data=(xv, yv), epochs=8, batch_size=32, callbacks=[Snapshots()])
    run.measure(after=model.evaluate(xv, yv, verbose=0)[1])


@case("BN-140/validation", expects="BN210", framework="keras")
def mean_for_validation(run: Run) -> None:
    """The mean of the weights is what every validation sees."""
    x, y, xv, yv = digits(flat=True)
    callbacks = [AveragedForValidation()]
    run.fit(compiled(deep(), 1e-2), x, y, validation_data=(xv, yv), epochs=8, batch_size=32, callbacks=callbacks)


@case("BN-140/ema", expects="BN210", framework="keras")
def swap_ema_weights(run: Run) -> None:
    """Keras's own moving average of the weights: ``SwapEMAWeights`` swaps weights, not statistics."""
    x, y, xv, yv = digits(flat=True)
    optimizer = keras.optimizers.Adam(1e-2, use_ema=True, ema_momentum=0.99)
    model = compiled(deep(), optimizer=optimizer)
    callbacks = [keras.callbacks.SwapEMAWeights()]
    run.fit(model, x, y, validation_data=(xv, yv), epochs=6, batch_size=32, callbacks=callbacks)
    run.measure(after=model.evaluate(xv, yv, verbose=0)[1])


@case("BN-142", expects=("BN210", "BN211"), framework="keras")
def teacher_without_statistics(run: Run) -> None:
    """The averaged copy never gets statistics: https://github.com/odegeasslbc/FastGAN-pytorch/issues/4.

    There the copy was a generator; here it is the teacher of a classifier, so that the harm has a number.
    """
    x, y, xv, yv = digits(raw=True)
    run.fit(compiled(MeanTeacher(cnn(), cnn())), x, y, validation_data=(xv, yv), epochs=8, batch_size=32)


@case("BN-145", expects="BN211", framework="keras")
def fine_tuned_after_a_partial_restore(run: Run) -> None:
    """Trainable variables alone are restored, and trained on: https://github.com/tinghuiz/SfMLearner/issues/17."""
    x, y, xv, yv = digits(raw=True)
    restored = partly_restored(x, y)
    run.fit(compiled(restored, 1e-5), x, y, validation_data=(xv, yv), epochs=2, batch_size=64)


@case("BN-145/evaluated", expects="BN211", framework="keras")
def evaluated_after_a_partial_restore(run: Run) -> None:
    """Trainable variables alone are restored, and the network is evaluated: no step is taken."""
    x, y, xv, yv = digits(raw=True)
    restored = partly_restored(x, y)
    with run.loop(restored) as watch:
        right = float(np.mean(np.argmax(restored.predict(xv, verbose=0), axis=-1) == yv))
        watch.evaluation(accuracy=right, examples=len(xv), classes=10, data=(xv, yv))
    run.measure(val=right)
    run.subject(restored, train=(x, y), evaluation=(xv, yv))


@case("BN-145/head", expects="BN211", framework="keras")
def statistics_of_some_layers_lost(run: Run) -> None:
    """A name changed: the statistics of the last batch norm are not found in the file, everything else is."""
    x, y, xv, yv = digits(raw=True)
    trained = compiled(cnn(momentum=0.99))
    trained.fit(x, y, epochs=12, batch_size=32, verbose=0)
    restored = cnn(momentum=0.99)
    restored.set_weights(trained.get_weights())
    last = [layer for layer in restored.layers if isinstance(layer, layers.BatchNormalization)][-1]
    last.moving_mean.assign(ops.zeros_like(last.moving_mean))
    last.moving_variance.assign(ops.ones_like(last.moving_variance))
    run.fit(compiled(restored, 1e-5), x, y, validation_data=(xv, yv), epochs=1, batch_size=64)


def partly_restored(x: Any, y: Any) -> Any:
    """Return a fresh network with the trainable variables of a trained one."""
    trained = compiled(cnn(momentum=0.99))
    trained.fit(x, y, epochs=8, batch_size=32, verbose=0)
    fresh = cnn(momentum=0.99)
    for variable, value in zip(fresh.trainable_variables, trained.trainable_variables, strict=True):
        variable.assign(value)
    return fresh


@case("OK-20", expects=None, framework="keras")
def averaged_and_reestimated(run: Run) -> None:
    """The mean of six snapshots with statistics made anew: https://github.com/timgaripov/swa."""
    x, y, xv, yv = digits(flat=True)
    model = compiled(deep(), 1e-2)
    run.fit(model, x, y, validation_data=(xv, yv), epochs=8, batch_size=32, callbacks=[Reestimated(x)])
    run.measure(after=model.evaluate(xv, yv, verbose=0)[1])
