"""CPU time of one sample through signals and the whole catalogue, healthy layers."""

from __future__ import annotations

import statistics
import time

import numpy as np

from bnwatch.engine import Engine
from bnwatch.records import BatchStatistics, CallRecord, CallSite, LayerSpec, RunningStatistics, StepSnapshot
from bnwatch.signals import Signals

SAMPLES = 60


def snapshots(layers: int, sites: int, channels: int) -> list[StepSnapshot]:
    """Return samples of healthy layers: sites see the same data, running statistics follow."""
    rng = np.random.default_rng(0)
    specs = [LayerSpec(f"bn{n}", "BatchNormalization", channels, 1e-3, 0.9) for n in range(layers)]
    noise = rng.normal(size=(8, channels)).astype(np.float32) * 0.1
    found = []
    for step in range(1, SAMPLES + 1):
        calls = [
            CallRecord(
                spec,
                CallSite(spec.path, site),
                BatchStatistics(noise[(step + n + 3 * site) % 8], 1 + noise[(step * 3 + n + site) % 8], 128),
                RunningStatistics(noise[(step + n) % 8] / 4, 1 + noise[(step + n) % 8] / 4, 0.9, step * sites),
            )
            for n, spec in enumerate(specs)
            for site in range(sites)
        ]
        found.append(StepSnapshot(step, 0, tuple(calls)))
    return found


def main() -> None:
    """Print one line a size."""
    for layers, sites, channels, budget in ((100, 2, 512, 5.0), (1000, 1, 512, 50.0), (1000, 1, 64, 50.0)):
        signals, engine, spent = Signals(), Engine(), []
        for snapshot in snapshots(layers, sites, channels):
            start = time.process_time()
            signals.observe(snapshot)
            engine.run(signals)
            spent.append(1e3 * (time.process_time() - start))
        middle = statistics.median(spent[20:])
        print(f"{layers} layers x {sites} sites x {channels} channels: {middle:.1f} ms a sample (budget {budget:g} ms)")


if __name__ == "__main__":
    main()
