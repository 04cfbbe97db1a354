import dataclasses
import logging
import os
import subprocess
import sys
import warnings
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from bnwatch import BatchNormError, BatchNormWarning, Diagnosis, Severity, Watch, engine, evidence, render, testing
from bnwatch.records import Attachment, EvaluationRecord
from bnwatch.signals import Replicas
from bnwatch.sinks.memory import MemorySink

LENGTHS = "record('bn'): the four statistics need one number a channel each, got lengths"


def call(watch, *, site=0, mean=0.0, **fields):
    given = {
        "batch_mean": np.full(4, mean), "batch_var": np.ones(4), "count": 64,
        "running_mean": np.zeros(4), "running_var": np.ones(4), "decay": 0.9,
    }  # fmt: skip
    watch.record("bn", site=site, **{**given, **fields})


def train(watch, steps=8, start=0):
    """A user's loop with one layer at two call sites that differ: BN101, a warning, at the fourth sample."""
    rng = np.random.default_rng(start)
    for n in range(start, start + steps):
        running = np.full(4, 0.5 + 0.01 * n)
        for site in (0, 1):
            call(watch, site=site, mean=site + 0.02 * rng.normal(), running_mean=running, updates=100 + n)
        watch.step(accuracy=0.5, examples=10)


def rules(watch):
    return sorted(d.rule for d in watch.diagnoses if d.severity >= Severity.WARNING)


# --- what a user gives ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"log_dir": 5}, "log_dir must be a path or None, got 5"),
        ({"every": 0}, "every must be a whole number of training steps, at least 1, got 0"),
        ({"every": -3}, "every must be a whole number of training steps, at least 1, got -3"),
        ({"every": 2.5}, "every must be a whole number of training steps, at least 1, got 2.5"),
        ({"every": True}, "every must be a whole number of training steps, at least 1, got True"),
        ({"every": "50"}, "every must be a whole number of training steps, at least 1, got '50'"),
        ({"probe": 3}, "probe must be a pair (x, y) of inputs and class labels, got int"),
        ({"probe": (1, 2, 3)}, "probe must be a pair (x, y) of inputs and class labels, got tuple"),
        ({"on_diagnosis": "print"}, "on_diagnosis must be 'warn', 'raise', 'log' or a callable, got 'print'"),
        ({"on_diagnosis": None}, "on_diagnosis must be 'warn', 'raise', 'log' or a callable, got None"),
        ({"experiments": "always"}, "experiments must be 'auto' or False, got 'always'"),
        ({"allow": {"X": "x"}}, "allow: unknown rule 'X' in 'X'; `bnwatch rules` lists them, for example 'BN101'"),
        (
            {"allow": {"BN101": ""}},
            "allow: 'BN101' needs a reason, a non-empty text such as 'siamese towers, same data'",
        ),
    ],
)  # fmt: skip
def test_a_bad_argument_gives_one_sentence(arguments, sentence):
    with pytest.raises(ValueError, match=r"must|allow") as caught:
        Watch(**{"log_dir": None, **arguments})
    assert str(caught.value) == sentence


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        (
            {"running_var": np.ones(3)},
            f"{LENGTHS} {{'batch_mean': 4, 'batch_var': 4, 'running_mean': 4, 'running_var': 3}}",
        ),
        (
            dict.fromkeys(("batch_mean", "batch_var", "running_mean", "running_var"), ()),
            f"{LENGTHS} {{'batch_mean': 0, 'batch_var': 0, 'running_mean': 0, 'running_var': 0}}",
        ),
        ({"decay": 1.5}, "record('bn'): decay must lie in [0, 1], the weight of the old value, got 1.5"),
        ({"count": 0}, "record('bn'): count must be at least 1, the elements per channel, got 0"),
    ],
)
def test_a_bad_record_gives_one_sentence(fields, sentence):
    with pytest.raises(ValueError, match="record") as caught:
        call(Watch(None), **fields)
    assert str(caught.value) == sentence


@pytest.mark.parametrize("shape", [(1, 4, 1, 1), (4,), (4, 1)])
def test_statistics_of_any_shape_are_one_number_a_channel(shape):
    watch = Watch(None, every=1)
    call(watch, batch_mean=np.zeros(shape))
    watch.step()
    assert watch.signals.specs["bn"].channels == 4


def test_nested_lists_and_scalars_are_taken():
    watch = Watch(None, every=1)
    watch.record("a", batch_mean=1, batch_var=1.0, count=2, running_mean=[0.0], running_var=[1], decay=1)
    watch.step()
    assert [s.count for s in watch.signals.sites()] == [2]


