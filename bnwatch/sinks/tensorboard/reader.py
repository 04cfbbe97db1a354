"""Reads records back. What a record holds is hostile until its types are checked."""

from __future__ import annotations

import itertools
import json
import math
import os
import struct
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from tensorboard.compat.proto.event_pb2 import SessionLog
from tensorboard.compat.proto.types_pb2 import DT_DOUBLE, DT_FLOAT, DT_STRING

from bnwatch.diagnosis import LOOKS_AGAIN, Diagnosis, Report, Skipped
from bnwatch.evidence import Attribution, Composition, Entering, Look
from bnwatch.records import CHANNEL_STATISTICS, Attachment, ChannelStatistics, EvaluationRecord, Structure
from bnwatch.signals import SITE_STATISTICS, STATISTICS, Replicas, SharedSites, SignalTable
from bnwatch.sinks.tensorboard import schema
from bnwatch.sinks.tensorboard.events import CorruptRecordError, is_event_file, read_events
from bnwatch.sinks.tensorboard.schema import Fields, RecordedCells, SchemaError
from bnwatch.sinks.tensorboard.writer import SUBDIRECTORY

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray

    from bnwatch.records import CallSite, LayerSpec
    from bnwatch.sinks.tensorboard.events import Mark

    Measured = RecordedCells | Attribution | Composition | Entering | Look | Replicas
    Seen = Attachment | Structure | SignalTable | ChannelStatistics | EvaluationRecord | Measured
    Entity = Seen | Diagnosis | Skipped | Report

T = TypeVar("T")

_PROGRESS = struct.Struct("<4d")
_NOTHING = np.zeros((0, len(STATISTICS)), np.float32)


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
        samples: False leaves ``tables`` and ``channels`` empty, which are nearly all of the memory; the report of a run
            is the same.

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
        files = [File.read(file, samples=samples) for file in paths]
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
    files = [File.read(path, mark.size if path.name == mark.name else None) for path in paths]
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


@dataclass(slots=True)
class _Entry:
    step: int
    wall_time: float
    entity: Entity


@dataclass(slots=True)
class File:
    """The entries of one event file, in the order they were written."""

    path: Path
    entries: list[_Entry] = field(default_factory=list)
    specs: dict[str, LayerSpec] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    start: tuple[int, float] | None = None
    """Step from which on earlier files are to be forgotten, and when that was said."""
    first: float = math.inf
    resumed: bool = False
    """It goes on where another file was, with what was known there."""

    refused: int = 0
    why: str = ""

    @classmethod
    def read(cls, path: Path, limit: int | None = None, *, samples: bool = True) -> File:
        """Return what a file holds, up to so many bytes of it."""
        file = cls(path)
        understood = Decoder(file.specs, samples=samples)
        try:
            for event in read_events(path, limit):
                file.take(event, understood.event)
        except (CorruptRecordError, OSError) as error:
            file.stop(error)
        if file.refused:
            file.problems.append(file.refusal())
        return file

    def take(self, event: Any, understand: Callable[[Any], list[Entity]]) -> None:
        """Add what an event holds."""
        wall_time = event.wall_time if math.isfinite(event.wall_time) else 0.0
        self.first = min(self.first, wall_time)
        if event.HasField("session_log"):
            if event.session_log.status == SessionLog.START and self.start is None:
                self.start = event.step, wall_time
        elif event.HasField("summary"):
            self.resumed |= not self.entries and any(v.tag == schema.RESUMED for v in event.summary.value)
            try:
                entities = understand(event)
            except (ValueError, RecursionError) as error:
                self.refused += 1
                self.why = self.why or (str(error) if isinstance(error, SchemaError) else "malformed JSON")
            else:
                self.add(event.step, event.wall_time, entities)

    def add(self, step: int, wall_time: float, entities: Sequence[Any]) -> None:
        """Add what was understood of an event."""
        wall_time = wall_time if math.isfinite(wall_time) else 0.0
        self.first = min(self.first, wall_time)
        self.entries += [_Entry(step, wall_time, entity) for entity in entities]

    def stop(self, error: CorruptRecordError | OSError) -> None:
        """Note why it cannot be read any further."""
        if isinstance(error, CorruptRecordError):
            behind = "what lies behind is lost" if math.isfinite(self.first) else "is it an event file?"
            self.problems.append(f"{str(self.path)!r} is damaged: {error}; {behind}")
        else:
            self.problems.append(f"{str(self.path)!r} cannot be read: {error.strerror or type(error).__name__}")

    def refusal(self) -> str:
        """Return how many events hold what cannot be understood, and why the first does."""
        many = "1 event" if self.refused == 1 else f"{self.refused:,} events"
        return f"{str(self.path)!r} holds {many} that cannot be understood: {self.why}"


