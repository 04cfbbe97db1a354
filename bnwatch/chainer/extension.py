"""Watch a `chainer.training.Trainer`."""

from __future__ import annotations

import math
import sys
from typing import TYPE_CHECKING, Any, Literal

import chainer
from chainer.training import extension, triggers, updaters

from bnwatch.chainer.evaluators import Evaluators
from bnwatch.chainer.session import Session
from bnwatch.watch import Verdict, Watch

if TYPE_CHECKING:
    import os
    from collections.abc import Hashable, Mapping, Sequence
    from types import TracebackType

    from bnwatch.chainer.tap import Call
    from bnwatch.watch import OnDiagnosis


class _TrainerClock:
    """Tells calls of the update from those of extensions, without touching the updater.

    ``updater.iteration`` rises at the end of an update, and ``trainer.observation`` is a new dictionary in each
    iteration: a call belongs to the update if it was made while the count stood where the last iteration had left it,
    and not by an extension that ran after the watch. An updater of the user's own may count first: then the calls to be
    differentiated are those of the update.
    """

    def __init__(self, trainer: Any) -> None:
        self._trainer = trainer
        self._began = trainer.updater.iteration
        self._closed: Any = None

    def now(self, *, trained: bool) -> Hashable | None:
        trainer = self._trainer
        if trainer.observation is self._closed:
            return None
        return _UPDATE if trainer.updater.iteration == self._began else _TRAINED if trained else _OUTSIDE

    def close(self, calls: Sequence[Call]) -> tuple[list[Call], list[Call]]:
        """End an iteration, and return which of its calls were made in the update and which in evaluations."""
        self._began, self._closed = self._trainer.updater.iteration, self._trainer.observation
        update = [call for call in calls if call.when == _UPDATE]
        if update:
            return update, [call for call in calls if call.when in {_TRAINED, _OUTSIDE}]
        return [call for call in calls if call.when == _TRAINED], [call for call in calls if call.when == _OUTSIDE]


_UPDATE, _TRAINED, _OUTSIDE = "update", "trained", "outside"


class BatchNormWatch(Verdict, extension.Extension):
    """Watch the batch normalization of everything that a Trainer trains.

        trainer.extend(BatchNormWatch("runs/a"))

    It is called in every iteration, after evaluators and before `LogReport`, and decides itself which steps to sample:
    set ``every``, not a trigger. ``log_dir`` is relative to the working directory, not to the Trainer's ``out``.

    Args:
        log_dir: directory for TensorBoard event files; None writes none.
        every: sampling interval in iterations; the first ones are sampled densely.
        probe: ``(x, y)``: examples for the experiments where none can be had without asking.
        allow: diagnoses that are known and accepted: ``{"BN101:encoder/*": "why"}``.
        on_diagnosis: ``"warn"``, ``"raise"``, ``"log"`` or a callable.
        experiments: ``"auto"`` or False.

    Raises:
        ValueError: an argument is not what is accepted.
    """

    priority = extension.PRIORITY_EDITOR
    default_name = "BatchNormWatch"

    @staticmethod
    def trigger(_trainer: Any) -> bool:
        """Fire in every iteration. `(1, "iteration")` would leave a key in snapshots and miss it in older ones."""
        return True

    def __init__(
        self,
        log_dir: str | os.PathLike[str] | None,
        *,
        every: int = 50,
        probe: tuple[Any, Any] | None = None,
        allow: Mapping[str, str] | None = None,
        on_diagnosis: OnDiagnosis = "warn",
        experiments: Literal["auto"] | bool = "auto",
    ) -> None:
        self.watch = Watch(
            log_dir, every=every, probe=probe, allow=allow, on_diagnosis=on_diagnosis, experiments=experiments
        )
        self._session: Session | None = None
        self._clock: _TrainerClock | None = None
        self._evaluators: Evaluators | None = None
        self._failed = False

    def initialize(self, trainer: Any) -> None:
        """Begin to watch, when the Trainer starts or goes on after a snapshot."""
        with self.watch.guard("starting"):
            self._clock = _TrainerClock(trainer)
            self._evaluators = Evaluators(trainer)
            models, step = _targets(trainer), trainer.updater.iteration
            session = Session(self.watch, models, self._clock, step=step, replicas=_replicas(trainer.updater, models))
            session.evaluation_source = self._evaluators.examples
            session.plan = _plan(trainer)
            self._session = session
            session.start()

    def __call__(self, trainer: Any) -> None:
        """End an iteration."""
        session = self._session
        if session is None or self._clock is None or self._evaluators is None:
            return
        if not self.watch.enabled:
            session.tap.leave()
            return
        with self.watch.guard("ending an iteration"):
            self._end_iteration(trainer, session, self._clock, self._evaluators)

    @staticmethod
    def _end_iteration(trainer: Any, session: Session, clock: _TrainerClock, evaluators: Evaluators) -> None:
        step = trainer.updater.iteration
        calls, outside = clock.close([call for call, _ in session.tap.take()])
        report = evaluators.report(trainer.observation)
        session.accuracy.add(report.train_accuracy)
        session.loss.add(report.train_loss)
        session.end_step(calls, step, _epoch(trainer.updater))
        if report.evaluated:
            session.end_evaluation(outside, accuracy=report.accuracy, loss=report.loss, examples=report.examples)

    def on_error(self, trainer: Any, exc: Exception, tb: TracebackType) -> None:  # noqa: ARG002
        """Remember that training was cut off: no last experiment."""
        self._failed = True

    def finalize(self) -> None:
        """Conclude: the last experiment unless training was cut off, and the summary."""
        session, self._session = self._session, None
        cut_off = self._failed or isinstance(sys.exc_info()[1], KeyboardInterrupt | SystemExit)
        try:
            with self.watch.guard("ending the training"):
                if session is not None:
                    session.finish(complete=not cut_off and self.watch.enabled)
        finally:
            self.watch.close()

    def serialize(self, serializer: Any) -> None:
        """Write nothing into snapshots and read nothing: they load with and without the watch."""


