"""What the watch captures, the same for every Keras and backend: against a forward pass in NumPy and float64.

The learning rate is 0 here: weights stand still, so one forward pass by hand is the reference of every step, whatever
number of steps Keras runs at once; the batches differ, and so do their statistics. That moving weights are followed is
for ``test_keras_statistics.py`` to show, and that nothing is changed for ``test_keras_unchanged.py``.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import cycle
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from tests.adapters.keras_models import CLASSES, Batches, ByHand, FakeWatch, data, faked, quiet_watch, state
from tests.adapters.library import (
    BACKEND,
    LEGACY,
    OLDEST,
    TENSORFLOW,
    TORCH,
    VERSION,
    dtype_policy,
    keras,
    layers,
    modes,
    to_numpy,
)
from tests.adapters.library import set_random_seed as seed

if TYPE_CHECKING:
    from collections.abc import Callable

SIZE, STEPS = 16, 3
MOMENTUM = 0.9
MASKED = 2
"""Time steps at the end that the masked net leaves out."""

TOLERANCE = {"float32": 1e-5, "mixed_bfloat16": 4 * 2.0**-8, "mixed_float16": 4 * 2.0**-11}
"""Largest difference in units of the input's root mean square: of rounding a sum of some hundred float32 to float32, or
of rounding the input itself, and the output of each layer before it, to half the precision (8 and 11 bits)."""


def norm(name: str, **arguments: Any) -> Any:
    return layers.BatchNormalization(momentum=MOMENTUM, name=name, **arguments)


def scores() -> Any:
    return layers.Dense(CLASSES, name="scores")


def sequential():
    """Return images: the fused kernel of Keras 2."""
    return keras.Sequential(
        [
            layers.Conv2D(4, 3, name="conv"),
            norm("first"),
            layers.ReLU(),
            layers.Conv2D(4, 3, padding="same", name="again"),
            norm("second"),
            layers.GlobalAveragePooling2D(),
            scores(),
        ]
    )


def sequential_by_hand(by, x):
    z = np.maximum(by.norm("first", by.conv("conv", x)), 0)
    by.norm("second", by.conv("again", z, same=True))


def functional():
    """Return a layer that is used twice, and a connection that leaps over it."""
    inputs = keras.Input((5,))
    shared = norm("shared")
    x = shared(layers.Dense(6, activation="relu", name="a")(inputs))
    z = layers.Add()([x, shared(layers.Dense(6, name="b")(x))])
    return keras.Model(inputs, scores()(norm("last")(z)))


def functional_by_hand(by, x):
    x = by.norm("shared", np.maximum(by.dense("a", x), 0))
    by.norm("last", x + by.norm("shared", by.dense("b", x)))


class Subclassed(keras.Model):
    """Uses a layer twice, in a forward pass that only Python knows."""

    def __init__(self):
        super().__init__()
        self.a, self.bn, self.b, self.scores = (
            layers.Dense(6, name="a"),
            norm("bn"),
            layers.Dense(6, name="b"),
            scores(),
        )

    def call(self, x, training=None):
        x = self.bn(self.a(x), training=training)
        return self.scores(self.bn(self.b(x), training=training))


def subclassed_by_hand(by, x):
    by.norm("bn", by.dense("b", by.norm("bn", by.dense("a", x))))


def nested():
    inner = keras.Sequential([keras.Input((5,)), layers.Dense(6, name="a"), norm("bn")], name="inner")
    image = keras.Input((5,))
    outer = keras.Model(image, layers.ReLU()(inner(image)), name="outer")
    inputs = keras.Input((5,))
    return keras.Model(inputs, scores()(norm("last")(outer(inputs))))


def nested_by_hand(by, x):
    by.norm("last", np.maximum(by.norm("bn", by.dense("a", x), site="outer/inner/bn"), 0))


def towers():
    image = keras.Input((5,))
    tower = keras.Model(image, norm("bn")(layers.Dense(6, name="a")(image)), name="tower")
    inputs = keras.Input((5,))
    both = layers.Add()([tower(inputs), tower(layers.Rescaling(3.0, offset=1.0)(inputs))])
    return keras.Model(inputs, scores()(norm("last")(both)))


def towers_by_hand(by, x):
    one, other = (by.norm("bn", by.dense("a", z), site="tower/bn") for z in (x, 3.0 * x + 1.0))
    by.norm("last", one + other)


def time_distributed():
    inputs = keras.Input((3, 4))
    x = layers.TimeDistributed(norm("bn"), name="time")(inputs)
    return keras.Model(inputs, scores()(layers.GlobalAveragePooling1D()(x)))


def time_distributed_by_hand(by, x):
    # Keras 3 calls the layer for every time step, Keras 2 once for all
    for part in [x] if LEGACY else np.swapaxes(x, 0, 1):
        by.norm("bn", part, site="time/bn")


def masked():
    inputs = keras.Input((6, 3))
    x = norm("bn")(layers.Masking()(inputs))
    return keras.Model(inputs, scores()(layers.GlobalAveragePooling1D()(x)))


def masked_by_hand(by, x):
    by.norm("bn", x, mask=x.any(-1))


class Doubling(layers.BatchNormalization):
    """A user's own batch norm."""

    def call(self, inputs, training=None, mask=None):
        return super().call(2.0 * inputs, training=training, mask=mask)