# --- sampling ------------------------------------------------------------------------------------------------------


def test_the_first_steps_are_sampled_densely_then_every_nth():
    watch = Watch(None, every=50)
    due = [step for step in range(1, 1001) if watch.due(step)]
    assert due[:8] == [1, 2, 3, 4, 5, 6, 7, 8]
    assert due[-5:] == [800, 851, 900, 951, 1000]
    assert len(due) < 60
    gaps = np.diff(due)
    assert gaps.max() <= 100
    assert all(step % 50 in {0, 1} for step in due if step >= 256)


@pytest.mark.parametrize(("every", "period"), [(1, 2), (2, 2), (3, 2), (50, 2), (50, 3)])
def test_populations_in_turn_are_all_sampled(every, period):
    watch = Watch(None, every=every)
    seen = np.bincount([step % period for step in range(100, 3000) if watch.due(step)], minlength=period)
    assert seen.min() > 0.2 * seen.sum()


@pytest.mark.parametrize("every", [1, 2, 3, 7, 100])
def test_no_interval_is_longer_than_asked_for_by_more_than_twice(every):
    watch = Watch(None, every=every)
    due = [0] + [step for step in range(1, 3000) if watch.due(step)]
    assert np.diff(due).max() <= max(2 * every, 1)
    assert np.diff(due)[-10:].mean() == pytest.approx(every, rel=0.2)


def test_only_sampled_steps_are_observed():
    memory = MemorySink()
    with Watch(None, every=50, sinks=[memory]) as watch:
        for _ in range(400):
            call(watch)
            watch.step()
    assert [table.step for table in watch.signals.tables][-2:] == [351, 400]
    assert memory.report.samples == watch.signals.samples
    assert memory.report.steps == 400


# --- by hand -------------------------------------------------------------------------------------------------------


def test_a_loop_by_hand_gives_diagnoses_and_a_report():
    with pytest.warns(BatchNormWarning, match="BN101"), Watch(None, every=1) as watch:
        train(watch)
        watch.evaluation(accuracy=0.5, loss=1.0, examples=100, classes=2)
    assert rules(watch) == ["BN101"]
    report = watch.report()
    assert (report.layers, report.sites, report.samples, report.steps, report.evaluations) == (1, 2, 8, 8, 1)
    assert report.complete
    assert report.diagnoses == watch.diagnoses
    assert {s.rule for s in report.skipped} == {s.rule for s in watch.skipped}


def test_training_accuracy_since_the_last_evaluation_goes_with_it():
    watch = Watch(None)
    for accuracy, examples in ((0.0, 30), (1.0, 10)):
        call(watch)
        watch.step(accuracy=accuracy, examples=examples)
    watch.evaluation(accuracy=0.2, examples=50)
    watch.step(accuracy=1.0, examples=5)
    watch.evaluation(accuracy=0.4, examples=50)
    watch.evaluation(accuracy=0.4, examples=50)
    seen = [(e.step, e.train_accuracy, e.train_examples) for e in watch.signals.evaluations]
    assert seen == [(2, 0.25, 40), (3, 1.0, 5), (3, None, 0)]


def test_a_percentage_is_told_of_once_and_left_out():
    watch = Watch(None, every=1)
    with pytest.warns(BatchNormWarning) as caught:
        for _ in range(3):
            call(watch)
            watch.step(accuracy=97.3)
            watch.evaluation(accuracy=95.0, examples=100, classes=10)
    assert [str(w.message) for w in caught] == ["bnwatch leaves out an accuracy of 97.3: it must lie in [0, 1]"]
    assert watch.enabled
    assert watch.signals.evaluations[-1].accuracy is None


def test_accuracy_over_nothing_is_unknown():
    watch = Watch(None, every=1)
    call(watch)
    watch.step(accuracy=float("nan"), loss=float("nan"))
    watch.evaluation(accuracy=float("nan"), examples=100, classes=10)
    watch.evaluated(EvaluationRecord(1, 0, float("nan"), examples=10, train_accuracy=97.0, train_examples=5, classes=3))
    assert watch.enabled
    assert [e.accuracy for e in watch.signals.evaluations] == [None, None]


def test_closing_twice_does_nothing_more(capsys):
    memory = MemorySink()
    watch = Watch(None, sinks=[memory])
    call(watch)
    watch.step()
    watch.close()
    report, items = memory.report, list(memory.items)
    assert capsys.readouterr().err
    watch.close()
    assert memory.report is report
    assert memory.items == items
    assert capsys.readouterr().err == ""


