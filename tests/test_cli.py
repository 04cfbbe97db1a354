"""The command line: what it prints, and its exit status."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from types import ModuleType

import pytest

import bnwatch
from bnwatch import cli
from bnwatch.cli import report
from bnwatch.rules import CATALOGUE
from bnwatch.sinks.tensorboard import TensorBoardSink
from bnwatch.sinks.tensorboard.events import find_payloads
from tests import samples


def record(directory, report=None):
    sink = TensorBoardSink(directory)
    sink.write(samples.attachment())
    for step in range(1, 41):
        sink.write(samples.table(step))
    sink.close(report or samples.report(run=str(directory)))
    return sink


def calm(**changes):
    return samples.report(**{"diagnoses": (), "skipped": (), **changes})


def run(capsys, *arguments):
    status = cli.main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def misuse(capsys, *arguments):
    """Return the one sentence that a misuse is answered with."""
    with pytest.raises(SystemExit) as error:
        cli.main([str(argument) for argument in arguments])
    assert error.value.code == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    return captured.err.splitlines()[-1]


# --- report ------------------------------------------------------------------------------------------------------


def test_a_sick_run_is_reported_with_status_1(capsys, tmp_path):
    record(tmp_path)
    status, out, err = run(capsys, "report", tmp_path)
    assert status == 1
    assert err == ""
    assert out.startswith("warning[BN101]: `encoder/bn_2` normalizes 2 call sites")
    assert "consequence: error[BN301]" in out
    assert "\x1b" not in out


def test_a_healthy_run_is_one_calm_line_with_status_0(capsys, tmp_path):
    record(tmp_path, calm())
    status, out, err = run(capsys, "report", tmp_path)
    assert (status, err) == (0, "")
    assert out == "no diagnosis: 3 layers at 4 call sites, 40 samples in 620 steps, 2 evaluations\n"


@pytest.mark.parametrize(
    ("fail_on", "found", "status"),
    [
        ("warning", "warning active", 1),
        ("warning", "info active", 0),
        ("warning", "error active", 1),
        ("error", "warning active", 0),
        ("error", "error active", 1),
        ("info", "info active", 1),
        ("info", "error cleared", 0),
        ("info", "error allowed", 0),
    ],
)
def test_the_status_follows_what_is_active_and_grave_enough(capsys, tmp_path, fail_on, found, status):
    severity, state = found.split()
    found = samples.diagnosis(severity=bnwatch.Severity.parse(severity), state=state)
    record(tmp_path, calm(diagnoses=(found,)))
    assert run(capsys, "report", tmp_path, "--fail-on", fail_on)[0] == status


def test_json_is_one_document_for_all_runs(capsys, tmp_path):
    record(tmp_path / "a")
    record(tmp_path / "b", calm())
    status, out, _ = run(capsys, "report", tmp_path, "--format", "json")
    data = json.loads(out)
    assert (status, data["schema"]) == (1, 1)
    a, b = data["runs"]
    assert (a["run"], b["run"], b["diagnoses"]) == (str(tmp_path / "a"), str(tmp_path / "b"), [])
    assert {
        "rule", "name", "severity", "state", "subject", "first_step", "last_step", "epoch", "message", "evidence",
        "table", "further", "notes", "helps", "causes", "consequences", "reason", "built_at",
    } == set(a["diagnoses"][0])  # fmt: skip
    assert a["skipped"][0] == {"rule": "BN302", "reason": "the number of classes is not known", "needs": None}
    assert a["problems"] == []


def test_markdown(capsys, tmp_path):
    record(tmp_path)
    status, out, _ = run(capsys, "report", tmp_path, "--format", "markdown")
    assert status == 1
    assert out.startswith(f"## bnwatch: `{tmp_path}`\n")


def test_several_runs_are_told_apart(capsys, tmp_path):
    record(tmp_path / "a")
    record(tmp_path / "b", calm())
    out = run(capsys, "report", tmp_path)[1]
    assert f"== {tmp_path / 'a'}\n" in out
    assert f"== {tmp_path / 'b'}\n\nno diagnosis: " in out


@pytest.mark.parametrize("form", ["text", "json", "markdown"])
def test_hostile_records_reach_no_terminal(capsys, tmp_path, form):
    hostile = samples.diagnosis(samples.HOSTILE, samples.HOSTILE, name=samples.HOSTILE, message=samples.HOSTILE)
    record(tmp_path, calm(diagnoses=(hostile,), run=samples.HOSTILE))
    out = run(capsys, "report", tmp_path, "--format", form)[1]
    assert all(line.isprintable() for line in out.splitlines())
    assert form != "markdown" or "<img" not in out


def test_a_damaged_file_is_reported_and_what_is_left_is_shown(capsys, tmp_path):
    (path,) = record(tmp_path).directory.iterdir()
    data = bytearray(path.read_bytes())
    with path.open("rb") as file:
        spans = list(find_payloads(file, len(data)))
    data[spans[len(spans) // 2].offset - 1] ^= 0xFF
    path.write_bytes(data)
    status, out, err = run(capsys, "report", tmp_path)
    assert status == 0
    assert out.startswith("no diagnosis: 3 layers")
    assert "no closing report" in out
    assert err.startswith("bnwatch: warning: ")
    assert err.count("\n") == 1
    assert "what lies behind is lost" in err


def test_colour_on_a_terminal(tmp_path):
    pty = pytest.importorskip("pty")
    record(tmp_path)
    controller, terminal = pty.openpty()
    environment = {**os.environ, "TERM": "xterm", "NO_COLOR": ""}
    command = [sys.executable, "-m", "bnwatch.cli", "report", str(tmp_path)]
    assert subprocess.run(command, stdout=terminal, env=environment, check=False, timeout=60).returncode == 1
    assert b"\x1b[1;33mwarning[BN101]\x1b[0m" in os.read(controller, 4096)


# --- what goes wrong ---------------------------------------------------------------------------------------------


def test_there_is_no_such_directory(capsys, tmp_path):
    status, out, err = run(capsys, "report", tmp_path / "nowhere")
    assert (status, out) == (2, "")
    assert err == f"bnwatch: error: no such file or directory: '{tmp_path / 'nowhere'}'\n"


def test_there_are_no_events(capsys, tmp_path):
    assert run(capsys, "report", tmp_path) == (2, "", f"bnwatch: error: no bnwatch record in '{tmp_path}' or below\n")


def test_nothing_was_recorded_yet(capsys, tmp_path):
    TensorBoardSink(tmp_path)
    status, out, err = run(capsys, "report", tmp_path)
    assert (status, out) == (2, "")
    assert err == f"bnwatch: error: the record in '{tmp_path}' holds no event of bnwatch\n"


def test_a_file_of_something_else(capsys, tmp_path):
    path = tmp_path / "events.out.tfevents.1.bnwatch"
    path.write_bytes(b"\x1b[31m nothing of the kind")
    status, out, err = run(capsys, "report", tmp_path)
    assert (status, out) == (2, "")
    assert err == f"bnwatch: error: '{path}' is damaged: not an event at byte 0 of 25; is it an event file?\n"


def test_a_path_that_steers_a_terminal(capsys):
    err = run(capsys, "report", "\x1b[31m\udcff")[2]
    assert err == "bnwatch: error: no such file or directory: '\\x1b[31m\\udcff'\n"


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ((), "bnwatch: error: the following arguments are required: COMMAND"),
        (("explain",), "bnwatch explain: error: the following arguments are required: ID"),
        (("rules", "--all"), "bnwatch: error: unrecognized arguments: --all"),
    ],
)
def test_misuse(capsys, arguments, sentence):
    assert misuse(capsys, *arguments) == sentence


@pytest.mark.parametrize(
    "arguments", [("report", ".", "--format", "xml"), ("report", ".", "--fail-on", "bad"), ("rep0rt",)]
)
def test_a_wrong_choice_is_answered_with_the_right_ones(capsys, arguments):
    assert "choose from" in misuse(capsys, *arguments)


def test_a_reader_that_goes_away_ends_it_quietly(tmp_path):
    record(tmp_path, calm(diagnoses=tuple(samples.diagnosis(f"layer {n}") for n in range(300))))
    command = f"{sys.executable} -m bnwatch.cli report {tmp_path} | head -1"
    found = subprocess.run(["/bin/sh", "-c", command], capture_output=True, text=True, check=True, timeout=60)
    assert found.stdout.startswith("warning[BN101]")
    assert found.stderr == ""


def test_an_interrupt_ends_it_quietly(capsys, tmp_path, monkeypatch):
    def interrupted(_):
        raise KeyboardInterrupt

    record(tmp_path)
    monkeypatch.setitem(report._FORMATS, "text", interrupted)
    assert run(capsys, "report", tmp_path) == (130, "", "")


def test_what_is_no_file_is_not_waited_for(capsys, tmp_path):
    os.mkfifo(tmp_path / "events.out.tfevents.1.bnwatch")
    assert run(capsys, "report", tmp_path)[0] == 2


# --- rules and explain -------------------------------------------------------------------------------------------


def test_rules_lists_each_with_its_thresholds(capsys):
    status, out, err = run(capsys, "rules")
    assert (status, err) == (0, "")
    for rule in CATALOGUE:
        (line,) = [line for line in out.splitlines() if line.startswith(rule.id)]
        assert rule.name in line
        assert rule.summary in line
        assert str(rule.severity) in line
        for name, threshold in rule.thresholds.items():
            assert f"{name} = {threshold.value:g} ({threshold.kind}): {threshold.why}" in out


@pytest.fixture
def pages(monkeypatch):
    monkeypatch.setattr(type(CATALOGUE[0]), "page", lambda rule: f"# {rule.id}: {rule.name}\n\nWhat it means.\n")


@pytest.mark.usefixtures("pages")
@pytest.mark.parametrize("name", ["BN101", "bn101", " BN101 ", "shared-batch-norm", "Shared-Batch-Norm"])
def test_explain_prints_the_page(capsys, name):
    assert run(capsys, "explain", name) == (0, "# BN101: shared-batch-norm\n\nWhat it means.\n", "")


@pytest.mark.usefixtures("pages")
@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("BN3O1", "no rule 'BN3O1'; did you mean BN301?"),
        ("shared-batchnorm", "no rule 'shared-batchnorm'; did you mean shared-batch-norm?"),
        ("../../etc/passwd", "no rule '../../etc/passwd'; `bnwatch rules` lists them"),
        ("", "no rule ''; `bnwatch rules` lists them"),
    ],
)
def test_explain_knows_no_such_rule(capsys, name, sentence):
    assert run(capsys, "explain", name) == (2, "", f"bnwatch: error: {sentence}\n")


def test_explain_without_pages(capsys, monkeypatch):
    def missing(_):
        raise FileNotFoundError

    monkeypatch.setattr(type(CATALOGUE[0]), "page", missing)
    status, out, err = run(capsys, "explain", "BN101")
    assert (status, out) == (2, "")
    assert err.startswith("bnwatch: error: the page of BN101 is not part of this installation; its summary: ")


# --- demo, version ------------------------------------------------------------------------------------------------


@pytest.fixture
def demo(monkeypatch):
    """Return a stand-in for the demo that remembers what it was called with."""
    examples, module = ModuleType("bnwatch.examples"), ModuleType("bnwatch.examples.demo")
    called = []
    module.main = called.append
    examples.demo = module
    monkeypatch.setitem(sys.modules, "bnwatch.examples", examples)
    monkeypatch.setitem(sys.modules, "bnwatch.examples.demo", module)
    module.called = called
    return module


def test_demo_runs_the_demo(capsys, demo):
    assert run(capsys, "demo", "--log-dir", "runs/demo") == (0, "", "")
    assert run(capsys, "demo") == (0, "", "")
    assert demo.called == ["runs/demo", None]


@pytest.mark.parametrize(("module", "package"), [("chainer", "Chainer"), ("sklearn.datasets", "scikit-learn")])
def test_demo_says_what_it_misses(capsys, demo, module, package):
    def main(_):
        raise ModuleNotFoundError(name=module)

    demo.main = main
    sentence = f'the demo needs {package}: pip install "bnwatch[chainer,examples]"'
    assert run(capsys, "demo") == (2, "", f"bnwatch: error: {sentence}\n")


def test_demo_without_the_examples(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "bnwatch.examples", None)
    status, out, err = run(capsys, "demo")
    assert (status, out) == (2, "")
    assert err == "bnwatch: error: the demo is not part of this installation: run it with `make demo` in a checkout\n"


def test_other_faults_of_the_demo_are_not_hidden(demo):
    def main(_):
        raise ImportError(name="another")

    demo.main = main
    with pytest.raises(ImportError):
        cli.main(["demo"])


def test_version(capsys):
    with pytest.raises(SystemExit) as error:
        cli.main(["--version"])
    assert error.value.code == 0
    assert capsys.readouterr().out == f"bnwatch {bnwatch.__version__}\n"


def test_a_report_imports_neither_a_framework_nor_what_only_other_commands_need(tmp_path):
    record(tmp_path, calm())
    others = ("tensorflow", "keras", "chainer", "jax", "torch", "rich", "bnwatch.views", "bnwatch.dashboard")
    program = (
        "import sys; from bnwatch import cli; cli.main(['report', sys.argv[1]]); "
        f"sys.exit(' '.join(name for name in {others} if name in sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)], check=False, capture_output=True, text=True, timeout=60
    )
    assert done.stderr.strip() == ""
    assert done.stdout.startswith("no diagnosis: ")
