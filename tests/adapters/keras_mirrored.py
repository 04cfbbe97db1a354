"""Tests on two devices, run by ``test_keras_tensorflow_replicas.py`` in a process of their own.

The logical devices have to be made before TensorFlow starts, and would change every other test. Keras 3.15 itself fails
with more than one step an execution here.
"""

from __future__ import annotations

import numpy as np
import pytest
import tensorflow as tf
from numpy.testing import assert_allclose

from bnwatch.keras import BatchNormWatch, crosscheck, recalibrate
from bnwatch.keras.backends import backend_of
from bnwatch.keras.backends.tensorflow.slots import copies
from bnwatch.sinks.tensorboard.reader import read_runs
from tests.adapters.keras_models import CLASSES, attributes, compiled, data, faked, quiet_watch
from tests.adapters.library import keras, layers, set_random_seed

DEVICES = ["CPU:0", "CPU:1"]
tf.config.set_logical_device_configuration(
    tf.config.list_physical_devices("CPU")[0], [tf.config.LogicalDeviceConfiguration()] * len(DEVICES)
)
STRATEGY = tf.distribute.MirroredStrategy(DEVICES)
"""One for all tests: a second strategy in a process counts its reductions from where the first did, and they clash."""

SIZE = 32


def net(*, synchronized=False):
    """Return a net whose first call site sees the data as they are."""
    shared = layers.BatchNormalization(momentum=0.9, synchronized=synchronized, name="shared")
    inputs = keras.Input((5,))
    x = shared(layers.Dense(5, activation="relu")(shared(inputs)))
    return keras.Model(inputs, layers.Dense(CLASSES)(layers.Dropout(0.2)(x)))


def mirrored(build=net, *, compiling=None, **arguments):
    set_random_seed(1)
    with STRATEGY.scope():
        return compiled(build(**arguments), **(compiling or {}))


def everything(model):
    """Return what every replica holds of every variable."""
    variables = [*model.variables, *model.optimizer.variables]
    return [copy.numpy().tobytes() for variable in variables for copy in copies(variable)]


def fit(model, callbacks, *, epochs=2, examples=96):
    x, y = data(examples, shape=(5,))
    return model.fit(
        x, y, batch_size=SIZE, shuffle=False, epochs=epochs, verbose=0, callbacks=callbacks, validation_data=(x, y)
    ).history


def of(snapshot, name):
    return next(call for call in snapshot.calls if str(call.site) == name)


