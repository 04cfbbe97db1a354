"""What the field's detectors are shown of a trained model, of either framework.

Taken when a program has ended. The look in training mode comes last: it moves running statistics.
"""

from __future__ import annotations

import math
from collections import Counter
from typing import TYPE_CHECKING, Any

import numpy as np

from benchmarks.clinic.peers import Activation, Kernel, Network

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from numpy.typing import NDArray

    from benchmarks.clinic.case import Subject

EXAMPLES = 128
"""Training examples that are looked at, as one batch."""

KINDS = {
    "relu": "relu", "tanh": "tanh", "sigmoid": "sigmoid", "softmax": "softmax", "elu": "exponential",
    "leakyrelu": "leaky", "leaky_relu": "leaky", "selu": "exponential", "softplus": "other", "gelu": "other",
    "batchnormalization": "batch_norm", "fixedbatchnormalization": "batch_norm",
    "dense": "linear", "conv1d": "linear", "conv2d": "linear",
    "linearfunction": "linear", "convolution2dfunction": "linear", "convolutionndfunction": "linear",
}  # fmt: skip
FUNCTIONS = frozenset({"relu", "tanh", "sigmoid", "softmax", "exponential", "leaky"})


class Epochs:
    """The weights of dense and convolutional layers at the ends of epochs: their means, and the last two themselves."""

    def __init__(self) -> None:
        self.means: dict[str, list[float]] = {}
        self.last: list[dict[str, NDArray[Any]]] = []

    def add(self, kernels: Mapping[str, NDArray[Any]]) -> None:
        """Take the weights by the names of their layers."""
        for name, weights in kernels.items():
            self.means.setdefault(name, []).append(float(weights.mean()))
        self.last = [*self.last[-1:], {name: weights.copy() for name, weights in kernels.items()}]

    def earlier(self, name: str) -> NDArray[Any] | None:
        """Return the weights one epoch before the end."""
        return self.last[0].get(name) if len(self.last) > 1 else None


def keras_epochs(epochs: Epochs) -> Any:
    """Return a Keras callback that fills ``epochs``."""
    import keras

    class Keep(keras.callbacks.Callback):  # type: ignore[misc]
        def on_epoch_end(self, _epoch: int, _logs: Any = None) -> None:
            epochs.add({path: np.asarray(layer.kernel) for path, layer in _with_kernels(self.model)})

    return Keep()


def chainer_epochs(epochs: Epochs, trainer: Any) -> None:
    """Have a Trainer fill ``epochs``."""

    def keep(trainer: Any) -> None:
        for optimizer in trainer.updater.get_all_optimizers().values():
            target = getattr(optimizer.target, "predictor", optimizer.target)
            epochs.add({path: link.W.array for path, link in _with_weights(target)})

    trainer.extend(keep, name="clinic-epochs", trigger=(1, "epoch"))


def chainer_rate(optimizer: Any) -> float | None:
    """Return the learning rate of an optimizer: Chainer calls Adam's ``alpha``."""
    rate = getattr(optimizer, "alpha", getattr(optimizer, "lr", None))
    return None if rate is None else float(rate)


def network_of(subject: Subject) -> Network:
    """Return what the detectors are shown of a trained model.

    Raises:
        TypeError: its data are no arrays.
    """
    x, y = subject.train
    parts = x if isinstance(x, list | tuple) else [x]
    if not all(isinstance(part, np.ndarray) for part in (*parts, y)):
        msg = "the training data are no arrays"
        raise TypeError(msg)
    rows = np.random.default_rng(0).permutation(len(y))[:EXAMPLES]
    inputs, targets = [part[rows] for part in parts], y[rows]
    many = subject.framework == "keras" and targets.ndim > 1 and targets.shape[-1] > 1
    if many and np.array_equal(targets.sum(axis=-1), np.ones(len(targets))):
        targets = targets.argmax(axis=-1)
    look = {"keras": _keras, "chainer": _chainer}[subject.framework]
    return look(subject, inputs, y[rows], targets)


def _history(subject: Subject) -> dict[str, list[float]]:
    """Return the history under the names that the detectors know."""
    found = {name: [*map(float, series)] for name, series in subject.history.items()}
    for prefix in ("", "val_"):
        given = [name for name in found if name.startswith(f"{prefix}") and "acc" in name]
        given = [name for name in given if name.startswith("val_") == bool(prefix)]
        if given and f"{prefix}accuracy" not in found:
            found[f"{prefix}accuracy"] = found[given[0]]
    if subject.epochs is not None:
        found |= {f"mean:{name}": means for name, means in subject.epochs.means.items()}
    return found


