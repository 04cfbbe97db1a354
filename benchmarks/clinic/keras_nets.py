"""Networks that several Keras programs of the clinic train, as their people wrote them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import keras
from keras import layers

if TYPE_CHECKING:
    from collections.abc import Callable


def cnn(
    momentum: float = 0.99,
    *,
    filters: tuple[int, ...] = (16, 32, 32),
    norm: Callable[..., Any] = layers.BatchNormalization,
    classes: int = 10,
    shape: tuple[int, int, int] = (8, 8, 1),
) -> keras.Sequential:
    """Return a convolutional network: Conv-BN-ReLU for each of ``filters``, a pooling after the first, logits."""
    model = keras.Sequential([keras.Input(shape)])
    for number, width in enumerate(filters):
        model.add(layers.Conv2D(width, 3, padding="same"))
        model.add(norm(momentum=momentum))
        model.add(layers.ReLU())
        if number == 0:
            model.add(layers.MaxPooling2D())
    model.add(layers.Flatten())
    model.add(layers.Dense(classes))
    return model


def mlp(momentum: float = 0.99, *, widths: tuple[int, ...] = (64, 64), inputs: int = 64, classes: int = 10) -> Any:
    """Return a network of Dense-BN-ReLU for each of ``widths``, and logits."""
    model = keras.Sequential([keras.Input((inputs,))])
    for width in widths:
        model.add(layers.Dense(width))
        model.add(layers.BatchNormalization(momentum=momentum))
        model.add(layers.ReLU())
    model.add(layers.Dense(classes))
    return model


def classifying(model: Any, rate: float = 1e-3) -> Any:
    """Compile a network that returns logits for a classification with Adam, and return it."""
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.Adam(rate), loss, metrics=["accuracy"])
    return model
