"""The answers against `read_runs` and NumPy on the same record."""

from __future__ import annotations

import json
import math
import os
import threading
from pathlib import Path

import numpy as np
import pytest

from bnwatch import render
from bnwatch.diagnosis import Report, Severity
from bnwatch.engine import ordered
from bnwatch.records import CallSite
from bnwatch.signals import STATISTICS, SignalTable
from bnwatch.sinks.tensorboard import TensorBoardSink, read_runs
from bnwatch.views import MisuseError, RunView, RunViews, UnknownError
from bnwatch.views import heat as heat_module
from bnwatch.views import run as run_module
from bnwatch.views.concern import Concern
from bnwatch.views.heat import Heat
from bnwatch.views.statistics import CHOICES
from tests import samples

PATHS = ("encoder/bn_1", "encoder/bn_2", "bn")


def record(directory, *steps, paths=PATHS, sites=1):
    sink = TensorBoardSink(directory)
    sink.write(samples.attachment(*paths))
    for step in steps:
        sink.write(samples.table(step, *paths, sites=sites))
    return sink


def full(directory):
    """Write a run that has something for every answer."""
    sink = record(directory, *range(1, 101), sites=2)
    for item in (samples.evaluation(100), samples.look(100), samples.cells(100), samples.attribution(100)):
        sink.write(item)
    sink.write(samples.diagnosis())
    sink.write(samples.diagnosis("model", "BN301", severity=Severity.ERROR, step=90, causes=("BN101 encoder/bn_2",)))
    sink.write(samples.diagnosis("bn", state="allowed", reason="so it is"))
    return sink


def views_of(directory):
    views = RunViews(directory)
    views.refresh()
    return views


def jsonable(answer):
    assert answer["schema"] == 1
    return json.loads(render.dumps(answer))


def close(mine, theirs):
    """Compare an answer's numbers with an array."""
    for one, other in zip(mine, np.asarray(theirs, np.float64).tolist(), strict=True):
        if math.isfinite(other):
            assert one == pytest.approx(other, rel=1e-4)
        else:
            assert one in (None, render.json_number(other))


def test_the_overview_is_what_the_record_holds(tmp_path):
    full(tmp_path / "a")
    (run,) = read_runs(tmp_path)
    views = views_of(tmp_path)
    assert views.names() == ["a"]
    answer = jsonable(views["a"].overview())
    report = run.report
    diagnoses = ordered(report.diagnoses)
    assert [d["subject"] for d in answer["report"]["diagnoses"]] == [d.subject for d in diagnoses]
    assert answer["report"]["samples"] == 100
    assert answer["chance"] == pytest.approx(0.1)
    assert answer["evaluations"][0]["gap"] == pytest.approx(0.5)
    cell = run.cells[-1].evaluation["running"]
    assert answer["cells"][-1]["rows"]["evaluation"]["running"]["interval"] == pytest.approx(list(cell.interval))
    assert answer["attribution"]["cost"]["gained"] == 0.12
    assert answer["samples"] == {"count": 100, "first": 1, "last": 100}
    assert [layer["layer"] for layer in answer["layers"]] == list(PATHS)
    assert [layer["diagnoses"] for layer in answer["layers"]] == [[], ["BN101 encoder/bn_2"], []]
    assert [layer["idle"] for layer in answer["layers"]] == [False, False, True]
    assert [layer["sites"] for layer in answer["layers"]] == [2, 2, 2]
    assert answer["layers"][0]["spec"]["decay"] == 0.9
    assert answer["progress"]["steps"] == list(range(1, 101))
    assert set(answer["progress"]["accuracy"]) == {0.5}
    assert [one["name"] for one in answer["statistics"]] == list(CHOICES)
    (brief,) = jsonable(views.runs())["runs"]
    assert brief["severity"] == "error"
    assert brief["headline"] == next(d.message for d in diagnoses if d.state == "active")
    assert (brief["samples"], brief["layers"], brief["sites"], brief["epochs"]) == (100, 3, 6, 2)
    assert brief["version"] == answer["version"]
    assert not brief["complete"]


