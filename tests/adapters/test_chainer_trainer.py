"""The extension among other extensions, and across snapshots."""

from __future__ import annotations

import contextlib
import io
import json
import warnings
from typing import Any

import numpy as np
import pytest

import bnwatch.chainer
from bnwatch import BatchNormError, BatchNormWarning
from bnwatch.sinks.tensorboard import read_runs

from . import chainer_models as models
from .chainer_models import L, Record, chainer, extensions, state_of


def test_its_manners() -> None:
    watch = bnwatch.chainer.BatchNormWatch(None)
    assert watch.trigger(None) is True
    assert extensions.Evaluator.priority > watch.priority > extensions.LogReport.priority
    assert watch.default_name == "BatchNormWatch"


def run(out: Any, epochs: int, *, watched: bool, load: Any = None, save: bool = False) -> tuple[Any, Any]:
    np.random.seed(5)  # noqa: NPY002
    classifier = L.Classifier(models.MLP(dropout=0.0))
    trainer = models.trainer_of(classifier, out, epochs=epochs)
    if watched:
        trainer.extend(bnwatch.chainer.BatchNormWatch(None, every=4, on_diagnosis="log"))
    if save:
        trainer.extend(extensions.snapshot(filename="snapshot"), trigger=(2, "epoch"))
    if load:
        chainer.serializers.load_npz(load, trainer)
        np.random.seed(6)  # noqa: NPY002 - a snapshot does not hold the state of the generator
    trainer.run()
    return classifier, trainer


@pytest.mark.parametrize(("first", "second"), [(True, True), (False, True), (True, False)])
def test_snapshots_load_with_and_without(first: bool, second: bool, tmp_path: Any, monkeypatch: Any) -> None:
    run(tmp_path / "plain", 2, watched=False, save=True)
    expected, _ = run(tmp_path / "plain", 4, watched=False, load=tmp_path / "plain" / "snapshot")
    run(tmp_path / "other", 2, watched=first, save=True)
    record = Record(monkeypatch)
    found, trainer = run(tmp_path / "other", 4, watched=second, load=tmp_path / "other" / "snapshot")
    assert trainer.updater.iteration == 32
    assert state_of(found) == state_of(expected)
    with np.load(tmp_path / "plain" / "snapshot") as plain, np.load(tmp_path / "other" / "snapshot") as other:
        assert set(plain.files) == set(other.files)
    if second:
        # the first one, since it tells whether parameters move after a step
        assert [step.step for step in record.steps] == [17, 21, 24, 29, 32]
        assert {call.running.updates for step in record.steps for call in step.calls} == {None}


def test_an_error_in_training_ends_the_watch(tmp_path: Any, monkeypatch: Any) -> None:
    record = Record(monkeypatch)
    trainer = models.trainer_of(models.MLP(), tmp_path)
    watch = bnwatch.chainer.BatchNormWatch(None, on_diagnosis="log")
    trainer.extend(watch)

    def fail(trainer: Any) -> None:
        if trainer.updater.iteration == 5:
            raise ZeroDivisionError

    trainer.extend(fail, name="fail")
    with pytest.raises(ZeroDivisionError):
        trainer.run(show_loop_exception_msg=False)
    assert not chainer.get_function_hooks()
    assert [step.step for step in record.steps] == [1, 2, 3, 4, 5]
    assert watch.watch.signals.cells is None


def test_a_diagnosis_can_stop_the_training(tmp_path: Any) -> None:
    np.random.seed(0)  # noqa: NPY002
    trainer = models.trainer_of(models.MLP(shared=True), tmp_path, epochs=20)
    trainer.extend(bnwatch.chainer.BatchNormWatch(None, on_diagnosis="raise"))
    with pytest.raises(BatchNormError, match="BN"):
        trainer.run(show_loop_exception_msg=False)
    assert not chainer.get_function_hooks()


