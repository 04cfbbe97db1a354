"""What watching costs a training step in Chainer: pairs of blocks, watched and not, taken in turn in one process.

``python benchmarks/bench_overhead_chainer.py`` prints, for three models, the time of a step and the ratio of watched to
unwatched blocks (median and quartiles over the pairs, in CPU time). A watched block holds exactly one sampled step.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
import warnings
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import numpy as np

from bnwatch.chainer import compat

warnings.simplefilter("ignore")
compat.install()

import chainer  # noqa: E402
from chainer import functions as F  # noqa: E402, N812
from chainer import links as L  # noqa: E402, N812

import bnwatch.chainer  # noqa: E402


class Plain(chainer.ChainList):
    """Equal layers, each with batch normalization and ReLU."""

    def __init__(self, depth: int, width: int, *, image: bool) -> None:
        super().__init__()
        self._image = image
        for _ in range(depth):
            self.add_link(L.Convolution2D(None, width, 3, pad=1, nobias=True) if image else L.Linear(None, width))
            self.add_link(L.BatchNormalization(width))
        self.add_link(L.Linear(None, 10))

    def forward(self, x: Any) -> Any:
        """Return the logits."""
        *layers, last = self
        for layer, bn in zip(layers[::2], layers[1::2], strict=True):
            x = F.relu(bn(layer(x)))
        return last(F.mean(x, axis=(2, 3)) if self._image else x)


MODELS = {
    "2 layers of 100": (lambda: Plain(2, 100, image=False), (64, 64)),
    "5 layers of 200": (lambda: Plain(5, 200, image=False), (128, 64)),
    "25 convolutions of 16": (lambda: Plain(25, 16, image=True), (64, 3, 12, 12)),
}


def main() -> None:
    """Measure every model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=15, help="pairs of blocks (default: %(default)s)")
    parser.add_argument("--every", type=int, default=50, help="steps a block and a sample (default: %(default)s)")
    options = parser.parse_args()
    for name, (model, shape) in MODELS.items():
        measure(name, model(), shape, options.pairs, options.every)


def measure(name: str, model: Any, shape: tuple[int, ...], pairs: int, every: int) -> None:
    """Print the cost for one model."""
    random = np.random.default_rng(0)
    labels = random.integers(0, 10, shape[0]).astype(np.int32)
    x = random.normal(size=shape).astype(np.float32)
    x += labels.reshape(-1, *(1,) * (len(shape) - 1)) / 2
    optimizer = chainer.optimizers.MomentumSGD(0.01).setup(model)

    def step(watch: Any) -> None:
        scores = model(x)
        loss = F.softmax_cross_entropy(scores, labels)
        model.cleargrads()
        loss.backward()
        optimizer.update()
        accuracy = F.accuracy(scores, labels)
        if watch is not None:
            watch.step(accuracy=accuracy, loss=loss)

    def block(watch: Any) -> float:
        begin = time.process_time()
        for _ in range(every):
            step(watch)
        return time.process_time() - begin

    hooks = chainer.get_function_hooks()
    with (
        tempfile.TemporaryDirectory() as folder,
        bnwatch.chainer.watch(model, folder, every=every, on_diagnosis="log") as watch,
    ):
        for _ in range(4 * every):
            step(watch)
        with chainer.using_config("train", False), chainer.no_backprop_mode():
            accuracy = F.accuracy(model(x), labels)
        watch.evaluation(accuracy=accuracy, examples=len(labels))
        ratios, plain = [], []
        for number in range(pairs):
            seconds = {}
            for watched in (True, False) if number % 2 else (False, True):
                tap = dict(hooks)
                if not watched:
                    hooks.clear()
                seconds[watched] = block(watch if watched else None)
                hooks.update(tap)
            ratios.append(seconds[True] / seconds[False])
            plain.append(seconds[False] / every)
        low, middle, high = np.percentile(ratios, [25, 50, 75])
        print(
            f"{name}: {1e3 * np.median(plain):.1f} ms a step, watched {100 * (middle - 1):+.1f} % "
            f"(quartiles {100 * (low - 1):+.1f} to {100 * (high - 1):+.1f}, {pairs} pairs of {every} steps)",
            flush=True,
        )


if __name__ == "__main__":
    main()
