"""What is about PyTorch alone: references in place of variables, recomputation, modules, several processes."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
import threading
from collections import Counter

import keras
import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose, assert_array_equal
from torch.utils._python_dispatch import TorchDispatchMode

from bnwatch.keras import BatchNormWatch, laboratory, watch
from bnwatch.keras.backends import backend_of
from bnwatch.keras.backends import torch as backend
from bnwatch.keras.experiments import Given
from bnwatch.keras.keep import HostKeeper
from bnwatch.keras.loop import LoopWatch
from tests.adapters.keras_models import CLASSES, ByHand, FakeWatch, compiled, data, faked, make, quiet_watch, state

layers = keras.layers


def shared_net():
    inputs = keras.Input((5,))
    shared = layers.BatchNormalization(momentum=0.9, name="shared")
    x = shared(layers.Dense(6, activation="relu", name="a")(inputs))
    x = shared(layers.Dense(6, name="b")(layers.Dropout(0.2, name="dropout")(x)))
    return keras.Model(inputs, layers.Dense(CLASSES, name="scores")(x))


# what is captured


def test_a_negative_variance_arrives_as_it_is():
    """E[x²] - E[x]² in float32 is what the layer normalizes with, rounding and all."""
    x = np.random.default_rng(0).normal(3000.0, 0.1, (64, 8)).astype("float32")
    model = compiled(keras.Sequential([keras.Input((8,)), layers.BatchNormalization(name="bn"), layers.Dense(CLASSES)]))
    callback, fake = faked(experiments=False)
    model.fit(x, np.zeros(64, int), batch_size=64, shuffle=False, verbose=0, callbacks=[callback])
    (call,) = fake.snapshots[0].calls
    tensor = torch.from_numpy(x)
    own = tensor.square().mean(0) - tensor.mean(0).square()
    assert call.batch.var.min() < 0.0
    assert_array_equal(call.batch.var, own.numpy())


def test_a_block_computed_again_is_no_call_site_but_moves_the_running_statistics():
    def net():
        with keras.RematScope(mode="full"):
            bn = layers.BatchNormalization(momentum=0.9, name="bn")
        return keras.Sequential([keras.Input((5,)), layers.Dense(6), bn, layers.Dense(CLASSES)])

    x, y = data(48, shape=(5,))
    model = make(net)
    callback, fake = faked(experiments=False)
    model.fit(x, y, batch_size=16, verbose=0, callbacks=[callback])
    assert not fake.faults
    assert [[str(call.site) for call in s.calls] for s in fake.snapshots] == [["bn#0"]] * 3
    assert [s.calls[0].running.updates for s in fake.snapshots] == [2, 4, 6]
    first = fake.snapshots[0].calls[0]
    assert_allclose(first.running.mean, (1.0 - 0.9**2) * first.batch.mean, rtol=1e-4)


def test_a_call_that_only_asks_for_shapes_is_none():
    """What reads its input cannot be built on the meta device, so Keras calls it with numbers of its own."""

    class Unbuilt(keras.Model):
        def __init__(self):
            super().__init__()
            self.inner, self.bn = layers.Dense(6), layers.BatchNormalization(name="bn")
            self.seen = []

        def call(self, x, training=None):
            self.seen.append((len(x), float(keras.ops.sum(x))))
            return self.bn(self.inner(x), training=training)

    x = torch.from_numpy(data(16, shape=(5,))[0])
    model, fake = Unbuilt(), FakeWatch()
    with LoopWatch(model, fake) as watching:
        model(x, training=True)
        watching.step()
    assert not fake.faults
    assert len(model.seen) > 1
    (call,) = fake.snapshots[0].calls
    assert (str(call.site), call.batch.count, call.running.updates) == ("bn#0", 16, 1)


def test_everything_is_read_at_once_for_each_data_type(monkeypatch):
    tensors = [
        torch.tensor([1.0, 2.0]),
        torch.tensor(2**40 + 1),
        torch.tensor([[3.0], [4.0]], requires_grad=True),
        torch.tensor([0.5], dtype=torch.bfloat16),
        torch.tensor([1.0 + 2.0**-40], dtype=torch.float64),
    ]
    copies = []
    cpu = torch.Tensor.cpu
    monkeypatch.setattr(torch.Tensor, "cpu", lambda self: copies.append(self.dtype) or cpu(self))
    found = backend.on_host(tensors)
    assert len(copies) == 4
    assert [array.tolist() for array in found] == [[1.0, 2.0], 2**40 + 1, [[3.0], [4.0]], [0.5], [1.0 + 2.0**-40]]


def test_a_batch_is_kept_as_it_was_and_only_if_it_is_of_arrays():
    keeper = HostKeeper(FakeWatch().guard, backend.copied)
    x, y = torch.zeros(4, 2), np.zeros(4)
    for batch, wanted in (([x, y], False), ([x, y], True), (({"text": ["a", "b"]}, y), True)):
        keeper.want(wanted=wanted)
        keeper.note(batch)
        keeper.collect()
    x += 1.0
    y += 1.0
    (kept,) = keeper.kept.batches("training", 100)
    assert (kept.inputs.tolist(), kept.labels.tolist()) == ([[0.0, 0.0]] * 4, [0] * 4)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # torch.compile asks all tensors
def test_a_compiled_step(monkeypatch):
    """torch.compile traces the steps of Keras in many pieces; of few calls here, and without its C++ compiler."""
    import torch._dynamo

    monkeypatch.setattr(torch._dynamo.config, "recompile_limit", 1)
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    x, y = data(48, shape=(5,))
    model = make(shared_net, jit_compile=True)
    callback, fake = faked(experiments=False)
    first = ByHand(model)
    model.fit(x, y, batch_size=16, shuffle=False, verbose=0, callbacks=[callback])
    torch._dynamo.reset()
    assert not fake.faults
    assert [[str(call.site) for call in s.calls] for s in fake.snapshots] == [["shared#0", "shared#1"]] * 3
    assert [s.calls[0].running.updates for s in fake.snapshots] == [2, 4, 6]
    first.norm("shared", np.maximum(first.dense("a", x[:16].astype("float64")), 0.0))
    assert_allclose(fake.snapshots[0].calls[0].batch.mean, first.calls[0][1], atol=1e-5)
    assert_allclose(fake.snapshots[0].calls[0].batch.var, first.calls[0][2], atol=1e-5)


class Operations(TorchDispatchMode):
    """Notes every operation of PyTorch, and so everything a device is asked for."""

    def __init__(self):
        super().__init__()
        self.seen = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen[str(func)] += 1
        return func(*args, **kwargs or {})


def test_no_operation_on_a_step_that_is_not_sampled(monkeypatch):
    """Neither in the callback nor within the step, where a reference is all that is taken."""
    arrays = []

    def noted(own):
        def read(*args, **kwargs):
            # Keras reads the logs of a batch in a thread of its own
            if threading.current_thread() is threading.main_thread():
                arrays.append(own)
            return own(*args, **kwargs)

        return read

    for name in ("numpy", "cpu", "item", "__array__", "tolist"):
        monkeypatch.setattr(torch.Tensor, name, noted(getattr(torch.Tensor, name)))

    class Steps(keras.callbacks.Callback):
        async_safe = True

        def __init__(self, operations):
            super().__init__()
            self.operations, self.steps = operations, []

        def on_train_batch_begin(self, batch, logs=None):
            self.steps.append((Counter(self.operations.seen), len(arrays)))

    def train(*callbacks):
        model = make(shared_net)
        x, y = data(22 * 16, shape=(5,))
        with Operations() as operations:
            steps = Steps(operations)
            model.fit(x, y, batch_size=16, verbose=0, callbacks=[*callbacks, steps])
        pairs = zip(steps.steps, steps.steps[1:], strict=False)
        return [(now - before, read - had) for (before, had), (now, read) in pairs]

    callback, fake = faked(every=7)
    plain, watched = train(), train(callback)
    assert not fake.faults
    reference = str(torch.ops.aten.detach.default)
    for batch, ((own, reads), (all_of_it, all_reads)) in enumerate(zip(plain, watched, strict=True)):
        added = all_of_it - own
        # the batch of the sampled step is kept in it, and its sample is taken when the next step begins
        if batch % 7 < 6:
            assert set(added) == {reference}, batch
            assert added[reference] == 4
            assert reads == all_reads
        else:
            assert all_reads > reads


# nothing is changed


class Shuffled(torch.utils.data.Dataset):
    def __init__(self, x, y):
        self.x, self.y = x, y

    def __len__(self):
        return len(self.y)

    def __getitem__(self, n):
        return self.x[n], self.y[n]


@pytest.mark.parametrize("accumulate", [None, 3])
def test_a_shuffled_data_loader_and_accumulated_gradients(accumulate):
    """The loader draws from PyTorch's global generator, which the experiments must leave where it was."""

    def train(*callbacks):
        keras.utils.set_random_seed(3)
        model = shared_net()
        optimizer = keras.optimizers.Adam(0.01, gradient_accumulation_steps=accumulate)
        model.compile(optimizer, keras.losses.SparseCategoricalCrossentropy(from_logits=True), metrics=["accuracy"])
        x, y = data(104, shape=(5,))
        loader = torch.utils.data.DataLoader(Shuffled(x, y), batch_size=16, shuffle=True)
        history = model.fit(
            loader, epochs=3, shuffle=False, verbose=0, validation_data=(x, y), callbacks=list(callbacks)
        ).history
        return state(model), history, torch.get_rng_state().tolist()

    watching = quiet_watch(every=3)
    assert train(watching) == train()
    assert watching.watch.signals.faults == []
    assert watching.watch.signals.looks
    assert watching.watch.signals.cells is not None
    assert watching.report().steps == 21


