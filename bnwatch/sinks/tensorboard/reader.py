"""Reads records back."""

from __future__ import annotations

import os
from collections import defaultdict
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bnwatch.diagnosis import LOOKS_AGAIN, Diagnosis, Report, Skipped
from bnwatch.evidence import Attribution, Composition, Entering, Look
from bnwatch.records import Attachment, ChannelStatistics, EvaluationRecord, Structure
from bnwatch.signals import Replicas, SignalTable
from bnwatch.sinks.tensorboard.events import SUBDIRECTORY, is_event_file
from bnwatch.sinks.tensorboard.file import File, Sample
from bnwatch.sinks.tensorboard.schema import RecordedCells

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from bnwatch.records import LayerSpec
    from bnwatch.sinks.tensorboard.decoder import Entity
    from bnwatch.sinks.tensorboard.events import Mark
    from bnwatch.sinks.tensorboard.file import Entry


class RecordError(Exception):
    """There is no record to read; the message is one sentence that says why."""


@dataclass(frozen=True, slots=True)
class RunRecord:
    """Everything the record of one run holds.

    Attributes:
        directory: where its event files lie.
        report: the last state of every diagnosis, and what was watched.
        attachment: what the tap found when it was attached, last time; None when that was not recorded.
        structure: what was known before the first step, last time; None when that was not recorded.
        specs: layers by path, from the attachment and from the tables.
        tables: the samples, by step.
        channels: per-channel statistics of a few layers at a few of the samples, by step.
        evaluations: the evaluations, by step.
        cells: the experiments, by step.
        attributions: to which layers the cost of the running statistics was attributed, by step.
        compositions: how the training batches are composed, by step.
        entering: what enters each layer, evaluation against training examples, by step.
        looks: the looks through the network, by step.
        replicas: how far apart the replicas were when they evaluated, by step.
        problems: what could not be read, one sentence each.
    """

    directory: Path
    report: Report
    attachment: Attachment | None = None
    structure: Structure | None = None
    specs: dict[str, LayerSpec] = field(default_factory=dict)
    tables: tuple[SignalTable, ...] = ()
    channels: tuple[ChannelStatistics, ...] = ()
    evaluations: tuple[EvaluationRecord, ...] = ()
    cells: tuple[RecordedCells, ...] = ()
    attributions: tuple[Attribution, ...] = ()
    compositions: tuple[Composition, ...] = ()
    entering: tuple[Entering, ...] = ()
    looks: tuple[Look, ...] = ()
    replicas: tuple[Replicas, ...] = ()
    problems: tuple[str, ...] = ()


def read_runs(path: str | os.PathLike[str], *, samples: bool = True) -> list[RunRecord]:
    """Return every run below a directory, or the one that an event file belongs to, by directory name.

    A damaged file loses what lies behind the damage; ``problems`` of its run says so.

    Args:
        path: the directory, or the event file.
        samples: False leaves ``tables`` and ``channels`` empty; the report of a run is the same. The numbers of most
            samples are then not read, nor their checksums.

    Raises:
        RecordError: there is nothing to read.
    """
    top = Path(path)
    if not top.exists():
        msg = f"no such file or directory: {str(top)!r}"
        raise RecordError(msg)
    found = {top.parent: [top]} if top.is_file() else _find(top)
    if not found:
        msg = f"no bnwatch record in {str(top)!r} or below"
        raise RecordError(msg)
    runs, problems = [], []
    for directory, paths in sorted(found.items()):
        files = [File(file, places=not samples) for file in paths]
        for file in files:
            file.read()
        problems += [problem for file in files for problem in file.problems]
        if any(file.entries for file in files):
            run = fold(directory, files)
            runs.append(run if samples else replace(run, tables=(), channels=()))
    if not runs:
        nothing = f"the record in {str(top)!r} holds no event of bnwatch"
        raise RecordError(*(problems or [nothing])[:1])
    return runs


def read_as_of(directory: Path, mark: Mark) -> RunRecord:
    """Return the run as its record stood when its latest file reached as far as ``mark``.

    Raises:
        RecordError: that file is not there any more, or what it holds up to the mark is damaged.
    """
    paths = _find(directory).get(directory, [])
    files = [File(path) for path in paths]
    for file in files:
        file.read(mark.size if file.path.name == mark.name else None)
    marked = next((file for file in files if file.path.name == mark.name), None)
    if marked is None or marked.path.stat().st_size < mark.size or marked.problems:
        msg = f"the record in {str(directory)!r} is not what it was"
        raise RecordError(msg)
    return fold(directory, [f for f in files if (f.first, f.path.name) <= (marked.first, marked.path.name)])


def _find(top: Path) -> dict[Path, list[Path]]:
    found: dict[Path, list[Path]] = {}
    for directory, _, names in os.walk(top):
        paths = [Path(directory, name) for name in sorted(names) if is_event_file(name)]
        # opening anything but a file may wait for ever
        if files := [path for path in paths if path.is_file()]:
            found[Path(directory)] = files
    return found


