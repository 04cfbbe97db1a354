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
    held = [RunningStatistics(np.zeros(channels, np.float32), np.ones(channels, np.float32), 0.9, 0)] * len(noise)
    found = []
    for step in range(1, SAMPLES + 1):
        batch = {
            (kind, site): BatchStatistics(
                noise[(step + kind + 3 * site) % 8], 1 + noise[(step * 3 + kind + site) % 8], 128
            )
            for kind in range(len(noise))
            for site in range(sites)
        }
        for (kind, _), seen in batch.items():
            held[kind] = follow(held[kind], seen)
        calls = [
            CallRecord(spec, CallSite(spec.path, site), batch[n % 8, site], held[n % 8])
            for n, spec in enumerate(specs)
            for site in range(sites)
        ]
        found.append(StepSnapshot(step, 0, tuple(calls)))
    return found


def follow(held: RunningStatistics, seen: BatchStatistics) -> RunningStatistics:
    """Return running statistics after an update."""
    old, new = np.float32(held.decay), np.float32(1.0 - held.decay)
    mean, var = old * held.mean + new * seen.mean, old * held.var + new * seen.var
    return RunningStatistics(mean, var, held.decay, (held.updates or 0) + 1)


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
