"""Follows the record of a run while it grows: what was read once is not read again, and samples stay on disk.

Of a sample only its step, what is known of the training, and its place in the file are kept; its numbers are read where
they are asked for. What a resumed run makes a reader forget is decided where `read_runs` decides it.
"""

from __future__ import annotations

import json
import math
import os
import struct
from contextlib import suppress
from dataclasses import dataclass, field, replace
from hashlib import sha256
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import numpy as np
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.compat.proto.tensor_shape_pb2 import TensorShapeProto
from tensorboard.compat.proto.types_pb2 import DT_FLOAT

from bnwatch.signals import STATISTICS, SignalTable
from bnwatch.sinks.tensorboard import schema
from bnwatch.sinks.tensorboard.events import (
    CorruptRecordError,
    Span,
    find_payloads,
    is_event_file,
    parse_event,
    read_event,
    read_payload,
)
from bnwatch.sinks.tensorboard.reader import Decoder, File, TableLayout, fold, parse_progress, parse_text

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from typing import BinaryIO

    from numpy.typing import NDArray

    from bnwatch.records import CallSite

    Float32 = NDArray[np.float32]


_BUFFER = 4096
"""Bytes read at a time, and from which on a sample is skimmed rather than read."""

_HEAD = 512
"""Bytes in which the numbers of a sample begin."""


_DENSE = 1.5
"""Bytes that may be read for one that is wanted, rather than asking for each row by itself."""

_BESIDE = frozenset({schema.PROGRESS, schema.IDLE})
"""Tensors beside the table of a sample that is skimmed."""


class GoneError(Exception):
    """A sample is not where it was: its file is gone, or another one."""


@dataclass(frozen=True, slots=True)
class Sample:
    """What is kept of a sample; the fields are those of `SignalTable`, and where its numbers lie."""

    step: int
    epoch: int
    accuracy: float | None
    loss: float | None
    examples: int
    idle: tuple[str, ...]
    layout: TableLayout = field(repr=False)
    source: _Followed = field(repr=False)
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


class Follower:
    """The record in one directory.

    Attributes:
        directory: where its event files lie.
        record: everything but the samples, as of the last `refresh`; its ``tables`` are empty.
        samples: by step; those that a resumed run makes a reader forget are left out.
        version: changes when anything is added.
    """

    def __init__(self, directory: Path) -> None:
        """Read nothing yet."""
        self.directory = directory
        self.version = ""
        self.samples: tuple[Sample, ...] = ()
        self._files: dict[str, _Followed] = {}
        self._fold()

    def refresh(self) -> bool:
        """Read what was added, and return whether anything was."""
        present = _event_files(self.directory)
        changed = self._files.keys() != present.keys()
        for name, stat in present.items():
            known = self._files.get(name)
            if known is None or known.identity != stat.st_ino or stat.st_size < known.offset:
                known = _Followed(self.directory / name, stat.st_ino)
                changed = True
            self._files[name] = known
            changed |= known.read(stat.st_size)
        self._files = {name: self._files[name] for name in present}
        if changed:
            self._fold()
        return changed

    def _fold(self) -> None:
        # a copy each: what is forgotten now may come back when the file that made it forgotten vanishes
        run = fold(self.directory, [file.state() for file in self._files.values()], Sample)
        self.samples = run.tables  # type: ignore[assignment]
        self.record = replace(run, tables=())
        read = sorted((name, file.identity, file.offset) for name, file in self._files.items())
        self.version = sha256(repr((read, run.problems)).encode("utf-8", "backslashreplace")).hexdigest()[:16]


