"""Healthy networks, most of them of a kind that looks like a fault."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import keras
import numpy as np
from keras import layers, ops

from benchmarks.clinic.case import case
from benchmarks.clinic.data import digits
from benchmarks.clinic.keras_parts import CLASSES, backbone, batch_norm, cnn, compiled, mlp

if TYPE_CHECKING:
    from benchmarks.clinic.case import Run


@case("OK-01", expects=None, framework="keras")
def keras_default_momentum(run: Run) -> None:
    """A small CNN with Keras's default momentum of .99 for 660 steps: https://github.com/keras-team/keras-io."""
    x, y, xv, yv = digits()
    model = compiled(cnn((16, 32), momentum=0.99))
    run.fit(model, x, y, validation_data=(xv, yv), epochs=15, batch_size=32)


@case("OK-03", expects=None, framework="keras")
def relu_then_norm_then_dropout(run: Run) -> None:
    """ReLU, batch norm, dropout, in this order: https://github.com/ageron/handson-ml."""
    x, y, xv, yv = digits(flat=True)
    model = keras.Sequential([keras.Input((64,))])
    for _ in range(2):
        model.add(layers.Dense(128, activation="relu"))
        model.add(layers.BatchNormalization())
        model.add(layers.Dropout(0.3))
    model.add(layers.Dense(CLASSES))
    run.fit(compiled(model), x, y, validation_data=(xv, yv), epochs=15, batch_size=32)


@case("OK-05", expects=None, framework="keras")
def mobile_net_with_a_shorter_memory(run: Run) -> None:
    """MobileNetV2 from scratch, momentum .9.

    https://github.com/keras-team/keras/tree/master/keras/src/applications
    """
    x, y, xv, yv = digits()
    x, xv = (np.repeat(ops.image.resize(part, (32, 32)), 3, axis=-1) for part in (x[:700], xv))
    model = keras.applications.MobileNetV2((32, 32, 3), alpha=0.35, weights=None, classes=CLASSES)
    for layer in model.layers:
        if isinstance(layer, layers.BatchNormalization):
            layer.momentum = 0.9
    loss = keras.losses.SparseCategoricalCrossentropy()
    run.fit(compiled(model, 2e-3, loss=loss), x, y[:700], validation_data=(xv, yv), epochs=4, batch_size=32)


@case("OK-14", expects=None, framework="keras")
def no_memory_at_all(run: Run) -> None:
    """Momentum 0 as in PointNet, batches all full: https://keras.io/examples/vision/pointnet/."""
    x, y, xv, yv = digits()
    model = compiled(cnn((16, 32), momentum=0.0))
    run.fit(model, x[:1376], y[:1376], validation_data=(xv, yv), epochs=10, batch_size=32)


@case("OK-17", expects=None, framework="keras")
def mixed_float16(run: Run) -> None:
    """Dense layers under mixed_float16: https://keras.io/api/mixed_precision/."""
    keras.config.set_dtype_policy("mixed_float16")
    x, y, xv, yv = digits(flat=True)
    model = keras.Sequential([mlp(), layers.Activation("linear", dtype="float32")])
    run.fit(compiled(model), x, y, validation_data=(xv, yv), epochs=10, batch_size=32)


@case("OK-17/bfloat16", expects=None, framework="keras")
def mixed_bfloat16(run: Run) -> None:
    """A CNN under mixed_bfloat16, inputs of three digits."""
    keras.config.set_dtype_policy("mixed_bfloat16")
    x, y, xv, yv = digits()
    model = keras.Sequential([cnn((16, 32)), layers.Activation("linear", dtype="float32")])
    run.fit(compiled(model), 255 * x, y, validation_data=(255 * xv, yv), epochs=8, batch_size=32)


@case("OK-21", expects=None, framework="keras")
def normalized_logits(run: Run) -> None:
    """Batch norm on the logits, in front of softmax: unusual, and harmless."""
    x, y, xv, yv = digits(flat=True)
    model = keras.Sequential(
        [
            keras.Input((64,)),
            layers.Dense(64, activation="relu"),
            layers.Dense(CLASSES, use_bias=False),
            batch_norm(),
            layers.Softmax(),
        ]
    )
    loss = keras.losses.SparseCategoricalCrossentropy()
    run.fit(compiled(model, loss=loss), x, y, validation_data=(xv, yv), epochs=15, batch_size=32)


@case("OK-22/twice", expects=None, framework="keras")
def two_views_through_one_net(run: Run) -> None:
    """One net is called on two noisy views of the same images, and their scores are averaged."""
    x, y, xv, yv = digits(flat=True)
    rng = np.random.default_rng(run.seed)

    def views(images: Any) -> list[Any]:
        return [images + rng.normal(0.0, 0.2, images.shape).astype("float32") for _ in range(2)]

    net = mlp()
    one, other = keras.Input((64,)), keras.Input((64,))
    model = compiled(keras.Model([one, other], layers.Average()([net(one), net(other)])))
    run.fit(model, views(x), y, validation_data=(views(xv), yv), epochs=10, batch_size=32)


