"""The tap: one thread-local function hook that reads what batch normalization computed in its forward pass.

A batch-norm node owns the mean and the variance of its forward pass, and its ``running_mean`` *is* the array
``link.avg_mean``: that identity tells the link, the ordinal within the update tells the call site. So nothing is
computed again, and nothing is copied on a step that is not sampled.
"""

from __future__ import annotations

import itertools
import os
import sys
import weakref
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import chainer
import numpy as np
from chainer import backend
from chainer.function import FunctionAdapter
from chainer.functions.evaluation.accuracy import Accuracy
from chainer.functions.evaluation.binary_accuracy import BinaryAccuracy
from chainer.functions.loss.sigmoid_cross_entropy import SigmoidCrossEntropy
from chainer.functions.loss.softmax_cross_entropy import SoftmaxCrossEntropy
from chainer.functions.normalization.batch_normalization import BatchNormalization, FixedBatchNormalization
from chainer.functions.normalization.batch_renormalization import BatchRenormalizationFunction

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable

    from bnwatch.chainer.layers import Layers
    from bnwatch.chainer.structure import Trace
    from bnwatch.lines import Callers, Trail

SCORED = (Accuracy, BinaryAccuracy, SoftmaxCrossEntropy, SigmoidCrossEntropy)
"""Functions of scores and class labels, the surest first."""

BINARY = (BinaryAccuracy, SigmoidCrossEntropy)
"""Those of one logit an example."""


class Call(NamedTuple):
    """One call that normalized with batch statistics and updated running statistics.

    Attributes:
        layer: index of the layer.
        when: the clock's time; None outside of an update.
        rows: examples at this layer.
        elements: per channel; of all ranks, if it normalized over them.
        epsilon: of the function.
        decay: of the function: while finetuning not that of the link.
        mean: the batch mean; None on a step that is not sampled.
        scale: the variance, or what ``form`` says.
        form: ``var``, ``inv_std`` (cuDNN keeps nothing else) or ``std`` (batch renormalization).
        recomputed: made in `F.forget`, whose backward pass goes through other nodes.
        replica: which copy of the model made it; 0 is the model itself.
        running: a replica's running mean and variance after the call, copied: the updater overwrites them within the
            step.
        trail: the user's lines on the way to it; None where nobody wants to know.
    """

    layer: int
    when: Hashable | None
    rows: int
    elements: int
    epsilon: float
    decay: float
    mean: Any
    scale: Any
    form: str
    recomputed: bool
    replica: int = 0
    running: tuple[Any, Any] | None = None
    trail: Trail | None = None

    @property
    def place(self) -> tuple[int, int]:
        """Return layer and replica, as `Layers.find` tells them."""
        return self.layer, self.replica


OUTSIDE = "outside"


class Clock(Protocol):
    """Tells calls of an update from those of an evaluation."""

    def now(self, *, trained: bool) -> Hashable | None:
        """Return something that is the same all through an update; None or `OUTSIDE` outside of one.

        ``trained`` says that the call is to be differentiated, now or in the recomputation of `F.forget`.
        """


class Passes(Protocol):
    """Takes interest in forward passes, to keep their examples."""

    def function(self, node: Any, inputs: tuple[Any, ...]) -> None:
        """See a function before it runs."""

    def evaluating(self) -> None:
        """See a batch normalization with running statistics."""

    def normalized(self, layer: int) -> None:
        """See one with batch statistics."""

    def scored(self, kind: type, scores: Any, labels: Any) -> None:
        """See scores meet their labels."""


def function_of(node: Any) -> Any:
    """Return the function of a node: the node itself, but for functions of the old style."""
    return node.function if type(node) is FunctionAdapter else node


def function_type(node: Any) -> type:
    """Return the class of a function, old style or new."""
    return type(function_of(node))


def is_training() -> bool:
    """Return whether a forward pass made now is one of training: in training mode, and to be differentiated."""
    config = chainer.config
    return bool(config.train and (config.enable_backprop or config._will_recompute))  # noqa: SLF001


_taps: weakref.WeakSet[Tap] = weakref.WeakSet()
_numbers = itertools.count()


