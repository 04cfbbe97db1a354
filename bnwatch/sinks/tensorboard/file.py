"""One event file, read as far as it reaches, and on from there when it has grown.

Samples are nearly all of a record, and most readers want few of their numbers. So a file can keep of a sample what is
known of the training and where its numbers lie. One that is written like one before it is then recognized by the bytes
around its numbers, and these are not read.
"""

from __future__ import annotations

import math
import os
import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, cast

from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.compat.proto.tensor_pb2 import TensorProto

from bnwatch.signals import SignalTable
from bnwatch.sinks.tensorboard import schema
from bnwatch.sinks.tensorboard.decoder import Decoder, TableLayout, parse_progress
from bnwatch.sinks.tensorboard.events import (
    CorruptRecordError,
    Span,
    find_payloads,
    parse_event,
    read_event,
    read_payload,
)
from bnwatch.sinks.tensorboard.schema import SchemaError

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path
    from typing import BinaryIO

    from bnwatch.records import CallSite, LayerSpec
    from bnwatch.sinks.tensorboard.decoder import Entity

_WHOLE, _PLACES = 1 << 20, 4096
"""Bytes read at a time."""

_HEAD = 512
"""Bytes in which the numbers of a sample begin."""

_KINDS = 16
"""Kinds of samples that are recognized in a file: they differ in what is written and in who is called."""

_TIME = struct.Struct("<d")


class GoneError(Exception):
    """A sample is not where it was: its file is gone, or another one."""


class Sample(NamedTuple):
    """What is kept of a sample; the fields are those of `SignalTable`, and where its numbers lie."""

    step: int
    epoch: int
    accuracy: float | None
    loss: float | None
    examples: int
    idle: tuple[str, ...]
    layout: TableLayout
    source: File
    span: Span
    content: int
    """Where the numbers begin in the file."""

    @property
    def sites(self) -> tuple[CallSite, ...]:
        """Return the call site of each row."""
        return self.layout.sites

    def table(self) -> SignalTable:
        """Return the whole sample.

        Raises:
            GoneError: it is not there any more.
        """
        return self.source.table(self)


@dataclass(slots=True)
class Entry:
    """What an event holds, or a part of it."""

    step: int
    wall_time: float
    entity: Entity | Sample


