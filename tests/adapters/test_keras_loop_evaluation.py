"""Evaluations in loops written by hand that normalize with batch statistics."""

from __future__ import annotations

from contextlib import nullcontext

import numpy as np
import pytest

from bnwatch.keras.loop import LoopWatch
from tests.adapters.keras_loops import steps
from tests.adapters.keras_models import CLASSES, FakeWatch, data
from tests.adapters.library import BACKEND, keras, layers


def net():
    x = inputs = keras.Input((5,))
    x = layers.BatchNormalization(name="one")(layers.Dense(6)(x))
    return keras.Model(inputs, layers.Dense(CLASSES)(x))


def without_gradients():
    """Return the context in which one evaluates."""
    if BACKEND != "torch":
        return nullcontext()
    import torch

    return torch.no_grad()


def train(evaluate, *, compiled=False, epochs=2):
    """Return what a watch saw of a loop that calls ``evaluate(model, x)`` after each epoch of three steps."""
    keras.utils.set_random_seed(0)
    model, seen = net(), FakeWatch(every=1)
    x, y = data(24, shape=(5,))
    with LoopWatch(model, seen) as watch:
        loop = steps(model, x, y, training=True, compiled=compiled)
        for _ in range(epochs):
            for _ in range(3):
                _, needed = next(loop)
                watch.step(accuracy=0.5, loss=1.0, examples=24, **needed)
            with without_gradients():
                evaluate(model, x)
            watch.evaluation(accuracy=0.5, examples=24)
    assert seen.faults == []
    return seen


def images(model, x, *, training):
    for n in range(len(x)):
        model(x[n : n + 1], training=training)


def refreshed(model, x):
    for _ in range(2):
        model(x, training=True)
    model(x, training=False)


@pytest.mark.parametrize(
    ("evaluate", "found"),
    [
        (lambda model, x: model(x, training=True), ("one",)),
        (lambda model, x: images(model, x, training=True), ("one",)),
        (lambda model, x: model(x, training=False), ()),
        (lambda model, x: images(model, x, training=False), ()),
        (refreshed, ()),
        (lambda _model, _x: None, ()),
    ],
    ids=["training mode", "image by image", "inference mode", "image by image in inference mode", "refreshed", "none"],
)
@pytest.mark.parametrize("compiled", [False, True])
def test_an_evaluation_in_training_mode_is_seen(evaluate, found, compiled):
    seen = train(evaluate, compiled=compiled)
    assert [record.batch_statistics for record in seen.evaluations] == [found, found]


def test_an_evaluation_adds_no_call_site():
    seen = train(lambda model, x: images(model, x, training=True))
    assert [[str(call.site) for call in snapshot.calls] for snapshot in seen.snapshots] == [["one#0"]] * 6
    assert np.isfinite(seen.snapshots[-1].calls[0].batch.mean).all()
