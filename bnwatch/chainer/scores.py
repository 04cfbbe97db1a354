"""The scores of classes in a forward pass: where they meet the labels, else what the model returns."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import chainer

from bnwatch.chainer.arrays import array_of, to_host
from bnwatch.chainer.tap import BINARY, SCORED, function_type
from bnwatch.evidence import ExperimentNotPossibleError, two_columns

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from bnwatch.chainer.forward import ForwardCall


class ScoresHook(chainer.FunctionHook):
    """Remembers the scores and the labels that a pass compares."""

    name = "bnwatch-scores"

    def __init__(self) -> None:
        self.compared: dict[type, tuple[Any, Any]] = {}
        self.last: type | None = None

    def forward_postprocess(self, node: Any, inputs: tuple[Any, ...]) -> None:
        """See one function."""
        kind = function_type(node)
        if kind in SCORED:
            self.compared[kind] = inputs[0], inputs[1]
        else:
            self.last = kind

    def scores(self, returned: Any) -> NDArray[np.floating]:
        """Return the scores of the classes, one row an example."""
        for kind in SCORED:
            if kind in self.compared:
                scores = to_host([self.compared[kind][0]])[0]
                return two_columns(scores, probabilities=False) if kind in BINARY else scores
        array = array_of(returned)
        if not isinstance(array, chainer.get_array_types()) or array is None:
            msg = f"the model returns {type(returned).__name__} and compares no scores with labels"
            raise ExperimentNotPossibleError(msg)
        sigmoid = self.last is chainer.functions.activation.sigmoid.Sigmoid
        return two_columns(to_host([array])[0], probabilities=sigmoid)

    def labels(self) -> NDArray[Any] | None:
        """Return the labels that were compared; None without."""
        found = next((self.compared[kind][1] for kind in SCORED if kind in self.compared), None)
        return None if found is None else to_host([found])[0]


def scores_of(call: ForwardCall, examples: int) -> NDArray[np.floating]:
    """Run a call and return its scores, shape ``(examples, classes)``.

    Raises:
        ExperimentNotPossibleError: they have another shape.
    """
    hook = ScoresHook()
    with hook, chainer.no_backprop_mode():
        scores = hook.scores(call())
    if scores.ndim > 2 and scores.size == scores.shape[0] * scores.shape[1]:  # noqa: PLR2004 - (n, classes, 1, 1)
        scores = scores.reshape(scores.shape[:2])
    if scores.ndim != 2 or len(scores) != examples or scores.dtype.kind != "f":  # noqa: PLR2004
        msg = f"the outputs of shape {scores.shape} are no scores of classes for {examples} examples"
        raise ExperimentNotPossibleError(msg)
    return scores