def own_class():
    inputs = keras.Input((5,))
    return keras.Model(inputs, scores()(Doubling(momentum=MOMENTUM, name="bn")(layers.Dense(6, name="a")(inputs))))


def own_class_by_hand(by, x):
    by.norm("bn", 2.0 * by.dense("a", x))


def frozen():
    inputs = keras.Input((5,))
    x = norm("still", trainable=False, moving_mean_initializer=keras.initializers.Constant(0.5))(inputs)
    return keras.Model(inputs, scores()(norm("bn")(layers.Dense(6, name="a")(x))))


def frozen_by_hand(by, x):
    by.norm("bn", by.dense("a", by.frozen("still", x)))


@dataclass(frozen=True)
class Net:
    build: Callable[[], Any]
    by_hand: Callable[[ByHand, Any], None]
    shape: tuple[int, ...] = (5,)

    def data(self):
        x, y = data(SIZE * STEPS, shape=self.shape)
        if self.build is masked:
            x[:, -MASKED:] = 0.0
        return x, y


NETS = {
    "sequential": Net(sequential, sequential_by_hand, (6, 6, 2)),
    "functional": Net(functional, functional_by_hand),
    "subclassed": Net(Subclassed, subclassed_by_hand),
    "nested": Net(nested, nested_by_hand),
    "towers": Net(towers, towers_by_hand),
    "time_distributed": Net(time_distributed, time_distributed_by_hand, (3, 4)),
    "masked": Net(masked, masked_by_hand, (6, 3)),
    "own_class": Net(own_class, own_class_by_hand),
    "frozen": Net(frozen, frozen_by_hand),
}


def still(build, policy="float32", **arguments):
    """Return a model whose weights training does not move."""
    seed(1)
    with dtype_policy(policy):
        model = build()
    model.compile(
        optimizer=keras.optimizers.SGD(0.0),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
        **arguments,
    )
    return model


def check(net, model, snapshots, batches, policy="float32"):
    """Compare snapshots, of every step or of every second, with the moments by hand of the batches they are of."""
    assert snapshots
    for snapshot in snapshots:
        by = ByHand(model)
        net.by_hand(by, batches[snapshot.step - 1].astype("float64"))
        expected = sorted(by.sites())
        calls = sorted(snapshot.calls, key=lambda call: str(call.site))
        assert [str(call.site) for call in calls] == [site for site, *_ in expected]
        for call, (_, mean, var, count) in zip(calls, expected, strict=True):
            assert call.batch.count == count
            close(call.batch, mean, var, TOLERANCE[policy])


def close(batch, mean, var, tolerance):
    square = np.square(mean) + var
    if batch.source == "recovered":
        # solved from the moving average, which starts at 1: rounding grows by the weight of the old value
        square, tolerance = square + 1.0, tolerance / (1.0 - MOMENTUM)
    assert_allclose((batch.mean - mean) / np.sqrt(square), 0.0, atol=tolerance)
    assert_allclose((batch.var - var) / square, 0.0, atol=2 * tolerance)