class Noisy(layers.Layer):
    """Draws from every generator that there is, in evaluation as well, and fails where it is told to."""

    def __init__(self, **arguments):
        super().__init__(**arguments)
        self.own, self.fails = keras.random.SeedGenerator(1), False
        self.module = torch.nn.Sequential(torch.nn.Linear(6, 6), torch.nn.BatchNorm1d(6), torch.nn.Dropout(0.5))

    def call(self, x):
        shape = tuple(x.shape)
        noise = keras.random.normal(shape, seed=self.own) + keras.random.normal(shape) + torch.randn(shape)
        x = self.module(x, training=True) + 0.01 * noise
        if self.fails:
            raise ZeroDivisionError
        return x


@pytest.mark.parametrize("fails", [False, True])
def test_an_experiment_leaves_state_modes_gradients_and_generators(fails):
    keras.utils.set_random_seed(4)
    noisy = Noisy(name="noisy")
    bn = layers.BatchNormalization(name="bn")
    model = compiled(keras.Sequential([keras.Input((5,)), layers.Dense(6), bn, noisy, layers.Dense(CLASSES)]))
    x, y = data(48, shape=(5,))
    model.fit(x, y, batch_size=16, verbose=0)
    model.train()
    noisy.module.eval()
    noisy.fails = fails
    keras.random.normal((1,))  # the generator that layers without a seed share exists

    def everything():
        modules = list(model.modules())
        shared = keras.src.random.seed_generator.global_seed_generator().state
        return (
            state(model),
            [shared.numpy().tobytes(), torch.get_rng_state().tolist(), np.random.get_state()[1].tolist()],  # noqa: NPY002
            [module.training for module in modules],
            [buffer.numpy().tobytes() for buffer in model.buffers()],
            [None if p.grad is None else (id(p.grad), p.grad.numpy().tobytes()) for p in model.parameters()],
            [v.numpy().tobytes() for metric in model.metrics for v in metric.variables],
            [p.requires_grad for p in model.parameters()],
        )

    before = everything()
    lab = laboratory.KerasLaboratory(backend_of(model), {"training": Given((x, y), "training", 16)})
    (batch,) = lab.examples("training", 16)
    for run in (lambda: lab.outputs(batch, "batch"), lambda: lab.look(batch, gradients=True)):
        if fails:
            with pytest.raises(laboratory.ExperimentNotPossibleError, match="ZeroDivisionError"):
                run()
        else:
            run()
        assert everything() == before
    assert any(grad is not None for grad in before[4])


