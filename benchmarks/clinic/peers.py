"""The field's detectors of training faults, written anew from their published formulas and default thresholds.

Each is a pure function of a `Network`: what one look at the trained network gives, and the epochs of its training. The
tools themselves run on frameworks of their time only, and some stop at batch normalization; here each formula is
applied wherever it makes sense on today's network, which is the benefit of the doubt. The tools look during training,
this looks at its end and at its history.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from numpy.typing import NDArray

    from benchmarks.clinic.case import Subject

    Array = NDArray[np.floating]


@dataclass(frozen=True, slots=True)
class Activation:
    """The output of one layer on the same examples in either mode.

    Attributes:
        name: the layer's, or the function's.
        kind: the activation function (``relu``, ``softmax``), or ``batch_norm``, ``dropout``, else ``linear``.
        training: the output in training mode, examples first; dropout draws.
        evaluation: the output in evaluation mode.
    """

    name: str
    kind: str
    training: Array
    evaluation: Array


@dataclass(frozen=True, slots=True)
class Kernel:
    """The weights of one dense or convolutional layer.

    Attributes:
        name: the layer's.
        weights: at the end of training.
        gradient: that of the loss in evaluation mode, of the same shape.
        earlier: the weights one epoch before the end; None where they were not kept.
    """

    name: str
    weights: Array
    gradient: Array
    earlier: Array | None = None


@dataclass(frozen=True, slots=True)
class Network:
    """A trained network as the tools see it.

    Attributes:
        task: what is learned.
        inputs: training examples, as the network gets them.
        targets: their labels (classes as indices), or what is to be regressed.
        scores: the output for them in evaluation mode; probabilities where classes are learned.
        activations: every layer's, in the order of execution.
        kernels: in the order of execution.
        losses: of the same examples in training and in evaluation mode.
        history: a list a quantity, one number an epoch: ``loss``, ``accuracy``, ``val_loss``, ``val_accuracy``, and
            ``mean:NAME`` of kernels. What was not measured is missing.
        loss: the name of the loss function; "" where it has none that says something.
        learning_rate: at the end; None if unknown.
        dropout: the largest share of units that is dropped.
    """

    task: Literal["classes", "numbers"]
    inputs: Array
    targets: NDArray[np.generic]
    scores: Array
    activations: Sequence[Activation]
    kernels: Sequence[Kernel]
    losses: tuple[float, float]
    history: Mapping[str, Sequence[float]]
    loss: str = ""
    learning_rate: float | None = None
    dropout: float = 0.0

    def epochs(self, name: str) -> Array:
        """Return one quantity of the history, shape ``(epochs,)``; empty where it was not measured."""
        return np.asarray(self.history.get(name, ()), np.float64)


def linear_cka(first: Array, second: Array) -> float:
    """Return the linear centered kernel alignment of two activations of the same examples; NaN if one is constant.

    Both have shape ``(examples, ...)``. 1 is equality up to rotation and scale (Kornblith et al., 2019).
    """
    centered = [
        (a.reshape(len(a), -1) - a.reshape(len(a), -1).mean(axis=0)).astype(np.float64) for a in (first, second)
    ]
    k, l = (a @ a.T for a in centered)  # noqa: E741 - the letters of the formula
    norms = np.linalg.norm(k) * np.linalg.norm(l)
    return float((k * l).sum() / norms) if norms > 0 else float("nan")


def switch_mode(network: Network) -> Iterator[str]:
    """TheDeepChecker's consistency of the modes (Ben Braiek and Khomh, 2023; its default settings)."""
    training, evaluation = network.losses
    largest = max(abs(training), abs(evaluation))
    if largest > 0 and abs(training - evaluation) / largest > 0.5:
        yield f"loss differs between the modes: {training:.3g} in training, {evaluation:.3g} in evaluation"
    for activation in network.activations:
        alignment = linear_cka(activation.training, activation.evaluation)
        if alignment <= 0.75:
            yield f"activation of {activation.name} differs between the modes: CKA {alignment:.2f}"