@pytest.mark.parametrize("arguments", modes())
@pytest.mark.parametrize("name", NETS)
def test_moments_of_every_call_site(name, arguments):
    net = NETS[name]
    x, y = net.data()
    model = still(net.build, **arguments)
    callback, watch = faked(experiments=False)
    model.fit(x, y, batch_size=SIZE, shuffle=False, verbose=0, callbacks=[callback])
    assert not watch.faults
    assert [s.step for s in watch.snapshots] == ([2, 3] if "steps_per_execution" in arguments else [1, 2, 3])
    check(net, model, watch.snapshots, np.split(x, STEPS), arguments.get("policy", "float32"))
    for call in watch.snapshots[-1].calls:
        layer = next(layer for layer in model._flatten_layers() if layer.name == call.site.layer.rpartition("/")[2])
        assert call.spec.kind == type(layer).__name__
        assert_array_equal(call.running.mean, to_numpy(layer.moving_mean))
        assert_array_equal(call.running.var, to_numpy(layer.moving_variance))
        sites = sum(other.site.layer == call.site.layer for other in watch.snapshots[-1].calls)
        assert call.running.updates == STEPS * sites


def arrays(x, y):
    return {"x": x, "y": y, "batch_size": SIZE}


def generator(x, y):
    # Keras 3.4 draws ahead on JAX, and warns where nothing is left
    pairs = cycle(zip(np.split(x, STEPS), np.split(y, STEPS), strict=True))
    return {"x": (pair for pair in pairs), "steps_per_epoch": STEPS}


def dataset(x, y):
    return {"x": Batches(x, y, SIZE)}


def tf_data(x, y):
    import tensorflow as tf

    return {"x": tf.data.Dataset.from_tensor_slices((x, y)).batch(SIZE)}


def data_loader(x, y):
    import torch

    pairs = torch.utils.data.TensorDataset(torch.from_numpy(x), torch.from_numpy(y))
    return {"x": torch.utils.data.DataLoader(pairs, batch_size=SIZE)}


@pytest.mark.parametrize(
    "form",
    [
        arrays,
        pytest.param(
            generator,
            marks=pytest.mark.skipif(
                BACKEND == "jax" and VERSION < (3, 5), reason="Keras 3.4 on JAX loses the first batch of a generator"
            ),
        ),
        dataset,
        pytest.param(tf_data, marks=pytest.mark.skipif(not TENSORFLOW, reason="TensorFlow is not installed")),
        pytest.param(data_loader, marks=pytest.mark.skipif(not TORCH, reason="PyTorch is not installed")),
    ],
)
def test_training_data_of_every_form(form):
    """With the experiments on, so that batches of the training are kept as well."""
    net = NETS["functional"]
    x, y = net.data()
    model = still(net.build)
    callback, watch = faked()
    kept = []
    watch.on_experiment = lambda lab, final: kept.extend(lab.examples("training", SIZE * STEPS))
    model.fit(**form(x, y), shuffle=False, verbose=0, callbacks=[callback])
    assert not watch.faults
    check(net, model, watch.snapshots, np.split(x, STEPS))
    assert_array_equal(np.concatenate([to_numpy(batch.inputs) for batch in kept[:STEPS]]), x)
    assert_array_equal(np.concatenate([batch.labels for batch in kept[:STEPS]]), y)


@pytest.mark.parametrize("name", ["functional", "subclassed"])
def test_train_on_batch(name):
    from bnwatch.keras.loop import LoopWatch

    net = NETS[name]
    x, y = net.data()
    model = still(net.build)
    fake = FakeWatch()
    with LoopWatch(model, fake) as watching:
        for batch, labels in zip(np.split(x, STEPS), np.split(y, STEPS), strict=True):
            model.train_on_batch(batch, labels)
            watching.step()
    assert not fake.faults
    assert [s.step for s in fake.snapshots] == [1, 2, 3]
    check(net, model, fake.snapshots, np.split(x, STEPS))


loads_shared_layers = pytest.mark.skipif(OLDEST, reason="Keras 3.4 cannot load a model that shares a layer")


