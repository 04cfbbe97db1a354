"""`check`: what can be known before the first step."""

from __future__ import annotations

from typing import Any

from bnwatch.diagnosis import Report
from bnwatch.engine import Engine
from bnwatch.keras.library import library_of
from bnwatch.keras.structure import structure
from bnwatch.rules import BEFORE_TRAINING
from bnwatch.signals import Signals


def check(
    model: Any,
    *,
    batch_size: int | None = None,
    steps_per_epoch: int | None = None,
    epochs: int | None = None,
    input_shape: Any = None,
) -> Report:
    """Return what is known of the batch normalization of a model without training it; the model is left as it is.

    `BatchNormWatch` does the same when training begins.

    Args:
        model: a Keras model: sequential, functional or subclassed, compiled or not.
        batch_size: examples a training step.
        steps_per_epoch: training steps an epoch; with ``epochs`` it tells how long the training is to be.
        epochs: planned epochs.
        input_shape: shape of the input with the examples as first axis, ``(None, 32, 32, 3)``, or a list or dict of
            such; asked for where a model has no graph: subclassed models. They must be built, and are called once on
            tensors without values (Keras 3).

    Raises:
        TypeError: it is no Keras model.
        ValueError: a number is not positive.
    """
    if not isinstance(model, library_of(model).Model):
        msg = f"check needs a Keras model, got {type(model).__name__}"
        raise TypeError(msg)
    for name, value in (("batch_size", batch_size), ("steps_per_epoch", steps_per_epoch), ("epochs", epochs)):
        if value is not None and value < 1:
            msg = f"{name} must be at least 1, got {value!r}"
            raise ValueError(msg)
    known = structure(
        model, input_shape=input_shape, batch_size=batch_size, steps_per_epoch=steps_per_epoch, epochs=epochs
    )
    engine = Engine(rules=BEFORE_TRAINING)
    engine.run(Signals(structure=known))
    return Report(
        run=str(model.name),
        diagnoses=engine.diagnoses,
        skipped=engine.skipped,
        layers=len(known.layers),
        sites=sum(1 for _ in known.places()),
    )
