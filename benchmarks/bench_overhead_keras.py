"""What watching costs: a watched and an unwatched model take turns, step by step, in one process.

Both models are driven by the functions that ``fit`` would run, the watched one with its callback before each step. What
counts is the ratio, in CPU time: wall clock scatters with whatever else the machine does. The steps before ``--warm``
are left out (compilation, dense samples); they are printed apart. ``KERAS_BACKEND`` chooses the backend.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import itertools
import os
import time
from typing import TYPE_CHECKING, Any

os.environ.setdefault("KERAS_BACKEND", "tensorflow")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np

from bnwatch.keras import BatchNormWatch

if TYPE_CHECKING:
    from collections.abc import Iterator

layers = keras.layers
STATE = ("trainable_variables", "non_trainable_variables", "optimizer_variables", "metrics_variables")


def net(blocks: int, width: int) -> keras.Model:
    """Return a residual net of ``2 * blocks + 1`` batch norms on images of 16 x 16."""
    keras.utils.set_random_seed(0)
    inputs = keras.Input((16, 16, 3))
    x = layers.ReLU()(layers.BatchNormalization()(layers.Conv2D(width, 3, padding="same")(inputs)))
    for _ in range(blocks):
        y = layers.ReLU()(layers.BatchNormalization()(layers.Conv2D(width, 3, padding="same")(x)))
        y = layers.BatchNormalization()(layers.Conv2D(width, 3, padding="same")(y))
        x = layers.ReLU()(layers.Add()([x, y]))
    model = keras.Model(inputs, layers.Dense(2)(layers.GlobalAveragePooling2D()(x)))
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(optimizer="adam", loss=loss, metrics=["accuracy"])
    return model


def endless(x: np.ndarray, y: np.ndarray, size: int) -> Iterator[Any]:
    """Return what the train function of the backend takes, again and again."""
    if keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        return iter(tf.data.Dataset.from_tensor_slices((x, y)).batch(size).repeat())
    starts = range(0, len(x), size)
    tensor = keras.ops.convert_to_tensor
    return itertools.cycle([[(tensor(x[at : at + size]), tensor(y[at : at + size]))] for at in starts])


class Driven:
    """A model that is trained one step at a time."""

    def __init__(self, blocks: int, width: int, batch: int, *, watched: bool) -> None:
        self.model = net(blocks, width)
        self.watch = BatchNormWatch(None, on_diagnosis="log") if watched else None
        rng = np.random.default_rng(0)
        x = rng.normal(size=(batch * 16, 16, 16, 3)).astype("float32")
        y = (x.mean((1, 2)) @ np.array([3.0, -2.0, 1.0]) > 0).astype("int64")
        self.batches = endless(x, y, batch)
        if keras.backend.backend() == "jax":  # as ``fit`` does before it begins
            self.model._symbolic_build(data_batch=(x[:batch], y[:batch]))  # noqa: SLF001
        self.model.make_train_function()
        self.cpu: list[float] = []
        self.state: Any = None
        if self.watch is not None:
            self.watch.set_model(self.model)
            self.watch.set_params({"steps": None})
            self.watch.on_train_begin()
            self.watch.on_epoch_begin(0)

    def step(self, number: int) -> None:
        """Train one step and note its CPU time."""
        start = time.process_time()
        if self.watch is not None:
            self.watch.on_train_batch_begin(number)
        self._train()
        self.cpu.append(time.process_time() - start)

    def _train(self) -> None:
        """Do what ``fit`` does in a step."""
        model, backend = self.model, keras.backend.backend()
        if backend == "tensorflow":  # whose function draws the batch itself
            model.train_function(self.batches)
        elif backend == "torch":
            model.train_function(next(self.batches))
        else:
            import jax

            if model._jax_state_synced:  # noqa: SLF001
                self.state = model._get_jax_state(**dict.fromkeys(STATE, True), purge_model_variables=True)  # noqa: SLF001
                model._jax_state_synced = False  # noqa: SLF001
            _, self.state = model.train_function(self.state, iter(next(self.batches)))
            model._jax_state = dict(zip(STATE, self.state, strict=True))  # noqa: SLF001
            jax.block_until_ready(self.state)

    def close(self) -> None:
        """Conclude the watch."""
        if self.watch is not None:
            self.watch.on_train_end()


def measure(blocks: int, width: int, batch: int, *, steps: int, warm: int) -> None:
    """Print the cost of watching one configuration."""
    pair = [Driven(blocks, width, batch, watched=watched) for watched in (False, True)]
    for number in range(steps):
        for driven in pair if number % 2 else pair[::-1]:
            driven.step(number)
    with contextlib.redirect_stderr(io.StringIO()):
        pair[1].close()
    plain, watched = (np.array(driven.cpu) for driven in pair)
    ratio = watched[warm:].sum() / plain[warm:].sum() - 1
    rng = np.random.default_rng(0)
    rows = rng.integers(warm, steps, (2000, steps - warm))
    low, high = np.quantile(watched[rows].sum(1) / plain[rows].sum(1) - 1, (0.025, 0.975))
    due = np.array([pair[1].watch is not None and pair[1].watch.watch.due(n) for n in range(steps)])
    due[:warm] = False
    off = ~due & (np.arange(steps) >= warm)
    off_ratio = np.median(watched[off]) / np.median(plain[off]) - 1
    print(
        f"{2 * blocks + 1:3d} layers, batch {batch:3d}: {plain[warm:].mean() * 1e3:6.2f} ms CPU a step, "
        f"watched {ratio:+.1%} (95% {low:+.1%} to {high:+.1%}); steps without a sample {off_ratio:+.1%}; "
        f"a sample {(watched[due].mean() - plain[due].mean()) * 1e3:.1f} ms",
        flush=True,
    )
    extra = watched[:warm].sum() - plain[:warm].sum()
    print(
        f"    the first {warm} steps, compilation included: {plain[:warm].sum():.1f} s CPU, watched {extra:+.1f} s",
        flush=True,
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--warm", type=int, default=100)
    arguments = parser.parse_args()
    for size in ((2, 8, 16), (12, 16, 32)):
        measure(*size, steps=arguments.steps, warm=arguments.warm)