def test_an_evaluation_before_the_first_step_is_no_sign_of_a_model_without_layers():
    with Watch(None, every=1) as watch:
        watch.evaluation(accuracy=0.1, examples=100)
        call(watch)
        watch.step()
    assert watch.diagnoses == ()
    assert [spec.path for spec in watch.signals.attachment.layers] == ["bn"]


def test_evaluations_before_the_first_step_open_the_files_once(tmp_path):
    pytest.importorskip("tensorboard")
    with Watch(tmp_path, every=1) as watch:
        for _ in range(3):
            watch.evaluation(accuracy=0.1, examples=100)
        call(watch)
        watch.step()
    assert len([path for path in tmp_path.rglob("*") if path.is_file()]) == 1


def test_steps_without_any_layer_are_bn902():
    with pytest.warns(BatchNormWarning, match="BN902"), Watch(None, every=1) as watch:
        watch.step()
    assert rules(watch) == ["BN902"]


def test_a_layer_that_comes_later_is_attached():
    memory = MemorySink()
    with Watch(None, every=1, sinks=[memory]) as watch:
        call(watch)
        watch.step()
        call(watch)
        watch.record("late", batch_mean=[0], batch_var=[1], count=2, running_mean=[0], running_var=[1], decay=0.5)
        watch.step()
    assert [[spec.path for spec in a.layers] for a in memory.of(Attachment)] == [["bn"], ["bn", "late"]]


def test_a_watch_that_saw_nothing_closes():
    with Watch(None) as watch:
        pass
    assert watch.diagnoses == ()


def test_an_exception_of_the_user_passes_and_the_watch_closes():
    memory = MemorySink()
    with pytest.raises(ZeroDivisionError), Watch(None, sinks=[memory]) as watch:
        call(watch)
        _ = 1 / 0
    assert memory.report.complete


# --- how diagnoses are told ----------------------------------------------------------------------------------------


def test_a_warning_is_issued_once_and_points_at_the_users_line():
    with pytest.warns(BatchNormWarning) as caught, Watch(None, every=1) as watch:
        train(watch, 20)
    assert len(caught) == 1
    assert caught[0].filename == __file__
    assert (
        Path(__file__).read_text(encoding="utf-8").splitlines()[caught[0].lineno - 1].strip().startswith("watch.step(")
    )
    assert str(caught[0].message).startswith("\nwarning[BN101]: `bn` normalizes 2 call sites")


def test_a_program_whose_path_begins_like_the_package_is_the_users():
    package = Path(engine.__file__).parent
    source = "def step(watch):\n    watch.evaluation(accuracy=5.0)\n"
    namespace = {}
    exec(compile(source, f"{package}_demo.py", "exec"), namespace)  # noqa: S102 - a user's file beside the package
    with pytest.warns(BatchNormWarning) as caught:
        namespace["step"](Watch(None))
    assert (caught[0].filename, caught[0].lineno) == (f"{package}_demo.py", 2)


def test_raise_raises_into_the_loop_and_closes():
    memory = MemorySink()
    with (
        pytest.raises(BatchNormError, match="BN101"),
        Watch(None, every=1, on_diagnosis="raise", sinks=[memory]) as watch,
    ):
        train(watch)
    assert watch.signals.step == 4
    assert watch.enabled
    assert memory.report.complete
    assert [d.rule for d in memory.report.diagnoses] == ["BN101"]


def test_a_warning_filter_of_error_raises_into_the_loop():
    with warnings.catch_warnings():
        warnings.simplefilter("error", BatchNormWarning)
        with pytest.raises(BatchNormWarning, match="BN101"), Watch(None, every=1) as watch:
            train(watch)
    assert watch.enabled
    assert rules(watch) == ["BN101"]


def test_log_logs_to_bnwatch(caplog):
    with caplog.at_level(logging.WARNING, "bnwatch"), Watch(None, every=1, on_diagnosis="log") as watch:
        train(watch)
    assert [(r.name, r.levelname) for r in caplog.records] == [("bnwatch", "WARNING")]
    assert "BN101" in caplog.text


def test_a_callable_gets_the_diagnosis():
    told = []
    with Watch(None, every=1, on_diagnosis=told.append) as watch:
        train(watch)
    assert [d.rule for d in told] == ["BN101"]
    assert told[0].subject == "bn"


