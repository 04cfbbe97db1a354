"""The record: what is written is what is read, and TensorBoard reads it too."""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import os
import resource
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tensorboard.backend.event_processing import event_accumulator
from tensorboard.compat.proto.summary_pb2 import DATA_CLASS_BLOB_SEQUENCE, DATA_CLASS_TENSOR
from tensorboard.plugins.text.text_plugin import text_array_to_html
from tensorboard.util import tensor_util

from bnwatch import Watch, render, testing
from bnwatch.channels import due
from bnwatch.diagnosis import Report, Skipped, Table
from bnwatch.records import Attachment, CallSite, EvaluationRecord
from bnwatch.signals import STATISTICS, WINDOW, SignalTable
from bnwatch.sinks.tensorboard import RecordError, TensorBoardSink, read_runs, schema, writer
from bnwatch.sinks.tensorboard.events import SUFFIX, frame, read_events
from tests import samples

PLUGINS = {
    schema.TEXT: "text",
    schema.DISTRIBUTION: "histograms",
    schema.HEATMAP: "images",
    schema.CHARTS: "custom_scalars",
}


def record(directory, steps=range(1, 41), *, close=True, sites=2):
    sink = TensorBoardSink(directory)
    sink.write(samples.attachment())
    for step in steps:
        sink.write(samples.table(step, sites=sites))
    sink.write(samples.channels(steps[-1], sites=sites))
    sink.write(samples.evaluation(steps[-1]))
    sink.write(samples.cells(steps[-1]))
    sink.write(samples.attribution(steps[-1]))
    sink.write(samples.composition(steps[-1]))
    sink.write(samples.entering(steps[-1]))
    sink.write(samples.look(steps[-1]))
    sink.write(samples.replicas(steps[-1]))
    sink.write(samples.diagnosis(step=steps[-1], last_step=steps[-1]))
    sink.write(Skipped("BN302", "the number of classes is not known"))
    if close:
        sink.close(samples.report(steps=steps[-1], samples=len(steps), evaluations=1))
    return sink


def the_run(path):
    (run,) = read_runs(path)
    assert run.problems == ()
    return run


def accumulated(directory):
    accumulator = event_accumulator.EventAccumulator(str(directory), size_guidance={"tensors": 0, "scalars": 0})
    accumulator.Reload()
    return accumulator


def same(left, right):
    return (left.step, left.epoch, left.sites, left.accuracy, left.loss, left.examples, left.idle) == (
        right.step, right.epoch, right.sites, right.accuracy, right.loss, right.examples, right.idle,
    ) and np.array_equal(left.values, right.values, equal_nan=True)  # fmt: skip


# --- what comes back ---------------------------------------------------------------------------------------------


def test_everything_comes_back(tmp_path):
    record(tmp_path / "a")
    run = the_run(tmp_path)
    assert run.directory == tmp_path / "a" / "bnwatch"
    assert run.attachment == samples.attachment()
    assert run.specs == {spec.path: spec for spec in samples.attachment().layers}
    assert len(run.tables) == 40
    for table in run.tables:
        expected = samples.table(table.step, sites=2)
        assert same(table, expected)
        for found, shared in zip(table.shared, expected.shared, strict=True):
            assert found.layer == shared.layer
            assert np.array_equal(found.values, shared.values)
    (channels,) = run.channels
    expected = samples.channels(40, sites=2)
    assert dataclasses.replace(channels, values=None) == dataclasses.replace(expected, values=None)
    assert channels.values.tobytes() == expected.values.tobytes()
    (evaluation,) = run.evaluations
    assert math.isnan(evaluation.loss)
    assert dataclasses.replace(evaluation, loss=None) == dataclasses.replace(samples.evaluation(40), loss=None)
    assert run.looks == (samples.look(40),)
    assert run.compositions == (samples.composition(40),)
    assert run.entering == (samples.entering(40),)
    (replicas,) = run.replicas
    assert (replicas.step, replicas.epoch) == (40, 0)
    for found, layer in zip(replicas.layers, samples.replicas().layers, strict=True):
        assert found.layer == layer.layer
        assert np.array_equal(found.values, layer.values, equal_nan=True)
    assert run.report == samples.report(
        run=str(tmp_path / "a"), steps=40, samples=40, evaluations=1, sites=6, diagnoses=run.report.diagnoses
    )
    assert {d.key: d for d in run.report.diagnoses} == {d.key: d for d in samples.report().diagnoses}


def test_without_its_samples_the_report_of_a_run_is_the_same(tmp_path):
    record(tmp_path, close=False)
    (run,) = read_runs(tmp_path, samples=False)
    whole = the_run(tmp_path)
    assert run == dataclasses.replace(whole, tables=(), channels=(), evaluations=run.evaluations, replicas=run.replicas)
    assert whole.tables
    assert whole.channels
    assert run.report.samples == 40


