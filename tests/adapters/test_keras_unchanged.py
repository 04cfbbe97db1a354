"""A watched training is, to the bit, the training without the watch; and nothing stays behind."""

from __future__ import annotations

import gc
import random
import re
import zipfile

import numpy as np
import pytest

from tests.adapters.keras_models import (
    CLASSES,
    attributes,
    compiled,
    data,
    hooks,
    make,
    quiet_watch,
    state,
)
from tests.adapters.library import BACKEND, LEGACY, dtype_policy, keras, layers, modes, random_numbers


class Noise(layers.Layer):
    """Draws noise, also in evaluation, from a state of its own."""

    def __init__(self):
        super().__init__(name="noise")
        self.seeds = keras.random.SeedGenerator(3)

    def call(self, x):
        return x + 0.01 * keras.random.normal(keras.ops.shape(x), seed=self.seeds, dtype=x.dtype)


def small(dropout=0.3):
    """Return a net with dropout, a shared batch norm, and noise."""
    # Keras 2 has no seeds that a layer could own; noise of size 0 is drawn there all the same
    legacy = layers.GaussianNoise(0.01) if dropout else layers.Activation("linear")
    noise = legacy if LEGACY else Noise()
    inputs = keras.Input((5,))
    shared = layers.BatchNormalization(momentum=0.9, name="shared")
    x = layers.Dropout(dropout)(shared(layers.Dense(8, activation="relu")(inputs)))
    x = layers.Activation("relu")(shared(noise(layers.Dense(8)(x))))
    return keras.Model(inputs, layers.Dense(CLASSES, dtype="float32")(x))


def train(callbacks, *, policy="float32", epochs=2, build=small, **arguments):
    with dtype_policy(policy):
        model = make(build, **arguments)
    x, y = data(416, shape=(5,))
    history = model.fit(
        x, y, batch_size=16, epochs=epochs, verbose=0, callbacks=callbacks, validation_data=(x[:70], y[:70])
    ).history
    return model, history


@pytest.mark.parametrize("arguments", modes("default", "jit", "eager", "two_steps", "bfloat16", "float16"))
def test_weights_optimizer_history_and_random_state(arguments):
    if LEGACY and "jit_compile" in arguments:
        # two trainings of Keras 2 without a watch do not agree there as soon as something is drawn
        arguments = {**arguments, "build": lambda: small(dropout=0.0)}
    # nothing can be kept from inside of what XLA compiles there
    probe = data(70, shape=(5,)) if LEGACY and "jit_compile" in arguments else None
    watch = quiet_watch(every=3, probe=probe)
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
    assert [w.tobytes() for w in watched.get_weights()] == [w.tobytes() for w in plain.get_weights()]


def test_global_random_state_is_untouched():
    def draw(callbacks):
        train(callbacks, epochs=1)
        return random_numbers()

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
    # Keras 2 would draw other numbers from a function that is traced anew, so the watch keeps away from it
    model = make(lambda: small(dropout=0.0 if LEGACY else 0.3))
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
    if BACKEND == "jax":  # Keras 3.4 cannot train again before
        model.jax_state_sync()
    assert hooks(model)
    # the same watch, or another one, heals the model when it is next used
    model.fit(x, y, verbose=0, callbacks=[watch])
    assert watch.watch.signals.faults == []
    assert watch.report().steps >= 2
    assert not hooks(model)


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
    assert not hooks(model)


def test_another_watch_heals_the_model():
    class Stop(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            raise KeyboardInterrupt

    model = make(lambda: small(dropout=0.0))  # Keras 2 does not go on with random numbers that were begun
    x, y = data(64, shape=(5,))
    first, second = quiet_watch(), quiet_watch()
    model.make_train_function()
    own = model.train_function
    with pytest.raises(KeyboardInterrupt):
        model.fit(x, y, verbose=0, callbacks=[first, Stop()])
    if BACKEND == "jax":  # Keras 3.4 cannot train again before
        model.jax_state_sync()
    model.fit(x, y, verbose=0, callbacks=[second])
    assert second.watch.signals.faults == []
    assert second.report().sites == 2
    assert model.train_function is own
    assert not hooks(model)


def test_compile_anew_during_training_is_survived():
    class Unfreeze(keras.callbacks.Callback):
        def on_epoch_begin(self, epoch, logs=None):
            if epoch == 1:
                compiled(self.model)
                if BACKEND == "jax":  # Keras builds it there as fit begins, and not again
                    self.model.optimizer.build(self.model.trainable_variables)
                self.model.make_train_function()

    model = make(small)
    x, y = data(64, shape=(5,))
    watch = quiet_watch(every=1)
    model.fit(x, y, verbose=0, epochs=2, callbacks=[watch, Unfreeze()])
    assert watch.watch.signals.faults == []
    assert watch.report().steps == 4
    assert not hooks(model)


def test_a_layer_that_draws_from_python_and_numpy_draws_the_same():
    """The structure, the looks and the cells call it more often; nobody may notice."""

    class Erratic(keras.Model):
        def __init__(self):
            super().__init__()
            self.bn, self.scores = layers.BatchNormalization(name="bn"), layers.Dense(CLASSES)

        def call(self, x, training=None):
            scale = 1.0 + random.random() * np.random.random()  # noqa: NPY002, S311 - the global ones are meant
            return self.scores(self.bn(x * scale, training=training))

    x, y = data(96, shape=(5,))

    def run(callbacks):
        model = make(Erratic, run_eagerly=True)
        model.fit(x, y, batch_size=16, epochs=2, verbose=0, callbacks=callbacks, validation_data=(x[:32], y[:32]))
        return state(model), random.random(), np.random.random()  # noqa: NPY002, S311 - likewise

    watch = quiet_watch(every=1)
    assert run([watch]) == run([])
    assert watch.watch.signals.faults == []
    assert watch.watch.signals.cells is not None
