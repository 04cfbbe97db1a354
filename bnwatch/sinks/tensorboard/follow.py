"""Follows the record of a run while it grows: what was read once is not read again, and samples stay on disk.

Of a sample only its step, what is known of the training, and its place in the file are kept; its numbers are read where
they are asked for. What a resumed run makes a reader forget is decided where `read_runs` decides it.
"""

from __future__ import annotations

import os
from contextlib import suppress
from dataclasses import replace
from hashlib import sha256
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from bnwatch.signals import STATISTICS
from bnwatch.sinks.tensorboard.events import is_event_file
from bnwatch.sinks.tensorboard.file import File, GoneError, Sample
from bnwatch.sinks.tensorboard.reader import fold

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from typing import BinaryIO

    from numpy.typing import NDArray

    Float32 = NDArray[np.float32]


_DENSE = 1.5
"""Bytes that may be read for one that is wanted, rather than asking for each row by itself."""


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
        self._files: dict[str, File] = {}
        self._fold()

    def refresh(self) -> bool:
        """Read what was added, and return whether anything was."""
        present = _event_files(self.directory)
        changed = self._files.keys() != present.keys()
        for name, stat in present.items():
            known = self._files.get(name)
            if known is None or known.identity != stat.st_ino or stat.st_size < known.offset:
                known = File(self.directory / name, places=True, identity=stat.st_ino)
                changed = True
            self._files[name] = known
            changed |= known.read(stat.st_size)
        self._files = {name: self._files[name] for name in present}
        if changed:
            self._fold()
        return changed

    def _fold(self) -> None:
        run = fold(self.directory, self._files.values())
        self.samples = run.tables  # type: ignore[assignment]
        self.record = replace(run, tables=())
        read = sorted((name, file.identity, file.offset) for name, file in self._files.items())
        self.version = sha256(repr((read, run.problems)).encode("utf-8", "backslashreplace")).hexdigest()[:16]


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