def test_a_gradient_is_that_of_pytorch_and_unscaled():
    """Also under a half-precision policy, whose optimizer scales the loss."""
    keras.utils.set_random_seed(5)
    with_policy = {"dtype": "mixed_float16"}
    inputs = keras.Input((5,))
    hidden = layers.Dense(6, name="hidden", **with_policy)(inputs)
    hidden = layers.BatchNormalization(name="bn", **with_policy)(hidden)
    layers.Dense(3, name="aside")(hidden)
    model = keras.Model(inputs, layers.Dense(CLASSES, name="scores")(hidden))
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD(0.0), initial_scale=1024.0), loss)
    x, y = data(64, shape=(5,))
    lab = laboratory.KerasLaboratory(backend_of(model), {"training": Given((x, y), "training", 64)})
    looks = {found.path: found for found in lab.look(lab.examples("training", 64)[0], gradients=True).layers}
    features = keras.Model(inputs, hidden)(x, training=True).detach().float().requires_grad_(False)
    kernel = model.get_layer("scores").kernel.value.detach().clone().requires_grad_()
    scores = features @ kernel + model.get_layer("scores").bias.value.detach()
    torch.nn.functional.cross_entropy(scores, torch.from_numpy(y)).backward()
    assert looks["scores"].gradient == pytest.approx(float(kernel.grad.abs().max()), rel=0.05)