class Tap(chainer.FunctionHook):
    """Sees every function of this thread while it is entered.

    Attributes:
        communicates: a forward pass waited for other ranks in a function of ChainerMN.
        sampled: the statistics of this step are wanted.
        rows: examples of the last training pass, from its labels; 0 when unknown.
        trace: notes the functions of a step; None where nobody wants to know.
        callers: how to read from which lines links are called, in steps that are sampled; None where nobody wants to
            know.
        passes: while there is a trace, for each training pass that was differentiated how many updates of parameters
            came before it, and how often gradients were cleared; passes of which both are the same add up.
        called: is shown the next call of a layer, and whether it is of a training step; once.
        grows: links may have been added since: look for them at the next call of a training step, before they are
            updated for the first time, unless one of them is what is called first.
        inferred: the layers that normalized with running statistics in a call that was differentiated since, in a step
            that is sampled, each with the clock's time of the call.
        evaluating: the layers that normalized with running statistics since the calls were last taken.
    """

    def __init__(self, layers: Layers, clock: Clock, passes: Passes, failed: Callable[[Exception], None]) -> None:
        self.name = f"bnwatch-{next(_numbers)}"
        self.communicates = self.sampled = self.grows = False
        self.rows = 0
        self.called: Callable[..., None] | None = None
        self.trace: Trace | None = None
        self.callers: Callers | None = None
        self.passes: list[tuple[int, int]] = []
        self._forward, self._cleared = False, 0
        self.tally = Tally()
        self._layers, self._clock, self._passes, self._failed = layers, clock, passes, failed
        self._calls: list[Call] = []
        self._nodes: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()
        self._inferring: weakref.WeakKeyDictionary[Any, tuple[int, Hashable | None]] = weakref.WeakKeyDictionary()
        self.inferred: list[tuple[int, Hashable | None]] = []
        self.evaluating: set[int] = set()
        self._differentiated: set[int] = set()
        self._replica = 0
        self._see: dict[type, Callable[[Any, Any], None]] = {
            BatchNormalization: self._batch_normalization,
            FixedBatchNormalization: self._fixed,
            FunctionAdapter: self._adapter,
            **dict.fromkeys(SCORED, self._scored),
        }
        _taps.add(self)

    def enter(self) -> None:
        """Begin to see."""
        self.__enter__()

    def leave(self) -> None:
        """See no more; leaving twice is no error."""
        hooks = chainer.get_function_hooks()
        if hooks.get(self.name) is self:
            self.__exit__()
        self.silence()

    def silence(self) -> None:
        """Do nothing from now on: what is safe while hooks are running."""
        self._see = {}
        self.watch_functions(wanted=False)
        self.drop()

    def watch_functions(self, *, wanted: bool) -> None:
        """Show functions to the passes, before they run, or stop: the hook costs nothing when it is not there."""
        if wanted:
            self.forward_preprocess = self._function
        else:
            self.__dict__.pop("forward_preprocess", None)

    def watch_backward(self, *, wanted: bool) -> None:
        """Tell calls that are differentiated from those that are not, or stop."""
        if wanted:
            self.backward_preprocess = self._backward
        else:
            self.__dict__.pop("backward_preprocess", None)

    def take(self) -> list[tuple[Call, bool]]:
        """Return the calls since the last time, each with whether it was differentiated, and forget them."""
        calls = [(c, c.recomputed or n in self._differentiated) for n, c in enumerate(self._calls)]
        self.drop()
        return calls

    def drop(self) -> None:
        """Forget the calls, and with them every array of the step."""
        self._calls, self._differentiated, self._replica = [], set(), 0
        self._nodes = weakref.WeakKeyDictionary()  # a dead node's place in memory is soon that of any other
        self._inferring, self.inferred, self.evaluating = weakref.WeakKeyDictionary(), [], set()

    def forward_postprocess(self, node: Any, inputs: tuple[Any, ...]) -> None:
        """Look at the few functions that matter, after they ran."""
        see = self._see.get(type(node))
        if see is not None:
            try:
                see(node, inputs)
            except Exception as error:  # noqa: BLE001 - never an exception into the user's forward pass
                self.silence()
                self._failed(error)

    def _function(self, node: Any, inputs: tuple[Any, ...]) -> None:
        try:
            self._passes.function(node, inputs)
            if self.trace is not None:
                self.trace.function(node, inputs)
        except Exception as error:  # noqa: BLE001
            self.silence()
            self._failed(error)

    def _backward(self, node: Any, _inputs: Any, _gradients: Any) -> None:
        number = self._nodes.get(node)
        if number is not None:
            self._differentiated.add(number)
            if self._forward:
                self._forward = False
                self._count_pass(self._layers.at(self._calls[number].layer).link)
        inferring = self._inferring.get(node)
        if inferring is not None:
            self.inferred.append(inferring)

    def _count_pass(self, link: Any) -> None:
        """Note that a pass is differentiated, before the gradients of its last layer are there."""
        own = [parameter for name in ("gamma", "beta") if (parameter := getattr(link, name, None)) is not None]
        self._cleared += bool(own) and all(parameter.grad_var is None for parameter in own)
        self.passes.append((self._layers.updates_made, self._cleared))

    def _batch_normalization(self, node: Any, inputs: tuple[Any, ...]) -> None:
        if node.running_mean is None:
            if not chainer.config.in_recomputing:  # that of F.forget
                self._layers.normalized_elsewhere(None)
            return
        cudnn = type(node._impl).__name__ == "_CudnnBatchNormalizationImpl"  # noqa: SLF001
        ranks = getattr(getattr(node._impl, "comm", None), "size", 1)  # noqa: SLF001 - of ChainerMN's multi-node link
        arrays = (node.mean, node.inv_std if cudnn else node.var) if self.sampled else (None, None)
        self._record(node, node.running_mean, inputs, (*arrays, "inv_std" if cudnn else "var"), ranks)

    def _fixed(self, node: Any, inputs: tuple[Any, ...]) -> None:
        found = self._layers.find(inputs[3])
        if found is None:
            return
        self._passes.evaluating()
        index, replica = found
        self._layers.at(*found).inferred = True
        self._show(training=False)
        if not replica:
            self.evaluating.add(index)
        if self.sampled and not replica and chainer.config.enable_backprop:
            self._inferring[node] = index, self._clock.now(trained=True)

    def _adapter(self, node: Any, inputs: tuple[Any, ...]) -> None:
        function = node.function
        if type(function) is BinaryAccuracy:
            self._scored(node, inputs)
        elif type(function) is BatchRenormalizationFunction and function.update_statistics:
            mean = scale = None
            if self.sampled:  # it keeps x_hat and std, not the mean: mean = x - x_hat * std at any one element
                x, gamma = inputs[:2]
                one = (0, ..., *(0,) * (x.ndim - gamma.ndim - 1))
                with chainer.using_device(backend.get_device_from_array(x)):
                    mean, scale = x[one] - function.x_hat[one] * function.std, function.std
            running_mean = function._running_mean  # noqa: SLF001 - the public name warns
            self._record(node, running_mean, inputs, (mean, scale, "std"))
        elif type(function).__module__.startswith("chainermn.functions."):
            self.communicates = True

    def _record(
        self, node: Any, running_mean: Any, inputs: tuple[Any, ...], kept: tuple[Any, Any, str], ranks: int = 1
    ) -> None:
        found = self._layers.find(running_mean)
        if found is None:
            self._layers.normalized_elsewhere(running_mean)
            return
        index, self._replica = found
        layer = self._layers.at(*found)
        layer.updates += 1
        overwritten = self.sampled and self._replica
        x, function = inputs[0], function_of(node)
        differentiable = chainer.config.enable_backprop
        recomputed = not differentiable and chainer.config._will_recompute  # noqa: SLF001
        when = self._clock.now(trained=differentiable or recomputed)
        self._show(training=when not in {None, OUTSIDE})
        self._nodes[node] = len(self._calls)
        self._calls.append(
            Call(
                index,
                when,
                x.shape[0],
                x.size // inputs[1].size * ranks,
                function.eps,
                function.decay,
                *kept,
                recomputed,
                self._replica,
                (layer.link.avg_mean.copy(), layer.link.avg_var.copy()) if overwritten else None,
                self._trail(layer.link) if self.sampled else None,
            )
        )
        if not self._replica:
            self._passes.normalized(index)
            if self.trace is not None:
                self.trace.normalized(self._calls[-1], function)
                self._forward = when not in {None, OUTSIDE}
        if len(self._calls) > _MOST_CALLS:  # steps are not told: keep no more than a step could hold
            self.drop()

    def _trail(self, link: Any) -> Trail | None:
        return None if self.callers is None else self.callers.trail(sys._getframe(1), type(link))  # noqa: SLF001

    def _show(self, *, training: bool) -> None:
        if self.grows and training:
            self.grows = False
            self._layers.refresh()
        called, self.called = self.called, None
        if called is not None:
            called(training=training)

    def _scored(self, node: Any, inputs: tuple[Any, ...]) -> None:
        kind = function_type(node)
        scores, labels = inputs[:2]
        if is_training():
            self.rows = self.rows if self._replica else len(labels)
        else:
            self.tally.add(kind, scores, labels)
        self._passes.scored(kind, scores, labels)


