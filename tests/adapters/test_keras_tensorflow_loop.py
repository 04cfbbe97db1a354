"""Training loops written by hand, eager and compiled."""

from __future__ import annotations

import numpy as np
import pytest
import tensorflow as tf
from numpy.testing import assert_allclose

from bnwatch.keras import loop
from bnwatch.keras.loop import LoopWatch, watch
from tests.adapters.keras_models import CLASSES, FakeWatch, data
from tests.adapters.library import keras, layers, set_random_seed


def net():
    set_random_seed(2)
    shared = layers.BatchNormalization(momentum=0.9, name="shared")
    inputs = keras.Input((5,))
    x = shared(layers.Dense(5, activation="relu", name="a")(shared(inputs)))
    return keras.Model(inputs, layers.Dense(CLASSES)(layers.Dropout(0.2)(x)))


def trainer(model, wrap):
    optimizer = keras.optimizers.Adam(0.01)
    optimizer.build(model.trainable_variables)
    loss_of = keras.losses.SparseCategoricalCrossentropy(from_logits=True)

    @wrap
    def step(x, y):
        with tf.GradientTape() as tape:
            scores = model(x, training=True)
            loss = loss_of(y, scores)
        gradients = tape.gradient(loss, model.trainable_variables)
        optimizer.apply_gradients(zip(gradients, model.trainable_variables, strict=True))
        return loss, tf.reduce_mean(tf.cast(tf.argmax(scores, 1) == tf.cast(y, tf.int64), tf.float32))

    return step


WRAPS = {"eager": lambda f: f, "compiled": tf.function, "xla": tf.function(jit_compile=True, reduce_retracing=True)}


@pytest.mark.parametrize("wrap", WRAPS)
def test_call_sites_of_every_step(wrap):
    x, y = data(144, shape=(5,))
    model = net()
    step = trainer(model, WRAPS[wrap])
    fake = FakeWatch()
    with LoopWatch(model, fake) as watching:
        for _ in range(2):
            for start in range(0, 144, 32):  # the last batch is smaller: compiled functions are traced anew for it
                rows = slice(start, start + 32)
                loss, accuracy = step(tf.constant(x[rows]), tf.constant(y[rows]))
                watching.step(loss=loss, accuracy=accuracy, examples=len(y[rows]), batch=(x[rows], y[rows]))
                assert_allclose(fake.snapshots[-1].calls[0].batch.mean, x[rows].astype("f8").mean(0), rtol=1e-4)
                assert_allclose(fake.snapshots[-1].calls[0].batch.var, x[rows].astype("f8").var(0), rtol=1e-4)
            watching.evaluation(accuracy=0.5, examples=10)
    assert not fake.faults
    assert [s.step for s in fake.snapshots] == list(range(1, 11))
    for snapshot in fake.snapshots:
        assert [str(call.site) for call in snapshot.calls] == ["shared#0", "shared#1"]
        assert snapshot.calls[0].running.updates == 2 * snapshot.step
        assert snapshot.calls[1].batch.count == (16 if snapshot.step % 5 == 0 else 32)
    assert [s.examples for s in fake.snapshots] == [32, 64, 96, 128, 144] * 2
    assert (fake.evaluations[0].step, fake.evaluations[0].train_examples, fake.evaluations[1].epoch) == (5, 144, 1)
    assert "_moments" not in model.get_layer("shared").__dict__
    assert fake.closed == 1
    # a compiled function outlives the watch
    step(tf.constant(x[:32]), tf.constant(y[:32]))


def test_weights_are_those_of_the_loop_without_a_watch():
    def run(watched):
        x, y = data(96, shape=(5,))
        model = net()
        step = trainer(model, tf.function)
        with LoopWatch(model, FakeWatch(enabled=watched)) as watching:
            for start in range(0, 96, 16):
                step(tf.constant(x[start : start + 16]), tf.constant(y[start : start + 16]))
                watching.step()
        return [v.numpy().tobytes() for v in model.variables]

    assert run(watched=True) == run(watched=False)