def autotrainer(network: Network) -> Iterator[str]:
    """AUTOTRAINER's symptoms (Zhang et al., 2021; ``default_param``). Its gradients are those of evaluation mode."""
    if network.kernels:
        yield from _gradient_symptoms(network)
    accuracy = network.epochs("accuracy")
    if oscillating(accuracy):
        yield "oscillating loss"
    if slow(accuracy, network.epochs("val_accuracy")):
        yield "slow convergence"
    if network.task == "classes":
        if np.abs(network.scores).reshape(len(network.scores), -1).sum(axis=1).max() > 1.1:
            yield "improper activation"
        needed = "binary" if network.scores.shape[-1] <= 2 else "categorical"
        if (network.loss and needed not in network.loss) or (network.epochs("loss") < 0).any():
            yield "improper loss"
    if any(np.abs(activation.evaluation).mean() >= 10 for activation in network.activations):
        yield "abnormal data"


def _gradient_symptoms(network: Network) -> Iterator[str]:
    norms = [float(np.linalg.norm(kernel.gradient)) for kernel in network.kernels]
    gradients = _joined(kernel.gradient for kernel in network.kernels)
    ratio = norms[0] / norms[-1] if norms[-1] else np.inf if norms[0] else np.nan
    if ratio < 1e-3 and norms[0] < 1e-4:
        yield "vanishing gradient"
    broken = np.isnan(gradients).any() or any(np.isnan(kernel.weights).any() for kernel in network.kernels)
    if ratio > 70 or (np.isnan(network.epochs("loss")).any() and broken):
        yield "exploding gradient"
    if (gradients == 0).mean() >= 0.7:
        yield "dying ReLU"


def oscillating(accuracy: Array) -> bool:
    """Return whether accuracies fall from a local maximum to the next minimum by .03 or more in a fifth of the epochs.

    The first 30 % of the epochs, shape ``(epochs,)``, do not count.
    """
    late = accuracy[int(0.3 * len(accuracy)) :]
    if len(late) < 3:
        return False
    inner = np.sign(np.diff(late))
    turns = late[1:-1][inner[:-1] * inner[1:] < 0]
    swings = np.abs(np.diff(turns)) >= 0.03 - 1e-12
    return bool(swings.sum() and swings.sum() >= 0.2 * len(accuracy))


def slow(accuracy: Array, validation: Array) -> bool:
    """Return whether accuracies, shape ``(epochs,)``, stay below .7 and never rise by .01 from epoch to epoch.

    The first 30 % of the epochs do not count.
    """
    known = [series[int(0.3 * len(series)) :] for series in (accuracy, validation) if len(series)]
    known = [series for series in known if len(series) > 1]
    return bool(known) and all(series.max() < 0.7 and np.diff(series).max() < 0.01 for series in known)


def deep_diagnosis(network: Network) -> Iterator[str]:
    """DeepDiagnosis' symptoms (Wardat et al., 2022; its callback), which itself stops at any batch normalization."""
    for activation in network.activations:
        yield from _output_symptoms(activation)
    for kernel in network.kernels:
        yield from _weight_symptoms(kernel, network)
    loss, accuracy = network.epochs("loss"), network.epochs("accuracy")
    if unchanged(loss, 5):
        yield "loss not decreasing"
    if unchanged(accuracy, 20):
        yield "accuracy not increasing"
    if not np.isfinite(loss).all():
        yield "invalid loss"
    if len(accuracy) and not (np.isfinite(accuracy).all() and accuracy.all()):
        yield "invalid accuracy"
    if np.ptp(network.scores) > 10 * np.ptp(network.targets.astype(np.float64)):
        yield "output out of range"


def _output_symptoms(activation: Activation) -> Iterator[str]:
    values = activation.evaluation
    if activation.kind in {"relu", "exponential"} and (values <= 0).mean() >= 0.7:
        yield f"dead node: {activation.name}"
    if activation.kind in SATURATED:
        low, high = SATURATED[activation.kind]
        if ((values <= low) | (values >= high)).mean() > 0.5:
            yield f"saturated activation: {activation.name}"
    if _numerical_error(values):
        yield f"numerical error: output of {activation.name}"


