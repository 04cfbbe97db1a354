"""The plugin as TensorBoard runs it, without a server."""

from __future__ import annotations

import logging
import threading
from argparse import Namespace
from configparser import ConfigParser
from importlib import import_module
from pathlib import Path

import pytest
from tensorboard.backend.application import TensorBoardWSGI
from tensorboard.plugins import base_plugin
from werkzeug.test import Client

from bnwatch.dashboard import plugin as module
from bnwatch.dashboard.loader import BNWatchLoader
from bnwatch.dashboard.plugin import BNWatchPlugin
from bnwatch.sinks.tensorboard import TensorBoardSink
from bnwatch.views import RunViews
from tests import samples

BASE = "/data/plugin/bnwatch"
ROOT = Path(__file__).parents[2]


def record(directory, *steps, paths=("a", "bn")):
    sink = TensorBoardSink(directory)
    sink.write(samples.attachment(*paths))
    for step in steps:
        sink.write(samples.table(step, *paths))
    return sink


def plugin_of(logdir="", spec=""):
    flags = Namespace(logdir=str(logdir), logdir_spec=spec)
    plugin = BNWatchPlugin(base_plugin.TBContext(flags=flags, logdir=str(logdir)))
    plugin.rest = 0.0
    return plugin


def client_of(plugin):
    return Client(TensorBoardWSGI([plugin]))


@pytest.fixture
def client(tmp_path):
    record(tmp_path / "runs" / "x", 1, 2, 3)
    return client_of(plugin_of(tmp_path / "runs"))


def test_tensorboard_lists_the_tab(tmp_path, client):
    listed = client.get("/data/plugins_listing").json["bnwatch"]
    assert listed["enabled"]
    assert listed["tab_name"] == "BN Watch"
    assert listed["loading_mechanism"] == {"type": "IFRAME", "module_path": f"{BASE}/index.js"}
    plugin = plugin_of(tmp_path / "empty")
    assert not plugin.is_active()
    record(tmp_path / "empty", 1)
    assert plugin.is_active()


@pytest.mark.parametrize(
    ("asked", "keys"),
    [
        ("runs", {"runs", "problems", "hint"}),
        ("run?run=x", {"report", "progress", "layers", "statistics", "evaluations", "chance", "cells"}),
        ("layers?run=x", {"step", "rows", "steps"}),
        ("layers?run=x&step=2", {"step", "rows", "steps"}),
        ("series?run=x&layer=bn", {"steps", "sites"}),
        ("heatmap?run=x&statistic=matters", {"steps", "values", "complete"}),
        ("channels?run=x&layer=bn", {"channels", "missing"}),
        ("rule?rule=BN101", {"markdown", "summary"}),
    ],
)
def test_every_route_answers_json_that_is_not_kept(client, asked, keys):
    response = client.get(f"{BASE}/{asked}")
    assert response.status_code == 200
    assert keys <= response.json.keys()
    assert response.json["schema"] == 1
    assert response.content_type == "application/json"
    assert response.headers["Cache-Control"] == "no-store"
    assert response.headers["X-Content-Type-Options"] == "nosniff"


@pytest.mark.parametrize(
    ("asked", "status", "sentence"),
    [
        ("run?run=nix", 404, "no run 'nix'"),
        ("run?run=../x", 404, "no run '../x'"),
        ("run", 400, "run needs the parameter run"),
        ("series?run=x", 400, "series needs the parameter layer"),
        ("series?run=x&layer=nix", 404, "no layer 'nix' in this run"),
        ("heatmap?run=x&statistic=nix", 404, "no statistic 'nix'"),
        ("layers?run=x&step=one", 400, "step must be a whole number, got 'one'"),
        ("rule?rule=../../../etc/passwd", 404, "no rule '../../../etc/passwd'"),
        ("series?run=x&layer=%ff%00%1b", 404, "no layer"),
    ],
)
def test_what_cannot_be_answered_is_said_in_a_sentence(client, asked, status, sentence):
    response = client.get(f"{BASE}/{asked}")
    assert response.status_code == status
    assert set(response.json) == {"error"}
    assert response.json["error"].startswith(sentence)
    assert response.headers["Cache-Control"] == "no-store"


@pytest.mark.parametrize(
    "path",
    [
        "../plugin.py",
        "%2e%2e/plugin.py",
        "static/index.js",
        "index.js/../../plugin.py",
        "/etc/passwd",
        "index.js%00",
        "",
    ],
)
def test_there_are_no_other_routes(client, path):
    response = client.get(f"{BASE}/{path}")
    assert response.status_code == 404
    assert b"import" not in response.data


def test_only_reading_is_answered(client):
    response = client.post(f"{BASE}/runs")
    assert response.status_code == 405
    assert response.json == {"error": "only GET is answered"}
    assert client.head(f"{BASE}/runs").status_code == 200


def test_who_has_the_answer_already_gets_none(tmp_path):
    sink = record(tmp_path / "x", 1)
    client = client_of(plugin_of(tmp_path))
    for asked in ("runs", "run?run=x", "heatmap?run=x&statistic=matters"):
        tag = client.get(f"{BASE}/{asked}").headers["ETag"]
        response = client.get(f"{BASE}/{asked}", headers={"If-None-Match": tag})
        assert (response.status_code, response.data) == (304, b"")
        assert response.headers["Content-Type"] == "application/json"
        sink.write(samples.table(2, "a", "bn"))
        response = client.get(f"{BASE}/{asked}", headers={"If-None-Match": tag})
        assert response.status_code == 200
        assert response.headers["ETag"] != tag
        sink.write(samples.table(3, "a", "bn"))