def test_the_gravest_comes_first_and_causes_before_consequences(tmp_path):
    record(tmp_path)
    assert [d.rule for d in the_run(tmp_path).report.diagnoses] == ["BN101", "BN301", "BN201", "BN101"]


def test_cells_come_back_with_their_paired_tests(tmp_path):
    record(tmp_path)
    (found,) = the_run(tmp_path).cells
    expected = samples.cells(40)
    assert (found.step, found.epoch, found.classes, found.missing) == (40, 0, 10, expected.missing)
    for row, cells in ((found.training, expected.training), (found.evaluation, expected.evaluation)):
        assert set(row) == set(cells)
        for name, cell in cells.items():
            back = row[name]
            assert (back.accuracy, back.examples, back.largest_share, back.majority, back.interval) == (
                cell.accuracy, cell.examples, cell.largest_share, cell.majority, cell.interval,
            )  # fmt: skip
            for other in set(cells) - {name}:
                assert back.gain_over(row[other]) == cell.gain_over(cells[other])


def test_replicas_of_another_version_and_numbers_out_of_range():
    data = schema.replicas_json(samples.replicas())
    data["statistics"][0] = "of another version"
    data["layers"][0]["values"][0][1] = 1e300
    found = schema.parse_replicas(data).layers[0].values
    assert np.isnan(found[0, 0])
    assert np.isinf(found[0, 1])
    assert found[1, 2] == samples.replicas().layers[0].values[1, 2]
    data["layers"][0]["values"][0] = [1.0]
    with pytest.raises(schema.SchemaError, match="values of a layer of replicas"):
        schema.parse_replicas(data)


def test_an_attribution_comes_back_as_it_was(tmp_path):
    record(tmp_path)
    assert the_run(tmp_path).attributions == (samples.attribution(40),)


def test_further_tables_come_back_and_are_nothing_in_an_older_record(tmp_path):
    table = Table(("layer", "points"), (("bn", 1.5),))
    found = samples.diagnosis(further=(table, table))
    sink = TensorBoardSink(tmp_path)
    sink.write(found)
    (back,) = the_run(tmp_path).report.diagnoses
    assert back.further == (table, table)
    old = schema.stored_diagnosis_json(found)
    del old["further"]
    assert schema.parse_diagnosis(old) == dataclasses.replace(found, further=())


def test_lines_come_back_and_are_not_known_of_an_older_record(tmp_path):
    known, found = samples.attachment("bn"), samples.diagnosis("bn", built_at=f"{samples.HOSTILE}.py:12")
    sink = TensorBoardSink(tmp_path)
    sink.write(known)
    sink.write(found)
    back = the_run(tmp_path)
    assert back.specs["bn"] == known.layers[0]
    assert back.specs["bn"].called_at == ("model.py:31", None, "model.py:31", "/else where/net.py:5")
    assert back.report.diagnoses[0].built_at == found.built_at
    old, older = schema.stored_diagnosis_json(found), schema.spec_json(known.layers[0])
    del old["built_at"], older["built_at"], older["called_at"]
    assert schema.parse_diagnosis(old) == dataclasses.replace(found, built_at=None)
    assert schema.parse_spec(older) == dataclasses.replace(known.layers[0], built_at=None, called_at=())


@pytest.mark.parametrize("lines", ["model.py:12", [12], [["model.py:12"]], {"0": "model.py:12"}, 1])
def test_lines_that_are_none_are_refused(lines):
    layer = schema.spec_json(samples.attachment("bn").layers[0])
    with pytest.raises(schema.SchemaError, match="called_at of layer"):
        schema.parse_spec({**layer, "called_at": lines})


def test_one_event_file_can_be_read_alone(tmp_path):
    sink = record(tmp_path)
    (path,) = sink.directory.iterdir()
    assert len(the_run(path).tables) == 40
    assert the_run(sink.directory).report.run == str(tmp_path)


def test_several_runs_are_found_and_other_writers_left_alone(tmp_path):
    record(tmp_path / "b")
    record(tmp_path / "a" / "x")
    (tmp_path / "a" / "events.out.tfevents.1.host.1.0.v2").write_bytes(b"not ours")
    assert [run.report.run for run in read_runs(tmp_path)] == [str(tmp_path / "a/x"), str(tmp_path / "b")]


def test_a_run_that_was_cut_off_is_read_up_to_there(tmp_path):
    record(tmp_path, close=False, steps=range(1, 31))
    sink_steps = the_run(tmp_path).report
    assert not sink_steps.complete
    assert [d.last_step for d in sink_steps.diagnoses] == [30]
    assert sink_steps.skipped == (Skipped("BN302", "the number of classes is not known"),)