class File:
    """The entries of one event file, in the order they were written.

    Attributes:
        path: where it is.
        identity: the inode that it must have to be the same file, 0 for any.
        offset: bytes that were read.
        entries: what they hold.
        specs: layers by path, from the tables.
        start: step from which on earlier files are to be forgotten, and when that was said.
        first: when the first event was written.
        resumed: it goes on where another file was, with what was known there.
    """

    def __init__(self, path: Path, *, places: bool = False, identity: int = 0) -> None:
        """Read nothing yet; keep of samples their ``places``, as `Sample`, in place of their numbers."""
        self.path, self.identity = path, identity
        self.offset = 0
        self.entries: list[Entry] = []
        self.specs: dict[str, LayerSpec] = {}
        self.start: tuple[int, float] | None = None
        self.first = math.inf
        self.resumed = False
        self._places = places
        self._decoder = Decoder(self.specs)
        self._kinds: list[_Kind] = []
        self._damage: list[str] = []
        self._unreadable: list[str] = []
        self._refused, self._why = 0, ""

    @property
    def problems(self) -> list[str]:
        """Return what could not be read, one sentence each."""
        many = "1 event" if self._refused == 1 else f"{self._refused:,} events"
        refusal = f"{str(self.path)!r} holds {many} that cannot be understood: {self._why}"
        return [*self._damage, *self._unreadable, *[refusal] * bool(self._refused)]

    def read(self, size: int | None = None) -> bool:
        """Read on, up to so many bytes of the file; return whether that changed anything."""
        if self._damage or (size is not None and size <= self.offset and not self._unreadable):
            return False
        before = self.offset, self._unreadable
        self._unreadable = []
        try:
            with self.path.open("rb", buffering=_PLACES if self._places else _WHOLE) as file:
                there = os.fstat(file.fileno()).st_size
                for span in find_payloads(file, there if size is None else min(there, size), self.offset):
                    if not (self._places and self._skim(file, span)) and not self._take(file, span):
                        break
                    self.offset = span.end
        except CorruptRecordError as error:
            behind = "what lies behind is lost" if math.isfinite(self.first) else "is it an event file?"
            self._damage = [f"{str(self.path)!r} is damaged: {error}; {behind}"]
        except OSError as error:
            self._unreadable = [f"{str(self.path)!r} cannot be read: {error.strerror or type(error).__name__}"]
        return bool(self._damage) or (self.offset, self._unreadable) != before

    def table(self, sample: Sample) -> SignalTable:
        """Return a whole sample of this file.

        Raises:
            GoneError: it is not there any more.
        """
        with self.open() as file:
            try:
                event = read_event(file, sample.span)
                tables = [] if event is None else [e for e in self._decoder.event(event) if isinstance(e, SignalTable)]
            except (OSError, ValueError, RecursionError) as error:
                raise GoneError(str(error)) from None
        if len(tables) != 1 or tables[0].step != sample.step:
            raise GoneError(str(self.path))
        return tables[0]

    def open(self) -> BinaryIO:
        """Open the file without a buffer.

        Raises:
            GoneError: it is another one, or none.
        """
        try:
            file = self.path.open("rb", buffering=0)
        except OSError as error:
            raise GoneError(str(error)) from None
        if self.identity not in {0, os.fstat(file.fileno()).st_ino}:
            file.close()
            raise GoneError(str(self.path))
        return cast("BinaryIO", file)

    def _take(self, file: BinaryIO, span: Span) -> bool:
        """Take an event that is read as a whole; return whether it was all there."""
        payload = read_payload(file, span)
        if payload is None:
            return False
        event = parse_event(payload, span)
        self.first = min(self.first, _finite(event.wall_time))
        if event.HasField("session_log"):
            if event.session_log.status == SessionLog.START and self.start is None:
                self.start = event.step, _finite(event.wall_time)
        elif event.HasField("summary"):
            self.resumed |= not self.entries and any(v.tag == schema.RESUMED for v in event.summary.value)
            try:
                entities: Sequence[Entity | Sample] = self._decoder.event(event)
            except (ValueError, RecursionError) as error:
                self._refused += 1
                self._why = self._why or (str(error) if isinstance(error, SchemaError) else "malformed JSON")
            else:
                if self._places:
                    entities = [
                        self._placed(entity, event, payload, span) if isinstance(entity, SignalTable) else entity
                        for entity in entities
                    ]
                self.entries += [Entry(event.step, _finite(event.wall_time), entity) for entity in entities]
        return True

    def _placed(self, table: SignalTable, event: Any, payload: bytes, span: Span) -> Sample:
        """Return the place of a sample; recognize those that are written like it from now on."""
        values = (value for value in reversed(event.summary.value) if value.HasField("tensor"))
        value = next(value for value in values if value.tag.startswith(schema.STATS))
        layout = self._decoder.layouts[value.tag]
        kind = _learn(event, payload, layout, table.idle)
        if kind is not None:
            self._kinds = [kind, *self._kinds][:_KINDS]
        # bytes that are the same elsewhere before it are as good
        content = span.offset + payload.find(value.tensor.tensor_content)
        known = table.step, table.epoch, table.accuracy, table.loss, table.examples, table.idle
        return Sample(*known, layout, self, span, content)

    def _skim(self, file: BinaryIO, span: Span) -> bool:
        """Take a sample without reading its numbers; return whether it is of a kind that is known."""
        if not self._kinds:
            return False
        file.seek(span.offset)
        head = file.read(min(_HEAD, span.length))
        start = _start(head)
        if start is None:
            return False
        wall_time, step, at = start
        for n, kind in enumerate(self._kinds):
            content = at + len(kind.between)
            if content + kind.size + kind.length != span.length or not head.startswith(kind.between, at):
                continue
            file.seek(span.offset + content + kind.size)
            behind = file.read(kind.length)
            if len(behind) != kind.length or int.from_bytes(behind, "little") & kind.mask != kind.behind:
                continue
            try:
                progress = parse_progress(behind[kind.progress : kind.progress + 32])
            except SchemaError:
                return False
            if n:
                self._kinds.insert(0, self._kinds.pop(n))
            wall_time = _finite(wall_time)
            self.first = min(self.first, wall_time)
            sample = Sample(step, *progress, kind.idle, kind.layout, self, span, span.offset + content)
            self.entries.append(Entry(step, wall_time, sample))
            return True
        return False


