"""Layers that a training step calls in inference mode, and never in training mode."""

from __future__ import annotations

import numpy as np
import pytest

from bnwatch.keras.loop import LoopWatch
from tests.adapters.keras_loops import steps
from tests.adapters.keras_models import CLASSES, FakeWatch, data, faked, hooks, make, state
from tests.adapters.library import LEGACY, keras, layers, modes


def net():
    x = inputs = keras.Input((5,))
    for name in ("one", "two", "three"):
        x = layers.ReLU()(layers.BatchNormalization(name=name)(layers.Dense(6)(x)))
    return keras.Model(inputs, layers.Dense(CLASSES)(x))


class Baked(keras.Model):
    """Calls the first of its batch norms in inference mode, whatever it is called with itself."""

    def __init__(self):
        super().__init__()
        self.one, self.two = layers.BatchNormalization(name="one"), layers.BatchNormalization(name="two")
        self.scores = layers.Dense(CLASSES)

    def call(self, x, training=None):
        return self.scores(self.two(self.one(x, training=False), training=training))


def frozen():
    model = net()
    model.get_layer("two").trainable = False
    return model


@pytest.mark.parametrize("arguments", modes("default", "jit", "eager"))
def test_layers_called_in_inference_mode_are_idle_in_fit(arguments):
    callback, seen = faked(every=2)
    model = make(Baked, **arguments)
    x, y = data(80, shape=(5,))
    model.fit(x, y, batch_size=16, verbose=0, callbacks=[callback], validation_data=(x, y))
    assert seen.faults == []
    assert [found.idle for found in seen.snapshots] == [("one",)] * 3
    assert {call.site.layer for found in seen.snapshots for call in found.calls} == {"two"}
    assert not hooks(model)


def test_a_frozen_layer_is_idle():
    callback, seen = faked()
    x, y = data(32, shape=(5,))
    make(frozen).fit(x, y, verbose=0, callbacks=[callback], validation_data=(x, y))
    assert seen.faults == []
    assert [found.idle for found in seen.snapshots] == [("two",)]
    assert {spec.path: spec.trainable for spec in seen.opened[0].layers} == {"one": True, "two": False, "three": True}


def test_a_layer_that_is_called_in_both_modes_is_not_idle():
    class Both(Baked):
        def call(self, x, training=None):
            return super().call(self.one(x, training=training), training=training)

    callback, seen = faked()
    x, y = data(32, shape=(5,))
    make(Both).fit(x, y, verbose=0, callbacks=[callback])
    assert [found.idle for found in seen.snapshots] == [()]


class Switched(keras.Model):
    """Calls its batch norm in the mode that a flag says."""

    def __init__(self):
        super().__init__()
        self.bn, self.scores, self.flag = layers.BatchNormalization(name="bn"), layers.Dense(CLASSES), True

    def call(self, x, training=None):
        return self.scores(self.bn(x, training=bool(training and self.flag)))


def test_a_flag_that_is_switched_off_shows_when_the_step_is_traced_again():
    class Off(keras.callbacks.Callback):
        def on_epoch_begin(self, epoch, logs=None):
            self.model.flag = epoch == 0

    callback, seen = faked()
    x, y = data(32, shape=(5,))
    make(Switched, run_eagerly=True).fit(x, y, verbose=0, epochs=3, callbacks=[callback, Off()])
    assert seen.faults == []
    assert [found.idle for found in seen.snapshots] == [(), ("bn",), ("bn",)]


def test_the_training_is_the_one_without_a_watch():
    def run(callbacks):
        model = make(Baked)
        x, y = data(80, shape=(5,))
        model.fit(x, y, batch_size=16, verbose=0, callbacks=callbacks, validation_data=(x, y))
        return state(model)

    callback, seen = faked()
    assert run([callback]) == run([])
    assert seen.faults == []


def loop(model, training, *, compiled, evaluate=False, number=4):
    """Return what a watch sees of a loop written by hand, and the warnings that nothing was seen."""
    fake = FakeWatch()
    x, y = data(32, shape=(5,))
    with LoopWatch(model, fake) as watch:
        running = steps(model, x, y, training=training, compiled=compiled)
        for step, (_, given) in zip(range(number), running, strict=False):
            watch.step(examples=32, batch=(x, y), **given)
            if evaluate and step % 2:
                model(x, **({} if LEGACY else {"training": False}))
                watch.evaluation(accuracy=0.5, examples=32)
    assert fake.faults == []
    return fake.snapshots


