"""`bnwatch report` as SARIF, against a baseline, and into a file."""

from __future__ import annotations

import json

import pytest

import bnwatch
from bnwatch.rules import CATALOGUE
from bnwatch.sinks.tensorboard import TensorBoardSink
from tests import samples
from tests.test_cli import calm, record, run

# --- into a file -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["text", "json", "markdown", "sarif"])
def test_the_file_holds_what_would_be_printed(capsys, tmp_path, form):
    record(tmp_path / "run")
    printed = run(capsys, "report", tmp_path / "run", "--format", form)
    path = tmp_path / "out"
    assert run(capsys, "report", tmp_path / "run", "--format", form, "-o", path) == (1, "", "")
    assert path.read_text(encoding="utf-8") == printed[1]


def test_a_file_that_cannot_be_written(capsys, tmp_path):
    record(tmp_path)
    status, out, err = run(capsys, "report", tmp_path, "-o", tmp_path / "no" / "out")
    assert (status, out) == (2, "")
    assert err == f"bnwatch: error: cannot write '{tmp_path}/no/out': No such file or directory\n"


def test_without_a_directory(capsys):
    status, out, err = run(capsys, "report")
    assert (status, out) == (2, "")
    assert err.startswith("bnwatch: error: name the directory of a run: bnwatch report DIR")


# --- SARIF -------------------------------------------------------------------------------------------------------


def sarif(capsys, *arguments):
    """Return the log, with what the schema of SARIF 2.1.0 requires checked by hand."""
    log = json.loads(run(capsys, "report", *arguments, "--format", "sarif")[1])
    assert log["version"] == "2.1.0"
    (analysis,) = log["runs"]
    driver = analysis["tool"]["driver"]
    assert driver["name"] == "bnwatch"
    ids = [rule["id"] for rule in driver["rules"]]
    assert len(set(ids)) == len(ids)
    for rule in driver["rules"]:
        assert rule["shortDescription"]["text"]
        assert rule["help"]["text"] == rule["help"]["markdown"]
        assert rule["defaultConfiguration"]["level"] in {"none", "note", "warning", "error"}
    for result in analysis["results"]:
        assert result["message"]["text"]
        assert result["level"] in {"none", "note", "warning", "error"}
        assert "ruleIndex" not in result or ids[result["ruleIndex"]] == result["ruleId"]
        assert all(isinstance(text, str) for text in result["partialFingerprints"].values())
        related = result.get("relatedLocations", [])
        assert len({location["id"] for location in related}) == len(related)
        for location in related:
            assert location["id"] >= 0
            assert location["message"]["text"]
        for location in [*result["locations"], *related]:
            assert "id" in location or location["logicalLocations"][0]["fullyQualifiedName"]
            if "physicalLocation" in location:
                assert location["physicalLocation"]["region"]["startLine"] >= 1
                uri = location["physicalLocation"]["artifactLocation"]["uri"]
                assert uri.isascii()
                assert not any(c.isspace() for c in uri)
        for suppression in result.get("suppressions", []):
            assert suppression["kind"] in {"inSource", "external"}
    (invocation,) = analysis["invocations"]
    assert invocation["executionSuccessful"] is True
    for note in invocation["toolExecutionNotifications"]:
        assert note["level"] in {"none", "note", "warning", "error"}
        assert note["message"]["text"]
    return analysis


def test_sarif_has_every_rule_and_every_diagnosis_that_holds(capsys, tmp_path):
    record(tmp_path)
    analysis = sarif(capsys, tmp_path)
    assert [rule["id"] for rule in analysis["tool"]["driver"]["rules"]] == [rule.id for rule in CATALOGUE]
    assert CATALOGUE[0].page() == analysis["tool"]["driver"]["rules"][0]["help"]["markdown"]
    shown = {
        result["partialFingerprints"]["bnwatch/v1"]: (
            result["level"],
            [s["kind"] for s in result.get("suppressions", [])],
        )
        for result in analysis["results"]
    }
    assert shown == {
        "BN301 model": ("error", []),
        "BN101 encoder/bn_2": ("warning", []),
        "BN101 bn": ("warning", ["external"]),
    }  # what cleared, BN201, is left out
    notes = [note["message"]["text"] for note in analysis["invocations"][0]["toolExecutionNotifications"]]
    assert ".: BN302 could not look: the number of classes is not known" in notes


