"""Going on from a file beside the record, and beginning anew where that file is of no use."""

from __future__ import annotations

import json
import logging
import shutil
from dataclasses import replace

import numpy as np
import pytest

from bnwatch import Watch, resume, testing
from bnwatch.diagnosis import Diagnosis, Skipped
from bnwatch.records import Attachment, EvaluationRecord
from bnwatch.sinks.memory import MemorySink
from bnwatch.sinks.tensorboard import read_runs, schema
from bnwatch.sinks.tensorboard.events import read_events

from .samples import HOSTILE

STEPS, LEFT = 60, 30


def items(path):
    """Return the samples and evaluations of a run: two call sites that differ, and one channel that is not finite."""
    spec = testing.layer(path, channels=6, decay=0.9)
    sites = testing.normal(6, 32), testing.normal(6, 32, mean=1.0, std=2.0)
    for shot in testing.train(spec, *sites, steps=STEPS):
        if shot.step == 40:
            shot = replace(shot, calls=(testing.call(spec, mean=np.nan), *shot.calls[1:]))  # noqa: PLW2901
        yield replace(shot, accuracy=0.5, examples=64 * shot.step)
        if shot.step % 10 == 0:
            yield EvaluationRecord(shot.step, 0, 0.25, 1.0, 1000, 0.75, 1.0, 5000, 4)


def run(log_dir, path="bn", *, first=1, last=STEPS, take=None, fingerprint="a", lab=None, **options):
    """Watch a run, from a step on and up to another; leave what is known where one is resumed later."""
    lab = lab or testing.FakeLaboratory.separable()
    kept = MemorySink()
    watch = Watch(log_dir, on_diagnosis="log", sinks=[kept], **options)
    resumed = first > 1 and watch.resume(step=first - 1, fingerprint=fingerprint, take=take or (lambda _: None))
    if not resumed:
        watch.open(Attachment((testing.layer(path, channels=6, decay=0.9),), {"ln": "why"}, "chainer 7.8.1"))
    for item in items(path):
        if not first <= item.step <= last:
            continue
        if isinstance(item, EvaluationRecord):
            watch.evaluated(item)
            watch.experiment(lab, step=item.step, epoch=0, seconds=None)
            if item.step == LEFT:
                own = {"array": np.arange(3, dtype=np.float16), "nan": float("nan"), path: [1, None, (2.5, "x")]}
                watch.leave(step=item.step, fingerprint=fingerprint, own=own)
        else:
            watch.observe(item)
    watch.close()
    return watch, resumed, kept


def state_of(log_dir, step=LEFT):
    return log_dir / "bnwatch" / "state" / f"{step:010d}.npz"


@pytest.mark.parametrize("path", ["bn", HOSTILE, "#"])
def test_two_halves_are_one_run(path, tmp_path):
    whole, _, everything = run(tmp_path / "a", path)
    run(tmp_path / "b", path, last=LEFT)
    taken = []
    half, resumed, kept = run(tmp_path / "b", path, first=LEFT + 1, take=taken.append)
    assert resumed
    assert {d.rule for d in whole.diagnoses} >= {"BN101", "BN401"}
    assert replace(half.report(), run="") == replace(whole.report(), run="")
    assert half.signals.samples == STEPS
    for mine, theirs in zip(half.signals.tables, whole.signals.tables, strict=True):
        assert mine.values.tobytes() == theirs.values.tobytes()
    (one,), (other,) = read_runs(tmp_path / "b"), read_runs(tmp_path / "a")
    assert replace(one.report, run="") == replace(other.report, run="")
    assert [table.step for table in one.tables] == list(range(1, STEPS + 1))
    assert [c.step for c in one.cells] == [c.step for c in other.cells]
    assert [told(c) for c in one.channels] == [told(c) for c in other.channels]
    assert len(one.channels) > LEFT
    assert last_heatmap(tmp_path / "b") == last_heatmap(tmp_path / "a")
    concluded = [[i for i in sink.items if isinstance(i, Diagnosis | Skipped)] for sink in (kept, everything)]
    assert concluded[0] == concluded[1][-len(concluded[0]) :]
    own = taken[0]
    assert own["array"].dtype == np.float16
    assert own["array"].tolist() == [0, 1, 2]
    assert np.isnan(own["nan"])
    assert own[path] == [1, None, [2.5, "x"]]
    assert min(item.step for item in kept.items if hasattr(item, "step") and not hasattr(item, "rule")) == LEFT + 1


def told(channels):
    return replace(channels, values=None), channels.values.tobytes()


def last_heatmap(log_dir):
    found = None
    for path in sorted((log_dir / "bnwatch").glob("*.bnwatch")):
        for event in read_events(path):
            for value in event.summary.value:
                found = value.tensor.string_val[2] if value.tag == schema.HEATMAP else found
    return found


def plain(memory):
    """Return a memory with its arrays as bytes, so that two compare to the bit."""
    if isinstance(memory, dict):
        return {key: plain(part) for key, part in memory.items()}
    if isinstance(memory, list | tuple):
        return [plain(part) for part in memory]
    return (memory.dtype, memory.shape, memory.tobytes()) if isinstance(memory, np.ndarray) else memory


