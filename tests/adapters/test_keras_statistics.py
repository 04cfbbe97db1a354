"""What the tap reports is what the layer normalized with: against NumPy in float64."""

from __future__ import annotations

from inspect import signature

import numpy as np
import pytest
from numpy.testing import assert_allclose

from tests.adapters.keras_models import CLASSES, ByHand, compiled, convolutional, data, faked, hooks, make, state
from tests.adapters.library import LEGACY, VERSION, keras, layers, modes, to_numpy
from tests.adapters.library import set_random_seed as seed


class Recorder(keras.callbacks.Callback):
    """Keeps, of every step, the weights before it."""

    def __init__(self):
        super().__init__()
        self.before = []

    def on_train_batch_begin(self, batch, logs=None):
        self.before.append(ByHand(self.model))


def pass_by_hand(by_hand, x):
    z = np.maximum(by_hand.norm("own", by_hand.conv("conv_1", x, same=True)), 0)
    by_hand.norm("shared", by_hand.conv("conv_2", by_hand.norm("shared", z)))


@pytest.mark.parametrize("arguments", modes("default", "jit", "eager"))
def test_every_call_site_against_numpy(arguments):
    x, y = data(80)
    model = make(lambda: convolutional(dropout=0.0), **arguments)
    callback, watch = faked(experiments=False)
    recorder = Recorder()
    model.fit(x, y, batch_size=32, epochs=1, shuffle=False, verbose=0, callbacks=[recorder, callback])
    assert not watch.faults
    assert [s.step for s in watch.snapshots] == [1, 2, 3]
    for number, snapshot in enumerate(watch.snapshots):
        by_hand = recorder.before[number]
        pass_by_hand(by_hand, x[32 * number : 32 * number + 32])
        for call, (site, mean, var, count) in zip(snapshot.calls, by_hand.sites(), strict=True):
            assert str(call.site) == site
            # float32 over up to 2048 elements a channel; ten times that where it is recovered at momentum 0.9
            assert_allclose(call.batch.mean, mean, atol=2e-4 if LEGACY else 2e-5)
            assert_allclose(call.batch.var, var, rtol=1e-3 if LEGACY else 1e-4)
            assert call.batch.count == count
    assert [call.batch.count for call in watch.snapshots[-1].calls] == [16 * 64, 16 * 64, 16 * 36]


def test_running_statistics_and_updates_are_those_after_the_step():
    x, y = data(96)
    model = make()
    callback, watch = faked(experiments=False)
    model.fit(x, y, batch_size=32, epochs=1, verbose=0, callbacks=[callback])
    last = {str(call.site): call for call in watch.snapshots[-1].calls}
    for name in ("own", "shared"):
        layer = model.get_layer(name)
        assert_allclose(last[f"{name}#0"].running.mean, to_numpy(layer.moving_mean), atol=0)
        assert_allclose(last[f"{name}#0"].running.var, to_numpy(layer.moving_variance), atol=0)
    assert [[call.running.updates for call in s.calls] for s in watch.snapshots] == [[1, 2, 2], [2, 4, 4], [3, 6, 6]]
    running = np.zeros(6)
    for snapshot in watch.snapshots:
        running = 0.9 * running + 0.1 * snapshot.calls[0].batch.mean
    assert_allclose(running, last["own#0"].running.mean, rtol=1e-5)


def test_the_attachment_says_what_the_layers_are():
    x, y = data(32)
    model = make()
    model.get_layer("own").trainable = False
    compiled(model)
    callback, watch = faked(experiments=False)
    model.fit(x, y, verbose=0, callbacks=[callback])
    *_, attachment = watch.opened
    own, shared = attachment.layers
    assert (own.path, own.kind, own.channels, own.decay, own.epsilon) == ("own", "BatchNormalization", 6, 0.9, 1e-3)
    assert (own.trainable, shared.trainable, own.bessel_corrected) == (False, True, LEGACY)
    assert own.axis == ((3,) if LEGACY else (-1,))
    assert attachment.framework.startswith(f"keras {VERSION[0]}")
    assert [str(call.site) for call in watch.snapshots[0].calls] == ["shared#0", "shared#1"]


def test_updates_are_unknown_where_the_statistics_did_not_start_initial():
    x, y = data(32)
    model = make()
    model.get_layer("own").moving_mean.assign(np.full(6, 0.5, "float32"))
    callback, watch = faked(experiments=False)
    model.fit(x, y, verbose=0, callbacks=[callback])
    assert [call.running.updates for call in watch.snapshots[0].calls] == [None, 2, 2]


