"""Networks with batch norm that fail for another reason."""

from __future__ import annotations

from typing import TYPE_CHECKING

import keras
import numpy as np
from keras import layers

from benchmarks.clinic.case import case
from benchmarks.clinic.data import digits
from benchmarks.clinic.keras_parts import batch_norm, cnn, compiled, mlp

if TYPE_CHECKING:
    from benchmarks.clinic.case import Run


@case("BN-168", expects="BN302", innocent=True, framework="keras")
def softmax_of_one_unit(run: Run) -> None:
    """Softmax over one unit is 1 for every example: https://github.com/keras-team/keras/issues/126."""
    x, y, xv, yv = digits(flat=True)
    inputs = keras.Input((64,))
    h = layers.ReLU()(batch_norm()(layers.Dense(64)(inputs)))
    model = keras.Model(inputs, layers.Dense(1, activation="softmax")(h))
    model.compile("adam", "binary_crossentropy", metrics=["accuracy"])
    run.fit(model, x, y % 2, validation_data=(xv, yv % 2), epochs=5, batch_size=32)


@case("BN-170", expects="BN302", innocent=True, framework="keras")
def metric_of_another_kind(run: Run) -> None:
    """The loss falls, and the metric compares other shapes: https://github.com/tensorflow/tensorflow/issues/62460."""
    x, y, xv, yv = digits()
    model = compiled(cnn(), metrics=[keras.metrics.BinaryAccuracy(name="accuracy")])
    run.fit(model, x, y[:, None], validation_data=(xv, yv[:, None]), epochs=6, batch_size=32)


@case("BN-171", expects=None, innocent=True, framework="keras")
def split_of_sorted_data(run: Run) -> None:
    """``validation_split`` takes the last classes of sorted data: https://github.com/keras-team/keras/issues/8346."""
    x, y, *_ = digits(flat=True)
    order = np.argsort(y, kind="stable")
    run.fit(compiled(mlp()), x[order], y[order], validation_split=0.2, epochs=8, batch_size=32)


@case("BN-174", expects=("BN305", "BN302"), innocent=True, framework="keras")
def labels_of_validation_shuffled(run: Run) -> None:
    """The labels of the validation data are in another order: https://github.com/keras-team/keras/issues/5162."""
    x, y, xv, yv = digits(flat=True)
    np.random.default_rng(run.seed).shuffle(yv)
    run.fit(compiled(mlp()), x, y, validation_data=(xv, yv), epochs=8, batch_size=32)


@case("BN-174/training", expects="BN302", innocent=True, framework="keras")
def labels_of_training_shuffled(run: Run) -> None:
    """The labels of the training data are in another order."""
    x, y, xv, yv = digits(flat=True)
    np.random.default_rng(run.seed).shuffle(y)
    run.fit(compiled(mlp()), x, y, validation_data=(xv, yv), epochs=8, batch_size=32)


@case("BN-175", expects="BN305", innocent=True, framework="keras")
def few_noisy_examples(run: Run) -> None:
    """A large network learns 150 noisy examples by heart: https://github.com/keras-team/keras/issues/3894."""
    x, y, xv, yv = digits(flat=True)
    rng = np.random.default_rng(run.seed)
    x = x[:150] + rng.normal(0.0, 0.5, (150, 64)).astype("float32")
    xv = xv + rng.normal(0.0, 0.5, xv.shape).astype("float32")
    run.fit(compiled(mlp((512, 512))), x, y[:150], validation_data=(xv, yv), epochs=40, batch_size=32)


@case("BN-178", expects="BN302", innocent=True, framework="keras")
def rate_far_too_high(run: Run) -> None:
    """Stochastic gradient descent at rate 10: https://github.com/facebookresearch/maskrcnn-benchmark/issues/295."""
    x, y, xv, yv = digits(flat=True)
    model = compiled(mlp(), optimizer=keras.optimizers.SGD(10.0))
    run.fit(model, x, y, validation_data=(xv, yv), epochs=8, batch_size=32)


@case("BN-178/adam", expects=("BN302", "BN305"), innocent=True, framework="keras")
def rate_of_adam_far_too_high(run: Run) -> None:
    """Adam at rate 1."""
    x, y, xv, yv = digits(flat=True)
    run.fit(compiled(mlp(), 1.0), x, y, validation_data=(xv, yv), epochs=8, batch_size=32)


@case("BN-178/low", expects="BN302", innocent=True, framework="keras")
def rate_far_too_low(run: Run) -> None:
    """Adam at rate 1e-8: nothing moves."""
    x, y, xv, yv = digits(flat=True)
    run.fit(compiled(mlp(), 1e-8), x, y, validation_data=(xv, yv), epochs=8, batch_size=32)


@case("BN-168/logits", expects=("BN302", "BN305"), innocent=True, framework="keras")
def logits_taken_for_probabilities(run: Run) -> None:
    """The last layer gives logits and the loss expects probabilities."""
    x, y, xv, yv = digits()
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=False)
    run.fit(compiled(cnn(), loss=loss), x, y, validation_data=(xv, yv), epochs=6, batch_size=32)


@case("BN-174/constant", expects="BN302", innocent=True, framework="keras")
def generator_of_one_image(run: Run) -> None:
    """A generator hands out the same image for every label."""
    x, y, xv, yv = digits()
    x[:], xv[:] = x[0], x[0]
    run.fit(compiled(cnn()), x, y, validation_data=(xv, yv), epochs=5, batch_size=32)
