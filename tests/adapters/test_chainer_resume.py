"""A run that is resumed from a snapshot leaves the record of a run that never stopped, and tells nothing twice."""

from __future__ import annotations

import json
import os
import time
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import bnwatch.chainer
from bnwatch import cli
from bnwatch.sinks.tensorboard import read_runs, schema
from bnwatch.watch import Watch

from . import chainer_models as models
from .chainer_models import L, chainer, extensions, training

if TYPE_CHECKING:
    from pathlib import Path

MODELS = {
    "shared": partial(models.MLP, shared=True),
    "cold": partial(models.MLP, bn=partial(L.BatchNormalization, decay=0.99)),
    "cnn": models.CNN,
}
BATCH, EVALUATED, SAVED = 128, 25, 50
"""Between two evaluations more examples pass than experiments use, so that all of theirs come after the snapshot."""


@pytest.fixture(scope="module", autouse=True)
def unhurried() -> Any:
    """Let experiments take the time they need: how many examples they measure must not hang on the machine.

    Batches are kept by their examples alone, so that those that came before a snapshot are none of them.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("bnwatch.chainer.examples.COMPOSED", 1)
        patch.setattr("bnwatch.chainer.session.seconds_after", lambda _: None)
        yield


def trainer_of(out: Path, log_dir: Any, stop: int, *, kind: str = "shared", **options: Any) -> tuple[Any, Any]:
    """Return a Trainer and its watch; the generator is seeded each iteration, as no snapshot holds its state."""
    np.random.seed(5)  # noqa: NPY002
    classifier = L.Classifier(MODELS[kind]())
    optimizer = chainer.optimizers.Adam().setup(classifier)
    iterator = chainer.iterators.SerialIterator(models.dataset(BATCH * EVALUATED), BATCH)
    trainer = training.Trainer(training.updaters.StandardUpdater(iterator, optimizer), (stop, "iteration"), str(out))
    iterator = chainer.iterators.SerialIterator(models.dataset(1000, seed=1), 250, repeat=False, shuffle=False)
    trainer.extend(extensions.Evaluator(iterator, classifier), trigger=(EVALUATED, "iteration"))
    trainer.extend(extensions.LogReport(trigger=(EVALUATED, "iteration")))
    trainer.extend(lambda t: np.random.seed(t.updater.iteration), name="seed", priority=-1000)  # noqa: NPY002
    taken = options.pop("snapshot", None) or extensions.snapshot(filename="at_{.updater.iteration}")
    trainer.extend(taken, trigger=(SAVED, "iteration"), priority=options.pop("priority", None))
    if log_dir is False:
        return trainer, None
    watch = bnwatch.chainer.BatchNormWatch(log_dir, **{"every": 1, "on_diagnosis": "log", **options})
    trainer.extend(watch)
    return trainer, watch


def resumed(out: Path, log_dir: Any, stop: int = 100, **options: Any) -> Any:
    trainer, watch = trainer_of(out, log_dir, stop, **options)
    chainer.serializers.load_npz(str(out / f"at_{SAVED}"), trainer)
    np.random.seed(SAVED)  # noqa: NPY002
    trainer.run(show_loop_exception_msg=False)
    return watch


def report(log_dir: Path, capsys: Any) -> Any:
    """Return what `bnwatch report --format json` prints, without the run's name."""
    capsys.readouterr()
    cli.main(["report", str(log_dir), "--format", "json"])
    (run,) = json.loads(capsys.readouterr().out)["runs"]
    assert run.pop("run") == str(log_dir)
    assert run["problems"] == []
    return run


def raw(log_dir: Path) -> dict[str, list[tuple[int, Any]]]:
    """Return every scalar and every table by its tag as TensorBoard reads it.

    It forgets scalars at a restart, but no tensors: of these the last one a step counts.
    """
    accumulator = EventAccumulator(str(log_dir / "bnwatch"), size_guidance={"tensors": 0, "scalars": 0})
    accumulator.Reload()
    tags = accumulator.Tags()
    found = {tag: [(event.step, event.value) for event in accumulator.Scalars(tag)] for tag in tags["scalars"]}
    for tag in tags["tensors"]:
        if tag == schema.PROGRESS or tag.startswith((schema.STATS, schema.SITES)):
            last = {event.step: event.tensor_proto.tensor_content for event in accumulator.Tensors(tag)}
            found[tag] = list(last.items())
    return found


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: Any) -> dict[str, Path]:
    """Runs of 100 steps that never stopped."""
    top = tmp_path_factory.mktemp("unbroken")
    for kind in MODELS:
        trainer, _ = trainer_of(top / "out", top / kind, 100, kind=kind)
        trainer.run()
    return {kind: top / kind for kind in MODELS}