def fold(directory: Path, files: Iterable[File]) -> RunRecord:
    """Return the run as it stands after all its files, later ones overruling earlier ones.

    ``tables`` are of the type `Sample` where the files keep places.
    """
    files = sorted(files, key=lambda file: (file.first, file.path.name))
    kept = [file.entries for file in files]
    for place, file in enumerate(files):
        if file.start is not None:
            kept[:place] = [_before(entries, *file.start) for entries in kept[:place]]
    run = _Run()
    found: defaultdict[type, list[Any]] = defaultdict(list)
    for file, entries in zip(files, kept, strict=True):
        if not file.resumed:
            run.session()
        for entry in entries:
            run.take(entry.entity)
            found[type(entry.entity)].append(entry.entity)
    name = directory.parent if directory.name == SUBDIRECTORY else directory
    tables = _by_step(found[SignalTable] or found[Sample])
    channels = found[ChannelStatistics]
    epochs = {table.step: table.epoch for table in tables} if channels else {}
    evaluations = _by_step(found[EvaluationRecord])
    last = max((entry.step for entries in kept for entry in entries), default=0)
    sites = tables[-1].sites if tables else ()
    specs = {path: spec for file in files for path, spec in file.specs.items()}
    attachment = run.attachment
    if attachment is not None:
        specs.update({spec.path: spec for spec in attachment.layers})
    closing = run.report or Report(run="")
    report = Report(
        run=str(name),
        diagnoses=run.diagnoses(tables[-1].step if tables else 0),
        skipped=tuple(run.skipped.values()),
        layers=max(closing.layers, len(attachment.layers) if attachment else len({site.layer for site in sites})),
        sites=max(closing.sites, len(sites)),
        samples=max(closing.samples, len(tables)),
        steps=max(closing.steps, last),
        evaluations=max(closing.evaluations, len(evaluations)),
        complete=run.report is not None and run.report.complete,
    )
    return RunRecord(
        directory=directory,
        report=report,
        attachment=attachment,
        structure=run.structure,
        specs=specs,
        tables=tables,
        channels=tuple(replace(channels, epoch=epochs.get(channels.step, 0)) for channels in _by_step(channels)),
        evaluations=evaluations,
        cells=_by_step(found[RecordedCells]),
        attributions=_by_step(found[Attribution]),
        compositions=_by_step(found[Composition]),
        entering=_by_step(found[Entering]),
        looks=_by_step(found[Look]),
        replicas=_by_step(found[Replicas]),
        problems=tuple(problem for file in files for problem in file.problems),
    )


def _before(entries: list[Entry], step: int, wall_time: float) -> list[Entry]:
    """Return the entries that a start at ``step`` leaves: what a parent wrote after its child began stays too."""
    return [entry for entry in entries if entry.step < step or entry.wall_time > wall_time]


def _by_step(items: Sequence[Any]) -> tuple[Any, ...]:
    return tuple(sorted(items, key=lambda item: item.step))


class _Run:
    """What is known after each entry."""

    def __init__(self) -> None:
        self.attachment: Attachment | None = None
        self.structure: Structure | None = None
        self.report: Report | None = None
        self.skipped: dict[str, Skipped] = {}
        self._states: dict[str, tuple[int, Diagnosis]] = {}
        self._session = 0

    def session(self) -> None:
        """Begin what another process wrote: it looks anew, and the run is open again."""
        self._session += 1
        self.report = None
        self.skipped = {}

    def take(self, entity: Entity | Sample) -> None:
        if isinstance(entity, Attachment):
            self.attachment = entity
        elif isinstance(entity, Structure):
            self.structure = entity
        elif isinstance(entity, Diagnosis):
            self._diagnosed(entity)
            self.skipped.pop(entity.rule, None)
        elif isinstance(entity, Skipped) and entity.reason == LOOKS_AGAIN:
            self.skipped.pop(entity.rule, None)
        elif isinstance(entity, Skipped):
            self.skipped[entity.rule] = entity
        elif isinstance(entity, Report):
            self.report = entity
            self.skipped = {skipped.rule: skipped for skipped in entity.skipped}
            for diagnosis in entity.diagnoses:
                self._diagnosed(diagnosis)

    def diagnoses(self, last: int) -> tuple[Diagnosis, ...]:
        """Return the last states; what was active when a run was cut off held until its ``last`` sample."""
        states = [
            replace(diagnosis, last_step=max(diagnosis.last_step, last))
            if diagnosis.state == "active" and session == self._session and self.report is None
            else diagnosis
            for session, diagnosis in self._states.values()
        ]
        active = {diagnosis.key for diagnosis in states if diagnosis.state == "active"}
        return tuple(
            sorted(
                states,
                key=lambda d: (d.state != "active", not active.isdisjoint(d.causes), -d.severity, d.step),
            )
        )

    def _diagnosed(self, diagnosis: Diagnosis) -> None:
        session, before = self._states.get(diagnosis.key, (self._session, diagnosis))
        if session != self._session and before.state == "active" and before.step < diagnosis.step:
            # the run was resumed and the finding still holds
            diagnosis = replace(diagnosis, step=before.step, epoch=before.epoch)
        self._states[diagnosis.key] = self._session, diagnosis