def test_what_an_evaluation_by_hand_brings_up_is_told_at_once():
    with pytest.warns(BatchNormWarning, match="BN302") as caught, Watch(None, every=1) as watch:
        for _ in range(3):
            call(watch)
            watch.step(accuracy=0.1, examples=1000)
            watch.evaluation(accuracy=0.1, examples=1000, classes=10)
        assert len(caught) == 1
    lines = Path(__file__).read_text(encoding="utf-8").splitlines()
    assert lines[caught[0].lineno - 1].strip().startswith("watch.evaluation(")


def test_info_is_not_told():
    told = []
    with Watch(None, every=1, on_diagnosis=told.append, allow={"BN205": "never occurs"}) as watch:
        call(watch)
        watch.step()
    assert told == []
    assert [d.rule for d in watch.diagnoses] == ["BN901"]


def test_an_allowed_diagnosis_is_kept_and_not_told():
    told = []
    with Watch(None, every=1, on_diagnosis=told.append, allow={"BN101:b*": "two towers"}) as watch:
        train(watch)
    assert told == []
    assert [(d.rule, d.state, d.reason) for d in watch.diagnoses] == [("BN101", "allowed", "two towers")]


def test_an_unused_allowance_is_said_when_training_ends():
    with Watch(None, every=1, on_diagnosis="log", allow={"BN101:other": "x", "BN101:bn": "y"}) as watch:
        train(watch)
        assert "BN901" not in {d.rule for d in watch.diagnoses}
    assert [d.subject for d in watch.diagnoses if d.rule == "BN901"] == ["BN101:other"]


def test_consequences_are_told_with_their_cause():
    """Running statistics that never move, and the accuracy that costs: one warning, both in it."""
    told = []
    lab = testing.FakeLaboratory.separable()
    with Watch(None, every=1, on_diagnosis=lambda d: told.append((d.rule, d.causes))) as watch:
        watch.signals.cells = testing.cells(
            2, training={"batch": 1.0, "running": 0.5}, evaluation={"batch": 1.0, "running": 0.5}
        )
        for n in range(3):
            call(watch, mean=n)
            watch.step()
    assert told == [("BN301", ()), ("BN203", ())]
    assert {d.rule: d.causes for d in watch.diagnoses} == {"BN203": (), "BN301": ("BN203 bn",)}
    assert lab.asked == []


# --- faults --------------------------------------------------------------------------------------------------------


class Broken:
    """A sink that fails."""

    def __init__(self, error, on="write", after=2):
        self.error, self.on, self.after = error, on, after

    def write(self, _item):
        self.after -= 1
        if self.on == "write" and self.after < 0:
            raise self.error

    def close(self, _report):
        if self.on == "close":
            raise self.error


def broken(*_args, **_kwargs):
    msg = "a bug"
    raise RuntimeError(msg)


@contextmanager
def seam(place, monkeypatch):
    """Break one seam; yield the arguments for the watch."""
    if place == "sink.write":
        yield {"sinks": [Broken(RuntimeError("a bug"))]}
    elif place == "sink.close":
        yield {"sinks": [Broken(RuntimeError("a bug"), "close")]}
    elif place == "rule":
        body = engine.CATALOGUE[0]
        sick = type(body)(body.id, body.name, body.severity, "0.1", "", (), {}, broken)
        monkeypatch.setattr(Watch, "__init__", _with_rules(Watch.__init__, (sick, *engine.CATALOGUE[1:])))
        yield {}
    elif place == "render":
        monkeypatch.setattr(render, "diagnosis_text", broken)
        yield {}
    elif place == "callable":
        yield {"on_diagnosis": broken}
    elif place == "signals":
        monkeypatch.setattr("bnwatch.signals._History._values", broken)
        yield {}
    else:
        monkeypatch.setattr("bnwatch.signals.Signals.evaluate", broken)
        yield {}


def _with_rules(init, catalogue):
    def patched(self, *args, **kwargs):
        init(self, *args, **kwargs)
        self._engine = engine.Engine(self._allow, catalogue)

    return patched


