"""`bnwatch watch`: a training in the terminal."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time

import pytest

pytest.importorskip("rich", reason="rich, the extra `terminal`, is not installed")

from bnwatch.cli import follow, screen
from bnwatch.sinks.tensorboard import TensorBoardSink
from tests import samples
from tests.test_cli import calm, record, run


@pytest.fixture(autouse=True)
def wide(monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setattr(follow, "PAUSE", 0.02)


def unended(directory, *items):
    """Return a sink whose run goes on."""
    sink = TensorBoardSink(directory)
    sink.write(samples.attachment())
    for item in items or [samples.table(step) for step in range(1, 11)]:
        sink.write(item)
    return sink


def test_once_shows_how_it_stands(capsys, tmp_path):
    sink = unended(tmp_path)
    sink.write(samples.evaluation())
    sink.write(samples.diagnosis())
    status, out, err = run(capsys, "watch", "--once", tmp_path)
    assert (status, err) == (0, "")
    assert "\x1b" not in out
    lines = [line.rstrip() for line in out.splitlines()]
    assert lines[0] == f"{tmp_path.name}  chainer 7.8.1, step 400, epoch 1, runs"
    assert any(line.startswith("training     50.0%  ") for line in lines)
    assert any(line.startswith("evaluation   25.0%  ") for line in lines)
    assert "gap          50.0 points at step 100" in lines
    assert sum(line.startswith(("bn ", "encoder/bn_1 ", "encoder/bn_2 ")) for line in lines) == 3
    assert "warning[BN101] `encoder/bn_2` normalizes 2 call sites with one set of running statistics" in lines
    assert "  help: give each call site its own layer and share only the convolution" in lines


def test_once_shows_every_run_and_the_gravest_first(capsys, tmp_path):
    record(tmp_path / "calm", calm())
    record(tmp_path / "sick")
    out = run(capsys, "watch", "--once", tmp_path)[1]
    lines = out.splitlines()
    assert lines[0].startswith("sick  ended  `encoder/bn_2` normalizes 2 call sites")
    assert lines[1].startswith("calm  ended  no diagnosis")
    assert out.index("sick  chainer") < out.index("calm  chainer")


def test_once_where_there_is_nothing(capsys, tmp_path):
    sentence = f"bnwatch: error: no bnwatch record in '{tmp_path}' or below\n"
    assert run(capsys, "watch", "--once", tmp_path) == (2, "", sentence)


@pytest.mark.parametrize("width", [20, 38, 59, 300])
def test_no_line_is_longer_than_the_terminal(capsys, tmp_path, monkeypatch, width):
    monkeypatch.setenv("COLUMNS", str(width))
    record(tmp_path / ("a" * 100))
    record(tmp_path / "b")
    out = run(capsys, "watch", "--once", tmp_path)[1]
    assert max(map(len, out.splitlines())) <= width
    assert "warning[BN101]" in out


def test_names_are_no_markup_and_steer_no_terminal(capsys, tmp_path):
    hostile = "[bold red]:boom: [link=http://x]" + samples.HOSTILE
    sink = unended(tmp_path, samples.table(1, hostile))
    sink.write(samples.diagnosis(hostile, samples.HOSTILE, message=hostile, helps=(hostile,)))
    for arguments in (("--once",), ()):
        if not arguments:
            sink.close(calm(diagnoses=(samples.diagnosis(hostile, message=hostile),)))
        out = run(capsys, "watch", *arguments, tmp_path)[1]
        assert all(line.isprintable() for line in out.splitlines())
        assert "[bold red]:boom:" in out


def test_without_a_terminal_what_is_new_is_a_line_each(capsys, tmp_path):
    sink = unended(tmp_path)

    def train():
        time.sleep(0.1)
        sink.write(samples.evaluation())
        time.sleep(0.1)
        sink.write(samples.diagnosis())
        time.sleep(0.1)
        sink.close(calm(diagnoses=(samples.diagnosis(),)))

    training = threading.Thread(target=train)
    training.start()
    status, out, err = run(capsys, "watch", tmp_path)
    training.join()
    assert (status, err) == (0, "")
    assert out.splitlines() == [
        f"{tmp_path.name}: step 100, epoch 1: accuracy 75.0% in training, 25.0% in evaluation",
        f"{tmp_path.name}: warning[BN101]: `encoder/bn_2` normalizes 2 call sites with one set of running statistics",
        f"{tmp_path.name}: ended",
        f"ended; more: bnwatch report {tmp_path}",
    ]


def test_it_waits_for_a_directory_that_is_not_there_yet(capsys, tmp_path):
    training = threading.Timer(0.2, lambda: record(tmp_path / "later", calm()))
    training.start()
    status, out, err = run(capsys, "watch", tmp_path / "later")
    training.join()
    assert status == 0
    assert err == f"bnwatch: note: waiting for a record in '{tmp_path / 'later'}'; Ctrl-C ends\n"
    assert "later: ended" in out


def test_an_interrupt_ends_it_quietly(capsys, tmp_path, monkeypatch):
    def interrupted(_):
        raise KeyboardInterrupt

    unended(tmp_path)
    monkeypatch.setattr(follow.time, "sleep", interrupted)
    assert run(capsys, "watch", tmp_path) == (0, "", "")


def test_it_draws_over_itself_in_a_terminal(tmp_path):
    pty = pytest.importorskip("pty", reason="this system has no pseudo-terminals")
    sink = unended(tmp_path)
    controller, terminal = pty.openpty()
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "80", "LINES": "24", "PYTHONIOENCODING": "utf-8"}
    environment.pop("NO_COLOR", None)
    command = [sys.executable, "-m", "bnwatch.cli", "watch", str(tmp_path)]
    shown = b""
    with subprocess.Popen(command, stdout=terminal, stderr=terminal, env=environment) as process:
        os.close(terminal)
        while b"no diagnosis so far" not in shown:
            shown += os.read(controller, 4096)
        sink.write(samples.diagnosis())
        sink.close(calm(diagnoses=(samples.diagnosis(),)))
        try:
            while part := os.read(controller, 4096):
                shown += part
        except OSError:  # how Linux says that the other end is closed
            pass
    assert process.returncode == 0
    assert b"\x1b[1;33mwarning[BN101]" in shown
    assert b"\x1b[2K" in shown
    assert shown.endswith(f"ended; more: bnwatch report {tmp_path}\r\n".encode())


def test_without_rich_it_says_how_to_get_it(capsys, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "rich.console", None)
    status, out, err = run(capsys, "watch", tmp_path)
    assert (status, out) == (2, "")
    assert err.startswith('bnwatch: error: bnwatch watch draws with rich: pip install "bnwatch[terminal]"')


@pytest.mark.parametrize(
    ("values", "width", "plain", "line"),
    [
        ([0.0, 0.5, 1.0], 10, False, "▁▅█"),
        ([0.0, 0.5, 1.0], 10, True, "_+#"),
        ([0.0, None, 1.0], 2, False, " █"),
        ([-1.0, 2.0, float("nan")], 10, False, "▁█ "),
        ([], 10, False, ""),
    ],
)
def test_a_sparkline(values, width, plain, line):
    assert screen.sparkline(values, width, plain=plain) == line