@pytest.mark.parametrize(("asked", "step"), [(None, 99), (50, 51), (49, 49), (0, 1), (10**30, 99), (98, 99)])
def test_the_layers_are_those_of_the_nearest_sample(tmp_path, asked, step):
    record(tmp_path, *range(1, 100, 2), sites=2)
    (run,) = read_runs(tmp_path)
    table = next(table for table in run.tables if table.step == step)
    answer = jsonable(views_of(tmp_path)["."].layers(asked))
    assert (answer["step"], answer["epoch"]) == (step, table.epoch)
    assert answer["steps"] == list(range(1, 100, 2))
    assert [(row["layer"], row["index"], row["replica"]) for row in answer["rows"]] == [
        (site.layer, site.index, site.replica) for site in table.sites
    ]
    worst = Concern(table.sites, run.specs).worst(table.values, table.shared)
    close([row["matters"] for row in answer["rows"]], worst.matters)
    for place, name in enumerate(answer["statistics"]):
        column = worst.matters if name == "matters" else table.column(name)
        close([row["values"][place] for row in answer["rows"]], column)
    assert all(row["values"][answer["statistics"].index("updates")] is None for row in answer["rows"])


def test_a_line_is_that_of_one_layer(tmp_path):
    full(tmp_path)
    (run,) = read_runs(tmp_path)
    answer = jsonable(views_of(tmp_path)["."].series("bn"))
    assert answer["steps"] == [table.step for table in run.tables]
    assert answer["samples"] == 100
    assert answer["evaluations"] == [100]
    assert [(site["index"], site["replica"]) for site in answer["sites"]] == [(0, 0), (1, 0)]
    for site in answer["sites"]:
        row = run.tables[0].sites.index(CallSite("bn", site["index"]))
        for name in ("batch_mean", "running_mean", "batch_std", "running_std", "mean_shift", "std_ratio", "updates"):
            close(site[name], [table.column(name)[row] for table in run.tables])
        effective = np.array([table.column("effective_samples")[row] for table in run.tables], np.float64)
        close(site["mean_noise"], 3.8906 * np.sqrt(2 / (1.9 * effective)))


def test_a_layer_that_is_not_called_all_the_time_has_gaps(tmp_path):
    sink = record(tmp_path, 1, 2)
    sink.write(samples.table(3, "bn", "other"))
    sink.write(samples.table(4, *PATHS, "other"))
    answer = jsonable(views_of(tmp_path)["."].series("encoder/bn_1"))
    (site,) = answer["sites"]
    assert answer["steps"] == [1, 2, 3, 4]
    assert [value is None for value in site["mean_shift"]] == [False, False, True, False]
    overview = views_of(tmp_path)["."].overview()
    assert [layer["layer"] for layer in overview["layers"]] == [*PATHS, "other"]
    heat = jsonable(views_of(tmp_path)["."].heatmap("mean_shift"))
    assert heat["layers"] == [*PATHS, "other"]
    assert [[value is None for value in row] for row in heat["values"]] == [
        [False, False, True, False],
        [False, False, True, False],
        [False] * 4,
        [True, True, False, False],
    ]


def test_long_lines_keep_what_stands_out(tmp_path):
    sink = record(tmp_path)
    sites = (CallSite("bn"),)
    rng = np.random.default_rng(1)
    for step in range(1, 401):
        values = rng.lognormal(0.0, 0.01, (1, len(STATISTICS))).astype(np.float32)
        if step == 123:
            values[0, STATISTICS.index("mean_shift")] = 5.0
        if step == 321:
            values[0, STATISTICS.index("std_ratio")] = 0.01
        if step == 222:
            values[0, STATISTICS.index("batch_mean")] = values[0, STATISTICS.index("mean_shift")] = np.nan
        sink.write(SignalTable(step, 0, sites, values))
    answer = jsonable(views_of(tmp_path)["."].series("bn", points=50))
    assert len(answer["steps"]) <= 50
    assert {1, 123, 222, 321, 400} <= set(answer["steps"])
    at = answer["steps"].index(222)
    assert answer["sites"][0]["batch_mean"][at] == "NaN"
    assert answer["samples"] == 400


