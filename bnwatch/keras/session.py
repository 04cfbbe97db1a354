"""One `fit` under watch: attach the tap, take samples, keep batches, run experiments, leave nothing behind."""

from __future__ import annotations

import time
import weakref
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from bnwatch.evidence import seconds_after
from bnwatch.keras import readings
from bnwatch.keras.changes import Changes
from bnwatch.keras.experiments import probes
from bnwatch.keras.keep import EXAMPLES
from bnwatch.keras.laboratory import KerasLaboratory
from bnwatch.keras.structure import structure
from bnwatch.keras.tap import Tap, heal
from bnwatch.records import Attachment, StepSnapshot

if TYPE_CHECKING:
    from collections.abc import Mapping

    from bnwatch.evidence import Split
    from bnwatch.keras.backends.base import Backend, Functions
    from bnwatch.keras.laboratory import Shelf
    from bnwatch.keras.tap import Statistics
    from bnwatch.watch import Watch

FINAL_SECONDS = 10.0
"""The last experiment may take these seconds in any case: a little more than the others."""
DISPLACED = "another watch was attached to a layer of this model, which holds one at a time"
"""Said by the watch that was there before."""


def attachment(tap: Tap) -> Attachment:
    """Return what a tap found on a built model."""
    specs = tuple(watched.spec() for watched in tap.layers)
    initial = tuple(watched.path for watched in tap.layers if watched.updates == 0)
    unrestored = tuple(watched.path for watched in tap.layers if watched.unrestored())
    return Attachment(specs, tap.unsupported, tap.backend.framework, tap.backend.why_unseen(), unrestored, initial)


def located(known: Attachment | None, tap: Tap) -> Attachment | None:
    """Return an attachment with the lines that call sites are called from by now; None where nothing is new."""
    if known is None or not tap.relocated:
        return None
    tap.relocated = False
    return replace(known, layers=tuple(watched.spec() for watched in tap.layers if watched.built))


class Attached:
    """What is on the model while it is watched; taken off in one place, also when training raised."""

    def __init__(
        self, backend: Backend, watch: Watch, known: Statistics, before: Changes | None, *, keep: bool
    ) -> None:
        """Attach the tap and have the functions of the model made anew."""
        self.known = known
        heal(backend)
        self.tap = Tap(backend, watch.guard)
        self.changes = Changes(self.tap, before)
        self.training = backend.keeper(watch.guard) if keep else None
        self.evaluation = backend.keeper(watch.guard) if keep else None
        self.tap.release = self.detach
        self._functions: Functions | None = backend.functions()
        try:
            self.tap.attach(known, self.changes.stepped)
            self._functions.make(self.training, self.evaluation)
        except BaseException:
            self.detach()
            raise

    def refresh(self) -> None:
        """Take in what came up in a step: layers made in it, call sites for which there was no place."""
        if self._functions is None or not (self.tap.found_more() or self.tap.storage.outgrown):
            return
        self.tap.storage.grow()
        self._functions.make(self.training, self.evaluation)

    def detach(self) -> None:
        """Leave the model as it was; a second call does nothing."""
        if self._functions is None:
            return
        functions, self._functions = self._functions, None
        try:
            self.known = self.tap.detach()
        finally:
            functions.restore()


def _left_behind(attached: Attached, watch: Watch) -> None:
    """Detach what a training that raised has left, when its watch goes."""
    with watch.guard("detaching from the model"):
        attached.detach()


