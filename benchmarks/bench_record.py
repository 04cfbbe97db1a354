"""What the record of a deep network costs: bytes and time a sample, and the time to read 100 MB back.

Usage: python benchmarks/bench_record.py [LAYERS]
"""

from __future__ import annotations

import sys
import tempfile
import time

import numpy as np

from bnwatch.records import Attachment, CallSite, LayerSpec
from bnwatch.signals import STATISTICS, SignalTable
from bnwatch.sinks.tensorboard import TensorBoardSink, read_runs


def main(layers: int = 200) -> None:
    """Print the costs."""
    paths = [f"stage{n % 4}/block_{n}/batch_normalization" for n in range(layers)]
    sites = tuple(map(CallSite, paths))
    values = np.random.default_rng(0).lognormal(size=(layers, len(STATISTICS))).astype(np.float32)
    with tempfile.TemporaryDirectory() as directory:
        sink = TensorBoardSink(directory)
        sink.write(Attachment(tuple(LayerSpec(path, "BatchNormalization", 64, 1e-3, 0.99) for path in paths)))
        (path,) = sink.directory.iterdir()
        start, step = time.process_time(), 0
        while path.stat().st_size < 100e6:
            step += 1
            sink.write(SignalTable(step, 0, sites, values, accuracy=0.5, loss=1.0, examples=64 * step))
        spent, size = time.process_time() - start, path.stat().st_size
        print(f"write: {1e3 * spent / step:.2f} ms and {size / step:,.0f} bytes a sample of {layers} layers")
        print(f"2,000 samples: {2000 * size / step / 1e6:.1f} MB")
        start = time.process_time()
        (run,) = read_runs(directory)
        print(f"read: {time.process_time() - start:.2f} s for {size / 1e6:.0f} MB, {len(run.tables):,} samples")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