def test_windows_go_on_to_the_last_bit(tmp_path):
    whole, _, _ = run(tmp_path / "a")
    run(tmp_path / "b", last=LEFT)
    half, _, _ = run(tmp_path / "b", first=LEFT + 1)
    assert whole.signals.memory["groups"][0]["window"]
    assert plain(half.signals.memory) == plain(whole.signals.memory)


def test_a_diagnosis_that_was_quiet_once_clears_at_the_next_look(tmp_path):
    spec = testing.layer("bn")
    watch = Watch(tmp_path, on_diagnosis="log", experiments=False)
    watch.open(Attachment((spec,)))
    watch.observe(testing.snapshot(1, testing.call(spec, mean=np.nan)))
    watch.observe(testing.snapshot(2, testing.call(spec)))
    watch.leave(step=2, fingerprint="a", own={})
    again = Watch(tmp_path, on_diagnosis="log", experiments=False)
    assert again.resume(step=2, fingerprint="a", take=lambda _: None)
    assert [d.state for d in again.diagnoses if d.rule == "BN401"] == ["active"]
    again.observe(testing.snapshot(3, testing.call(spec)))
    assert [d.state for d in again.diagnoses if d.rule == "BN401"] == ["cleared"]
    watch.close()
    again.close()


def test_cells_come_back_example_by_example(tmp_path):
    watch, _, _ = run(tmp_path, last=LEFT)
    assert watch.signals.cells is not None
    again = Watch(tmp_path, on_diagnosis="log")
    assert again.resume(step=LEFT, fingerprint="a", take=lambda _: None)
    for (split, row), (other, same) in zip(watch.signals.cells.rows(), again.signals.cells.rows(), strict=True):
        assert split == other
        assert {name: cell.predicted.tolist() for name, cell in row.items()} == {
            name: cell.predicted.tolist() for name, cell in same.items()
        }
        assert row["batch"].gain_over(row["running"]) == same["batch"].gain_over(same["running"])
    assert watch.signals.composition is not None
    assert again.signals.composition == watch.signals.composition


def test_an_allowance_that_matched_before_is_used(tmp_path):
    allow = {"BN101:bn": "twins", "BN205": "never"}
    run(tmp_path, last=LEFT, allow=allow)
    watch = Watch(tmp_path, on_diagnosis="log", allow=allow)
    assert watch.resume(step=LEFT, fingerprint="a", take=lambda _: None)
    watch.close()
    assert [d.message for d in watch.diagnoses if d.rule == "BN901" and "BN205" in d.message]
    assert not [d.message for d in watch.diagnoses if d.rule == "BN901" and "BN101" in d.message]


def rewritten(path, change):
    """Change the JSON of a state."""
    with np.load(path) as file:
        arrays = dict(file)
    tree = json.loads(arrays.pop("text").tobytes())
    change(tree)
    np.savez(path, text=np.frombuffer(json.dumps(tree).encode(), np.uint8), **arrays)


def no_record(path):
    for file in path.parent.parent.glob("*.bnwatch"):
        file.unlink()


def short_record(path):
    for file in path.parent.parent.glob("*.bnwatch"):
        file.write_bytes(file.read_bytes()[:2000])


def damaged_record(path):
    for file in path.parent.parent.glob("*.bnwatch"):
        data = bytearray(file.read_bytes())
        data[1000] ^= 255
        file.write_bytes(data)


def an_array(path):
    with path.open("wb") as file:
        np.save(file, np.zeros(3))


