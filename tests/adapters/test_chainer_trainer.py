"""The extension among other extensions, and across snapshots."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import bnwatch.chainer
from bnwatch import BatchNormError

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
        assert [step.step for step in record.steps] == [20, 24, 28, 32]
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


def test_beside_every_standard_extension(tmp_path: Any) -> None:
    classifier = L.Classifier(models.MLP())
    trainer = models.trainer_of(classifier, tmp_path, epochs=2)
    watch = bnwatch.chainer.BatchNormWatch(None, every=1, on_diagnosis="log")
    trainer.extend(watch)
    trainer.extend(extensions.observe_lr())
    trainer.extend(extensions.FailOnNonNumber())
    trainer.extend(extensions.ParameterStatistics(classifier.predictor))
    trainer.extend(extensions.ExponentialShift("alpha", 0.9), trigger=(1, "epoch"))
    trainer.extend(extensions.snapshot_object(classifier, "model"), trigger=(1, "epoch"))
    trainer.run()
    assert watch.report().samples == 16
    assert not [d for d in watch.diagnoses if d.rule == "BN903"]


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