@pytest.mark.parametrize("place", ["sink.write", "sink.close", "rule", "render", "callable", "signals", "evaluate"])
def test_a_fault_anywhere_leaves_the_training_running_and_is_said_once(place, monkeypatch, capsys):
    memory = MemorySink()
    with seam(place, monkeypatch) as arguments, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with Watch(None, every=1, **{**arguments, "sinks": [*arguments.get("sinks", ()), memory]}) as watch:
            train(watch, 6)
            watch.evaluation(accuracy=0.5, examples=100, classes=2)
            train(watch, 6, start=6)
            watch.evaluation(accuracy=0.5, examples=100, classes=2)
    assert not watch.enabled
    faults = [d for d in watch.diagnoses if d.rule == "BN903"]
    assert len(faults) == 1
    assert "RuntimeError while " in faults[0].message
    assert "a bug" in faults[0].message
    told = [str(w.message) for w in caught if "BN903" in str(w.message)] + [
        line for line in capsys.readouterr().err.splitlines() if line.startswith("bnwatch switched itself off")
    ]
    assert len(told) == 1, told
    assert memory.report is not None
    if place != "sink.close":
        assert [d.rule for d in memory.of(Diagnosis)].count("BN903") == 1
    assert all(w.filename == __file__ for w in caught)


def test_a_watch_that_switched_itself_off_sees_nothing_more(monkeypatch):
    with seam("signals", monkeypatch), pytest.warns(BatchNormWarning, match="BN903"):
        watch = Watch(None, every=1)
        train(watch, 1)
        monkeypatch.undo()
        train(watch, 3)
        watch.evaluation(accuracy=0.1, examples=10)
    assert watch.signals.samples == 0
    assert watch.signals.evaluated == 0
    assert not watch.due(1000)


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), PermissionError("read-only")])
def test_a_sink_that_cannot_write_is_left_out_with_one_warning(error):
    memory = MemorySink()
    with pytest.warns(BatchNormWarning) as caught, Watch(None, every=1, sinks=[Broken(error), memory]) as watch:
        train(watch)
    first, second = (str(w.message) for w in caught)
    assert "goes on without" in first
    assert "BN101" in second
    assert caught[0].filename == __file__
    assert watch.enabled
    assert rules(watch) == ["BN101"]
    assert memory.report.samples == 8


def test_a_directory_that_cannot_be_made_gives_one_warning_and_the_diagnoses_still_come(tmp_path):
    pytest.importorskip("tensorboard")
    file = tmp_path / "file"
    file.write_text("not a directory", encoding="utf-8")
    with pytest.warns(BatchNormWarning) as caught, Watch(file / "runs", every=1) as watch:
        train(watch)
    first, second = (str(w.message) for w in caught)
    place = file / "runs" / "bnwatch"
    assert first == f"bnwatch goes on without files: cannot write the record to '{place}': Not a directory"
    assert "BN101" in second
    assert {w.filename for w in caught} == {__file__}


def test_no_directory_writes_no_files_and_imports_no_tensorboard(tmp_path):
    program = (
        "import sys, bnwatch\n"
        "with bnwatch.Watch(None, every=1) as watch:\n"
        "    watch.record('bn', batch_mean=[0], batch_var=[1], count=2, running_mean=[0], running_var=[1], decay=.9)\n"
        "    watch.step()\n"
        "print('tensorboard' in sys.modules)\n"
    )
    root = Path(engine.__file__).parents[1]
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(root)},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout.split() == ["False"]
    assert list(tmp_path.iterdir()) == []


def test_interrupts_pass():
    with pytest.raises(KeyboardInterrupt):
        Watch(None, every=1, sinks=[Broken(KeyboardInterrupt(), after=0)]).step()


# --- experiments ---------------------------------------------------------------------------------------------------


def suspicious(watch):
    """Training accuracy far above evaluation accuracy, which calls for the cells."""
    call(watch)
    watch.step(accuracy=0.99, examples=1000)
    watch.evaluation(accuracy=0.6, examples=1000, classes=4)


def experiment(watch, lab, **fields):
    with watch.guard("running an experiment"):
        watch.experiment(lab, **{"step": watch.signals.step, "epoch": 0, "seconds": None, **fields})


def test_a_rule_that_asks_gets_the_cells():
    lab = testing.FakeLaboratory.separable()
    with pytest.warns(BatchNormWarning, match="BN301"), Watch(None, every=1) as watch:
        suspicious(watch)
        experiment(watch, lab)
    assert watch.signals.cells.training["batch"].accuracy == 1.0
    assert "BN301" in rules(watch)


@pytest.mark.parametrize("looks", [False, True])
def test_what_an_experiment_refutes_before_it_was_told_is_not_told(looks):
    told = []
    with Watch(None, every=1, on_diagnosis=told.append) as watch:
        call(watch)
        watch.step()
        for _ in range(3):
            guessed = {"examples": 1000, "train_accuracy": 0.25, "train_examples": 1000, "classes": 4}
            watch.evaluated(EvaluationRecord(watch.signals.step, 0, 0.25, **guessed))
        assert "BN302" in rules(watch)
        if looks:
            experiment(watch, testing.FakeLaboratory.stacked("bn"))
    assert [d.rule for d in told] == ([] if looks else ["BN302"])