def test_a_second_fit_goes_on_counting():
    x, y = data(64)
    model = make()
    callback, watch = faked(experiments=False)
    for _ in range(2):
        model.fit(x, y, batch_size=32, verbose=0, callbacks=[callback])
    assert [s.step for s in watch.snapshots] == [1, 2, 3, 4]
    assert [s.calls[0].running.updates for s in watch.snapshots] == [1, 2, 3, 4]


@pytest.mark.parametrize("arguments", modes("two_steps"))
def test_steps_per_execution_counts_every_step(arguments):
    x, y = data(160)
    model = make(**arguments)
    callback, watch = faked(experiments=False)
    model.fit(x, y, batch_size=32, epochs=2, verbose=0, callbacks=[callback])
    assert [s.step for s in watch.snapshots] == [2, 4, 5, 7, 9, 10]
    assert watch.snapshots[-1].calls[0].running.updates == 10


def test_metrics_are_the_running_means_of_keras():
    x, y = data(96)
    model = make()
    callback, watch = faked()
    history = model.fit(
        x, y, batch_size=32, epochs=2, verbose=0, callbacks=[callback], validation_data=(x[:48], y[:48])
    ).history
    assert [s.examples for s in watch.snapshots] == [32, 64, 96] * 2
    for epoch, snapshot in enumerate(watch.snapshots[2::3]):
        assert snapshot.accuracy == pytest.approx(history["accuracy"][epoch])
        assert snapshot.loss == pytest.approx(history["loss"][epoch])
    first, second = watch.evaluations
    assert (first.step, first.epoch, second.step, second.epoch) == (3, 0, 6, 1)
    assert second.accuracy == pytest.approx(history["val_accuracy"][1])
    assert second.train_accuracy == pytest.approx(history["accuracy"][1])
    assert (second.examples, second.train_examples, second.classes) == (48, 96, CLASSES)
    assert second.majority == pytest.approx(np.bincount(y[:48]).max() / 48)
    assert second.batch_statistics == ()


def test_evaluation_in_training_mode_is_seen():
    class Careless(keras.Model):
        def __init__(self):
            super().__init__()
            self.inner = layers.Dense(6)
            self.bn = layers.BatchNormalization(name="bn")
            self.scores = layers.Dense(CLASSES)

        def call(self, x, training=None):
            return self.scores(self.bn(self.inner(x), training=True))

    x, y = data(64, shape=(5,))
    model = make(Careless)
    callback, watch = faked(experiments=False)
    model.fit(x, y, verbose=0, callbacks=[callback], validation_data=(x, y))
    assert not watch.faults
    assert watch.evaluations[0].batch_statistics == ("bn",)
    # two training steps: what evaluation updated is no training step
    assert watch.snapshots[-1].calls[0].running.updates == 2


def test_a_model_built_by_its_first_step():
    x, y = data(64, shape=(5,))
    model = make(
        lambda: keras.Sequential([layers.Dense(6), layers.BatchNormalization(name="bn"), layers.Dense(CLASSES)])
    )
    callback, watch = faked(experiments=False)
    model.fit(x, y, verbose=0, callbacks=[callback])
    assert not watch.faults
    assert [spec.path for spec in watch.opened[0].layers] == ["bn"]
    assert [s.calls[0].running.updates for s in watch.snapshots] == [1, 2]


def test_nested_models_name_and_count_every_site():
    inputs = keras.Input((5,))
    x = layers.BatchNormalization(name="bn")(layers.Dense(5, name="d")(inputs))
    tower = keras.Model(inputs, x, name="tower")
    a, b = keras.Input((5,)), keras.Input((5,))
    joined = layers.BatchNormalization(name="last")(layers.Add()([tower(a), tower(b)]))
    model = keras.Model([a, b], layers.Dense(CLASSES)(joined))
    compiled(model)
    x1, y = data(32, shape=(5,))
    x2 = data(32, seed=5, shape=(5,))[0]
    callback, watch = faked(experiments=False)
    model.fit([x1, x2], y, verbose=0, callbacks=[callback])
    assert [str(call.site) for call in watch.snapshots[0].calls] == ["tower/bn#0", "tower/bn#1", "last#0"]


