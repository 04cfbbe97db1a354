"""Event files: framing in both directions, without TensorFlow.

A record is ``length (8 bytes) | masked CRC of the length | payload | masked CRC of the payload``; a payload is a
serialized `Event`. Each record reaches the file in one write of its own, so a killed process loses nothing it wrote,
and what a full disk leaves of a record is cut off again.
"""

from __future__ import annotations

import itertools
import os
import re
import socket
import struct
import time
from contextlib import suppress
from functools import lru_cache
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple

from tensorboard.compat.proto.event_pb2 import Event, SessionLog

from bnwatch.sinks.tensorboard.checksum import masked

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

SUFFIX = ".bnwatch"
"""Ends the name of every event file written here, so that those of other writers are left alone."""

SUBDIRECTORY = "bnwatch"
"""A run of its own below the log directory: TensorBoard follows one writer a directory."""

_LENGTH = struct.Struct("<Q")
_FOOTER = struct.Struct("<I")
_BEFORE = _LENGTH.size + _FOOTER.size
_NUMBER = itertools.count()
_BUFFER = 1 << 20
_FLAGS = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND | getattr(os, "O_BINARY", 0)


class CorruptRecordError(ValueError):
    """What follows in an event file cannot be read; the message says where and why."""


class Mark(NamedTuple):
    """How far a record had been written: the name of its latest file, and that file's bytes."""

    name: str
    size: int


def frame(payload: bytes) -> bytes:
    """Return ``payload`` as a record."""
    return b"".join((_header(len(payload)), payload, _FOOTER.pack(masked(payload))))


@lru_cache(maxsize=64)
def _header(length: int) -> bytes:
    """Return what a record of that length begins with: those of samples are mostly alike."""
    data = _LENGTH.pack(length)
    return data + _FOOTER.pack(masked(data))


