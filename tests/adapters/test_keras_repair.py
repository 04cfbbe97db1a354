"""Attribution names the layer that was damaged, localisation the one that died; recalibration repairs and refuses."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.testing import assert_allclose

from bnwatch.evidence import ExperimentNotPossibleError
from bnwatch.keras import attribute, crosscheck, localise, recalibrate
from tests.adapters.keras_models import CLASSES, compiled, convolutional, data, make, state
from tests.adapters.library import keras, layers, to_numpy


def deep(*, momentum=0.9):
    rows = [keras.Input((8, 8, 3)), layers.Flatten()]
    for name in ("first", "second", "third", "fourth"):
        rows += [layers.Dense(16), layers.BatchNormalization(momentum=momentum, name=name), layers.ReLU()]
    return keras.Sequential([*rows, layers.Dropout(0.2), layers.Dense(CLASSES)])


@pytest.fixture(scope="module")
def trained():
    x, y = data(640)
    model = make(deep)
    model.fit(x, y, batch_size=32, epochs=8, verbose=0)
    return model, x, y


@pytest.fixture
def statistics(trained):
    """Restore what a test changes."""
    model = trained[0]
    before = model.get_weights()
    yield
    model.set_weights(before)


@pytest.mark.usefixtures("statistics")
@pytest.mark.parametrize("damaged", ["first", "third"])
def test_attribution_names_the_layer_that_was_damaged(trained, damaged):
    model, x, y = trained
    layer = model.get_layer(damaged)
    mean, var = (to_numpy(v) for v in (layer.moving_mean, layer.moving_variance))
    layer.moving_mean.assign(mean + 3 * np.sqrt(var))
    layer.moving_variance.assign(var * 25)
    before = state(model)
    found = attribute(model, (x, y))
    assert state(model) == before
    assert found.costs[0].subject == damaged
    low, high = found.costs[0].recovered.interval
    assert 0 < low <= found.costs[0].recovered.gained <= high
    assert found.explained(0.5) is found.costs[0]
    assert {cost.layer for cost in found.costs} == {"first", "second", "third", "fourth"}
    assert found.running == pytest.approx(model.evaluate(x, y, verbose=0)[1])


@pytest.mark.parametrize("exact", [False, True])
def test_recalibration_restores_a_cold_start(exact):
    x, y = data(640)
    model = make(lambda: deep(momentum=0.999))
    model.fit(x, y, batch_size=32, epochs=6, verbose=0)
    cold = crosscheck(model, train=(x, y)).training
    assert cold["batch"].accuracy - cold["running"].accuracy > 0.2
    trainable = [to_numpy(v) for v in model.trainable_variables]
    done = recalibrate(model, (x, y), exact=exact)
    for before, now in zip(trainable, model.trainable_variables, strict=True):
        assert (to_numpy(now) == before).all()
    reached = model.evaluate(x, y, verbose=0)[1]
    assert reached > cold["batch"].accuracy - 0.01
    assert reached == pytest.approx(cold["population"].accuracy, abs=0.02 if exact else 1e-6)
    assert [change.layer for change in done.layers] == ["first", "second", "third", "fourth"]
    assert (done.examples, done.batches, done.exact) == (640, 20, exact)


@pytest.mark.usefixtures("statistics")
def test_exact_recalibration_against_numpy(trained):
    model, x, _ = trained
    recalibrate(model, x[:320], exact=True)
    z = x[:320].reshape(320, -1).astype("float64")
    for dense, name in zip([v for v in model.layers if isinstance(v, layers.Dense)], ("first", "second"), strict=False):
        kernel, bias = (w.astype("float64") for w in dense.get_weights())
        z = z @ kernel + bias
        layer = model.get_layer(name)
        gamma, beta, mean, var = (w.astype("float64") for w in layer.get_weights())
        # the variance of the population: n/(n-1) is not taken, as Keras 3 stores biased variances
        assert_allclose(mean, z.mean(0), atol=1e-4)
        assert_allclose(var, z.var(0), rtol=1e-3)
        z = np.maximum((z - mean) / np.sqrt(var + layer.epsilon) * gamma + beta, 0)


@pytest.mark.usefixtures("statistics")
def test_recalibration_of_some_layers_and_of_batches_as_they_come(trained):
    model, x, y = trained
    before = {name: model.get_layer(name).get_weights() for name in ("first", "second")}
    batches = [(x[start : start + 40], y[start : start + 40]) for start in range(0, 320, 40)]
    done = recalibrate(model, batches, layers=["sec*"])
    assert [change.layer for change in done.layers] == ["second"]
    assert done.batches == 8
    for old, new in zip(before["first"], model.get_layer("first").get_weights(), strict=True):
        assert (old == new).all()
    assert any((a != b).any() for a, b in zip(before["second"], model.get_layer("second").get_weights(), strict=True))


def test_recalibration_refuses_a_layer_shared_by_places_that_differ():
    x, y = data(320)
    model = make(convolutional)
    model.fit(x, y, batch_size=32, epochs=1, verbose=0)
    before = state(model)
    with pytest.raises(ValueError, match="shared#0.*shared#1"):
        recalibrate(model, (x, y))
    assert state(model) == before
    assert [change.layer for change in recalibrate(model, (x, y), layers=["own"]).layers] == ["own"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"layers": ["frist"]}, "'first'"), ({"batches": []}, "got none")],
)
def test_bad_arguments_of_recalibration(trained, arguments, message):
    model, x, y = trained
    before = state(model)
    with pytest.raises(ValueError, match=message):
        recalibrate(**{"model": model, "batches": (x, y), **arguments})
    assert state(model) == before


def test_attribution_needs_classes(trained):
    model, x, _ = trained
    with pytest.raises(ExperimentNotPossibleError, match="given data have no targets"):
        attribute(model, [(x[:32],)])


def test_localisation_names_the_first_layer_that_died():
    model = make(deep)
    x, y = data(64)
    assert localise(model, (x, y)).first is None
    layer = model.get_layer("third")
    layer.gamma.assign(np.zeros(16))
    layer.beta.assign(np.full(16, -1.0))
    found = localise(compiled(model), x)
    assert found.first.path == "third"
    assert "from `third`" in str(found)