def test_sarif_names_the_line_that_built_the_layer(capsys, tmp_path):
    record(tmp_path)
    places = {
        result["partialFingerprints"]["bnwatch/v1"]: result["locations"][0].get("physicalLocation")
        for result in sarif(capsys, tmp_path)["results"]
    }
    assert places["BN101 encoder/bn_2"] == {"artifactLocation": {"uri": "model.py"}, "region": {"startLine": 12}}
    assert places["BN301 model"] is None


def test_sarif_names_the_lines_that_call_the_layer(capsys, tmp_path):
    record(tmp_path)
    related = {
        result["partialFingerprints"]["bnwatch/v1"]: [
            (
                location["physicalLocation"]["artifactLocation"]["uri"],
                location["physicalLocation"]["region"]["startLine"],
                location["message"]["text"],
            )
            for location in result.get("relatedLocations", [])
        ]
        for result in sarif(capsys, tmp_path)["results"]
    }
    assert related["BN101 encoder/bn_2"] == [
        ("model.py", 31, "encoder/bn_2#0, encoder/bn_2#2 called here"),
        ("file:///else%20where/net.py", 5, "encoder/bn_2#3 called here"),
    ]
    assert related["BN301 model"] == []


def test_sarif_gives_the_first_call_where_the_line_that_built_the_layer_is_not_known(capsys, tmp_path):
    lines = (None, "no line", *(f"net.py:{n}" for n in range(5, 100)))
    spec = bnwatch.records.LayerSpec("encoder/bn_2", "BN", 4, 1e-3, 0.9, called_at=lines)
    sink = TensorBoardSink(tmp_path)
    sink.write(bnwatch.records.Attachment((spec,)))
    sink.close(calm(diagnoses=(samples.diagnosis(),)))
    (result,) = sarif(capsys, tmp_path)["results"]
    assert result["locations"][0]["physicalLocation"]["region"]["startLine"] == 5
    assert [one["physicalLocation"]["region"]["startLine"] for one in result["relatedLocations"]] == [*range(5, 25)]


@pytest.mark.parametrize(
    ("built_at", "uri"),
    [
        ("{here}/nets/res net.py:7", "nets/res%20net.py"),
        ("/elsewhere/net.py:7", "file:///elsewhere/net.py"),
        ("C:\\nets\\net.py:7", "C%3A/nets/net.py"),
        ('"><script>:7', "%22%3E%3Cscript%3E"),
        ("net.py:0", None),
        ("net.py", None),
    ],
)
def test_sarif_gives_files_relative_to_where_it_runs(capsys, tmp_path, monkeypatch, built_at, uri):
    monkeypatch.chdir(tmp_path)
    spec = bnwatch.records.LayerSpec("encoder/bn_2", "BN", 4, 1e-3, 0.9, built_at=built_at.format(here=tmp_path))
    sink = TensorBoardSink(tmp_path)
    sink.write(bnwatch.records.Attachment((spec,)))
    sink.close(calm(diagnoses=(samples.diagnosis(),)))
    (result,) = sarif(capsys, tmp_path)["results"]
    place = result["locations"][0].get("physicalLocation")
    assert (place and place["artifactLocation"]["uri"]) == uri


def test_sarif_tells_runs_apart_and_says_the_same_each_time(capsys, tmp_path):
    record(tmp_path / "a")
    record(tmp_path / "b")
    first = sarif(capsys, tmp_path)
    prints = [result["partialFingerprints"]["bnwatch/v1"] for result in first["results"]]
    assert len(prints) == len(set(prints)) == 6
    assert {text.partition(" ")[0] for text in prints} == {"a", "b"}
    assert sarif(capsys, tmp_path) == first


def test_sarif_holds_no_link_and_no_placeholder_of_others(capsys, tmp_path):
    message = "see [here](https://example.org) {0} " + samples.HOSTILE
    found = samples.diagnosis(samples.HOSTILE, samples.HOSTILE, message=message)
    record(tmp_path, calm(diagnoses=(found,)))
    (result,) = sarif(capsys, tmp_path)["results"]
    assert "\\[here\\](https" in result["message"]["text"]
    assert "{{0}}" in result["message"]["text"]
    assert "<img" not in result["message"]["markdown"]


# --- the baseline ------------------------------------------------------------------------------------------------


