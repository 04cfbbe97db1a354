"""A Keras program that can stay at 10 % accuracy: a small residual net whose Dense layer dies in its first steps.

The options try what people tried, and under ``--head`` what helps.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import keras
import numpy as np
from keras import layers

from bnwatch.examples import data
from bnwatch.keras import BatchNormWatch

if TYPE_CHECKING:
    import argparse
    from collections.abc import Mapping, Sequence


def residual_net(options: argparse.Namespace) -> Any:
    """Return the network: one convolution, three bottleneck units with a shortcut, and a classifier."""

    def normalized(x: Any) -> Any:
        return x if options.no_bn else layers.BatchNormalization(axis=options.axis)(x)

    def unit(x: Any) -> Any:
        h = layers.ReLU()(normalized(layers.Conv2D(16, 1, padding="same")(x)))
        h = layers.ReLU()(normalized(layers.Conv2D(16, 3, padding="same")(h)))
        h = layers.Conv2D(32, 1, padding="same")(h)
        if not options.no_last_bn:
            h = normalized(h)
        return layers.ReLU()(layers.Add()([x, h]))

    inputs = keras.Input((32, 32, 3))
    x = layers.ReLU()(normalized(layers.Conv2D(32, 3, padding="same")(inputs)))
    for _ in range(3):
        x = unit(x)
    x = layers.GlobalAveragePooling2D()(x) if options.head == "pooling" else layers.Flatten()(x)
    x = layers.Dense(32)(x)
    if options.head == "bn":
        x = layers.BatchNormalization()(x)
    x = layers.LeakyReLU()(x) if options.head == "leaky" else layers.ReLU()(x)
    return keras.Model(inputs, layers.Dense(10, activation="softmax")(x))


class Progress(keras.callbacks.Callback):
    """One line an epoch."""

    def on_epoch_end(self, epoch: int, logs: dict[str, float] | None = None) -> None:
        """Print the accuracies."""
        logs = logs or {}
        print(
            f"epoch {epoch + 1:2}: training accuracy {logs['accuracy']:.3f}, "
            f"evaluation accuracy {logs['val_accuracy']:.3f}",
            flush=True,
        )


def options(downloads: Mapping[str, data.Download]) -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser: argparse.ArgumentParser = data.parser(__doc__, downloads, epochs=5, batch=32)
    parser.add_argument("--no-bn", action="store_true", help="without batch normalization")
    parser.add_argument("--axis", type=int, choices=[1, 3, -1], default=-1, help="of batch normalization")
    parser.add_argument("--symmetric-input", action="store_true", help="inputs from -1 to 1 instead of 0 to 1")
    parser.add_argument("--no-last-bn", action="store_true", help="no batch normalization in front of the additions")
    parser.add_argument(
        "--head",
        choices=["flatten", "pooling", "bn", "leaky"],
        default="flatten",
        help="what leads to the classifier: Flatten as posted, or global average pooling, batch normalization in front "
        "of its ReLU, or a leaky ReLU, which all help; default: %(default)s",
    )
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Train as the command line says and return the exit status."""
    downloads = {"cifar10": keras.datasets.cifar10.load_data, "mnist": keras.datasets.mnist.load_data}
    parser = options(downloads)
    chosen = parser.parse_args(arguments)
    try:
        images = data.load(chosen.data, (32, 32, 3), downloads, limit=chosen.limit)
    except data.DataError as error:
        parser.error(str(error))

    def scaled(x: data.Images) -> Any:
        x = x.astype(np.float32) / 256
        return x * 2 - 1 if chosen.symmetric_input else x

    def one_hot(y: data.Labels) -> Any:
        return keras.utils.to_categorical(y, 10)

    keras.utils.set_random_seed(chosen.seed)
    model = residual_net(chosen)
    model.compile(optimizer="adam", loss="categorical_crossentropy", metrics=["accuracy"])
    model.fit(
        scaled(images.x_train),
        one_hot(images.y_train),
        validation_data=(scaled(images.x_test), one_hot(images.y_test)),
        batch_size=chosen.batch,
        epochs=chosen.epochs,
        verbose=0,
        callbacks=[Progress()] if chosen.no_watch else [Progress(), BatchNormWatch(chosen.log_dir)],
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