class Session:
    """One `fit` under watch."""

    def __init__(
        self,
        backend: Backend,
        watch: Watch,
        *,
        steps: int,
        known: Statistics,
        plan: Mapping[str, Any] | None = None,
        earlier: Session | None = None,
    ) -> None:
        """Attach to the model.

        Args:
            backend: of the model that is about to train, or to be evaluated.
            watch: where everything goes.
            steps: training steps finished before, in earlier calls of ``fit``.
            known: statistics at the end of the last watch.
            plan: what Keras tells callbacks: ``epochs``, and ``steps`` an epoch, None where not known.
            earlier: the training that an evaluation alone follows.
        """
        self._plan = plan or {}
        self.backend, self.watch, self.steps = backend, watch, steps
        keep = watch.experiments and watch.probe is None and backend.why_no_experiments() is None
        before = None if earlier is None else earlier.changes
        self._attached = Attached(backend, watch, known, before, keep=keep)
        self._finalizer = weakref.finalize(self, _left_behind, self._attached, watch)
        self.tap = self._attached.tap
        self._opened = False
        self._first = steps + backend.steps_per_execution
        self._epoch, self._epoch_began, self._began = 0, time.perf_counter(), time.perf_counter()
        self._base, self._running, self._sampled = steps, False, steps
        self._batch, self._epoch_steps = 0, 0
        self._training = readings.Training()
        self._normalized: set[str] = set()
        self._attachment: Attachment | None = None
        if earlier is not None:
            self._go_on_with(earlier)
        self.lab = KerasLaboratory(backend, self._shelves())
        self._evaluation_plan = readings.Spread(0, 0)
        self._open_if_built()

    def _go_on_with(self, earlier: Session) -> None:
        """Take over what an earlier session knows, and the training batches that it has kept."""
        self._plan, self._epoch, self._training = earlier.plan, earlier.epoch, earlier.training
        ours, theirs = self._attached.training, earlier._attached.training
        if ours is not None and theirs is not None:
            ours.kept = theirs.kept

    def _shelves(self) -> dict[Split, Shelf]:
        if self.watch.probe is not None:
            return probes(self.watch.probe)
        if self._attached.training is None or self._attached.evaluation is None:
            return {}
        return {"training": self._attached.training.kept, "evaluation": self._attached.evaluation.kept}

    # what the callback forwards

    def epoch_begin(self, epoch: int, steps: int | None) -> None:
        """Begin an epoch of ``steps`` steps, if that is known."""
        self._epoch, self._epoch_began, self._base = epoch, time.perf_counter(), self.steps
        self._epoch_steps = steps or 0

    def batch_begin(self, batch: int) -> None:
        """Take the sample of the step that just finished, and prepare for the next one; most steps do neither."""
        if self._running:
            self._finished(self._base + batch, None)
            if self.steps == self._first:
                self._attached.refresh()
        self._running, self._batch = True, batch
        self.changes.step()
        if self._attached.training is not None:
            self._attached.training.want(wanted=self._due(self.steps, self.steps + self.backend.steps_per_execution))

    def training_ends(self, logs: dict[str, Any] | None) -> None:
        """Take the sample of the last step of the epoch."""
        if not self._running:
            return
        self.changes.stepped()
        end = self._batch + self.backend.steps_per_execution
        self._finished(self._base + (min(end, self._epoch_steps) if self._epoch_steps else end), logs, last=True)
        self._running = False

    def test_begin(self, steps: int | None = None) -> None:
        """Take what is known of the training before the evaluation resets the metrics.

        Args:
            steps: batches of an evaluation alone, if that is known.
        """
        self.training_ends(None)
        keeper = self._attached.evaluation
        examples = 0 if keeper is None or keeper.kept.examples else EXAMPLES
        self._evaluation_plan = readings.Spread(steps or self.backend.evaluation_batches, examples)

    def test_batch_begin(self, batch: int) -> None:
        """Keep evaluation batches, evenly over the first evaluation."""
        if not batch:
            self.changes.evaluating()
        keeper = self._attached.evaluation
        if keeper is None or not self._evaluation_plan.examples:
            return
        if keeper.wanted:
            keeper.collect()
        keeper.want(wanted=self._evaluation_plan.takes(batch, keeper.kept))

    def test_end(self) -> None:
        """Take the last evaluation batch that was asked for, and what the evaluation moved."""
        self.changes.evaluated()
        keeper = self._attached.evaluation
        if keeper is not None and keeper.wanted:
            keeper.collect()
            keeper.want(wanted=False)

    def epoch_end(self, epoch: int, logs: dict[str, Any]) -> None:
        """Take the evaluation, and run the experiments that a diagnosis waits for."""
        self.training_ends(logs)
        self._open_if_built()
        record = readings.evaluation_record(self, epoch, logs)
        if record is not None:
            self._note_unrestored()
            self.watch.evaluated(record)
        seconds = seconds_after(time.perf_counter() - self._epoch_began)
        self._experiment(epoch, seconds)

    def evaluation_alone(self, logs: dict[str, Any]) -> None:
        """Take an evaluation outside of ``fit``, and look at the model as it is."""
        self.test_end()
        self._open_if_built()
        keeper = self._attached.evaluation
        kept = None if keeper is None else keeper.kept
        self.watch.evaluated(readings.evaluation_alone(self, self._epoch, logs, kept))
        self.train_end()

    def train_end(self) -> None:
        """Look once more: some faults exist only now."""
        self._open_if_built()
        seconds = seconds_after(time.perf_counter() - self._began, FINAL_SECONDS)
        self._experiment(self._epoch, seconds, final=True)

    def detach(self) -> Statistics:
        """Leave the model as it was; return the running statistics, to go on counting in the next ``fit``."""
        self._finalizer()
        self.lab.release()
        return self._attached.known

    # what is known

    @property
    def plan(self) -> Mapping[str, Any]:
        """Return what Keras told of the training."""
        return self._plan

    @property
    def epoch(self) -> int:
        """Return the epoch that is running, or the last one."""
        return self._epoch

    @property
    def changes(self) -> Changes:
        """Return what evaluations used against what training left."""
        return self._attached.changes

    @property
    def still(self) -> tuple[str, ...]:
        """Return the layers that normalized in training while their scale and offset stayed as they were."""
        return self.changes.still(self._normalized)

    @property
    def training(self) -> readings.Training:
        """Return the training metrics at the end of the epoch."""
        return self._training

    @property
    def evaluated_with_batch_statistics(self) -> tuple[str, ...]:
        """Return the layers that normalized with batch statistics in evaluation."""
        return tuple(self.tap.evaluated)

    # inside

    def _experiment(self, epoch: int, seconds: float, *, final: bool = False) -> None:
        self.watch.experiment(
            self.lab,
            step=self.steps,
            epoch=epoch,
            seconds=seconds,
            final=final,
            swapped=self.changes.now_swapped,
            moved=self.changes.now_moved,
        )

    def _due(self, after: int, until: int) -> bool:
        return any(self.watch.due(step) for step in range(after + 1, until + 1))

    def _finished(self, steps: int, logs: dict[str, Any] | None, *, last: bool = False) -> None:
        before, self.steps = self.steps, steps
        if last:
            self._training = readings.training(self.backend, logs)
        if steps <= self._sampled or not (last or self._due(before, steps)):
            return
        self._sampled = steps
        self._open_if_built()
        self.changes.made()
        if self._attached.training is not None:
            self._attached.training.collect()
        seen = self._training if last else readings.training(self.backend, None)
        calls = self.tap.records()
        self._note_lines()
        idle = self.tap.idle(calls)
        self._normalized.update(call.site.layer for call in calls)
        self.watch.observe(StepSnapshot(steps, self._epoch, calls, seen.accuracy, seen.loss, seen.examples, idle))
        if self.watch.wants_look:
            self.watch.look(self.lab, step=steps, epoch=self._epoch)

    def _note_lines(self) -> None:
        """Say anew what is watched where a step showed from which lines layers are called."""
        if (renewed := located(self._attachment, self.tap)) is not None:
            self._attachment = renewed
            self.watch.open(renewed)

    def _note_unrestored(self) -> None:
        """Say anew what is not restored where a layer that no step normalizes in was given parameters since."""
        if self._attachment is None:
            return
        beside = [w for w in self.tap.layers if w.path not in (*self._normalized, *self._attachment.unrestored)]
        found = tuple(watched.path for watched in beside if watched.unrestored())
        if found:
            self._attachment = replace(self._attachment, unrestored=(*self._attachment.unrestored, *found))
            self.watch.open(self._attachment)

    def _open_if_built(self) -> None:
        if self._opened or not self.tap.built:
            return
        self._opened = True
        self.changes.begin()
        self._attachment = attachment(self.tap)
        self.watch.open(self._attachment)
        steps, epochs = self._plan.get("steps"), self._plan.get("epochs")
        self.watch.structured(structure(self.backend.model, steps_per_epoch=steps, epochs=epochs))