def _kernel(subject: Subject, name: str, weights: Any, gradient: Any) -> Kernel:
    earlier = None if subject.epochs is None else subject.epochs.earlier(name)
    return Kernel(name, np.asarray(weights, np.float64), np.asarray(gradient, np.float64), earlier)


def _paired(evaluation: Iterable[tuple[str, str, Any]], training: Iterable[tuple[str, str, Any]]) -> list[Activation]:
    """Return the outputs of both modes side by side; dropout has none of its own."""
    first, second = (_named([seen for seen in run if seen[1] != "dropout"]) for run in (evaluation, training))
    return [
        Activation(name, kind, second[name][1].astype(np.float64), array.astype(np.float64))
        for name, (kind, array) in first.items()
        if name in second and array.shape == second[name][1].shape
    ]


def _named(seen: list[tuple[str, str, Any]]) -> dict[str, tuple[str, NDArray[Any]]]:
    counted: Counter[str] = Counter()
    named = {}
    for place, (name, kind, array) in enumerate(seen):
        following = seen[place + 1][1] if place + 1 < len(seen) else ""
        counted[name] += 1
        own = f"{name} {counted[name]}" if counted[name] > 1 else name
        named[own] = ("other" if kind == "linear" and following in FUNCTIONS else kind, np.asarray(array))
    return named


def _probabilities(scores: NDArray[Any]) -> NDArray[Any]:
    """Return scores as probabilities: the tools would say the same of logits whatever the loss makes of them."""
    if scores.ndim < 2 or _are_probabilities(scores):
        return scores
    if scores.shape[-1] == 1:
        return np.asarray(1 / (1 + np.exp(-scores)))
    powers = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return np.asarray(powers / powers.sum(axis=-1, keepdims=True))


def _are_probabilities(scores: NDArray[Any]) -> bool:
    if scores.min() < 0 or scores.max() > 1:
        return False
    return scores.shape[-1] == 1 or bool(np.allclose(scores.sum(axis=-1), 1, atol=1e-3))


# Keras


def _with_kernels(model: Any) -> list[tuple[str, Any]]:
    from bnwatch.keras.looks import observable

    return [(path, layer) for path, layer in observable(model) if hasattr(getattr(layer, "kernel", None), "shape")]


def _keras(subject: Subject, inputs: list[Any], given: Any, targets: Any) -> Network:
    import keras
    import tensorflow as tf

    from bnwatch.keras.looks import observable
    from bnwatch.keras.swap import replaced

    model = subject.model
    data = inputs if isinstance(subject.train[0], list | tuple) else inputs[0]
    takes = getattr(model, "_call_has_training_arg", True)

    def outputs(*, training: bool) -> tuple[Any, list[tuple[str, str, Any]]]:
        seen: list[tuple[str, str, Any]] = []

        def observed(path: str, layer: Any) -> Any:
            own = layer.call

            def call(*args: Any, **options: Any) -> Any:
                output = own(*args, **options)
                if hasattr(output, "numpy") and len(output.shape) > 1 and len(output) == len(targets):
                    seen.append((path, _kind(layer), output.numpy()))
                return output

            return call

        with replaced({layer: observed(path, layer) for path, layer in observable(model)}, "call"):
            return (model(data, training=training) if takes else model(data)), seen

    def loss_of(scores: Any) -> Any:
        if getattr(model, "compiled", False) and getattr(model, "loss", None) is not None:
            return tf.cast(model.compute_loss(x=data, y=given, y_pred=scores), "float32")
        scores = tf.cast(scores, "float32")
        logits = not _are_probabilities(scores.numpy())
        if not np.issubdtype(targets.dtype, np.integer):
            return keras.losses.MeanSquaredError()(given, scores)
        if scores.shape[-1] == 1:
            return keras.losses.BinaryCrossentropy(from_logits=logits)(targets.reshape(-1, 1), scores)
        return keras.losses.SparseCategoricalCrossentropy(from_logits=logits)(targets, scores)

    kernels = [(path, layer) for path, layer in _with_kernels(model) if layer.trainable]
    with tf.GradientTape() as tape:
        scores, evaluation = outputs(training=False)
        loss = loss_of(scores)
    gradients = tape.gradient(loss, [layer.kernel.value for _, layer in kernels])
    found = [
        _kernel(subject, path, layer.kernel, tf.convert_to_tensor(gradient))
        for (path, layer), gradient in zip(kernels, gradients, strict=True)
        if gradient is not None
    ]
    trained, training = outputs(training=True)
    name, shown = _loss_name(model), np.asarray(scores, np.float64)
    classes = "crossentropy" in name or (not name and np.issubdtype(targets.dtype, np.integer))
    optimizer = getattr(model, "optimizer", None)
    rate = subject.learning_rate if optimizer is None else float(np.asarray(optimizer.learning_rate))
    return Network(
        task="classes" if classes else "numbers",
        inputs=inputs[0],
        targets=targets,
        scores=_probabilities(shown) if classes else shown,
        activations=_paired(evaluation, training),
        kernels=found,
        losses=(float(loss_of(trained)), float(loss)),
        history=_history(subject),
        loss=name,
        learning_rate=rate,
        dropout=max((getattr(layer, "rate", 0.0) for _, layer in observable(model)), default=0.0),
    )


