"""The follower against `read_runs`: the same record, read at once and while it grows."""

from __future__ import annotations

import os
import re
import struct
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tensorboard.compat.proto.event_pb2 import Event

from bnwatch.diagnosis import Report
from bnwatch.sinks.tensorboard import TensorBoardSink, read_runs
from bnwatch.sinks.tensorboard.events import frame
from bnwatch.sinks.tensorboard.file import File, GoneError, _start
from bnwatch.sinks.tensorboard.follow import Follower, alike, read_rows
from tests import samples

if TYPE_CHECKING:
    from pathlib import Path

    from bnwatch.signals import SignalTable
    from bnwatch.sinks.tensorboard import RunRecord

MANY = tuple(f"layer_{n}" for n in range(90))
"""Layers of a sample that is skimmed rather than read."""


def same(follower: Follower, directory: Path) -> None:
    """Check that the follower knows what a reader finds."""
    (run,) = read_runs(directory)
    tables = [sample.table() for sample in follower.samples]
    assert [table.step for table in tables] == [table.step for table in run.tables]
    for mine, theirs in zip(tables, run.tables, strict=True):
        alike_but_for_arrays(mine, theirs)
    for sample, table in zip(follower.samples, run.tables, strict=True):
        known = sample.step, sample.epoch, sample.accuracy, sample.loss, sample.examples, sample.idle, sample.sites
        assert known == (
            table.step, table.epoch, table.accuracy, table.loss, table.examples, table.idle, table.sites,
        )  # fmt: skip
    for part in alike(follower.samples):
        rows = read_rows(follower.samples[part], 0, len(follower.samples[part][0].sites))
        for number, table in enumerate(run.tables[part]):
            np.testing.assert_array_equal(rows[number], table.values)
    assert everything_else(follower.record) == everything_else(run)


def alike_but_for_arrays(mine: SignalTable, theirs: SignalTable) -> None:
    np.testing.assert_array_equal(mine.values, theirs.values)
    assert [shared.layer for shared in mine.shared] == [shared.layer for shared in theirs.shared]
    for one, other in zip(mine.shared, theirs.shared, strict=True):
        np.testing.assert_array_equal(one.values, other.values)


def everything_else(run: RunRecord) -> str:
    # how large a damaged file was when it was looked at may differ
    problems = tuple(re.sub(r" of [\d,]+", "", problem) for problem in run.problems)
    channels = [(one.step, one.epoch, one.layer, one.sites, one.channels, one.values.tolist()) for one in run.channels]
    return repr((channels, replace(run, tables=(), channels=(), replicas=(), problems=problems)))


def written(directory: Path, *steps: int, paths: tuple[str, ...] = MANY) -> TensorBoardSink:
    sink = TensorBoardSink(directory)
    sink.write(samples.attachment(*paths))
    for step in steps:
        sink.write(samples.table(step, *paths))
    return sink


def test_a_record_is_followed_while_it_grows(tmp_path):
    sink = written(tmp_path, 1, 2)
    follower = Follower(sink.directory)
    assert follower.refresh()
    versions = {follower.version}
    for item in (samples.table(3, *MANY), samples.evaluation(3), samples.diagnosis(), samples.table(4, "a", sites=2)):
        assert not follower.refresh()
        sink.write(item)
        assert follower.refresh()
        versions.add(follower.version)
        same(follower, tmp_path)
    sink.close(Report("a", steps=4))
    assert follower.refresh()
    same(follower, tmp_path)
    assert len(versions) == 5
    assert follower.record.report.complete


def test_samples_are_skimmed_and_what_is_not_in_the_usual_form_is_read(tmp_path, monkeypatch):
    sink = written(tmp_path, *range(1, 20))
    read = []
    take = File._take
    monkeypatch.setattr(File, "_take", lambda self, file, span: read.append(span.length) or take(self, file, span))
    follower = Follower(sink.directory)
    follower.refresh()
    # the version, the start, the attachment, the first sample, which describes the table, the first like all others,
    # one with a heatmap, and the first with scalars of single layers
    assert len(read) == 7
    assert len(follower.samples) == 19
    same(follower, tmp_path)


def test_every_kind_of_sample_is_learned_once(tmp_path, monkeypatch):
    kinds = [
        {"paths": ("a",)},
        {"paths": ("a",), "accuracy": None},
        {"paths": ("a", "b"), "sites": 3},
        {"paths": MANY, "accuracy": None},
    ]
    sink = written(tmp_path, *range(1, 21), paths=("a",))
    step = 20
    for _ in range(10):
        for kind in kinds:
            step += 1
            sink.write(samples.table(step, *kind["paths"], **{k: v for k, v in kind.items() if k != "paths"}))
    table = samples.table(step + 1, "a")
    for more, idle in enumerate([(), (), ("b",), ("b",), ()]):
        sink.write(replace(table, step=step + more, idle=idle))
    read = []
    take = File._take
    monkeypatch.setattr(File, "_take", lambda self, file, span: read.append(span) or take(self, file, span))
    follower = Follower(sink.directory)
    follower.refresh()
    assert len(follower.samples) == 65
    # three that are no samples, 7 as above, and of each further kind the first, which describes it, and the second
    assert len(read) < 25
    same(follower, tmp_path)


