"""The checks of `gpu_check.py`, which runs this file, for Chainer on CuPy 12 or newer; with ``--cpu`` on NumPy."""

from __future__ import annotations

import argparse
import contextlib
import itertools
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from bench_overhead_chainer import Plain  # first: it makes Chainer importable
from chainer import backend, training
from chainer.backends import cuda
from chainer.training import extensions
from gpu_report import Checks, Inconclusive, Skip

import bnwatch.chainer
from tests.adapters.chainer_models import CNN, MLP, F, L, chainer, data, dataset, state_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from bnwatch.records import StepSnapshot

MODELS: dict[str, Callable[[], Any]] = {
    "MLP": MLP,
    "MLP with one link used twice": lambda: MLP(shared=True),
    "CNN": CNN,
    "MLP with batch renormalization": lambda: MLP(bn=L.BatchRenormalization),
}
STEPS, BATCH = 24, 32


class Subject:
    """A model on the device, its optimizer and its data."""

    def __init__(self, build: Callable[[], Any], device: Any, *, dtype: str = "float32") -> None:
        np.random.seed(3)  # noqa: NPY002 - the generator that Chainer draws from
        self.device = device
        device.use()
        if device.xp is not np:
            device.xp.random.seed(3)
        kind = np.dtype("float16" if dtype == "mixed16" else dtype)
        with chainer.using_config("dtype", chainer.mixed16 if dtype == "mixed16" else kind):
            self.model = build()
            self.model(data(8)[0].astype(kind))  # makes what is made at the first call, on the host
        self.model.to_device(device)
        self.optimizer = chainer.optimizers.MomentumSGD(0.01).setup(self.model)
        x, t = data()
        self.x, self.t = device.send(x.astype(kind)), device.send(t)

    def step(self, number: int, watching: Any = None) -> Any:
        """Train one step and return its loss."""
        start = number * BATCH % len(self.t)
        x, t = self.x[start : start + BATCH], self.t[start : start + BATCH]
        scores = self.model(x)
        loss = F.softmax_cross_entropy(scores, t)
        self.model.cleargrads()
        loss.backward()
        self.optimizer.update()
        accuracy = F.accuracy(scores, t)
        if watching is not None:
            watching.step(accuracy=accuracy, loss=loss)
        return loss

    def watch(self, **arguments: Any) -> Any:
        """Return a watch that writes no files and warns nobody."""
        return bnwatch.chainer.watch(self.model, None, on_diagnosis="log", **arguments)

    def state(self) -> dict[str, bytes]:
        """Return all that training moves, as bytes; of CuPy's generator what it draws next."""
        state = state_of(self.model, self.optimizer)
        if self.device.xp is not np:
            state["device"] = self.device.xp.random.random_sample(4).get().tobytes()
        return state


def sound(watching: Any) -> None:
    """Check that the watch has not disabled itself."""
    faults = [diagnosis.message for diagnosis in watching.diagnoses if diagnosis.rule == "BN903"]
    assert not faults, faults


def told(watching: Any) -> list[StepSnapshot]:
    """Return the list that every sampled step of the watch will be put into."""
    steps: list[StepSnapshot] = []
    observe = watching.watch.observe
    watching.watch.observe = lambda snapshot: (steps.append(snapshot), observe(snapshot))
    return steps


class Inputs(chainer.LinkHook):
    """Keeps copies of what enters batch normalization, with the same strides: so it is added up in the same order."""

    def __init__(self) -> None:
        self.seen: list[tuple[Any, Any]] = []

    def forward_preprocess(self, args: Any) -> None:
        """See one call."""
        if isinstance(args.link, L.BatchNormalization):
            self.seen.append((args.link, getattr(args.args[0], "array", args.args[0]).copy(order="K")))


def on_gpu(device: Any) -> None:
    """Skip where there is no GPU."""
    if device.xp is np:
        msg = "needs a GPU"
        raise Skip(msg)


def environment(device: Any) -> str:
    """Say what is checked, and that it computes."""
    said = f"Python {sys.version.split()[0]}, NumPy {np.__version__}, Chainer {chainer.__version__}, {device}"
    assert int(backend.CpuDevice().send((device.xp.arange(4) ** 2).sum())) == 14
    if device.xp is np:
        return said
    cupy = cuda.cupy
    name = cupy.cuda.runtime.getDeviceProperties(device.device.id)["name"].decode()
    versions = f"CuPy {cupy.__version__}, CUDA {cupy.cuda.runtime.runtimeGetVersion()}"
    return f"{said}, {name}, {versions}, driver {cupy.cuda.runtime.driverGetVersion()}, cuDNN {cuda.cudnn_enabled}"