def test_what_is_active_when_a_run_is_cut_off_held_until_the_last_sample(tmp_path):
    sink = TensorBoardSink(tmp_path)
    sink.write(samples.table(5))
    sink.write(samples.diagnosis("a", step=5, last_step=5))
    sink.write(samples.diagnosis("b", step=5, last_step=5))
    sink.write(samples.table(6))
    sink.write(samples.diagnosis("b", step=5, last_step=6, state="cleared"))
    sink.write(samples.table(90))
    a, b = the_run(tmp_path).report.diagnoses
    assert (a.subject, a.state, a.step, a.last_step) == ("a", "active", 5, 90)
    assert (b.subject, b.state, b.step, b.last_step) == ("b", "cleared", 5, 6)


def test_a_rule_that_looked_after_all_is_no_longer_skipped(tmp_path):
    sink = TensorBoardSink(tmp_path)
    sink.write(samples.table(1))
    sink.write(Skipped("BN101", "one sample only"))
    sink.write(samples.diagnosis(step=2, last_step=2))
    assert the_run(tmp_path).report.skipped == ()


@pytest.mark.parametrize("needs", [None, "cells", "attribution", "look", "gradients"])
def test_what_a_skipped_rule_waits_for_is_read_back(tmp_path, needs):
    sink = TensorBoardSink(tmp_path)
    sink.write(samples.table(1))
    sink.write(Skipped("BN306", "seen dead once", needs))
    assert the_run(tmp_path).report.skipped == (Skipped("BN306", "seen dead once", needs),)


def test_the_record_of_a_killed_run_tells_what_could_not_be_looked_at(tmp_path):
    def step(watch):
        watch.record("bn", batch_mean=[0.0], batch_var=[1.0], count=8, running_mean=[0.0], running_var=[1.0], decay=0.9)
        watch.step(accuracy=0.9, examples=100)

    watch = Watch(tmp_path, every=1)
    step(watch)
    before = the_run(tmp_path).report
    assert not before.complete
    assert {s.rule: s.reason for s in before.skipped} == {s.rule: s.reason for s in watch.skipped}
    assert Skipped("BN103", "no evaluation was seen") in before.skipped
    watch.evaluation(accuracy=0.9, examples=100, classes=2)
    after = the_run(tmp_path).report
    assert "BN103" not in {s.rule for s in after.skipped}
    assert {s.rule for s in after.skipped} == {s.rule for s in watch.skipped}


def test_sites_that_change_get_a_tag_of_their_own(tmp_path):
    sink = TensorBoardSink(tmp_path)
    tables = [samples.table(1, "a"), samples.table(2, "a", "b"), samples.table(3, "a", sites=2), samples.table(4, "a")]
    for table in tables:
        sink.write(table)
    assert all(map(same, the_run(tmp_path).tables, tables))
    tags = accumulated(sink.directory).Tags()["tensors"]
    assert len([tag for tag in tags if tag.startswith(schema.STATS)]) == 3


def bits(table):
    return table.values.view(np.uint32).tolist()


@given(
    st.lists(
        st.tuples(
            st.sampled_from(STATISTICS),
            st.sampled_from([0.0, -0.0, math.nan, -math.nan, math.inf, 1e-45, 3.0]),
            st.booleans(),
        ),
        max_size=20,
    )
)
def test_columns_of_nothing_but_nan_or_zero_are_not_written_and_come_back_to_the_bit(tmp_path_factory, columns):
    sink = TensorBoardSink(tmp_path_factory.mktemp("run"))
    tables = [samples.table(1)]
    for step, (name, value, one) in enumerate(columns, 2):
        table = dataclasses.replace(tables[-1], step=step, values=tables[-1].values.copy())
        table.values[: 1 if one else None, STATISTICS.index(name)] = value
        tables.append(table)
    for table in tables:
        sink.write(table)
    assert list(map(bits, the_run(sink.directory).tables)) == list(map(bits, tables))


def test_a_table_of_nothing_but_nan_and_zero_comes_back(tmp_path):
    sink = TensorBoardSink(tmp_path)
    table = samples.table(1)
    table.values[:] = np.nan
    table.values[:, 1] = 0.0
    sink.write(table)
    assert bits(the_run(tmp_path).tables[0]) == bits(table)


def test_layouts_of_a_table_are_few(tmp_path):
    sink = TensorBoardSink(tmp_path)
    for step in range(1, 200):
        table = samples.table(step)
        table.values[:, [n for n in range(len(STATISTICS)) if step >> n & 1]] = 0.0
        sink.write(table)
    tags = accumulated(sink.directory).Tags()["tensors"]
    assert len([tag for tag in tags if tag.startswith(schema.STATS)]) == 9


def test_columns_of_an_older_version_find_their_place(tmp_path, monkeypatch):
    older = ("std_ratio", "count", "retired", "mean_shift")
    monkeypatch.setattr(writer, "STATISTICS", older)
    sink = TensorBoardSink(tmp_path)
    values = np.array([[1.0, 2.0, 3.0, 4.0]], np.float32)
    monkeypatch.setattr(TensorBoardSink, "_worst", lambda *_: ())
    sink.write(SignalTable(1, 0, (CallSite("bn"),), values))
    (table,) = the_run(tmp_path).tables
    assert table.values.shape == (1, len(STATISTICS))
    assert (table.column("std_ratio"), table.column("count"), table.column("mean_shift")) == (1.0, 2.0, 4.0)
    assert math.isnan(table.column("batch_mean")[0])


