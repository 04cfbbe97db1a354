"""`bnwatch report --format html`: one file with the page of the tab and the answers it asks for."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import sys
from html.parser import HTMLParser
from urllib.parse import parse_qsl

from bnwatch.cli import page
from bnwatch.cli.report import Shown
from bnwatch.sinks.tensorboard import TensorBoardSink, read_runs
from bnwatch.views import RunViews
from tests import samples
from tests.test_cli import calm, record, run

VOID = {"meta", "hr"}
TRAP = "</script><!--<script>\u2028" + samples.HOSTILE


class Parsed(HTMLParser):
    """What a browser would make of the file: elements, attributes, and the text of every script."""

    def __init__(self, text):
        super().__init__()
        self.open, self.elements, self.scripts = [], [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag == "script":
            self.scripts.append("")
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open[-1:] == ["script"]:
            self.scripts[-1] += data

    @property
    def answers(self):
        return json.loads(self.scripts[0])


def written(capsys, tmp_path, *arguments):
    path = tmp_path / "report.html"
    status, out, err = run(capsys, "report", *arguments, "--format", "html", "-o", path)
    assert out == ""
    return Parsed(path.read_text(encoding="utf-8")), status, err


def question(key):
    route, _, query = key.partition("?")
    return route, dict(parse_qsl(query, keep_blank_values=True, strict_parsing=bool(query)))


def test_the_answers_are_those_of_the_tab(capsys, tmp_path):
    record(tmp_path / "runs" / "a")
    record(tmp_path / "runs" / "b", calm())
    found, status, err = written(capsys, tmp_path, tmp_path / "runs")
    assert (status, err) == (1, "")
    views = RunViews(tmp_path / "runs")
    views.refresh()
    routes = set()
    for key, answer in found.answers.items():
        route, parameters = question(key)
        routes.add(route)
        expected = views.answer(route, parameters)
        if route == "layers" and "step" not in parameters:
            kept = expected["steps"]
            assert set(answer["steps"]) < set(kept)
            assert answer["steps"][-1] == kept[-1]
            expected = {**expected, "steps": answer["steps"]}
        assert json.loads(json.dumps(expected)) == answer, key
    assert routes == {"runs", "run", "layers", "series", "heatmap", "channels", "rule"}
    for name in ("bn", "encoder%2Fbn_1"):
        assert f"series?layer={name}&run=a" in found.answers


def test_every_sample_that_is_offered_is_there(capsys, tmp_path):
    sink = TensorBoardSink(tmp_path / "run")
    sink.write(samples.attachment("bn"))
    for step in range(1, 61):
        sink.write(samples.table(step, "bn", sites=2))
        sink.write(samples.channels(step))
    sink.close(calm())
    answers = written(capsys, tmp_path, tmp_path / "run")[0].answers
    for key in ("layers?run=.", "channels?layer=bn&run=."):
        *earlier, last = answers[key]["steps"]
        assert 10 < len(earlier) < 20
        assert last == answers[key]["step"] == 60
        assert all(answers[f"{key}&step={step}"]["step"] == step for step in earlier)


def test_it_runs_its_own_script_only_and_asks_nobody(capsys, tmp_path):
    record(tmp_path / "run")
    found = written(capsys, tmp_path, tmp_path / "run")[0]
    (policy,) = [a["content"] for _, a in found.elements if a.get("http-equiv") == "Content-Security-Policy"]
    assert len(found.scripts) == 2
    digest = base64.b64encode(hashlib.sha256(found.scripts[1].encode()).digest()).decode()
    rules = dict(rule.strip().split(" ", 1) for rule in policy.split(";"))
    assert rules["default-src"] == "'none'"
    assert rules["script-src"] == f"'sha256-{digest}'"
    assert "http" not in policy
    assert not any({"src", "href"} & attributes.keys() for _, attributes in found.elements)


def test_hostile_names_stay_text(capsys, tmp_path):
    sink = TensorBoardSink(tmp_path / "run")
    sink.write(samples.attachment(TRAP, "bn"))
    sink.write(samples.table(1, TRAP, "bn"))
    sink.close(calm(diagnoses=(samples.diagnosis(TRAP, message=TRAP, name=TRAP, notes=(TRAP,)),)))
    plain = tmp_path / "plain"
    record(plain)
    found = written(capsys, tmp_path, tmp_path / "run")[0]
    # no element and no attribute that a calm file does not have
    known = written(capsys, tmp_path, plain)[0]
    assert {tag for tag, _ in found.elements} <= {tag for tag, _ in known.elements}
    assert {name for _, a in found.elements for name in a} == {name for _, a in known.elements for name in a}
    assert len(found.scripts) == 2
    assert [layer["layer"] for layer in found.answers["run?run=."]["layers"]] == [TRAP, "bn"]
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert all(line.replace("\t", "").isprintable() for line in text.splitlines())


def test_an_address_is_what_javascript_makes_of_it():
    assert page.address("runs") == "runs"
    assert page.address("series", run="a b/ü!~*'()", layer="\ud800x&=") == (
        "series?layer=%EF%BF%BDx%26%3D&run=a%20b%2F%C3%BC!~*'()"
    )


def test_without_a_script_there_is_the_report(capsys, tmp_path):
    record(tmp_path / "run")
    written(capsys, tmp_path, tmp_path / "run")
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    plain = text.partition("<noscript>")[2].partition("</noscript>")[0]
    assert "normalizes 2 call sites with one set of running statistics" in plain


def test_a_file_too_small_for_all_has_the_most_important_and_says_so(tmp_path):
    paths = [f"layer {n}" for n in range(60)]
    sink = TensorBoardSink(tmp_path)
    sink.write(samples.attachment(*paths))
    for step in range(1, 30):
        sink.write(samples.table(step, *paths))
    sink.close(calm(diagnoses=(samples.diagnosis("layer 44"),)))
    shown = Shown(str(tmp_path), read_runs(tmp_path))
    answers, left_out = page.selection(shown, 120_000)
    assert len(page.embedded(answers)) < 125_000
    assert {"runs", "run?run=.", "layers?run=.", "series?layer=layer%2044&run=."} <= answers.keys()
    (sentence,) = left_out
    shown_layers = sum(key.startswith("series?") for key in answers)
    assert f"lines of other layers ({60 - shown_layers:,})" in sentence
    assert 0 < shown_layers < 60
    assert len(answers["series?layer=layer%2044&run=."]["steps"]) == 29
    everything, nothing = page.selection(shown)
    assert sum(key.startswith("series?") for key in everything) == 60
    assert nothing == []


def test_layers_that_matter_little_have_fewer_points(tmp_path, monkeypatch):
    monkeypatch.setattr(page, "_COARSE", 10)
    paths = [f"layer {n}" for n in range(20)]
    sink = TensorBoardSink(tmp_path)
    sink.write(samples.attachment(*paths))
    for step in range(1, 30):
        sink.write(samples.table(step, *paths))
    sink.close(calm(diagnoses=(samples.diagnosis("layer 14"),)))
    answers, _ = page.selection(Shown(str(tmp_path), read_runs(tmp_path)))
    points = {key: len(answer["steps"]) for key, answer in answers.items() if key.startswith("series?")}
    assert points["series?layer=layer%2014&run=."] == 29
    assert sorted(points.values())[-8:] == [29] * 8
    assert max(sorted(points.values())[:12]) <= 10
    assert all(answers[key]["samples"] == 29 for key in points)


def test_what_a_baseline_knows_is_no_alarm_in_the_file(capsys, tmp_path):
    record(tmp_path / "run")
    known = tmp_path / "known.json"
    run(capsys, "report", tmp_path / "run", "--write-baseline", known)
    found, status, _ = written(capsys, tmp_path, tmp_path / "run", "--baseline", known)
    assert status == 0
    (entry,) = found.answers["runs"]["runs"]
    assert (entry["severity"], entry["headline"]) == (None, None)
    overview = found.answers["run?run=."]
    assert {d["state"] for d in overview["report"]["diagnoses"]} == {"allowed", "cleared"}
    assert not any(layer["diagnoses"] for layer in overview["layers"])


def test_an_event_file_is_its_run(capsys, tmp_path):
    (path,) = record(tmp_path / "run").directory.iterdir()
    assert "run?run=." in written(capsys, tmp_path, path)[0].answers


def test_it_is_no_reading_for_a_terminal(capsys, tmp_path, monkeypatch):
    record(tmp_path)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    sentence = "bnwatch: error: --format html is for a browser: add -o report.html\n"
    assert run(capsys, "report", tmp_path, "--format", "html") == (2, "", sentence)


def test_an_installation_without_the_page(capsys, tmp_path, monkeypatch):
    def missing(_):
        raise ModuleNotFoundError

    record(tmp_path)
    monkeypatch.setattr(page.resources, "files", missing)
    status, out, err = run(capsys, "report", tmp_path, "--format", "html")
    assert (status, out) == (2, "")
    assert re.match("bnwatch: error: the page is not part of this installation; --format markdown", err)