def same_as_cpu(device: Any, build: Callable[[], Any]) -> str:
    """Compare training on the device with training on the host, without a watch."""
    losses = {}
    for place in (backend.CpuDevice(), device):
        subject = Subject(build, place)
        for link in subject.model.links():
            if isinstance(link, MLP):
                link._dropout = 0.0  # noqa: SLF001 - a device draws other random numbers
        losses[place.name] = [float(subject.step(n).array) for n in range(STEPS)]
    host, there = losses["@numpy"], losses[device.name]
    apart = float(np.abs(np.subtract(host, there)).max())
    assert apart < 2e-2, f"losses differ by {apart:.1e}"
    return f"loss {there[0]:.4f} to {there[-1]:.4f}, at most {apart:.1e} from the host"


def statistics(device: Any, build: Callable[[], Any], dtype: str = "float32", cudnn: str = "never") -> str:
    """Compare what is recorded with the device's own mean and variance, and with NumPy in float64."""
    subject = Subject(build, device, dtype=dtype)
    worst, exact, calls = 0.0, True, 0
    with chainer.using_config("use_cudnn", cudnn), subject.watch(every=1, experiments=False) as watching:
        steps = told(watching)
        for number in range(4):
            with Inputs() as inputs:
                subject.step(number, watching)
            assert len(inputs.seen) == len(steps[-1].calls) > 0
            for (link, x), call in zip(inputs.seen, steps[-1].calls, strict=True):
                axis = tuple(link.axis or (0, *range(2, x.ndim)))
                wide = backend.CpuDevice().send(x).astype(np.float64)
                apart = np.abs(call.batch.mean - wide.mean(axis)) / wide.std(axis)
                worst = max(worst, float(apart.max()), float(np.abs(call.batch.var / wide.var(axis) - 1).max()))
                kind = call.batch.mean.dtype
                for found, reduce in ((call.batch.mean, x.mean), (call.batch.var, x.var)):
                    exact &= np.array_equal(found, backend.CpuDevice().send(reduce(axis=axis, dtype=kind)).ravel())
                calls += 1
        sound(watching)
    renormalized = any(isinstance(link, L.BatchRenormalization) for link in subject.model.links())
    allowed = 1e-2 if dtype == "float16" else 1e-3 if renormalized or cudnn == "always" else 1e-5
    assert worst < allowed, f"{worst:.1e} from NumPy in float64"
    assert exact or renormalized or cudnn == "always", "not what the device's own mean and variance give"
    own = "equal" if exact else "not equal, as expected,"
    return f"{calls} calls {own} to the device's own mean and variance to the bit, {worst:.1e} from NumPy in float64"


def through_cudnn(device: Any) -> str:
    """Check the statistics where cuDNN normalizes, which keeps another quantity."""
    on_gpu(device)
    if not cuda.cudnn_enabled:
        msg = "CuPy 12 and newer bring Chainer no cuDNN" if cuda._cupy_major >= 12 else "no cuDNN"  # noqa: SLF001
        raise Skip(msg)
    return statistics(device, CNN, cudnn="always")


def unchanged(device: Any, build: Callable[[], Any]) -> str:
    """Compare a watched loop with two unwatched ones, to the byte."""

    def trained(*, watched: bool) -> dict[str, bytes]:
        subject = Subject(build, device)
        with subject.watch(every=2) if watched else contextlib.nullcontext() as watching:
            for epoch, number in itertools.product(range(3), range(8)):
                subject.step(8 * epoch + number, watching)
                if number == 7:
                    with chainer.using_config("train", False), chainer.no_backprop_mode():
                        accuracy = F.accuracy(subject.model(subject.x), subject.t)
                    if watching is not None:
                        watching.evaluation(accuracy=accuracy, examples=len(subject.t))
        if watching is not None:
            sound(watching)
            assert watching.watch.signals.cells is not None, watching.skipped
        assert not chainer.get_function_hooks()
        return subject.state()

    return _same([trained(watched=watched) for watched in (False, False, True)])


def _same(states: list[dict[str, bytes]]) -> str:
    """Compare the states that two unwatched runs and a watched one end in."""
    plain, again, watched = states
    different = [name for name in plain if plain[name] != watched.get(name)]
    if plain != again:
        msg = "two trainings without the watch already differ"
        raise Inconclusive(msg)
    assert plain == watched, f"the watch changed {', '.join(different)}"
    return f"{len(plain)} arrays and states identical to the byte, with and without"