class _Followed:
    """One event file."""

    def __init__(self, path: Path, identity: int) -> None:
        self.identity = identity
        self.offset = 0
        self._file = File(path)
        self._decoder = Decoder(self._file.specs)
        self._ended = False
        self._unreadable: list[str] = []
        self._idle: tuple[str, ...] = ()
        self._skimmer = Skimmer()

    def state(self) -> File:
        """Return what was read, for `fold` to change."""
        refusal = [self._file.refusal()] if self._file.refused else []
        return replace(self._file, problems=[*self._file.problems, *self._unreadable, *refusal])

    def read(self, size: int) -> bool:
        """Read on as far as the file reaches; return whether anything was added."""
        if self._ended or (size <= self.offset and not self._unreadable):
            return False
        before = self.offset, self._unreadable
        self._unreadable = []
        try:
            with self._file.path.open("rb", buffering=_BUFFER) as file:
                for span in find_payloads(file, size, self.offset):
                    if not self._skim(file, span) and not self._take(file, span):
                        break
                    self.offset = span.end
        except CorruptRecordError as error:
            self._file.stop(error)
            self._ended = True
        except OSError as error:
            self._unreadable = [f"{str(self._file.path)!r} cannot be read: {error.strerror or type(error).__name__}"]
        return self._ended or (self.offset, self._unreadable) != before

    def _take(self, file: BinaryIO, span: Span) -> bool:
        """Take an event that is read as a whole; return whether it was all there."""
        payload = read_payload(file, span)
        if payload is None:
            return False

        def understand(event: Any) -> list[Any]:
            return [self._kept(one, event, payload, span) for one in self._decoder.event(event)]

        self._file.take(parse_event(payload, span), understand)
        return True

    def _kept(self, entity: Any, event: Any, payload: bytes, span: Span) -> Any:
        """Return what is kept of an entity: of a sample its place."""
        if not isinstance(entity, SignalTable):
            return entity
        values = event.summary.value
        table = next(value for value in reversed(values) if value.tag.startswith(schema.STATS))
        # bytes that are the same elsewhere before it are as good
        content = payload.find(table.tensor.tensor_content)
        return self._sample(event.step, values, self._decoder.layouts[table.tag], span, span.offset + content)

    def _skim(self, file: BinaryIO, span: Span) -> bool:
        """Take a sample without reading its numbers; return whether it is one in the usual form."""
        if span.length < _BUFFER:
            return False
        file.seek(span.offset)
        skimmed = self._skimmer(file.read(_HEAD), span.length)
        layout = None if skimmed is None else self._decoder.layouts.get(skimmed.tag)
        if skimmed is None or layout is None or skimmed.shape != (len(layout.sites), layout.width):
            return False
        file.seek(span.offset + skimmed.rest)
        try:
            rest = Summary.FromString(file.read(span.length - skimmed.rest))
        except Exception:  # noqa: BLE001  # DecodeError lives in a module that moves between versions
            return False
        values = [value for value in rest.value if value.HasField("tensor")]
        if any(value.tag not in _BESIDE for value in values):
            return False
        try:
            sample = self._sample(skimmed.step, values, layout, span, span.offset + skimmed.content)
        except (ValueError, RecursionError):
            return False
        self._file.add(skimmed.step, skimmed.wall_time, [sample])
        return True

    def _sample(self, step: int, values: Sequence[Any], layout: TableLayout, span: Span, content: int) -> Sample:
        epoch, accuracy, loss, examples = 0.0, math.nan, math.nan, 0.0
        idle: tuple[str, ...] = ()
        for value in values:
            if value.tag == schema.PROGRESS and value.HasField("tensor"):
                epoch, accuracy, loss, examples = parse_progress(value.tensor)
            elif value.tag == schema.IDLE and value.HasField("tensor"):
                idle = schema.parse_idle(json.loads(parse_text(value.tensor)))
        # the same layers stay idle, sample after sample
        self._idle = idle if idle != self._idle else self._idle
        return Sample(
            step=max(int(step), 0),
            epoch=int(epoch),
            accuracy=None if math.isnan(accuracy) else accuracy,
            loss=None if math.isnan(loss) else loss,
            examples=int(examples),
            idle=self._idle,
            layout=layout,
            source=self,
            span=span,
            content=content,
        )

    def table(self, sample: Sample) -> SignalTable:
        with self.open() as file:
            try:
                event = read_event(file, sample.span)
                tables = [] if event is None else [e for e in self._decoder.event(event) if isinstance(e, SignalTable)]
            except (OSError, ValueError, RecursionError) as error:
                raise GoneError(str(error)) from None
        if len(tables) != 1 or tables[0].step != sample.step:
            raise GoneError(str(self._file.path))
        return tables[0]

    def open(self) -> BinaryIO:
        try:
            file = self._file.path.open("rb", buffering=0)
        except OSError as error:
            raise GoneError(str(error)) from None
        if os.fstat(file.fileno()).st_ino != self.identity:
            file.close()
            raise GoneError(str(self._file.path))
        return cast("BinaryIO", file)


def read_rows(samples: Sequence[Sample], first: int, stop: int) -> Float32:
    """Return the rows of some call sites, shape ``(samples, stop - first, len(STATISTICS))``.

    The samples must be `alike`.

    Raises:
        GoneError: one is not there any more.
    """
    layout, source = samples[0].layout, samples[0].source
    width = layout.width
    raw = np.empty((len(samples), (stop - first) * width), "<f4")
    places = [sample.content + 4 * first * width for sample in samples]
    with source.open() as file:
        try:
            _read_at(file, places, raw)
        except OSError as error:
            raise GoneError(str(error)) from None
    rows = layout.arranged(raw.reshape(len(samples) * (stop - first), width), STATISTICS)
    return rows.reshape(len(samples), -1, len(STATISTICS))