@dataclass(frozen=True, slots=True)
class TableLayout:
    """What rows and columns of a table mean.

    Attributes:
        sites: of each row of a sample; none of the table of one layer.
        layer: of which the rows are, in the table of one layer.
        columns: that were written.
        zeros: that were not, since they are zero in every row.
    """

    sites: tuple[CallSite, ...]
    layer: str
    columns: tuple[str, ...]
    zeros: tuple[str, ...] = ()

    @property
    def width(self) -> int:
        """Return how many numbers of a row were written."""
        return len(self.columns)

    def arranged(self, values: NDArray[np.float32], columns: tuple[str, ...]) -> NDArray[np.float32]:
        """Return rows that were written with these columns; NaN where neither they nor ``zeros`` have one."""
        # where nothing was written there may be any number of rows: no memory for a claim
        if values.shape[1:] != (len(self.columns),) or not (values.size or not len(values) or self.sites):
            raise SchemaError(_SHAPE)
        if self.columns == columns:
            return values
        blank, runs = _moves(self.columns, self.zeros, columns)
        arranged = np.empty((len(values), len(columns)), np.float32)
        for place, number in blank:
            arranged[:, place] = number
        for to, start in runs:
            arranged[:, to] = values[:, start]
        return arranged


_SHAPE = "a table is not of the shape its tag describes"


@lru_cache(maxsize=64)
def _moves(
    written: tuple[str, ...], zeros: tuple[str, ...], columns: tuple[str, ...]
) -> tuple[list[tuple[int, float]], list[tuple[slice, slice]]]:
    """Return the columns that were not written, with their number, and where neighbours that were go together."""
    places = {name: n for n, name in enumerate(written)}
    blank = [(n, 0.0 if name in zeros else math.nan) for n, name in enumerate(columns) if name not in places]
    runs: list[tuple[slice, slice]] = []
    for n, name in enumerate(columns):
        start = places.get(name)
        if start is None:
            continue
        if runs and (runs[-1][0].stop, runs[-1][1].stop) == (n, start):
            to, before = runs.pop()
            runs.append((slice(to.start, n + 1), slice(before.start, start + 1)))
        else:
            runs.append((slice(n, n + 1), slice(start, start + 1)))
    return blank, runs


@dataclass(frozen=True, slots=True)
class _Channels:
    """What rows and columns of per-channel statistics mean."""

    layer: str
    sites: tuple[CallSite, ...]
    channels: tuple[int, ...]
    of: int

    @classmethod
    def read(cls, metadata: Fields) -> _Channels:
        channels, of = tuple(metadata.integers("channels")), metadata.integer("of")
        ascending = all(a < b for a, b in itertools.pairwise((-1, *channels, of)))
        if metadata.texts("statistics") != CHANNEL_STATISTICS or not ascending:
            msg = "channels are not what this version of bnwatch knows"
            raise SchemaError(msg)
        sites = tuple(schema.parse_site(site) for site in metadata.items("sites"))
        return cls(metadata.text("layer"), sites, channels, of)

    def statistics(self, step: int, values: NDArray[np.float32]) -> ChannelStatistics:
        """Return the statistics, without their epoch."""
        if values.shape != (len(self.sites) * len(CHANNEL_STATISTICS), len(self.channels)):
            msg = "channels are not of the shape their tag describes"
            raise SchemaError(msg)
        return ChannelStatistics(step, 0, self.layer, self.sites, self.channels, self.of, values)