def test_masked_elements_do_not_count():
    inputs = keras.Input((6, 3))
    x = layers.Masking()(inputs)
    x = layers.BatchNormalization(name="bn")(x)
    model = compiled(keras.Model(inputs, layers.Dense(CLASSES)(layers.GlobalAveragePooling1D()(x))))
    x = np.random.default_rng(0).normal(3.0, 1.0, (20, 6, 3)).astype("float32")
    x[:, 4:] = 0.0
    callback, watch = faked(experiments=False)
    model.fit(x, np.zeros(20, int), verbose=0, callbacks=[callback])
    (call,) = watch.snapshots[0].calls
    assert not watch.faults
    assert call.batch.count == 80
    assert_allclose(call.batch.mean, x[:, :4].astype("float64").mean((0, 1)), rtol=1e-5)


def test_layers_that_cannot_be_watched_are_named_with_the_reason():
    class MyBatchNorm(layers.Layer):
        def call(self, x):
            return x - x[:1]

    model = compiled(keras.Sequential([keras.Input((5,)), MyBatchNorm(name="r"), layers.Dense(CLASSES)]))
    x, y = data(32, shape=(5,))
    callback, watch = faked(experiments=False)
    model.fit(x, y, verbose=0, callbacks=[callback])
    assert watch.opened[0].layers == ()
    assert f"is no {keras.__name__}.layers.BatchNormalization" in watch.opened[0].unsupported["r"]


def test_layers_made_in_the_first_call():
    class Late(keras.Model):
        def __init__(self):
            super().__init__()
            self.scores, self.late = layers.Dense(CLASSES, name="scores"), None

        def call(self, x, training=None):
            if self.late is None:
                self.late = layers.BatchNormalization(momentum=0.9, name="late")
            return self.scores(self.late(x, training=training))

    x, y = data(128, shape=(5,))
    model = make(Late)
    callback, watch = faked(experiments=False)
    model.fit(x, y, batch_size=32, shuffle=False, verbose=0, callbacks=[callback])
    assert not watch.faults
    assert [snapshot.step for snapshot in watch.snapshots] == [1, 2, 3, 4]
    for snapshot in watch.snapshots[1:]:
        (call,) = snapshot.calls
        rows = x[32 * snapshot.step - 32 : 32 * snapshot.step].astype("float64")
        assert_allclose(call.batch.mean, rows.mean(0), atol=2e-5)
        assert_allclose(call.batch.var, rows.var(0), rtol=1e-4)
    assert not hooks(model)


@pytest.mark.skipif(LEGACY, reason="the optimizers of Keras 2 accumulate no gradients")
def test_gradients_are_accumulated_as_unwatched():
    x, y = data(160, shape=(5,))

    def run(callbacks):
        seed(4)
        inputs = keras.Input((5,))
        z = layers.Dense(6)(layers.BatchNormalization(name="first")(inputs))
        model = keras.Model(inputs, layers.Dense(CLASSES)(layers.BatchNormalization()(z)))
        optimizer = keras.optimizers.SGD(0.1, gradient_accumulation_steps=2)
        model.compile(optimizer, keras.losses.SparseCategoricalCrossentropy(from_logits=True))
        model.fit(x, y, batch_size=32, shuffle=False, verbose=0, callbacks=callbacks)
        return state(model)

    callback, watch = faked(experiments=False)
    assert run([callback]) == run([])
    assert not watch.faults
    # every small batch is normalized with its own statistics, and moves the running ones
    assert [snapshot.calls[0].running.updates for snapshot in watch.snapshots] == [1, 2, 3, 4, 5]
    for number, snapshot in enumerate(watch.snapshots):
        assert_allclose(snapshot.calls[0].batch.mean, x[32 * number :][:32].astype("float64").mean(0), atol=2e-5)


@pytest.mark.skipif(
    LEGACY or "renorm" not in signature(layers.BatchNormalization).parameters,
    reason="this BatchNormalization does not renormalize; that of Keras 2 is tested with its kernel",
)
def test_batch_renormalization_shows_the_statistics_of_the_batch():
    x, y = data(96, shape=(5,))

    def run(callbacks):
        model = make(
            lambda: keras.Sequential(
                [keras.Input((5,)), layers.BatchNormalization(renorm=True, name="bn"), layers.Dense(CLASSES)]
            )
        )
        model.fit(x, y, batch_size=32, shuffle=False, verbose=0, callbacks=callbacks, validation_data=(x, y))
        return state(model)

    callback, watch = faked()
    assert run([callback]) == run([])
    assert not watch.faults
    for number, snapshot in enumerate(watch.snapshots):
        rows = x[32 * number :][:32].astype("float64")
        assert_allclose(snapshot.calls[0].batch.mean, rows.mean(0), atol=2e-5)
        assert_allclose(snapshot.calls[0].batch.var, rows.var(0), rtol=1e-4)