# --- resuming ----------------------------------------------------------------------------------------------------


def test_a_resumed_run_forgets_what_it_does_again(tmp_path):
    sink = TensorBoardSink(tmp_path)
    for step in range(1, 621):
        sink.write(samples.table(step, seed=1))
    sink.write(samples.diagnosis("gone", step=600, last_step=600))
    sink.write(samples.diagnosis("kept", step=300, last_step=300))
    resumed = TensorBoardSink(tmp_path)
    resumed.write(samples.attachment("x"))
    for step in range(501, 511):
        resumed.write(samples.table(step, seed=2))
    run = the_run(tmp_path)
    assert [table.step for table in run.tables] == list(range(1, 511))
    assert same(run.tables[499], samples.table(500, seed=1))
    assert same(run.tables[500], samples.table(501, seed=2))
    assert run.attachment == samples.attachment("x")
    assert [d.subject for d in run.report.diagnoses] == []
    assert run.report.steps == 510


def test_a_finding_that_still_holds_after_resuming_is_as_old_as_it_is(tmp_path):
    first = TensorBoardSink(tmp_path)
    first.write(samples.table(300))
    first.write(samples.diagnosis(step=300, last_step=300))
    first.close(samples.report(diagnoses=(samples.diagnosis(step=300, last_step=400),), steps=400))
    second = TensorBoardSink(tmp_path)
    second.write(samples.table(500))
    second.write(samples.diagnosis(step=500, last_step=500, epoch=9))
    report = the_run(tmp_path).report
    assert not report.complete
    assert [(d.step, d.epoch, d.last_step) for d in report.diagnoses] == [(300, 1, 500)]


def test_a_run_begun_again_replaces_the_old_one(tmp_path):
    record(tmp_path)
    sink = TensorBoardSink(tmp_path)
    sink.write(samples.table(1))
    sink.close(Report(run="x", layers=3, sites=3, samples=1, steps=1))
    report = the_run(tmp_path).report
    assert report.diagnoses == ()
    assert (report.complete, report.samples, report.evaluations, report.steps) == (True, 1, 0, 1)


def test_steps_never_go_back(tmp_path):
    sink = TensorBoardSink(tmp_path)
    sink.write(samples.table(7))
    sink.write(samples.diagnosis(step=3, last_step=5))
    sink.close(samples.report(steps=0))
    (path,) = sink.directory.iterdir()
    assert [event.step for event in read_events(path) if event.HasField("summary")] == [7, 7, 7]