def in_a_trainer(device: Any, devices: tuple[Any, ...] = ()) -> str:
    """Compare a watched Trainer with two unwatched ones: Evaluator, log and snapshot included."""

    def trained(*, watched: bool) -> dict[str, bytes]:
        subject = Subject(MLP, device)
        classifier = L.Classifier(subject.model)
        optimizer = chainer.optimizers.Adam().setup(classifier)
        iterator = chainer.iterators.SerialIterator(dataset(), BATCH)
        if devices:
            named = {"main": devices[0], "second": devices[1]}
            updater = training.updaters.ParallelUpdater(iterator, optimizer, devices=named)
        else:
            updater = training.updaters.StandardUpdater(iterator, optimizer, device=device)
        with tempfile.TemporaryDirectory() as out:
            trainer = training.Trainer(updater, (3, "epoch"), out=out)
            examples = chainer.iterators.SerialIterator(dataset(200, seed=1), 64, repeat=False, shuffle=False)
            trainer.extend(extensions.Evaluator(examples, classifier, device=device))
            trainer.extend(extensions.LogReport(trigger=(1, "epoch")))
            trainer.extend(extensions.snapshot(filename="last"), trigger=(3, "epoch"))
            watch = bnwatch.chainer.BatchNormWatch(Path(out) / "runs", every=2, on_diagnosis="log")
            if watched:
                trainer.extend(watch)
            trainer.run()
            if watched:
                sound(watch)
                assert watch.report().evaluations == 3
                assert any((Path(out) / "runs").rglob("events.*"))
            chainer.serializers.load_npz(str(Path(out) / "last"), trainer)
            entries = trainer.get_extension("LogReport").log
            log = [{name: value for name, value in entry.items() if name != "elapsed_time"} for entry in entries]
        return state_of(classifier, optimizer) | {"log": repr(log).encode()}

    return _same([trained(watched=watched) for watched in (False, False, True)])


def parallel(device: Any) -> str:
    """Check training on two devices."""
    if device.xp is np:
        return in_a_trainer(device, (device, device))
    if cuda.cupy.cuda.runtime.getDeviceCount() < 2:
        msg = "one GPU only"
        raise Skip(msg)
    return in_a_trainer(device, (device, chainer.get_device("@cupy:1")))


@contextlib.contextmanager
def nothing_waits(*, copies: bool) -> Iterator[list[int]]:
    """Raise where anything waits for the device; copies by Chainer's own function are allowed with ``copies``.

    Yields a list of the sizes that were allocated, and of the copies as negative numbers.
    """
    import cupyx

    sizes: list[int] = []

    class Count(cuda.cupy.cuda.MemoryHook):
        name = "bnwatch-count"

        def malloc_preprocess(self, **asked: Any) -> None:
            sizes.append(asked["size"])

    send = backend.CpuDevice.send_array

    def counted(self: Any, array: Any) -> Any:
        if isinstance(array, np.ndarray):
            return send(self, array)
        with cupyx.allow_synchronize(copies):
            sizes.append(-array.nbytes)
            return send(self, array)

    backend.CpuDevice.send_array = counted
    try:
        with Count(), cupyx.allow_synchronize(False):
            yield sizes
    finally:
        backend.CpuDevice.send_array = send


def quiet_steps(device: Any) -> str:
    """Compare what unsampled steps ask of the device with what unwatched ones ask."""
    on_gpu(device)
    asked = {}
    for watched in (False, True):
        subject = Subject(MLP, device)
        with subject.watch(every=50) if watched else contextlib.nullcontext() as watching:
            for number in range(200):
                subject.step(number, watching)
            with nothing_waits(copies=False) as sizes:
                for number in range(201, 240):
                    subject.step(number, watching)
        asked[watched] = list(sizes)
    assert asked[True] == asked[False], f"{len(asked[True])} allocations, {len(asked[False])} without the watch"
    return f"39 steps: nothing waits for the device, the same {len(asked[True])} allocations with and without"


def one_copy(device: Any) -> str:
    """Count the copies of sampled steps."""
    on_gpu(device)
    subject = Subject(MLP, device)
    with subject.watch(every=1, experiments=False) as watching:
        subject.step(0, watching)
        with nothing_waits(copies=True) as sizes:
            for number in range(1, 11):
                subject.step(number, watching)
        sound(watching)
    copies = [-size for size in sizes if size < 0]
    assert len(copies) == 10, f"{len(copies)} copies in 10 samples"
    return f"10 samples, 10 copies of {copies[0]} bytes, nothing else waits for the device"