def test_a_sample_with_its_fields_in_another_order_is_read(tmp_path):
    sink = written(tmp_path, 1, 2, 3, paths=("a",))
    (path,) = sink.directory.iterdir()
    before = path.stat().st_size
    sink.write(samples.table(4, "a"))
    payload = path.read_bytes()[before + 12 : -4]
    # the same with the step behind the summary, twice
    moved = payload[:9] + payload[11:] + payload[9:11]
    with path.open("ab") as file:
        file.write(frame(moved) * 2)
    follower = Follower(sink.directory)
    follower.refresh()
    assert [sample.step for sample in follower.samples] == [1, 2, 3, 4, 4, 4]
    same(follower, tmp_path)


@pytest.mark.parametrize("resumed_at", [1, 3, 7])
def test_what_a_resumed_run_forgets_is_forgotten(tmp_path, resumed_at):
    first = written(tmp_path, 1, 2, 3, 4, 5)
    first.write(samples.evaluation(5))
    follower = Follower(first.directory)
    follower.refresh()
    second = written(tmp_path, resumed_at, resumed_at + 1)
    assert follower.refresh()
    same(follower, tmp_path)
    assert [sample.step for sample in follower.samples][-2:] == [resumed_at, resumed_at + 1]
    # a parent that goes on writing after its child began
    first.write(samples.table(9, *MANY))
    second.write(samples.table(10, *MANY))
    assert follower.refresh()
    same(follower, tmp_path)


def test_a_run_that_takes_up_its_record_is_one_run(tmp_path):
    first = written(tmp_path, 1, 2, 3)
    mark = first.mark()
    first.write(samples.table(4, *MANY))
    first.write(samples.table(5, *MANY))
    second = TensorBoardSink(tmp_path)
    second.write(samples.attachment(*MANY))
    second.take_up(mark, 3, {spec.path: spec for spec in samples.attachment(*MANY).layers}, first.chosen)
    second.write(samples.table(4, *MANY, seed=1))
    follower = Follower(first.directory)
    follower.refresh()
    same(follower, tmp_path)
    assert [sample.step for sample in follower.samples] == [1, 2, 3, 4]


def test_a_truncated_end_is_read_when_the_rest_is_there(tmp_path):
    sink = written(tmp_path, 1, 2, 3)
    (path,) = sink.directory.iterdir()
    data = path.read_bytes()
    follower = Follower(sink.directory)
    for size in range(len(data) - 6000, len(data), 997):
        path.write_bytes(data[:size])
        follower.refresh()
        same(follower, tmp_path)
    path.write_bytes(data)
    assert follower.refresh()
    assert len(follower.samples) == 3
    same(follower, tmp_path)


def test_damage_hides_what_lies_behind_it_in_that_file_only(tmp_path):
    sink = written(tmp_path, 1, 2, paths=("a", "b"))
    (path,) = sink.directory.iterdir()
    size = path.stat().st_size
    sink.write(samples.table(3, "a", "b"))
    sink.write(samples.table(4, "a", "b"))
    data = bytearray(path.read_bytes())
    data[size + 40] ^= 1
    path.write_bytes(data)
    written(tmp_path, 9)
    follower = Follower(sink.directory)
    follower.refresh()
    same(follower, tmp_path)
    assert [sample.step for sample in follower.samples] == [1, 2, 9]
    assert "damaged" in follower.record.problems[0]
    assert not follower.refresh()


def test_a_file_that_vanishes_or_is_another_one_is_forgotten(tmp_path):
    first = written(tmp_path, 1, 2)
    written(tmp_path, 3, 4)
    follower = Follower(first.directory)
    follower.refresh()
    sample = follower.samples[0]
    one, two = sorted(first.directory.iterdir())
    one.unlink()
    with pytest.raises(GoneError):
        sample.table()
    with pytest.raises(GoneError):
        read_rows([sample], 0, 1)
    assert follower.refresh()
    same(follower, tmp_path)
    data = two.read_bytes()
    two.unlink()
    assert follower.refresh()
    assert follower.samples == ()
    two.write_bytes(data[:200])
    follower.refresh()
    assert follower.samples == ()


