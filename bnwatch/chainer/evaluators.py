"""What a Trainer's evaluators report, and the examples they evaluate."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import chainer
import numpy as np
from chainer.dataset import convert
from chainer.training.extensions import Evaluator

from bnwatch.chainer.forward import ForwardCall
from bnwatch.chainer.scores import ScoresHook
from bnwatch.evidence import Examples, ExperimentNotPossibleError, class_indices

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

_PREFIXES = ("validation/", "val/", "valid/", "test/", "eval/")
"""What evaluations are called that no `Evaluator` makes."""


@dataclass(frozen=True, slots=True)
class TrainerReport:
    """The values of one iteration; those on a device are not read."""

    train_accuracy: Any = None
    train_loss: Any = None
    evaluated: bool = False
    accuracy: Any = None
    loss: Any = None
    examples: int = 0


class Evaluators:
    """The evaluators of a Trainer."""

    def __init__(self, trainer: Any) -> None:
        entries = trainer._extensions.items()  # noqa: SLF001 - the public method wants the names
        self._evaluators = {
            f"{name}/": entry.extension for name, entry in entries if isinstance(entry.extension, Evaluator)
        }
        self._kept: Sequence[Examples] | None = None

    def report(self, observation: Mapping[str, Any]) -> TrainerReport:
        """Return what this iteration observed."""
        prefixes = (*self._evaluators, *_PREFIXES)
        training = {key: value for key, value in observation.items() if not key.startswith(prefixes)}
        evaluation = {key: value for key, value in observation.items() if key.startswith(prefixes)}
        accuracy, loss = _value(evaluation, "accuracy"), _value(evaluation, "loss")
        return TrainerReport(
            train_accuracy=_value(training, "accuracy"),
            train_loss=_value(training, "loss"),
            evaluated=accuracy is not None or loss is not None,
            accuracy=accuracy,
            loss=loss,
            examples=self._examples_of(evaluation),
        )

    def _examples_of(self, evaluation: Mapping[str, Any]) -> int:
        for prefix, evaluator in self._evaluators.items():
            if any(key.startswith(prefix) for key in evaluation):
                dataset = getattr(evaluator.get_iterator("main"), "dataset", ())
                return len(dataset) * getattr(getattr(evaluator, "_mn_communicator", None), "size", 1)
        return 0

    def examples(self, limit: int) -> Sequence[Examples]:
        """Return whole batches of at most ``limit`` evaluation examples, one at least; call it in `undisturbed`.

        Raises:
            ExperimentNotPossibleError: there is no evaluator, or its examples have no labels.
        """
        if self._kept is None:
            if not self._evaluators:
                msg = "the Trainer has no Evaluator to take examples from: pass probe=(inputs, labels)"
                raise ExperimentNotPossibleError(msg)
            evaluator = next(iter(self._evaluators.values()))
            self._kept = [_examples(call) for call in _calls(evaluator, limit)]
        return self._kept


def _value(values: Mapping[str, Any], what: str) -> Any:
    """Return the value of that name: the main one, or the first."""
    keys = [key for key in values if key == what or key.endswith((f"/{what}", f"_{what}"))]
    main = [key for key in keys if key.endswith(f"main/{what}")]
    return values[(main or keys)[0]] if keys else None


def _calls(evaluator: Any, limit: int) -> Iterator[ForwardCall]:
    """Yield the calls that the evaluator makes, with copies of the arguments."""
    target = evaluator.eval_func or evaluator.get_target("main")
    for batch in _batches(evaluator.get_iterator("main"), limit):
        arrays = convert._call_converter(evaluator.converter, batch, evaluator.device)  # noqa: SLF001
        args = arrays if isinstance(arrays, tuple) else () if isinstance(arrays, dict) else (arrays,)
        yield ForwardCall(target, "__call__", args, arrays if isinstance(arrays, dict) else {}).keep()


def _batches(iterator: Any, limit: int) -> Iterator[list[Any]]:
    """Yield batches of about ``limit`` examples, one at least, without touching the state of the iterator.

    They are read from the data set, spread evenly over it as it may be sorted; an iterator without one is copied.
    """
    dataset, size = getattr(iterator, "dataset", None), getattr(iterator, "batch_size", None)
    if dataset is not None and size:
        count = -(-len(dataset) // size)
        fitting = count if len(dataset) <= limit else max(1, min(count, limit // size))
        for number in np.linspace(0, count - 1, fitting).astype(int):
            yield [dataset[i] for i in range(number * size, min(len(dataset), (number + 1) * size))]
        return
    replica = copy.copy(iterator)
    if hasattr(replica, "reset"):
        replica.reset()
    seen = 0
    for batch in replica:
        if seen and seen + len(batch) > limit:
            return
        seen += len(batch)
        yield batch


def _examples(call: ForwardCall) -> Examples:
    hook = ScoresHook()
    with hook, chainer.no_backprop_mode():
        call()
    labels = hook.labels()
    if labels is None:
        msg = "the Evaluator computes neither F.accuracy nor a cross-entropy: pass probe=(inputs, labels)"
        raise ExperimentNotPossibleError(msg)
    return Examples(call, class_indices(labels), "evaluation")
