"""What a look sees beside the outputs: how far parameters move, the loss, the inputs, the rate."""

from __future__ import annotations

import numpy as np
import pytest

from bnwatch import evidence
from bnwatch.keras.backends import backend_of
from bnwatch.keras.experiments import Given
from bnwatch.keras.laboratory import KerasLaboratory
from tests.adapters.keras_models import CLASSES, ByHand, data, make, quiet_watch
from tests.adapters.library import keras, layers

X, Y = data(64, shape=(5,))


def net(out=None):
    inputs = keras.Input((5,))
    x = layers.Dense(6, activation="tanh", name="hidden", kernel_initializer=keras.initializers.RandomNormal(0, 9))(
        inputs
    )
    x = layers.BatchNormalization(name="bn")(x)
    return keras.Model(inputs, layers.Dense(CLASSES, name="scores", activation=out)(x))


def laboratory(model, labels=Y):
    return KerasLaboratory(backend_of(model), {"training": Given((X, labels), "given", 64)})


def by_hand(model):
    """Return the outputs of the layers under batch statistics."""
    hand = ByHand(model)
    hidden = np.tanh(hand.dense("hidden", X.astype("float64")))
    normal = hand.norm("bn", hidden)
    return hidden, normal, hand.dense("scores", normal)


def test_scale_bounds_entry_and_loss_are_those_of_numpy():
    model = make(net)
    seen = evidence.look(laboratory(model), step=3, epoch=0, gradients=False)
    looks = {look.path: look for look in seen.layers}
    hidden, normal, scores = by_hand(model)
    for name, output in (("hidden", hidden), ("bn", normal), ("scores", scores)):
        assert looks[name].scale == pytest.approx(np.sqrt(np.square(output).mean()), rel=1e-4)
    saturated = (1.0 - np.abs(hidden) <= 1e-6).mean()
    assert saturated > 0.2
    assert looks["hidden"].bounds == pytest.approx(saturated, abs=0.02)
    assert (looks["bn"].bounds, looks["scores"].bounds) == (None, None)
    wide = X.astype("float64")
    assert seen.entry == pytest.approx(np.sqrt(wide.var(0).mean()) / np.sqrt(np.square(wide).mean()), rel=1e-6)
    shifted = scores - scores.max(1, keepdims=True)
    loss = (np.log(np.exp(shifted).sum(1)) - shifted[np.arange(64), Y]).mean()
    assert seen.loss == pytest.approx(loss, rel=1e-4)
    assert seen.learning_rate == pytest.approx(0.01)
    again = evidence.look(laboratory(model), step=3, epoch=0, gradients=True)
    assert again.loss == pytest.approx(loss, rel=1e-4)


def test_updates_are_those_of_the_weights():
    model = make(net)
    lab = laboratory(model)
    first = evidence.look(lab, step=10, epoch=0, gradients=False)
    assert {look.update for look in first.layers} == {None}
    before = {layer.name: layer.get_weights() for layer in model.layers if layer.name == "scores"}["scores"]
    now = [w + 0.01 * np.arange(w.size).reshape(w.shape) for w in before]
    model.get_layer("scores").set_weights(now)
    for gradients in (False, True):
        looks = {look.path: look for look in evidence.look(lab, step=14, epoch=0, gradients=gradients).layers}
        moved, held = (
            sum(np.square(w).sum() for w in ws) for ws in ([b - a for a, b in zip(before, now, strict=True)], before)
        )
        assert looks["scores"].update == pytest.approx(np.sqrt(moved / held) / 4, rel=1e-5)
        assert (looks["hidden"].update, looks["bn"].update) == (0.0, 0.0)


def test_a_large_parameter_is_sampled():
    model = make(lambda: keras.Sequential([keras.Input((5,)), layers.Dense(1000, name="wide"), layers.Dense(CLASSES)]))
    lab = laboratory(model)
    evidence.look(lab, step=1, epoch=0, gradients=False)
    kernel, bias = model.get_layer("wide").get_weights()
    model.get_layer("wide").set_weights([1.5 * kernel, bias])
    (wide, *_) = evidence.look(lab, step=2, epoch=0, gradients=False).layers
    assert wide.update == pytest.approx(0.5, rel=1e-5)
    (sample,) = backend_of(model).samples([model.get_layer("wide").kernel], 1024)
    np.testing.assert_array_equal(sample, (1.5 * kernel).ravel()[evidence.entries(5000)])


def test_a_schedule_is_asked_for_the_rate_of_now():
    model = make(net)
    schedule = keras.optimizers.schedules.ExponentialDecay(0.1, decay_steps=2, decay_rate=0.5)
    model.compile(keras.optimizers.SGD(schedule), keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    watch = quiet_watch(every=1)
    model.fit(X, Y, batch_size=16, verbose=0, callbacks=[watch])
    assert watch.watch.signals.faults == []
    looks = watch.watch.signals.looks
    rates = {look.step: look.learning_rate for look in looks}
    assert rates == {n: pytest.approx(0.1 * 0.5 ** (n / 2), rel=1e-5) for n in (1, 2, 3, 4)}
    assert all(layer.update > 0 for look in list(looks)[1:] for layer in look.layers if layer.kind.startswith("Dense"))


def test_a_model_without_a_loss_is_looked_through_all_the_same():
    model = net("softmax")
    seen = evidence.look(laboratory(model), step=1, epoch=0, gradients=False)
    assert (seen.loss, seen.learning_rate) == (None, None)
    assert 0.0 <= seen.layers[-1].bounds < 1.0


def test_equal_inputs_have_no_spread():
    model = make(net)
    lab = KerasLaboratory(backend_of(model), {"training": Given((np.repeat(X[:1], 8, 0), Y[:8]), "given", 8)})
    assert evidence.look(lab, step=1, epoch=0, gradients=False).entry == 0.0
