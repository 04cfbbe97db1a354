"""Framing of event files."""

from __future__ import annotations

import os
import resource
import struct
import subprocess
import sys
from contextlib import suppress

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary

from bnwatch.sinks.tensorboard.checksum import masked
from bnwatch.sinks.tensorboard.events import CorruptRecordError, EventFile, frame, read_events


def scalar(step, value=1.0, tag="bnwatch/a"):
    return Event(wall_time=float(step), step=step, summary=Summary(value=[Summary.Value(tag=tag, simple_value=value)]))


def steps(path):
    return [event.step for event in read_events(path) if event.HasField("summary")]


@pytest.fixture
def written(tmp_path):
    file = EventFile(tmp_path / "a")
    for step in range(1, 11):
        assert file.write(scalar(step))
    file.close()
    return file.path


def test_a_file_begins_with_its_version_and_where_it_takes_up_the_run(tmp_path):
    file = EventFile(tmp_path)
    file.write(scalar(501))
    version, start, first = read_events(file.path)
    assert version.file_version == "brain.Event:2"
    assert start.session_log.status == SessionLog.START
    assert start.step == 501
    assert first.summary.value[0].tag == "bnwatch/a"
    assert ".tfevents." in file.path.name
    assert file.path.name.endswith(".bnwatch")


def test_every_event_is_on_disk_when_write_returns(tmp_path):
    file = EventFile(tmp_path)
    for step in range(1, 4):
        file.write(scalar(step))
        assert steps(file.path) == list(range(1, step + 1))


@pytest.mark.parametrize("cut", [1, 3, 5, 11, 12, 20, 30])
def test_a_truncated_tail_loses_the_last_event_only(written, cut):
    data = written.read_bytes()
    written.write_bytes(data[:-cut])
    assert steps(written) == list(range(1, 10))


def offset_of(path, number):
    """Return where the record of that number begins."""
    data, offset = path.read_bytes(), 0
    for _ in range(number):
        offset += 16 + struct.unpack_from("<Q", data, offset)[0]
    return offset


@pytest.mark.parametrize(
    ("place", "why"), [(0, "not an event"), (9, "not an event"), (14, "checksum"), (-1, "checksum")]
)
def test_damage_hides_what_lies_behind_it_and_is_reported(written, place, why):
    data = bytearray(written.read_bytes())
    data[offset_of(written, 6) + place if place >= 0 else offset_of(written, 7) - 1] ^= 0xFF
    written.write_bytes(data)
    seen = []
    with pytest.raises(CorruptRecordError, match=why):
        seen.extend(event.step for event in read_events(written) if event.HasField("summary"))
    assert seen == [1, 2, 3, 4]


def test_a_payload_that_is_no_event_is_reported(written):
    with written.open("ab") as file:
        file.write(frame(b"\xff\xff\xff\xff"))
    with pytest.raises(CorruptRecordError, match="no event message"):
        list(read_events(written))


def test_a_huge_length_takes_no_memory(written):
    length = struct.pack("<Q", 1 << 62)
    with written.open("ab") as file:
        file.write(length + struct.pack("<I", masked(length)) + b"x" * 100)
    assert steps(written) == list(range(1, 11))


@settings(deadline=None)
@given(st.binary(max_size=200))
def test_garbage_ends_quietly_or_with_one_error(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("garbage") / "file"
    path.write_bytes(data)
    with suppress(CorruptRecordError):
        assert list(read_events(path)) == []


def test_a_forked_child_goes_on_in_a_file_of_its_own(tmp_path):
    program = f"""
import os, sys
from pathlib import Path
from tests.sinks.test_events import scalar
from bnwatch.sinks.tensorboard.checksum import masked
from bnwatch.sinks.tensorboard.events import EventFile
file = EventFile(Path({str(tmp_path)!r}))
for step in range(1, 30):
    file.write(scalar(step))
child = os.fork()
for step in range(30, 60):
    file.write(scalar(step))
if not child:
    os._exit(0)
sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)
    found = sorted(steps(path) for path in tmp_path.iterdir())
    assert found == [list(range(1, 60)), list(range(30, 60))]


def test_a_full_disk_costs_what_does_not_fit_and_no_more(tmp_path):
    file = EventFile(tmp_path)
    for step in range(1, 4):
        file.write(scalar(step))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (file.path.stat().st_size + 20, hard))
    try:
        assert not file.write(scalar(4))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert file.write(scalar(5))
    assert file.lost == 1
    assert steps(file.path) == [1, 2, 3, 5]


def test_half_a_record_that_cannot_be_cut_off_is_left_behind_in_its_file(tmp_path, monkeypatch):
    file = EventFile(tmp_path)
    file.write(scalar(1))
    before = file.path

    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", full)
        patch.setattr(os, "ftruncate", full)
        assert not file.write(scalar(2))
        assert not file.write(scalar(3))
    assert file.write(scalar(4))
    assert file.path != before
    assert file.lost == 2
    assert steps(before) == [1]
    assert steps(file.path) == [4]