@pytest.mark.parametrize("kind", MODELS)
def test_the_record_is_that_of_an_unbroken_run(kind: str, unbroken: Any, tmp_path: Any, capsys: Any) -> None:
    trainer, _ = trainer_of(tmp_path, tmp_path / "runs", SAVED, kind=kind)
    trainer.run()
    assert report(tmp_path / "runs", capsys)["steps"] == SAVED
    resumed(tmp_path, tmp_path / "runs", kind=kind)
    expected = report(unbroken[kind], capsys)
    found = json.dumps(report(tmp_path / "runs", capsys))
    # what was cleared before the snapshot was said of the plan of that time
    assert json.loads(found.replace(f"of {SAVED} planned", "of 100 planned")) == expected
    assert (expected["steps"], expected["samples"], expected["evaluations"]) == (100, 100, 4)
    assert raw(tmp_path / "runs") == raw(unbroken[kind])
    _same_record(tmp_path / "runs", unbroken[kind])


def _same_record(found: Path, expected: Path) -> None:
    (one,), (other,) = read_runs(found), read_runs(expected)
    for name in ("specs", "attachment", "structure", "evaluations"):
        assert getattr(one, name) == getattr(other, name)
    assert _looks(one) == _looks(other)
    for name in ("cells", "attributions", "entering"):
        mine, theirs = ([replace(part, seconds=0.0) for part in getattr(run, name)] for run in (one, other))
        assert mine == theirs
    assert [table.step for table in one.tables] == list(range(1, 101))
    for mine, theirs in zip(one.tables, other.tables, strict=True):
        assert (mine.step, mine.epoch, mine.sites) == (theirs.step, theirs.epoch, theirs.sites)
        assert (mine.accuracy, mine.loss, mine.examples) == (theirs.accuracy, theirs.loss, theirs.examples)
        assert mine.values.tobytes() == theirs.values.tobytes()
        assert [s.values.tobytes() for s in mine.shared] == [s.values.tobytes() for s in theirs.shared]
    assert not np.isnan(one.tables[-1].column("updates")).any()


def _looks(run: Any) -> list[Any]:
    """Return the looks; the first after a snapshot has no look before it that tells how far parameters moved."""
    first = min((look.step for look in run.looks if look.step > SAVED), default=0)
    bare = {look: tuple(replace(layer, update=None) for layer in look.layers) for look in run.looks}
    return [replace(look, layers=bare[look]) if look.step == first else look for look in run.looks]


def test_these_runs_hold_what_is_to_be_compared(unbroken: Any) -> None:
    runs = [read_runs(path)[0] for path in unbroken.values()]
    assert all(run.looks and run.cells and run.entering for run in runs)
    assert {EVALUATED, SAVED, 100} <= {cells.step for run in runs for cells in run.cells}
    assert SAVED in {attribution.step for run in runs for attribution in run.attributions}
    states = {d.state for run in runs for d in run.report.diagnoses}
    assert {"active", "cleared"} <= states


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.parametrize("times", [1, 2])
def test_a_run_that_was_killed(times: int, unbroken: Any, tmp_path: Any, capsys: Any) -> None:
    for again in range(times):
        child = os.fork()
        if child == 0:
            trainer, _ = trainer_of(tmp_path, tmp_path / "runs", 100)
            trainer.extend(lambda t: t.updater.iteration == 73 and os._exit(9), name="kill", trigger=(1, "iteration"))
            if again:
                chainer.serializers.load_npz(str(tmp_path / f"at_{SAVED}"), trainer, strict=False)
            trainer.run()
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
        time.sleep(1.0 - time.time() % 1.0)  # TensorBoard reads files in the order of their names, which hold seconds
    assert report(tmp_path / "runs", capsys)["steps"] == 73
    resumed(tmp_path, tmp_path / "runs")
    assert report(tmp_path / "runs", capsys) == report(unbroken["shared"], capsys)
    assert raw(tmp_path / "runs") == raw(unbroken["shared"])