def _read_at(file: BinaryIO, places: list[int], rows: Float32) -> None:
    """Fill each row with what lies at its place; at once where little lies between."""
    size = rows.shape[1] * rows.itemsize
    start, end = min(places), max(places) + size
    # each call lets other threads run first, and TensorBoard's own reading may be one that never rests
    if end - start <= _DENSE * rows.nbytes:
        file.seek(start)
        data = file.read(end - start)
        if len(data) < end - start:
            raise GoneError(str(start))
        for row, place in zip(rows, places, strict=True):
            row[:] = np.frombuffer(data, "<f4", len(row), place - start)
        return
    for row, place in zip(rows, places, strict=True):
        file.seek(place)
        if row.size and file.readinto(row) != size:  # type: ignore[attr-defined]
            raise GoneError(str(place))


def alike(samples: Sequence[Sample]) -> Iterator[slice]:
    """Yield the stretches of samples that lie in one file and have the same rows."""
    start = 0
    for _, some in groupby(samples, key=lambda sample: (id(sample.source), id(sample.layout))):
        stop = start + sum(1 for _ in some)
        yield slice(start, stop)
        start = stop


class Skimmed(NamedTuple):
    """What stands around the numbers of a sample."""

    wall_time: float
    step: int
    tag: str
    shape: tuple[int, int]
    content: int
    rest: int


class Skimmer:
    """Finds where the numbers of a sample lie in a payload, from its beginning.

    The table must be the first value of the summary, without metadata, and the summary the last field of the event, as
    `TensorBoardSink` writes all samples of a file but the first.
    """

    def __init__(self) -> None:
        """Know no sample yet."""
        self._alike = b"", 0, 0, "", (0, 0)

    def __call__(self, head: bytes, length: int) -> Skimmed | None:
        """Return where they lie in a payload of ``length`` bytes; None where it is to be read as a whole."""
        wire = _Wire(head)
        try:
            wire.expect(b"\x09")  # Event.wall_time
            (wall_time,) = struct.unpack("<d", wire.take(8))
            step = wire.varint() if wire.accept(b"\x10") else 0
            start = wire.at
            # between step and numbers one sample is mostly like the one before
            between, numbers, behind, tag, shape = self._alike
            if not (between and head.startswith(between, start) and start + behind == length):
                tag, shape, rest = _skim(wire, length)
                between, numbers, behind = head[start : wire.at], rest - start, length - start
                self._alike = between, numbers, behind, tag, shape
        except Exception:  # noqa: BLE001  # whatever it is, it is read as a whole then, and refused where that is due
            return None
        return None if step >= 1 << 63 else Skimmed(wall_time, step, tag, shape, start + len(between), start + numbers)


def _skim(wire: _Wire, length: int) -> tuple[str, tuple[int, int], int]:
    """Read from the summary to the numbers; return tag and shape of the table, and where the next value begins."""
    wire.expect(b"\x2a")  # Event.summary
    wire.require(wire.varint() + wire.at == length)
    wire.expect(b"\x0a")  # Summary.value
    rest = wire.varint() + wire.at
    wire.expect(b"\x0a")  # Value.tag
    tag = wire.take(wire.varint()).decode()
    wire.require(tag.startswith(schema.STATS))
    wire.expect(b"\x42")  # Value.tensor
    wire.require(wire.varint() + wire.at == rest <= length)
    wire.expect(b"\x08" + bytes([DT_FLOAT]))
    wire.expect(b"\x12")  # TensorProto.tensor_shape
    rows, columns = (dim.size for dim in TensorShapeProto.FromString(wire.take(wire.varint())).dim)
    wire.expect(b"\x22")  # TensorProto.tensor_content
    size = wire.varint()
    wire.require(size + wire.at == rest and min(rows, columns) >= 0 and 4 * rows * columns == size)
    return tag, (rows, columns), rest


class _Wire:
    """Reads the parts of a serialized message in turn."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self.at = 0

    def take(self, size: int) -> bytes:
        part = self._data[self.at : self.at + size]
        if len(part) != size:
            raise IndexError
        self.at += size
        return part

    def accept(self, key: bytes) -> bool:
        found = self._data.startswith(key, self.at)
        self.at += len(key) * found
        return found

    def expect(self, key: bytes) -> None:
        self.require(self.accept(key))

    def require(self, usual: bool) -> None:
        if not usual:
            raise ValueError

    def varint(self) -> int:
        value = shift = 0
        while True:
            byte = self._data[self.at]
            self.at += 1
            value |= (byte & 0x7F) << shift
            if byte < 0x80:  # noqa: PLR2004
                return value
            shift += 7


def _event_files(directory: Path) -> dict[str, os.stat_result]:
    """Return the event files in a directory, by name."""
    found = {}
    with suppress(OSError), os.scandir(directory) as entries:
        for entry in entries:
            # one that vanishes meanwhile is not there; opening anything but a file may wait for ever
            with suppress(OSError):
                if is_event_file(entry.name) and entry.is_file():
                    # what the entry itself tells has no inode on Windows
                    found[entry.name] = Path(entry.path).stat()
    return dict(sorted(found.items()))
