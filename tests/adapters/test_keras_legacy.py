"""Keras 2: its fused kernel and its older kinds of layers, its seeds, its files."""

from __future__ import annotations

import numpy as np
import pytest
import tensorflow as tf
from numpy.testing import assert_allclose, assert_array_equal

from bnwatch.keras import crosscheck
from bnwatch.keras.loop import LoopWatch
from tests.adapters.keras_models import CLASSES, FakeWatch, compiled, data, faked, make, quiet_watch, state
from tests.adapters.library import keras, layers, set_random_seed

pytestmark = pytest.mark.filterwarnings("ignore:.*HDF5 file:UserWarning")
SHAPE = (4, 4, 3)
MODES = [{}, {"jit_compile": True}, {"run_eagerly": True}]


def one(layer, shape=SHAPE, **arguments):
    """Return a model that normalizes its inputs first."""
    inputs = keras.Input(shape)
    x = layers.Flatten()(layer(inputs))
    return compiled(keras.Model(inputs, layers.Dense(CLASSES, name="scores")(x)), **arguments)


def seen(layer, shape=SHAPE, examples=40, **arguments):
    """Return the calls of a layer in a training of batches of 16, 16 and 8 examples, and these batches."""
    model = one(layer, shape, **arguments)
    x, y = data(examples, shape=shape)
    callback, watch = faked(experiments=False)
    model.fit(x, y, batch_size=16, shuffle=False, verbose=0, callbacks=[callback])
    assert not watch.faults
    return [s.calls for s in watch.snapshots], np.split(x.astype("float64"), range(16, examples, 16)), watch


def norm(**arguments):
    return layers.BatchNormalization(name="bn", **arguments)


@pytest.mark.parametrize("arguments", MODES, ids=str)
@pytest.mark.parametrize("momentum", [0.0, 0.9, 0.99, np.float32(0.9)], ids=repr)
def test_statistics_solved_from_the_fused_kernel(momentum, arguments):
    layer = norm(momentum=momentum)
    steps, batches, _ = seen(layer, **arguments)
    assert layer.fused
    running = np.ones(3)
    for (call,), x in zip(steps, batches, strict=True):
        m = x.size // 3
        assert call.batch.count == m
        assert call.batch.source == ("measured" if isinstance(momentum, np.float32) else "recovered")
        # what is solved for is rounded in units of the running statistics, about 1
        rounding = 1e-5 / (1.0 - float(momentum))
        assert_allclose(call.batch.mean, x.mean((0, 1, 2)), atol=rounding)
        assert_allclose(call.batch.var, x.var((0, 1, 2)), atol=5 * rounding)
        assert call.spec.bessel_corrected
        assert call.running.bessel_corrected
        running = momentum * running + (1.0 - momentum) * x.var((0, 1, 2)) * m / (m - 1)
        assert_allclose(call.running.var, running, rtol=1e-4)
    assert [call.running.updates for (call,) in steps] == [1, 2, 3]


def test_a_single_element_is_not_corrected():
    ((call, *_), *_), _, _ = seen(norm(momentum=0.5), (1, 1, 3), examples=1)
    assert call.batch.count == 1
    assert_allclose(call.batch.var, 0.0, atol=1e-6)


@pytest.mark.parametrize(
    ("layer", "shape", "axes"),
    [
        (lambda: norm(fused=False), SHAPE, (0, 1, 2)),
        (lambda: norm(axis=1, fused=False), SHAPE, (0, 2, 3)),
        (lambda: norm(axis=2), SHAPE, (0, 1, 3)),
        (lambda: norm(renorm=True), SHAPE, (0, 1, 2)),
        (lambda: norm(renorm=True), (5,), (0,)),
        (lambda: norm(synchronized=True), SHAPE, (0, 1, 2)),
        (lambda: norm(momentum=1.0), (5,), (0,)),
        (lambda: layers.experimental.SyncBatchNormalization(name="bn"), SHAPE, (0, 1, 2)),
    ],
)
def test_statistics_measured_elsewhere(layer, shape, axes):
    steps, batches, _ = seen(layer(), shape)
    for (call,), x in zip(steps, batches, strict=True):
        assert (call.batch.source, call.spec.bessel_corrected) == ("measured", False)
        assert call.batch.count == x.size // call.spec.channels
        assert_allclose(call.batch.mean, x.mean(axes), atol=1e-5)
        assert_allclose(call.batch.var, x.var(axes), rtol=1e-4)
    assert [call.running.updates for (call,) in steps] == [1, 2, 3]


