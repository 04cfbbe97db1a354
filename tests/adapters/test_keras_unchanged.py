"""A watched training is, to the bit, the training without the watch; and nothing stays behind."""

from __future__ import annotations

import gc
import re
import zipfile

import keras
import numpy as np
import pytest
import tensorflow as tf

from tests.adapters import keras_models
from tests.adapters.keras_models import CLASSES, attributes, compiled, data, layers, make, quiet_watch, state


def small(dropout=0.3):
    """Return a net with dropout, a shared batch norm, and a layer that draws noise also in evaluation."""

    class Noise(layers.Layer):
        def __init__(self):
            super().__init__(name="noise")
            self.seeds = keras.random.SeedGenerator(3)

        def call(self, x):
            return x + 0.01 * keras.random.normal(keras.ops.shape(x), seed=self.seeds, dtype=x.dtype)

    inputs = keras.Input((5,))
    shared = layers.BatchNormalization(momentum=0.9, name="shared")
    x = layers.Dropout(dropout)(shared(layers.Dense(8, activation="relu")(inputs)))
    x = layers.Activation("relu")(shared(Noise()(layers.Dense(8)(x))))
    return keras.Model(inputs, layers.Dense(CLASSES, dtype="float32")(x))


def train(callbacks, *, policy="float32", epochs=2, build=small, **arguments):
    keras.config.set_dtype_policy(policy)
    try:
        model = make(build, **arguments)
        x, y = data(416, shape=(5,))
        history = model.fit(
            x, y, batch_size=16, epochs=epochs, verbose=0, callbacks=callbacks, validation_data=(x[:70], y[:70])
        ).history
    finally:
        keras.config.set_dtype_policy("float32")
    return model, history


@pytest.mark.parametrize(
    "arguments",
    [{}, {"jit_compile": True}, {"run_eagerly": True}, {"policy": "mixed_bfloat16"}, {"steps_per_execution": 2}],
    ids=str,
)
def test_weights_optimizer_history_and_random_state(arguments):
    watch = quiet_watch(every=3)
    plain, plain_history = train([], **arguments)
    watched, watched_history = train([watch], **arguments)
    assert watch.watch.signals.faults == []
    assert watch.report().samples >= 17
    assert watch.report().steps == 52
    assert watch.watch.signals.looks
    assert watch.watch.signals.cells is not None
    # every variable: weights, running statistics, seeds of the random layers, optimizer
    assert state(watched) == state(plain)
    assert watched_history == plain_history
    assert list(watched_history) == list(plain_history)
    assert watched.metrics_names == plain.metrics_names


def test_global_random_state_is_untouched():
    def draw(callbacks):
        train(callbacks, epochs=1)
        return tf.random.normal((3,)).numpy().tolist(), np.random.standard_normal(3).tolist()  # noqa: NPY002

    assert draw([quiet_watch(every=1)]) == draw([])


def test_a_file_saved_while_watched_is_the_same(tmp_path):
    import h5py

    def saved(name, callbacks):
        path = tmp_path / name
        train([*callbacks, keras.callbacks.ModelCheckpoint(str(path))], epochs=1, build=plain_net)
        with zipfile.ZipFile(path) as archive:
            archive.extract("model.weights.h5", path.with_suffix(""))
            # an object's identity is its address
            config = re.sub(rb'"shared_object_id": \d+', b"", archive.read("config.json"))
        arrays = {}
        with h5py.File(path.with_suffix("") / "model.weights.h5") as file:
            file.visititems(
                lambda name, item: arrays.update({name: item[()].tobytes()} if hasattr(item, "dtype") else {})
            )
        return config, arrays

    assert saved("watched.keras", [quiet_watch()]) == saved("plain.keras", [])


def plain_net():
    keras.backend.clear_session()  # names count from 1 again
    return keras.Sequential(
        [keras.Input((5,)), layers.BatchNormalization(name="bn"), layers.Dense(CLASSES, name="scores")]
    )


def test_nothing_stays_on_the_model():
    model = make(small)
    x, y = data(64, shape=(5,))
    model.fit(x, y, verbose=0, validation_data=(x, y))
    before, functions = attributes(model), (model.train_function, model.test_function)
    variables = [id(v) for v in model.variables]
    watch = quiet_watch(every=1)
    model.fit(x, y, verbose=0, validation_data=(x, y), callbacks=[watch])
    assert watch.watch.signals.faults == []
    assert attributes(model) == before
    assert (model.train_function, model.test_function) == functions
    assert [id(v) for v in model.variables] == variables