def test_two_watches_side_by_side(tmp_path: Any) -> None:
    trainer = models.trainer_of(models.MLP(), tmp_path)
    watches = [bnwatch.chainer.BatchNormWatch(tmp_path / name, on_diagnosis="log") for name in "ab"]
    for watch in watches:
        trainer.extend(watch)
    trainer.run()
    assert {"BatchNormWatch", "BatchNormWatch_1"} <= set(trainer._extensions)
    assert [watch.report().steps for watch in watches] == [24, 24]
    assert list((tmp_path / "a").rglob("events.out.tfevents.*"))


def evaluator_of(model: Any, *, name: str | None = None) -> Any:
    iterator = chainer.iterators.SerialIterator(models.dataset(100, seed=2), 50, repeat=False, shuffle=False)
    evaluator = extensions.Evaluator(iterator, model)
    evaluator.name = name
    return evaluator


def with_matplotlib(make: Any) -> Any:
    def made(model: Any) -> Any:
        pytest.importorskip("matplotlib", reason="matplotlib is not installed: these extensions do nothing without it")
        return make(model)

    return made


STANDARD: dict[str, Any] = {
    "Evaluator": lambda model: evaluator_of(model, name="test"),
    "DumpGraph": lambda _: extensions.DumpGraph("main/loss", filename="graph.dot"),
    "FailOnNonNumber": lambda _: extensions.FailOnNonNumber(),
    "ParameterStatistics": lambda model: extensions.ParameterStatistics(model.predictor),
    "VariableStatisticsPlot": with_matplotlib(
        lambda model: extensions.VariableStatisticsPlot(list(model.params()), trigger=(1, "epoch"))
    ),
    "PlotReport": with_matplotlib(lambda _: extensions.PlotReport(["main/loss"], trigger=(1, "epoch"))),
    "PrintReport": lambda _: extensions.PrintReport(["epoch", "main/loss"], out=io.StringIO()),
    "ProgressBar": lambda _: extensions.ProgressBar(update_interval=1, out=io.StringIO()),
    "LogReport": lambda _: extensions.LogReport(trigger=(1, "iteration"), filename="other"),
    "MicroAverage": lambda _: extensions.MicroAverage("right", "seen", "share", trigger=(1, "epoch")),
    "observe_lr": lambda _: extensions.observe_lr(),
    "observe_value": lambda _: extensions.observe_value("steps", lambda trainer: trainer.updater.iteration),
    "snapshot": lambda _: extensions.snapshot(filename="snapshot_{.updater.iteration}"),
    "snapshot_object": lambda model: extensions.snapshot_object(model, "model"),
    "ExponentialShift": lambda _: extensions.ExponentialShift("alpha", 0.9),
    "LinearShift": lambda _: extensions.LinearShift("alpha", (1e-3, 1e-4), (2, 10)),
    "InverseShift": lambda _: extensions.InverseShift("alpha", 0.1, 0.5),
    "PolynomialShift": lambda _: extensions.PolynomialShift("alpha", 0.5, 16),
    "StepShift": lambda _: extensions.StepShift("alpha", 0.5, 4),
    "MultistepShift": lambda _: extensions.MultistepShift("alpha", 0.5, [4, 8], 1e-3),
    "WarmupShift": lambda _: extensions.WarmupShift("alpha", 1e-4, 4, 1e-3),
    "unchain_variables": lambda _: extensions.unchain_variables(),
}


def test_every_standard_extension_is_listed() -> None:
    found = {name for name, value in vars(extensions).items() if not name.startswith("_") and callable(value)}
    # `dump_graph` is the older name of one, the others serve a decorator or a test
    assert found - {"dump_graph"} == set(STANDARD)