@pytest.mark.parametrize("statistic", ["mean_shift", "std_ratio", "matters", "count"])
def test_a_heatmap_holds_the_value_farthest_from_healthy(tmp_path, monkeypatch, statistic):
    sink = record(tmp_path, *range(1, 60))
    monkeypatch.setattr(heat_module, "COLUMNS", 8)
    views = views_of(tmp_path)
    views["."].heatmap(statistic)
    for step in range(60, 151):
        sink.write(samples.table(step, *PATHS))
    views.refresh()
    answer = jsonable(views["."].heatmap(statistic))
    fresh = jsonable(views_of(tmp_path)["."].heatmap(statistic))
    assert answer == fresh
    (run,) = read_runs(tmp_path)
    # 150 samples fit into 8 columns of 32 each
    assert answer["steps"] == [1, 33, 65, 97, 129]
    assert answer["complete"] == 1.0
    assert answer["low"] < answer["high"]
    columns = {
        "mean_shift": lambda table: (table.column("mean_shift"), np.abs(table.column("mean_shift"))),
        "std_ratio": lambda table: (table.column("std_ratio"), np.abs(np.log(table.column("std_ratio")))),
        "count": lambda table: (table.column("count"), -table.column("count")),
        "matters": lambda table: (Concern(table.sites, run.specs).worst(table.values).matters,) * 2,
    }
    for number in range(5):
        part = [columns[statistic](table) for table in run.tables[32 * number : 32 * number + 32]]
        for row in range(3):
            expected = max(part, key=lambda pair, row=row: pair[1][row])[0][row]
            assert answer["values"][row][number] == pytest.approx(float(expected), rel=1e-3)


def test_a_heatmap_comes_in_slices_and_begins_anew_when_samples_are_forgotten(tmp_path, monkeypatch):
    record(tmp_path, *range(1, 30))
    monkeypatch.setattr(run_module, "_SLICE", -1.0)
    views = views_of(tmp_path)
    shares = [views["."].heatmap("mean_shift")["complete"] for _ in range(29)]
    assert shares == sorted(set(shares))
    assert shares[-1] == 1.0
    record(tmp_path, 5, 6)
    views.refresh()
    monkeypatch.setattr(run_module, "_SLICE", 9.0)
    answer = views["."].heatmap("mean_shift")
    assert answer["steps"] == [1, 2, 3, 4, 5, 6]


def test_a_deep_network_gets_fewer_columns():
    sites = [CallSite(f"bn{n}") for n in range(50_000)]
    assert Heat("mean_shift", sites)._columns * len(sites) <= 2_000_000


def test_the_heatmaps_of_all_runs_are_bounded_together(tmp_path, monkeypatch):
    for name in "abc":
        record(tmp_path / name, 1, 2)
    views = views_of(tmp_path)
    size = Heat("matters", views["a"]._now.sites).nbytes
    monkeypatch.setattr(heat_module, "_MEMORY", 2 * size)
    for name in "abcab":
        views[name].heatmap("matters")
    assert [run.parent.name for run, _ in views._heats._kept] == ["a", "b"]
    monkeypatch.setattr(heat_module, "_MEMORY", 0)
    assert views["c"].heatmap("matters")["complete"] == 1.0


def test_samples_without_a_call_are_samples(tmp_path):
    sink = record(tmp_path, 1)
    sink.write(SignalTable(2, 0, (), np.zeros((0, len(STATISTICS)), np.float32), idle=("bn",)))
    view = views_of(tmp_path)["."]
    assert jsonable(view.layers())["rows"] == []
    assert view.overview()["layers"][2]["idle"]
    assert [value is None for value in view.series("bn")["sites"][0]["batch_mean"]] == [False, True]
    assert jsonable(view.heatmap("matters"))["values"][0][1] is None