def test_what_the_cells_show_is_attributed_once(tmp_path):
    pytest.importorskip("tensorboard")
    from bnwatch.sinks.tensorboard import read_runs

    lab, memory = testing.FakeLaboratory.stacked("bn1", "bn2"), MemorySink()
    lab.mean[1] += 3.0
    with pytest.warns(BatchNormWarning, match="most of it at `bn2`"), Watch(tmp_path, every=1, sinks=[memory]) as watch:
        suspicious(watch)
        experiment(watch, lab)
        experiment(watch, lab, final=True)
    (found,) = memory.of(evidence.Attribution)
    assert (found.step, found.costs[0].subject) == (1, "bn2")
    assert watch.signals.attribution is found
    (diagnosis,) = (d for d in watch.diagnoses if d.rule == "BN301")
    assert diagnosis.further[0].rows[0][0] == "bn2"
    assert not [s for s in watch.skipped if s.rule == "BN301"]
    (run,) = read_runs(tmp_path)
    assert run.attributions == (found,)
    (back,) = (d for d in run.report.diagnoses if d.rule == "BN301")
    assert back == diagnosis
    assert render.report_text(run.report) == render.report_text(dataclasses.replace(watch.report(), run=run.report.run))


def test_new_cells_are_attributed_anew_and_at_the_end():
    lab, memory = testing.FakeLaboratory.stacked("bn1", "bn2"), MemorySink()
    lab.mean[1] += 3.0
    with Watch(None, every=1, sinks=[memory], on_diagnosis="log") as watch:
        for _ in range(2):
            suspicious(watch)
            experiment(watch, lab)
        call(watch)
        watch.step()
        experiment(watch, lab, final=True)
    assert [found.step for found in memory.of(evidence.Attribution)] == [1, 2, 3]


def test_cells_that_show_no_cost_are_not_attributed():
    lab = testing.FakeLaboratory.stacked("bn1", "bn2")
    with Watch(None, every=1, on_diagnosis="log") as watch:
        suspicious(watch)
        experiment(watch, lab)
    assert watch.signals.cells is not None
    assert watch.signals.attribution is None


def test_an_attribution_that_is_not_possible_leaves_the_diagnosis_and_says_so(monkeypatch):
    lab = testing.FakeLaboratory.separable()

    def refusing(*_args, **_fields):
        msg = "this model cannot be called twice"
        raise evidence.ExperimentNotPossibleError(msg)

    monkeypatch.setattr(evidence, "attribute", refusing)
    with Watch(None, every=1, on_diagnosis="log") as watch:
        suspicious(watch)
        experiment(watch, lab)
        asked = len(lab.asked)
        experiment(watch, lab)
        assert len(lab.asked) == asked
    assert "BN301" in rules(watch)
    (refused,) = (d for d in watch.diagnoses if d.rule == "BN904")
    assert "cannot be called twice" in refused.message
    assert [s.needs for s in watch.skipped if s.rule == "BN301"] == ["attribution"]


def test_what_enters_and_what_batches_are_made_of_is_measured_with_the_cells_in_their_shares_of_the_time(monkeypatch):
    given = {}

    def noted(name):
        run = getattr(evidence, name)
        monkeypatch.setattr(
            evidence, name, lambda lab, **more: (given.update({name: more["budget"].seconds}), run(lab, **more))[1]
        )

    noted("crosscheck")
    noted("entering")
    noted("composition")
    lab = testing.FakeLaboratory.stacked("bn")
    for batch in lab.data["evaluation"]:
        batch.inputs[...] *= 16.0
    kept = MemorySink()
    with Watch(None, every=1, on_diagnosis="log", sinks=[kept]) as watch:
        suspicious(watch)
        experiment(watch, lab, seconds=10.0)
    assert given == pytest.approx({"crosscheck": 6.0, "entering": 2.0, "composition": 2.0})
    (entering,) = kept.of(evidence.Entering)
    assert watch.signals.entering is entering
    assert entering.step == watch.signals.cells.step
    assert entering.sites[0].std_ratio == pytest.approx(16.0, rel=0.05)
    (composition,) = kept.of(evidence.Composition)
    assert watch.signals.composition is composition
    assert composition.step == watch.signals.cells.step
    assert composition.batches == 6