def test_a_file_that_became_shorter_is_read_anew(tmp_path):
    sink = written(tmp_path, 1, 2, 3)
    (path,) = sink.directory.iterdir()
    follower = Follower(sink.directory)
    follower.refresh()
    os.truncate(path, path.stat().st_size - 10)
    assert follower.refresh()
    same(follower, tmp_path)
    assert len(follower.samples) == 2


def test_no_directory_is_an_empty_record(tmp_path):
    follower = Follower(tmp_path / "none")
    assert not follower.refresh()
    assert follower.samples == ()
    assert follower.record.tables == ()


ACTIONS = st.lists(
    st.one_of(
        st.tuples(st.just("sample"), st.integers(1, 3), st.booleans()),
        st.tuples(st.just("evaluation"), st.integers(0, 2), st.booleans()),
        st.tuples(st.just("channels"), st.integers(0, 2), st.booleans()),
        st.tuples(st.just("diagnosis"), st.integers(0, 2), st.booleans()),
        st.tuples(st.just("restart"), st.integers(-6, 2), st.booleans()),
        st.tuples(st.just("report"), st.integers(0, 0), st.booleans()),
        st.tuples(st.just("rubbish"), st.integers(0, 3), st.booleans()),
    ),
    max_size=14,
)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(ACTIONS)
def test_whatever_is_written_is_followed(tmp_path_factory, actions):
    directory = tmp_path_factory.mktemp("run")
    sink, step = written(directory, 1), 1
    follower = Follower(sink.directory)
    for action, number, look in actions:
        step = max(step + number, 1)
        if action == "sample":
            sink.write(samples.table(step, *(MANY if number < 3 else ("x", samples.HOSTILE)), sites=number))
        elif action == "evaluation":
            sink.write(samples.evaluation(step))
        elif action == "channels":
            sink.write(samples.channels(step))
        elif action == "diagnosis":
            sink.write(samples.diagnosis(step=step, last_step=step))
        elif action == "report":
            sink.close(Report("a", steps=step, diagnoses=(samples.diagnosis(step=step, last_step=step),)))
            sink = TensorBoardSink(directory)
        elif action == "restart":
            sink = written(directory, step)
        else:
            newest = max(sink.directory.iterdir())
            with newest.open("ab") as file:
                file.write([b"\0", struct.pack("<QI", 9000, 1), frame(b"\x2a\x04ab"), frame(bytes(5000))][number])
        if look:
            follower.refresh()
            same(follower, directory)
    follower.refresh()
    same(follower, directory)


@settings(deadline=None)
@given(st.floats(1e-9, 1e300), st.integers(-(1 << 63), (1 << 63) - 1), st.binary(min_size=20, max_size=20))
def test_time_and_step_are_those_of_the_event(wall_time, step, rest):
    head = Event(wall_time=wall_time, step=step).SerializeToString()
    # nobody counts backwards: what begins so is read as a whole
    assert _start(head + b"\x2a" + rest) == ((wall_time, step, len(head)) if step >= 0 else None)


@given(st.binary(max_size=40))
def test_any_beginning_is_that_of_an_event_or_none(head):
    assert _start(head) is None or head[0] == 9


@pytest.mark.parametrize("step", [0, 1, 127, 128, 16_383, 16_384, 1 << 35, (1 << 62) - 1])
@pytest.mark.parametrize("layers", [1, 90])
def test_a_step_may_be_of_any_length(tmp_path, monkeypatch, step, layers):
    paths = tuple(f"layer_{n}" for n in range(layers))
    sink = written(tmp_path, paths=paths)
    table = samples.table(1, *paths)
    for later in (0, 0, 0, step, step, step + 1, step + 1):
        sink.write(replace(table, step=later, examples=later % 1000))
    read = []
    take = File._take
    monkeypatch.setattr(File, "_take", lambda self, file, span: read.append(span) or take(self, file, span))
    follower = Follower(sink.directory)
    follower.refresh()
    # the version, the start, the attachment, the first sample and one like the others
    assert len(read) == 5
    same(follower, tmp_path)


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_a_payload_with_changed_bytes_is_skimmed_as_it_is_read_or_not_at_all(tmp_path_factory, data):
    directory = tmp_path_factory.mktemp("run")
    sink = written(directory, 1, 2)
    (path,) = sink.directory.iterdir()
    before = path.stat().st_size
    sink.write(samples.table(300, *MANY))
    payload = bytearray(path.read_bytes()[before + 12 : -4])
    for place, byte in data.draw(st.lists(st.tuples(st.integers(-900, 80), st.integers(0, 255)), max_size=2)):
        payload[place] = byte
    other = written(tmp_path_factory.mktemp("other"), 1, 2)
    (copy,) = other.directory.iterdir()
    with copy.open("ab") as file:
        file.write(frame(bytes(payload)))
    follower = Follower(other.directory)
    follower.refresh()
    same(follower, other.directory)
