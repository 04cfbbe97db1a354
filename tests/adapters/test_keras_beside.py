"""Beside other callbacks, other watches, and code of the user's own on the model: the training stays what it is."""

from __future__ import annotations

import gc

import pytest

from bnwatch.keras.loop import LoopWatch
from bnwatch.keras.session import DISPLACED
from tests.adapters.keras_models import CLASSES, FakeWatch, attributes, data, faked, hooks, make, quiet_watch, state
from tests.adapters.library import BACKEND, keras, layers

X, Y = data(64, shape=(5,))
EARLY = keras.callbacks.EarlyStopping


def net():
    x = inputs = keras.Input((5,))
    x = layers.ReLU()(layers.BatchNormalization(name="bn")(layers.Dense(6)(x)))
    return keras.Model(inputs, layers.Dense(CLASSES, name="scores")(layers.Dropout(0.2, seed=3)(x)))


def fit(model, *callbacks, epochs=2):
    return model.fit(
        X, Y, batch_size=32, epochs=epochs, verbose=0, callbacks=list(callbacks), validation_data=(X[:24], Y[:24])
    ).history


class Does(keras.callbacks.Callback):
    """Does something with the model at some moments of the training."""

    def __init__(self, do, *moments):
        super().__init__()
        for moment in moments:
            setattr(self, moment, lambda *_, **__: do(self.model))


def evaluates(model):
    model.evaluate(X[:40], Y[:40], batch_size=20, verbose=0)


def predicts(model):
    model.predict(X[:8], verbose=0)


def restarts(model):
    model.save_weights(FOLDER["now"] / "w.weights.h5")
    model.load_weights(FOLDER["now"] / "w.weights.h5")


def stops(_):
    raise KeyboardInterrupt


FOLDER = {}


def checkpoint(folder):
    return keras.callbacks.ModelCheckpoint(str(folder / "w.weights.h5"), save_best_only=True, save_weights_only=True)


BESIDE = {
    # worse from the second epoch on, whatever happens: the weights of the first come back
    "early stopping": lambda _: EARLY("val_loss", mode="max", min_delta=9.0, patience=1, restore_best_weights=True),
    "early stopping at the end": lambda _: EARLY("val_loss", mode="max", patience=9, restore_best_weights=True),
    "a checkpoint": checkpoint,
    "a backup": lambda folder: keras.callbacks.BackupAndRestore(str(folder / "backup")),
    "a learning rate": lambda _: keras.callbacks.ReduceLROnPlateau("val_loss", patience=0, min_delta=9.0),
    "evaluates between epochs": lambda _: Does(evaluates, "on_epoch_begin", "on_epoch_end"),
    "evaluates as training ends": lambda _: Does(evaluates, "on_train_begin", "on_train_end"),
    "predicts": lambda _: Does(predicts, "on_epoch_end", "on_train_end"),
    "loads weights": lambda _: Does(restarts, "on_epoch_end"),
}
ORDERS = {"before": lambda ours, theirs: (ours, theirs), "after": lambda ours, theirs: (theirs, ours)}


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("beside", BESIDE)
def test_other_callbacks(beside, order, tmp_path):
    def run(name, *watches):
        FOLDER["now"] = tmp_path / name
        FOLDER["now"].mkdir()
        theirs = BESIDE[beside](FOLDER["now"])
        model = make(net, run_eagerly=True)
        history = fit(model, *(ORDERS[order](*watches, theirs) if watches else (theirs,)))
        return model, history

    # once with the cells, which take most of the time
    watch = quiet_watch(every=1, experiments="auto" if order == "before" else False)
    (watched, ours), (plain, theirs) = run("watched", watch), run("plain")
    assert watch.watch.signals.faults == []
    assert watch.report().evaluations == len(ours["val_loss"])
    assert ours == theirs
    assert state(watched) == state(plain)
    assert not hooks(watched)
    assert (watch.watch.signals.cells is not None) == (order == "before")


@pytest.mark.parametrize("order", ORDERS)
def test_the_last_look_is_at_the_weights_that_come_back(order):
    callback, seen = faked()
    model = make(net, run_eagerly=True)
    kept = []
    seen.on_experiment = lambda _, final: kept.append(state(model)[: len(model.weights)]) if final else None
    fit(model, *ORDERS[order](callback, BESIDE["early stopping"](None)))
    assert seen.faults == []
    assert seen.swapped[-1] is True
    assert kept == [state(model)[: len(model.weights)]]
    assert seen.closed == 1


@pytest.mark.parametrize("eagerly", [True, False])
def test_an_evaluation_in_the_middle_of_an_epoch(eagerly):
    """What Keras itself makes of it differs; the watch adds nothing."""
    if BACKEND == "jax":
        pytest.skip("Keras on JAX loses its place in the training there, with and without a watch")

    def run(*watches):
        model = make(net, run_eagerly=eagerly)
        return fit(model, *watches, Does(evaluates, "on_train_batch_end"), epochs=1), state(model), hooks(model)

    callback, seen = faked()
    assert run(callback) == run()
    assert seen.faults == []
    assert [snapshot.step for snapshot in seen.snapshots] == [1, 2]


