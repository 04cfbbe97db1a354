"""The terminal."""

from __future__ import annotations

import io

from bnwatch.sinks import console
from bnwatch.sinks.console import ConsoleSink, ProgressLine
from tests import samples


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_the_summary_is_printed_once(capsys):
    sink = ConsoleSink()
    sink.write(samples.diagnosis())
    assert capsys.readouterr().err == ""
    sink.close(samples.report())
    sink.close(samples.report())
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("bnwatch: runs/a\n")
    assert captured.err.count("warning[BN101]: ") == 1
    assert captured.err.count("2 evaluations") == 1


def test_colours_only_on_a_terminal_that_wants_them(monkeypatch):
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    assert console.wants_color(Terminal())
    assert not console.wants_color(io.StringIO())
    monkeypatch.setenv("NO_COLOR", "1")
    assert not console.wants_color(Terminal())
    monkeypatch.delenv("NO_COLOR")
    monkeypatch.setenv("TERM", "dumb")
    assert not console.wants_color(Terminal())


def test_progress_is_one_line_that_goes_away():
    stream = Terminal()
    progress = ProgressLine(stream)
    for done in range(1, 4):
        progress("training data, batch statistics", done, 3)
    shown = stream.getvalue()
    assert "\n" not in shown
    assert "batch 2 of 3" in shown
    assert shown.endswith("\r\x1b[2K")
    progress.clear()
    assert stream.getvalue() == shown


def test_progress_is_silent_where_there_is_no_terminal():
    stream = io.StringIO()
    progress = ProgressLine(stream)
    progress("training data", 1, 3)
    progress.clear()
    assert stream.getvalue() == ""


def test_a_broken_stream_disturbs_nobody():
    closed = Terminal()
    closed.close()
    ProgressLine(closed)("training data", 1, 3)
    ConsoleSink(closed).close(samples.report())


def test_a_terminal_that_lacks_characters_shows_the_rest():
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding="ascii")
    ConsoleSink(stream).close(samples.report(run="läufe/a"))
    assert raw.getvalue().startswith(b"bnwatch: l\\xe4ufe/a\n")