@pytest.mark.parametrize("shape", [SHAPE, (5,)])
def test_layers_of_tensorflow_1(shape):
    # its kind of layer keeps to Keras 2.15; tf-keras lists it under another name
    kind = next(k for k in keras.layers.BatchNormalization.__mro__ if k.__name__ == "BatchNormalizationBase")
    old = type("BatchNormalization", (kind,), {"_USE_V2_BEHAVIOR": False})
    steps, batches, _ = seen(old(name="bn"), shape)
    for (call,), x in zip(steps, batches, strict=True):
        assert_allclose(call.batch.mean, x.mean(tuple(range(x.ndim - 1))), atol=1e-3)
    assert len(steps) == 3


@pytest.mark.parametrize(
    ("layer", "reason"),
    [
        (lambda: norm(momentum=1.0), "momentum 1.0"),
        (lambda: norm(virtual_batch_size=4), "every 4 examples"),
        (lambda: norm(axis=[1, 3]), "along 2 axes"),
    ],
)
def test_what_cannot_be_watched_says_why(layer, reason):
    steps, _, watch = seen(layer(), examples=32)
    assert steps == [(), ()]
    assert reason in watch.opened[0].unsupported["bn"]


@pytest.mark.parametrize("arguments", MODES, ids=str)
def test_majority_and_cells_of_a_fused_layer(arguments):
    x, y = data(48, shape=SHAPE)
    model = one(norm(momentum=0.9), **arguments)
    callback, watch = faked(probe=(x, y))
    cells = []
    watch.on_experiment = lambda lab, final: cells.append(lab.inputs(lab.examples("training", 48)[0], "batch"))
    model.fit(x, y, verbose=0, callbacks=[callback], validation_data=(x, y))
    assert not watch.faults
    assert watch.evaluations[0].majority == pytest.approx(np.bincount(y).max() / 48)
    found = cells[-1][0].moments
    wide = x[: found.count // 16].astype("float64")
    assert_allclose(found.mean, wide.mean((0, 1, 2)), rtol=1e-5)
    assert_allclose(found.var, wide.var((0, 1, 2)), rtol=1e-5)


def test_the_cells_against_inference_by_hand():
    x, y = data(64, shape=SHAPE)
    layer = norm(momentum=0.9)
    model = one(layer)
    model.fit(x, y, verbose=0)
    before = state(model)
    cells = crosscheck(model, train=(x, y), batch_size=64)
    kernel, bias = (w.astype("float64") for w in model.get_layer("scores").get_weights())
    running = layer.moving_mean.numpy(), layer.moving_variance.numpy()
    for name, (mean, var) in {"running": running, "batch": (x.mean((0, 1, 2)), x.var((0, 1, 2)))}.items():
        z = (x.astype("float64") - mean) / np.sqrt(var + 1e-3) * layer.gamma.numpy() + layer.beta.numpy()
        assert_array_equal(cells.training[name].predicted, (z.reshape(64, -1) @ kernel + bias).argmax(1))
    assert state(model) == before


def test_what_xla_compiles_keeps_no_batch_and_the_reason_is_told():
    x, y = data(48, shape=SHAPE)
    watch = quiet_watch(every=1)
    one(norm(), jit_compile=True).fit(x, y, verbose=0, callbacks=[watch], validation_data=(x, y))
    assert watch.watch.signals.faults == []
    assert "batch could be kept: give probe=(x, y)" in next(d for d in watch.diagnoses if d.rule == "BN904").message


@pytest.mark.parametrize("wrap", [lambda f: f, tf.function, tf.function(jit_compile=True)], ids=["eager", "", "xla"])
def test_a_loop_by_hand(wrap):
    x, y = data(48, shape=SHAPE)
    model = one(norm(momentum=0.9))
    optimizer, loss_of = keras.optimizers.Adam(0.01), keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    optimizer.build(model.trainable_variables)

    @wrap
    def step(x, y):
        with tf.GradientTape() as tape:
            loss = loss_of(y, model(x, training=True))
        optimizer.apply_gradients(
            zip(tape.gradient(loss, model.trainable_variables), model.trainable_variables, strict=True)
        )
        return loss

    fake = FakeWatch()
    with LoopWatch(model, fake) as watching:
        for start in range(0, 48, 16):
            rows = slice(start, start + 16)
            loss = step(tf.constant(x[rows]), tf.constant(y[rows]))
            watching.step(loss=loss, examples=16, batch=(x[rows], y[rows]))
            (call,) = fake.snapshots[-1].calls
            assert_allclose(call.batch.mean, x[rows].astype("float64").mean((0, 1, 2)), atol=1e-4)
            assert_allclose(call.batch.var, x[rows].astype("float64").var((0, 1, 2)), atol=5e-4)
    assert not fake.faults
    assert [s.calls[0].running.updates for s in fake.snapshots] == [1, 2, 3]


@pytest.mark.parametrize("name", ["model.h5", "model", "model.keras"])
def test_a_file_saved_while_watched_is_that_of_the_model(name, tmp_path):
    def saved(folder, callbacks):
        keras.backend.clear_session()
        set_random_seed(1)
        path = folder / name
        x, y = data(32, shape=SHAPE)
        model = one(norm())
        model.fit(x, y, verbose=0, callbacks=[*callbacks, keras.callbacks.ModelCheckpoint(str(path))])
        loaded = keras.models.load_model(path)
        operations = sorted(len(f.node_def) for f in _functions(path)) if path.is_dir() else []
        return [w.tobytes() for w in loaded.get_weights()], loaded.to_json(), operations

    watch = quiet_watch(every=1)
    assert saved(tmp_path / "watched", [watch]) == saved(tmp_path / "plain", [])
    assert watch.watch.signals.faults == []


def _functions(path):
    from tensorflow.core.protobuf.saved_model_pb2 import SavedModel

    return SavedModel.FromString((path / "saved_model.pb").read_bytes()).meta_graphs[0].graph_def.library.function


def dropping(dropout=0.5, **arguments):
    inputs = keras.Input(SHAPE)
    x = layers.Dropout(dropout, **arguments)(norm()(inputs))
    return keras.Model(inputs, layers.Dense(CLASSES)(layers.Flatten()(x)))


def test_a_random_stream_that_runs_already_is_left_alone():
    x, y = data(64, shape=SHAPE)

    def run(callbacks, *, anew):
        model = make(dropping)
        model.fit(x, y, verbose=0)
        if anew:
            compiled(model)
        model.fit(x, y, verbose=0, callbacks=callbacks)
        return state(model)

    with pytest.warns(match="call compile\\(\\) again"):
        watched = run([quiet_watch()], anew=False)
    assert watched == run([], anew=False)
    watch = quiet_watch(every=1)
    assert run([watch], anew=True) == run([], anew=True)
    assert watch.report().steps == 2


def test_several_replicas_are_refused_in_a_sentence(monkeypatch):
    from bnwatch.keras.backends import backend_of

    backend = backend_of(one(norm()))
    assert backend.why_not() is None
    monkeypatch.setattr(type(tf.distribute.get_strategy()), "num_replicas_in_sync", 2)
    assert "several replicas; this training goes on unwatched" in backend.why_not()


def test_experiments_move_no_seed():
    class Noise(layers.Layer):
        def __init__(self):
            super().__init__()
            self._random_generator = type(layers.Dropout(0.5)._random_generator)(7)

        def call(self, x):
            return x + self._random_generator.random_normal(tf.shape(x))

    x, y = data(32, shape=(5,))
    noise = Noise()
    model = compiled(keras.Sequential([keras.Input((5,)), layers.BatchNormalization(), noise, layers.Dense(CLASSES)]))
    before = noise._random_generator._seed
    crosscheck(model, train=(x, y))
    assert noise._random_generator._seed == before


def test_the_logs_stay_tensors():
    """A callback that asks for numbers would have Keras 2 fetch them in every step."""
    called = keras.callbacks.CallbackList([quiet_watch()], add_history=True)
    assert called._batch_hooks_support_tf_logs
    assert called._should_call_train_batch_hooks
    assert called._should_call_test_batch_hooks
    assert not called._should_call_predict_batch_hooks


def test_steps_per_execution_is_read_once(monkeypatch):
    from bnwatch.keras.backends import backend_of

    model = one(norm(), steps_per_execution=3)
    backend = backend_of(model)
    assert backend.steps_per_execution == 3
    monkeypatch.setattr(type(model._steps_per_execution), "numpy", None)
    assert backend.steps_per_execution == 3


def test_layers_in_lists_of_a_subclassed_model():
    class Listed(keras.Model):
        def __init__(self):
            super().__init__()
            self.rows = [layers.BatchNormalization(name=f"bn_{n}") for n in range(2)]
            self.named = {"last": layers.BatchNormalization(name="last")}
            self.scores = layers.Dense(CLASSES)

        def call(self, x, training=None):
            for row in [*self.rows, self.named["last"]]:
                x = row(x, training=training)
            return self.scores(x)

    x, y = data(32, shape=(5,))
    callback, watch = faked(experiments=False)
    compiled(Listed()).fit(x, y, verbose=0, callbacks=[callback])
    assert not watch.faults
    assert sorted(str(call.site) for call in watch.snapshots[0].calls) == ["bn_0#0", "bn_1#0", "last#0"]


def test_a_first_evaluation_leaves_no_function_behind():
    x, y = data(32, shape=(5,))
    model = make(lambda: keras.Sequential([layers.BatchNormalization(), layers.Dense(CLASSES)]))
    callback, watch = faked()
    watched = model.evaluate(x, y, verbose=0, callbacks=[callback])
    assert watch.faults == []
    assert watch.evaluations[0].majority is not None
    assert model.test_function is None
    assert model.evaluate(x, y, verbose=0) == watched
