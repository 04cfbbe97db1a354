"""What an evaluation uses against what the last training step left, and an evaluation alone."""

from __future__ import annotations

import numpy as np
import pytest

from bnwatch.keras.backends import backend_of
from bnwatch.keras.changes import Changes
from bnwatch.keras.loop import LoopWatch
from bnwatch.keras.tap import Tap
from tests.adapters.keras_loops import steps
from tests.adapters.keras_models import CLASSES, FakeWatch, data, faked, hooks, make, quiet_watch, state
from tests.adapters.library import LEGACY, keras, layers, modes, to_numpy

X, Y = data(96, shape=(5,))


def net(**arguments):
    x = inputs = keras.Input((5,))
    for name in ("one", "two"):
        x = layers.ReLU()(layers.BatchNormalization(name=name, **arguments)(layers.Dense(6)(x)))
    return keras.Model(inputs, layers.Dense(CLASSES, name="scores")(x))


def fit(model, *callbacks, epochs=2, **arguments):
    return model.fit(
        X, Y, batch_size=32, epochs=epochs, verbose=0, callbacks=list(callbacks), validation_data=(X, Y), **arguments
    )


class Averages(keras.callbacks.Callback):
    """Puts other weights into the model where it is told to, and those of training back afterwards."""

    def __init__(self, *when, back=None):
        super().__init__()
        self.when, self.back, self.kept = when, back, None

    def _at(self, place):
        if place in self.when:
            self.kept = self.model.get_weights()
            self.model.get_layer("scores").set_weights([0.5 * w for w in self.model.get_layer("scores").get_weights()])
        elif place == self.back and self.kept is not None:
            self.model.set_weights(self.kept)

    def on_test_begin(self, logs=None):
        self._at("test_begin")

    def on_test_end(self, logs=None):
        self._at("test_end")

    def on_epoch_end(self, epoch, logs=None):
        self._at("epoch_end")

    def on_train_end(self, logs=None):
        self._at("train_end")


ORDERS = {"before": lambda ours, theirs: (ours, theirs), "after": lambda ours, theirs: (theirs, ours)}


@pytest.mark.parametrize("arguments", modes("default", "jit", "eager"))
def test_an_ordinary_training_moves_and_swaps_nothing(arguments):
    callback, seen = faked()
    model = make(net, **arguments)
    fit(model, callback)
    assert seen.faults == []
    assert [(r.moved, r.still, r.swapped) for r in seen.evaluations] == [((), (), False)] * 2
    assert seen.swapped == [False] * 3
    assert seen.moved == [()] * 3
    assert seen.closed == 1
    assert not hooks(model)


@pytest.mark.parametrize("order", ORDERS)
def test_weights_that_are_swapped_for_the_evaluation(order):
    callback, seen = faked()
    fit(make(net), *ORDERS[order](callback, Averages("test_begin", back="test_end")))
    assert seen.faults == []
    assert [r.swapped for r in seen.evaluations] == [True, True]
    # the cells are measured when they are back
    assert seen.swapped == [False] * 3


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("when", ["epoch_end", "train_end"])
def test_weights_that_are_swapped_after_the_last_evaluation(order, when):
    callback, seen = faked()
    fit(make(net), *ORDERS[order](callback, Averages(when)), epochs=1)
    assert seen.faults == []
    assert [r.swapped for r in seen.evaluations] == [False]
    # in order: as the epoch ends, which knows of callbacks before it, and as training ends, which knows of all
    assert seen.swapped == [when == "epoch_end" and order == "after", True]
    assert seen.closed == 1


@pytest.mark.skipif(LEGACY, reason="Keras 2 has no SwapEMAWeights")
def test_the_averages_of_keras():
    callback, seen = faked()
    model = make(net)
    optimizer = keras.optimizers.SGD(0.05, use_ema=True, ema_momentum=0.9)
    model.compile(optimizer, keras.losses.SparseCategoricalCrossentropy(from_logits=True), metrics=["accuracy"])
    fit(model, keras.callbacks.SwapEMAWeights(swap_on_epoch=True), callback, epochs=1)
    assert seen.faults == []
    # for the evaluation, for the file that is saved as the epoch ends, and for good
    assert [r.swapped for r in seen.evaluations] == [True]
    assert seen.swapped == [True, True]


def test_an_evaluation_that_moves_running_statistics():
    class Always(keras.Model):
        def __init__(self):
            super().__init__()
            self.one, self.two = layers.BatchNormalization(name="one"), layers.BatchNormalization(name="two")
            self.scores = layers.Dense(CLASSES)

        def call(self, x, training=None):
            return self.scores(self.two(self.one(x, training=True), training=training))

    callback, seen = faked()
    fit(make(Always), callback)
    assert seen.faults == []
    assert [(r.moved, r.batch_statistics) for r in seen.evaluations] == [(("one",), ("one",))] * 2


