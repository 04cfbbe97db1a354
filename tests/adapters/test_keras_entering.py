"""What enters each layer in evaluation, and whether it is what enters in training: real trainings, healthy and sick."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.testing import assert_allclose

from bnwatch.evidence import entering
from bnwatch.keras.backends import backend_of
from bnwatch.keras.experiments import Given
from bnwatch.keras.laboratory import KerasLaboratory
from tests.adapters.keras_models import ByHand, compiled, make, quiet_watch, state
from tests.adapters.library import keras, layers, set_random_seed

CLASSES, FEATURES = 4, 12
BLOCK = 8


def mlp(*, wide=32):
    return keras.Sequential(
        [
            keras.Input((FEATURES,)),
            layers.Dense(wide, name="a"),
            layers.BatchNormalization(momentum=0.9, name="first"),
            layers.ReLU(),
            layers.Dense(wide, name="b"),
            layers.BatchNormalization(momentum=0.9, name="second"),
            layers.ReLU(),
            layers.Dense(CLASSES, name="c"),
        ]
    )


def conv():
    return keras.Sequential(
        [
            keras.Input((BLOCK, BLOCK, 3)),
            layers.Conv2D(8, 3, name="a"),
            layers.BatchNormalization(momentum=0.9, name="first"),
            layers.ReLU(),
            layers.Conv2D(8, 3, strides=2, name="b"),
            layers.BatchNormalization(momentum=0.9, name="second"),
            layers.ReLU(),
            layers.GlobalAveragePooling2D(),
            layers.Dense(CLASSES, name="c"),
        ]
    )


def clusters(examples, *, seed, noise=0.6):
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, CLASSES, examples)
    centres = np.random.default_rng(7).normal(size=(CLASSES, FEATURES))
    return (centres[labels] + rng.normal(0.0, noise, (examples, FEATURES))).astype("float32"), labels


def images(examples, *, seed):
    """A bright bar, in one of four places, on noise."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, CLASSES, examples)
    x = rng.normal(0.4, 0.15, (examples, BLOCK, BLOCK, 3))
    for n, label in enumerate(labels):
        x[n, 2 * label : 2 * label + 2, :, label % 3] += 0.6
    return x.astype("float32"), labels


def watched(build, training, validation, *, epochs=6, size=32, seed=1):
    set_random_seed(seed)
    model, watch = compiled(build()), quiet_watch()
    history = model.fit(
        *training, batch_size=size, validation_data=validation, epochs=epochs, verbose=0, callbacks=[watch]
    )
    return watch, history.history


def found(watch, rule="BN304"):
    return [d for d in watch.diagnoses if d.rule == rule and d.state == "active"]


if __name__ == "__main__":
    t = clusters(1200, seed=0)
    v = clusters(600, seed=1)
    for build, t, v in (
        (mlp, clusters(1200, seed=0), clusters(600, seed=1)),
        (conv, images(1200, seed=0), images(600, seed=1)),
    ):
        for k in (1, 16, 1 / 255, 255):
            w, h = watched(build, t, (v[0] * np.float32(k), v[1]))
            print(build.__name__, k, h["accuracy"][-1], h["val_accuracy"][-1])
            for split, row in w.watch.signals.cells.rows():
                print("  ", split, {n: round(c.accuracy, 3) for n, c in row.items()})
            for s in w.watch.signals.entering.sites:
                print("  ", s)
            print(
                "  ",
                w.watch.signals.entering.untold,
                w.watch.signals.entering.seconds,
                w.watch.signals.cells.seconds,
                w.watch.signals.entering.training,
            )
            from bnwatch import render

            for d in w.diagnoses:
                print(render.diagnosis_text(d))
            print(w.skipped)