@case("OK-22/siamese", expects=None, framework="keras")
def siamese_of_one_kind(run: Run) -> None:
    """A shared tower on pairs of digits that are all of one kind."""
    x, y, xv, yv = digits(flat=True)
    rng = np.random.default_rng(run.seed)

    def pairs(images: Any, classes: Any, number: int) -> tuple[Any, Any]:
        first = rng.integers(0, len(images), number)
        same = rng.integers(0, 2, number)
        wanted = (classes[first] + (1 - same) * rng.integers(1, 10, number)) % 10
        second = np.array([rng.choice(np.flatnonzero(classes == c)) for c in wanted])
        return [images[first], images[second]], same

    tower = mlp(outputs=32)
    one, other = keras.Input((64,)), keras.Input((64,))
    apart = layers.Lambda(lambda both: ops.square(both[0] - both[1]))([tower(one), tower(other)])
    model = keras.Model([one, other], layers.Dense(1, activation="sigmoid")(apart))
    model.compile("adam", "binary_crossentropy", metrics=["accuracy"])
    run.fit(model, *pairs(x, y, 4000), validation_data=pairs(xv, yv, 800), epochs=8, batch_size=64)


def residual(*, momentum: float = 0.99, blocks: int = 6, **last: Any) -> Any:
    """Return a residual network, the last batch norm of each block made with ``last``."""
    inputs = keras.Input((8, 8, 1))
    x = backbone(inputs, (16,), momentum=momentum)
    for _ in range(blocks):
        y = backbone(x, (16,), momentum=momentum)
        y = layers.Conv2D(16, 3, padding="same", use_bias=False)(y)
        y = layers.BatchNormalization(momentum=momentum, **last)(y)
        x = layers.ReLU()(layers.Add()([x, y]))
    return keras.Model(inputs, layers.Dense(CLASSES)(layers.GlobalAveragePooling2D()(x)))


@case("OK-22/residual", expects=None, framework="keras")
def residual_net_at_chance_at_first(run: Run) -> None:
    """A residual net whose first evaluations are at chance while its moving averages settle."""
    x, y, xv, yv = digits(raw=True)
    run.fit(compiled(residual()), x, y, validation_data=(xv, yv), epochs=10, batch_size=32)


@case("OK-22/zero-gamma", expects=None, framework="keras")
def blocks_that_begin_as_nothing(run: Run) -> None:
    """A residual net whose blocks begin with gamma 0, as is advised for large batches."""
    x, y, xv, yv = digits()
    model = residual(momentum=0.9, blocks=4, gamma_initializer="zeros")
    run.fit(compiled(model), x, y, validation_data=(xv, yv), epochs=8, batch_size=32)


@case("OK-22/augmented", expects=None, framework="keras")
def augmentation(run: Run) -> None:
    """Training images are shifted, turned and noisy, and so harder than those of validation."""
    x, y, xv, yv = digits()
    model = keras.Sequential(
        [
            keras.Input((8, 8, 1)),
            layers.RandomTranslation(0.15, 0.15, fill_mode="constant"),
            layers.RandomRotation(0.1, fill_mode="constant"),
            layers.GaussianNoise(0.2),
            cnn(),
        ]
    )
    run.fit(compiled(model), x, y, validation_data=(xv, yv), epochs=12, batch_size=32)


@case("OK-22/sixteen", expects=None, framework="keras")
def batches_of_sixteen(run: Run) -> None:
    """A CNN at batch size 16."""
    x, y, xv, yv = digits()
    run.fit(compiled(cnn()), x, y, validation_data=(xv, yv), epochs=6, batch_size=16)


@case("OK-22/last-batch", expects=None, framework="keras")
def last_batch_a_little_smaller(run: Run) -> None:
    """The last batch of each epoch has 56 of 64 examples."""
    x, y, xv, yv = digits(flat=True)
    run.fit(compiled(mlp()), x, y, validation_data=(xv, yv), epochs=12, batch_size=64)


@case("OK-22/two-fits", expects=None, framework="keras")
def trained_in_two_fits(run: Run) -> None:
    """Training goes on in a second ``fit`` at a smaller rate."""
    x, y, xv, yv = digits()
    model = cnn((16, 32), momentum=0.99)
    run.fit(compiled(model), x, y, validation_data=(xv, yv), epochs=8, batch_size=32)
    run.fit(compiled(model, 1e-4), x, y, validation_data=(xv, yv), epochs=4, batch_size=32)


@case("OK-22/group-norm", expects=None, framework="keras")
def group_norm_beside_batch_norm(run: Run) -> None:
    """Group norm in two layers, batch norm in one."""
    x, y, xv, yv = digits()
    inputs = keras.Input((8, 8, 1))
    h = inputs
    for norm in (layers.GroupNormalization(4), batch_norm(), layers.GroupNormalization(4)):
        h = layers.ReLU()(norm(layers.Conv2D(16, 3, padding="same")(h)))
    model = keras.Model(inputs, layers.Dense(CLASSES)(layers.Flatten()(layers.MaxPooling2D()(h))))
    run.fit(compiled(model), x, y, validation_data=(xv, yv), epochs=8, batch_size=32)
