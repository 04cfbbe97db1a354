"""`bnwatch report --compare A B`."""

from __future__ import annotations

import json

import pytest

from bnwatch.diagnosis import Quantity, Severity, Skipped
from bnwatch.sinks.tensorboard import TensorBoardSink
from tests import samples
from tests.test_cli import calm, run


def record(directory, *diagnoses, skipped=(), measured=False):
    sink = TensorBoardSink(directory)
    sink.write(samples.attachment())
    sink.write(samples.table(1))
    if measured:
        sink.write(samples.evaluation())
        sink.write(samples.cells())
    sink.close(calm(diagnoses=diagnoses, skipped=skipped, run=str(directory)))


def compared(capsys, tmp_path, *arguments):
    status, out, err = run(capsys, "report", "--compare", tmp_path / "a", tmp_path / "b", *arguments)
    assert err == ""
    return status, out


def test_what_is_new_gone_and_in_both(capsys, tmp_path):
    stays = samples.diagnosis("bn", "BN201")
    record(tmp_path / "a", samples.diagnosis("old"), stays)
    record(tmp_path / "b", samples.diagnosis("new"), stays)
    status, out = compared(capsys, tmp_path)
    assert status == 1
    heads = [line for line in out.splitlines() if line in {"new in B", "gone in B", "in both"}]
    assert heads == ["new in B", "gone in B", "in both"]
    new, gone = out.split("gone in B")[0].split("new in B")[1], out.split("gone in B")[1].split("in both")[0]
    assert "warning[BN101] `new`" in new
    assert "warning[BN101] `old`" in gone
    assert "same numbers" in out
    assert out.endswith("1 new, 1 gone, 1 in both\n")


@pytest.mark.parametrize(
    ("found", "fail_on", "status"),
    [
        ((None, "warning"), "warning", 1),
        ((None, "warning"), "error", 0),
        (("warning", "warning"), "warning", 0),
        (("warning", "error"), "error", 1),
        (("error", "warning"), "warning", 0),
        (("error", None), "info", 0),
    ],
)
def test_the_status_follows_what_is_new_or_graver(capsys, tmp_path, found, fail_on, status):
    for side, severity in zip("ab", found, strict=True):
        record(tmp_path / side, *([samples.diagnosis(severity=Severity.parse(severity))] if severity else []))
    assert compared(capsys, tmp_path, "--fail-on", fail_on)[0] == status


def test_numbers_and_severity_that_changed(capsys, tmp_path):
    record(tmp_path / "a", samples.diagnosis(evidence={"apart": Quantity(2.0, "std"), "same": Quantity(1.0)}))
    record(
        tmp_path / "b",
        samples.diagnosis(evidence={"apart": Quantity(4.0, "std"), "same": Quantity(1.0)}, severity=Severity.ERROR),
    )
    out = " ".join(compared(capsys, tmp_path)[1].split())
    assert "warning in A; apart 2 std in A, 4 std in B" in out
    assert "same" not in out.partition("in both")[2]
    assert "1 in both, 1 of them graver" in out
    (entry,) = json.loads(compared(capsys, tmp_path, "--format", "json")[1])["runs"]
    (both,) = entry["both"]
    assert both["severity"] == ["warning", "error"]
    assert [side["value"] for side in both["changed"]["apart"]] == [2.0, 4.0]
    assert list(both["changed"]) == ["apart"]


def test_gone_is_not_the_same_as_could_not_look(capsys, tmp_path):
    record(tmp_path / "a", samples.diagnosis())
    record(tmp_path / "b", skipped=[Skipped("BN101", "no samples")])
    out = " ".join(compared(capsys, tmp_path)[1].split())
    assert "but in B the rule could not look: no samples" in out
    (entry,) = json.loads(compared(capsys, tmp_path, "--format", "json")[1])["runs"]
    assert entry["gone"][0]["could_not_look"] == "no samples"


def test_what_was_allowed_or_has_cleared_is_said(capsys, tmp_path):
    record(tmp_path / "a", samples.diagnosis(state="allowed", reason="why"), samples.diagnosis("bn"))
    record(tmp_path / "b", samples.diagnosis(), samples.diagnosis("bn", state="cleared"))
    out = compared(capsys, tmp_path)[1]
    assert "allowed in A" in out
    assert "cleared in B" in out


def test_accuracies_side_by_side(capsys, tmp_path):
    record(tmp_path / "a", measured=True)
    record(tmp_path / "b")
    out = compared(capsys, tmp_path)[1]
    (line,) = [line for line in out.splitlines() if line.startswith("evaluation accuracy")]
    assert line.split() == ["evaluation", "accuracy", "25.0%", "-"]
    (line,) = [line for line in out.splitlines() if line.startswith("training examples, running statistics")]
    assert line.split()[-2:] == ["86.0%", "-"]
    record(tmp_path / "b2", measured=True)
    out = run(capsys, "report", "--compare", tmp_path / "a", tmp_path / "b2")[1]
    (line,) = [line for line in out.splitlines() if line.startswith("gap")]
    assert line.split() == ["gap", "50.0%", "50.0%", "+0.0", "points"]


def test_several_runs_are_compared_by_name(capsys, tmp_path):
    for name in ("a/x", "a/y", "b/x", "b/z"):
        record(tmp_path / name, samples.diagnosis(name[-1]))
    status, out = compared(capsys, tmp_path, "--format", "json")
    assert status == 1
    runs = {entry["run"]: entry for entry in json.loads(out)["runs"]}
    assert {name: [len(entry[part]) for part in ("new", "gone", "both")] for name, entry in runs.items()} == {
        "x": [0, 0, 1],
        "y": [0, 1, 0],
        "z": [1, 0, 0],
    }
    assert (runs["y"]["b"], runs["z"]["a"]) == (None, None)
    assert "there is no such run in A" in compared(capsys, tmp_path)[1]


def test_markdown(capsys, tmp_path):
    record(tmp_path / "a")
    record(tmp_path / "b", samples.diagnosis())
    out = compared(capsys, tmp_path, "--format", "markdown")[1]
    assert out.startswith("## bnwatch: 1 new, 0 gone, 0 in both\n")
    assert "#### new in B\n\n- warning\\[BN101\\] `encoder/bn_2` normalizes" in out


@pytest.mark.parametrize("form", ["text", "json", "markdown"])
def test_hostile_records_reach_no_terminal(capsys, tmp_path, form):
    record(tmp_path / "a")
    hostile = samples.diagnosis(samples.HOSTILE, samples.HOSTILE, message=samples.HOSTILE)
    record(tmp_path / "b", hostile)
    out = compared(capsys, tmp_path, "--format", form)[1]
    assert all(line.isprintable() for line in out.splitlines())
    assert form != "markdown" or "<img" not in out


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("--baseline", "x"), "--compare A B takes no --baseline"),
        (("--write-baseline", "x"), "--compare A B takes no --write-baseline"),
        (("--format", "sarif"), "--compare has the formats text, json, markdown, not sarif"),
    ],
)
def test_what_does_not_go_together(capsys, arguments, sentence):
    assert run(capsys, "report", "--compare", "a", "b", *arguments) == (2, "", f"bnwatch: error: {sentence}\n")


def test_a_directory_beside_the_two(capsys):
    found = run(capsys, "report", "c", "--compare", "a", "b")
    assert found == (2, "", "bnwatch: error: --compare A B takes no DIR\n")