def test_without_training_examples_what_enters_is_not_known():
    lab = testing.FakeLaboratory.separable()
    lab.data = {"evaluation": lab.data["evaluation"]}
    with Watch(None, every=1, on_diagnosis="log") as watch:
        suspicious(watch)
        experiment(watch, lab)
    assert watch.signals.entering is None
    assert watch.signals.composition is None
    assert any(s.rule == "BN304" for s in watch.skipped)


def test_nothing_is_measured_where_nothing_asks():
    lab = testing.FakeLaboratory.separable()
    with Watch(None, every=1) as watch:
        call(watch)
        watch.step(accuracy=0.5, examples=100)
        watch.evaluation(accuracy=0.5, examples=1000, classes=4)
        experiment(watch, lab)
    assert lab.asked == []


def test_the_last_experiment_is_run_once_a_step():
    lab = testing.FakeLaboratory.separable()
    lab.mean, lab.var = np.full(4, 6.0), np.full(4, 3.0)
    with Watch(None, every=1, on_diagnosis="log") as watch:
        call(watch)
        watch.step()
        experiment(watch, lab, final=True)
        asked = len(lab.asked)
        experiment(watch, lab, final=True)
    assert watch.signals.cells is not None
    assert len(lab.asked) == asked


def test_weights_that_were_swapped_since_are_measured_anew_at_the_end():
    lab, memory = testing.FakeLaboratory.stacked("bn1", "bn2"), MemorySink()
    lab.mean[1] += 3.0
    with Watch(None, every=1, sinks=[memory], on_diagnosis="log") as watch:
        suspicious(watch)
        experiment(watch, lab)
        experiment(watch, lab, final=True, swapped=lambda: True)
    assert [cells.swapped for cells in memory.of(evidence.Cells)] == [None, True]
    assert len(memory.of(evidence.Attribution)) == 2


def test_experiments_false_runs_none():
    lab = testing.FakeLaboratory.separable()
    with Watch(None, every=1, experiments=False) as watch:
        suspicious(watch)
        experiment(watch, lab, final=True)
        assert not watch.wants_look
    assert lab.asked == []
    assert watch.signals.cells is None


def test_looks_are_wanted_until_it_learns():
    watch = Watch(None, every=1)
    assert watch.wants_look
    call(watch)
    watch.evaluation(accuracy=0.5, examples=100, classes=4)
    watch.step(accuracy=0.9, examples=1000)
    assert not watch.wants_look


def test_an_experiment_without_examples_is_bn904():
    lab = testing.FakeLaboratory(np.eye(4), {}, np.zeros(4), np.ones(4))
    with Watch(None, every=1, on_diagnosis="log") as watch:
        suspicious(watch)
        experiment(watch, lab)
        (diagnosis,) = (d for d in watch.diagnoses if d.rule == "BN904")
    assert "evaluation examples" in diagnosis.message
    assert watch.enabled


def test_bn904_clears_when_the_experiment_succeeds():
    empty = testing.FakeLaboratory(np.eye(4), {}, np.zeros(4), np.ones(4))
    with Watch(None, every=1, on_diagnosis="log") as watch:
        suspicious(watch)
        experiment(watch, empty)
        for _ in range(2):
            suspicious(watch)
        experiment(watch, testing.FakeLaboratory.separable())
        suspicious(watch)
    assert [d.state for d in watch.diagnoses if d.rule == "BN904"] == ["cleared"]


@pytest.mark.parametrize("method", ["examples", "outputs", "population", "inputs", "look"])
def test_a_laboratory_that_fails_leaves_the_training_running(method, monkeypatch):
    lab = testing.FakeLaboratory.separable()
    monkeypatch.setattr(lab, method, broken)
    with pytest.warns(BatchNormWarning, match="BN903"), Watch(None, every=1) as watch:
        suspicious(watch)
        if method == "look":
            with watch.guard("looking"):
                watch.look(lab, step=1, epoch=0)
        experiment(watch, lab)
        train(watch)
    assert not watch.enabled
    assert lab.mean.tolist() == [0.0] * 4
    assert [d.rule for d in watch.diagnoses].count("BN903") == 1


def test_a_dead_network_is_looked_through_with_gradients_at_once():
    lab = testing.FakeLaboratory.separable()
    lab.weights = np.zeros_like(lab.weights)
    lab.gradient = 0.0
    watch = Watch(None, every=1, on_diagnosis="log")
    for step in (1, 2):
        watch.look(lab, step=step, epoch=0)
    assert [look.layers[-1].spread for look in watch.signals.looks][-1] == 0.0
    assert [look.layers[-1].gradient for look in watch.signals.looks].count(0.0) >= 1
    assert rules(watch) == ["BN306"]