def test_two_functions_in_one_step_are_two_call_sites():
    """As in a GAN: real and generated images pass the same discriminator in functions of their own."""
    x, _ = data(64, shape=(5,))
    model = net()
    real, generated = (tf.function(lambda z: model(z, training=True)) for _ in range(2))
    fake = FakeWatch(every=4)
    with LoopWatch(model, fake) as watching:
        for _ in range(8):
            real(x[:32])
            generated(x[32:] * 5.0)
            watching.step()
    assert not fake.faults
    assert [[str(call.site) for call in s.calls] for s in fake.snapshots] == [[f"shared#{k}" for k in range(4)]] * 2
    assert_allclose(fake.snapshots[0].calls[2].batch.mean, 5.0 * x[32:].astype("f8").mean(0), rtol=1e-4)


def test_examples_of_the_loop_reach_the_experiments():
    x, y = data(96, shape=(5,))
    model = net()
    step = trainer(model, tf.function)
    seen = []
    with watch(model, None, on_diagnosis="log") as watching:
        for start in range(0, 96, 16):
            loss, accuracy = step(x[start : start + 16], y[start : start + 16])
            watching.step(accuracy=accuracy, loss=loss, batch=(x[start : start + 16], y[start : start + 16]))
        watching.evaluation(accuracy=0.4, examples=96, classes=CLASSES, data=(x, y))
        seen = watching.watch.signals
    assert seen.faults == []
    assert seen.cells.evaluation["running"].examples == 96
    accuracy = np.mean(np.argmax(model.predict(x, verbose=0), 1) == y)
    assert seen.cells.evaluation["running"].accuracy == pytest.approx(accuracy)
    assert seen.cells.training["batch"].examples == 96
    assert watching.report().sites == 2


def test_a_loop_that_raises_leaves_the_model_clean():
    model = net()
    fake = FakeWatch()
    with pytest.raises(ZeroDivisionError), LoopWatch(model, fake):
        raise ZeroDivisionError
    assert "_moments" not in model.get_layer("shared").__dict__
    assert fake.closed == 1
    assert fake.labs == []


def test_a_function_traced_before_the_watch_is_said_to_be_unseen():
    model = net()
    forward = tf.function(lambda z: model(z, training=True))
    x = data(8, shape=(5,))[0]
    forward(x)
    with LoopWatch(model, FakeWatch()) as watching:
        forward(x)
        with pytest.warns(match="before the training function is called"):
            watching.step()


def test_a_failure_inside_does_not_reach_the_loop(monkeypatch):
    def broken(*_, **__):
        msg = "broken on purpose"
        raise RuntimeError(msg)

    monkeypatch.setattr(loop, "StepSnapshot", broken)
    fake = FakeWatch()
    with LoopWatch(net(), fake) as watching:
        watching.step(accuracy=0.5)
        watching.step(accuracy=0.5)
        watching.evaluation(accuracy=0.5)
    assert [doing for doing, _, _ in fake.faults] == ["ending a step"]


@pytest.mark.parametrize("wrap", ["eager", "compiled"])
def test_nothing_is_read_on_a_step_that_is_not_sampled(wrap, monkeypatch):
    read = []
    numpy = type(tf.constant(0.0)).numpy
    monkeypatch.setattr(type(tf.constant(0.0)), "numpy", lambda tensor: read.append(1) or numpy(tensor))
    x, y = (tf.constant(part) for part in data(32, shape=(5,)))
    model = net()
    step = trainer(model, WRAPS[wrap])
    fake = FakeWatch(every=5)
    seen = []
    with LoopWatch(model, fake) as watching:
        for number in range(1, 21):
            loss, accuracy = step(x, y)
            read.clear()
            watching.step(loss=loss, accuracy=accuracy, examples=32)
            if read:
                seen.append(number)
    assert not fake.faults
    assert seen == [5, 10, 15, 20]
    # nothing but the step's own calls, also where the count before it was noted on the device only
    assert [[str(call.site) for call in snapshot.calls] for snapshot in fake.snapshots] == [
        ["shared#0", "shared#1"]
    ] * 4