class Decoder:
    """Turns the events of one file into entities."""

    def __init__(self, specs: dict[str, LayerSpec], *, samples: bool = True) -> None:
        """Learn ``specs`` from what is read; leave the numbers of samples out if not ``samples``."""
        self._specs, self._samples = specs, samples
        self._channels: dict[str, _Channels] = {}
        self.layouts: dict[str, TableLayout] = {}
        self._parsers: dict[str, Callable[[object], Entity]] = {
            schema.ATTACHMENT: schema.parse_attachment,
            schema.STRUCTURE: schema.parse_structure,
            schema.EVALUATION: schema.parse_evaluation,
            schema.CELLS: schema.parse_cells,
            schema.ATTRIBUTION: schema.parse_attribution,
            schema.COMPOSITION: schema.parse_composition,
            schema.ENTERING: schema.parse_entering,
            schema.LOOK: schema.parse_look,
            schema.REPLICAS: schema.parse_replicas,
            schema.REPORT: schema.parse_report,
        }

    def event(self, event: Any) -> list[Entity]:
        """Return what an event holds, the sample last.

        Raises:
            ValueError, RecursionError: it is not what its tags say.
        """
        entities: list[Entity] = []
        table: tuple[TableLayout, NDArray[np.float32]] | None = None
        progress = (0.0, math.nan, math.nan, 0.0)
        shared = []
        idle: tuple[str, ...] = ()
        for value in event.summary.value:
            if not value.HasField("tensor"):
                continue
            tag = value.tag
            if tag.startswith(schema.STATS):
                table = self._table(tag, value)
            elif tag.startswith(schema.SITES):
                layout = self._layout(tag, value)
                shared.append(SharedSites(layout.layer, layout.arranged(_floats(value.tensor), SITE_STATISTICS)))
            elif tag.startswith(schema.CHANNELS):
                step = max(int(event.step), 0)
                found = self._described(tag, value).statistics(step, _floats(value.tensor))
                entities += [found] if self._samples else []
            elif tag == schema.PROGRESS:
                progress = parse_progress(value.tensor)
            elif tag == schema.IDLE:
                idle = schema.parse_idle(json.loads(parse_text(value.tensor)))
            elif (parse := self._parser(tag)) is not None:
                entities.append(parse(json.loads(parse_text(value.tensor))))
        if table is not None:
            epoch, accuracy, loss, examples = progress
            entities.append(
                SignalTable(
                    step=max(int(event.step), 0),
                    epoch=int(epoch),
                    sites=table[0].sites,
                    values=table[1],
                    shared=tuple(shared),
                    accuracy=None if math.isnan(accuracy) else accuracy,
                    loss=None if math.isnan(loss) else loss,
                    examples=int(examples),
                    idle=idle,
                )
            )
        return entities

    def _table(self, tag: str, value: Any) -> tuple[TableLayout, NDArray[np.float32]]:
        layout, values = self._layout(tag, value), _floats(value.tensor)
        if values.shape != (len(layout.sites), len(layout.columns)):
            raise SchemaError(_SHAPE)
        return layout, layout.arranged(values, STATISTICS) if self._samples else _NOTHING

    def _parser(self, tag: str) -> Callable[[object], Entity] | None:
        if tag.startswith(schema.DIAGNOSIS):
            return schema.parse_diagnosis
        if tag.startswith(schema.SKIPPED):
            return schema.parse_skipped
        return self._parsers.get(tag)

    def _layout(self, tag: str, value: Any) -> TableLayout:
        if tag not in self.layouts:
            layout = _description(value)
            columns, zeros = layout.texts("statistics"), layout.maybe_texts("zeros")
            if tag.startswith(schema.STATS):
                sites = tuple(schema.parse_site(site) for site in layout.items("sites"))
                specs = [schema.parse_spec(spec) for spec in layout.items("layers")]
                self._specs.update({spec.path: spec for spec in specs})
                self.layouts[tag] = TableLayout(sites, "", columns, zeros)
            else:
                self.layouts[tag] = TableLayout((), layout.text("layer"), columns, zeros)
        return self.layouts[tag]

    def _described(self, tag: str, value: Any) -> _Channels:
        if tag not in self._channels:
            self._channels[tag] = _Channels.read(_description(value))
        return self._channels[tag]