class Passes(keras.callbacks.Callback):
    """Calls the model in training mode after each evaluation."""

    def __init__(self, when):
        super().__init__()
        self.when = when

    def _pass(self, when):
        if when == self.when:
            self.model(X + 3.0, training=True)

    def on_epoch_end(self, epoch, logs=None):
        self._pass("epoch_end")

    def on_train_end(self, logs=None):
        self._pass("train_end")


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("when", ["epoch_end", "train_end"])
def test_passes_after_an_evaluation_that_move_running_statistics(order, when):
    callback, seen = faked()
    fit(make(net), *ORDERS[order](callback, Passes(when)))
    assert seen.faults == []
    assert [r.moved for r in seen.evaluations] == [()] * 2
    both = ("one", "two")
    # as epochs end, which knows of callbacks before it, and as training ends, which knows of all
    assert seen.moved == [both if when == "epoch_end" and order == "after" else ()] * 2 + [both]
    assert seen.swapped == [False] * 3


def frozen_scale():
    model = net()
    for variable in (model.get_layer("one").gamma, model.get_layer("one").beta):
        if LEGACY:
            variable._trainable = False
        else:
            variable.trainable = False
    return model


@pytest.mark.skipif(LEGACY, reason="variables of Keras 2 cannot be frozen by themselves")
def test_scale_and_offset_that_stay_while_others_move():
    callback, seen = faked()
    fit(make(frozen_scale), callback)
    assert seen.faults == []
    assert [r.still for r in seen.evaluations] == [("one",)] * 2


def test_a_head_that_the_first_step_builds_is_what_moves():
    class Transfer(keras.Model):
        def __init__(self):
            super().__init__()
            inputs = keras.Input((5,))
            self.base = keras.Model(inputs, layers.BatchNormalization(name="one")(inputs))
            self.scores = layers.Dense(CLASSES)

        def call(self, x, training=None):
            return self.scores(self.base(x, training=training))

    model = make(Transfer)
    tap = Tap(backend_of(model), FakeWatch().guard)
    changes = Changes(tap)
    changes.begin()
    assert not model.scores.built
    model(X)
    changes.made()
    model.scores.set_weights([1.0 + w for w in model.scores.get_weights()])
    one = tap.layers[0].path
    assert changes.still({one}) == (one,)


def test_nothing_is_still_where_nothing_is_trained():
    callback, seen = faked()
    model = make(net)
    model.optimizer.learning_rate = 0.0
    fit(model, callback)
    assert [r.still for r in seen.evaluations] == [()] * 2


def test_layers_without_scale_and_offset_are_left_out():
    callback, seen = faked()
    fit(make(lambda: net(center=False, scale=False)), callback)
    assert seen.faults == []
    assert [r.still for r in seen.evaluations] == [()] * 2


@pytest.mark.skipif(LEGACY, reason="variables of Keras 2 cannot be frozen by themselves")
def test_still_in_a_loop_by_hand():
    fake = FakeWatch()
    model = make(frozen_scale)
    with LoopWatch(model, fake) as watch:
        for step, (_, given) in zip(range(4), steps(model, X, Y, training=True, compiled=False), strict=False):
            watch.step(examples=96, batch=(X, Y), **given)
            if step % 2:
                watch.evaluation(accuracy=0.5, examples=96)
    assert fake.faults == []
    assert [r.still for r in fake.evaluations] == [("one",)] * 2


@pytest.mark.parametrize("order", ORDERS)
def test_the_training_is_the_one_without_a_watch(order):
    def run(*callbacks):
        model = make(net)
        fit(model, *callbacks)
        return state(model)

    callback, seen = faked()
    theirs = Averages("test_begin", back="test_end")
    assert run(*ORDERS[order](callback, theirs)) == run(Averages("test_begin", back="test_end"))
    assert seen.faults == []


# running statistics that were not restored


def attached(model):
    callback, seen = faked()
    fit(model, callback, epochs=1)
    assert seen.faults == []
    return seen.opened[0].unrestored


def test_statistics_that_were_not_restored():
    model = make(net)
    layer = model.get_layer("two")
    layer.set_weights([np.linspace(0.5, 1.5, 6), np.zeros(6), np.zeros(6), np.ones(6)])
    assert attached(model) == ("two",)


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"gamma_initializer": keras.initializers.Constant(0.3), "beta_initializer": keras.initializers.Constant(-2.0)},
        {"gamma_initializer": keras.initializers.RandomNormal(1.0, 0.02, seed=1)},
        {"scale": False, "center": False},
    ],
)
def test_a_fresh_layer_is_no_unrestored_one(arguments):
    assert attached(make(lambda: net(**arguments))) == ()