def test_a_record_that_grows_is_followed(tmp_path):
    client = client_of(plugin_of(tmp_path))
    assert client.get(f"{BASE}/runs").json["runs"] == []
    sink = record(tmp_path / "x", 1)
    (run,) = client.get(f"{BASE}/runs").json["runs"]
    sink.write(samples.table(2, "a", "bn"))
    assert client.get(f"{BASE}/runs").json["runs"][0]["version"] != run["version"]
    assert client.get(f"{BASE}/series?run=x&layer=bn").json["steps"] == [1, 2]
    record(tmp_path / "y", 1)
    assert [one["run"] for one in client.get(f"{BASE}/runs").json["runs"]] == ["x", "y"]


def test_the_log_directory_is_not_looked_at_all_the_time(tmp_path, monkeypatch):
    record(tmp_path / "x", 1)
    plugin = plugin_of(tmp_path)
    plugin.rest = 1e9
    client, looks = client_of(plugin), []
    refresh = RunViews.refresh
    monkeypatch.setattr(RunViews, "refresh", lambda self: looks.append(1) or refresh(self))
    for _ in range(5):
        assert len(client.get(f"{BASE}/runs").json["runs"]) == 1
    assert len(looks) == 1


def test_hostile_names_come_through(tmp_path):
    names = (samples.HOSTILE, "<script>alert(1)</script>")
    record(tmp_path / "<b>", 1, paths=names)
    client = client_of(plugin_of(tmp_path))
    layers = client.get(f"{BASE}/run", query_string={"run": "<b>"}).json["layers"]
    assert [layer["layer"] for layer in layers] == list(names)
    asked = {"run": "<b>", "layer": samples.HOSTILE.replace("\ud800", "\ufffd")}
    assert client.get(f"{BASE}/series", query_string=asked).json["layer"] == samples.HOSTILE


def test_an_internal_error_is_no_exception_of_tensorboard(client, monkeypatch, caplog):
    monkeypatch.setattr(RunViews, "answer", lambda *_: 1 / 0)
    with caplog.at_level(logging.ERROR, "bnwatch"):
        response = client.get(f"{BASE}/runs")
    assert response.status_code == 500
    assert response.json == {"error": "bnwatch failed to answer; the log of TensorBoard says why"}
    assert "ZeroDivisionError" in caplog.text


def test_a_log_directory_elsewhere_is_one_clear_state():
    plugin = plugin_of("gs://bucket/runs")
    client = client_of(plugin)
    assert not plugin.is_active()
    hint = client.get(f"{BASE}/runs").json["hint"]
    assert "gs://bucket/runs" in hint
    assert "copy the record" in hint
    assert client.get(f"{BASE}/run?run=x").json["error"] == hint
    assert client.get(f"{BASE}/rule?rule=BN101").status_code == 200
    assert "--logdir DIR" in client_of(plugin_of()).get(f"{BASE}/runs").json["hint"]


def test_several_log_directories_have_their_names(tmp_path):
    for name in "abc":
        record(tmp_path / name / "r", 1)
    spec = f"one:{tmp_path / 'a'},{tmp_path / 'b'},{tmp_path / 'c'}"
    client = client_of(plugin_of("", spec))
    names = [run["run"] for run in client.get(f"{BASE}/runs").json["runs"]]
    assert names == ["one/r", "r", "r/bnwatch"]


@pytest.mark.parametrize(
    ("spec", "found"),
    [
        ("a:/x,b:/y", [("a", "/x"), ("b", "/y")]),
        ("/x:y", [("", "/x:y")]),
        ("gs://b/c,z:gs://b/d", [("", "gs://b/c"), ("z", "gs://b/d")]),
        ("x,,y/z", [("", "x"), ("", "y/z")]),
    ],
)
def test_a_specification_is_read_as_tensorboard_reads_it(spec, found):
    assert module._parse_spec(spec) == found


def test_it_answers_several_threads(tmp_path):
    sink = record(tmp_path / "x", 1)
    client, failed = client_of(plugin_of(tmp_path)), []

    def ask():
        for asked in ("runs", "run?run=x", "layers?run=x", "series?run=x&layer=bn", "heatmap?run=x&statistic=matters"):
            response = client_get(client, asked)
            if response.status_code != 200:
                failed.append(response.json)

    threads = [threading.Thread(target=ask) for _ in range(6)]
    for thread in threads:
        thread.start()
    for step in range(2, 20):
        sink.write(samples.table(step, "a", "bn"))
    for thread in threads:
        thread.join()
    assert failed == []


def client_get(client, asked):
    return Client(client.application).get(f"{BASE}/{asked}")


def test_the_page_is_served_where_it_is_installed(client):
    response = client.get(f"{BASE}/index.js")
    if (ROOT / "bnwatch" / "dashboard" / "static" / "index.js").exists():
        assert response.status_code == 200
        assert response.content_type == "text/javascript; charset=utf-8"
        assert b"render" in response.data
    else:
        assert response.status_code == 404
        assert "not part of this installation" in response.json["error"]


def test_the_entry_point_loads_and_a_broken_plugin_stops_nothing(monkeypatch, caplog):
    options = ConfigParser()
    options.read(ROOT / "setup.cfg", encoding="utf-8")
    (line,) = options["options.entry_points"]["tensorboard_plugins"].split("\n")[1:]
    where, _, name = line.partition("=")[2].strip().partition(":")
    loader = getattr(import_module(where), name)()
    assert isinstance(loader, BNWatchLoader)
    context = base_plugin.TBContext(flags=Namespace(logdir="", logdir_spec=""))
    assert isinstance(loader.load(context), BNWatchPlugin)
    monkeypatch.setattr(module, "BNWatchPlugin", None)
    with caplog.at_level(logging.WARNING, "bnwatch"):
        assert loader.load(context) is None
    assert "could not be loaded" in caplog.text