def test_a_forked_child_leaves_the_record_of_its_parent_whole(tmp_path):
    program = f"""
import os, sys
from bnwatch.sinks.tensorboard import TensorBoardSink
from tests import samples
sink = TensorBoardSink({str(tmp_path)!r})
for step in range(1, 20):
    sink.write(samples.table(step))
child = os.fork()
if not child:
    sink.write(samples.table(20, seed=5))
    os._exit(0)
status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
for step in range(20, 40):
    sink.write(samples.table(step))
sys.exit(status)
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)
    run = the_run(tmp_path)
    assert len(list(run.directory.iterdir())) == 2
    assert [table.step for table in run.tables] == sorted([*range(1, 40), 20])


# --- TensorBoard's own reader -------------------------------------------------------------------------------------


def test_tensorboard_reads_every_tag(tmp_path):
    sink = record(tmp_path)
    accumulator = accumulated(sink.directory)
    (path,) = sink.directory.iterdir()
    mine: dict[str, list[tuple[int, object]]] = {}
    for event in read_events(path):
        for value in event.summary.value:
            mine.setdefault(value.tag, []).append((event.step, value))
    tags = accumulator.Tags()
    assert set(tags["tensors"]) | set(tags["scalars"]) == set(mine)
    for tag in tags["scalars"]:
        theirs = [(event.step, event.value) for event in accumulator.Scalars(tag)]
        assert theirs == [(step, value.simple_value) for step, value in mine[tag]]
    for tag in tags["tensors"]:
        metadata = accumulator.SummaryMetadata(tag)
        plugin = next((name for start, name in PLUGINS.items() if tag.startswith(start)), "bnwatch")
        assert metadata.plugin_data.plugin_name == plugin
        assert metadata.data_class == (DATA_CLASS_BLOB_SEQUENCE if plugin == "images" else DATA_CLASS_TENSOR)
        for event, (step, value) in zip(accumulator.Tensors(tag), mine[tag], strict=True):
            assert event.step == step
            assert event.tensor_proto == value.tensor
            assert tensor_util.make_ndarray(event.tensor_proto).size > 0
    stats = next(tag for tag in tags["tensors"] if tag.startswith(schema.STATS))
    content = json.loads(accumulator.SummaryMetadata(stats).plugin_data.content)
    assert content["statistics"] == [name for name in STATISTICS if name != "updates"]  # not known to any sample
    columns = [STATISTICS.index(name) for name in content["statistics"]]
    assert content["zeros"] == []
    assert content["sites"][1] == ["encoder/bn_1", 1, 0]
    assert [layer["path"] for layer in content["layers"]] == ["encoder/bn_1", "encoder/bn_2", "bn"]
    values = [tensor_util.make_ndarray(event.tensor_proto) for event in accumulator.Tensors(stats)]
    assert all(
        np.array_equal(v, t.values[:, columns], equal_nan=True)
        for v, t in zip(values, the_run(path).tables, strict=True)
    )


def test_no_tag_holds_two_values_of_one_step(tmp_path):
    sink = TensorBoardSink(tmp_path)
    sink.write(samples.table(1))
    for n in range(30):
        sink.write(samples.diagnosis(f"layer_{n}", step=1, last_step=1))
    sink.close(samples.report(steps=1))
    (path,) = sink.directory.iterdir()
    tags = [value.tag for event in read_events(path) for value in event.summary.value]
    texts = [tag for tag in tags if tag.startswith(schema.TEXT)]
    rest = [tag for tag in tags if not tag.startswith(schema.TEXT)]
    assert len(set(rest)) == len(rest)
    # a text replaces the one before with more; past ten it says where the rest is
    assert texts.count(schema.TEXT + "BN101") == 11
    assert (
        b"bnwatch report" in accumulated(sink.directory).Tensors(schema.TEXT + "BN101")[-1].tensor_proto.string_val[0]
    )


def test_scalars_are_few_and_stay_the_same(tmp_path):
    sink = TensorBoardSink(tmp_path)
    paths = [f"block_{n}/bn" for n in range(200)]
    sink.write(samples.attachment(*paths))
    for step in range(1, 3 * WINDOW):
        sink.write(samples.table(step, *paths))
    sink.write(samples.evaluation(100))
    sink.write(samples.cells(100))
    accumulator = accumulated(sink.directory)
    scalars = accumulator.Tags()["scalars"]
    assert len(scalars) == 16
    assert {"bnwatch/accuracy/train", "bnwatch/accuracy/evaluation", "bnwatch/accuracy/gap"} <= set(scalars)
    assert {"bnwatch/cells/training/batch", "bnwatch/worst/mean_shift", "bnwatch/worst/log_std_ratio"} <= set(scalars)
    assert len([tag for tag in scalars if tag.startswith("bnwatch/layer/")]) == 6
    assert all(len(accumulator.Scalars(t)) == 2 * WINDOW for t in scalars if t.startswith("bnwatch/layer/"))


def test_a_broken_layer_does_not_break_the_scalars(tmp_path):
    sink = TensorBoardSink(tmp_path)
    table = samples.table(1)
    table.values[0] = np.nan
    table.values[1] = np.inf
    table.values[2, STATISTICS.index("mean_shift")] = 0.25
    sink.write(table)
    sink.write(SignalTable(2, 0, (), np.zeros((0, len(STATISTICS)), np.float32)))
    (event,) = accumulated(sink.directory).Scalars("bnwatch/worst/mean_shift")
    assert event.value == 0.25
    assert len(the_run(tmp_path).tables) == 2


# --- hostile input -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [samples.HOSTILE, "x" * 10_000, "", "../../../etc/passwd", "a//b", "läyer"])
def test_any_layer_name_is_recorded_and_read(tmp_path, name):
    sink = TensorBoardSink(tmp_path)
    sink.write(samples.attachment(name))
    sink.write(samples.table(1, name, sites=2))
    sink.write(samples.diagnosis(name, step=1, last_step=1))
    (path,) = sink.directory.iterdir()
    assert path.parent.parent == tmp_path
    run = the_run(tmp_path)
    assert run.tables[0].sites == (CallSite(name, 0), CallSite(name, 1))
    assert run.report.diagnoses[0].subject == name
    for tag in accumulated(sink.directory).Tags()["tensors"]:
        assert len(tag) < 200
        assert tag.isascii()
        assert tag.isprintable()
        assert not set(tag) & set("\"'<>`\\?*[]| ")
        assert ".." not in tag


def test_names_that_differ_only_in_what_tags_lack_stay_apart():
    names = ["a b", "a-b", "a:b", "a/b", "a", "a/", "ä", "ö", "x" * 300, "x" * 301]
    assert len({writer.safe_path(name) for name in names}) == len(names)


def test_tensorboards_text_shows_hostile_names_as_text(tmp_path):
    sink = TensorBoardSink(tmp_path)
    sink.write(samples.diagnosis(samples.HOSTILE, message=f"{samples.HOSTILE} and `{samples.HOSTILE}`"))
    sink.close(samples.report(diagnoses=(samples.diagnosis(samples.HOSTILE),), run=samples.HOSTILE))
    accumulator = accumulated(sink.directory)
    texts = [tag for tag in accumulator.Tags()["tensors"] if tag.startswith(schema.TEXT)]
    assert len(texts) == 2
    for tag in texts:
        text = tensor_util.make_ndarray(accumulator.Tensors(tag)[0].tensor_proto)
        for markdown in (True, False):
            html = text_array_to_html(text, markdown)
            assert "<img" not in html
            assert "&lt;img" in html
            assert "\x1b" not in html
            assert "\u202e" not in html


def hostile_events():
    junk = [None, [], {}, "x", -1, 1e400, 10**30, True, {"schema": 99}, {"schema": 1}, {"schema": "1"}]
    good = {
        schema.ATTACHMENT: schema.attachment_json(samples.attachment()),
        schema.EVALUATION: schema.evaluation_json(samples.evaluation()),
        schema.CELLS: schema.cells_json(samples.cells()),
        schema.ATTRIBUTION: schema.attribution_json(samples.attribution()),
        schema.COMPOSITION: schema.composition_json(samples.composition()),
        schema.ENTERING: schema.entering_json(samples.entering()),
        schema.LOOK: schema.look_json(samples.look()),
        schema.REPLICAS: schema.replicas_json(samples.replicas()),
        schema.DIAGNOSIS + "BN101/x": schema.stored_diagnosis_json(samples.diagnosis()),
        schema.SKIPPED + "BN101": schema.skipped_json(Skipped("BN101", "why")),
        schema.REPORT: render.report_json(samples.report()),
    }
    for tag, data in good.items():
        for bad in junk:
            yield tag, bad
        for name in data:
            for bad in junk:
                yield tag, {**data, name: bad}


def test_json_of_wrong_types_is_refused_not_raised(tmp_path):
    sink = TensorBoardSink(tmp_path)
    sink.write(samples.table(1))
    for tag, data in hostile_events():
        value = sink._json(tag, {})
        value.tensor.string_val[0] = json.dumps(data).encode()
        sink._file.write(writer.Event(step=1, summary=writer.Summary(value=[value])))
    for text in (b"", b"{", b"\xff", b"[" * 100_000, b"9" * 10_000):
        value = sink._json(schema.REPORT, {})
        value.tensor.string_val[0] = text
        sink._file.write(writer.Event(step=1, summary=writer.Summary(value=[value])))
    sink.write(samples.table(2))
    (run,) = read_runs(tmp_path)
    assert len(run.tables) == 2
    assert "events that cannot be understood" in run.problems[0]
    assert run.problems[0].isprintable()


@settings(deadline=None)
@given(
    st.recursive(
        st.none() | st.booleans() | st.floats() | st.integers() | st.text(),
        lambda c: st.lists(c) | st.dictionaries(st.text(), c),
    )
)
def test_any_json_is_parsed_or_refused(data):
    for parse in (
        schema.parse_report,
        schema.parse_attachment,
        schema.parse_diagnosis,
        schema.parse_cells,
        schema.parse_attribution,
        schema.parse_composition,
        schema.parse_entering,
        schema.parse_replicas,
        schema.parse_idle,
    ):
        with pytest.raises(schema.SchemaError):
            parse(data)


@pytest.fixture(scope="module")
def payloads(tmp_path_factory):
    sink = record(tmp_path_factory.mktemp("whole"), range(1, 4))
    (path,) = sink.directory.iterdir()
    return [event.SerializeToString() for event in read_events(path)]


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=200)
@given(data=st.data())
def test_a_record_with_any_bytes_changed_is_read_or_refused(payloads, tmp_path, data):
    payloads = list(payloads)
    for _ in range(data.draw(st.integers(1, 3))):
        number = data.draw(st.integers(0, len(payloads) - 1))
        changed = bytearray(payloads[number])
        if changed:
            changed[data.draw(st.integers(0, len(changed) - 1))] = data.draw(st.integers(0, 255))
        payloads[number] = bytes(changed)
    path = tmp_path / f"events.out.tfevents.1{SUFFIX}"
    path.write_bytes(b"".join(map(frame, payloads)))
    try:
        runs = read_runs(tmp_path)
    except RecordError as error:
        shown = str(error)
    else:
        shown = "".join(problem for run in runs for problem in run.problems)
        shown += "".join(render.report_text(run.report) for run in runs).replace("\n", "")
        render.dumps([render.report_json(run.report) for run in runs])
    assert shown.isprintable()


def described(sink, tag, content, shape, data=b""):
    tensor = writer.TensorProto(dtype=writer.DT_FLOAT, tensor_content=data, tensor_shape=writer._shape(shape))
    value = sink._value(tag, tensor, schema.PLUGIN, json.dumps(content).encode())
    sink._file.write(writer.Event(step=1, summary=writer.Summary(value=[value])))


@pytest.mark.parametrize("rows", [1 << 40, 0, 2])
def test_no_columns_are_no_claim_on_memory(tmp_path, rows):
    sink = TensorBoardSink(tmp_path)
    sink.write(samples.table(1))
    nothing = {"schema": 1, "statistics": [], "zeros": ["count"]}
    described(sink, schema.STATS + "x", {**nothing, "sites": [["bn", 0, 0]], "layers": []}, (rows, 0))
    (run,) = read_runs(tmp_path)
    assert [table.step for table in run.tables] == [1]
    assert "1 event that cannot be understood: a table is not of the shape" in run.problems[0]
    described(sink, schema.SITES + "x", {**nothing, "layer": "bn"}, (rows, 0))
    assert ("2 events" in read_runs(tmp_path)[0].problems[0]) == (rows > 0)


@pytest.mark.parametrize(
    "changes",
    [
        {"sites": [["bn", 0, 0]]},
        {"sites": "bn"},
        {"channels": [0]},
        {"channels": [2, 0]},
        {"channels": [2, 2]},
        {"channels": [-1, 2]},
        {"channels": [0, "2"]},
        {"of": 2},
        {"of": None},
        {"statistics": ["batch_mean"]},
        {"layer": 3},
        {"schema": 99},
    ],
)
def test_channels_that_are_not_what_they_say_are_refused(tmp_path, changes):
    sink = TensorBoardSink(tmp_path)
    sink.write(samples.table(1))
    found = samples.channels(1, of=3)
    described(sink, schema.CHANNELS + "x", schema.channels_json(found), found.values.shape, found.values.tobytes())
    assert len(the_run(tmp_path).channels) == 1
    content = {**schema.channels_json(found), **changes}
    described(sink, schema.CHANNELS + "y", content, found.values.shape, found.values.tobytes())
    (run,) = read_runs(tmp_path)
    assert len(run.channels) == 1
    assert "1 event that cannot be understood" in run.problems[0]


@pytest.mark.parametrize("damage", ["shape", "negative", "dtype", "content", "metadata", "progress"])
def test_tables_that_are_not_what_they_say_are_refused(tmp_path, damage):
    sink = TensorBoardSink(tmp_path)
    sink.write(samples.table(1))
    values = list(
        sink._values(samples.table(2, "another" if damage == "metadata" else "encoder/bn_1", "encoder/bn_2", "bn"))
    )
    tensor = values[0].tensor
    if damage == "shape":
        tensor.tensor_shape.dim[0].size = 1 << 40
    elif damage == "negative":
        tensor.tensor_shape.dim[0].size = tensor.tensor_shape.dim[1].size = -1
    elif damage == "dtype":
        tensor.dtype = 7
    elif damage == "content":
        tensor.tensor_content = tensor.tensor_content[:-4]
    elif damage == "metadata":
        values[0].ClearField("metadata")
    else:
        values[1].tensor.tensor_content = np.array([-1.0, 0, 0, 0]).tobytes()
    sink._file.write(writer.Event(step=2, summary=writer.Summary(value=values)))
    sink.write(samples.table(3))
    (run,) = read_runs(tmp_path)
    assert [table.step for table in run.tables] == [1, 3]
    assert "1 event that cannot be understood" in run.problems[0]


# --- errors ------------------------------------------------------------------------------------------------------


def test_no_directory_no_record_no_event(tmp_path):
    with pytest.raises(RecordError, match=r"^no such file or directory: '.*nowhere'$"):
        read_runs(tmp_path / "nowhere")
    with pytest.raises(RecordError, match=r"^no bnwatch record in '.*' or below$"):
        read_runs(tmp_path)
    TensorBoardSink(tmp_path)
    with pytest.raises(RecordError, match=r"^the record in '.*' holds no event of bnwatch$"):
        read_runs(tmp_path)


def test_a_file_of_something_else(tmp_path):
    path = tmp_path / "notes.txt"
    path.write_text("these are no events at all, just text")
    with pytest.raises(RecordError, match="is damaged: not an event at byte 0 of 37; is it an event file"):
        read_runs(path)
    path.write_text("")
    with pytest.raises(RecordError, match="holds no event of bnwatch"):
        read_runs(path)


def test_a_file_that_may_not_be_read(tmp_path, monkeypatch):
    def refused(*_):
        raise PermissionError(13, "Permission denied")

    record(tmp_path)
    monkeypatch.setattr("bnwatch.sinks.tensorboard.file.find_payloads", refused)
    with pytest.raises(RecordError, match=r"^'.*' cannot be read: Permission denied$"):
        read_runs(tmp_path)


def test_a_damaged_file_loses_what_lies_behind_and_says_so(tmp_path):
    sink = record(tmp_path)
    (path,) = sink.directory.iterdir()
    data = bytearray(path.read_bytes())
    data[len(data) // 3] ^= 0xFF
    path.write_bytes(data)
    (run,) = read_runs(tmp_path)
    assert 0 < len(run.tables) < 40
    assert not run.report.complete
    assert len(run.problems) == 1
    assert "what lies behind is lost" in run.problems[0]


def test_damaged_numbers_of_a_sample_are_no_matter_of_a_report_that_does_not_read_them(tmp_path):
    sink = record(tmp_path)
    (path,) = sink.directory.iterdir()
    data = path.read_bytes()
    numbers = samples.table(30, sites=2).values[0, 3:9].tobytes()
    assert data.count(numbers) == 1
    path.write_bytes(data.replace(numbers, numbers[::-1]))
    (run,) = read_runs(tmp_path, samples=False)
    assert run.problems == ()
    assert run.report.complete
    assert run.report.samples == 40
    (run,) = read_runs(tmp_path)
    assert "checksum fails" in run.problems[0]
    assert len(run.tables) == 29


def test_a_directory_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OSError, match=r"^cannot write the record to '.*file/bnwatch': Not a directory$"):
        TensorBoardSink(tmp_path / "file")
    with pytest.raises(OSError, match=r"^cannot write the record to '.*': .*embedded null"):
        TensorBoardSink(f"{tmp_path}/\0")


def test_a_directory_that_may_not_be_written(tmp_path, monkeypatch):
    def refused(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "open", refused)
    with pytest.raises(PermissionError, match=r"^cannot write the record to '.*': Permission denied$"):
        TensorBoardSink(tmp_path / "run")


def test_a_full_disk_never_raises_and_the_rest_is_read(tmp_path, caplog):
    sink = TensorBoardSink(tmp_path)
    (path,) = sink.directory.iterdir()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    with caplog.at_level(logging.WARNING, "bnwatch"):
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 200, hard))
            sink.write(samples.table(1))
            sink.write(samples.diagnosis(step=1, last_step=1))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert sink.lost == 2
    assert len(caplog.records) == 1
    sink.write(samples.table(2))
    sink.close(samples.report(steps=2))
    run = the_run(tmp_path)
    # the description of the table was lost with the first sample and is written again with the second
    assert [table.step for table in run.tables] == [2]
    assert len(run.report.diagnoses) == 4


def test_closing_twice_and_writing_after_it_do_nothing(tmp_path):
    sink = record(tmp_path)
    (path,) = sink.directory.iterdir()
    size = path.stat().st_size
    sink.write(samples.table(50))
    sink.close(samples.report())
    assert [p.stat().st_size for p in sink.directory.iterdir()] == [size]


# --- budgets -----------------------------------------------------------------------------------------------------


def test_a_long_record_of_a_deep_network_is_under_25_megabytes(tmp_path):
    """Of a healthy training with 512 channels, through a watch: a part of it, of which the rest is known."""
    layers, of = 200, 512
    specs = [testing.layer(f"stage{n % 4}/block_{n}/batch_normalization", of, decay=0.99) for n in range(layers)]
    watch = Watch(tmp_path, every=1, on_diagnosis="log", experiments=False)
    watch.open(Attachment(tuple(specs)))
    (path,) = (tmp_path / "bnwatch").iterdir()
    rng = np.random.default_rng(0)
    sizes = {}
    for number in range(1, 65):
        noise = rng.normal(size=(2, layers, of)).astype(np.float32) * 0.125
        calls = (
            testing.call(
                spec, mean=noise[0, n], var=1.0 + noise[1, n], running_mean=0.1 * noise[1, n],
                running_var=1.0 + 0.1 * noise[0, n], updates=1000 + 50 * number,
            )
            for n, spec in enumerate(specs)
        )  # fmt: skip
        before = path.stat().st_size
        watch.observe(testing.snapshot(50 * number, *calls, accuracy=0.5, examples=64))
        sizes[number] = path.stat().st_size - before
        if number % 16 == 0:
            watch.evaluated(EvaluationRecord(50 * number, 0, 0.5, 1.0, 10_000, 0.5, 1.0, 50_000, classes=10))
    everything = path.stat().st_size
    plain = [size for number, size in sizes.items() if number > WINDOW and not due(number)]
    assert max(plain) < 1.01 * min(plain)
    # two heatmaps and sixteen samples of channels whenever samples double
    octave = sum(size - plain[0] for number, size in sizes.items() if 32 < number <= 64)
    watch.close()
    report = path.stat().st_size - everything
    whole = everything + report + (2000 - 64) * plain[0] + 5 * octave
    assert 20e6 < whole < 25e6


def test_nothing_imports_tensorflow(tmp_path):
    program = (
        "import sys; from bnwatch.sinks.tensorboard import TensorBoardSink; TensorBoardSink(sys.argv[1]); "
        "sys.exit('tensorflow' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program, str(tmp_path)], check=True, timeout=60)
