"""Experiments measure what Keras itself would, and restore everything to the bit."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.testing import assert_allclose

from bnwatch.evidence import ExperimentNotPossibleError
from bnwatch.keras import crosscheck
from bnwatch.keras.backends import backend_of
from bnwatch.keras.experiments import Given
from bnwatch.keras.laboratory import KerasLaboratory, class_scores
from bnwatch.keras.layers import find_layers
from tests.adapters.keras_models import CLASSES, Batches, compiled, convolutional, data, faked, make, state
from tests.adapters.library import LEGACY, keras, layers, modes, to_numpy


@pytest.fixture(scope="module")
def trained():
    x, y = data(320)
    model = make()
    model.fit(x, y, batch_size=32, epochs=2, verbose=0)
    return model, x, y


def dense(model, name, x):
    kernel, bias = (w.astype("float64") for w in model.get_layer(name).get_weights())
    return x @ kernel + bias


def normalized(layer, x, mean, var):
    gamma, beta = to_numpy(layer.gamma), to_numpy(layer.beta)
    return (x - mean) / np.sqrt(var + layer.epsilon) * gamma + beta


def mlp(*, trainable=True):
    """Return a net simple enough to be done by hand: two batch norms in a row of layers, dropout between them."""
    first = layers.BatchNormalization(name="first", trainable=trainable)
    return keras.Sequential(
        [
            keras.Input((5,)),
            layers.Dense(6, name="a"),
            first,
            layers.ReLU(),
            layers.Dropout(0.5),
            layers.Dense(6, name="b"),
            layers.BatchNormalization(name="second"),
            layers.Dense(CLASSES, name="c"),
        ]
    )


def by_hand(model, x, statistics):
    """Return outputs, given for each batch norm what to normalize an input with."""
    z = dense(model, "a", x.astype("float64"))
    z = np.maximum(normalized(model.get_layer("first"), z, *statistics("first", z)), 0)
    z = dense(model, "b", z)
    return dense(model, "c", normalized(model.get_layer("second"), z, *statistics("second", z)))


def test_running_cells_are_what_keras_evaluates(trained):
    model, x, y = trained
    before = state(model)
    cells = crosscheck(model, train=(x[:200], y[:200]), eval=(x[200:], y[200:]))
    assert state(model) == before
    for row, part in ((cells.training, slice(0, 200)), (cells.evaluation, slice(200, None))):
        assert row["running"].accuracy == pytest.approx(model.evaluate(x[part], y[part], verbose=0)[1])
        assert set(row) >= {"batch", "running", "population"}
        assert {cell.examples for cell in row.values()} == {len(y[part])}
    assert cells.classes == CLASSES


def test_batch_statistics_of_the_shared_net_are_those_of_training(trained):
    """With dropout at rate 0, ``training=True`` gives what the experiment must give, and moves the statistics."""
    model, x, y = trained
    lab = KerasLaboratory(backend_of(model), {"training": Given((x, y), "training", 32)})
    (batch,) = lab.examples("training", 32)
    before = state(model)
    scores = lab.outputs(batch, "batch")
    assert state(model) == before
    twin = convolutional(dropout=0.0)
    twin.set_weights(model.get_weights())
    assert_allclose(scores, to_numpy(twin(x[:32], training=True)), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("trainable", [True, False])
def test_batch_and_population_statistics_by_hand(trainable):
    x, y = data(100, shape=(5,))
    model = make(lambda: mlp(trainable=trainable))
    model.fit(x, y, verbose=0)
    lab = KerasLaboratory(backend_of(model), {"training": Given((x, y), "training", 32)})
    batches = lab.examples("training", 1000)
    assert [len(batch.labels) for batch in batches] == [32, 32, 32, 4]

    pooled = {"first": [], "second": []}

    def measured(name, z):
        pooled[name].append((len(z), z.mean(0), z.var(0)))
        return z.mean(0), z.var(0)

    for batch in batches:
        expected = by_hand(model, np.asarray(batch.inputs), measured)
        # a frozen layer takes part: Keras itself would let it ignore training=True
        assert_allclose(lab.outputs(batch, "batch"), expected, rtol=1e-4, atol=1e-4)

    def population(name, z):
        del z
        n = sum(count for count, _, _ in pooled[name])
        mean = sum(count * m for count, m, _ in pooled[name]) / n
        return mean, sum(count * (v + (m - mean) ** 2) for count, m, v in pooled[name]) / n

    before = state(model)
    with lab.population(batches):
        for name in pooled:
            layer, (mean, var) = model.get_layer(name), population(name, None)
            assert_allclose(to_numpy(layer.moving_mean), mean, rtol=1e-5, atol=1e-6)
            assert_allclose(to_numpy(layer.moving_variance), var, rtol=1e-5)
        inside = lab.outputs(batches[0], "running")
    assert state(model) == before
    assert_allclose(inside, by_hand(model, x[:32], population), rtol=1e-4, atol=1e-4)


def test_everything_is_restored_when_the_experiment_raises(trained):
    model, x, y = trained
    lab = KerasLaboratory(backend_of(model), {"training": Given((x, y), "training", 32)})
    before = state(model)
    with pytest.raises(ZeroDivisionError), lab.population(lab.examples("training", 64)):
        _ = state(model) == before or 1 / 0
    assert state(model) == before


def test_a_model_that_cannot_be_run_is_a_reason_not_a_failure():
    class Picky(layers.Layer):
        def compute_output_shape(self, shape):
            return shape

        def call(self, x, training=None):
            if not training:
                msg = "only in training"
                raise RuntimeError(msg)
            return x

    model = keras.Sequential([layers.Dense(4), layers.BatchNormalization(name="bn"), Picky(), layers.Dense(CLASSES)])
    x, y = data(32, shape=(5,))
    model(x, training=True)
    lab = KerasLaboratory(backend_of(compiled(model)), {"training": Given((x, y), "training", 32)})
    for attempt in (lambda b: lab.outputs(b, "batch"), lambda b: lab.look(b, gradients=True)):
        with pytest.raises(ExperimentNotPossibleError, match="only in training"):
            attempt(lab.examples("training", 32)[0])
    assert all("call" not in layer.__dict__ for layer in model.layers)


def test_a_look_finds_the_dead_layer_and_its_zero_gradients():
    inputs = keras.Input((5,))
    x = layers.BatchNormalization(name="bn")(layers.Dense(6, name="alive", activation="relu")(inputs))
    dead = layers.Dense(6, activation="relu", name="dead", bias_initializer=keras.initializers.Constant(-1e3))
    model = make(lambda: keras.Model(inputs, layers.Dense(CLASSES, name="scores")(dead(x))))
    x, y = data(48, shape=(5,))
    lab = KerasLaboratory(backend_of(model), {"training": Given((x, y), "training", 48)})
    before = state(model)
    looks = {look.path: look for look in lab.look(lab.examples("training", 1)[0], gradients=True).layers}
    assert state(model) == before
    assert list(looks) == ["alive", "bn", "dead", "scores"]
    assert looks["dead"].kind == "Dense relu"
    assert (looks["dead"].zero_samples, looks["dead"].dead_units, looks["dead"].spread) == (1.0, 1.0, 0.0)
    assert [looks[path].gradient for path in ("alive", "bn", "dead")] == [0.0, 0.0, 0.0]
    assert looks["scores"].spread == 0.0
    assert looks["scores"].gradient > 0.0
    assert looks["alive"].zero_samples < 1.0
    assert looks["alive"].spread > 0.1


def test_a_look_agrees_with_numpy_and_with_the_gradient_of_keras():
    from bnwatch.evidence import LayerLook

    x, y = data(40, shape=(5,))
    model = make(mlp)
    lab = KerasLaboratory(backend_of(model), {"training": Given((x, y), "training", 40)})
    looks = {look.path: look for look in lab.look(lab.examples("training", 1)[0], gradients=True).layers}
    expected = LayerLook.of("a", "Dense", dense(model, "a", x.astype("float64")))
    assert_allclose(looks["a"].spread, expected.spread, rtol=1e-5)
    assert looks["a"].units == 6
    # the gradient of the mean cross-entropy by hand: of a bias the mean, over examples, of probability minus target
    hidden = []

    def measured(name, z):
        hidden.append(normalized(model.get_layer(name), z, z.mean(0), z.var(0)))
        return z.mean(0), z.var(0)

    logits = by_hand(model, x, measured)
    excess = np.exp(logits) / np.exp(logits).sum(1, keepdims=True) - np.eye(CLASSES)[y]
    kernel = hidden[-1].T @ excess / len(y)
    assert_allclose(looks["c"].gradient, max(np.abs(kernel).max(), np.abs(excess.mean(0)).max()), rtol=1e-4)


def test_subclassed_and_nested_models_are_looked_at_layer_by_layer():
    class Block(keras.Model):
        def __init__(self):
            super().__init__(name="block")
            self.inner = keras.Sequential(
                [layers.Dense(4, name="d"), layers.BatchNormalization(name="bn")], name="inner"
            )
            self.out = layers.Dense(CLASSES, name="out")

        def call(self, x, training=None):
            return self.out(self.inner(self.inner(x, training=training)[:, :4], training=training))

    x, y = data(16, shape=(4,))
    model = compiled(Block())
    model(x)
    lab = KerasLaboratory(backend_of(model), {"training": Given((x, y), "training", 16)})
    looks = lab.look(lab.examples("training", 1)[0], gradients=False).layers
    assert [look.path for look in looks] == ["inner/d", "inner/bn", "inner/d#1", "inner/bn#1", "out"]
    assert all(look.gradient is None for look in looks)


class Columns:
    def __init__(self, loss, last=None):
        self.loss = loss
        self.layers = [layers.Dense(1, activation=last)]


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        (Columns("binary_crossentropy", "sigmoid"), [[0.7, 0.3], [0.1, 0.9]]),
        (Columns(keras.losses.BinaryCrossentropy()), [[0.7, 0.3], [0.1, 0.9]]),
        (Columns(keras.losses.BinaryCrossentropy(from_logits=True)), [[-0.3, 0.3], [-0.9, 0.9]]),
    ],
)
def test_one_output_column_is_two_classes(model, expected):
    assert_allclose(class_scores(model, np.array([[0.3], [0.9]]), np.array([0, 1])), expected)


def test_outputs_that_are_no_scores_are_refused():
    with pytest.raises(ExperimentNotPossibleError, match="neither a probability nor a logit"):
        class_scores(Columns("mse"), np.zeros((2, 1)), np.array([0, 1]))
    with pytest.raises(ExperimentNotPossibleError, match="shape"):
        class_scores(Columns("mse"), np.zeros((2, 3, 4)), np.array([0, 1]))
    with pytest.raises(ExperimentNotPossibleError, match="label 5"):
        class_scores(Columns("mse"), np.zeros((2, 3)), np.array([0, 5]))


def test_crosscheck_takes_datasets_and_says_what_is_missing(trained):
    model, x, y = trained
    cells = crosscheck(model, eval=Batches(x, y, 64))
    assert (cells.training, cells.evaluation["running"].examples) == ({}, 320)
    assert "training" in cells.missing
    with pytest.raises(ExperimentNotPossibleError, match="no evaluation examples"):
        crosscheck(model)


@pytest.mark.parametrize("arguments", modes("default", "jit", "eager"))
def test_kept_examples_are_batches_of_the_training(arguments):
    """Examples come in dictionaries, through a generator that could not be asked twice."""
    if LEGACY and "jit_compile" in arguments:
        pytest.skip("Keras 2 draws a batch and passes it to what XLA compiles with no place between")
    x, y = data(160, shape=(5,))
    drawn = []

    def batches():
        order = np.random.default_rng(3)
        while True:
            rows = order.choice(160, 16, replace=False)
            drawn.append(rows)
            yield {"one": x[rows, :2], "two": x[rows, 2:]}, y[rows]

    one, two = keras.Input((2,), name="one"), keras.Input((3,), name="two")
    joined = layers.BatchNormalization(name="bn")(layers.Concatenate()([one, two]))
    model = compiled(keras.Model({"one": one, "two": two}, layers.Dense(CLASSES)(joined)), **arguments)
    callback, watch = faked(every=3)
    seen = []
    watch.on_experiment = lambda lab, final: seen.append(
        (lab.examples("training", 1000), lab.examples("evaluation", 1000))
    )
    valid = Batches({"one": x[:, :2], "two": x[:, 2:]}, y, 50)
    model.fit(batches(), steps_per_epoch=10, shuffle=False, verbose=0, callbacks=[callback], validation_data=valid)
    assert not watch.faults
    training, evaluation = seen[0]
    assert len(training) == 3
    for batch, rows in zip(training, (drawn[2], drawn[5], drawn[8]), strict=True):
        assert batch.origin == "training"
        assert_allclose(batch.inputs["one"], x[rows, :2], atol=0)
        assert_allclose(batch.inputs["two"], x[rows, 2:], atol=0)
        assert batch.labels.tolist() == y[rows].tolist()
    assert [len(batch.labels) for batch in evaluation] == [50, 50, 50, 10]
    kept = np.concatenate([np.hstack([b.inputs["one"], b.inputs["two"]]) for b in evaluation])
    assert sorted(map(tuple, kept)) == sorted(map(tuple, x))


def test_layers_are_found_once_and_named_apart():
    inner = layers.BatchNormalization(name="bn")
    model = keras.Sequential(
        [keras.Input((5,)), inner, keras.Sequential([inner, layers.BatchNormalization(name="x")], name="s")]
    )
    assert [w.path for w in find_layers(backend_of(model))[0]] == ["bn", "s/x"]
