"""The checks of `gpu_check.py`, which runs this file, for Keras 3 on the backend that ``KERAS_BACKEND`` names."""

from __future__ import annotations

import argparse
import contextlib
import itertools
import sys
import time
from typing import TYPE_CHECKING, Any

import keras
import numpy as np
from bench_overhead_keras import Driven
from gpu_report import Checks, Inconclusive, Skip

import bnwatch.keras
from bnwatch.keras import BatchNormWatch

if TYPE_CHECKING:
    from bnwatch.records import StepSnapshot

BACKEND = keras.backend.backend()
layers = keras.layers
BATCH, CLASSES = 32, 4


def data(examples: int = 256, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Return a task that is learned in a few epochs."""
    x = np.random.default_rng(seed).normal(1.0, 2.0, (examples, 8)).astype("float32")
    return x, (x[:, 0] > 1).astype("int32") + 2 * (x[:, 1] > 1)


def network(dropout: float = 0.2) -> Any:
    """Return a net whose second batch norm is called twice."""
    keras.utils.set_random_seed(1)
    inputs = keras.Input((8,))
    shared = layers.BatchNormalization(momentum=0.9, name="shared")
    x = layers.BatchNormalization(momentum=0.9, name="own")(inputs)
    x = shared(layers.Dense(16, name="first")(x))
    x = layers.Dropout(dropout)(layers.ReLU()(x))
    x = shared(layers.Dense(16, name="second")(x))
    model = keras.Model(inputs, layers.Dense(CLASSES)(layers.ReLU()(x)))
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(optimizer=keras.optimizers.Adam(0.01), loss=loss, metrics=["accuracy"])
    return model


def state(model: Any) -> list[bytes]:
    """Return every number that training could have moved."""
    variables = (*model.variables, *model.optimizer.variables)
    return [keras.ops.convert_to_numpy(variable).tobytes() for variable in variables]


def sound(watch: Any) -> None:
    """Check that the watch has not disabled itself."""
    faults = [diagnosis.message for diagnosis in watch.diagnoses if diagnosis.rule == "BN903"]
    assert not faults, faults


def devices() -> list[str]:
    """Return the GPUs that the backend sees."""
    if BACKEND == "tensorflow":
        import tensorflow as tf

        return [device.name for device in tf.config.list_physical_devices("GPU")]
    if BACKEND == "jax":
        import jax

        return [str(device) for device in jax.devices() if device.platform == "gpu"]
    import torch

    return [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())]


def make_deterministic() -> None:
    """Ask for the same sums in the same order; for JAX and cuBLAS the environment does it."""
    if BACKEND == "tensorflow":
        import tensorflow as tf

        keras.utils.set_random_seed(0)
        tf.config.experimental.enable_op_determinism()
    elif BACKEND == "torch":
        import torch

        torch.use_deterministic_algorithms(mode=True, warn_only=True)


def environment() -> str:
    """Say what is checked."""
    found = f"Python {sys.version.split()[0]}, NumPy {np.__version__}, Keras {keras.__version__}"
    return f"{found}, {', '.join(devices()) or 'the CPU'}"


class BeforeSteps(keras.callbacks.Callback):
    """Keeps the weights before each step."""

    def __init__(self) -> None:
        super().__init__()
        self.weights: list[dict[str, list[np.ndarray]]] = []

    def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:  # noqa: ARG002
        """Read the weights."""
        self.weights.append({layer.name: layer.get_weights() for layer in self.model.layers if layer.weights})


def by_hand(weights: dict[str, list[np.ndarray]], x: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
    """Return mean and variance at each call of a batch norm, in NumPy and float64."""
    calls: list[tuple[np.ndarray, np.ndarray]] = []

    def dense(name: str, z: np.ndarray) -> np.ndarray:
        kernel, bias = (part.astype("float64") for part in weights[name])
        return z @ kernel + bias

    def norm(name: str, z: np.ndarray) -> np.ndarray:
        gamma, beta = (part.astype("float64") for part in weights[name][:2])
        calls.append((z.mean(0), z.var(0)))
        return (z - calls[-1][0]) / np.sqrt(calls[-1][1] + 1e-3) * gamma + beta

    z = norm("shared", dense("first", norm("own", x.astype("float64"))))
    norm("shared", dense("second", np.maximum(z, 0)))
    return calls


def statistics() -> str:
    """Compare what is recorded with NumPy in float64."""
    (x, y), model, before = data(), network(dropout=0.0), BeforeSteps()
    watch = BatchNormWatch(None, every=1, experiments=False, on_diagnosis="log")
    steps: list[StepSnapshot] = []
    observe = watch.watch.observe
    watch.watch.observe = lambda snapshot: (steps.append(snapshot), observe(snapshot))  # type: ignore[method-assign]
    model.fit(x, y, batch_size=BATCH, epochs=1, shuffle=False, verbose=0, callbacks=[before, watch])
    sound(watch)
    assert len(steps) == len(x) // BATCH
    worst, calls = 0.0, 0
    for number, (step, weights) in enumerate(zip(steps, before.weights, strict=True)):
        expected = by_hand(weights, x[number * BATCH : (number + 1) * BATCH])
        for call, (mean, var) in zip(step.calls, expected, strict=True):
            apart = np.abs(call.batch.mean - mean) / np.sqrt(var)
            worst = max(worst, float(apart.max()), float(np.abs(call.batch.var / var - 1).max()))
            calls += 1
    assert worst < 1e-2, f"{worst:.1e} from NumPy in float64"  # a GPU may multiply matrices in TensorFloat-32
    return f"{calls} calls, {worst:.1e} from NumPy in float64"


def unchanged() -> str:
    """Compare a watched training with two unwatched ones, to the byte."""

    def trained(*, watched: bool) -> tuple[list[bytes], dict[str, list[float]]]:
        (x, y), model = data(), network()
        watch = BatchNormWatch(None, every=3, on_diagnosis="log")
        callbacks = [watch] if watched else []
        history = model.fit(x, y, batch_size=BATCH, epochs=3, verbose=0, validation_data=(x, y), callbacks=callbacks)
        if watched:
            sound(watch)
            assert watch.watch.signals.cells is not None, watch.skipped
        return state(model), history.history

    plain, again, watched = (trained(watched=watched) for watched in (False, False, True))
    if plain != again:
        msg = "two trainings without the watch already differ"
        raise Inconclusive(msg)
    assert plain == watched, "the watch changed the training"
    return f"{len(plain[0])} variables and the history identical to the byte, with and without"


def experiments() -> str:
    """Check that experiments leave nothing behind, and that recalibration does what NumPy does."""
    (x, y), model = data(), network()
    model.fit(x, y, batch_size=BATCH, epochs=1, verbose=0)
    before = state(model)
    cells = bnwatch.keras.crosscheck(model, train=(x, y), eval=data(200, seed=1), batch_size=BATCH)
    bnwatch.keras.attribute(model, data(200, seed=1), batch_size=BATCH)
    bnwatch.keras.localise(model, (x, y), batch_size=BATCH)
    assert state(model) == before, "an experiment left something behind"
    bnwatch.keras.recalibrate(model, [x[at : at + BATCH] for at in range(0, len(x), BATCH)], ["own"])
    mean, var = model.get_layer("own").get_weights()[2:]
    wide = x.astype("float64")
    apart = max(np.abs(mean - wide.mean(0)).max(), np.abs(var / wide.var(0) - 1).max())
    assert apart < 1e-4, f"recalibrated statistics are {apart:.1e} from NumPy's"
    told = ", ".join(f"{name} {cell.accuracy:.3f}" for name, cell in cells.training.items())
    return f"accuracy with {told}; all restored; recalibrated to {apart:.1e} of NumPy"


def quiet_steps() -> str:
    """Check on torch that the callback does not wait for the device on steps without a sample."""
    if BACKEND != "torch" or not devices():
        msg = "only PyTorch on a GPU can refuse to wait"
        raise Skip(msg)
    import torch

    driven, checked = Driven(2, 8, 16, watched=True), 0
    watch = driven.watch
    assert watch is not None
    for number in range(240):
        if number > 100 and not (watch.watch.due(number) or watch.watch.due(number + 1)):
            torch.cuda.set_sync_debug_mode("error")
            checked += 1
        try:
            watch.on_train_batch_begin(number)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        driven._train()  # noqa: SLF001
    driven.close()
    sound(watch)
    return f"{checked} steps without a sample, none waited for the device"


def overhead(*, cpu: bool) -> str:
    """Time blocks of steps of a watched and of an unwatched model in turn, waiting for the device after each."""
    if cpu:
        msg = "timed on a GPU only; on the CPU, benchmarks/bench_overhead_keras.py does it"
        raise Skip(msg)
    blocks, every = 20, 50
    pair = {on: Driven(12, 16, 32, watched=on) for on in (False, True)}
    seconds: dict[bool, list[float]] = {False: [], True: []}
    steps = {on: itertools.count() for on in pair}

    def block(on: bool, size: int) -> float:
        begin = time.perf_counter()
        for _ in range(size):
            pair[on].step(next(steps[on]))
        keras.ops.convert_to_numpy(pair[on].state[0][0] if pair[on].state else pair[on].model.trainable_variables[0])
        return time.perf_counter() - begin

    for on in pair:
        block(on, 4 * every)
    for number in range(blocks):
        for on in (True, False) if number % 2 else (False, True):
            seconds[on].append(block(on, every))
    pair[True].close()
    low, middle, high = np.percentile(np.divide(seconds[True], seconds[False]) - 1, [25, 50, 75])
    assert low < 0.03, f"{middle:+.1%} (quartiles {low:+.1%} to {high:+.1%})"
    step = 1e3 * float(np.median(seconds[False])) / every
    return f"step {step:.2f} ms, watched {middle:+.1%} (quartiles {low:+.1%} to {high:+.1%}, {blocks} pairs)"


def main() -> int:
    """Run all checks and return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cpu", action="store_true")
    cpu = parser.parse_args().cpu
    if not cpu and not devices():
        print(f"SKIP {BACKEND}: it sees no GPU", flush=True)
        return 0
    make_deterministic()
    checks = Checks(BACKEND)
    checks.run("environment", environment)
    checks.run("statistics", statistics)
    checks.run("unchanged", unchanged)
    checks.run("experiments and repair", experiments)
    checks.run("steps without a sample", quiet_steps)
    checks.run("overhead", lambda: overhead(cpu=cpu))
    return checks.status()


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        sys.exit(main())
    sys.exit(130)
