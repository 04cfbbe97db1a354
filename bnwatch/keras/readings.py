"""What Keras itself knows about training and evaluation, read where it keeps it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from bnwatch.evidence import ExperimentNotPossibleError, class_indices
from bnwatch.keras.keep import array_of
from bnwatch.records import EvaluationRecord
from bnwatch.signals import share

if TYPE_CHECKING:
    from collections.abc import Mapping

    from bnwatch.keras.backends.base import Backend
    from bnwatch.keras.keep import Kept
    from bnwatch.keras.session import Session

ACCURACIES = (
    "accuracy",
    "acc",
    "sparse_categorical_accuracy",
    "categorical_accuracy",
    "binary_accuracy",
    "compile_metrics_accuracy",
)
"""What logs call an accuracy, in the order in which one is looked for."""


@dataclass(frozen=True, slots=True)
class Training:
    """Training metrics of the epoch so far."""

    accuracy: float | None = None
    loss: float | None = None
    examples: int = 0


def training(backend: Backend, logs: Mapping[str, Any] | None) -> Training:
    """Return the running means of the metrics, from the logs of an epoch where there are some.

    This reads from the device: for sampled steps only.
    """
    now = backend.metrics() if logs is None else logs
    return Training(accuracy_in(now), _number(now.get("loss")), backend.examples_behind())


def accuracy_in(logs: Mapping[str, Any], prefix: str = "") -> float | None:
    """Return the accuracy that logs report under any of its names, in [0, 1]."""
    for name in ACCURACIES:
        value = share(_number(logs.get(prefix + name)))
        if value is not None:
            return value
    return None


def _number(value: Any) -> float | None:
    if value is None:
        return None
    array = array_of(value)
    return float(array) if array.ndim == 0 and array.dtype.kind in "fiu" else None


def evaluation_record(session: Session, epoch: int, logs: Mapping[str, Any]) -> EvaluationRecord | None:
    """Return the evaluation that the logs of an epoch report; None when there was none."""
    if not any(name.startswith("val_") for name in logs):
        return None
    accuracy, classes = accuracy_in(logs, "val_"), class_count(session.backend.model)
    return EvaluationRecord(
        step=session.steps,
        epoch=epoch,
        accuracy=accuracy,
        loss=_number(logs.get("val_loss")),
        examples=session.backend.examples_behind(),
        train_accuracy=accuracy_in(logs),
        train_loss=_number(logs.get("loss")),
        train_examples=session.training.examples,
        classes=classes if accuracy is not None else 0,
        majority=majority(session.backend) if accuracy is not None else None,
        batch_statistics=session.evaluated_with_batch_statistics,
        moved=session.changes.moved,
        still=session.still,
        swapped=session.changes.swapped,
    )


def evaluation_alone(session: Session, epoch: int, logs: Mapping[str, Any], kept: Kept | None) -> EvaluationRecord:
    """Return the evaluation that the logs of ``evaluate`` report, beside what is known of the training before.

    Args:
        session: the evaluation under watch.
        epoch: the last one.
        logs: of the evaluation.
        kept: evaluation batches that were kept.
    """
    accuracy, classes = accuracy_in(logs), class_count(session.backend.model)
    examples, trained = session.backend.examples_behind(), session.training
    whole = kept is not None and kept.examples == examples
    return EvaluationRecord(
        step=session.steps,
        epoch=epoch,
        accuracy=accuracy,
        loss=_number(logs.get("loss")),
        examples=examples,
        train_accuracy=trained.accuracy,
        train_loss=trained.loss,
        train_examples=trained.examples,
        classes=classes if accuracy is not None else 0,
        majority=_majority(kept) if kept is not None and whole and accuracy is not None else None,
        batch_statistics=session.evaluated_with_batch_statistics,
        moved=session.changes.moved,
        still=session.still,
        swapped=session.changes.swapped,
    )


def _majority(kept: Kept) -> float | None:
    """Return the share of the most frequent class among batches that were kept."""
    try:
        labels = np.concatenate([batch.labels for batch in kept.batches("evaluation", kept.examples)])
    except ExperimentNotPossibleError:
        return None
    return float(np.bincount(labels).max() / len(labels))


def class_count(model: Any) -> int:
    """Return the number of classes a model tells apart; 0 when its outputs do not say."""
    shape = getattr(model, "output_shape", None)
    if not isinstance(shape, tuple) or not shape or isinstance(shape[0], tuple | list) or shape[-1] is None:
        return 0
    return max(2, int(shape[-1]))


def majority(backend: Backend) -> float | None:
    """Return the share of the most frequent class among the validation labels; None where it takes a pass to know."""
    labels = backend.evaluation_labels
    if labels is None:
        return None
    try:
        counts = np.bincount(class_indices(array_of(labels)))
    except ExperimentNotPossibleError:
        return None
    return float(counts.max() / counts.sum())


@dataclass(frozen=True, slots=True)
class Spread:
    """Which batches of an evaluation to keep: evenly spread, about ``examples`` of them in ``batches`` batches."""

    batches: int
    examples: int

    def takes(self, batch: int, kept: Kept) -> bool:
        """Return whether to keep batch number ``batch``, given what was kept so far."""
        if not kept.examples:
            return True
        if kept.full:
            return False
        per_batch = max(1, kept.largest)
        stride = max(1, -(-self.batches * per_batch // self.examples))
        return batch % stride == 0