def test_runs_are_found_named_and_forgotten(tmp_path):
    record(tmp_path, 1)
    record(tmp_path / "b" / "c", 1)
    views = views_of(tmp_path)
    assert views.names() == [".", "b/c"]
    other = record(tmp_path / "d", 1)
    assert views.refresh()
    assert views.names() == [".", "b/c", "d"]
    kept = views["b/c"]
    for path in other.directory.iterdir():
        path.unlink()
    assert views.refresh()
    assert views.names() == [".", "b/c"]
    assert views["b/c"] is kept
    assert not views.refresh()
    two = RunViews(("x", tmp_path / "b"), ("", tmp_path / "b"), ("", tmp_path / "b" / "c"))
    two.refresh()
    assert two.names() == sorted(["x/c", "c", "."])
    named = RunViews(("x", tmp_path))
    named.refresh()
    assert named.names() == ["x", "x/b/c"]


@pytest.mark.skipif(os.name == "nt", reason="links take a privilege on Windows")
def test_links_are_followed_once(tmp_path):
    record(tmp_path / "real" / "a", 1)
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "link").symlink_to(tmp_path / "real")
    (tmp_path / "real" / "loop").symlink_to(tmp_path / "logs")
    assert views_of(tmp_path / "logs").names() == ["link/a"]


def test_hostile_names_are_answered_as_they_are(tmp_path):
    long = "x" * 10_000
    names = (samples.HOSTILE, "__proto__", "</script>", long)
    record(tmp_path / "<b>a", 1, 2, paths=names)
    views = views_of(tmp_path)
    assert views.names() == ["<b>a"]
    answer = jsonable(views["<b>a"].overview())
    assert [layer["layer"] for layer in answer["layers"]] == list(names)
    for name in names:
        assert jsonable(views["<b>a"].series(name))["layer"] == name
    # a browser cannot send an unpaired surrogate
    asked = samples.HOSTILE.replace("\ud800", "\ufffd")
    assert views["<b>a"].series(asked)["layer"] == samples.HOSTILE


def test_what_is_not_there_is_said_in_a_sentence(tmp_path):
    record(tmp_path, 1)
    views = views_of(tmp_path)
    with pytest.raises(UnknownError, match="no run 'nix'"):
        views["nix"]
    with pytest.raises(UnknownError, match="no layer 'nix'"):
        views["."].series("nix")
    with pytest.raises(UnknownError, match="no layer"):
        views["."].channels("nix")
    with pytest.raises(UnknownError, match="no statistic 'nix': there are matters, mean_shift"):
        views["."].heatmap("nix")
    with pytest.raises(UnknownError, match="no rule 'BN000'"):
        views.answer("rule", {"rule": "BN000"})
    with pytest.raises(UnknownError, match="no route"):
        views.answer("../../etc/passwd", {})
    with pytest.raises(MisuseError, match="series needs the parameter layer"):
        views.answer("series", {"run": "."})
    for step in ("-1", "x", "1e3", "9" * 30, "٣"):
        with pytest.raises(MisuseError, match="step must be a whole number"):
            views.answer("layers", {"run": ".", "step": step})


def test_nothing_recorded_yet_says_what_to_do(tmp_path):
    answer = jsonable(views_of(tmp_path / "none").runs())
    assert answer["runs"] == []
    assert "BatchNormWatch(" in answer["hint"]


def test_a_run_without_samples_has_answers(tmp_path):
    sink = TensorBoardSink(tmp_path)
    sink.write(samples.diagnosis())
    view = views_of(tmp_path)["."]
    assert jsonable(view.overview())["samples"] == {"count": 0, "first": None, "last": None}
    assert jsonable(view.layers())["rows"] == []
    assert jsonable(view.heatmap("matters"))["values"] == []
    sink.close(Report("a"))
    view.refresh()
    assert jsonable(view.overview())["report"]["complete"]


def test_answers_survive_files_that_vanish(tmp_path):
    first = record(tmp_path, 1, 2, 3)
    (path,) = first.directory.iterdir()
    record(tmp_path, 4)
    view = views_of(tmp_path)["."]
    path.unlink()
    assert view.layers(1)["step"] == 4
    assert view.series("bn")["steps"] == [4]
    assert view.heatmap("matters")["steps"] == [4]