def test_a_trained_layer_that_has_its_statistics_is_none():
    model = make(net)
    fit(model)
    assert attached(model) == ()


class Teacher(keras.Model):
    """Trains one network, and evaluates another that gets its parameters and nothing else."""

    def __init__(self):
        super().__init__()
        self.student, self.teacher = net(), net()
        self.teacher.trainable = False

    def call(self, x, training=None):
        return self.student(x, training=training) if training else self.teacher(x, training=False)


class Handing(keras.callbacks.Callback):
    def on_test_begin(self, logs=None):
        for variable, value in zip(self.model.teacher.weights, self.model.student.weights, strict=True):
            if "moving" not in variable.name:
                variable.assign(np.array(to_numpy(value)))  # on JAX a buffer of two variables cannot be given away


def test_a_copy_that_is_given_parameters_in_mid_training_is_not_restored():
    model = make(Teacher)
    callback, seen = faked()
    fit(model, Handing(), callback)
    assert seen.faults == []
    teacher = {watched.path for watched in Tap(backend_of(model), None).layers if watched.unrestored()}
    assert len(teacher) == 2
    assert seen.opened[0].unrestored == ()
    assert set(seen.opened[-1].unrestored) == teacher
    assert len({attachment.unrestored for attachment in seen.opened}) == 2


# an evaluation alone


@pytest.mark.parametrize("arguments", modes("default", "jit", "eager"))
def test_an_evaluation_without_fit(arguments):
    model = make(net, **arguments)
    callback, seen = faked()
    plain = model.evaluate(X, Y, batch_size=40, verbose=0)
    watched = model.evaluate(X, Y, batch_size=40, verbose=0, callbacks=[callback])
    assert seen.faults == []
    assert watched == plain
    (record,) = seen.evaluations
    assert (record.step, record.examples, record.accuracy) == (0, 96, pytest.approx(plain[1]))
    # Keras 2 takes a function that was traced before any callback begins
    unseen = LEGACY and "run_eagerly" not in arguments
    assert record.majority == (None if unseen else pytest.approx(np.bincount(Y).max() / 96))
    assert (record.moved, record.swapped, record.classes) == ((), None, CLASSES)
    assert (len(seen.labs), seen.closed) == (1, 1)
    assert not hooks(model)


def test_an_evaluation_after_fit_goes_on():
    watch = quiet_watch()
    model = make(net)
    fit(model, watch)
    model.get_layer("scores").set_weights([2.0 * w for w in model.get_layer("scores").get_weights()])
    model.evaluate(X[:64], Y[:64], verbose=0, callbacks=[watch])
    assert watch.watch.signals.faults == []
    records = watch.watch.signals.evaluations
    assert [(r.step, r.swapped, r.examples) for r in records] == [(3, False, 96), (6, False, 96), (6, True, 64)]
    assert records[2].train_accuracy == records[1].train_accuracy
    cells = watch.watch.signals.cells
    assert (cells.step, cells.swapped) == (6, True)
    assert (cells.training["running"].examples, cells.evaluation["running"].examples) == (96 * 2, 64)
    scores = to_scores(model, X[:64])
    assert cells.evaluation["running"].accuracy == pytest.approx((scores.argmax(1) == Y[:64]).mean())


def to_scores(model, x):
    return np.asarray(model.predict(x, verbose=0))


def test_a_model_of_somebody_else_is_diagnosed_by_its_evaluation():
    model = make(net)
    fit(model, epochs=8)
    for name in ("one", "two"):
        layer = model.get_layer(name)
        gamma, beta, mean, _ = layer.get_weights()
        layer.set_weights([gamma, beta, mean + 30.0, np.full(6, 1e-4)])
    watch = quiet_watch(probe=(X, Y))
    model.evaluate(X, Y, verbose=0, callbacks=[watch])
    assert watch.watch.signals.faults == []
    cells = watch.watch.signals.cells
    assert cells.evaluation["batch"].accuracy > cells.evaluation["running"].accuracy + 0.2
    assert [d.rule for d in watch.diagnoses if d.severity.name in {"WARNING", "ERROR"}]


def test_weights_loaded_between_trainings_count_as_those_training_started_from():
    callback, seen = faked()
    model = make(net)
    fit(model, callback, epochs=1)
    model.get_layer("scores").set_weights([2.0 * w for w in model.get_layer("scores").get_weights()])
    fit(model, callback, epochs=1)
    assert [r.swapped for r in seen.evaluations] == [False, False]
