"""What the extension and the hand-written loop share: one watched training, from its first step to its end."""

from __future__ import annotations

import hashlib
import itertools
import time
from collections import Counter
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import chainer
import numpy as np

from bnwatch.chainer.arrays import Average, collect, to_float
from bnwatch.chainer.changes import Changes
from bnwatch.chainer.examples import ForwardPasses
from bnwatch.chainer.experiments import ChainerLaboratory, batches_of, within
from bnwatch.chainer.layers import Layers, framework
from bnwatch.chainer.ranks import Ranks
from bnwatch.chainer.structure import CHANGING, UNCALLED, Trace, structure
from bnwatch.chainer.tap import Tally, Tap
from bnwatch.evidence import PROBE_BATCH, ExperimentNotPossibleError, seconds_after
from bnwatch.lines import Callers, merged, told_apart
from bnwatch.records import (
    Attachment,
    BatchStatistics,
    CallRecord,
    CallSite,
    EvaluationRecord,
    RunningStatistics,
    StepSnapshot,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping, Sequence

    from bnwatch.chainer.tap import Call, Clock
    from bnwatch.evidence import Examples, Split
    from bnwatch.lines import Trail
    from bnwatch.records import Structure
    from bnwatch.watch import Watch


_UPDATES, _ACCUMULATED = 3, 64
"""Updates of parameters after which it is known how many steps go into one, and the steps in which they must come."""

_UNCALLED_STEPS = 8
"""Steps without batch normalization after which nobody looks for it any longer."""

_LOCATED_STEPS = 8
"""Sampled steps in which it is noted from which lines the layers are called: not every step calls them alike."""

_CALLERS = Callers({chainer.Link.__call__.__code__}, {chainer.training.Trainer.run.__code__})


class Session:
    """Joins a tap, the examples it keeps and a laboratory to a `Watch`.

    Every public method is called inside ``watch.guard``.

    Attributes:
        plan: returns the training steps of an epoch, and the epochs that are to come after that many steps; None where
            unknown.
        differentiates: tell on every step which calls are differentiated; else on those that are sampled.
    """

    def __init__(
        self,
        watch: Watch,
        models: Mapping[str, Any],
        clock: Clock,
        *,
        ranks: Ranks | None = None,
        step: int = 0,
        replicas: Mapping[str, Sequence[Any]] | None = None,
    ) -> None:
        """Begin a session after ``step`` steps, on one of several ranks.

        ``replicas`` are trained beside the model of that name.
        """
        self.watch, self.step, self.epoch = watch, step, 0
        self._first = step
        self.ranks = ranks or Ranks()
        watch.compares = not self.ranks.exchanging
        self.layers = Layers(models, replicas or {})
        self.passes = ForwardPasses(list(models.values()), eager=not self.layers.watched)
        self.tap = Tap(self.layers, clock, self.passes, self._failed)
        self.lab = ChainerLaboratory(self.layers, self._examples)
        self.changes = Changes(self.layers)
        self._unrestored: tuple[str, ...] = ()
        self.accuracy, self.loss = Average(), Average()
        self.evaluation_source: Callable[[int], Sequence[Examples]] | None = None
        self.plan: Callable[[int], tuple[int | None, int | None]] = lambda _: (None, None)
        self.differentiates = False
        self._seen_examples = self._made = 0
        self._updated_at: list[int] = []
        self._opened, self._known = False, len(self.layers.watched)
        self._unlocated = _LOCATED_STEPS
        self._began = self._evaluated = time.perf_counter()

    def start(self) -> None:
        """Begin to see, after a snapshot from what was left when it was taken."""
        if self.step and self.watch.resume(step=self.step, fingerprint=self._fingerprint(), take=self._recall):
            for layer in self.layers.watched:
                spec = self.watch.signals.specs.get(layer.path)
                layer.called_at = () if spec is None else spec.called_at
            self._opened = _by_path(self.watch.signals.attachment) == _by_path(self._attachment())
            self._first = 0
        if self.watch.experiments:
            self.passes.training.renew()
            if self.evaluation_source is None and self.watch.probe is None:
                self.passes.evaluation.renew()
        known = self.watch.signals.structure
        if known is None:
            self.tap.trace = Trace(self._failed)
        elif (known.steps_per_epoch, known.epochs) != (plan := self.plan(self._first)):
            self.watch.structured(replace(known, steps_per_epoch=plan[0], epochs=plan[1]))
        self._unrestored = self.layers.unrestored()
        self.changes.begin(self.step)
        self._made = self.layers.updates_made
        self.tap.callers = _CALLERS
        self.tap.enter()
        self._prepare()

    def leave(self) -> None:
        """Leave what is known now, for a run that goes on from here."""
        now = time.perf_counter()
        own = {
            "epoch": self.epoch,
            "accuracy": self.accuracy.memory,
            "loss": self.loss.memory,
            "examples": self._seen_examples,
            "lasted": [now - self._began, now - self._evaluated],
            "layers": [[layer.path, layer.initial, layer.updates] for layer in self.layers.watched],
        }
        self.watch.leave(step=self.step, fingerprint=self._fingerprint(), own=own)

    def _recall(self, own: Mapping[str, Any]) -> None:
        """Go on from what `leave` left."""
        layers = {path: (initial and (float(initial[0]), float(initial[1])), n) for path, initial, n in own["layers"]}
        averages = [(float(total), int(n), list(map(float, rest))) for total, n, rest in (own["accuracy"], own["loss"])]
        epoch, examples, (began, evaluated) = int(own["epoch"]), int(own["examples"]), map(float, own["lasted"])
        known = [layers[layer.path] for layer in self.layers.watched]
        for layer, (initial, updates) in zip(self.layers.watched, known, strict=True):
            layer.initial, layer.updates = initial, int(updates)
        self.accuracy.recall(averages[0])
        self.loss.recall(averages[1])
        self.epoch, self._seen_examples = epoch, examples
        self._began, self._evaluated = self._began - began, self._evaluated - evaluated

    def _fingerprint(self) -> str:
        """Return a digest of the running statistics: a snapshot brings them back to the bit."""
        running = self.lab.running()
        found = hashlib.sha256("\0".join(running).encode("utf-8", "surrogatepass"))
        for array in itertools.chain.from_iterable(running.values()):
            found.update(array.tobytes())
        return found.hexdigest()

    def end_step(self, calls: Sequence[Call], step: int, epoch: int, inferred: Collection[int] = ()) -> None:
        """End a step whose update made these calls, and differentiated ``inferred`` layers with running statistics."""
        self.step, self.epoch = step, epoch
        self._locate(calls)
        self._open(calls)
        self._seen_examples += self.tap.rows or (calls[0].rows if calls else 0)
        own = [call for call in calls if not call.replica]
        self._connect(own)
        self._count_updates()
        self.changes.trained(call.layer for call in own)
        self.passes.end_step([call.layer for call in own])
        if self.tap.sampled:
            idle = set(inferred) - {call.layer for call in own}
            self._observe(calls, tuple(self.layers.watched[index].path for index in sorted(idle)))
        self._prepare()

    def updated(self, step: int, *, expected: bool = False) -> None:
        """Read what the update of a step left, where that is worth its cost: an evaluation is to follow."""
        if expected or self.changes.due(step):
            self.changes.left(step)
            self.tap.called = self.changes.called

    def end_evaluation(
        self,
        batch_calls: Sequence[Call] = (),
        evaluating: Collection[int] = (),
        *,
        accuracy: Any = None,
        loss: Any = None,
        examples: int = 0,
    ) -> None:
        """Record an evaluation; since the last step these calls normalized with batch statistics.

        ``evaluating`` layers normalized with running statistics then: their other calls are none of the evaluation.
        """
        self._open(())
        if self.ranks.exchanging:
            self.ranks.evaluated(self.step, self.lab.running())
        self.passes.end_evaluation(int(examples))
        tally, self.tap.tally = self.tap.tally, Tally()
        outcome = self.changes.evaluated(self.step)
        layers = dict.fromkeys(call.layer for call in batch_calls if call.layer not in evaluating)
        paths = tuple(self.layers.watched[index].path for index in layers)
        moved = outcome.moved
        if moved is None:
            moved = {self.layers.watched[call.layer].path for call in batch_calls if call.decay < 1.0}
        record = EvaluationRecord(
            step=self.step,
            epoch=self.epoch,
            accuracy=None if accuracy is None else to_float(accuracy),
            loss=None if loss is None else to_float(loss),
            examples=int(examples) or tally.examples,
            train_accuracy=self.accuracy.read(),
            train_loss=self.loss.read(),
            train_examples=self._seen_examples,
            classes=tally.classes,
            majority=tally.majority,
            batch_statistics=paths,
            moved=tuple(layer.path for layer in self.layers.watched if layer.path in moved),
            still=outcome.still,
            swapped=outcome.swapped,
        )
        self.accuracy.clear()
        self.loss.clear()
        self._seen_examples = 0
        self.watch.evaluated(record)
        self._experiment(self._seconds(self._evaluated))
        self._evaluated = time.perf_counter()
        if self.watch.experiments:
            self.passes.training.renew()
        self.tap.grows = True
        self._prepare()

    def finish(self, *, complete: bool) -> None:
        """End the training; ``complete`` says that it was not cut off."""
        self.tap.leave()
        self._open(())
        if self.ranks.exchanging:
            self.ranks.leave(self.step, self.lab.running(), wait=complete)
            self._compare()
        if complete:
            self._experiment(self._seconds(self._began), final=True)

    def _experiment(self, seconds: float, *, final: bool = False) -> None:
        with self.changes.as_evaluated(self.step):
            self.watch.experiment(
                self.lab,
                step=self.step,
                epoch=self.epoch,
                seconds=seconds,
                final=final,
                swapped=partial(self.changes.swapped, self.step),
                moved=partial(self.changes.moved, self.step),
            )

    @staticmethod
    def _seconds(since: float) -> float:
        return seconds_after(time.perf_counter() - since)

    def _failed(self, error: Exception) -> None:
        with self.watch.guard("watching a forward pass"):
            raise error

    def _prepare(self) -> None:
        """Say before a step whether it is sampled, so that the others cost nothing."""
        # the last step before an evaluation, too: its batch may be an odd one
        due = self.watch.due(self.step + 1) or (self.watch.enabled and self.changes.due(self.step + 1))
        self.tap.sampled = self.passes.sampled = due
        self.tap.watch_functions(wanted=self.passes.wanted or self.tap.trace is not None)
        self.tap.watch_backward(wanted=self.differentiates or self.tap.sampled)
        if self.tap.sampled:
            self.layers.refresh()
        known, self._known = self._known, len(self.layers.watched)
        self._opened &= known == self._known

    def _open(self, calls: Sequence[Call]) -> None:
        """Tell the layers once, in the order of the first forward pass."""
        if self._opened:
            return
        self._opened = True
        if not any(layer.updates for layer in self.layers.watched):  # parameters may have been loaded since
            self._unrestored = self.layers.unrestored()
        self.watch.open(self._attachment(calls))

    def _locate(self, calls: Sequence[Call]) -> None:
        """Say from which lines the first few steps that are sampled call the layers."""
        if self.tap.callers is None or not self.tap.sampled:
            return
        trails: dict[int, list[Trail]] = {}
        for call in calls:
            if call.trail is not None and not call.replica:
                trails.setdefault(call.layer, []).append(call.trail)
        for index, found in trails.items():
            layer = self.layers.watched[index]
            lines = merged(layer.called_at, told_apart(found))
            self._opened &= lines == layer.called_at
            layer.called_at = lines
        self._unlocated -= bool(trails)
        if not self._unlocated:
            self.tap.callers = None

    def _attachment(self, calls: Sequence[Call] = ()) -> Attachment:
        self.layers.locate()
        watched = self.layers.watched
        order = dict.fromkeys([*(call.layer for call in calls), *range(len(watched))])
        unseen = self.layers.unseen() if self.step else {}
        specs = tuple(watched[index].spec() for index in order if watched[index].path not in unseen)
        unsupported = {**self.layers.unsupported, **unseen}
        initial = tuple(layer.path for layer in watched if layer.initial is not None)
        return Attachment(specs, unsupported, framework(), self.ranks.unseen, self._unrestored, initial)

    def _compare(self) -> None:
        """Compare what all ranks evaluated with, or say anew why that is not seen."""
        attachment = self.watch.signals.attachment
        if attachment is not None and attachment.unseen != self.ranks.unseen:
            self.watch.open(replace(attachment, unseen=self.ranks.unseen))
        for step, held in self.ranks.held():
            self.watch.compare(step=step, epoch=self.epoch, held=held)

    def _connect(self, calls: Sequence[Call]) -> None:
        """Tell how the layers are connected, from the first step that calls them; later, that its pass is not all."""
        trace, known = self.tap.trace, self.watch.signals.structure
        if trace is None:
            if known is not None and known.hidden is None and self.tap.sampled and self._differs(known, calls):
                self.watch.structured(replace(known, hidden=CHANGING))
        elif calls or not self.layers.watched or self.step - self._first >= _UNCALLED_STEPS:
            self.tap.trace = None
            accumulated = max(Counter(self.tap.passes).values(), default=1)
            size = self.tap.rows or (calls[0].rows if calls else None)
            steps, epochs = self.plan(self._first)
            known = structure(
                self.layers,
                trace,
                calls,
                rows=size,
                batch_size=size,
                steps_per_epoch=steps,
                epochs=epochs,
                accumulated=accumulated,
            )
            self.watch.structured(known if calls or not self.layers.watched else replace(known, hidden=UNCALLED))
        else:
            trace.restart()
            self.tap.passes = []

    def _count_updates(self) -> None:
        """Tell how many steps go into one update of the parameters, once three updates were seen."""
        at, known = self._updated_at, self.watch.signals.structure
        if known is None or len(at) == _UPDATES or self.step - self._first > _ACCUMULATED:
            return
        made = self.layers.updates_made
        if made != self._made:
            self._made = made
            at.append(self.step)
        if len(at) == _UPDATES and (steps := at[1] - at[0]) > 1 and at[2] - at[1] == steps:
            self.watch.structured(replace(known, accumulated=steps))

    def _differs(self, known: Structure, calls: Sequence[Call]) -> bool:
        seen = Counter(self.layers.watched[call.layer].path for call in calls)
        return seen != Counter({usage.path: len(usage.places) for usage in known.layers if usage.places})

    def _observe(self, calls: Sequence[Call], idle: tuple[str, ...]) -> None:
        records = self._records([call for call in calls if call.mean is not None])
        snapshot = StepSnapshot(
            step=self.step,
            epoch=self.epoch,
            calls=self.ranks.gather(self.step, records),
            accuracy=self.accuracy.read(),
            loss=self.loss.read(),
            examples=self._seen_examples,
            idle=idle,
        )
        self.watch.observe(snapshot)
        self._compare()
        if self.watch.wants_look:
            self.watch.look(self.lab, step=self.step, epoch=self.epoch)

    def _records(self, calls: Sequence[Call]) -> tuple[CallRecord, ...]:
        latest = {call.place: call for call in calls}
        used = {place: self.layers.at(*place) for place in latest}
        arrays = [array for call in calls for array in (call.mean, call.scale)]
        for place, layer in used.items():
            arrays += latest[place].running or (layer.link.avg_mean, layer.link.avg_var)
        host = iter([array.ravel() for array in collect(arrays, self.accuracy, self.loss)])
        batch = [_batch_statistics(call, next(host), next(host)) for call in calls]
        running = {
            place: RunningStatistics(
                next(host), next(host), float(latest[place].decay), layer.known_updates, bessel_corrected=True
            )
            for place, layer in used.items()
        }
        specs = {index: self.layers.at(index).spec() for index, _ in used}
        count: dict[tuple[int, int], int] = {}
        records = []
        for call, statistics in zip(calls, batch, strict=True):
            site = CallSite(specs[call.layer].path, count.get(call.place, 0), call.replica)
            count[call.place] = site.index + 1
            records.append(CallRecord(specs[call.layer], site, statistics, running[call.place]))
        return tuple(records)

    def _examples(self, split: Split, limit: int) -> Sequence[Examples]:
        if self.tap.communicates:
            msg = "the model communicates with other ranks in its forward pass, and these do not take part"
            raise ExperimentNotPossibleError(msg)
        if split == "training":
            found = self.passes.training.newest(limit)
            reason = self.passes.training.reason
        else:
            found = () if self.evaluation_source or self.watch.probe else self.passes.evaluation.newest(limit)
            reason = self.passes.evaluation.reason
        if not found and self.watch.probe is not None:
            model = next(iter(self.layers.models.values()))
            found = within(batches_of(model, tuple(self.watch.probe), "probe", self.tap.rows or PROBE_BATCH), limit)
        if not found and split == "evaluation" and self.evaluation_source is not None:
            found = self.evaluation_source(limit)
        if not found:
            msg = reason or f"no {split} examples were seen: pass probe=(inputs, labels)"
            raise ExperimentNotPossibleError(msg)
        return found


def _by_path(attachment: Attachment | None) -> Any:
    """Return an attachment so that two are equal that differ in the order of the layers."""
    return attachment and ({spec.path: spec for spec in attachment.layers}, dict(attachment.unsupported))


def _batch_statistics(call: Call, mean: Any, scale: Any) -> BatchStatistics:
    """Return mean and biased variance, from what the node kept."""
    var = scale
    if call.form != "var":
        exact = scale.astype(np.float64)
        square = np.square(exact) if call.form == "std" else 1.0 / np.square(exact)
        var = np.maximum(square - call.epsilon, 0.0).astype(scale.dtype)
    return BatchStatistics(mean, var, call.elements)