def _targets(trainer: Any) -> dict[str, Any]:
    """Return what is trained: one model without a name, several by the names of their optimizers.

    Raises:
        TypeError: an optimizer has something else for a target than a link.
    """
    found: dict[str, Any] = {}
    for name, optimizer in trainer.updater.get_all_optimizers().items():
        if not isinstance(optimizer.target, chainer.Link):
            msg = f"the updater's optimizer {name!r} trains a {type(optimizer.target).__name__}, no chainer.Link"
            raise TypeError(msg)
        if all(optimizer.target is not model for model in found.values()):
            found[name] = optimizer.target
    return {"": next(iter(found.values()))} if len(found) == 1 else found


def _plan(trainer: Any) -> tuple[int | None, int | None]:
    """Return the iterations of an epoch and the epochs that are to come; a plan in iterations counts as one epoch."""
    updater, stop = trainer.updater, trainer.stop_trigger
    stop = getattr(stop, "_max_trigger", stop)  # of early stopping
    if not isinstance(stop, triggers.IntervalTrigger):
        return None, None
    if stop.unit == "iteration":
        left = stop.period - updater.iteration
        return (left, 1) if left > 0 else (None, None)
    iterator = updater.get_iterator("main") if hasattr(updater, "get_iterator") else None
    dataset, size = getattr(iterator, "dataset", None), getattr(iterator, "batch_size", None)
    left = math.ceil(stop.period - updater.epoch_detail)
    return (math.ceil(len(dataset) / size), left) if dataset is not None and size and left > 0 else (None, None)


def _replicas(updater: Any, models: Mapping[str, Any]) -> dict[str, list[Any]]:
    """Return the copies of a model that are trained beside it, by its name."""
    if not isinstance(updater, updaters.ParallelUpdater):
        return {}
    trained = updater._models.values()  # noqa: SLF001 - there is no public name
    return {
        name: [other for other in trained if other is not model]
        for name, model in models.items()
        if any(other is model for other in trained)
    }


def _epoch(updater: Any) -> int:
    """Return the epoch that the last iteration belonged to, from 0."""
    epoch = int(getattr(updater, "epoch", 0))
    return epoch - 1 if epoch and getattr(updater, "is_new_epoch", False) else epoch