def experiments(device: Any) -> str:
    """Check that experiments leave nothing behind, and that recalibration does what NumPy does."""
    subject = Subject(lambda: MLP(shared=True), device)
    model, (x, t) = subject.model, data()
    for number in range(STEPS):
        subject.step(number)
    before = state_of(model, subject.optimizer)
    cells = bnwatch.chainer.crosscheck(model, (x, t), data(200, seed=1), batch_size=BATCH)
    bnwatch.chainer.attribute(model, data(200, seed=1), batch_size=BATCH)
    bnwatch.chainer.localise(model, (x, t), batch_size=BATCH)
    assert state_of(model, subject.optimizer) == before, "an experiment left something behind"
    single = Subject(MLP, device)
    bnwatch.chainer.recalibrate(
        single.model, [single.device.send(x[at : at + BATCH]) for at in range(0, len(x), BATCH)]
    )
    first = single.model.l1
    weights, bias = (backend.CpuDevice().send(part.array).astype(np.float64) for part in (first.W, first.b))
    entering = x.astype(np.float64) @ weights.T + bias
    found = [backend.CpuDevice().send(array) for array in (single.model.bn1.avg_mean, single.model.bn1.avg_var)]
    apart = max(
        float(np.abs(found[0] - entering.mean(0)).max() / entering.std()),
        float(np.abs(found[1] / entering.var(0, ddof=1) - 1).max()),
    )
    assert apart < 1e-4, f"recalibrated statistics are {apart:.1e} from NumPy's"
    measured = {name: cell.accuracy for name, cell in cells.training.items()}
    told_of = ", ".join(f"{name} {accuracy:.3f}" for name, accuracy in measured.items())
    return f"accuracy with {told_of}; all restored; recalibrated to {apart:.1e} of NumPy"


def memory(device: Any) -> str:
    """Check that nothing on the device is held from step to step."""
    on_gpu(device)
    subject, pool, used = Subject(CNN, device), cuda.cupy.get_default_memory_pool(), []
    with subject.watch(every=10) as watching:
        for block in range(6):
            for number in range(50):
                subject.step(50 * block + number, watching)
            used.append(pool.used_bytes())
    assert max(used[2:]) <= used[1] * 1.02, f"used bytes after each 50 steps: {used}"
    return f"{used[-1] / 2**20:.2f} MiB in use after 300 steps, {used[1] / 2**20:.2f} after 100"


def overhead(device: Any, blocks: int = 20, every: int = 50) -> str:
    """Time blocks of steps with and without the watch in turn, waiting for the device after each."""
    if device.xp is np:
        msg = "timed on a GPU only; on the CPU, benchmarks/bench_overhead_chainer.py does it"
        raise Skip(msg)
    subject = Subject(lambda: Plain(20, 400, image=False), device)
    hooks, seconds = chainer.get_function_hooks(), {True: [], False: []}
    with subject.watch(every=every) as watching:
        for number in range(4 * every):
            subject.step(number, watching)
        tap = dict(hooks)
        for block in range(blocks):
            for on in (True, False) if block % 2 else (False, True):
                if not on:
                    hooks.clear()
                begin = time.perf_counter()
                for number in range(every):
                    subject.step(number, watching if on else None)
                device.device.synchronize()
                seconds[on].append(time.perf_counter() - begin)
                hooks.update(tap)
    ratios = np.array(seconds[True]) / np.array(seconds[False]) - 1
    low, middle, high = np.percentile(ratios, [25, 50, 75])
    assert low < 0.03, f"{middle:+.1%} (quartiles {low:+.1%} to {high:+.1%})"
    step = 1e3 * float(np.median(seconds[False])) / every
    return f"step {step:.2f} ms, watched {middle:+.1%} (quartiles {low:+.1%} to {high:+.1%}, {len(ratios)} pairs)"


def no_gpu() -> str | None:
    """Return why Chainer has no GPU; None when it has one."""
    if not cuda.available:
        return f"Chainer cannot use CuPy: {' '.join(str(cuda._resolution_error).split())}"  # noqa: SLF001
    try:
        return None if cuda.cupy.cuda.runtime.getDeviceCount() else "CuPy finds no GPU"
    except cuda.cupy.cuda.runtime.CUDARuntimeError as error:
        return f"CuPy finds no GPU: {error}"


def main() -> int:
    """Run all checks and return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cpu", action="store_true")
    cpu = parser.parse_args().cpu
    reason = None if cpu else no_gpu()
    if reason is not None:
        print(f"SKIP chainer: {reason}", flush=True)
        return 0
    checks = Checks("chainer")
    device = backend.CpuDevice() if cpu else chainer.get_device("@cupy:0")
    checks.run("environment", environment, device)
    if checks.failed:
        return 1
    for name, build in MODELS.items():
        checks.run(f"{name} trains as on the host", same_as_cpu, device, build)
        checks.run(f"{name}, statistics", statistics, device, build)
        checks.run(f"{name}, unchanged", unchanged, device, build)
    for dtype in ("float16", "mixed16"):
        checks.run(f"{dtype}, statistics", statistics, device, MLP, dtype)
    checks.run("cuDNN, statistics", through_cudnn, device)
    checks.run("Trainer, Evaluator, snapshot", in_a_trainer, device)
    checks.run("ParallelUpdater", parallel, device)
    checks.run("steps without a sample", quiet_steps, device)
    checks.run("one copy a sample", one_copy, device)
    checks.run("experiments and repair", experiments, device)
    checks.run("memory", memory, device)
    checks.run("overhead", overhead, device)
    return checks.status()


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        sys.exit(main())
    sys.exit(130)
