"""Layers that a training step calls in inference mode."""

from __future__ import annotations

from typing import Any

import pytest

import bnwatch.chainer

from . import chainer_models as models
from .chainer_models import F, L, chainer, training

BOTH = ("bn1", "bn2")


@pytest.fixture
def record(monkeypatch: pytest.MonkeyPatch) -> models.Record:
    return models.Record(monkeypatch)


class Half(models.MLP):
    """The first normalized layer infers while the rest trains, as a frozen backbone does."""

    def __init__(self, *, cut: bool = False, **arguments: Any) -> None:
        super().__init__(**arguments)
        self._cut = cut

    def forward(self, x: Any) -> Any:
        with chainer.using_config("train", False):
            h = F.relu(self.bn1(self.l1(x)))
        if self._cut:
            h.unchain_backward()
        return self.l3(F.relu(self.bn2(self.l2(h))))


class Inferring(training.updaters.StandardUpdater):
    def update_core(self) -> None:
        with chainer.using_config("train", False):
            super().update_core()


class CountsFirst(Inferring):
    """An updater that counts before it updates."""

    def update(self) -> None:
        self.iteration += 1
        self.update_core()


def train(model: Any, tmp_path: Any, updater: Any = training.updaters.StandardUpdater, *, every: int = 1) -> Any:
    """Train for three epochs with an evaluator; return the watch."""
    classifier = L.Classifier(model)
    optimizer = chainer.optimizers.Adam().setup(classifier)
    iterator = chainer.iterators.SerialIterator(models.dataset(), 64)
    trainer = training.Trainer(updater(iterator, optimizer), (3, "epoch"), out=str(tmp_path))
    held = chainer.iterators.SerialIterator(models.dataset(200, seed=1), 100, repeat=False, shuffle=False)
    trainer.extend(training.extensions.Evaluator(held, classifier))
    watch = bnwatch.chainer.BatchNormWatch(None, every=every, on_diagnosis="log")
    trainer.extend(watch)
    trainer.run()
    assert not [d for d in watch.diagnoses if d.rule == "BN903"]
    return watch


def in_classifier(*paths: str) -> tuple[str, ...]:
    return tuple(f"predictor/{path}" for path in paths)


@pytest.mark.parametrize("updater", [Inferring, CountsFirst])
def test_a_trainer_that_updates_in_inference_mode(tmp_path: Any, record: models.Record, updater: Any) -> None:
    train(models.MLP(), tmp_path, updater)
    assert [step.step for step in record.steps] == list(range(1, 13))
    assert {step.idle for step in record.steps} == {in_classifier(*BOTH)}
    assert not any(step.calls for step in record.steps)
    assert record.evaluations[0].batch_statistics == ()


@pytest.mark.parametrize(("cut", "idle"), [(False, ("bn1",)), (True, ())])
def test_a_part_that_infers_counts_where_gradients_pass_it(
    tmp_path: Any, record: models.Record, cut: bool, idle: Any
) -> None:
    train(Half(cut=cut), tmp_path)
    assert {step.idle for step in record.steps} == {in_classifier(*idle)}
    assert {call.site.layer for step in record.steps for call in step.calls} == set(in_classifier("bn2"))


def test_a_healthy_trainer_has_no_idle_layer(tmp_path: Any, record: models.Record) -> None:
    train(models.MLP(), tmp_path)
    assert {step.idle for step in record.steps} == {()}
    assert all(step.calls for step in record.steps)


def test_gradients_are_followed_on_sampled_steps_alone(tmp_path: Any) -> None:
    trainer = models.trainer_of(models.MLP(), tmp_path)
    watch = bnwatch.chainer.BatchNormWatch(None, every=4, on_diagnosis="log")
    trainer.extend(watch)
    followed = []

    def note(trainer: Any) -> None:
        followed.append("backward_preprocess" in vars(watch._session.tap))
        assert followed[-1] is watch.watch.due(trainer.updater.iteration + 1)

    trainer.extend(note, trigger=(1, "iteration"), priority=0)
    trainer.run()
    assert set(followed) == {False, True}


def test_a_link_of_ones_own_that_never_trains_is_idle_and_not_unseen(tmp_path: Any, record: models.Record) -> None:
    train(models.MLP(bn=models.Written), tmp_path, Inferring)
    assert record.steps[-1].idle == in_classifier(*BOTH)
    assert not record.attachments[-1].unsupported


def loop(model: Any, *, config: dict[str, bool], adversarial: bool = False, given: bool = False) -> None:
    """Train by hand under a configuration, and evaluate between the steps in the ways that people do."""
    (x, t), (xv, _) = models.data(128), models.data(50, seed=1)
    optimizer = chainer.optimizers.Adam().setup(model)
    arguments = {"optimizer": optimizer} if given else {}
    with bnwatch.chainer.watch(model, None, every=1, on_diagnosis="log", **arguments) as watch:
        for start in range(0, 128, 32):
            if adversarial:  # the gradient of the inputs, in inference mode, before the step proper
                with chainer.using_config("train", False):
                    inputs = chainer.Variable(x[start : start + 32])
                    F.softmax_cross_entropy(model(inputs), t[start : start + 32]).backward()
            with chainer.using_config("train", config.get("train", True)):
                loss = F.softmax_cross_entropy(model(x[start : start + 32]), t[start : start + 32])
                model.cleargrads()
                loss.backward()
                optimizer.update()
            if not given:
                watch.step()
            with chainer.using_config("train", False):
                model(xv)
                with chainer.no_backprop_mode():
                    model(xv)
        watch.evaluation(accuracy=0.5, examples=50)
    assert not [d for d in watch.diagnoses if d.rule == "BN903"]


@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("adversarial", [False, True])
def test_evaluations_between_steps_make_no_layer_idle(record: models.Record, adversarial: bool, given: bool) -> None:
    loop(models.MLP(), config={}, adversarial=adversarial, given=given)
    assert [step.idle for step in record.steps] == [()] * 4
    assert all(len(step.calls) == 2 for step in record.steps)


@pytest.mark.parametrize("given", [False, True])
def test_a_loop_that_trains_in_inference_mode(record: models.Record, given: bool) -> None:
    loop(models.MLP(), config={"train": False}, given=given)
    assert [(step.idle, step.calls) for step in record.steps] == [(BOTH, ())] * 4


def test_a_loop_in_which_a_part_infers(record: models.Record) -> None:
    loop(Half(), config={})
    assert [step.idle for step in record.steps] == [("bn1",)] * 4
    assert all(len(step.calls) == 1 for step in record.steps)


def test_recomputed_passes_are_seen_where_gradients_pass(record: models.Record) -> None:
    class Forgetful(models.MLP):
        def forward(self, x: Any) -> Any:
            return F.forget(super().forward, chainer.as_variable(x))

    (x, t), model = models.data(32), Forgetful(dropout=0.0)
    optimizer = chainer.optimizers.Adam().setup(model)
    with bnwatch.chainer.watch(model, None, every=1, on_diagnosis="log") as watch:
        with chainer.using_config("train", False):
            loss = F.softmax_cross_entropy(model(chainer.Variable(x)), t)
            model.cleargrads()
            loss.backward()
        optimizer.update()
        watch.step()
    assert record.steps[0].idle == BOTH
