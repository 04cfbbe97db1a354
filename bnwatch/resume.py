"""Goes on where a snapshot was taken.

A framework's snapshot stays what it is without a watch, so what a watch knows lies beside its record: the record holds
what was seen and concluded, and a small file a snapshot, ``state/<step>.npz``, holds the rest.
"""

from __future__ import annotations

import json
import os
import re
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from bnwatch.channels import ChannelChoice
from bnwatch.diagnosis import Severity
from bnwatch.evidence import SPLITS, Cell, Cells
from bnwatch.signals import Signals
from bnwatch.sinks.tensorboard import Mark, RecordError, read_as_of, schema
from bnwatch.sinks.tensorboard.events import SUBDIRECTORY

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from bnwatch.diagnosis import Diagnosis, Skipped
    from bnwatch.signals import SignalTable
    from bnwatch.sinks.tensorboard import RunRecord, TensorBoardSink

FORMAT = 1
"""Version of the file; it rises when a reader of this one would go wrong."""

KEPT = 5
"""Files that are kept, the newest: who goes on from an older snapshot begins anew."""

_DIRECTORY = "state"
_TEXT, _ARRAY = "text", "#"


class CannotResumeError(Exception):
    """The watch has to begin anew; the message says why."""


@dataclass(frozen=True, slots=True)
class Progress:
    """How far the `Watch` itself is.

    Attributes:
        told: the gravest severity of which the user was told, by the key of the diagnosis.
        used: entries of ``allow`` that matched a finding.
        cells_at: step of the last cells; -1 without.
        next_cells: evaluations after which cells are due again.
        attributed_at: step of the cells that were attributed last; -1 without.
        told_of_range: the user was told of an accuracy that is none.
        channels: which layers are recorded channel by channel, and which of their channels.
    """

    told: Mapping[str, Severity]
    used: frozenset[str]
    cells_at: int
    next_cells: int
    attributed_at: int
    told_of_range: bool
    channels: ChannelChoice


@dataclass(frozen=True, slots=True)
class Memory:
    """Everything that a watch knows.

    Attributes:
        signals: what the rules read.
        diagnoses: in the order they appeared.
        skipped: rules that could not look the last time.
        quiet: how often in a row nothing was found, by the key of the diagnosis that still stands.
        progress: of the watch.
        own: what the adapter gave: text, numbers, arrays, lists and dictionaries of them.
    """

    signals: Signals
    diagnoses: tuple[Diagnosis, ...]
    skipped: tuple[Skipped, ...]
    quiet: Mapping[str, int]
    progress: Progress
    own: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Found:
    """A memory, where in the record it was left, and every sample until then."""

    memory: Memory
    mark: Mark
    chosen: tuple[int, dict[str, str]]
    tables: tuple[SignalTable, ...]


def leave(record: TensorBoardSink, step: int, fingerprint: str, memory: Memory) -> None:
    """Leave a file from which a run that is resumed after ``step`` steps goes on.

    Args:
        record: the sink that writes the record.
        step: training steps finished.
        fingerprint: tells this training from another one at the same step.
        memory: what is known.

    Raises:
        OSError: it cannot be written; what was there before is still there.
    """
    signals = memory.signals
    samples, chosen = record.chosen
    tree = {
        "format": FORMAT,
        "step": step,
        "fingerprint": fingerprint,
        "record": {**record.mark()._asdict(), "samples": samples, "chosen": chosen},
        "signals": {
            "samples": signals.samples,
            "evaluated": signals.evaluated,
            "refused": signals.refused,
            "attribution": signals.attribution is not None,
            "composition": signals.composition is not None,
            "entering": signals.entering is not None,
            "replicas": signals.replicas is not None,
            "cells": None if signals.cells is None else _cells_tree(signals.cells),
            "history": signals.memory,
        },
        "diagnoses": [schema.stored_diagnosis_json(diagnosis) for diagnosis in memory.diagnoses],
        "skipped": [schema.skipped_json(entry) for entry in memory.skipped],
        "quiet": memory.quiet,
        "told": {key: str(severity) for key, severity in memory.progress.told.items()},
        "used": sorted(memory.progress.used),
        "cells_at": memory.progress.cells_at,
        "next_cells": memory.progress.next_cells,
        "attributed_at": memory.progress.attributed_at,
        "told_of_range": memory.progress.told_of_range,
        "channels": memory.progress.channels.memory,
        "own": memory.own,
    }
    _write(record.directory / _DIRECTORY, step, tree)


