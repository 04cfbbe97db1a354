"""Watch a `chainer.training.Trainer`."""

from __future__ import annotations

import math
import sys
import weakref
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import chainer
from chainer.training import extension, triggers, updaters
from chainer.training.extensions import Evaluator

from bnwatch.chainer.changes import After, evaluation_follows
from bnwatch.chainer.evaluators import Evaluators
from bnwatch.chainer.ranks import Ranks
from bnwatch.chainer.session import Session
from bnwatch.chainer.tap import OUTSIDE
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
        return _UPDATE if trainer.updater.iteration == self._began else _TRAINED if trained else OUTSIDE

    @property
    def fresh(self) -> bool:
        """Return whether no iteration has ended."""
        return self._closed is None

    def close(self, calls: Sequence[Call]) -> tuple[list[Call], list[Call]]:
        """End an iteration, and return which of its calls were made in the update and which in evaluations."""
        self._began, self._closed = self._trainer.updater.iteration, self._trainer.observation
        update = [call for call in calls if call.when == _UPDATE]
        if update:
            return update, [call for call in calls if call.when in {_TRAINED, OUTSIDE}]
        return [call for call in calls if call.when == _TRAINED], [call for call in calls if call.when == OUTSIDE]


_UPDATE, _TRAINED = "update", "trained"