def test_what_the_user_hung_on_the_model_and_its_layers_stays():
    model = make(net, run_eagerly=True)
    bn, called = model.get_layer("bn"), []
    steps = {name: getattr(model, name) for name in ("train_step", "test_step", "evaluate")}

    def noting(name, own):
        def noted(*args, **kwargs):
            called.append(name)
            return own(*args, **kwargs)

        return noted

    for name, own in steps.items():
        model.__dict__[name] = noting(name, own)
    bn.__dict__["call"] = noting("call", bn.call)
    bn.__dict__["_moments"] = noting("_moments", getattr(bn, "_moments", None))
    before = attributes(model)
    callback, seen = faked()
    fit(model, callback, epochs=1)
    assert seen.faults == []
    assert {"train_step", "test_step", "evaluate", "call"} <= set(called)
    after = attributes(model)
    names = ("train_step", "test_step", "evaluate")
    assert [after[model.name][name] for name in names] == [before[model.name][name] for name in names]
    assert [after["bn"][name] for name in ("call", "_moments")] == [before["bn"][name] for name in ("call", "_moments")]


def test_a_model_that_evaluates_in_its_own_way():
    class Own(keras.Model):
        seen = 0

        def evaluate(self, *args, **kwargs):
            type(self).seen += 1
            return super().evaluate(*args, **kwargs)

    def build():
        inner = net()
        return Own(inner.input, inner.output)

    def run(*watches):
        model = make(build, run_eagerly=True)
        history = fit(model, *watches)
        return history, state(model), "evaluate" in model.__dict__

    callback, seen = faked()
    assert run(callback) == run()
    assert seen.faults == []
    assert Own.seen == 4
    assert [r.swapped for r in seen.evaluations] == [False] * 2


def test_of_two_watches_the_second_stays_and_the_first_says_so():
    def run(*watches):
        model = make(net, run_eagerly=True)
        return fit(model, *watches), state(model), hooks(model)

    first, second = quiet_watch(every=1), quiet_watch(every=1)
    said = []
    first.watch.advise = said.append
    assert run(first, second) == run()
    assert said == [f"{DISPLACED}; this training goes on unwatched"]
    assert second.watch.signals.faults == []
    assert (second.report().samples, second.report().evaluations) == (4, 2)
    assert second.watch.signals.cells is not None
    assert not first.watch.enabled


def test_a_loop_in_which_fit_is_watched_says_so():
    model, fake = make(net, run_eagerly=True), FakeWatch()
    refused = fake.refuse = []
    fake.refuse = lambda reason: (refused.append(reason), setattr(fake, "enabled", False))
    callback, seen = faked()
    with LoopWatch(model, fake) as loop:
        fit(model, callback, epochs=1)
        loop.step()
        loop.step()
        loop.evaluation(accuracy=0.5)
    assert len(refused) == 1
    assert (fake.faults, fake.snapshots, seen.faults) == ([], [], [])
    assert len(seen.snapshots) == 2
    assert not hooks(model)


MOMENTS = ["on_epoch_begin", "on_test_begin", "on_test_batch_end", "on_test_end", "on_epoch_end", "on_train_end"]


@pytest.mark.parametrize("moment", MOMENTS)
def test_hooks_go_when_another_callback_raised(moment):
    model = make(net, run_eagerly=True)
    before = attributes(model)
    try:
        fit(model, quiet_watch(every=1), Does(stops, moment), epochs=1)
    except KeyboardInterrupt as error:
        error.__traceback__ = None
    model.history = None
    gc.collect()
    assert not hooks(model)
    after = attributes(model)
    assert set(after["bn"]) == set(before["bn"])
    if BACKEND == "jax":  # Keras 3.4 cannot train again before
        model.jax_state_sync()
    watch = quiet_watch(every=1)
    fit(model, watch, epochs=1)
    assert watch.watch.signals.faults == []
    assert watch.report().steps == 2


@pytest.mark.parametrize("ours", [(0,), (0, 2), (2,)])
def test_a_list_of_callbacks_of_the_user(ours):
    """It is used twice, and holds afterwards what it held before."""
    model = make(net, run_eagerly=True)
    watches = [faked() for _ in ours]
    if len(watches) > 1:
        # they do not watch the same training: all but the last are switched off
        watches[0][1].refuse = lambda _: setattr(watches[0][1], "enabled", False)
    given = [keras.callbacks.Callback(), keras.callbacks.Callback()]
    for place, (callback, _) in zip(ours, watches, strict=True):
        given.insert(place, callback)
    callbacks = keras.callbacks.CallbackList(given, add_history=True, model=model, epochs=1, verbose=0, steps=2)
    held = list(callbacks.callbacks)
    for _ in range(2):
        model.fit(X, Y, batch_size=32, verbose=0, callbacks=callbacks)
        assert callbacks.callbacks == held
        assert not hooks(model)
    assert watches[-1][1].faults == []
    assert watches[-1][1].closed == 2


@pytest.mark.parametrize("turn", [reversed, list])
def test_a_list_that_somebody_else_runs_over(turn):
    class Together(keras.callbacks.Callback):
        def __init__(self, callbacks):
            super().__init__()
            self.callbacks = callbacks

        def set_model(self, model):
            for one in self.callbacks:
                one.set_model(model)

        def on_train_begin(self, logs=None):
            for one in self.callbacks:
                one.on_train_begin(logs)

        def on_train_end(self, logs=None):
            for one in turn(self.callbacks):
                one.on_train_end(logs)

    callback, seen = faked()
    model = make(net, run_eagerly=True)
    together = Together([keras.callbacks.Callback(), callback, keras.callbacks.Callback()])
    fit(model, together, epochs=1)
    assert (seen.faults, seen.closed, len(together.callbacks)) == ([], 1, 3)
    assert not hooks(model)
