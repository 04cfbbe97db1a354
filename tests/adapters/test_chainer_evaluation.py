"""Which calls are training and which are evaluation, and what an evaluation is recorded with."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import bnwatch.chainer

from . import chainer_models as models
from .chainer_models import F, L, Record, chainer, extensions, training


@pytest.mark.parametrize("optimizer_given", [False, True])
@pytest.mark.parametrize(
    ("config", "found"),
    [
        ({"train": False, "enable_backprop": False}, ()),
        ({"train": False}, ()),
        ({"enable_backprop": False}, ("bn1", "bn2")),
        ({}, ("bn1", "bn2")),
    ],
)
def test_training_mode_evaluation_in_a_loop(
    config: dict[str, bool], found: tuple[str, ...], optimizer_given: bool, monkeypatch: Any
) -> None:
    record = Record(monkeypatch)
    model = models.MLP()
    optimizer = chainer.optimizers.Adam().setup(model)
    given = optimizer if optimizer_given else None
    with bnwatch.chainer.watch(model, None, optimizer=given, every=1, on_diagnosis="log") as watch:
        models.loop(model, watch, optimizer, epochs=2, evaluation_config=config)
    assert [evaluation.batch_statistics for evaluation in record.evaluations] == [found, found]
    assert {str(call.site) for step in record.steps for call in step.calls} == {"bn1#0", "bn2#0"}
    assert [step.step for step in record.steps] == list(range(1, 17))
    assert any(diagnosis.rule == "BN103" for diagnosis in watch.diagnoses) == bool(found)


def test_evaluation_that_is_not_told_adds_no_call_site(monkeypatch: Any) -> None:
    record = Record(monkeypatch)
    model = models.MLP()
    (x, t), optimizer = models.data(64), chainer.optimizers.Adam().setup(model)
    with bnwatch.chainer.watch(model, None, every=1, on_diagnosis="log") as watch:
        for _ in range(4):
            model(x)  # evaluated in training mode, and nobody says so
            model.cleargrads()
            F.softmax_cross_entropy(model(x), t).backward()
            optimizer.update()
            watch.step()
    assert {str(call.site) for step in record.steps for call in step.calls} == {"bn1#0", "bn2#0"}
    assert [step.calls[0].running.updates for step in record.steps] == [2, 4, 6, 8]


def test_forget_is_training(monkeypatch: Any) -> None:
    class Forgetful(models.MLP):
        def forward(self, x: Any) -> Any:
            return F.forget(super().forward, x)

    record = Record(monkeypatch)
    model = Forgetful(dropout=0.0)
    with bnwatch.chainer.watch(model, None, every=1, on_diagnosis="log") as watch:
        models.loop(model, watch, epochs=1)
    assert {str(call.site) for step in record.steps for call in step.calls} == {"bn1#0", "bn2#0"}
    assert record.evaluations[0].batch_statistics == ()


class TrainingEvaluator(extensions.Evaluator):
    def evaluate(self) -> Any:
        with chainer.using_config("train", True):
            return super().evaluate()


@pytest.mark.parametrize(("evaluator", "found"), [(extensions.Evaluator, 0), (TrainingEvaluator, 2)])
def test_training_mode_evaluation_in_a_trainer(evaluator: Any, found: int, tmp_path: Any, monkeypatch: Any) -> None:
    record = Record(monkeypatch)
    classifier = L.Classifier(models.MLP())
    trainer = models.trainer_of(classifier, tmp_path, epochs=2, evaluate=False)
    iterator = chainer.iterators.SerialIterator(models.dataset(200, seed=1), 64, repeat=False, shuffle=False)
    trainer.extend(evaluator(iterator, classifier))
    trainer.extend(lambda _: classifier.predictor(models.data()[0]), name="stray", priority=50)  # in training mode
    watch = bnwatch.chainer.BatchNormWatch(None, every=1, on_diagnosis="log")
    trainer.extend(watch)
    trainer.run()
    assert [len(evaluation.batch_statistics) for evaluation in record.evaluations] == [found, found]
    assert {str(call.site) for step in record.steps for call in step.calls} == {"predictor/bn1#0", "predictor/bn2#0"}
    assert [step.step for step in record.steps] == list(range(1, 17))
    assert [step.epoch for step in record.steps] == [0] * 8 + [1] * 8


def test_what_a_trainers_evaluation_is_recorded_with(tmp_path: Any, monkeypatch: Any) -> None:
    record = Record(monkeypatch)
    trainer = models.trainer_of(models.MLP(), tmp_path, epochs=2)
    seen: list[Any] = []
    trainer.extend(lambda trainer: seen.append(dict(trainer.observation)), name="seen", priority=250)
    trainer.extend(bnwatch.chainer.BatchNormWatch(None, every=1, on_diagnosis="log"))
    trainer.run()
    labels = models.data(200, seed=1)[1]
    for epoch, evaluation in enumerate(record.evaluations):
        rows = seen[8 * epoch : 8 * epoch + 8]
        assert (evaluation.step, evaluation.epoch) == (8 * epoch + 8, epoch)
        assert evaluation.accuracy == pytest.approx(float(rows[-1]["validation/main/accuracy"]))
        assert evaluation.loss == pytest.approx(float(rows[-1]["validation/main/loss"]))
        assert evaluation.train_accuracy == pytest.approx(np.mean([float(row["main/accuracy"].array) for row in rows]))
        assert evaluation.train_loss == pytest.approx(np.mean([float(row["main/loss"].array) for row in rows]))
        assert (evaluation.examples, evaluation.train_examples, evaluation.classes) == (200, 256, models.CLASSES)
        assert evaluation.majority == pytest.approx(np.bincount(labels).max() / 200)


def test_what_a_loops_evaluation_is_recorded_with(monkeypatch: Any) -> None:
    record = Record(monkeypatch)
    model = models.MLP()
    with bnwatch.chainer.watch(model, None, every=1, on_diagnosis="log") as watch:
        models.loop(model, watch, epochs=2)
    assert [(e.step, e.epoch, e.examples, e.train_examples) for e in record.evaluations] == [
        (8, 0, 200, 256),
        (16, 1, 200, 256),
    ]
    assert record.evaluations[0].classes == models.CLASSES
    assert record.evaluations[0].majority is not None
    assert [step.examples for step in record.steps] == [32 * n for n in range(1, 9)] * 2
    assert all(0 <= step.accuracy <= 1 for step in record.steps)


def test_an_optimizer_ends_the_steps_and_a_classifier_has_its_accuracy(monkeypatch: Any) -> None:
    record = Record(monkeypatch)
    model = L.Classifier(models.MLP())
    optimizer = chainer.optimizers.Adam().setup(model)
    x, t = models.data(64)
    with bnwatch.chainer.watch(model, None, optimizer=optimizer, every=1, on_diagnosis="log") as watch:
        for _ in range(3):
            optimizer.update(model, x, t)
            last = float(model.accuracy.array)
    assert [step.step for step in record.steps] == [1, 2, 3]
    assert record.steps[0].accuracy is not None
    assert abs(3 * record.steps[2].accuracy - 2 * record.steps[1].accuracy - last) < 1e-6
    assert watch.report().steps == 3


def test_several_models_of_a_trainer_are_told_apart(tmp_path: Any, monkeypatch: Any) -> None:
    record = Record(monkeypatch)
    left, right = models.MLP(), models.MLP()
    optimizers = {name: chainer.optimizers.Adam().setup(m) for name, m in (("left", left), ("right", right))}

    class Both(training.updaters.StandardUpdater):
        def update_core(self) -> None:
            x, t = chainer.dataset.concat_examples(self.get_iterator("main").next())
            loss = F.softmax_cross_entropy(left(x) + right(x), t)
            for optimizer in optimizers.values():
                optimizer.target.cleargrads()
            loss.backward()
            for optimizer in optimizers.values():
                optimizer.update()

    updater = Both(chainer.iterators.SerialIterator(models.dataset(), 32), optimizers)
    trainer = training.Trainer(updater, (4, "iteration"), out=str(tmp_path))
    trainer.extend(bnwatch.chainer.BatchNormWatch(None, on_diagnosis="log"))
    trainer.run()
    assert [call.spec.path for call in record.steps[0].calls] == ["left/bn1", "left/bn2", "right/bn1", "right/bn2"]