def _kind(layer: Any) -> str:
    name = type(layer).__name__.lower()
    if "dropout" in name:
        return "dropout"
    function = getattr(getattr(layer, "activation", None), "__name__", "linear")
    return KINDS.get(name if function == "linear" else function, "other")


def _loss_name(model: Any) -> str:
    loss = getattr(model, "loss", None) if getattr(model, "compiled", False) else None
    if loss is None or isinstance(loss, str):
        return loss or ""
    return str(getattr(loss, "name", None) or getattr(loss, "__name__", ""))


# Chainer


def _with_weights(model: Any) -> list[tuple[str, Any]]:
    return [(path, link) for path, link in model.namedlinks() if getattr(getattr(link, "W", None), "ndim", 0) > 1]


def _chainer(subject: Subject, inputs: list[Any], given: Any, targets: Any) -> Network:
    import chainer

    model = subject.model
    with chainer.using_config("train", False), chainer.using_config("enable_backprop", True):
        scores, evaluation = _chainer_outputs(model, inputs, len(targets))
        loss = _chainer_loss(scores, given)
        kernels = [(path, link.W) for path, link in _with_weights(model) if link.W.array is not None]
        gradients = chainer.grad([loss], [weights for _, weights in kernels])
    found = [
        _kernel(subject, path, weights.array, gradient.array)
        for (path, weights), gradient in zip(kernels, gradients, strict=True)
        if gradient is not None
    ]
    with chainer.using_config("train", True), chainer.no_backprop_mode():
        trained, training = _chainer_outputs(model, inputs, len(targets))
    classes = np.issubdtype(targets.dtype, np.integer)
    shown = scores.array.astype(np.float64)
    dropouts = [ratio for _, kind, ratio in training if kind == "dropout"]
    return Network(
        task="classes" if classes else "numbers",
        inputs=inputs[0],
        targets=targets,
        scores=_probabilities(shown) if classes else shown,
        activations=_paired(evaluation, training),
        kernels=found,
        losses=(float(_chainer_loss(trained, given).array), float(loss.array)),
        history=_history(subject),
        learning_rate=subject.learning_rate,
        dropout=max(dropouts, default=0.0),
    )


def _chainer_outputs(model: Any, inputs: list[Any], examples: int) -> tuple[Any, list[tuple[str, str, Any]]]:
    """Return the model's output and those of its functions; of dropout, its ratio."""
    import chainer

    seen: list[tuple[str, str, Any]] = []

    class Look(chainer.FunctionHook):  # type: ignore[misc]
        name = "clinic-look"

        def forward_preprocess(self, node: Any, _in_data: Any) -> None:
            own = node.forward

            def forward(arrays: Any) -> Any:
                del node.forward
                outputs = own(arrays)
                label, output = node.label, outputs[0]
                if label == "Dropout":
                    seen.append((label, "dropout", node.dropout_ratio))
                elif getattr(output, "ndim", 0) > 1 and len(output) == examples:
                    name = "BatchNormalization" if KINDS.get(label.lower()) == "batch_norm" else label
                    seen.append((name, KINDS.get(label.lower(), "other"), output.copy()))
                return outputs

            node.forward = forward

    with Look(), np.errstate(all="ignore"):
        return model(*inputs), seen


def _chainer_loss(scores: Any, targets: Any) -> Any:
    from chainer import functions as F  # noqa: N812 - the name that all Chainer code uses

    scores = F.cast(scores, np.float32)
    if not np.issubdtype(targets.dtype, np.integer):
        return F.mean_squared_error(scores, targets.astype(np.float32))
    if scores.size == len(targets):
        return F.sigmoid_cross_entropy(scores.reshape(-1), targets)
    if _are_probabilities(scores.array):
        return F.softmax_cross_entropy(F.log(scores + math.ulp(1.0)), targets)
    return F.softmax_cross_entropy(scores, targets)