def test_hooks_go_when_training_raised():
    class Stop(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            raise KeyboardInterrupt

    model = make(small)
    x, y = data(64, shape=(5,))
    watch = quiet_watch()
    with pytest.raises(KeyboardInterrupt):
        model.fit(x, y, verbose=0, callbacks=[watch, Stop()])
    assert "train_step" in model.__dict__
    # the same watch, or another one, heals the model when it is next used
    model.fit(x, y, verbose=0, callbacks=[watch])
    assert watch.watch.signals.faults == []
    assert watch.report().steps >= 2
    assert "train_step" not in model.__dict__
    assert "_moments" not in model.get_layer("shared").__dict__


def test_hooks_go_with_the_watch_when_training_raised():
    class Stop(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            raise KeyboardInterrupt

    model = make(small)
    x, y = data(64, shape=(5,))
    try:
        model.fit(x, y, verbose=0, callbacks=[quiet_watch(), Stop()])
    except KeyboardInterrupt as error:
        error.__traceback__ = None
    model.history = None
    gc.collect()
    assert "train_step" not in model.__dict__
    assert "_moments" not in model.get_layer("shared").__dict__


def test_another_watch_heals_the_model():
    class Stop(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            raise KeyboardInterrupt

    model = make(small)
    x, y = data(64, shape=(5,))
    first, second = quiet_watch(), quiet_watch()
    model.make_train_function()
    own = model.train_function
    with pytest.raises(KeyboardInterrupt):
        model.fit(x, y, verbose=0, callbacks=[first, Stop()])
    model.fit(x, y, verbose=0, callbacks=[second])
    assert second.watch.signals.faults == []
    assert second.report().sites == 2
    assert model.train_function is own
    assert "train_step" not in model.__dict__
    assert "_moments" not in model.get_layer("shared").__dict__


def test_a_train_function_that_would_change_by_tracing_again_is_left_alone():
    x, y = data(64, shape=(5,))

    def run(callbacks):
        model = make(small)
        model.fit(x, y, verbose=0)
        model.get_layer("shared").trainable = False
        model.fit(x, y, verbose=0, callbacks=callbacks)
        return state(model)

    with pytest.warns(match="call compile\\(\\) again"):
        watched = run([quiet_watch()])
    assert watched == run([])


def test_no_tensorflow_operation_on_a_step_that_is_not_sampled(monkeypatch):
    """Every eager operation, and so every read from the device, goes through one of these calls."""
    from tensorflow.python.eager import execute
    from tensorflow.python.framework import ops

    model = make(small)
    x, y = data(64 * 16, shape=(5,))
    callback, watch = keras_models.faked(every=7)
    steps, counted = [], [0]

    def counting(original):
        def call(*args, **kwargs):
            counted[0] += 1
            return original(*args, **kwargs)

        return call

    session_begin = callback.on_train_batch_begin

    def begin(batch, logs=None):
        counted[0] = 0
        session_begin(batch, logs)
        steps.append((batch, counted[0]))

    monkeypatch.setattr(callback, "on_train_batch_begin", begin)
    for name in ("TFE_Py_FastPathExecute", "TFE_Py_Execute"):
        monkeypatch.setattr(execute.pywrap_tfe, name, counting(getattr(execute.pywrap_tfe, name)))
    monkeypatch.setattr(ops.EagerTensor, "numpy", counting(ops.EagerTensor.numpy))
    model.fit(x, y, batch_size=16, verbose=0, callbacks=[callback])
    assert not watch.faults
    # the flag that asks for a batch goes up before the sampled step, and down after it: each is one assignment
    busy = {batch for batch, operations in steps if operations}
    assert busy == {b for k in range(7, 64, 7) for b in (k - 1, k)}


def test_compile_anew_during_training_is_survived():
    class Unfreeze(keras.callbacks.Callback):
        def on_epoch_begin(self, epoch, logs=None):
            if epoch == 1:
                compiled(self.model)
                self.model.make_train_function()

    model = make(small)
    x, y = data(64, shape=(5,))
    watch = quiet_watch(every=1)
    model.fit(x, y, verbose=0, epochs=2, callbacks=[watch, Unfreeze()])
    assert watch.watch.signals.faults == []
    assert watch.report().steps == 4
    assert "train_step" not in model.__dict__
