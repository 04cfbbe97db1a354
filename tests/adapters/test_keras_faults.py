"""A failure inside the watch, wherever it happens, leaves the training as it would have been."""

from __future__ import annotations

from contextlib import nullcontext

import numpy as np
import pytest

from bnwatch.diagnosis import BatchNormError
from bnwatch.keras import BatchNormWatch, changes, laboratory, readings, session, tap
from bnwatch.keras.backends import backend_of
from tests.adapters.keras_models import CLASSES, compiled, data, make, quiet_watch, state
from tests.adapters.library import LEGACY, keras, layers


def net():
    bn = layers.BatchNormalization(name="bn")
    return keras.Sequential([keras.Input((5,)), layers.Dense(6), bn, layers.ReLU(), layers.Dense(CLASSES)])


def run(callbacks, *, eagerly=True):
    model = make(net, run_eagerly=eagerly)
    x, y = data(96, shape=(5,))
    model.fit(x, y, verbose=0, callbacks=callbacks, validation_data=(x[:32], y[:32]))
    return model


@pytest.fixture(scope="module")
def unwatched():
    return {eagerly: state(run([], eagerly=eagerly)) for eagerly in (True, False)}


def broken(*_, **__):
    msg = "broken on purpose"
    raise RuntimeError(msg)


SEAMS = [
    (tap.Tap, "attach"),
    (tap.Tap, "_record"),
    (tap.Tap, "records"),
    (tap.Tap, "detach"),
    ("storage", "put"),
    ("storage", "read"),
    ("functions", "make"),
    ("functions", "restore"),
    ("keeper", "collect"),
    (readings, "training"),
    (readings, "evaluation_record"),
    (laboratory.KerasLaboratory, "look"),
    (laboratory.KerasLaboratory, "outputs"),
    (laboratory.KerasLaboratory, "examples"),
    (changes.Changes, "begin"),
    (changes.Changes, "stepped"),
    (changes.Changes, "evaluated"),
    (changes.Changes, "now_swapped"),
    (session, "structure"),
    (tap.Tap, "idle"),
    (session.Session, "epoch_end"),
    (session.Session, "train_end"),
]


TRACED = {"_record", "put"}


@pytest.mark.parametrize(("place", "name"), SEAMS, ids=lambda v: v if isinstance(v, str) else v.__name__)
def test_training_finishes_and_the_model_is_clean(place, name, monkeypatch, unwatched):
    if isinstance(place, str):
        # what the backend of the model gives
        backend = backend_of(make(net))
        place = type(getattr(backend, place)(*[nullcontext] * (place != "functions")))
    monkeypatch.setattr(place, name, broken)
    watch = quiet_watch(every=1)
    # what runs inside the step fails while it is traced; the rest is quicker to see without tracing
    eagerly = name not in TRACED
    model = run([watch], eagerly=eagerly)
    monkeypatch.undo()
    assert state(model) == unwatched[eagerly]
    if (place, name) != (tap.Tap, "detach") and name != "restore":
        assert "train_step" not in model.__dict__
        assert not [value for value in model.get_layer("bn").__dict__.values() if hasattr(value, "bnwatch_tap")]
    said = [d.rule for d in watch.diagnoses] + [s.rule for s in watch.skipped]
    assert any(rule in {"BN903", "BN904"} for rule in said) or any(
        "could not be run" in s.reason for s in watch.skipped
    )


def test_a_diagnosis_is_raised_where_that_was_asked_for():
    shared = layers.BatchNormalization(name="shared")
    inputs = keras.Input((5,))
    x = shared(layers.Dense(8, activation="relu")(inputs))
    x = shared(layers.Dense(8, bias_initializer=keras.initializers.Constant(30.0))(x))
    model = compiled(keras.Model(inputs, layers.Dense(CLASSES)(x)))
    x, y = data(640, shape=(5,))
    with pytest.raises(BatchNormError, match="shared"):
        model.fit(x, y, epochs=3, verbose=0, callbacks=[BatchNormWatch(None, on_diagnosis="raise")])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"every": 0}, "every"),
        ({"allow": {"BN101": ""}}, "reason"),
        ({"probe": 3}, "probe"),
        ({"on_diagnosis": "no"}, "raise"),
    ],
)
def test_bad_arguments_are_one_clear_sentence(arguments, message):
    with pytest.raises(ValueError, match=message) as caught:
        BatchNormWatch(None, **arguments)
    assert "\n" not in str(caught.value)


@pytest.mark.skipif(LEGACY, reason="Keras 2 has one backend")
def test_another_backend_is_refused_in_a_sentence_and_training_goes_on(monkeypatch):
    monkeypatch.setattr(keras.backend, "backend", lambda: "openvino")
    watch = BatchNormWatch(None)
    watch.set_model(object())
    with pytest.warns(match="does not watch Keras on openvino"):
        watch.on_train_begin()
    watch.on_train_batch_begin(0)
    watch.on_epoch_end(0, {})
    watch.on_train_end()
    assert watch.diagnoses == ()


def test_regression_is_trained_without_experiments():
    model = keras.Sequential([keras.Input((5,)), layers.BatchNormalization(), layers.Dense(1)])
    model.compile(optimizer="sgd", loss="mse")
    x = data(64, shape=(5,))[0]
    watch = quiet_watch(every=1)
    model.fit(x, np.sin(x[:, 0]), verbose=0, callbacks=[watch], validation_data=(x, np.sin(x[:, 0])))
    assert watch.watch.signals.faults == []
