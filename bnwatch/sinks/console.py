"""Placeholder until the record branch lands."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from bnwatch.diagnosis import Report
    from bnwatch.sinks import Item


class ConsoleSink:
    """Print the closing summary to stderr."""

    def __init__(self, log_dir: str | None = None) -> None:
        """Keep the directory to name it."""
        self._log_dir = log_dir

    def write(self, item: Item, /) -> None:
        """Do nothing."""

    def progress(self, what: str, done: int, total: int) -> None:
        """Show nothing."""

    def close(self, report: Report, /) -> None:
        """Print."""
        sys.stderr.write(f"bnwatch: {len(report.diagnoses)} diagnoses, {report.samples} samples\n")
