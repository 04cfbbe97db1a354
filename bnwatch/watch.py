"""`Watch`: the front door. Takes what was seen, keeps the signals, runs the rules, tells the sinks and the user."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import sys
import traceback
import warnings
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from bnwatch import evidence, render
from bnwatch.channels import ChannelChoice
from bnwatch.diagnosis import LOOKS_AGAIN, BatchNormError, BatchNormWarning, Report, Severity, Skipped
from bnwatch.engine import Allowances, Engine
from bnwatch.lines import installed
from bnwatch.records import (
    Attachment,
    BatchStatistics,
    CallRecord,
    CallSite,
    EvaluationRecord,
    LayerSpec,
    RunningStatistics,
    StepSnapshot,
    Structure,
)
from bnwatch.signals import GAP, WORST, Signals, share, worst
from bnwatch.sinks.console import ConsoleSink, ProgressLine

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from types import TracebackType

    from numpy.typing import ArrayLike

    from bnwatch.diagnosis import Diagnosis
    from bnwatch.evidence import Cells, Laboratory
    from bnwatch.signals import Held
    from bnwatch.sinks import Item, Sink
    from bnwatch.sinks.tensorboard import TensorBoardSink

    OnDiagnosis = Literal["warn", "raise", "log"] | Callable[[Diagnosis], None]

_log = logging.getLogger("bnwatch")

DENSE_STEPS = 8
"""The first steps are all sampled; from there on the interval doubles with the step until it reaches ``every``."""


ENTERING_SHARE = 0.2
"""Share of the time of the cells that goes into what enters each layer: it passes fewer examples, and only twice."""

COMPOSITION_SHARE = 0.2
"""Share of the time of the cells that goes into how training batches are composed: it passes them up to five times."""


class Watch:
    """Watches one training run.

    An adapter feeds it; a framework without one is fed by hand with `record`, `step` and `evaluation`.

    Args:
        log_dir: directory for TensorBoard event files; None writes none.
        every: sampling interval in training steps; the first steps are sampled densely.
        probe: ``(x, y)`` for the experiments, in place of the examples kept from the training.
        allow: what is known and accepted: ``{"BN101": "why"}`` or ``{"BN101:encoder/*": "why"}``.
        on_diagnosis: for each diagnosis of severity warning or error: ``"warn"`` issues a `BatchNormWarning`,
            ``"log"`` logs to the logger ``bnwatch``, ``"raise"`` raises `BatchNormError`, a callable is called with it.
        experiments: ``"auto"`` runs those that a diagnosis needs, and once when training ends; False runs none.
        sinks: further places to write to.

    Raises:
        ValueError: an argument is not what is accepted; one sentence says which and what is.
    """

    def __init__(
        self,
        log_dir: str | os.PathLike[str] | None,
        *,
        every: int = 50,
        probe: tuple[Any, Any] | None = None,
        allow: Mapping[str, str] | None = None,
        on_diagnosis: OnDiagnosis = "warn",
        experiments: Literal["auto"] | bool = "auto",
        sinks: Sequence[Sink] = (),
    ) -> None:
        _check_arguments(log_dir, every, probe, on_diagnosis, experiments)
        self.log_dir = None if log_dir is None else os.fspath(log_dir)
        self.every, self.probe, self.enabled = every, probe, True
        self.experiments = experiments is not False
        self._on_diagnosis = on_diagnosis
        self._allow = Allowances(allow)
        self.signals = Signals()
        self._channels = ChannelChoice()
        self._engine = Engine(self._allow)
        self._given = tuple(sinks)
        self._sinks: list[Sink] = [*sinks]
        self._opened = self._closed = self._told_of_range = self._silent = False
        self.compares = True
        self._told: dict[str, Severity] = {}
        self._noted: dict[str, Skipped] = {}
        self._calls: list[CallRecord] = []
        self._step = 0
        self._right, self._seen = 0.0, 0
        self._cells_at, self._next_cells, self._attributed_at = -1, 0, -1
        self._record: TensorBoardSink | None = None

    # What a user calls.

    def __enter__(self) -> Watch:  # noqa: PYI034 - typing.Self needs Python 3.11
        """Return the watch."""
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        """Close, whatever happened inside."""
        self.close()

    def record(
        self,
        layer: str,
        *,
        batch_mean: ArrayLike,
        batch_var: ArrayLike,
        count: int,
        running_mean: ArrayLike,
        running_var: ArrayLike,
        decay: float,
        site: int = 0,
        epsilon: float = 1e-5,
        updates: int | None = None,
        bessel_corrected: bool = False,
        kind: str = "BatchNormalization",
    ) -> None:
        """Record one training-mode call of a layer in the current step; see `records` for the meaning of each number.

        Raises:
            ValueError: the statistics have different lengths, or a number lies outside its range.
        """
        if not self.enabled:
            return
        given = {
            "batch_mean": batch_mean, "batch_var": batch_var, "running_mean": running_mean, "running_var": running_var,
        }  # fmt: skip
        arrays = {name: np.asarray(value).reshape(-1) for name, value in given.items()}
        lengths = {name: len(array) for name, array in arrays.items()}
        if len(set(lengths.values())) != 1 or not lengths["batch_mean"]:
            msg = f"record({layer!r}): the four statistics need one number a channel each, got lengths {lengths}"
            raise ValueError(msg)
        if not 0.0 <= decay <= 1.0:
            msg = f"record({layer!r}): decay must lie in [0, 1], the weight of the old value, got {decay!r}"
            raise ValueError(msg)
        if count < 1:
            msg = f"record({layer!r}): count must be at least 1, the elements per channel, got {count!r}"
            raise ValueError(msg)
        spec = LayerSpec(layer, kind, lengths["batch_mean"], epsilon, decay, bessel_corrected)
        self._calls.append(
            CallRecord(
                spec,
                CallSite(layer, site),
                BatchStatistics(arrays["batch_mean"], arrays["batch_var"], int(count)),
                RunningStatistics(arrays["running_mean"], arrays["running_var"], decay, updates, bessel_corrected),
            )
        )

    def step(self, *, accuracy: float | None = None, loss: float | None = None, examples: int = 1) -> None:
        """End a training step; accuracy and loss are those of its batch of ``examples``."""
        with self.guard("ending a step"):
            self._step += 1
            accuracy = self._share(accuracy)
            if accuracy is not None:
                self._right += float(accuracy) * examples
                self._seen += examples
            if self.due(self._step):
                self._open_by_hand()
                mean, seen = self._mean_accuracy()
                self.observe(StepSnapshot(self._step, 0, tuple(self._calls), mean, loss, seen))
            self._calls = []

    def evaluation(
        self, *, accuracy: float | None = None, loss: float | None = None, examples: int = 0, classes: int = 0
    ) -> None:
        """Record an evaluation on ``examples`` examples; the training accuracy since the last one goes with it."""
        with self.guard("recording an evaluation"):
            if not self.enabled:
                return
            accuracy = self._share(accuracy)
            self._start()
            mean, seen = self._mean_accuracy()
            self._right, self._seen = 0.0, 0
            self.evaluated(
                EvaluationRecord(
                    self._step, 0, accuracy, loss, examples, train_accuracy=mean, train_examples=seen, classes=classes
                )
            )
            self._announce()  # by hand, no experiment is to follow

    @property
    def diagnoses(self) -> tuple[Diagnosis, ...]:
        """Return every diagnosis in its last state."""
        return self._engine.diagnoses

    @property
    def skipped(self) -> tuple[Skipped, ...]:
        """Return the rules that could not look, with the reason."""
        return self._engine.skipped

    def report(self) -> Report:
        """Return what is known now."""
        signals = self.signals
        return Report(
            run=self.log_dir or "",
            diagnoses=self.diagnoses,
            skipped=self.skipped,
            layers=len(signals.specs),
            sites=len(signals.table.sites) if signals.table else 0,
            samples=signals.samples,
            steps=signals.step,
            evaluations=signals.evaluated,
            complete=self._closed,
        )

    def close(self) -> None:
        """Conclude: unused allowances, the closing summary, the sinks. A second call does nothing."""
        if self._closed:
            return
        try:
            with self.guard("closing"):
                if self._opened and self.enabled:
                    if self.compares and self.signals.replicas is None:
                        self.compare(step=self.signals.step, epoch=self.signals.epoch, judge=False)
                    self.signals.ended = True
                    self.signals.unused_allowances = tuple(sorted(self._allow.unused))
                    self._judge()
        finally:
            self._opened, self._closed, self._record = False, True, None
            # whatever follows, another training or an evaluation alone, may be of another state of the model
            self._cells_at = self._attributed_at = -1
            for sink in self._sinks:
                with self.guard("closing a sink"):
                    sink.close(self.report())

    # What an adapter calls.

    def silence(self) -> None:
        """Go on without files, words and experiments: another process speaks for this training."""
        self._silent, self.log_dir, self.experiments = True, None, False
        self._on_diagnosis = lambda _: None

    def leave(self, *, step: int, fingerprint: str, own: Mapping[str, Any]) -> None:
        """Leave beside the record, for a snapshot taken after ``step`` steps, what it takes to `resume` there.

        Args:
            step: training steps finished.
            fingerprint: tells this training from another one at the same step.
            own: what the adapter knows: text, numbers, arrays, lists and dictionaries of them.
        """
        if self._record is None or not self._opened or not self.enabled:
            return
        from bnwatch import resume

        progress = resume.Progress(
            told=self._told,
            used=frozenset(self._allow.used),
            cells_at=self._cells_at,
            next_cells=self._next_cells,
            attributed_at=self._attributed_at,
            told_of_range=self._told_of_range,
            channels=self._channels,
        )
        engine = self._engine
        memory = resume.Memory(self.signals, engine.appeared, engine.skipped, engine.quiet, progress, own)
        try:
            resume.leave(self._record, step, fingerprint, memory)
        except OSError as error:
            reason = error.strerror or type(error).__name__
            _log.warning("bnwatch: a run that is resumed at step %d will be watched anew: %s", step, reason)

    def resume(self, *, step: int, fingerprint: str, take: Callable[[Mapping[str, Any]], None]) -> bool:
        """Go on after ``step`` steps from what was left then, and return whether that was possible.

        Where it is not, one line of logging says why.

        Args:
            step: training steps finished.
            fingerprint: as it was given to `leave`.
            take: takes what the adapter knew, or raises where that is of no use.
        """
        if self.log_dir is None or not self.enabled:
            return False
        from bnwatch import resume

        try:
            found = resume.find(self.log_dir, step, fingerprint, take)
        except resume.CannotResumeError as error:
            _log.warning("bnwatch begins anew at step %d: %s", step, error)
            return False
        memory, progress = found.memory, found.memory.progress
        self.signals = memory.signals
        self._engine.recall(memory.diagnoses, memory.skipped, memory.quiet)
        self._noted = {entry.rule: entry for entry in memory.skipped}
        self._channels = progress.channels
        self._told = dict(progress.told)
        self._allow.unused -= progress.used
        self._cells_at, self._next_cells = progress.cells_at, progress.next_cells
        self._attributed_at, self._told_of_range = progress.attributed_at, progress.told_of_range
        self._start()
        if self._record is not None:
            self._record.take_up(found.mark, step, self.signals.specs, found.chosen, found.tables)
        resume.forget_after(self.log_dir, step)
        return True

    def open(self, attachment: Attachment) -> None:
        """Say what is watched, when training starts; once more when that has changed."""
        self._start()
        self.signals.ended = False
        self.signals.attach(attachment)
        self._write(attachment)
        self._judge()

    def structured(self, structure: Structure) -> None:
        """Say how the layers are connected and how long training is to be, right after `open`."""
        self.signals.structure = structure
        self._write(structure)
        self._judge()

    def due(self, step: int) -> bool:
        """Return whether ``step``, counted from 1, is sampled: all of the first, then ever fewer, then each `every`.

        With an even interval every other sample is one step late: of two populations in turn, as a discriminator gets
        them, only one would else be seen.
        """
        doubled = 1 << (2 * step // DENSE_STEPS).bit_length() >> 1
        interval = min(self.every, max(1, doubled))
        number, place = divmod(step, interval)
        return self.enabled and place == (number % 2 if interval % 2 == 0 else 0)

    def observe(self, snapshot: StepSnapshot) -> None:
        """Take a sampled step."""
        table = self.signals.observe(snapshot)
        self._write(table)
        self._judge()
        active = sorted((d for d in self._engine.appeared if d.state == "active"), key=lambda d: -d.severity)
        suspects = [d.subject for d in active if d.subject in self.signals.specs]
        for channels in self._channels.take(snapshot, table, self.signals.samples, suspects):
            self._write(channels)

    def evaluated(self, record: EvaluationRecord) -> None:
        """Take an evaluation. What it brings up is told after `experiment`, which is to follow, has looked into it."""
        self.signals.evaluate(record)
        self._write(record)
        if self.compares:
            self.compare(step=record.step, epoch=record.epoch, judge=False)
        self._judge(tell=not self.experiments)

    def compare(self, *, step: int, epoch: int, held: Held | None = None, judge: bool = True) -> None:
        """Compare what the replicas evaluate with: ``held``, or what they held in the latest sample.

        An adapter that gives ``held`` sets ``compares`` to False: by default every evaluation compares.
        """
        found = self.signals.compare(step, epoch, held)
        if found is not None:
            self._write(found)
        if judge:
            self._judge()

    def news(self, step: int) -> dict[str, float]:
        """Return what became known at ``step``, by the names of TensorBoard's scalars; nothing at most steps.

        ``bnwatch/diagnoses`` counts the active diagnoses of severity warning or error.
        """
        found: dict[str, float] = {}
        table, evaluations = self.signals.table, self.signals.evaluations
        sample = table if table is not None and table.step == step else None
        evaluation = evaluations[-1] if evaluations and evaluations[-1].step == step else None
        if sample is not None:
            found = {WORST + name: value for name, value in worst(sample.distances()).items()}
        if evaluation is not None and evaluation.gap is not None:
            found[GAP] = evaluation.gap
        if sample is not None or evaluation is not None:
            active = [d for d in self.diagnoses if d.state == "active" and d.severity >= Severity.WARNING]
            found["bnwatch/diagnoses"] = float(len(active))
        return found

    def refuse(self, reason: str) -> None:
        """Let this training go on unwatched, and say why."""
        self.enabled = False
        self.advise(f"{reason}; this training goes on unwatched")

    @staticmethod
    def advise(sentence: str) -> None:
        """Say a sentence about how the watch is used."""
        warnings.warn(sentence, BatchNormWarning, stacklevel=_outside())

    @property
    def wants_look(self) -> bool:
        """Return whether a look through the network is worth its cost now: as long as it was not seen to learn."""
        return self.enabled and self.experiments and not self.signals.learning

    def look(self, lab: Laboratory, *, step: int, epoch: int, gradients: bool = False) -> None:
        """Look through the network on one kept training batch; with gradients at once where a rule asks for them."""
        try:
            look = evidence.look(lab, step=step, epoch=epoch, gradients=gradients)
        except evidence.ExperimentNotPossibleError as error:
            self.signals.refused = str(error) if self._engine.needs("look", "gradients") else self.signals.refused
        else:
            self.signals.looks.append(look)
            self._write(look)
        self._judge()
        if not gradients and self._engine.needs("gradients"):
            self.look(lab, step=step, epoch=epoch, gradients=True)

    def experiment(
        self,
        lab: Laboratory,
        *,
        step: int,
        epoch: int,
        seconds: float | None,
        final: bool = False,
        swapped: Callable[[], bool | None] = lambda: None,
        moved: Callable[[], tuple[str, ...]] = tuple,
    ) -> None:
        """Run the experiments that rules wait for, each within ``seconds``; the cells also at the end (``final``).

        ``swapped`` and ``moved`` tell of the model as it is now what `bnwatch.evidence.Cells` says of them. A rule that
        goes on asking is answered at ever longer intervals: after the 1st, 2nd, 4th, 8th … evaluation.
        """
        if not self.enabled or not self.experiments:
            return
        self.signals.ended = final
        turn = self.signals.evaluated >= self._next_cells and self._engine.needs("cells")
        cells = self.signals.cells
        again = final and self._cells_at == step
        if again and (
            ((cells is None or not cells.swapped) and swapped()) or ((cells is None or not cells.moved) and moved())
        ):
            # what was measured at the last evaluation is of other weights or other running statistics
            self._cells_at, self._attributed_at, self.signals.attribution = -1, -1, None
        if (turn or final) and self.signals.specs and self._cells_at != step:
            self._cells_at, self._next_cells = step, max(2 * self.signals.evaluated, 1)
            own, mixed = (None if seconds is None else part * seconds for part in (ENTERING_SHARE, COMPOSITION_SHARE))
            rest = 1.0 - ENTERING_SHARE - COMPOSITION_SHARE
            found = self._crosscheck(lab, step, epoch, None if seconds is None else rest * seconds)
            if found is not None:
                self.signals.cells = replace(found, swapped=swapped(), moved=moved())
                self._write(self.signals.cells)
            self._entering(lab, step, epoch, own)
            self._composition(lab, step, epoch, mixed)
            self._judge(tell=False)
        if self._engine.needs("attribution") and self._attributed_at != self._cells_at:
            self._attributed_at = self._cells_at
            self._attribute(lab, step, epoch, seconds)
        if self._engine.needs("look", "gradients"):
            self.look(lab, step=step, epoch=epoch, gradients=True)
        self._announce()

    def _crosscheck(self, lab: Laboratory, step: int, epoch: int, seconds: float | None) -> Cells | None:
        wanted = self._engine.needs("cells")
        budget, progress = evidence.Budget(seconds=seconds), ProgressLine()
        try:
            cells = evidence.crosscheck(lab, step=step, epoch=epoch, budget=budget, progress=progress)
        except evidence.ExperimentNotPossibleError as error:
            self.signals.refused = str(error) if wanted else None
            return None
        finally:
            progress.clear()
        self.signals.refused = None
        return cells

    def _entering(self, lab: Laboratory, step: int, epoch: int, seconds: float | None) -> None:
        """Measure what enters each layer, of both splits; where one is missing, the cells have said so."""
        budget, progress = evidence.Budget(seconds=seconds), ProgressLine()
        try:
            found = evidence.entering(lab, step=step, epoch=epoch, budget=budget, progress=progress)
        except evidence.ExperimentNotPossibleError:
            self.signals.entering = None
        else:
            self.signals.entering = found
            self._write(found)
        finally:
            progress.clear()

    def _composition(self, lab: Laboratory, step: int, epoch: int, seconds: float | None) -> None:
        """Measure how training batches are composed; where they are missing, the cells have said so."""
        budget, progress = evidence.Budget(seconds=seconds), ProgressLine()
        try:
            found = evidence.composition(lab, step=step, epoch=epoch, budget=budget, progress=progress)
        except evidence.ExperimentNotPossibleError:
            self.signals.composition = None
        else:
            self.signals.composition = found
            self._write(found)
        finally:
            progress.clear()

    def _attribute(self, lab: Laboratory, step: int, epoch: int, seconds: float | None) -> None:
        """Attribute what the cells show to layers, in as much time again."""
        budget, progress = evidence.Budget(seconds=seconds), ProgressLine()
        try:
            found = evidence.attribute(lab, step=step, epoch=epoch, budget=budget, progress=progress)
        except evidence.ExperimentNotPossibleError as error:
            self.signals.refused = str(error)
        else:
            self.signals.attribution = found
            self._write(found)
        finally:
            progress.clear()
        self._judge(tell=False)

    @contextlib.contextmanager
    def guard(self, doing: str) -> Iterator[None]:
        """Keep an internal failure away from the training: one BN903, the watch switched off.

        What the user asked for passes: `BatchNormError` of ``on_diagnosis="raise"``, warnings that a filter turned into
        errors, and interrupts.
        """
        try:
            yield
        except (BatchNormError, BatchNormWarning):
            raise
        except Exception as error:  # noqa: BLE001 - whatever it is, the training must go on
            if not self.enabled:
                return
            self.enabled = False
            where = traceback.extract_tb(error.__traceback__)[-1]
            place = f"{os.path.basename(where.filename)}:{where.lineno}"  # noqa: PTH119 - a name, not a path to open
            self.signals.faults.append(f"{type(error).__name__} while {doing} ({place}): {error}")
            _log.debug("internal failure while %s", doing, exc_info=error)
            self._conclude_fault()

    # Inside.

    def _conclude_fault(self) -> None:
        try:
            self._judge(only="BN903")  # whatever failed may fail again
        except (BatchNormError, BatchNormWarning):
            raise
        except Exception:  # noqa: BLE001 - the report of a failure failed too: say it in the plainest way
            sys.stderr.write(f"bnwatch switched itself off: {self.signals.faults[-1]}\n")

    def _share(self, accuracy: float | None) -> float | None:
        """Return an accuracy that is one, None for anything else; a percentage is told of once."""
        known = share(accuracy)
        # NaN is that of no examples
        if accuracy is not None and known is None and not math.isnan(accuracy) and not self._told_of_range:
            self._told_of_range = True
            warnings.warn(
                f"bnwatch leaves out an accuracy of {float(accuracy):g}: it must lie in [0, 1]", BatchNormWarning,
                stacklevel=_outside(),
            )  # fmt: skip
        return known

    def _mean_accuracy(self) -> tuple[float | None, int]:
        """Return the mean training accuracy since the last evaluation, and over how many examples it is."""
        return (self._right / self._seen if self._seen else None), self._seen

    def _open_by_hand(self) -> None:
        known = self.signals.specs
        specs = {**known, **{call.spec.path: call.spec for call in self._calls if call.spec.path not in known}}
        if not self._opened or self.signals.attachment is None or len(specs) > len(known):
            self.open(Attachment(tuple(specs.values()), framework="recorded by hand"))

    def _start(self) -> None:
        """Open the sinks, once a run."""
        if not self._opened:
            self._opened, self._closed = True, False
            self._sinks = [*self._given] if self._silent else [*self._given, ConsoleSink()]
            self._open_files()

    def _open_files(self) -> None:
        if self.log_dir is None:
            return
        from bnwatch.sinks.tensorboard import TensorBoardSink  # no files, no import of tensorboard

        try:
            self._record = TensorBoardSink(self.log_dir)
            self._sinks.append(self._record)
        except OSError as error:
            warnings.warn(
                f"bnwatch goes on without files: {error}", BatchNormWarning,
                stacklevel=_outside(),
            )  # fmt: skip

    def _write(self, item: Item) -> None:
        for sink in list(self._sinks):
            try:
                sink.write(item)
            except OSError as error:
                self._sinks.remove(sink)
                warnings.warn(
                    f"bnwatch goes on without {type(sink).__name__}: {error}",
                    BatchNormWarning,
                    stacklevel=_outside(),
                )
            except Exception:
                self._sinks.remove(sink)  # so that the others hear of it
                raise

    def _judge(self, only: str | None = None, *, tell: bool = True) -> None:
        """Run the rules, or ``only`` one, on all that is known, and tell what is new, now or later."""
        for diagnosis in self._engine.run(self.signals, only):
            self._write(diagnosis)
        self._note_skipped()
        if tell:
            self._announce()

    def _note_skipped(self) -> None:
        """Write which rules could not look, where that changed: a run that is cut off has no closing report."""
        now = {skipped.rule: skipped for skipped in self.skipped}
        for rule in sorted(now.keys() | self._noted.keys()):
            entry = now.get(rule, Skipped(rule, LOOKS_AGAIN))
            if entry != self._noted.get(rule):
                self._write(entry)
        self._noted = now

    def _announce(self) -> None:
        """Tell each active diagnosis once, and once more when it got graver; causes together with consequences.

        What an experiment refuted before anybody heard of it is not told.
        """
        news = {
            d.key: d
            for d in self.diagnoses
            if d.state == "active" and d.severity > self._told.get(d.key, Severity.INFO) and self._engine.holds(d.key)
        }
        self._told.update({key: d.severity for key, d in news.items()})
        for diagnosis in news.values():
            if not news.keys() & set(diagnosis.causes):
                self._tell(diagnosis, [d for d in news.values() if diagnosis.key in d.causes])

    def _tell(self, diagnosis: Diagnosis, consequences: list[Diagnosis]) -> None:
        """Tell the user of a diagnosis, with the consequences that appeared together with it."""
        if callable(self._on_diagnosis):
            for one in (diagnosis, *consequences):
                self._on_diagnosis(one)
            return
        text = render.diagnosis_text(diagnosis, consequences=[(1, c) for c in consequences])
        if self._on_diagnosis == "raise":
            raise BatchNormError(text)
        if self._on_diagnosis == "log":
            _log.warning("%s", text)
        else:
            warnings.warn("\n" + text, BatchNormWarning, stacklevel=_outside())


class Verdict:
    """What a front door of an adapter tells during and after training, from the `Watch` it holds."""

    watch: Watch

    @property
    def diagnoses(self) -> tuple[Diagnosis, ...]:
        """Return every diagnosis in its last state."""
        return self.watch.diagnoses

    @property
    def skipped(self) -> tuple[Skipped, ...]:
        """Return the rules that could not look, with the reason."""
        return self.watch.skipped

    def report(self) -> Report:
        """Return what is known now."""
        return self.watch.report()


def _outside() -> int:
    """Return the stack level of the user's own line: the first frame that is neither bnwatch's nor an installed one."""
    level, frame = 1, sys._getframe(1)  # noqa: SLF001 - what warnings.warn itself uses; inspect.stack reads files
    while frame.f_back is not None and installed(frame.f_code.co_filename):
        frame, level = frame.f_back, level + 1
    return level


def _check_arguments(log_dir: object, every: object, probe: object, on_diagnosis: object, experiments: object) -> None:
    if log_dir is not None and not isinstance(log_dir, str | os.PathLike):
        msg = f"log_dir must be a path or None, got {log_dir!r}"
        raise ValueError(msg)
    if isinstance(every, bool) or not isinstance(every, int) or every < 1:
        msg = f"every must be a whole number of training steps, at least 1, got {every!r}"
        raise ValueError(msg)
    if probe is not None and not (isinstance(probe, tuple | list) and len(probe) == 2):  # noqa: PLR2004 - (x, y)
        msg = f"probe must be a pair (x, y) of inputs and class labels, got {type(probe).__name__}"
        raise ValueError(msg)
    if not callable(on_diagnosis) and on_diagnosis not in ("warn", "raise", "log"):
        msg = f"on_diagnosis must be 'warn', 'raise', 'log' or a callable, got {on_diagnosis!r}"
        raise ValueError(msg)
    if experiments not in ("auto", True, False):
        msg = f"experiments must be 'auto' or False, got {experiments!r}"
        raise ValueError(msg)
