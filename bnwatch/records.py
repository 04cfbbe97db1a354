"""What crosses the seam between a framework and the core: plain, frozen, framework-free records."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from numpy.typing import NDArray

    Vector = NDArray[np.floating]

Source = Literal["measured", "probed", "recovered"]
"""How a statistic was had: seen in the forward pass, computed on probe data, or solved from a moving average."""


@dataclass(frozen=True, slots=True)
class LayerSpec:
    """A batch-normalization layer as its framework built it.

    Attributes:
        path: unique name inside the model, as the user knows it (``encoder/bn_2``).
        kind: class name.
        channels: number of channels.
        epsilon: added to the variance before the square root.
        decay: weight of the *old* value in the running statistics: Keras ``momentum``, Chainer ``decay``.
        bessel_corrected: the running variance is kept with m/(m-1), as Chainer does and Keras 3 does not.
        trainable: False for a layer the user froze.
        axis: channel axis, or the axes reduced over where that is what the framework stores.
        initial: the mean and variance the running statistics start from.
        built_at: ``file.py:12`` where the layer was built, when known.
        called_at: the same for the line that each call site is called from, by its index; None where not known.
    """

    path: str
    kind: str
    channels: int
    epsilon: float
    decay: float
    bessel_corrected: bool = False
    trainable: bool = True
    axis: tuple[int, ...] | None = None
    initial: tuple[float, float] = (0.0, 1.0)
    built_at: str | None = None
    called_at: tuple[str | None, ...] = ()


@dataclass(frozen=True, slots=True, order=True)
class CallSite:
    """The ``index``-th call of a layer object within one forward pass: sharing is visible by construction."""

    layer: str
    index: int = 0
    replica: int = 0

    def __str__(self) -> str:
        """Return the name used in logs: ``bn#0``, or ``bn#0@1`` on another replica than the first."""
        return f"{self.layer}#{self.index}" + (f"@{self.replica}" if self.replica else "")


@dataclass(frozen=True, slots=True)
class BatchStatistics:
    """Mean and *biased* variance over a batch, shape ``(channels,)``; ``count`` is the elements per channel."""

    mean: Vector
    var: Vector
    count: int
    source: Source = "measured"


@dataclass(frozen=True, slots=True)
class RunningStatistics:
    """What evaluation normalizes with, shape ``(channels,)``, as the framework stores it.

    Attributes:
        mean: moving mean.
        var: moving variance, Bessel-corrected if ``bessel_corrected``.
        decay: weight of the old value.
        updates: how often it was updated since its initial values; None when that is not known.
        bessel_corrected: whether ``var`` holds m/(m-1) times the biased variance.
    """

    mean: Vector
    var: Vector
    decay: float
    updates: int | None
    bessel_corrected: bool = False


@dataclass(frozen=True, slots=True)
class PopulationStatistics:
    """A precise re-estimate of mean and biased variance over ``batches`` batches with frozen weights."""

    mean: Vector
    var: Vector
    count: int
    batches: int


@dataclass(frozen=True, slots=True)
class CallRecord:
    """One training-mode call of one layer, with the running statistics *after* the step."""

    spec: LayerSpec
    site: CallSite
    batch: BatchStatistics
    running: RunningStatistics


@dataclass(frozen=True, slots=True)
class StepSnapshot:
    """Everything seen at one sampled training step.

    Attributes:
        step: training steps finished, counted from 1 and never going back.
        epoch: epoch the step belongs to, from 0.
        calls: in the order of the forward pass.
        accuracy: training accuracy as the framework reports it so far this epoch, in [0, 1]; None when unknown.
        loss: training loss, likewise.
        examples: training examples behind ``accuracy``; 0 when unknown.
        idle: paths of layers that the step called in inference mode, and never in training mode.
    """

    step: int
    epoch: int
    calls: tuple[CallRecord, ...]
    accuracy: float | None = None
    loss: float | None = None
    examples: int = 0
    idle: tuple[str, ...] = ()