def test_a_batch_of_one_gives_no_look():
    lab = testing.FakeLaboratory.separable(batches=1, size=1)
    watch = Watch(None, every=1)
    watch.look(lab, step=1, epoch=0)
    assert not watch.signals.looks
    with pytest.raises(evidence.ExperimentNotPossibleError, match="holds one example"):
        evidence.look(lab, step=1, epoch=0, gradients=False)


def replicated(step, apart):
    layer = testing.layer()
    means = (step / 7, step / 7 + apart + 1e-3 * (-1) ** step)
    calls = (testing.call(layer, replica=n, mean=m, running_mean=m) for n, m in enumerate(means))
    return testing.snapshot(step, *calls)


def test_replicas_are_compared_when_they_evaluate_or_else_at_the_end():
    told = []
    for evaluations in (1, 0):
        sink = MemorySink()
        watch = Watch(None, on_diagnosis=told.append, experiments=False, sinks=(sink,))
        watch.silence()
        watch.open(Attachment((testing.layer(),)))
        for step in range(1, 9):
            watch.observe(replicated(step, 1.0))
        assert {s.rule for s in watch.skipped} >= {"BN212"}
        for _ in range(evaluations):
            watch.evaluated(EvaluationRecord(8, 0, 0.5))
        watch.close()
        assert [(one.step, one.layers[0].layer) for one in sink.of(Replicas)] == [(8, "bn")]
        assert [d.rule for d in watch.diagnoses if d.rule == "BN212"] == ["BN212"]
    assert told == []


def test_an_adapter_that_knows_what_replicas_evaluate_with_says_so_itself():
    watch = Watch(None, on_diagnosis="log", sinks=(sink := MemorySink(),))
    watch.compares = False
    watch.open(Attachment((testing.layer(),)))
    for step in range(1, 9):
        watch.observe(replicated(step, 1.0))
    watch.evaluated(EvaluationRecord(8, 0, 0.5))
    assert sink.of(Replicas) == []
    one = np.ones(4)
    watch.compare(step=8, epoch=0, held={"bn": [(one, one)] * 2})
    assert len(sink.of(Replicas)) == 1
    assert not {d.rule for d in watch.diagnoses} & {"BN212"}
    assert not {s.rule for s in watch.skipped} & {"BN212"}
    watch.close()
    assert len(sink.of(Replicas)) == 1


def test_statistics_that_moved_after_the_last_evaluation_are_measured_once_more():
    lab, watch = testing.FakeLaboratory.separable(), Watch(None, on_diagnosis=lambda _: None)
    watch.observe(testing.snapshot(10, testing.call(testing.layer("bn", 4))))
    watch.evaluated(EvaluationRecord(10, 0, 0.25, None, 400, 0.9, None, 400, classes=4))
    watch.experiment(lab, step=10, epoch=0, seconds=None)
    first = watch.signals.cells
    assert first.moved == ()
    watch.experiment(lab, step=10, epoch=0, seconds=None, final=True, moved=lambda: ("bn",))
    second = watch.signals.cells
    assert second is not first
    assert second.moved == ("bn",)
    watch.experiment(lab, step=10, epoch=0, seconds=None, final=True, moved=lambda: ("bn",))
    assert watch.signals.cells is second


def test_weights_that_are_swapped_after_the_last_evaluation_are_measured_once_more():
    lab, watch = testing.FakeLaboratory.separable(), Watch(None, on_diagnosis=lambda _: None)
    watch.observe(testing.snapshot(10, testing.call(testing.layer("bn", 4))))
    watch.evaluated(EvaluationRecord(10, 0, 0.25, None, 400, 0.9, None, 400, classes=4))
    watch.experiment(lab, step=10, epoch=0, seconds=None, swapped=lambda: False)
    assert watch.signals.cells.swapped is False
    lab.mean, lab.var = lab.mean + 5.0, lab.var * 9.0
    watch.experiment(lab, step=10, epoch=0, seconds=None, final=True, swapped=lambda: False)
    first = watch.signals.cells
    watch.experiment(lab, step=10, epoch=0, seconds=None, final=True, swapped=lambda: True)
    assert watch.signals.cells is not first
    assert watch.signals.cells.swapped is True
    second = watch.signals.cells
    watch.experiment(lab, step=10, epoch=0, seconds=None, final=True, swapped=lambda: True)
    assert watch.signals.cells is second
