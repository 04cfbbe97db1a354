"""What the record of a healthy deep network costs, made by a watch at default settings: bytes, seconds and reading.

Usage: python benchmarks/bench_record.py [LAYERS [SAMPLES [CHANNELS]]]
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

import bnwatch
from bnwatch.records import (
    Attachment,
    BatchStatistics,
    CallRecord,
    CallSite,
    EvaluationRecord,
    LayerSpec,
    RunningStatistics,
    StepSnapshot,
)
from bnwatch.sinks.tensorboard import read_runs
from bnwatch.sinks.tensorboard.events import read_events

if TYPE_CHECKING:
    from collections.abc import Iterator

COUNT, DECAY, EVALUATIONS = 64, 0.99, 40
LARGE = 100e6


def training(specs: list[LayerSpec], watch: bnwatch.Watch, samples: int) -> Iterator[StepSnapshot]:
    """Yield as many samples of a network in which nothing goes wrong, as a watch takes them."""
    rng = np.random.default_rng(0)
    shape = len(specs), specs[0].channels
    mean, var = np.zeros(shape), np.ones(shape)
    of_data = rng.normal(size=shape), rng.lognormal(sigma=0.5, size=shape)
    step = taken = updates = 0
    while taken < samples:
        step += 1
        if not watch.due(step):
            continue
        # a step here stands for all that led to it: an average of ever so many batches
        weight = DECAY ** min(step - updates, 500)
        batch_mean = of_data[0] + rng.normal(size=shape) * np.sqrt(of_data[1] / COUNT)
        batch_var = of_data[1] * rng.chisquare(COUNT - 1, shape) / COUNT
        noise = np.sqrt((1 - DECAY) / (1 + DECAY) / COUNT)
        mean = weight * mean + (1 - weight) * (of_data[0] + rng.normal(size=shape) * noise * np.sqrt(of_data[1]))
        var = weight * var + (1 - weight) * of_data[1]
        arrays = [part.astype(np.float32) for part in (batch_mean, batch_var, mean, var)]
        calls = tuple(
            CallRecord(
                spec,
                CallSite(spec.path),
                BatchStatistics(arrays[0][n], arrays[1][n], COUNT),
                RunningStatistics(arrays[2][n], arrays[3][n], DECAY, step),
            )
            for n, spec in enumerate(specs)
        )
        updates, taken = step, taken + 1
        accuracy = 0.9 - 0.8 * DECAY ** (step / 100)
        yield StepSnapshot(step, step // 1000, calls, accuracy, 1.0 - accuracy, 64 * step)


def write(directory: str, layers: int, samples: int, channels: int) -> None:
    """Record a training with evaluations."""
    paths = [f"stage{n % 4}/block_{n}/batch_normalization" for n in range(layers)]
    specs = [LayerSpec(path, "BatchNormalization", channels, 1e-3, DECAY) for path in paths]
    watch = bnwatch.Watch(directory, on_diagnosis="log", experiments=False)
    watch.open(Attachment(tuple(specs), framework="made up"))
    for number, snapshot in enumerate(training(specs, watch, samples), 1):
        watch.observe(snapshot)
        if number % max(samples // EVALUATIONS, 1) == 0:
            accuracy = snapshot.accuracy
            watch.evaluated(
                EvaluationRecord(
                    snapshot.step, snapshot.epoch, accuracy, 0.5, 10_000, accuracy, 0.5, 50_000, classes=10,
                )
            )  # fmt: skip
    print("diagnoses:", ", ".join(sorted({diagnosis.rule for diagnosis in watch.diagnoses})) or "none")
    watch.close()


def main(layers: int = 200, samples: int = 2000, channels: int = 64) -> None:
    """Print the costs."""
    with tempfile.TemporaryDirectory() as directory:
        start = time.process_time()
        write(directory, layers, samples, channels)
        spent = time.process_time() - start
        (path,) = Path(directory, "bnwatch").glob("*.bnwatch")
        size = path.stat().st_size
        print(f"{layers} layers of {channels} channels, {samples:,} samples: {size / 1e6:.1f} MB, {spent:.0f} s in all")
        parts: Counter[str] = Counter()
        for event in read_events(path):
            for value in event.summary.value:
                parts["/".join(value.tag.split("/")[:2])] += value.ByteSize()
        print(", ".join(f"{tag.partition('/')[2] or tag} {part / 1e6:.2f} MB" for tag, part in parts.most_common(9)))
        for number in range(1, int(LARGE / size) + 1):
            copy = Path(directory, str(number), "bnwatch", path.name)
            copy.parent.mkdir(parents=True)
            copy.write_bytes(path.read_bytes())
        start = time.process_time()
        runs = read_runs(directory)
        print(f"read: {time.process_time() - start:.2f} s for {size * len(runs) / 1e6:.0f} MB in {len(runs)} runs")
        del runs
        program = "import sys, time; from bnwatch.cli import main; main(sys.argv[1:]); "
        program += "print(f'report: {time.process_time():.2f} s of processor time', file=sys.stderr)"
        command = [sys.executable, "-c", program, "report", directory]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)  # noqa: S603 - this Python and this package


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
