"""What is particular to JAX: pure functions, given state, places for statistics, transfers to the host, devices."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings

import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from tests.adapters.library import BACKEND, OLDEST, VERSION, keras, layers, to_numpy

if BACKEND != "jax":
    pytest.skip("about JAX alone", allow_module_level=True)

import jax
import jax.numpy as jnp

from bnwatch.evidence import ExperimentNotPossibleError
from bnwatch.keras import watch
from bnwatch.keras.backends import backend_of
from bnwatch.keras.backends.jax import slots
from bnwatch.keras.laboratory import KerasLaboratory
from bnwatch.keras.layers import find_layers
from bnwatch.keras.loop import LoopWatch
from tests.adapters.keras_models import (
    CLASSES,
    FakeWatch,
    compiled,
    data,
    faked,
    hooks,
    make,
    quiet_watch,
    state,
)


def net():
    keras.utils.set_random_seed(2)
    shared = layers.BatchNormalization(momentum=0.9, name="shared")
    inputs = keras.Input((5,))
    x = shared(layers.Dense(5, activation="relu", name="a")(shared(inputs)))
    return keras.Model(inputs, layers.Dense(CLASSES)(layers.Dropout(0.2)(x)))


class Twice(keras.Model):
    """Calls a layer twice, which no graph tells."""

    def __init__(self):
        super().__init__()
        self.bn, self.a, self.scores = layers.BatchNormalization(name="bn"), layers.Dense(5), layers.Dense(CLASSES)
        self.last = layers.BatchNormalization(name="last")
        self.traces = 0

    def call(self, x, training=None):
        self.traces += bool(training)
        x = self.bn(self.a(self.bn(x, training=training)), training=training)
        return self.scores(self.last(x, training=training))


# pure loops


def pure(model, wrap):
    """Return a training step as the guides of Keras write it, and the state it starts from."""
    optimizer = keras.optimizers.Adam(0.01)
    optimizer.build(model.trainable_variables)
    loss_of = keras.losses.SparseCategoricalCrossentropy(from_logits=True)

    def compute(trainable, non_trainable, x, y):
        scores, non_trainable = model.stateless_call(trainable, non_trainable, x, training=True)
        return loss_of(y, scores), (scores, non_trainable)

    @wrap
    def step(state, x, y):
        trainable, non_trainable, ours = state
        gradient = jax.value_and_grad(compute, has_aux=True)
        (loss, (scores, non_trainable)), gradients = gradient(trainable, non_trainable, x, y)
        trainable, ours = optimizer.stateless_apply(ours, gradients, trainable)
        return loss, jnp.mean(jnp.argmax(scores, 1) == y), (trainable, non_trainable, ours)

    variables = model.trainable_variables, model.non_trainable_variables, optimizer.variables
    return step, tuple([v.value for v in part] for part in variables)


def write_back(model, given):
    for variables, values in zip((model.trainable_variables, model.non_trainable_variables), given, strict=False):
        for variable, value in zip(variables, values, strict=True):
            variable.assign(value)


WRAPS = {"eager": lambda f: f, "compiled": lambda f: jax.jit(f, donate_argnums=0)}


@pytest.mark.parametrize("wrap", WRAPS)
def test_call_sites_of_every_step_of_a_pure_loop(wrap):
    x, y = data(80, shape=(5,))
    model = net()
    fake = FakeWatch()
    with LoopWatch(model, fake) as watching:
        step, given = pure(model, WRAPS[wrap])
        for _ in range(2):
            for start in range(0, 80, 32):  # the last batch is smaller: compiled functions are traced anew for it
                rows = slice(start, start + 32)
                loss, accuracy, given = step(given, x[rows], y[rows])
                watching.step(
                    loss=loss, accuracy=accuracy, examples=len(y[rows]), batch=(x[rows], y[rows]), state=given
                )
                call = fake.snapshots[-1].calls[0]
                assert_allclose(call.batch.mean, x[rows].astype("f8").mean(0), rtol=1e-4)
                assert_allclose(call.batch.var, x[rows].astype("f8").var(0), rtol=1e-4)
                names = [v.path for v in model.non_trainable_variables]
                assert_array_equal(call.running.mean, given[1][names.index("shared/moving_mean")])
        watching.evaluation(accuracy=0.5, examples=10)
    assert not fake.faults
    for number, snapshot in enumerate(fake.snapshots):
        assert [str(call.site) for call in snapshot.calls] == ["shared#0", "shared#1"]
        assert snapshot.calls[0].running.updates == 2 * (number + 1)
        assert snapshot.calls[1].batch.count == (16 if number % 3 == 2 else 32)
    assert not hooks(model)


def test_a_loop_that_calls_a_layer_more_often_than_there_are_places_is_told():
    x = data(32, shape=(5,))[0]
    model = keras.Sequential([keras.Input((5,)), layers.BatchNormalization(name="bn")])
    fake = FakeWatch()
    with LoopWatch(model, fake) as watching:
        values = tuple([v.value for v in part] for part in (model.trainable_variables, model.non_trainable_variables))

        def thrice(trainable, state):
            for scale in (1.0, 2.0, 3.0):
                scores, state = model.stateless_call(trainable, state, scale * x, training=True)
            return jnp.sum(scores), state

        for _ in range(2):
            (_, state), _ = jax.value_and_grad(thrice, has_aux=True)(*values)
            values = (values[0], state)
            with warnings.catch_warnings(record=True) as said:
                warnings.simplefilter("always")
                watching.step(state=values)
            told = ["more often in a step of this loop" in str(warning.message) for warning in said]
            assert told == [True] * (len(fake.snapshots) == 1)
    assert [[str(call.site) for call in snapshot.calls] for snapshot in fake.snapshots] == [["bn#0", "bn#1"]] * 2


def test_a_pure_loop_is_the_same_without_a_watch_and_its_state_reaches_the_experiments():
    x, y = data(96, shape=(5,))

    def run(watched):
        model = net()
        watching = watch(model, None, on_diagnosis="log", every=2) if watched else LoopWatch(model, FakeWatch())
        watching.watch.enabled = watched
        with watching:
            step, given = pure(model, jax.jit)
            for start in range(0, 96, 16):
                rows = slice(start, start + 16)
                loss, accuracy, given = step(given, x[rows], y[rows])
                watching.step(accuracy=accuracy, loss=loss, batch=(x[rows], y[rows]), state=given)
            # what is at hand in the model itself is as old as the loop
            before = state_of(model)
            watching.evaluation(accuracy=0.4, examples=96, classes=CLASSES, data=(x, y))
            assert state_of(model) == before
            write_back(model, given)
        return model, watching.watch

    def state_of(model):
        return [to_numpy(v).tobytes() for v in model.variables]

    plain, _ = run(watched=False)
    model, told = run(watched=True)
    assert state_of(model) == state_of(plain)
    assert told.signals.faults == []
    assert told.signals.looks
    accuracy = np.mean(np.argmax(compiled(model).predict(x, verbose=0), 1) == y)
    assert told.signals.cells.evaluation["running"].accuracy == pytest.approx(accuracy)


def test_a_loop_that_keeps_its_state_to_itself_is_told_how_to_give_it():
    x, y = data(16, shape=(5,))
    model = net()
    with LoopWatch(model, FakeWatch()) as watching:
        step, given = pure(model, jax.jit)
        step(given, x, y)
        with pytest.warns(match="give step\\(\\) the state that comes out"):
            watching.step()


def test_variables_collected_before_the_watch_are_said_to_be():
    x, y = data(16, shape=(5,))
    model = net()
    step, given = pure(model, jax.jit)
    *_, given = step(given, x, y)
    with LoopWatch(model, FakeWatch()) as watching, pytest.warns(match="collect the variables .* inside watch\\(\\)"):
        watching.step(state=given)


def test_a_state_of_something_else_is_told_apart():
    x, y = data(16, shape=(5,))
    model = net()
    fake = FakeWatch()
    with LoopWatch(model, fake) as watching:
        step, given = pure(model, jax.jit)
        *_, given = step(given, x, y)
        watching.step(state=(given[1], given[0]))
    ((_, error, _),) = fake.faults
    assert "the state has 7 trainable_variables, the model has 6" in str(error)
    assert not hooks(model)


def test_a_model_that_is_built_inside_the_watch():
    x, y = data(16, shape=(5,))
    model = Twice()
    build = vars(model.bn)["build"]
    fake = FakeWatch()
    with LoopWatch(model, fake) as watching:
        model(x)
        step, given = pure(model, jax.jit)
        *_, given = step(given, x, y)
        watching.step(state=given)
    assert vars(model.bn)["build"] is build
    assert not fake.faults
    assert [str(call.site) for call in fake.snapshots[0].calls] == ["bn#0", "bn#1", "last#0"]
    assert_allclose(fake.snapshots[0].calls[0].batch.mean, x.astype("f8").mean(0), rtol=1e-4)


# places for statistics


@pytest.mark.parametrize("arguments", [{}, {"run_eagerly": True}, {"steps_per_execution": 2}], ids=str)
def test_more_call_sites_than_were_known_are_there_from_the_first_step(arguments):
    x, y = data(80, shape=(5,))

    def train(callbacks):
        model = make(Twice, **arguments)
        history = model.fit(x, y, batch_size=16, shuffle=False, verbose=0, callbacks=callbacks).history
        return model, state(model), history

    callback, fake = faked(experiments=False)
    model, *watched = train([callback])
    plain, *unwatched = train([])
    assert not fake.faults
    assert watched == unwatched
    first = fake.snapshots[0]
    assert [str(call.site) for call in first.calls] == ["bn#0", "bn#1", "last#0"]
    batch = x[16 * (first.step - 1) : 16 * first.step]
    assert_allclose(first.calls[0].batch.mean, batch.astype("f8").mean(0), rtol=1e-4)
    # traced once more, not once a step; a model of code alone is called once without data, to see its structure
    assert model.traces - plain.traces <= 2 + bool(arguments.get("run_eagerly"))
    assert not hooks(model)


def test_training_goes_on_where_no_place_can_be_made(monkeypatch):
    def broken(self):
        msg = "broken on purpose"
        raise RuntimeError(msg)

    monkeypatch.setattr(slots.JaxSlots, "grow", broken)
    x, y = data(32, shape=(5,))
    callback, fake = faked(experiments=False)
    watched, plain = make(Twice), make(Twice)
    for model, callbacks in ((watched, [callback]), (plain, [])):
        model.fit(x, y, batch_size=16, shuffle=False, verbose=0, callbacks=callbacks)
    assert [doing for doing, *_ in fake.faults] == ["making place for call sites"]
    assert state(watched) == state(plain)
    assert not hooks(watched)


def test_counters_and_bits_are_exact():
    layer = layers.BatchNormalization()
    layer.build((None, 2))
    model = keras.Sequential([keras.Input((2,)), layer])
    backend = backend_of(model)
    (watched,), _ = find_layers(backend)
    storage = slots.JaxSlots(backend, FakeWatch().guard)
    storage.prepare(watched, 1)
    strange = np.array([0x7FC12345, 1], "int32").view("float32")  # a NaN with a payload, a subnormal
    for count in (2**24 + 1, 2**40):
        storage.put("key", watched, jnp.asarray(strange), jnp.array([3.0, np.inf]), lambda count=count: count)
    (stored,) = storage.read().stored
    assert stored.mean.tobytes() == strange.tobytes()
    assert (stored.var.tolist(), stored.count, stored.calls) == ([3.0, np.inf], 2**31 - 1, 2)
    storage.put("key", watched, jnp.zeros(2), jnp.zeros(2), lambda: 2**24 + 1)
    assert storage.read().stored[0].count == 2**24 + 1
    storage.release()
    assert not hooks(model)


# the host


def test_nothing_but_bnwatch_runs_on_a_step_that_is_not_sampled(monkeypatch):
    """Whatever touches the device is a call into JAX, and NumPy's conversions are calls into NumPy."""
    model = make(net)
    x, y = data(64 * 16, shape=(5,))
    callback, fake = faked(every=7)
    begin, touched = callback.on_train_batch_begin, {}

    def profiled(batch, logs=None):
        def note(frame, event, argument):
            module = frame.f_globals.get("__name__", "") if event == "call" else getattr(argument, "__module__", "")
            if event in ("call", "c_call"):
                found.add(str(module).partition(".")[0])

        found = touched[batch] = set()
        sys.setprofile(note)
        try:
            begin(batch, logs)
        finally:
            sys.setprofile(None)

    monkeypatch.setattr(callback, "on_train_batch_begin", profiled)
    model.fit(x, y, batch_size=16, verbose=0, callbacks=[callback])
    assert not fake.faults
    assert len(fake.snapshots) == 10
    foreign = {batch: found & {"jax", "jaxlib", "numpy"} for batch, found in touched.items()}
    # the sample of step 7 k is taken as the next one begins; the batch that it wants comes with the call itself
    assert {batch for batch, found in foreign.items() if found} == {7 * k for k in range(1, 10)}