_MOST_CALLS = 100_000


class Tally:
    """Counts the labels of an evaluation as they meet their scores: examples, classes, the most frequent class."""

    def __init__(self) -> None:
        self._examples: dict[type, int] = {}
        self._labels: dict[type, Any] = {}
        self.classes = 0

    def add(self, kind: type, scores: Any, labels: Any) -> None:
        """Count one batch. Labels on a device are not read."""
        self._examples[kind] = self._examples.get(kind, 0) + len(labels)
        self.classes = max(self.classes, scores.shape[1] if scores.ndim > 1 and scores.shape[1] > 1 else 2)
        if isinstance(labels, np.ndarray) and labels.dtype.kind in "iu":
            counts = np.bincount(labels[labels >= 0].ravel(), minlength=self.classes)
            known = self._labels.get(kind, np.zeros(1, np.int64))
            total = np.zeros(max(len(counts), len(known)), np.int64)
            total[: len(counts)] += counts
            total[: len(known)] += known
            self._labels[kind] = total

    @property
    def examples(self) -> int:
        """Return the examples counted."""
        return next((self._examples[kind] for kind in SCORED if kind in self._examples), 0)

    @property
    def majority(self) -> float | None:
        """Return the share of the most frequent class; None when unknown."""
        counts = next((self._labels[kind] for kind in SCORED if kind in self._labels), None)
        return None if counts is None or not counts.sum() else float(counts.max() / counts.sum())


def _silence_in_child() -> None:
    """Stay out of a forked worker: its steps are not the steps of this run."""
    for tap in list(_taps):
        tap.silence()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_silence_in_child)