# failures inside


def fitted(*callbacks, build=shared_net, examples=96):
    model = make(build)
    x, y = data(examples, shape=(5,))
    model.fit(x, y, verbose=0, callbacks=list(callbacks), validation_data=(x[:32], y[:32]))
    return model


@pytest.fixture(scope="module")
def unwatched():
    return state(fitted())


@pytest.mark.parametrize("name", ["copied", "recomputing", "on_host"])
def test_training_survives_a_failure(name, monkeypatch, unwatched):
    def broken(*_, **__):
        msg = "broken on purpose"
        raise RuntimeError(msg)

    monkeypatch.setattr(backend, name, broken)
    watching = quiet_watch(every=1)
    model = fitted(watching)
    monkeypatch.undo()
    assert state(model) == unwatched
    assert any("broken on purpose" in fault for fault in watching.watch.signals.faults)
    assert "train_step" not in model.__dict__
    assert "_moments" not in model.get_layer("shared").__dict__


# modules of PyTorch


def test_batch_norm_of_pytorch_is_named_with_the_reason():
    module = torch.nn.Sequential(torch.nn.Linear(5, 6), torch.nn.BatchNorm1d(6))
    wrapped = keras.layers.TorchModuleWrapper(module, name="wrapped")
    alone = keras.layers.TorchModuleWrapper(torch.nn.BatchNorm1d(6), name="alone")
    model = compiled(keras.Sequential([wrapped, layers.BatchNormalization(name="bn"), alone, layers.Dense(CLASSES)]))
    x, y = data(32, shape=(5,))
    callback, fake = faked(experiments=False)
    model.fit(x, y, verbose=0, callbacks=[callback])
    assert not fake.faults
    assert [spec.path for spec in fake.opened[0].layers] == ["bn"]
    assert list(fake.opened[0].unsupported) == ["wrapped/1", "alone/BatchNorm1d"]
    assert "torch.nn.BatchNorm1d normalizes inside of PyTorch" in fake.opened[0].unsupported["wrapped/1"]


# loops by hand


def loop(model, watching, x, y, *, forward=None):
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.01)
    for start in range(0, len(x), 16):
        inputs, labels = torch.from_numpy(x[start : start + 16]), torch.from_numpy(y[start : start + 16])
        optimizer.zero_grad()
        scores = (forward or model)(inputs, training=True)
        loss = torch.nn.functional.cross_entropy(scores, labels)
        loss.backward()
        gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
        optimizer.step()
        accuracy = (scores.argmax(1) == labels).float().mean()
        watching.step(accuracy=accuracy, loss=loss, examples=len(labels), batch=(inputs, labels))
        assert all(map(torch.equal, gradients, [p.grad for p in model.parameters() if p.grad is not None]))


def built(build):
    keras.utils.set_random_seed(2)
    return build()


def test_a_loop_of_pytorch():
    x, y = data(144, shape=(5,))
    model, fake = built(shared_net), FakeWatch()
    with LoopWatch(model, fake) as watching:
        loop(model, watching, x, y)
    assert not fake.faults
    assert [s.step for s in fake.snapshots] == list(range(1, 10))
    for snapshot in fake.snapshots:
        assert [str(call.site) for call in snapshot.calls] == ["shared#0", "shared#1"]
        assert [call.running.updates for call in snapshot.calls] == [2 * snapshot.step] * 2
        assert [call.batch.count for call in snapshot.calls] == [16, 16]
    assert_array_equal(fake.snapshots[-1].calls[0].running.mean, model.get_layer("shared").moving_mean.numpy())
    assert "_moments" not in model.get_layer("shared").__dict__