class EventFile:
    """Appends events to a new file of its own below ``directory``.

    The first event decides from which step on a reader forgets what earlier files of the run hold. A forked child
    goes on in a file of its own. Nothing is raised once the file is open: an event that finds no room is lost, counted
    in ``lost``, and the next one is tried again.

    Raises:
        OSError: the directory cannot be created or written.
    """

    def __init__(self, directory: Path) -> None:
        """Create the directory and the file."""
        self.directory = directory
        self.lost = 0
        self.generation = 0
        """Counts the files: whoever writes metadata once a file must do so again when it rises."""
        self._descriptor: int | None = None
        self._started = False
        self._size = 0
        self._open()

    def write(self, event: Any) -> bool:
        """Append an event; return whether it was written."""
        self.settle()
        if not self._started:
            start = Event(wall_time=event.wall_time, step=event.step, session_log=SessionLog(status=SessionLog.START))
            self._started = self._append(start)
        if self._started and self._append(event):
            return True
        self.lost += 1
        return False

    def settle(self) -> None:
        """Open a new file if it takes one: in a forked child, or after a file that could not be mended.

        Call it before relying on ``generation``.
        """
        if self._pid != os.getpid() or self._descriptor is None:
            with suppress(OSError):
                self._open()

    def mark(self) -> Mark:
        """Return how far the file reaches."""
        return Mark(self.path.name, self._size)

    def close(self) -> None:
        """Close the file. Writing again opens another one."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def _open(self) -> None:
        self.close()
        self._pid = os.getpid()
        self._started = False
        self.directory.mkdir(parents=True, exist_ok=True)
        host = re.sub(r"[^\w.-]", "_", socket.gethostname())
        name = f"events.out.tfevents.{int(time.time()):010d}.{host}.{self._pid}.{next(_NUMBER):04d}{SUFFIX}"
        self.path = self.directory / name
        self._descriptor = os.open(self.path, _FLAGS, 0o666)
        self._size = 0
        self.generation += 1
        version = frame(Event(wall_time=time.time(), file_version="brain.Event:2").SerializeToString())
        try:
            self._push(version)
        except OSError:
            self.close()
            with suppress(OSError):
                self.path.unlink()
            raise

    def _append(self, event: Any) -> bool:
        if self._descriptor is None:
            return False
        try:
            self._push(frame(event.SerializeToString()))
        except OSError:
            try:
                # half a record would hide everything after it
                os.ftruncate(self._descriptor, self._size)
            except OSError:
                self.close()
            return False
        return True

    def _push(self, data: bytes) -> None:
        assert self._descriptor is not None  # noqa: S101
        rest = memoryview(data)
        while rest:
            rest = rest[os.write(self._descriptor, rest) :]
        self._size += len(data)


def is_event_file(name: str) -> bool:
    """Return whether a file of that name is one that bnwatch writes."""
    return ".tfevents." in name and name.endswith(SUFFIX)


def read_events(path: Path, limit: int | None = None) -> Iterator[Any]:
    """Yield the events of a file. A last record that is not all there ends it: it is being written, or never was.

    ``limit`` leaves out what begins behind that many bytes.

    Raises:
        OSError: the file cannot be read.
        CorruptRecordError: what follows is damaged; everything before it has been yielded.
    """
    with path.open("rb", _BUFFER) as file:
        size = os.fstat(file.fileno()).st_size
        for span in find_payloads(file, size if limit is None else min(size, limit)):
            event = read_event(file, span)
            if event is None:
                return
            yield event


class Span(NamedTuple):
    """Where a payload lies in an event file of ``size`` bytes."""

    offset: int
    length: int
    size: int

    @property
    def end(self) -> int:
        """Return where the next record begins."""
        return self.offset + self.length + _FOOTER.size

    def __str__(self) -> str:
        """Return where the record is, for a message."""
        return f"at byte {self.offset - _BEFORE:,} of {self.size:,}"


def find_payloads(file: BinaryIO, size: int, offset: int = 0) -> Iterator[Span]:
    """Yield where the payloads lie whose records begin from ``offset`` on and are all there.

    Raises:
        OSError: the file cannot be read.
        CorruptRecordError: what follows is no record.
    """
    while True:
        file.seek(offset)
        header = file.read(_BEFORE)
        if len(header) < _BEFORE or offset + _BEFORE > size:
            return
        (length,) = _LENGTH.unpack_from(header)
        if _header(length) != header:
            msg = f"not an event at byte {offset:,} of {size:,}"
            raise CorruptRecordError(msg)
        # a length is trusted only as far as the file reaches: no memory for a claim
        if length + _FOOTER.size > size - offset - _BEFORE:
            return
        span = Span(offset + _BEFORE, length, size)
        yield span
        offset = span.end


def read_event(file: BinaryIO, span: Span) -> Any:
    """Return the event of a payload; None where the file has become shorter meanwhile.

    Raises:
        OSError: the file cannot be read.
        CorruptRecordError: it is damaged.
    """
    payload = read_payload(file, span)
    return None if payload is None else parse_event(payload, span)


def read_payload(file: BinaryIO, span: Span) -> bytes | None:
    """Return a payload; None where the file has become shorter meanwhile.

    Raises:
        OSError: the file cannot be read.
        CorruptRecordError: it is damaged.
    """
    file.seek(span.offset)
    record = file.read(span.length + _FOOTER.size)
    if len(record) < span.length + _FOOTER.size:
        return None
    payload = record[: span.length]
    if masked(payload) != _FOOTER.unpack_from(record, span.length)[0]:
        msg = f"checksum fails {span}"
        raise CorruptRecordError(msg)
    return payload


def parse_event(payload: bytes, span: Span) -> Any:
    """Return the event that a payload is.

    Raises:
        CorruptRecordError: it is none.
    """
    try:
        return Event.FromString(payload)
    except Exception as error:  # noqa: BLE001  # DecodeError lives in a module that moves between versions
        msg = f"no event message {span} ({type(error).__name__})"
        raise CorruptRecordError(msg) from None
