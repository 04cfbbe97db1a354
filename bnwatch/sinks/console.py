"""The terminal: a summary when training ends, and how far an experiment is."""

from __future__ import annotations

import os
import shutil
import sys
from contextlib import suppress
from typing import TYPE_CHECKING, TextIO

from bnwatch import render

if TYPE_CHECKING:
    from bnwatch.diagnosis import Report
    from bnwatch.sinks import Item


def wants_color(stream: TextIO) -> bool:
    """Return whether colours belong on a stream: a terminal that is not dumb, and NO_COLOR is not set."""
    return is_terminal(stream) and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def is_terminal(stream: TextIO) -> bool:
    """Return whether a stream is a terminal; a closed or a makeshift one is not."""
    try:
        return bool(stream.isatty())
    except (AttributeError, ValueError):
        return False


def width() -> int:
    """Return the width to wrap to: that of the terminal, within what reads well."""
    return min(max(shutil.get_terminal_size((render.WIDTH, 24)).columns, 60), 120)


class ConsoleSink:
    """Prints the closing summary. Diagnoses announce themselves when they appear, as warnings or as logging."""

    def __init__(self, stream: TextIO | None = None) -> None:
        """Print to ``stream``; to standard error as it is when the run ends if None."""
        self._stream = stream
        self._closed = False

    def write(self, item: Item, /) -> None:
        """Do nothing: what appears is announced by the watch."""

    def close(self, report: Report, /) -> None:
        """Print the summary, once."""
        if self._closed:
            return
        self._closed = True
        stream = self._stream or sys.stderr
        text = render.report_text(report, color=wants_color(stream), width=width())
        head = f"bnwatch: {render.shorten(report.run)}\n" if report.run else "bnwatch\n"
        _put(stream, f"{head}{text}\n")


class ProgressLine:
    """Shows how far an experiment is in one line that is written over; silent where there is no terminal."""

    def __init__(self, stream: TextIO | None = None) -> None:
        """Show on ``stream``; on standard error if None."""
        self._stream = stream
        self._shown = False

    def __call__(self, what: str, done: int, total: int) -> None:
        """Show that ``done`` of ``total`` batches are measured; take the line away when all are."""
        stream = self._stream or sys.stderr
        if not is_terminal(stream):
            return
        if done >= total:
            self.clear()
            return
        line = f"bnwatch: {render.shorten(what)}, batch {done:,} of {total:,}"
        _put(stream, f"\r\x1b[2K{line[: shutil.get_terminal_size().columns - 1]}")
        self._shown = True

    def clear(self) -> None:
        """Take the line away, also of an experiment that was broken off."""
        if self._shown:
            self._shown = False
            _put(self._stream or sys.stderr, "\r\x1b[2K")


def _put(stream: TextIO, text: str) -> None:
    # a terminal that is gone or cannot show a character is no reason to disturb a training
    with suppress(OSError, ValueError):
        encoding = getattr(stream, "encoding", None) or "utf-8"
        stream.write(text.encode(encoding, "backslashreplace").decode(encoding))
        stream.flush()