def test_what_is_not_closed_yet_reads_as_if_it_never_stopped(tmp_path: Any, capsys: Any) -> None:
    """Both runs are read while they go on, without a closing report."""
    found = []
    for name, first in (("a", None), ("b", SAVED)):
        out, log_dir = tmp_path / name, tmp_path / name / "runs"
        if first:
            trainer_of(out, log_dir, first)[0].run()
        trainer, _ = trainer_of(out, log_dir, 100)

        def look(trainer: Any, log_dir: Path = log_dir) -> None:
            if trainer.updater.iteration == 60:
                found.append(report(log_dir, capsys))

        trainer.extend(look, name="look", trigger=lambda _: True, priority=-10)
        if first:
            chainer.serializers.load_npz(str(out / f"at_{SAVED}"), trainer)
            np.random.seed(SAVED)  # noqa: NPY002
        trainer.run()
    assert found[0] == found[1]
    assert not found[0]["complete"]
    assert found[0]["diagnoses"]


def test_it_can_be_resumed_twice_from_the_same_snapshot(unbroken: Any, tmp_path: Any, capsys: Any) -> None:
    trainer_of(tmp_path, tmp_path / "runs", SAVED)[0].run()
    resumed(tmp_path, tmp_path / "runs")
    resumed(tmp_path, tmp_path / "runs")
    assert report(tmp_path / "runs", capsys) == report(unbroken["shared"], capsys)
    assert raw(tmp_path / "runs") == raw(unbroken["shared"])


def test_nothing_is_told_twice_and_the_summary_still_shows_it(tmp_path: Any, capsys: Any) -> None:
    told: list[str] = []
    tell = {"on_diagnosis": lambda diagnosis: told.append(diagnosis.key)}
    trainer_of(tmp_path, tmp_path / "runs", SAVED, **tell)[0].run()
    before = list(told)
    capsys.readouterr()
    watch = resumed(tmp_path, tmp_path / "runs", **tell)
    assert "BN101 predictor/bn1" in before
    assert len(set(told)) == len(told)
    assert "warning[BN101]: `predictor/bn1`" in capsys.readouterr().err
    assert next(d for d in watch.diagnoses if d.rule == "BN101").step < SAVED


def writer_of(name: str) -> Any:
    return getattr(extensions.snapshot_writers, name)()


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.parametrize(
    "options",
    [
        {"snapshot": lambda: extensions.snapshot(filename="at_{.updater.iteration}", autoload=True)},
        {"snapshot": lambda: extensions.snapshot(filename="at_{.updater.iteration}", writer=writer_of("ThreadWriter"))},
        {
            "snapshot": lambda: extensions.snapshot(
                filename="at_{.updater.iteration}", writer=writer_of("ProcessWriter")
            )
        },
        {"snapshot": lambda: extensions.snapshot(filename="at_{.updater.iteration}"), "priority": 10_000},
    ],
    ids=["autoload", "thread", "process", "snapshot before all others"],
)
def test_ways_of_taking_snapshots(options: Any, unbroken: Any, tmp_path: Any, capsys: Any, caplog: Any) -> None:
    snapshot = options.pop("snapshot")
    trainer_of(tmp_path, tmp_path / "runs", SAVED, snapshot=snapshot(), **options)[0].run()
    if snapshot().autoload:
        trainer, _ = trainer_of(tmp_path, tmp_path / "runs", 100, snapshot=snapshot(), **options)
        np.random.seed(SAVED)  # noqa: NPY002
        trainer.run()
    else:
        resumed(tmp_path, tmp_path / "runs", snapshot=snapshot(), **options)
    assert not _begins_anew(caplog)
    assert report(tmp_path / "runs", capsys)["samples"] == 100
    if "priority" not in options:  # else the evaluation of the last step was not made before it was saved, and is lost
        assert report(tmp_path / "runs", capsys) == report(unbroken["shared"], capsys)
        assert raw(tmp_path / "runs") == raw(unbroken["shared"])


