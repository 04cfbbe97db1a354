"""The nets that several Keras programs of the clinic start from."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import keras
from keras import layers

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    import numpy as np
    from numpy.typing import NDArray

    Array = NDArray[Any]

CLASSES = 10


def batch_norm(**arguments: Any) -> Any:
    """Return a batch norm with the memory of about 20 batches that most small programs have."""
    return layers.BatchNormalization(**{"momentum": 0.9, **arguments})


def backbone(inputs: Any, widths: Sequence[int] = (16, 32, 32), **arguments: Any) -> Any:
    """Return the features of ``inputs`` after blocks of convolution, batch norm and ReLU."""
    x = inputs
    for width in widths:
        x = layers.Conv2D(width, 3, padding="same", use_bias=False)(x)
        x = layers.ReLU()(batch_norm(**arguments)(x))
    return x


def cnn(widths: Sequence[int] = (16, 32, 32), *, outputs: int = CLASSES, **arguments: Any) -> Any:
    """Return a convolutional classifier of logits, its batch norms made with ``arguments``."""
    inputs = keras.Input((8, 8, 1))
    x = layers.MaxPooling2D()(backbone(inputs, widths, **arguments))
    return keras.Model(inputs, layers.Dense(outputs)(layers.Flatten()(x)))


def mlp(widths: Sequence[int] = (64, 64), *, features: int = 64, outputs: int = CLASSES, **arguments: Any) -> Any:
    """Return a classifier of logits with batch norm in front of each ReLU, made with ``arguments``."""
    x = inputs = keras.Input((features,))
    for width in widths:
        x = layers.ReLU()(batch_norm(**arguments)(layers.Dense(width, use_bias=False)(x)))
    return keras.Model(inputs, layers.Dense(outputs)(x))


def compiled(model: Any, rate: float = 1e-3, **arguments: Any) -> Any:
    """Return the model, compiled for logits of classes with Adam."""
    model.compile(
        **{
            "optimizer": keras.optimizers.Adam(rate),
            "loss": keras.losses.SparseCategoricalCrossentropy(from_logits=True),
            "metrics": ["accuracy"],
            **arguments,
        }
    )
    return model


def batches(rng: np.random.Generator, *arrays: Array, size: int) -> Iterator[tuple[Array, ...]]:
    """Yield the examples of one epoch in random order, the last few that fill no batch left out."""
    order = rng.permutation(len(arrays[0]))
    for start in range(0, len(order) - size + 1, size):
        yield tuple(array[order[start : start + size]] for array in arrays)
