"""The record on disk: TensorBoard event files, written and read without TensorFlow.

Nothing else in bnwatch but the dashboard imports ``tensorboard``.
"""

from __future__ import annotations

from bnwatch.sinks.tensorboard.events import CorruptRecordError, Mark
from bnwatch.sinks.tensorboard.reader import RecordError, RunRecord, read_as_of, read_runs
from bnwatch.sinks.tensorboard.schema import RecordedCell, RecordedCells
from bnwatch.sinks.tensorboard.writer import TensorBoardSink

__all__ = [
    "CorruptRecordError",
    "Mark",
    "RecordError",
    "RecordedCell",
    "RecordedCells",
    "RunRecord",
    "TensorBoardSink",
    "read_as_of",
    "read_runs",
]
