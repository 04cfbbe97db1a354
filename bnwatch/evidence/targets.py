"""Scores and targets as experiments compare them: two columns at least, and class indices."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from bnwatch.evidence.laboratory import ExperimentNotPossibleError

if TYPE_CHECKING:
    from numpy.typing import NDArray

MATRIX = 2
"""Dimensions of one-hot targets."""


def two_columns(scores: NDArray[np.floating], *, probabilities: bool) -> NDArray[np.floating]:
    """Return the scores of both classes where a single column holds that of class 1; others as they are.

    Args:
        scores: shape ``(n,)``, ``(n, 1)``, or anything else, which is returned.
        probabilities: the column holds probabilities of class 1, not logits.
    """
    if scores.ndim == 1:
        scores = scores[:, None]
    if scores.ndim != MATRIX or scores.shape[1] != 1:
        return scores
    return np.concatenate([1 - scores if probabilities else -scores, scores], axis=1)


def class_indices(targets: NDArray[Any]) -> NDArray[np.int64]:
    """Return class indices of integer, one-hot or binary targets, shape ``(n,)``.

    Raises:
        ExperimentNotPossibleError: the targets are no classes of single examples.
    """
    array = np.asarray(targets)
    if array.ndim == MATRIX and array.shape[1] == 1:
        array = array[:, 0]
    numbers = array.size > 0 and array.dtype.kind in "buif" and bool(np.isfinite(array).all())
    if array.ndim == 1 and numbers and np.all(array == np.round(array)) and array.min() >= 0:
        return array.astype(np.int64)
    if array.ndim == MATRIX and numbers and np.all((array == 0) | (array == 1)) and np.all(array.sum(axis=1) == 1):
        classes: NDArray[np.int64] = array.argmax(axis=1)
        return classes
    msg = (
        f"targets of shape {array.shape} and type {array.dtype} are not one class an example; "
        "the accuracy experiments need class indices or one-hot rows"
    )
    raise ExperimentNotPossibleError(msg)