def test_a_loop_is_that_without_a_watch():
    x, y = data(96, shape=(5,))

    def run(watched):
        model = built(shared_net)
        with watch(model, None, on_diagnosis="log", every=1, experiments="auto" if watched else False) as watching:
            watching.watch.enabled = watched
            loop(model, watching, x, y)
            watching.evaluation(accuracy=0.5, examples=96, classes=CLASSES, data=(x, y))
        return [v.numpy().tobytes() for v in model.variables], torch.get_rng_state().tolist(), watching

    *watched, watching = run(watched=True)
    assert watched == list(run(watched=False)[:2])
    assert watching.watch.signals.faults == []
    assert watching.watch.signals.cells.evaluation["running"].examples == 96


# several processes


def test_only_the_first_of_several_processes_reports(monkeypatch, tmp_path, capsys):
    def far_apart():
        inputs, shared = keras.Input((5,)), layers.BatchNormalization(name="shared")
        x = shared(layers.Dense(8, activation="relu")(inputs))
        x = shared(layers.Dense(8, bias_initializer=keras.initializers.Constant(30.0))(x))
        return keras.Model(inputs, layers.Dense(CLASSES)(x))

    def run(rank, name):
        monkeypatch.setattr(backend.TorchBackend, "speaks", rank == 0)
        told = []
        watching = BatchNormWatch(tmp_path / name, on_diagnosis=told.append, every=1)
        fitted(watching, build=far_apart, examples=640)
        assert watching.watch.signals.faults == []
        assert watching.report().samples == 20
        assert watching.diagnoses
        return told, capsys.readouterr().err

    told, words = run(0, "first")
    assert told
    assert "bnwatch" in words
    assert list((tmp_path / "first").iterdir())
    assert run(1, "second") == ([], "")
    assert not (tmp_path / "second").exists()


def replica(rank, folder):
    """Train as one of two processes, and leave what was seen in a file."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    x, y = data(64, shape=(5,))
    x, y = x[rank::2] + 10.0 * rank, y[rank::2]
    keras.utils.set_random_seed(2)
    bn = layers.BatchNormalization(name="bn")
    model = keras.Sequential([keras.Input((5,)), bn, layers.Dense(CLASSES)])
    both = torch.nn.parallel.DistributedDataParallel(model)
    means = []
    # either is understood
    with watch((model, both)[rank], os.path.join(folder, f"log{rank}"), every=1) as watching:  # noqa: PTH118
        observe = watching.watch.observe
        watching.watch.observe = lambda s: (means.extend(call.batch.mean.tolist() for call in s.calls), observe(s))
        loop(model, watching, x, y, forward=both)
    found = {
        "faults": watching.watch.signals.faults,
        "means": means,
        "expected": [x[start : start + 16].astype("float64").mean(0).tolist() for start in (0, 16)],
        "weights": [v.numpy().tolist() for v in model.trainable_variables],
    }
    with open(os.path.join(folder, f"found{rank}"), "w", encoding="utf-8") as file:  # noqa: PTH118, PTH123
        json.dump(found, file)
    torch.distributed.destroy_process_group()


def test_each_of_two_processes_sees_its_own_replica(tmp_path):
    processes = [
        subprocess.Popen(
            [
                sys.executable,
                "-c",
                f"from tests.adapters import test_keras_torch as t; t.replica({rank}, {str(tmp_path)!r})",
            ],
            env={**os.environ, "GLOO_SOCKET_IFNAME": "lo", "PYTHONPATH": os.pathsep.join(sys.path)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in (0, 1)
    ]
    try:
        words = [process.communicate(timeout=240)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], words
    first, second = (json.loads((tmp_path / f"found{rank}").read_text()) for rank in (0, 1))
    for found in (first, second):
        assert found["faults"] == []
        assert_allclose(found["means"], found["expected"], rtol=1e-5)
    assert first["weights"] == second["weights"]
    assert np.min(np.array(second["means"]) - np.array(first["means"])) > 5.0
    assert "bnwatch" in words[0]
    assert "bnwatch" not in words[1]
    assert list((tmp_path / "log0").iterdir())
    assert not (tmp_path / "log1").exists()
