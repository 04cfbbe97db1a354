"""What is so on TensorFlow alone, in Keras 3 and in Keras 2."""

from __future__ import annotations

from contextlib import nullcontext

import pytest

from tests.adapters.keras_models import CLASSES, data, faked, make, quiet_watch, state
from tests.adapters.library import keras, layers


def mlp():
    inputs = keras.Input((5,))
    shared = layers.BatchNormalization(momentum=0.9, name="shared")
    x = layers.Dropout(0.3)(shared(layers.Dense(8, activation="relu")(inputs)))
    return keras.Model(inputs, layers.Dense(CLASSES)(shared(layers.Dense(8)(x))))


def test_a_train_function_that_would_change_by_tracing_again_is_left_alone():
    x, y = data(64, shape=(5,))

    def run(warning, callbacks):
        model = make(mlp)
        model.fit(x, y, verbose=0)
        model.get_layer("shared").trainable = False
        with warning:
            model.fit(x, y, verbose=0, callbacks=callbacks)
        return state(model)

    warned = run(pytest.warns(match="call compile\\(\\) again"), [quiet_watch()])
    assert warned == run(nullcontext(), [])


def test_no_tensorflow_operation_on_a_step_that_is_not_sampled(monkeypatch):
    """Every eager operation, and so every read from the device, goes through one of these calls."""
    from tensorflow.python.eager import execute
    from tensorflow.python.framework import ops

    model = make(mlp)
    x, y = data(64 * 16, shape=(5,))
    callback, watch = faked(every=7)
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