def test_each_replica_against_numpy():
    x = data(96, shape=(5,))[0].astype("float64")
    callback, watch = faked()
    history = fit(mirrored(), [callback])
    assert not watch.faults
    running = np.zeros((2, 5)), np.ones((2, 5))
    for number, snapshot in enumerate(watch.snapshots[:3]):
        assert [str(c.site) for c in snapshot.calls] == ["shared#0", "shared#1", "shared#0@1", "shared#1@1"]
        assert {call.running.updates for call in snapshot.calls} == {2 * number + 2}
        for replica, name in enumerate(("shared#0", "shared#0@1")):
            call, half = of(snapshot, name), x[SIZE * number :][SIZE // 2 * replica :][: SIZE // 2]
            assert_allclose(call.batch.mean, half.mean(0), rtol=1e-5, atol=1e-6)
            assert_allclose(call.batch.var, half.var(0), rtol=1e-5)
            assert call.batch.count == SIZE // 2
            # without `synchronized` each replica keeps running statistics of its own
            for kept, statistic in zip(running, ("mean", "var"), strict=True):
                for site in (name, name.replace("#0", "#1")):
                    kept[replica] = 0.9 * kept[replica] + 0.1 * getattr(of(snapshot, site).batch, statistic)
                assert_allclose(getattr(call.running, statistic), kept[replica], rtol=1e-5, atol=1e-6)
    assert not np.allclose(running[0][0], running[0][1])
    # what Keras reports, over the examples of both
    assert [s.examples for s in watch.snapshots] == [32, 64, 96] * 2
    assert [s.accuracy for s in watch.snapshots[2::3]] == pytest.approx(history["accuracy"])
    assert [e.examples for e in watch.evaluations] == [96, 96]


def test_synchronized_layers_show_the_statistics_of_all():
    x = data(96, shape=(5,))[0].astype("float64")
    callback, watch = faked()
    fit(mirrored(synchronized=True), [callback])
    assert not watch.faults
    for number, snapshot in enumerate(watch.snapshots[:3]):
        batch = x[SIZE * number :][:SIZE]
        for name in ("shared#0", "shared#0@1"):
            call = of(snapshot, name)
            # the variance is that of float32 squares, less the square of the mean
            assert_allclose(call.batch.mean, batch.mean(0), rtol=1e-4, atol=1e-5)
            assert_allclose(call.batch.var, batch.var(0), rtol=1e-4)
            assert call.batch.count == SIZE
            assert call.running.updates == 2 * number + 2


@pytest.mark.parametrize(
    ("compiling", "synchronized"),
    [({}, False), ({}, True), ({"run_eagerly": True}, False)],
    ids=str,
)
def test_every_replica_is_as_without_the_watch(compiling, synchronized):
    plain = mirrored(compiling=compiling, synchronized=synchronized)
    plain_history = fit(plain, [])
    watched, watch = mirrored(compiling=compiling, synchronized=synchronized), quiet_watch(every=1)
    history = fit(watched, [watch])
    signals = watch.watch.signals
    assert signals.faults == []
    assert (len(signals.table.sites), bool(signals.looks)) == (4, True)
    assert signals.cells.training["batch"].examples == 192  # of two epochs
    assert signals.cells.evaluation["running"].examples == 96
    assert everything(watched) == everything(plain)
    assert history == plain_history
    assert [set(kept) for kept in attributes(watched).values()] == [set(kept) for kept in attributes(plain).values()]


def test_kept_batches_are_those_of_the_replicas():
    x, y = data(96, shape=(5,))
    callback, watch = faked()
    seen = []
    watch.on_experiment = lambda lab, final: seen.extend(lab.examples("training", 1000) if final else ())
    fit(mirrored(), [callback], epochs=1)
    assert not watch.faults
    assert sorted(len(batch.labels) for batch in seen) == [16] * 6
    kept = np.concatenate([np.asarray(batch.inputs) for batch in seen])
    assert sorted(map(tuple, kept)) == sorted(map(tuple, x))
    assert sorted(label for batch in seen for label in batch.labels) == sorted(y)


def test_experiments_by_hand_change_no_replica_and_a_repair_reaches_all():
    x, y = data(96, shape=(5,))
    model = mirrored()
    fit(model, [])
    twin = compiled(net())
    twin.set_weights(model.get_weights())
    before = everything(model)
    cells = crosscheck(model, train=(x, y), eval=(x[:40], y[:40]))
    assert everything(model) == before
    assert cells.evaluation["running"].accuracy == pytest.approx(twin.evaluate(x[:40], y[:40], verbose=0)[1])
    assert len({copy.numpy().tobytes() for copy in copies(model.get_layer("shared").moving_mean)}) == 2

    model = mirrored(lambda: keras.Sequential([keras.Input((5,)), layers.BatchNormalization(), layers.Dense(CLASSES)]))
    fit(model, [])
    recalibrate(model, (x, y), batch_size=96)
    for copy in copies(model.layers[0].moving_mean):
        assert_allclose(copy.numpy(), x.astype("float64").mean(0), rtol=1e-5, atol=1e-6)


def test_healthy_replicas_raise_no_alarm_and_have_names_in_the_record(tmp_path):
    def healthy():
        inputs = keras.Input((5,))
        x = layers.BatchNormalization(momentum=0.9, name="first")(layers.Dense(8, use_bias=False)(inputs))
        x = layers.BatchNormalization(momentum=0.9, name="second")(layers.Dense(8, use_bias=False)(layers.ReLU()(x)))
        return keras.Model(inputs, layers.Dense(CLASSES)(layers.ReLU()(x)))

    watch = BatchNormWatch(tmp_path, every=5)  # a warning would be an error here
    fit(mirrored(healthy), [watch], epochs=6, examples=640)
    assert watch.watch.signals.faults == []
    assert {diagnosis.rule for diagnosis in watch.diagnoses} <= {"BN201"}  # of the first epochs, cleared since
    assert not any(diagnosis.state == "active" for diagnosis in watch.diagnoses)
    (run,) = read_runs(tmp_path)
    sites = {str(site) for table in run.tables for site in table.sites}
    assert sites == {"first#0", "first#0@1", "second#0", "second#0@1"}


@pytest.mark.parametrize("synchronized", [False, True])
def test_replicas_that_see_other_data_are_told_but_where_layers_are_synchronized(synchronized):
    model, watch = mirrored(synchronized=synchronized), quiet_watch(every=2, experiments=False)
    x, y = data(640, shape=(5,))
    x[np.arange(640) % SIZE < SIZE // 2] += 2  # a batch is divided in order
    model.fit(x, y, batch_size=SIZE, shuffle=False, epochs=2, verbose=0, callbacks=[watch], validation_data=(x, y))
    assert watch.watch.signals.faults == []
    assert ("BN212" in {diagnosis.rule for diagnosis in watch.diagnoses}) is not synchronized
    assert "BN212" not in {skipped.rule for skipped in watch.skipped}


def test_another_strategy_is_refused_in_a_sentence():
    model = mirrored()

    class Parameters:
        num_replicas_in_sync = 2
        extended = model.distribute_strategy.extended

    backend = backend_of(model)
    model._distribute_strategy = Parameters()
    assert backend.why_not() == "bnwatch does not watch training under Parameters; this training goes on unwatched"


def test_an_older_keras_is_refused_in_a_sentence(monkeypatch):
    backend = backend_of(mirrored())
    assert backend.why_not() is None
    monkeypatch.setattr(keras, "__version__", "3.14.2")
    assert "from Keras 3.15 on, and this is 3.14.2; this training goes on unwatched" in backend.why_not()