def test_the_model_stays_unsynchronized():
    """Reading a sample leaves the variables of Keras as they are in the middle of an epoch: empty."""
    seen = []

    class Look(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            seen.append(self._model._jax_state_synced)

    class LookAfter(keras.callbacks.Callback):
        def on_train_batch_begin(self, batch, logs=None):
            seen.append(self._model._jax_state_synced)

    model = make(net)
    x, y = data(64, shape=(5,))
    model.fit(x, y, batch_size=16, verbose=0, callbacks=[quiet_watch(every=1), LookAfter(), Look()])
    # synchronized before the first step of the epoch alone
    assert seen == [True, *[False] * 7]


# batches


@pytest.mark.skipif(OLDEST, reason="in Keras 3.4 what is kept of such a generator is not what is trained on")
def test_a_generator_that_fills_one_array_again_and_again():
    x, y = data(96, shape=(5,))

    def batches():
        part, labels = np.empty((16, 5), "float32"), np.empty(16, "int64")
        while True:
            for start in range(0, 96, 16):
                part[:], labels[:] = x[start : start + 16], y[start : start + 16]
                yield part, labels

    callback, fake = faked()
    kept = []
    fake.on_experiment = lambda lab, final: kept.extend(lab.examples("training", 1000)) if final else None
    make(net).fit(batches(), steps_per_epoch=6, shuffle=False, verbose=0, callbacks=[callback])
    assert not fake.faults
    # Keras looks ahead, and trains on what is in the array by then
    for batch, snapshot in zip(kept, fake.snapshots, strict=True):
        assert_allclose(to_numpy(batch.inputs).mean(0), snapshot.calls[0].batch.mean, atol=1e-5)


# the model


def test_prediction_and_evaluation_inside_of_the_training():
    class Predict(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            seen.append(self.model.predict(x[:8], verbose=0))
            seen.append(self.model.evaluate(x[:8], y[:8], verbose=0))

    x, y = data(64, shape=(5,))

    def train(callbacks):
        seen.clear()
        model = make(net)
        model.predict(x[:8], verbose=0)
        own = model.predict_function
        model.fit(x, y, verbose=0, epochs=2, callbacks=[*callbacks, Predict()])
        return model, own, list(map(str, seen))

    seen = []
    watch = quiet_watch(every=1)
    model, own, watched = train([watch])
    assert watch.watch.signals.faults == []
    assert watched == train([])[2]
    assert model.predict(x[:8], verbose=0).shape == (8, CLASSES)
    assert model.predict_function is own or model.predict_function.__module__.startswith("keras")


@pytest.mark.skipif(VERSION < (3, 5), reason="Keras 3.4 takes no note of what compile() saw")
def test_trainable_that_no_function_knows_of_is_left_alone():
    def bare():
        bn = layers.BatchNormalization(scale=False, center=False, name="bn")
        return keras.Sequential([keras.Input((5,)), bn, layers.Dense(CLASSES)])

    x, y = data(64, shape=(5,))

    def run(callbacks):
        model = make(bare)
        model.fit(x, y, verbose=0)
        model.get_layer("bn").trainable = False
        model.fit(x, y, verbose=0, callbacks=callbacks)
        return state(model)

    with pytest.warns(match="call compile\\(\\) again"), warnings.catch_warnings():
        # NumPy finds old how Keras converts its variables
        warnings.filterwarnings("ignore", "__array__ implementation", DeprecationWarning)
        watched = run([quiet_watch()])
    assert watched == run([])


def test_nnx_is_refused_in_a_sentence(monkeypatch):
    monkeypatch.setattr(keras.config, "is_nnx_enabled", lambda: True, raising=False)
    assert "does not watch Keras on JAX with Flax NNX" in backend_of(make(net)).why_not()


def test_a_step_that_took_its_state_with_it_is_healed():
    """An interrupt in the middle of a step leaves arrays that were given away and that nobody can read."""

    class Stop(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            raise KeyboardInterrupt

    model = make(net)
    x, y = data(64, shape=(5,))
    first, second = quiet_watch(), quiet_watch()
    with pytest.raises(KeyboardInterrupt):
        model.fit(x, y, verbose=0, callbacks=[first, Stop()])
    model.jax_state_sync()
    for slot in model.get_layer("shared")._seed_generators:
        slot.state.value.delete()
    model.fit(x, y, verbose=0, callbacks=[second])
    assert second.watch.signals.faults == []
    assert second.report().sites == 2
    assert not hooks(model)


def test_a_layer_inside_a_loop_of_jax_is_no_part_of_a_look():
    class Loop(layers.Layer):
        def __init__(self):
            super().__init__(name="loop")
            self.inner = layers.Dense(5, name="inner")

        def build(self, shape):
            self.inner.build(shape)

        def call(self, x):
            return jax.lax.scan(lambda carry, _: (self.inner(carry), None), x, None, length=3)[0]

        def compute_output_shape(self, shape):
            return shape

    class Outer(keras.Model):
        def __init__(self):
            super().__init__()
            self.loop, self.bn, self.scores = Loop(), layers.BatchNormalization(name="bn"), layers.Dense(CLASSES)
            self.inside = self.loop.inner

        def call(self, x, training=None):
            return self.scores(self.bn(self.loop(x), training=training))

    x, y = data(16, shape=(5,))
    model = compiled(Outer())
    model(x)
    lab = KerasLaboratory(backend_of(model), {"training": given_data(x, y)})
    looks = lab.look(lab.examples("training", 16)[0], gradients=True).layers
    assert [look.path for look in looks][:2] == ["loop", "bn"]
    assert len(looks) == 3
    assert all(look.gradient > 0 for look in looks)


def given_data(x, y):
    from bnwatch.keras.experiments import Given

    return Given((x, y), "training", 16)


def test_unseeded_numbers_are_a_reason_not_a_failure():
    class Random(layers.Layer):
        def call(self, x):
            return x + keras.random.normal((5,))

        def compute_output_shape(self, shape):
            return shape

    model = keras.Sequential([keras.Input((5,)), layers.BatchNormalization(), Random(), layers.Dense(CLASSES)])
    x, y = data(16, shape=(5,))
    lab = KerasLaboratory(backend_of(compiled(model)), {"training": given_data(x, y)})
    with pytest.raises(ExperimentNotPossibleError, match="could not be run"):
        lab.outputs(lab.examples("training", 16)[0], "batch")


# several devices

DISTRIBUTED = """
import numpy as np, keras
from tests.adapters.keras_models import CLASSES, data, faked, layers, make, quiet_watch, state
keras.distribution.set_distribution(keras.distribution.DataParallel(devices=keras.distribution.list_devices()))
x, y = data(128, shape=(5,))
x[::2] += 10.0

class Twice(keras.Model):
    def __init__(self):
        super().__init__()
        self.bn, self.scores = layers.BatchNormalization(momentum=0.9, name="bn"), layers.Dense(CLASSES)
    def call(self, x, training=None):
        return self.scores(self.bn(2.0 * self.bn(x, training=training), training=training))

def train(callbacks):
    model = make(Twice)
    model.fit(x, y, batch_size=32, epochs=2, shuffle=False, verbose=0, callbacks=callbacks, validation_data=(x, y))
    return model

callback, fake = faked(experiments=False)
watched = train([callback])
assert not fake.faults, fake.faults
assert len(watched.bn.moving_mean.value.sharding.device_set) == 2
for snapshot in fake.snapshots:
    batch = x[32 * ((snapshot.step - 1) % 4):][:32].astype("float64")
    first, second = snapshot.calls
    assert (first.batch.count, first.running.updates) == (32, 2 * snapshot.step)
    np.testing.assert_allclose(first.batch.mean, batch.mean(0), rtol=1e-4)
    np.testing.assert_allclose(first.batch.var, batch.var(0), rtol=1e-4)
watch = quiet_watch(every=1)
again = train([watch])
assert watch.watch.signals.faults == [], watch.watch.signals.faults
assert watch.watch.signals.cells is not None and watch.watch.signals.looks
assert state(watched) == state(again) == state(train([]))
print("agreed on", len(fake.snapshots))
"""


def test_data_parallel_statistics_are_those_of_the_global_batch():
    """In a process of its own: how many devices there are is settled when JAX starts."""
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=2"
    environment = {**os.environ, "XLA_FLAGS": flags, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", DISTRIBUTED],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert "agreed on 8" in done.stdout, done.stderr