def test_it_answers_several_threads_while_the_record_grows(tmp_path):
    sink = record(tmp_path, 1)
    views = views_of(tmp_path)
    failed, done = [], threading.Event()

    def ask():
        while not done.is_set():
            try:
                views.refresh()
                for route, more in (("layers", {}), ("series", {"layer": "bn"}), ("heatmap", {"statistic": "matters"})):
                    answer = views.answer(route, {"run": ".", **more})
                    assert answer["steps"] == list(range(1, len(answer["steps"]) + 1))
            except Exception as error:  # noqa: BLE001
                failed.append(error)
                return

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    for step in range(2, 60):
        sink.write(samples.table(step, *PATHS))
    done.set()
    for thread in threads:
        thread.join()
    assert failed == []
    views.refresh()
    assert len(views["."].series("bn")["steps"]) == 59


def test_memory_stays_small_whatever_the_record(tmp_path):
    paths = tuple(f"layer_{n}" for n in range(400))
    sink = record(tmp_path, 1, paths=paths)
    table = samples.table(1, *paths)
    for step in range(2, 301):
        sink.write(SignalTable(step, 0, table.sites, table.values))
    size = sum(path.stat().st_size for path in sink.directory.iterdir())
    import tracemalloc

    tracemalloc.start()
    try:
        view = views_of(tmp_path)["."]
        view.series(paths[-1])
        view.heatmap("mean_shift")
        kept, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(view.series(paths[0])["steps"]) == 300
    assert size > 6e6
    # the heatmap itself, and a chunk of samples while it is folded
    assert kept < 400 * 400 * 8 + 2e6
    assert peak < 25e6


def test_every_route_is_answered(tmp_path):
    full(tmp_path / "a")
    views = views_of(tmp_path)
    for route, more in {
        "runs": {}, "run": {"run": "a"}, "layers": {"run": "a", "step": "3"}, "series": {"run": "a", "layer": "bn"},
        "heatmap": {"run": "a", "statistic": "matters"}, "channels": {"run": "a", "layer": "bn"},
        "rule": {"rule": "BN101"},
    }.items():  # fmt: skip
        assert jsonable(views.answer(route, more))
    assert views.answer("rule", {"rule": "BN101"})["markdown"].startswith("#")
    assert isinstance(views["a"], RunView)
    assert views["a"].directory == Path(tmp_path, "a", "bnwatch")


def test_single_channels_are_those_of_the_nearest_record(tmp_path):
    sink = record(tmp_path, 1, 2, 3)
    for step in (3, 8):
        sink.write(samples.channels(step))
    (run,) = read_runs(tmp_path)
    one = run.channels[0]
    epsilon = run.specs[one.layer].epsilon if one.layer in run.specs else 0.0
    view = views_of(tmp_path)["."]
    assert view.overview()["channels"] == {one.layer: [3, 8]}
    for asked, step in ((None, 8), (2, 3), (5, 3), (6, 8), (10**30, 8), (0, 3)):
        answer = jsonable(view.channels(one.layer, asked))
        expected = next(channels for channels in run.channels if channels.step == step)
        assert (answer["step"], answer["steps"], answer["of"]) == (step, [3, 8], expected.of)
        assert answer["channels"] == list(expected.channels)
        assert answer["missing"] is None
        for number, site in enumerate(answer["sites"]):
            assert (site["index"], site["replica"]) == (expected.sites[number].index, expected.sites[number].replica)
            for name in ("batch_mean", "batch_std", "running_mean", "running_std"):
                close(site[name], expected[name][number])
            variances = [expected[name][number].astype(float) ** 2 + epsilon for name in ("batch_std", "running_std")]
            with np.errstate(all="ignore"):
                shift = (expected["batch_mean"][number] - expected["running_mean"][number]) / np.sqrt(variances[1])
                close(site["mean_shift"], shift)
                close(site["std_ratio"], np.sqrt(variances[0] / variances[1]))


def test_a_layer_without_single_channels_says_why(tmp_path):
    record(tmp_path, 1)
    answer = jsonable(views_of(tmp_path)["."].channels("bn"))
    assert (answer["sites"], answer["of"]) == ([], 16)
    assert "a few layers" in answer["missing"]