def find(
    log_dir: str | os.PathLike[str], step: int, fingerprint: str, take: Callable[[Mapping[str, Any]], None]
) -> Found:
    """Return what was left after ``step`` steps; the adapter takes its own part of it by ``take``, or raises.

    Raises:
        CannotResumeError: nothing was, or it is of another training, of a newer bnwatch, or damaged.
    """
    directory = Path(log_dir) / SUBDIRECTORY
    path = directory / _DIRECTORY / _name(step)
    try:
        tree = _read(path)
        _check(path, tree, step, fingerprint)
        mark = Mark(str(tree["record"]["name"]), int(tree["record"]["size"]))
        record = read_as_of(directory, mark)
        found = Found(_memory(record, tree), mark, _chosen(tree["record"]), record.tables)
        take(found.memory.own)
    except FileNotFoundError:
        msg = f"there is no {str(path)!r}"
        raise CannotResumeError(msg) from None
    except RecordError as error:
        raise CannotResumeError(str(error)) from None
    except OSError as error:
        msg = f"{str(path)!r} cannot be read: {error.strerror or type(error).__name__}"
        raise CannotResumeError(msg) from None
    except CannotResumeError:
        raise
    except Exception as error:  # noqa: BLE001 - there is no end to what a damaged file may raise
        msg = f"{str(path)!r} is damaged ({type(error).__name__})"
        raise CannotResumeError(msg) from None
    return found


def _check(path: Path, tree: Any, step: int, fingerprint: str) -> None:
    if tree["format"] > FORMAT:
        msg = f"{str(path)!r} was written by a newer bnwatch"
        raise CannotResumeError(msg)
    if tree["step"] != step or tree["fingerprint"] != fingerprint:
        msg = f"{str(path)!r} belongs to another training"
        raise CannotResumeError(msg)


def forget_after(log_dir: str | os.PathLike[str], step: int) -> None:
    """Remove what was left after later steps: the record has forgotten these."""
    for path in _files(Path(log_dir) / SUBDIRECTORY / _DIRECTORY):
        if int(path.stem) > step:
            with suppress(OSError):
                path.unlink()


def _memory(record: RunRecord, tree: Any) -> Memory:
    return Memory(
        signals=_signals(record, tree["signals"]),
        diagnoses=tuple(schema.parse_diagnosis(entry) for entry in tree["diagnoses"]),
        skipped=tuple(schema.parse_skipped(entry) for entry in tree["skipped"]),
        quiet={str(key): int(times) for key, times in tree["quiet"].items()},
        progress=Progress(
            told={str(key): Severity.parse(severity) for key, severity in tree["told"].items()},
            used=frozenset(map(str, tree["used"])),
            cells_at=int(tree["cells_at"]),
            next_cells=int(tree["next_cells"]),
            attributed_at=int(tree["attributed_at"]),
            told_of_range=bool(tree["told_of_range"]),
            channels=ChannelChoice.recalled(tree.get("channels", {})),
        ),
        own=dict(tree["own"]),
    )


