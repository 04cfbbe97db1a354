"""`check`: what can be known before the first step."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import chainer

from bnwatch import engine
from bnwatch.chainer.arrays import array_of
from bnwatch.chainer.examples import ForwardPasses
from bnwatch.chainer.layers import Layers, framework
from bnwatch.chainer.quiet import undisturbed
from bnwatch.chainer.structure import Trace, structure
from bnwatch.chainer.tap import Tap
from bnwatch.evidence import ExperimentNotPossibleError

if TYPE_CHECKING:
    from collections.abc import Hashable

    from bnwatch.diagnosis import Report
    from bnwatch.records import Structure


def check(
    model: Any,
    *inputs: Any,
    batch_size: int | None = None,
    steps_per_epoch: int | None = None,
    epochs: int | None = None,
) -> Report:
    """Return what is known of the batch normalization of a model without training it; the model is left as it is.

    A define-by-run network shows how its links are connected only while it runs: it is called once on ``inputs``, as
    training would, with nothing dropped and nothing updated. `BatchNormWatch` and `watch` need no such call.

    Args:
        model: a link; parameters that take their shape from the first batch may still be without.
        inputs: what it is called with, arrays or Variables, two examples or more; an `L.Classifier` is given inputs and
            labels, or inputs alone.
        batch_size: examples a training step.
        steps_per_epoch: training steps an epoch; with ``epochs`` it tells how long the training is to be.
        epochs: planned epochs.

    Raises:
        TypeError: it is no link.
        ValueError: no inputs are given, or a number is not positive.
        ExperimentNotPossibleError: the model cannot be called with these inputs.
    """
    if not isinstance(model, chainer.Link):
        msg = f"check needs a chainer.Link, got {type(model).__name__}"
        raise TypeError(msg)
    if not inputs:
        msg = "check needs what the model is called with, got no inputs: the connections show only while it runs"
        raise ValueError(msg)
    known = _seen(model, inputs, batch_size, steps_per_epoch, epochs)
    return engine.check(known, run=type(model).__name__, framework=framework())


class _Always:
    """Every call is one of the pass that is looked at."""

    @staticmethod
    def now(*, trained: bool) -> Hashable | None:  # noqa: ARG004
        return 0


def _seen(
    model: Any, inputs: tuple[Any, ...], batch_size: int | None, steps_per_epoch: int | None, epochs: int | None
) -> Structure:
    faults: list[Exception] = []
    layers, trace = Layers({"": model}), Trace(faults.append, drawing=False)
    tap = Tap(layers, _Always(), ForwardPasses([model], eager=False), faults.append)
    tap.trace = trace
    tap.watch_functions(wanted=True)
    target = model.predictor if isinstance(model, chainer.links.Classifier) and len(inputs) == 1 else model
    with undisturbed([model]):
        with chainer.using_config("train", True), chainer.using_config("enable_backprop", True), tap:
            try:
                returned = target(*inputs)
            except Exception as error:
                msg = f"calling the model failed: {type(error).__name__}: {error}"
                raise ExperimentNotPossibleError(msg) from error
        if faults:
            raise faults[0]
        for output in returned if isinstance(returned, list | tuple) else [returned]:
            if isinstance(output, chainer.Variable):
                trace.returned.add(trace.value(array_of(output)))
        calls = [call for call, _ in tap.take()]
        return structure(
            layers,
            trace,
            calls,
            rows=len(array_of(inputs[0])),
            batch_size=batch_size,
            steps_per_epoch=steps_per_epoch,
            epochs=epochs,
        )