def with_extensions(names: Any, out: Any, *, watched: bool, hook: Any = contextlib.nullcontext) -> Any:
    """Train and return everything that stays, and what is logged."""
    np.random.seed(7)  # noqa: NPY002
    classifier = L.Classifier(models.MLP())
    trainer = models.trainer_of(classifier, out, epochs=2)
    watch = bnwatch.chainer.BatchNormWatch(out / "runs", every=1, on_diagnosis="log") if watched else None
    if watch is not None:
        trainer.extend(watch)
    for key in ("right", "seen"):
        trainer.extend(extensions.observe_value(key, lambda trainer: trainer.updater.iteration), name=key)
    for name in names:
        trainer.extend(STANDARD[name](classifier))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=DeprecationWarning)  # those of Chainer's own extensions
        with hook():
            trainer.run(show_loop_exception_msg=False)
    if watch is not None:
        assert watch.report().samples == 16
        assert watch.report().evaluations == 2
        assert not [d for d in watch.diagnoses if d.rule == "BN903"]
    assert not chainer.get_function_hooks()
    log = json.loads((out / "log").read_text())
    for entry in log:
        del entry["elapsed_time"]
    return state_of(classifier, trainer.updater.get_optimizer("main")), log


ALTOGETHER = sorted(STANDARD.keys() - {"VariableStatisticsPlot", "PlotReport"})


@pytest.mark.parametrize("names", [*([name] for name in STANDARD), ALTOGETHER], ids=lambda names: "+".join(names)[:30])
def test_beside_every_standard_extension(names: Any, tmp_path: Any) -> None:
    watched = with_extensions(names, tmp_path / "a", watched=True)
    assert watched == with_extensions(names, tmp_path / "b", watched=False)


@pytest.mark.parametrize("hook", ["TimerHook", "PrintHook", "CUDAProfileHook", "CupyMemoryProfileHook"])
def test_inside_function_hooks(hook: str, tmp_path: Any, capsys: Any) -> None:
    if hook.upper().startswith("CU") and not chainer.backends.cuda.available:
        pytest.skip("the hook needs CuPy")
    make = getattr(chainer.function_hooks, hook)
    watched = with_extensions([], tmp_path / "a", watched=True, hook=make)
    assert watched == with_extensions([], tmp_path / "b", watched=False, hook=make)
    capsys.readouterr()


def test_one_extension_object_in_a_second_trainer(tmp_path: Any) -> None:
    watch = bnwatch.chainer.BatchNormWatch(tmp_path / "runs", every=1, on_diagnosis="log")
    for epochs in (2, 1):
        trainer = models.trainer_of(models.MLP(), tmp_path, epochs=epochs)
        trainer.extend(watch)
        trainer.run()
        assert (watch.report().steps, watch.report().samples) == (8 * epochs, 8 * epochs)
        with pytest.raises(RuntimeError, match="multiple times"):
            trainer.run()
    (run,) = read_runs(tmp_path / "runs")
    assert (run.report.steps, len(run.tables), run.report.complete) == (8, 8, True)
    assert not chainer.get_function_hooks()


def test_one_extension_object_twice_in_a_trainer(tmp_path: Any) -> None:
    watch = bnwatch.chainer.BatchNormWatch(None, every=1, on_diagnosis="log")
    trainer = models.trainer_of(models.MLP(), tmp_path, epochs=1)
    trainer.extend(watch)
    trainer.extend(watch, name="again")
    trainer.run()
    assert watch.report().samples == 8
    assert not [d for d in watch.diagnoses if d.rule == "BN903"]
    assert not chainer.get_function_hooks()