CHANNEL_STATISTICS = ("batch_mean", "batch_std", "running_mean", "running_std")
"""Rows of `ChannelStatistics` for each call site; both deviations are of biased variances, without epsilon."""


@dataclass(frozen=True, slots=True)
class ChannelStatistics:
    """What one layer's channels are normalized with at one sampled step.

    Attributes:
        step: training steps finished.
        epoch: epoch the step belongs to, from 0.
        layer: path of the layer.
        sites: its call sites, or the first of many.
        channels: numbers of the channels that are kept, ascending.
        of: channels in all.
        values: float32, shape ``(len(sites) * 4, len(channels))``: the rows of a site are `CHANNEL_STATISTICS`.
    """

    step: int
    epoch: int
    layer: str
    sites: tuple[CallSite, ...]
    channels: tuple[int, ...]
    of: int
    values: NDArray[np.float32]

    def __getitem__(self, statistic: str) -> NDArray[np.float32]:
        """Return one of `CHANNEL_STATISTICS`, shape ``(len(sites), len(channels))``."""
        rows: NDArray[np.float32] = self.values[CHANNEL_STATISTICS.index(statistic) :: len(CHANNEL_STATISTICS)]
        return rows

    def apart(self, epsilon: float) -> dict[str, NDArray[np.floating]]:
        """Return how far batch and running statistics are apart, each of shape ``(len(sites), len(channels))``.

        ``mean_shift`` is (batch - running mean) in running standard deviations, ``std_ratio`` is batch / running
        standard deviation; ``epsilon`` of the layer is added to both variances, as normalization does.
        """
        with np.errstate(all="ignore"):
            wide = [np.square(self[name].astype(np.float64)) + epsilon for name in ("batch_std", "running_std")]
            return {
                "mean_shift": (self["batch_mean"] - self["running_mean"]) / np.sqrt(wide[1]),
                "std_ratio": np.sqrt(wide[0] / wide[1]),
            }


@dataclass(frozen=True, slots=True)
class EvaluationRecord:
    """One evaluation, and the training it is compared with.

    Attributes:
        step: training steps finished when it ran.
        epoch: epoch just finished, from 0.
        accuracy: evaluation accuracy in [0, 1]; None when no accuracy is reported.
        loss: evaluation loss.
        examples: evaluation examples; 0 when unknown.
        train_accuracy: training accuracy over the same epoch.
        train_loss: training loss over the same epoch.
        train_examples: training examples behind ``train_accuracy``; 0 when unknown.
        classes: number of classes; 0 when unknown.
        majority: share of the most frequent class among the labels; None when unknown.
        batch_statistics: paths of layers that normalized with batch statistics during this evaluation.
        moved: paths of layers whose running statistics are not what the last training step left.
        still: paths of layers that normalized with batch statistics in training while their scale and offset stayed, to
            the bit, what they were when the watch began; none where no parameter of the model moved.
        swapped: whether the trained parameters are others than the last training step left; None when unknown.
    """

    step: int
    epoch: int
    accuracy: float | None = None
    loss: float | None = None
    examples: int = 0
    train_accuracy: float | None = None
    train_loss: float | None = None
    train_examples: int = 0
    classes: int = 0
    majority: float | None = None
    batch_statistics: tuple[str, ...] = ()
    moved: tuple[str, ...] = ()
    still: tuple[str, ...] = ()
    swapped: bool | None = None

    @property
    def gap(self) -> float | None:
        """Return training minus evaluation accuracy; None where one of them is unknown."""
        if self.accuracy is None or self.train_accuracy is None:
            return None
        return self.train_accuracy - self.accuracy