def test_a_snapshot_on_error(unbroken: Any, tmp_path: Any, capsys: Any) -> None:
    snapshot = extensions.snapshot(filename=f"at_{SAVED}", snapshot_on_error=True)
    trainer, _ = trainer_of(tmp_path, tmp_path / "runs", 100, snapshot=snapshot)

    def fail(trainer: Any) -> None:
        if trainer.updater.iteration == SAVED:
            raise ZeroDivisionError

    trainer.extend(fail, name="fail", priority=-2000, trigger=lambda _: True)
    with pytest.raises(ZeroDivisionError):
        trainer.run(show_loop_exception_msg=False)
    resumed(tmp_path, tmp_path / "runs")
    assert report(tmp_path / "runs", capsys) == report(unbroken["shared"], capsys)


def test_another_directory_begins_anew_and_says_so(tmp_path: Any, capsys: Any, caplog: Any) -> None:
    trainer_of(tmp_path, tmp_path / "runs", SAVED)[0].run()
    resumed(tmp_path, tmp_path / "others")
    assert report(tmp_path / "others", capsys)["samples"] == 50
    assert _begins_anew(caplog) == [
        f"there is no {str(tmp_path / 'others' / 'bnwatch' / 'state' / '0000000050.npz')!r}"
    ]


def test_a_snapshot_without_the_watch_and_with_it(tmp_path: Any, capsys: Any, caplog: Any) -> None:
    trainer_of(tmp_path, False, SAVED)[0].run()
    resumed(tmp_path, tmp_path / "runs")
    assert report(tmp_path / "runs", capsys)["samples"] == 50
    assert len(_begins_anew(caplog)) == 1
    other = tmp_path / "other"
    trainer_of(other, other / "runs", SAVED)[0].run()
    with np.load(tmp_path / "at_50") as plain, np.load(other / "at_50") as watched:
        assert set(plain.files) == set(watched.files)
        different = {name for name in plain.files if plain[name].tobytes() != watched[name].tobytes()}
    assert {name.rpartition("/")[2] for name in different} <= {"_snapshot_elapsed_time", "_log"}  # they hold times
    resumed(other, False)


def test_without_a_directory_nothing_is_left_and_nothing_said(tmp_path: Any, caplog: Any) -> None:
    trainer_of(tmp_path, None, SAVED)[0].run()
    assert resumed(tmp_path, None).report().samples == 50
    assert not list(tmp_path.rglob("*.npz"))
    assert not _begins_anew(caplog)


def test_another_training_in_the_same_directory(tmp_path: Any, capsys: Any, caplog: Any) -> None:
    trainer_of(tmp_path, tmp_path / "runs", SAVED, kind="cold")[0].run()
    trainer_of(tmp_path / "other", False, SAVED, kind="cnn")[0].run()
    resumed(tmp_path / "other", tmp_path / "runs", kind="cnn")
    assert [line.rpartition("' ")[2] for line in _begins_anew(caplog)] == ["belongs to another training"]
    assert report(tmp_path / "runs", capsys)["complete"]


def test_a_state_that_cannot_be_written_is_one_line(tmp_path: Any, capsys: Any, caplog: Any) -> None:
    (tmp_path / "runs" / "bnwatch").mkdir(parents=True)
    (tmp_path / "runs" / "bnwatch" / "state").write_text("in the way")
    trainer_of(tmp_path, tmp_path / "runs", SAVED)[0].run()
    assert "a run that is resumed at step 50 will be watched anew" in caplog.text
    assert "BN903" not in str(report(tmp_path / "runs", capsys))


@pytest.mark.parametrize("name", ["leave", "resume"])
def test_a_fault_disturbs_no_training(name: str, tmp_path: Any, monkeypatch: Any) -> None:
    def broken(*_: Any, **__: Any) -> None:
        msg = "injected"
        raise OSError(msg)

    monkeypatch.setattr(Watch, name, broken)
    trainer_of(tmp_path, tmp_path / "runs", SAVED)[0].run()
    watch = resumed(tmp_path, tmp_path / "runs")
    said = [d.message for d in watch.diagnoses if d.rule == "BN903"]
    assert len(said) == 1
    assert "injected" in said[0]
    assert not chainer.get_function_hooks()


def _begins_anew(caplog: Any) -> list[str]:
    lead = f"bnwatch begins anew at step {SAVED}: "
    return [message.removeprefix(lead) for message in caplog.messages if message.startswith(lead)]