@loads_shared_layers
def test_several_fits_a_loaded_model_and_an_initial_epoch(tmp_path):
    net = NETS["functional"]
    x, y = net.data()
    model = still(net.build)
    callback, watch = faked(experiments=False)
    options = {"batch_size": SIZE, "shuffle": False, "verbose": 0, "callbacks": [callback]}
    model.fit(x, y, **options)
    model.fit(x, y, initial_epoch=1, epochs=2, **options)
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    loaded.fit(x, y, initial_epoch=2, epochs=3, **options)
    assert not watch.faults
    assert [(s.step, s.epoch) for s in watch.snapshots] == [(n + 1, n // STEPS) for n in range(3 * STEPS)]
    check(net, loaded, watch.snapshots, np.split(x, STEPS) * 3)
    assert [s.calls[0].running.updates for s in watch.snapshots] == [2 * n for n in range(1, 3 * STEPS + 1)]


def moving(*, ema=False):
    """Return a model that trains, its optimizer also keeping an average of the weights where that is asked for."""
    seed(1)
    model = functional()
    averaged = {"use_ema": True, "ema_momentum": 0.5} if ema else {}
    model.compile(
        optimizer=keras.optimizers.Adam(0.01, **averaged),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    )
    return model


def usual_callbacks(folder):
    found = [
        keras.callbacks.ModelCheckpoint(str(folder / "best.keras"), monitor="loss", save_best_only=True),
        keras.callbacks.EarlyStopping(monitor="loss", mode="max", patience=0, restore_best_weights=True),
    ]
    # that of Keras 3 writes with TensorFlow on every backend
    return [*found, keras.callbacks.TensorBoard(str(folder / "log"))] if TENSORFLOW else found


def swap(folder):
    return [keras.callbacks.SwapEMAWeights(swap_on_epoch=True)]


@pytest.mark.parametrize(
    "others",
    [
        pytest.param(usual_callbacks, marks=loads_shared_layers),
        pytest.param(swap, marks=pytest.mark.skipif(LEGACY, reason="Keras 2 has no SwapEMAWeights")),
    ],
)
def test_beside_other_callbacks(others, tmp_path):
    x, y = NETS["functional"].data()

    def train(folder, callbacks):
        folder.mkdir()
        model = moving(ema=others is swap)
        history = model.fit(
            *(x, y), batch_size=SIZE, epochs=4, verbose=0, validation_data=(x, y), callbacks=callbacks(others(folder))
        ).history
        return model, history, [keras.models.load_model(file).get_weights() for file in folder.glob("*.keras")]

    watch = quiet_watch(every=1)
    plain, history, files = train(tmp_path / "plain", list)
    watched, watched_history, watched_files = train(
        tmp_path / "watched", lambda others: [others[0], watch, *others[1:]]
    )
    assert watch.watch.signals.faults == []
    assert watch.report().steps == STEPS * len(history["loss"])
    assert len(history["loss"]) == (2 if others is usual_callbacks else 4)
    assert watched_history == history
    assert state(watched) == state(plain)
    assert [[w.tobytes() for w in file] for file in watched_files] == [[w.tobytes() for w in file] for file in files]
    assert len(files) == (1 if others is usual_callbacks else 0)


def test_training_resumes_from_a_backup(tmp_path):
    class Killed(keras.callbacks.Callback):
        def on_epoch_begin(self, epoch, logs=None):
            if epoch == 2:
                raise KeyboardInterrupt

    x, y = NETS["functional"].data()

    def train(folder, *watches):
        for killer in ([Killed()], []):
            model = moving()
            backup = keras.callbacks.BackupAndRestore(str(folder))
            options = {"batch_size": SIZE, "epochs": 3, "shuffle": False, "verbose": 0}
            try:
                model.fit(x, y, callbacks=[*watches, backup, *killer], **options)
            except KeyboardInterrupt:
                assert killer
        return state(model)

    callback, watch = faked(experiments=False)
    assert train(tmp_path / "watched", callback) == train(tmp_path / "plain")
    assert not watch.faults
    assert [(s.step, s.epoch) for s in watch.snapshots] == [(n + 1, n // STEPS) for n in range(3 * STEPS)]