def _description(value: Any) -> Fields:
    if not value.HasField("metadata"):
        msg = "a table comes without its description"
        raise SchemaError(msg)
    metadata = Fields(json.loads(value.metadata.plugin_data.content), "description of a table")
    metadata.version()
    return metadata


def _floats(tensor: Any) -> NDArray[np.float32]:
    shape = [dim.size for dim in tensor.tensor_shape.dim]
    if tensor.dtype != DT_FLOAT or len(shape) != 2 or min(shape) < 0:  # noqa: PLR2004
        msg = "a table is no matrix of float32"
        raise SchemaError(msg)
    content = tensor.tensor_content  # each look at it is a copy
    if 4 * shape[0] * shape[1] != len(content):
        msg = "a table is not as large as it says"
        raise SchemaError(msg)
    values: NDArray[np.float32] = np.frombuffer(content, "<f4").reshape(shape)
    return values


def parse_progress(tensor: Any) -> tuple[float, float, float, float]:
    """Return epoch, accuracy, loss and examples."""
    content = tensor.tensor_content
    if tensor.dtype != DT_DOUBLE or len(content) != _PROGRESS.size:
        msg = "progress is no four numbers of float64"
        raise SchemaError(msg)
    epoch, accuracy, loss, examples = _PROGRESS.unpack(content)
    if not (0 <= epoch < 1 << 53 and 0 <= examples < 1 << 53):
        msg = "progress is out of range"
        raise SchemaError(msg)
    return epoch, accuracy, loss, examples


def parse_text(tensor: Any) -> bytes:
    """Return the text that a tensor is."""
    if tensor.dtype != DT_STRING or len(tensor.string_val) != 1:
        msg = "an entry is no text"
        raise SchemaError(msg)
    return bytes(tensor.string_val[0])


def fold(directory: Path, files: list[File], sample: type = SignalTable) -> RunRecord:
    """Return the run as it stands after all its files, later ones overruling earlier ones.

    What these hold of a sample is of the type ``sample``.
    """
    files = sorted(files, key=lambda file: (file.first, file.path.name))
    run = _Run()
    for place, file in enumerate(files):
        if file.start is not None:
            for earlier in files[:place]:
                earlier.entries = _before(earlier.entries, *file.start)
    for file in files:
        if not file.resumed:
            run.session()
        for entry in file.entries:
            run.take(entry.entity)
    name = directory.parent if directory.name == SUBDIRECTORY else directory
    tables = _by_step(_of(files, sample))
    channels = _of(files, ChannelStatistics)
    epochs = {table.step: table.epoch for table in tables} if channels else {}
    evaluations = _by_step(_of(files, EvaluationRecord))
    last = max((entry.step for file in files for entry in file.entries), default=0)
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
        cells=_by_step(_of(files, RecordedCells)),
        attributions=_by_step(_of(files, Attribution)),
        compositions=_by_step(_of(files, Composition)),
        entering=_by_step(_of(files, Entering)),
        looks=_by_step(_of(files, Look)),
        replicas=_by_step(_of(files, Replicas)),
        problems=tuple(problem for file in files for problem in file.problems),
    )


def _before(entries: list[_Entry], step: int, wall_time: float) -> list[_Entry]:
    """Return the entries that a start at ``step`` leaves: what a parent wrote after its child began stays too."""
    return [entry for entry in entries if entry.step < step or entry.wall_time > wall_time]


def _of(files: list[File], kind: type[T]) -> list[T]:
    return [entry.entity for file in files for entry in file.entries if isinstance(entry.entity, kind)]


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

    def take(self, entity: Entity) -> None:
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