def _weight_symptoms(kernel: Kernel, network: Network) -> Iterator[str]:
    if _numerical_error(kernel.weights) or _numerical_error(kernel.gradient):
        yield f"numerical error: {kernel.name}"
    if np.abs(kernel.gradient).mean() < 1e-7:
        yield f"vanishing gradient: {kernel.name}"
    if not 1e-5 <= kernel.weights.var() <= 10:
        yield f"poor weights: variance {kernel.weights.var():.3g} of {kernel.name}"
    if unchanged(network.epochs(f"mean:{kernel.name}"), 5):
        yield f"unchanged weights: {kernel.name}"
    if network.learning_rate is not None and kernel.earlier is not None:
        moved = np.linalg.norm(kernel.weights - kernel.earlier)
        ratio = network.learning_rate * moved / np.linalg.norm(kernel.weights)
        if not 1e-5 <= ratio <= 0.1:
            yield f"learning rate: {kernel.name} moves by {ratio:.2g} of its norm"


SATURATED = {"tanh": (np.tanh(-5.0), np.tanh(5.0)), "sigmoid": (1 / (1 + np.exp(5.0)), 1 / (1 + np.exp(-5.0)))}
"""What activation functions give at -5 and 5."""


def unchanged(series: Array, last: int) -> bool:
    """Return whether the last epochs of a series are all the same: their mean is their largest."""
    tail = series[-last:]
    return len(tail) == last and bool(tail.mean() == tail.max())


def umlaut(network: Network) -> Iterator[str]:
    """UMLAUT's heuristics (Schoop et al., 2021; ``heuristics.py``), of which those of epochs begin at the fourth.

    An activation function behind batch normalization does not count as that of the layer before it, as in the tool.
    """
    hidden = [a for a in network.activations[:-1] if a.kind == "linear"]
    if hidden:
        yield f"no activation function: {hidden[0].name}"
    if network.dropout > 0.5:
        yield "dropout of more than half"
    inputs = network.inputs
    if inputs.ndim == 4 and inputs.shape[2] not in {inputs.shape[1], inputs.shape[3]}:
        yield "images are not square"
    if np.abs(inputs).max() > 1:
        yield "inputs exceed the range of -1 to 1"
    if not np.issubdtype(inputs.dtype, np.floating):
        yield "inputs are integers"
    if network.learning_rate is not None and not 1e-7 <= network.learning_rate <= 0.01:
        yield f"learning rate {network.learning_rate:g}"
    yield from _epoch_heuristics(network)


def _epoch_heuristics(network: Network) -> Iterator[str]:
    loss, held_out_loss = network.epochs("loss"), network.epochs("val_loss")
    if np.isnan(loss).any():
        yield "loss is not a number"
    both = min(len(loss), len(held_out_loss))
    if ((np.diff(held_out_loss[:both]) > 0) & (np.diff(loss[:both]) <= 0)).any():
        yield "overfitting: validation loss rises while training loss does not"
    accuracy, held_out = network.epochs("accuracy")[3:], network.epochs("val_accuracy")[3:]
    if (held_out > 0.95).any():
        yield "validation accuracy is suspiciously high"
    both = min(len(accuracy), len(held_out))
    if (held_out[:both] - accuracy[:both] > 0.05).any():
        yield "validation accuracy exceeds training accuracy"


TOOLS: dict[str, Callable[[Network], Iterator[str]]] = {
    "TheDeepChecker": switch_mode,
    "AUTOTRAINER": autotrainer,
    "DeepDiagnosis": deep_diagnosis,
    "UMLAUT": umlaut,
}
"""The detectors by the name of the tool."""

NAMES_BATCH_NORM = frozenset({"TheDeepChecker"})
"""Tools that can say that training and evaluation mode differ; no other has a word for batch normalization."""


def findings(subject: Subject) -> dict[str, list[str]]:
    """Return what every tool reports of a trained model, nothing included.

    Under ``none``, where its data or its kind keep it from being shown to them, the reason.
    """
    from benchmarks.clinic.networks import network_of

    try:
        with np.errstate(all="ignore"):
            network = network_of(subject)
            return {name: list(tool(network)) for name, tool in TOOLS.items()}
    except Exception as error:  # noqa: BLE001 - users' models refuse in many ways
        return {"none": [f"{type(error).__name__}: {error}"]}


def _joined(arrays: Iterator[Array]) -> Array:
    return np.concatenate([array.ravel() for array in arrays])


def _numerical_error(values: Array) -> bool:
    mean = values.mean()
    return bool(not np.isfinite(mean) or mean == 0)