def test_an_extension_that_fails_to_initialize_leaves_no_hook_for_the_next_training(tmp_path: Any) -> None:
    def fail(_: Any) -> None:
        raise ZeroDivisionError

    trainer = models.trainer_of(models.MLP(), tmp_path)
    trainer.extend(bnwatch.chainer.BatchNormWatch(None))
    trainer.extend(chainer.training.make_extension(initializer=fail)(lambda _: None), name="fail")
    with pytest.raises(ZeroDivisionError):
        trainer.run()
    other = models.trainer_of(models.MLP(), tmp_path, epochs=1)
    hooks: list[int] = []
    other.extend(lambda _: hooks.append(len(chainer.get_function_hooks())), name="count", trigger=lambda _: True)
    other.extend(bnwatch.chainer.BatchNormWatch(None, on_diagnosis="log"))
    other.run()
    assert set(hooks) == {1}
    assert not chainer.get_function_hooks()


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, ZeroDivisionError])
def test_however_the_training_is_cut_off(error: Any, tmp_path: Any) -> None:
    trainer = models.trainer_of(models.MLP(), tmp_path)
    watch = bnwatch.chainer.BatchNormWatch(tmp_path / "runs", on_diagnosis="log")
    trainer.extend(watch)

    def fail(trainer: Any) -> None:
        if trainer.updater.iteration == 5:
            raise error

    trainer.extend(fail, name="fail", trigger=lambda _: True)
    with pytest.raises(error):
        trainer.run(show_loop_exception_msg=False)
    assert not chainer.get_function_hooks()
    assert watch.watch.signals.cells is None
    (run,) = read_runs(tmp_path / "runs")
    assert (run.report.steps, run.report.complete) == (5, True)


@pytest.mark.parametrize("trigger", [(1, "epoch"), (2, "iteration"), lambda _: True])
def test_a_trigger_of_the_users_is_refused_in_a_sentence(trigger: Any, tmp_path: Any) -> None:
    trainer = models.trainer_of(models.MLP(), tmp_path)
    watch = bnwatch.chainer.BatchNormWatch(tmp_path / "runs")
    trainer.extend(watch, trigger=trigger)
    with pytest.warns(BatchNormWarning, match="leave out trigger= in trainer.extend") as caught:
        trainer.run()
    assert len(caught) == 1
    assert not (tmp_path / "runs").exists()
    assert not chainer.get_function_hooks()


def test_a_trigger_that_fires_in_every_iteration_is_none(tmp_path: Any) -> None:
    trainer = models.trainer_of(models.MLP(), tmp_path, epochs=1)
    watch = bnwatch.chainer.BatchNormWatch(None, every=1, on_diagnosis="log")
    trainer.extend(watch, trigger=(1, "iteration"), name="mine", priority=150)
    trainer.run()
    assert watch.report().samples == 8
    assert trainer.get_extension("mine") is watch


def test_an_evaluator_that_runs_later_is_told_of(tmp_path: Any) -> None:
    trainer = models.trainer_of(models.MLP(), tmp_path, epochs=1)
    watch = bnwatch.chainer.BatchNormWatch(None, on_diagnosis="log")
    trainer.extend(watch, priority=400)
    with pytest.warns(BatchNormWarning, match="sees no evaluation of 'validation', which runs after it") as caught:
        trainer.run()
    assert len(caught) == 1
    assert watch.report().evaluations == 0


def test_what_joins_while_training_runs_is_never_called(tmp_path: Any) -> None:
    watch = bnwatch.chainer.BatchNormWatch(None)
    trainer = models.trainer_of(models.MLP(), tmp_path, epochs=1)
    trainer.extend(lambda trainer: trainer.extend(watch), name="late", trigger=(4, "iteration"))
    trainer.run()
    assert watch.report().steps == 0


def test_observed_keys_are_those_without_a_watch(tmp_path: Any) -> None:
    keys: list[set[str]] = []
    for watched in (False, True):
        trainer = models.trainer_of(models.MLP(), tmp_path, epochs=1)
        if watched:
            trainer.extend(bnwatch.chainer.BatchNormWatch(None, on_diagnosis="log"))
        seen: set[str] = set()
        trainer.extend(lambda trainer, seen=seen: seen.update(trainer.observation), name="seen", priority=-100)
        trainer.run()
        keys.append(seen)
    assert keys[0] == keys[1]
