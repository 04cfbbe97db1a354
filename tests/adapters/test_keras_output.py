"""How a model ends, what its loss expects, accumulated gradients, and masks that batch normalization is not told of."""

from __future__ import annotations

import pytest

from bnwatch.keras.structure import structure
from bnwatch.records import Output
from tests.adapters.keras_models import CLASSES
from tests.adapters.library import LEGACY, keras, layers, ops, set_random_seed


def ended(*end, loss="sparse_categorical_crossentropy"):
    """Return what is known of how a model ends with these layers behind a batch norm."""
    set_random_seed(1)
    model = keras.Sequential([keras.Input((5,)), layers.BatchNormalization(name="bn"), *end])
    model.compile(keras.optimizers.SGD(), loss)
    return structure(model).output


def scores(activation=None, units=CLASSES):
    return layers.Dense(units, activation=activation, name="scores")


CATEGORICAL = "sparse_categorical_crossentropy"

ENDS = {
    "softmax": ([scores("softmax")], "softmax"),
    "logits": ([scores()], "linear"),
    "a layer softmax": ([scores(), layers.Softmax(name="out")], "softmax"),
    "an activation": ([scores(), layers.Activation("sigmoid", dtype="float32", name="out")], "sigmoid"),
    "relu": ([scores("relu")], "relu"),
    "a layer relu": ([scores(), layers.ReLU(name="out")], "relu"),
    "twice": ([scores("softmax"), layers.Softmax(name="out")], "softmax"),
    "with dropout behind": ([scores("tanh"), layers.Dropout(0.1), layers.Activation("linear")], "tanh"),
}


@pytest.mark.parametrize("end", ENDS)
def test_the_activation_and_the_layer_that_makes_the_scores(end):
    made, activation = ENDS[end]
    assert ended(*made) == Output("scores", CLASSES, activation, CATEGORICAL, from_logits=False)


LOSSES = {
    "a string": ("binary_crossentropy", "binary_crossentropy", False),
    "a short one": ("mse", "mean_squared_error", None),
    "a function": (keras.losses.categorical_crossentropy, "categorical_crossentropy", False),
    "an object": (keras.losses.SparseCategoricalCrossentropy(), CATEGORICAL, False),
    "of logits": (keras.losses.SparseCategoricalCrossentropy(from_logits=True, name="mine"), CATEGORICAL, True),
    "binary of logits": (keras.losses.BinaryCrossentropy(from_logits=True), "binary_crossentropy", True),
    "a hinge": (keras.losses.CategoricalHinge(), "categorical_hinge", None),
    "the user's own": (lambda y, p: p, None, None),
    "none": (None, None, None),
    "in a list": ([keras.losses.SparseCategoricalCrossentropy(from_logits=True)], CATEGORICAL, True),
}


@pytest.mark.parametrize("loss", LOSSES)
def test_the_loss(loss):
    given, name, from_logits = LOSSES[loss]
    found = ended(scores(), loss=given)
    assert (found.loss, found.from_logits) == (name, from_logits)


def test_a_function_in_the_graph():
    inputs = keras.Input((5,))
    x = scores()(layers.BatchNormalization()(inputs))
    found = structure(keras.Model(inputs, ops.relu(x) if LEGACY else keras.ops.softmax(x))).output
    assert found == Output("scores", CLASSES, "relu" if LEGACY else "softmax")


def test_several_outputs_and_code_of_the_user_are_not_known():
    inputs = keras.Input((5,))
    x = layers.BatchNormalization()(inputs)
    assert structure(keras.Model(inputs, [scores()(x), layers.Dense(1)(x)])).output is None
    assert structure(keras.Model(inputs, layers.Lambda(lambda v: v * 2.0, name="own")(x))).output == Output("own", 5)


@pytest.mark.skipif(LEGACY, reason="Keras 2 accumulates no gradients")
def test_accumulated_gradients():
    model = keras.Sequential([keras.Input((5,)), layers.BatchNormalization()])
    assert structure(model).accumulated == 1
    model.compile(keras.optimizers.SGD(gradient_accumulation_steps=4), "mse")
    assert structure(model).accumulated == 4


def masked(*between, start=None):
    """Return the mask that a batch norm behind these layers is not told of."""
    start = start or [keras.Input((7, 3)), layers.Masking(name="mask")]
    model = keras.Sequential([*start, *between, layers.BatchNormalization(name="bn")])
    ((place,),) = (usage.places for usage in structure(model).layers)
    return place.mask


MASKS = {
    "a convolution loses it": ([layers.Conv1D(4, 3)], "mask"),
    "and nothing brings it back": ([layers.Conv1D(4, 3), layers.ReLU(), layers.Dense(2)], "mask"),
    "it arrives": ([], None),
    "through what passes it on": ([layers.Dense(4), layers.Dropout(0.1), layers.LSTM(4, return_sequences=True)], None),
    "no positions are left": ([layers.LSTM(4)], None),
    "nor behind a pooling": ([layers.Conv1D(4, 3), layers.GlobalAveragePooling1D()], None),
}


LOST = pytest.mark.filterwarnings("ignore:Layer .* was passed an input with a mask:UserWarning")
"""Keras 3 says so itself, which does not say what batch normalization then counts."""


@LOST
@pytest.mark.parametrize("between", MASKS)
def test_a_mask_that_batch_normalization_is_not_told_of(between):
    made, expected = MASKS[between]
    assert masked(*made) == expected


@LOST
def test_the_mask_of_an_embedding():
    def words(zero):
        return [keras.Input((7,)), layers.Embedding(9, 4, mask_zero=zero, name="words")]

    assert masked(layers.Conv1D(4, 3), start=words(True)) == "words"
    assert masked(layers.Conv1D(4, 3), start=words(False)) is None