class _Kind(NamedTuple):
    """Samples whose payloads differ in time, step and numbers alone."""

    between: bytes
    """What lies between the step and the numbers of the table."""
    size: int
    """Bytes of the numbers of the table."""
    length: int
    """Bytes behind them."""
    behind: int
    """These bytes as a number, with 0 for all that may differ."""
    mask: int
    """Ones where they may not differ."""
    progress: int
    """Where in them the progress begins."""
    layout: TableLayout
    idle: tuple[str, ...]


def _learn(event: Any, payload: bytes, layout: TableLayout, idle: tuple[str, ...]) -> _Kind | None:
    """Return the kind of a sample; None where it is not written as `TensorBoardSink` writes all but the first."""
    table, *others = event.summary.value
    tensor = table.tensor
    content = tensor.tensor_content
    # nothing but what is known, in the order of the fields: the numbers are the last of it
    plain = TensorProto(dtype=tensor.dtype, tensor_shape=tensor.tensor_shape, tensor_content=content)
    summary = Summary(value=[Summary.Value(tag=table.tag, tensor=plain), *others])
    if Event(wall_time=event.wall_time, step=event.step, summary=summary).SerializeToString() != payload:
        return None
    behind, mask, progress = b"", b"", []
    for value in others:
        part = Summary(value=[value]).SerializeToString()
        if value.HasField("simple_value"):
            numbers = part[-4:]
        elif value.tag in {schema.PROGRESS, schema.IDLE} or value.tag.startswith(schema.SITES):
            numbers = value.tensor.tensor_content
        else:
            return None
        if not part.endswith(numbers):
            return None
        fixed = len(part) - len(numbers)
        if value.tag == schema.PROGRESS and value.HasField("tensor"):
            progress.append(len(behind) + fixed)
        behind += part[:fixed] + bytes(len(numbers))
        mask += b"\xff" * fixed + bytes(len(numbers))
    if len(progress) != 1:
        return None
    start = len(Event(wall_time=event.wall_time, step=event.step).SerializeToString())
    between = payload[start : len(payload) - len(behind) - len(content)]
    numbers = int.from_bytes(behind, "little"), int.from_bytes(mask, "little")
    return _Kind(between, len(content), len(behind), *numbers, progress[0], layout, idle)


def _start(head: bytes) -> tuple[float, int, int] | None:
    """Return the time and the step that an event begins with, and where they end; None where it does not."""
    if len(head) < 20 or head[0] != 0x09:  # noqa: PLR2004  # Event.wall_time
        return None
    (wall_time,) = _TIME.unpack_from(head, 1)
    if head[9] != 0x10:  # noqa: PLR2004  # Event.step
        return wall_time, 0, 9
    step = 0
    for place in range(9):
        byte = head[10 + place]
        step |= (byte & 0x7F) << 7 * place
        if byte < 0x80:  # noqa: PLR2004
            return wall_time, step, 11 + place
    return None


def _finite(wall_time: float) -> float:
    return wall_time if math.isfinite(wall_time) else 0.0