def _signals(record: RunRecord, tree: Any) -> Signals:
    """Return the signals: what the record holds of them, and what it does not."""
    signals = Signals(structure=record.structure)
    if record.attachment is not None:
        signals.attach(record.attachment)
    signals.specs.update({path: spec for path, spec in record.specs.items() if path not in signals.specs})
    for evaluation in record.evaluations:
        signals.evaluate(evaluation)
    for table in record.tables:
        signals.remember(table)
    signals.looks.extend(record.looks)
    signals.attribution = record.attributions[-1] if tree["attribution"] else None
    signals.composition = record.compositions[-1] if tree.get("composition") else None
    signals.entering = record.entering[-1] if tree["entering"] else None
    signals.replicas = record.replicas[-1] if tree["replicas"] else None
    signals.cells = None if tree["cells"] is None else _cells(tree["cells"])
    signals.samples, signals.evaluated = int(tree["samples"]), int(tree["evaluated"])
    signals.refused = None if tree["refused"] is None else str(tree["refused"])
    signals.recall(tree["history"])
    return signals


def _cells_tree(cells: Cells) -> dict[str, Any]:
    """Return the cells with the single examples, which the record leaves out."""
    rows = {
        split: {statistics: [cell.predicted, cell.labels] for statistics, cell in row.items()}
        for split, row in cells.rows()
    }
    plain = {name: getattr(cells, name) for name in ("step", "epoch", "classes", "missing", "seconds", "swapped")}
    return {**plain, "moved": list(cells.moved), "rows": rows}


def _cells(tree: Any) -> Cells:
    row = {
        split: {
            statistics: Cell(np.asarray(predicted, np.int64), np.asarray(labels, np.int64))
            for statistics, (predicted, labels) in tree["rows"].get(split, {}).items()
        }
        for split in SPLITS
    }
    return Cells(
        step=int(tree["step"]),
        epoch=int(tree["epoch"]),
        classes=int(tree["classes"]),
        training=row["training"],
        evaluation=row["evaluation"],
        missing=tree["missing"],
        seconds=float(tree["seconds"]),
        swapped=tree.get("swapped"),
        moved=tuple(str(path) for path in tree.get("moved", ())),
    )


def _chosen(tree: Any) -> tuple[int, dict[str, str]]:
    return int(tree["samples"]), {str(path): str(name) for path, name in tree["chosen"].items()}


# --- the file ----------------------------------------------------------------------------------------------------


def _name(step: int) -> str:
    return f"{step:010d}.npz"


def _files(directory: Path) -> list[Path]:
    return [path for path in directory.glob("*.npz") if re.fullmatch(r"\d{10,20}", path.stem)]


def _write(directory: Path, step: int, tree: Mapping[str, Any]) -> None:
    arrays: dict[str, Any] = {}

    def plain(value: Any) -> Any:
        if isinstance(value, np.ndarray):
            arrays[name := str(len(arrays))] = value
            return {_ARRAY: int(name)}
        return value.item() if isinstance(value, np.generic) else _refuse(value)

    text = json.dumps(tree, default=plain).encode()
    arrays[_TEXT] = np.frombuffer(text, np.uint8)
    directory.mkdir(exist_ok=True)
    half = directory / f".{_name(step)}.{os.getpid()}"
    try:
        with half.open("wb") as file:
            np.savez(file, **arrays)
        half.replace(directory / _name(step))
    except OSError:
        with suppress(OSError):
            half.unlink()
        raise
    newest_last = sorted(_files(directory), key=lambda path: (path.stat().st_mtime_ns, path.name))
    for path in newest_last[:-KEPT]:
        with suppress(OSError):
            path.unlink()


def _refuse(value: object) -> Any:
    msg = f"{type(value).__name__} has no place in a state"
    raise TypeError(msg)


def _read(path: Path) -> Any:
    # opened here, since what NumPy opens stays open where it is damaged
    with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
        arrays = {name: archive[name] for name in archive.files}
    text = arrays.pop(_TEXT).tobytes()

    def restored(found: dict[str, Any]) -> Any:
        return arrays[str(found[_ARRAY])] if found.keys() == {_ARRAY} and isinstance(found[_ARRAY], int) else found

    return json.loads(text, object_hook=restored)
