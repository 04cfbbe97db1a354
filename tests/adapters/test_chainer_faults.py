"""Whatever fails inside bnwatch, the training goes on, ends as it would have, and hears of it once."""

from __future__ import annotations

import os
import pickle
from typing import Any

import numpy as np
import pytest

import bnwatch.chainer
from bnwatch import BatchNormError
from bnwatch.chainer import changes, evaluators, examples, experiments, forward, layers, session, tap
from bnwatch.watch import Watch

from . import chainer_models as models
from .chainer_models import L, chainer, state_of


class BrokenError(Exception):
    pass


def broken(*_: Any, **__: Any) -> Any:
    msg = "injected"
    raise BrokenError(msg)


SEAMS = [
    (Watch, "open"),
    (Watch, "observe"),
    (Watch, "evaluated"),
    (Watch, "experiment"),
    (Watch, "due"),
    (layers.Layers, "find"),
    (layers.Layers, "__post_init__"),
    (layers.Layers, "unrestored"),
    (layers.Layer, "spec"),
    (changes.Changes, "read"),
    (changes.Changes, "left"),
    (changes.Changes, "called"),
    (changes.Changes, "evaluated"),
    (forward.Stack, "outermost"),
    (forward.Stack, "__init__"),
    (examples.ForwardPasses, "scored"),
    (examples.ForwardPasses, "end_step"),
    (examples.KeptExamples, "add"),
    (tap.Tap, "take"),
    (tap.Tally, "add"),
    (session, "collect"),
    (session.Session, "start"),
    (experiments.ChainerLaboratory, "__init__"),
]
TRAINER_SEAMS = [(evaluators.Evaluators, "__init__"), (evaluators.Evaluators, "report")]


def by_trainer(out: Any, *, watched: bool) -> tuple[dict[str, bytes], Any]:
    np.random.seed(3)  # noqa: NPY002
    classifier = L.Classifier(models.MLP())
    trainer = models.trainer_of(classifier, out)
    watch = bnwatch.chainer.BatchNormWatch(None, every=2, on_diagnosis="log") if watched else None
    if watch is not None:
        trainer.extend(watch)
    trainer.run()
    optimizer = trainer.updater.get_optimizer("main")
    assert not optimizer._hookable._post_update_hooks
    return state_of(classifier, optimizer), watch


def said(watch: Any) -> list[str]:
    assert not chainer.get_function_hooks()
    return [diagnosis.message for diagnosis in watch.diagnoses if diagnosis.rule == "BN903"]


@pytest.mark.parametrize(("place", "name"), SEAMS)
def test_a_loop_goes_on(place: Any, name: str, monkeypatch: Any) -> None:
    expected, _, _ = models.by_hand(models.MLP, watched=False)
    monkeypatch.setattr(place, name, broken)
    found, watch, _ = models.by_hand(models.MLP, watched=True)
    assert found == expected
    assert len(said(watch)) == 1
    assert "injected" in said(watch)[0]


@pytest.mark.parametrize(
    ("place", "name"), [*SEAMS, *TRAINER_SEAMS], ids=lambda value: getattr(value, "__name__", value)
)
def test_a_trainer_goes_on(place: Any, name: str, monkeypatch: Any, tmp_path: Any) -> None:
    expected, _ = by_trainer(tmp_path / "a", watched=False)
    monkeypatch.setattr(place, name, broken)
    found, watch = by_trainer(tmp_path / "b", watched=True)
    assert found == expected
    assert len(said(watch)) == 1


@pytest.mark.parametrize("name", ["outputs", "look", "population", "examples"])
def test_a_laboratory_that_fails(name: str, monkeypatch: Any, tmp_path: Any) -> None:
    expected, _ = by_trainer(tmp_path / "a", watched=False)
    monkeypatch.setattr(experiments.ChainerLaboratory, name, broken)
    found, watch = by_trainer(tmp_path / "b", watched=True)
    assert found == expected
    assert len(said(watch)) == 1