def test_what_the_baseline_lists_is_shown_and_does_not_fail(capsys, tmp_path):
    record(tmp_path / "run")
    known = tmp_path / "known.json"
    status, out, err = run(capsys, "report", tmp_path / "run", "--write-baseline", known)
    assert (status, err) == (0, f"bnwatch: note: 2 diagnoses written to {known}\n")
    assert out == run(capsys, "report", tmp_path / "run")[1]
    assert json.loads(known.read_text())["diagnoses"] == [
        {"rule": "BN101", "subject": "encoder/bn_2", "severity": "warning"},
        {"rule": "BN301", "subject": "model", "severity": "error"},
    ]
    status, out, err = run(capsys, "report", tmp_path / "run", "--baseline", known)
    assert (status, err) == (0, "")
    assert "warning[BN101], allowed: `encoder/bn_2` normalizes 2 call sites" in out
    assert "known, listed in" in out


def test_what_is_new_or_graver_than_known_fails(capsys, tmp_path):
    known = tmp_path / "known.json"
    record(tmp_path / "a", calm(diagnoses=(samples.diagnosis(),)))
    run(capsys, "report", tmp_path / "a", "--write-baseline", known)
    record(tmp_path / "other", calm(diagnoses=(samples.diagnosis("another"),)))
    assert run(capsys, "report", tmp_path / "other", "--baseline", known)[0] == 1
    record(tmp_path / "graver", calm(diagnoses=(samples.diagnosis(severity=bnwatch.Severity.ERROR),)))
    assert run(capsys, "report", tmp_path / "graver", "--baseline", known)[0] == 1
    record(tmp_path / "less", calm(diagnoses=(samples.diagnosis(severity=bnwatch.Severity.INFO),)))
    assert run(capsys, "report", tmp_path / "less", "--baseline", known, "--fail-on", "info")[0] == 0


def test_what_is_known_and_found_no_more_is_said(capsys, tmp_path):
    known = tmp_path / "known.json"
    record(tmp_path / "a")
    run(capsys, "report", tmp_path / "a", "--write-baseline", known)
    record(tmp_path / "b", calm())
    status, out, err = run(capsys, "report", tmp_path / "b", "--baseline", known, "--format", "json")
    assert status == 0
    assert json.loads(out)["baseline"] == {"gone": ["BN101 encoder/bn_2", "BN301 model"]}
    assert err.splitlines()[0] == (
        "bnwatch: note: BN101 at encoder/bn_2 is in the baseline and is found no more: take it out"
    )


def test_a_baseline_suppresses_in_sarif(capsys, tmp_path):
    record(tmp_path / "run")
    run(capsys, "report", tmp_path / "run", "--write-baseline", tmp_path / "known.json")
    results = sarif(capsys, tmp_path / "run", "--baseline", tmp_path / "known.json")["results"]
    assert all("suppressions" in result for result in results)


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"", "it is not JSON at line 1"),
        (b"{", "it is not JSON at line 1"),
        (b"\xff\xfe", "it is not JSON"),
        (b"[" * 100_000, "it is not JSON"),
        (b"[]", "it lists no diagnoses"),
        (b'{"diagnoses": {}}', "it lists no diagnoses"),
        (b'{"diagnoses": []}', "its schema is None, and this bnwatch reads 1"),
        (b'{"schema": 2, "diagnoses": []}', "its schema is 2, and this bnwatch reads 1"),
        (b'{"schema": 1, "diagnoses": [1]}', "entry 1 must have the texts rule, subject and severity"),
        (
            b'{"schema": 1, "diagnoses": [{"rule": "BN101", "subject": "bn", "severity": "\\u001b[31m"}]}',
            "entry 1: severity must be one of info, warning, error, got '\\x1b[31m'",
        ),
    ],
)
def test_a_file_that_is_no_baseline(capsys, tmp_path, content, sentence):
    record(tmp_path / "run")
    path = tmp_path / "known.json"
    path.write_bytes(content)
    status, out, err = run(capsys, "report", tmp_path / "run", "--baseline", path)
    assert (status, out) == (2, "")
    assert err.startswith(f"bnwatch: error: '{path}' is no baseline: {sentence}")
    assert err.count("\n") == 1


def test_a_baseline_that_is_not_there(capsys, tmp_path):
    record(tmp_path / "run")
    path = tmp_path / "known.json"
    sentence = f"bnwatch: error: cannot read '{path}': No such file or directory\n"
    assert run(capsys, "report", tmp_path / "run", "--baseline", path) == (2, "", sentence)
    status, _, err = run(capsys, "report", tmp_path / "run", "--baseline", "/dev/zero")
    assert (status, err) == (2, "bnwatch: error: '/dev/zero' is no baseline: it is no file, or larger than 16 MB\n")
