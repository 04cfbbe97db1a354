"""`check`: what can be known before the first step."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from bnwatch import engine
from bnwatch.keras.library import library_of
from bnwatch.keras.structure import structure

if TYPE_CHECKING:
    from bnwatch.diagnosis import Report


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
    known = structure(
        model, input_shape=input_shape, batch_size=batch_size, steps_per_epoch=steps_per_epoch, epochs=epochs
    )
    return engine.check(known, run=str(model.name), framework="keras")