@dataclass(frozen=True, slots=True)
class Attachment:
    """What a tap found when it was attached.

    Attributes:
        layers: the watched layers in network order.
        unsupported: layers that normalize but cannot be watched, with the reason.
        framework: ``keras 3.15.1 (tensorflow)`` and the like, for the record.
        unseen: why the statistics of other replicas are not seen; None where they are, or where there are none.
        unrestored: paths of layers whose running statistics are exactly the initial values while their scale or offset
            are trained.
        initial: paths of layers whose running statistics were exactly the initial values when the watch began.
    """

    layers: tuple[LayerSpec, ...]
    unsupported: Mapping[str, str] = field(default_factory=dict)
    framework: str = ""
    unseen: str | None = None
    unrestored: tuple[str, ...] = ()
    initial: tuple[str, ...] = ()


Layout = Literal["channels_first", "channels_last"]


@dataclass(frozen=True, slots=True)
class Place:
    """What the graph says of one call site of a batch-normalization layer.

    Attributes:
        site: the call site.
        rank: axes of its input, that of the examples included; None when unknown.
        axis: which of them is normalized, counted from 0; None when unknown.
        elements: elements a channel has in one example; None when unknown.
        producer: path of the layer that makes its input; None for an input of the model, or when unknown.
        kind: class name of that layer.
        layout: where the channels of its input are, as the layers that made it say; None when they do not.
        bias: the producer adds a bias to each channel which nothing but batch normalization sees.
        dropout: path of the nearest dropout before it, with linear or elementwise layers at most in between.
        rate: share that this dropout sets to zero.
        output: its result is an output of the model, directly or through a sigmoid or softmax.
        mask: path of the layer that marks padded positions of its input, which are counted all the same.
    """

    site: CallSite
    rank: int | None = None
    axis: int | None = None
    elements: int | None = None
    producer: str | None = None
    kind: str | None = None
    layout: Layout | None = None
    bias: bool = False
    dropout: str | None = None
    rate: float = 0.0
    output: bool = False
    mask: str | None = None

    @property
    def channel_axis(self) -> int | None:
        """Return the axis of the channels, counted from 0; None when it is not known."""
        if self.rank is None or self.layout is None:
            return None
        return 1 if self.layout == "channels_first" else self.rank - 1


@dataclass(frozen=True, slots=True)
class Usage:
    """How a model uses one batch-normalization layer.

    ``places`` are in the order of the forward pass. There is none where the model never calls the layer, or where its
    calls are hidden: see `Structure`.
    """

    path: str
    kind: str
    decay: float
    trainable: bool = True
    places: tuple[Place, ...] = ()


@dataclass(frozen=True, slots=True)
class Output:
    """How a classifier ends, and what its loss expects.

    Attributes:
        path: of the layer that makes the scores.
        units: scores an example; None when unknown.
        activation: of the scores, ``softmax``, ``sigmoid``, ``linear`` and the like; None when unknown.
        loss: name of the loss, as the framework calls it; None for one of the user's own.
        from_logits: the loss applies softmax or sigmoid itself; None when unknown.
    """

    path: str
    units: int | None = None
    activation: str | None = None
    loss: str | None = None
    from_logits: bool | None = None


@dataclass(frozen=True, slots=True)
class Structure:
    """What is known before the first step.

    Attributes:
        layers: the batch-normalization layers in network order.
        hidden: why the calls of some layers, or of all, are not known; None when all are.
        batch_size: examples a training step.
        steps_per_epoch: training steps an epoch.
        epochs: planned epochs. Each of the three is None when unknown.
        accumulated: training batches whose gradients are added up for one update of the parameters.
        output: how the model ends; None when unknown.
    """

    layers: tuple[Usage, ...] = ()
    hidden: str | None = None
    batch_size: int | None = None
    steps_per_epoch: int | None = None
    epochs: int | None = None
    accumulated: int = 1
    output: Output | None = None

    @property
    def steps(self) -> int | None:
        """Return the planned training steps; None when they are not known."""
        if self.steps_per_epoch is None or self.epochs is None:
            return None
        return self.steps_per_epoch * self.epochs

    def places(self) -> Iterator[tuple[Usage, Place]]:
        """Yield every call site with its layer, in network order."""
        for layer in self.layers:
            for place in layer.places:
                yield layer, place