DAMAGES = {
    "missing": (lambda path: path.unlink(), "there is no '"),
    "empty": (lambda path: path.write_bytes(b""), "is damaged"),
    "garbage": (lambda path: path.write_bytes(b"\x80\x04garbage" * 99), "is damaged"),
    "cut": (lambda path: path.write_bytes(path.read_bytes()[:-400]), "is damaged"),
    "pickle": (lambda path: np.savez(path, text=np.array([{}], dtype=object)), "is damaged"),
    "an array": (an_array, "is damaged"),
    "a directory": (lambda path: (path.unlink(), path.mkdir()), "cannot be read: Is a directory"),
    "newer": (lambda path: rewritten(path, lambda t: t.update(format=99)), "was written by a newer bnwatch"),
    "foreign": (lambda path: rewritten(path, lambda t: t.update(fingerprint="b")), "belongs to another training"),
    "step": (lambda path: rewritten(path, lambda t: t.update(step=7)), "belongs to another training"),
    "no field": (lambda path: rewritten(path, lambda t: t.pop("told")), "is damaged"),
    "a severity": (lambda path: rewritten(path, lambda t: t["told"].update(x="grave")), "is damaged"),
    "a shape": (lambda path: rewritten(path, lambda t: t["signals"]["history"]["layout"].pop()), "is damaged"),
    "a list": (lambda path: rewritten(path, lambda t: t.update(own=3)), "is damaged"),
    "elsewhere": (lambda path: rewritten(path, lambda t: t["record"].update(name="../x")), "is not what it was"),
    "no record": (no_record, "is not what it was"),
    "short record": (short_record, "is not what it was"),
    "damaged record": (damaged_record, "is not what it was"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_what_is_of_no_use_is_one_sentence_and_a_fresh_start(name, tmp_path, caplog):
    run(tmp_path, last=LEFT)
    damage, said = DAMAGES[name]
    damage(state_of(tmp_path))
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        watch, resumed, _ = run(tmp_path, first=LEFT + 1)
    assert not resumed
    assert watch.report().samples == STEPS - LEFT
    assert "BN903" not in {d.rule for d in watch.diagnoses}
    (line,) = [m for m in caplog.messages if m.startswith("bnwatch begins anew")]
    assert line.startswith(f"bnwatch begins anew at step {LEFT}: ")
    assert said in line
    assert "\n" not in line


def test_an_adapter_that_cannot_take_its_part(tmp_path, caplog):
    def refuse(_):
        raise KeyError

    run(tmp_path, last=LEFT)
    watch, resumed, _ = run(tmp_path, first=LEFT + 1, take=refuse)
    assert not resumed
    assert watch.report().samples == STEPS - LEFT
    assert "is damaged (KeyError)" in caplog.text


def test_flipped_bytes_never_raise(tmp_path):
    run(tmp_path / "a", last=LEFT)
    data = state_of(tmp_path / "a").read_bytes()
    draw = np.random.default_rng(0)
    refused = 0
    for _ in range(60):
        broken = bytearray(data)
        for _ in range(draw.choice([1, 1, 30])):
            broken[draw.integers(len(broken))] = draw.integers(256)
        state_of(tmp_path / "a").write_bytes(broken)
        try:
            resume.find(tmp_path / "a", LEFT, "a", lambda _: None)
        except resume.CannotResumeError:
            refused += 1
    assert refused > 40


def test_the_newest_are_kept_and_those_of_a_forgotten_future_are_not(tmp_path):
    watch = Watch(tmp_path, on_diagnosis="log", experiments=False)
    watch.open(Attachment((testing.layer("bn"),)))
    for step in range(1, 11):
        watch.observe(testing.snapshot(step, testing.call(testing.layer("bn"))))
        watch.leave(step=step, fingerprint="a", own={})
    watch.close()
    kept = sorted(int(path.stem) for path in state_of(tmp_path).parent.iterdir())
    assert kept == list(range(11 - resume.KEPT, 11))
    assert Watch(tmp_path).resume(step=8, fingerprint="a", take=lambda _: None)
    assert sorted(int(path.stem) for path in state_of(tmp_path).parent.iterdir()) == [6, 7, 8]


def test_a_full_disk_leaves_what_was_there(tmp_path, monkeypatch, caplog):
    run(tmp_path, last=LEFT)
    before = state_of(tmp_path).read_bytes()

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez", full)
    run(tmp_path, last=LEFT)
    assert "a run that is resumed at step 30 will be watched anew: No space left on device" in caplog.text
    assert [path.name for path in state_of(tmp_path).parent.iterdir()] == [state_of(tmp_path).name]
    assert state_of(tmp_path).read_bytes() == before


def test_a_record_that_was_moved_goes_on(tmp_path):
    run(tmp_path / "a", last=LEFT)
    shutil.move(tmp_path / "a", tmp_path / "b")
    watch, resumed, _ = run(tmp_path / "b", first=LEFT + 1)
    assert resumed
    assert watch.report().samples == STEPS


def test_it_can_go_back_while_it_runs(tmp_path):
    """A snapshot is loaded in the middle of a training."""
    lab = testing.FakeLaboratory.separable()
    whole, _, _ = run(tmp_path / "a", lab=lab)
    watch = Watch(tmp_path / "b", on_diagnosis="log")
    watch.open(whole.signals.attachment)
    for last in (45, STEPS):
        for item in items("bn"):
            if item.step > (LEFT if last == STEPS else 0) and item.step <= last:
                if isinstance(item, EvaluationRecord):
                    watch.evaluated(item)
                    watch.experiment(lab, step=item.step, epoch=0, seconds=None)
                else:
                    watch.observe(item)
                if item.step == LEFT:
                    watch.leave(step=LEFT, fingerprint="a", own={})
        if last == 45:
            assert watch.resume(step=LEFT, fingerprint="a", take=lambda _: None)
    watch.close()
    (one,), (other,) = read_runs(tmp_path / "b"), read_runs(tmp_path / "a")
    assert replace(one.report, run="") == replace(other.report, run="")
    assert len(one.tables) == STEPS


def test_without_a_directory_there_is_nothing_to_leave_or_find(tmp_path, monkeypatch, caplog):
    monkeypatch.chdir(tmp_path)
    run(None, last=LEFT)
    _, resumed, _ = run(None, first=LEFT + 1)
    assert not resumed
    assert not list(tmp_path.iterdir())
    assert "begins anew" not in caplog.text