_waiting: weakref.WeakSet[BatchNormWatch] = weakref.WeakSet()
"""Those whose Trainer has not made an iteration yet."""


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
        comm: the communicator of ChainerMN, given on every rank: rank 0 then sees the statistics of all.
        observe: add what the watch measures to the observation, on the iterations that are sampled or evaluated, for
            `LogReport`, `PrintReport` and `PlotReport`: ``bnwatch/worst/mean_shift``, ``bnwatch/worst/log_std_ratio``,
            ``bnwatch/accuracy/gap`` and ``bnwatch/diagnoses``. They then are in the log, and in snapshots with it.

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
        comm: Any = None,
        observe: bool = False,
    ) -> None:
        if observe not in (True, False):
            msg = f"observe must be True or False, got {observe!r}"
            raise ValueError(msg)
        self._new_watch = partial(
            Watch, log_dir, every=every, probe=probe, allow=allow, on_diagnosis=on_diagnosis, experiments=experiments
        )
        self._new_ranks = partial(Ranks, comm, every)
        self.watch, self._ranks = self._new_watch(), self._new_ranks()
        self._trainer: Any = None
        self._session: Session | None = None
        self._clock: _TrainerClock | None = None
        self._evaluators: Evaluators | None = None
        self._optimizers: list[Any] = []
        self._after = After(self._updated)
        self._observe = observe
        self._failed = self._used = self._leave_due = False

    def initialize(self, trainer: Any) -> None:
        """Begin to watch, when the Trainer starts or goes on after a snapshot."""
        if self._trainer is trainer:  # extended twice
            return
        for other in [one for one in _waiting if one._trainer is not trainer]:  # noqa: SLF001
            other._abandon()  # noqa: SLF001
        _waiting.add(self)
        if self._used:  # in an earlier Trainer, whose steps are not the steps of this one
            self.watch, self._ranks = self._new_watch(), self._new_ranks()
        if self._ranks.rank:
            self.watch.silence()
        self._trainer, self._used, self._failed = trainer, True, False
        with self.watch.guard("starting"):
            self._check_place(trainer)
            if self.watch.enabled:
                self._begin(trainer)
        self._ranks.retire(self.watch)

    def _abandon(self) -> None:
        """Leave a Trainer that never began: another extension failed to initialize, and nothing was finalized."""
        _waiting.discard(self)
        session, self._session, self._trainer = self._session, None, None
        self._listen_no_longer()
        if session is not None:
            session.tap.leave()

    def _check_place(self, trainer: Any) -> None:
        """Say so where this extension is called too rarely, or an evaluator too late."""
        entries = trainer._extensions  # noqa: SLF001 - the public method hides triggers and priorities
        own = entries[self.name].trigger
        every = isinstance(own, triggers.IntervalTrigger) and (own.period, own.unit) == (1, "iteration")
        if own is not self.trigger and not every:
            self.watch.refuse(
                "BatchNormWatch is to be called in every iteration and samples by itself: "
                "leave out trigger= in trainer.extend(...) and set every="
            )
            return
        order = sorted(entries, key=lambda name: entries[name].priority, reverse=True)
        late = [name for name in order[order.index(self.name) :] if isinstance(entries[name].extension, Evaluator)]
        if late:
            self.watch.advise(
                f"BatchNormWatch sees no evaluation of {', '.join(map(repr, late))}, which runs after it: "
                "leave out priority= in trainer.extend(...)"
            )

    def _begin(self, trainer: Any) -> None:
        self._leave_due = False
        models, step = _targets(trainer), trainer.updater.iteration
        self._optimizers = list(trainer.updater.get_all_optimizers().values())
        optimizers = self._optimizers
        self._ranks.notice([*optimizers, *(link for model in models.values() for link in model.links())])
        if self._ranks.rank:
            self.watch.silence()
        self._clock = _TrainerClock(trainer)
        self._evaluators = Evaluators(trainer)
        replicas = _replicas(trainer.updater, models)
        session = Session(self.watch, models, self._clock, step=step, replicas=replicas, ranks=self._ranks)
        session.evaluation_source = self._evaluators.examples
        session.plan = partial(_plan, trainer)
        self._session = session
        session.start()
        self._listen()

    def _listen(self) -> None:
        """Hear of updates, for what a step leaves is changed by other extensions before this one is called."""
        for optimizer in self._optimizers:
            self._after.listen(optimizer)

    def _listen_no_longer(self) -> None:
        optimizers, self._optimizers = self._optimizers, []
        for optimizer in optimizers:
            self._after.leave(optimizer)

    def _updated(self, _optimizer: Any) -> None:
        session = self._session
        if session is not None and self.watch.enabled:
            with self.watch.guard("reading what an update left"):
                step = session.step + 1
                session.updated(step, expected=evaluation_follows(self._trainer, step))

    def __call__(self, trainer: Any) -> None:
        """End an iteration."""
        _waiting.discard(self)
        session = self._session
        if session is None or self._clock is None or self._evaluators is None:
            return
        if self.watch.enabled:
            with self.watch.guard("ending an iteration"):
                if trainer.updater.iteration == session.step:  # extended twice
                    return
                self._end_iteration(trainer, session, self._clock, self._evaluators)
                self._listen()
                if self._observe:
                    trainer.observation.update(self.watch.news(session.step))
                if self._leave_due:
                    self._leave(session)
        else:
            session.tap.leave()
            self._listen_no_longer()
        self._ranks.retire(self.watch)

    @staticmethod
    def _end_iteration(trainer: Any, session: Session, clock: _TrainerClock, evaluators: Evaluators) -> None:
        step = trainer.updater.iteration
        inferred = [layer for layer, when in session.tap.inferred if when in {_UPDATE, _TRAINED}]
        evaluating = session.tap.evaluating
        taken = session.tap.take()
        calls, outside = clock.close([call for call, _ in taken])
        calls = _sites(calls, [call for call, differentiated in taken if differentiated])
        report = evaluators.report(trainer.observation)
        session.accuracy.add(report.train_accuracy)
        session.loss.add(report.train_loss)
        session.end_step(calls, step, _epoch(trainer.updater), inferred)
        if report.evaluated:
            numbers = {"accuracy": report.accuracy, "loss": report.loss, "examples": report.examples}
            session.end_evaluation(outside, evaluating, **numbers)

    def _end_untrained(self, trainer: Any, session: Session) -> None:
        """Record the evaluation that an evaluator made before a training of no iteration."""
        if self.watch.enabled and self._clock is not None and self._clock.fresh and self._evaluators is not None:
            report = self._evaluators.report(trainer.observation)
            if report.evaluated:
                evaluating, calls = session.tap.evaluating, [call for call, _ in session.tap.take()]
                session.end_evaluation(
                    calls, evaluating, accuracy=report.accuracy, loss=report.loss, examples=report.examples
                )

    def on_error(self, trainer: Any, exc: Exception, tb: TracebackType) -> None:  # noqa: ARG002
        """Remember that training was cut off: no last experiment."""
        self._failed = True

    def finalize(self) -> None:
        """Conclude: the last experiment unless training was cut off, and the summary."""
        _waiting.discard(self)
        session, trainer, self._session, self._trainer = self._session, self._trainer, None, None
        cut_off = self._failed or isinstance(sys.exc_info()[1], KeyboardInterrupt | SystemExit)
        try:
            with self.watch.guard("ending the training"):
                self._listen_no_longer()
            with self.watch.guard("ending the training"):
                if session is not None:
                    self._end_untrained(trainer, session)
                    session.finish(complete=not cut_off and self.watch.enabled)
            with self.watch.guard("leaving the other ranks"):
                self._ranks.leave(0, None, wait=not cut_off)
        finally:
            self.watch.close()

    def serialize(self, serializer: Any) -> None:
        """Write nothing into snapshots and read nothing: they load with and without the watch.

        When one is taken, the watch leaves its own state beside its record. When one is loaded after `initialize`, as
        ``snapshot(autoload=True)`` does, it begins once more, at the step that was loaded.
        """
        session = self._session
        if session is None or not self.watch.enabled:
            return
        with self.watch.guard("leaving or taking up a snapshot"):
            if not isinstance(serializer, chainer.Serializer):
                session.tap.leave()
                self._begin(self._trainer)
            elif session.step == self._trainer.updater.iteration:
                self._leave(session)
            else:  # a snapshot of higher priority: this iteration is still to be seen
                self._leave_due = True

    def _leave(self, session: Session) -> None:
        self._leave_due = False
        session.leave()


def _sites(calls: Sequence[Call], differentiated: Sequence[Call]) -> list[Call]:
    """Return the calls that are call sites: where some of a layer are differentiated, the others are a look at it."""
    own, trained = {id(call) for call in differentiated}, {call.place for call in differentiated}
    return [call for call in calls if id(call) in own or call.place not in trained]


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


def _plan(trainer: Any, since: int) -> tuple[int | None, int | None]:
    """Return the iterations of an epoch, and the epochs from iteration ``since`` on: the first one, or that of now.

    A plan in iterations counts as one epoch.
    """
    updater, stop = trainer.updater, trainer.stop_trigger
    stop = getattr(stop, "_max_trigger", stop)  # of early stopping
    if not isinstance(stop, triggers.IntervalTrigger):
        return None, None
    if stop.unit == "iteration":
        left = stop.period - since
        return (left, 1) if left > 0 else (None, None)
    iterator = updater.get_iterator("main") if hasattr(updater, "get_iterator") else None
    dataset, size = getattr(iterator, "dataset", None), getattr(iterator, "batch_size", None)
    left = math.ceil(stop.period - (updater.epoch_detail if since else 0))
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
