"""What the tab costs on a large record: time to the first answers, memory of the server, and a refresh while it grows.

Usage: python benchmarks/bench_dashboard.py [LAYERS [SAMPLES [LOAD_FAST]]]

It starts ``tensorboard`` itself, so it wants an environment where bnwatch is installed; LOAD_FAST is as of its flag.
The times are those of a page in front of a server that has just come up, with the event files in the page cache.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path
from typing import Any

import numpy as np

from bnwatch.records import Attachment, CallSite, EvaluationRecord, LayerSpec
from bnwatch.signals import STATISTICS, SignalTable
from bnwatch.sinks.tensorboard import TensorBoardSink


def main(layers: int = 1000, samples: int = 10_000, load_fast: str = "false") -> None:
    """Print the numbers."""
    with tempfile.TemporaryDirectory() as directory:
        start = time.perf_counter()
        sink, table = _write(Path(directory, "run"), layers, samples)
        (path,) = sink.directory.iterdir()
        path.read_bytes()
        size = path.stat().st_size / 1e6
        print(f"{layers:,} layers x {samples:,} samples: {size:,.0f} MB, made in {time.perf_counter() - start:.0f} s")
        _measure(directory, sink, table, load_fast)


def _write(directory: Path, layers: int, samples: int) -> tuple[TensorBoardSink, SignalTable]:
    paths = [f"stage{n % 4}/block_{n}/batch_normalization" for n in range(layers)]
    sites = tuple(map(CallSite, paths))
    values = np.random.default_rng(0).lognormal(size=(layers, len(STATISTICS))).astype(np.float32)
    values[:, STATISTICS.index("flags")] = 0.0
    sink = TensorBoardSink(directory)
    sink.write(Attachment(tuple(LayerSpec(path, "BatchNormalization", 64, 1e-3, 0.99) for path in paths)))
    for step in range(1, samples + 1):
        values = np.roll(values, 1, axis=0)
        table = SignalTable(step, step // 100, sites, values, accuracy=0.5, loss=1.0, examples=64 * step)
        sink.write(table)
        if step % 100 == 0:
            sink.write(EvaluationRecord(step, step // 100, accuracy=0.5, examples=1000, train_accuracy=0.6))
    return sink, table


def _measure(directory: str, sink: TensorBoardSink, table: SignalTable, load_fast: str) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", directory, "--port", str(port)]
    command += ["--load_fast", load_fast, "--host", "127.0.0.1"]
    # TensorFlow where it is installed would take seconds to import, and half a gigabyte
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    with subprocess.Popen(command, **quiet) as server:  # noqa: S603 - nothing in it comes from outside
        try:
            ask = _Asker(f"http://127.0.0.1:{port}/data/plugin/bnwatch")
            ask.wait(f"http://127.0.0.1:{port}/data/logdir", server)
            print(f"server up, {_memory(server.pid)}")
            start = time.perf_counter()
            ask("runs")
            ask("run", run="run")
            ask("layers", run="run")
            print(f"first useful page: {time.perf_counter() - start:.2f} s, {_memory(server.pid)}")
            ask("layers", run="run", step="5000")
            ask("series", run="run", layer=table.sites[-1].layer)
            for statistic in ("matters", "mean_shift"):
                start, slices = time.perf_counter(), 0
                while ask("heatmap", run="run", statistic=statistic)["complete"] < 1.0:
                    slices += 1
                print(f"heatmap of {statistic}: {time.perf_counter() - start:.2f} s in {slices + 1} slices")
            print(_memory(server.pid))
            for step in range(table.step + 1, table.step + 11):
                sink.write(SignalTable(step, table.epoch, table.sites, table.values))
            time.sleep(1.0)
            ask("runs")
            ask("series", run="run", layer=table.sites[-1].layer)
            ask("heatmap", run="run", statistic="matters")
            print(_memory(server.pid))
        finally:
            server.terminate()


class _Asker:
    def __init__(self, address: str) -> None:
        self._address = address

    def wait(self, address: str, server: subprocess.Popen[bytes]) -> None:
        while server.poll() is None:
            try:
                urllib.request.urlopen(address).close()  # noqa: S310 - an address of this machine
            except urllib.error.URLError:
                time.sleep(0.1)
            else:
                return
        msg = "tensorboard did not start"
        raise RuntimeError(msg)

    def __call__(self, route: str, **parameters: str) -> Any:
        start = time.perf_counter()
        query = urllib.parse.urlencode(parameters)
        with urllib.request.urlopen(f"{self._address}/{route}?{query}") as response:  # noqa: S310
            body = response.read()
        seconds = time.perf_counter() - start
        print(f"  {route} {query.removeprefix('run=run&')[:40]}: {seconds:.3f} s, {len(body) / 1e3:,.0f} KB")
        return json.loads(body)


def _memory(pid: int) -> str:
    status = Path("/proc", str(pid), "status")
    if not status.exists():
        return "memory is not known on this system"
    peak = next(line for line in status.read_text(encoding="ascii").splitlines() if line.startswith("VmHWM"))
    return f"peak memory {int(peak.split()[1]) / 1024:,.0f} MB"


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    numbers, rest = sys.argv[1:3], sys.argv[3:4]
    main(*map(int, numbers), *rest)
