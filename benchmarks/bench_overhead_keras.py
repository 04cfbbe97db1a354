"""What watching costs: watched and unwatched trainings in turn, in one process, on the same model and data.

Each round is a pair, in alternating order. A training's time is the median of its epochs but the first, which
compiles and samples densely and is printed apart; experiments run between epochs, within a share of their own. What
counts is the ratio within a pair: on a machine with other work the wall clock of single runs scatters far more than
the cost.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import statistics
import time

os.environ.setdefault("KERAS_BACKEND", "tensorflow")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np

from bnwatch.keras import BatchNormWatch

layers = keras.layers


def net(blocks: int, width: int) -> keras.Model:
    """Return a residual net of ``2 * blocks + 1`` batch norms on images of 16 x 16."""
    inputs = keras.Input((16, 16, 3))
    x = layers.ReLU()(layers.BatchNormalization()(layers.Conv2D(width, 3, padding="same")(inputs)))
    for _ in range(blocks):
        y = layers.ReLU()(layers.BatchNormalization()(layers.Conv2D(width, 3, padding="same")(x)))
        y = layers.BatchNormalization()(layers.Conv2D(width, 3, padding="same")(y))
        x = layers.ReLU()(layers.Add()([x, y]))
    model = keras.Model(inputs, layers.Dense(10)(layers.GlobalAveragePooling2D()(x)))
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(optimizer="adam", loss=loss, metrics=["accuracy"])
    return model


class Clock(keras.callbacks.Callback):
    """Times each epoch without its end, where experiments run."""

    def __init__(self) -> None:
        super().__init__()
        self.seconds: list[tuple[float, float]] = []
        self._start = (0.0, 0.0)

    def on_epoch_begin(self, epoch: int, logs: object = None) -> None:
        """Start."""
        del epoch, logs
        self._start = (time.perf_counter(), time.process_time())

    def on_epoch_end(self, epoch: int, logs: object = None) -> None:
        """Stop."""
        del epoch, logs
        wall, cpu = self._start
        self.seconds.append((time.perf_counter() - wall, time.process_time() - cpu))


def train(blocks: int, width: int, batch: int, steps: int, epochs: int, *, watched: bool) -> Clock:
    """Return the times of the epochs of one training."""
    keras.utils.set_random_seed(0)
    rng = np.random.default_rng(0)
    x = rng.normal(size=(batch * steps, 16, 16, 3)).astype("float32")
    y = (x.mean((1, 2)) @ np.array([3.0, -2.0, 1.0]) > 0).astype("int64")
    clock = Clock()
    watch = [BatchNormWatch(None, on_diagnosis="log")] if watched else []
    with contextlib.redirect_stderr(io.StringIO()):
        net(blocks, width).fit(x, y, batch_size=batch, epochs=epochs + 1, verbose=0, callbacks=[clock, *watch])
    return clock


def measure(blocks: int, width: int, batch: int, steps: int, epochs: int, *, rounds: int) -> None:
    """Print the cost of watching one configuration."""
    pairs, first = [], []
    for number in range(rounds):
        clocks = {}
        for watched in (False, True) if number % 2 else (True, False):
            clocks[watched] = train(blocks, width, batch, steps, epochs, watched=watched)
        first.append([clocks[watched].seconds[0][0] for watched in (False, True)])
        pairs.append([np.median(clocks[watched].seconds[1:], axis=0) for watched in (False, True)])
    for name, which in (("wall", 0), ("CPU", 1)):
        plain = statistics.median(p[which] for p, _ in pairs) / steps * 1e3
        ratios = [w[which] / p[which] - 1 for p, w in pairs]
        print(
            f"{2 * blocks + 1:3d} layers, batch {batch:3d}: {name:4s} {plain:7.2f} ms a step, "
            f"watched {statistics.median(ratios):+.1%} ({', '.join(f'{r:+.1%}' for r in ratios)})",
            flush=True,
        )
    plain, watched = np.median(first, axis=0)
    print(
        f"    first epoch, compilation and dense samples included: {plain:.1f} s, watched {watched:.1f} s", flush=True
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3, help="pairs of trainings")
    parser.add_argument("--steps", type=int, default=100, help="steps an epoch")
    parser.add_argument("--epochs", type=int, default=6, help="epochs that count")
    arguments = parser.parse_args()
    for size in ({"blocks": 2, "width": 8, "batch": 16}, {"blocks": 12, "width": 16, "batch": 32}):
        measure(**size, steps=arguments.steps, epochs=arguments.epochs, rounds=arguments.rounds)