@pytest.mark.parametrize("compiled", [False, True])
def test_a_loop_without_the_training_flag(compiled):
    found = loop(make(net), None, compiled=compiled)
    assert [one.idle for one in found] == [("one", "two", "three")] * 4
    assert [one.calls for one in found] == [()] * 4


@pytest.mark.parametrize("compiled", [False, True])
def test_a_loop_in_training_mode_with_evaluations_between(compiled):
    found = loop(make(frozen), True, compiled=compiled, evaluate=True)
    assert [one.idle for one in found] == [("two",)] * 4
    assert [len(one.calls) for one in found] == [2] * 4


class Own(layers.BatchNormalization):
    """Normalizes and updates in its own way."""

    def call(self, inputs, training=None, mask=None):
        if training:
            mean = keras.ops.mean(inputs, axis=0)
            self.moving_mean.assign(0.9 * self.moving_mean + 0.1 * mean)
            return inputs - mean
        return inputs - self.moving_mean


class OfTheBatch(layers.BatchNormalization):
    """Knows no modes."""

    def call(self, inputs):
        return inputs - keras.ops.mean(inputs, axis=0)


class NeverTrained(layers.BatchNormalization):
    """Is in inference mode in training, by the class above."""

    def call(self, inputs, training=None, mask=None):
        return super().call(inputs, training=False)


class Reading(layers.BatchNormalization):
    """Is in inference mode in training, by itself."""

    def call(self, inputs):
        return (inputs - self.moving_mean) / keras.ops.sqrt(self.moving_variance + self.epsilon)


OWN = pytest.mark.skipif(LEGACY, reason="Keras 2 has no keras.ops to write such a layer with")


def own(kind, **arguments):
    bare = {"scale": False, "center": False, **arguments}
    return lambda: keras.Sequential([keras.Input((5,)), kind(name="own", **bare), layers.Dense(CLASSES)])


@OWN
@pytest.mark.parametrize("kind", [Own, OfTheBatch])
@pytest.mark.parametrize("arguments", modes("default", "jit", "eager"))
def test_a_layer_that_shows_no_statistics_is_probed(kind, arguments):
    callback, seen = faked()
    model, alone = make(own(kind), **arguments), make(own(kind), **arguments)
    x, y = data(48, shape=(5,))
    fitted = {"batch_size": 16, "verbose": 0, "shuffle": False, "validation_data": (x, y)}
    alone.fit(x, y, **fitted)
    model.fit(x, y, **fitted, callbacks=[callback])
    assert seen.faults == []
    assert all(np.array_equal(now, then) for now, then in zip(model.get_weights(), alone.get_weights(), strict=True))
    assert not hooks(model)
    batches = [x[:16], x[16:32], x[32:]]
    for snapshot, batch in zip(seen.snapshots, batches, strict=True):
        (call,) = snapshot.calls
        assert snapshot.idle == ()
        assert call.batch.source == "probed"
        assert call.batch.count == 16
        np.testing.assert_allclose(call.batch.mean, batch.mean(0, dtype=float), atol=1e-6)
        np.testing.assert_allclose(call.batch.var, batch.var(0, dtype=float), rtol=1e-5)
    # the one reads its running statistics in evaluation, the other has no use for any
    assert [one.batch_statistics for one in seen.evaluations] == [("own",) if kind is OfTheBatch else ()]


@OWN
@pytest.mark.parametrize(
    ("make_one", "idle"), [(own(NeverTrained), ("own",)), (own(Reading), ("own",)), (own(Own, trainable=False), ())]
)
def test_a_layer_of_ones_own_that_takes_no_batch_statistics_is_not_probed(make_one, idle):
    callback, seen = faked()
    x, y = data(16, shape=(5,))
    make(make_one).fit(x, y, batch_size=16, verbose=0, callbacks=[callback])
    assert seen.faults == []
    assert [found.calls for found in seen.snapshots] == [()]
    assert [found.idle for found in seen.snapshots] == [idle]
