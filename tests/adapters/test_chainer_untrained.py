"""Models that are evaluated and never trained."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from chainer.training import extensions

import bnwatch.chainer
from bnwatch import Severity

from . import chainer_models as models
from .chainer_models import F, L, chainer, training


def learned() -> Any:
    np.random.seed(0)  # noqa: NPY002
    model = models.MLP(dropout=0.0, width=32)
    models.loop(model, None, chainer.optimizers.Adam(1e-2).setup(model), epochs=12)
    return model


def without_statistics(source: Any) -> Any:
    """Return a new model with the parameters of a trained one, and none of its statistics."""
    model = models.MLP(dropout=0.0, width=32)
    model.copyparams(source, copy_persistent=False)
    return model


def evaluate(model: Any, watch: Any, size: int = 100) -> None:
    xv, tv = models.data(400, seed=1)
    with chainer.using_config("train", False), chainer.no_backprop_mode():
        scores = np.concatenate([model(xv[n : n + size]).array for n in range(0, 400, size)])
        for n in range(0, 400, size):
            F.accuracy(model(xv[n : n + size]), tv[n : n + size])
    watch.evaluation(accuracy=np.mean(scores.argmax(axis=1) == tv), examples=400)


@pytest.mark.parametrize("probe", [False, True])
def test_an_evaluation_by_hand_has_cells_without_a_step(probe: bool) -> None:
    model = without_statistics(learned())
    state = models.state_of(model)
    arguments = {"probe": models.data(400, seed=1)} if probe else {}
    with bnwatch.chainer.watch(model, None, on_diagnosis="log", **arguments) as watch:
        evaluate(model, watch)
    signals = watch.watch.signals
    assert signals.step == 0
    assert signals.samples == 0
    assert signals.attachment.unrestored == ("bn1", "bn2")
    assert signals.cells is not None
    cells = signals.cells.evaluation
    assert cells["running"].examples == 400
    assert cells["batch"].accuracy > cells["running"].accuracy + 0.1
    assert watch.report().complete
    assert not [d for d in watch.diagnoses if d.rule == "BN903"]
    assert models.state_of(model) == state


def test_a_trainer_that_has_nothing_left_to_train(tmp_path: Any) -> None:
    classifier = L.Classifier(without_statistics(learned()))
    optimizer = chainer.optimizers.Adam().setup(classifier)
    iterator = chainer.iterators.SerialIterator(models.dataset(), 32)
    trainer = training.Trainer(training.updaters.StandardUpdater(iterator, optimizer), lambda _: True, str(tmp_path))
    held = chainer.iterators.SerialIterator(models.dataset(400, seed=1), 100, repeat=False, shuffle=False)
    trainer.extend(extensions.Evaluator(held, classifier), call_before_training=True)
    watch = bnwatch.chainer.BatchNormWatch(None, on_diagnosis="log")
    trainer.extend(watch)
    trainer.run()
    signals = watch.watch.signals
    assert signals.step == 0
    assert signals.attachment.unrestored == ("predictor/bn1", "predictor/bn2")
    (evaluation,) = signals.evaluations
    assert (evaluation.step, evaluation.examples) == (0, 400)
    assert signals.cells is not None
    assert evaluation.accuracy == pytest.approx(signals.cells.evaluation["running"].accuracy)
    assert signals.cells.evaluation["batch"].accuracy > signals.cells.evaluation["running"].accuracy + 0.1
    assert not [d for d in watch.diagnoses if d.rule == "BN903"]
    assert not optimizer._hookable._post_update_hooks


def test_a_trained_model_that_is_evaluated_has_no_diagnosis() -> None:
    model = learned()
    with bnwatch.chainer.watch(model, None, on_diagnosis="raise") as watch:
        evaluate(model, watch)
    assert watch.watch.signals.cells is not None
    assert watch.watch.signals.attachment.unrestored == ()
    assert all(diagnosis.severity == Severity.INFO for diagnosis in watch.diagnoses)