def test_a_diagnosis_is_raised_only_where_asked_for() -> None:
    np.random.seed(0)  # noqa: NPY002
    model = models.MLP(shared=True)
    with pytest.raises(BatchNormError), bnwatch.chainer.watch(model, None, on_diagnosis="raise") as watch:
        models.loop(model, watch, evaluation_config={})
    assert not chainer.get_function_hooks()


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"every": 0}, "every must be"),
        ({"allow": {"BN101": ""}}, "BN101"),
        ({"allow": {"BN999": "why"}}, "BN999"),
        ({"probe": 3}, "probe must be"),
        ({"on_diagnosis": "shout"}, "on_diagnosis must be"),
        ({"experiments": "never"}, "experiments must be"),
        ({"log_dir": 3}, "log_dir must be"),
    ],
)
def test_bad_arguments_are_one_sentence(arguments: dict[str, Any], sentence: str) -> None:
    arguments = {"log_dir": None, **arguments}
    for front_door in (bnwatch.chainer.BatchNormWatch, lambda *a, **k: bnwatch.chainer.watch(models.MLP(), *a, **k)):
        with pytest.raises(ValueError, match=sentence) as caught:
            front_door(arguments["log_dir"], **{k: v for k, v in arguments.items() if k != "log_dir"})
        assert "\n" not in str(caught.value)


def test_what_a_loop_asks_for() -> None:
    for model, got in (
        (3, "int"),
        ({}, "an empty one"),
        ({"": models.MLP()}, "MLP by the name ''"),
        ({3: models.MLP()}, "MLP by the name 3"),
        ({"gen": models.MLP(), "dis": None}, "NoneType by the name 'dis'"),
    ):
        with pytest.raises(ValueError, match=rf"model must be a chainer\.Link or a dict of them by name, got {got}$"):
            bnwatch.chainer.watch(model, None)
    with pytest.raises(ValueError, match=r"call optimizer\.setup"):
        bnwatch.chainer.watch(models.MLP(), None, optimizer=chainer.optimizers.Adam())
    watch = bnwatch.chainer.watch(models.MLP(), None)
    with pytest.raises(RuntimeError, match="use it as `with"):
        watch.step()


def test_without_batch_normalization_there_is_bn902() -> None:
    model = chainer.Sequential(L.Linear(models.FEATURES, 8), L.Linear(8, models.CLASSES))
    with bnwatch.chainer.watch(model, None, on_diagnosis="log") as watch:
        models.loop(model, watch)
    assert "BN902" in {diagnosis.rule for diagnosis in watch.diagnoses}
    assert "BN903" not in {diagnosis.rule for diagnosis in watch.diagnoses}


def test_a_directory_that_cannot_be_written_is_one_warning(tmp_path: Any) -> None:
    (tmp_path / "file").write_text("")
    model = models.MLP()
    watch = bnwatch.chainer.watch(model, tmp_path / "file" / "runs", experiments=False)
    with pytest.warns(bnwatch.BatchNormWarning, match="cannot write"), watch:
        models.loop(model, watch, epochs=1)
    assert watch.report().steps == 8


def test_the_model_and_the_extension_can_be_copied_while_watched() -> None:
    model = models.MLP()
    with bnwatch.chainer.watch(model, None, on_diagnosis="log") as watch:
        pickle.loads(pickle.dumps(model))  # noqa: S301
        model.copy("init")
        models.loop(model, watch, epochs=1)
    assert watch.report().samples


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_child_is_left_alone() -> None:
    model = models.MLP()
    with bnwatch.chainer.watch(model, None, on_diagnosis="log") as watch:
        model(models.data()[0])
        child = os.fork()
        if child == 0:
            model(models.data()[0])
            os._exit(len(watch._session.tap.take()))
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        assert len(watch._session.tap.take()) == 2
