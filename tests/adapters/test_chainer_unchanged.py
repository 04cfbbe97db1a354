"""A watched run ends as the unwatched one, to the byte: parameters, statistics, optimizer, random numbers, log."""

from __future__ import annotations

import copy
import json
import pickle
from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest

import bnwatch.chainer

from . import chainer_models as models
from .chainer_models import F, L, chainer, state_of


def by_hand(model: Any, *, watched: bool, optimizer_given: bool = False) -> dict[str, bytes]:
    np.random.seed(3)  # noqa: NPY002
    model = model()
    optimizer = chainer.optimizers.Adam().setup(model)
    if not watched:
        models.loop(model, None, optimizer)
    else:
        given = optimizer if optimizer_given else None
        with bnwatch.chainer.watch(model, None, optimizer=given, every=2, on_diagnosis="log") as watching:
            models.loop(model, watching, optimizer)
        assert watching.report().samples > 5
        assert not [d for d in watching.diagnoses if d.rule == "BN903"]
    assert not chainer.get_function_hooks()
    assert optimizer._hookable._post_update_hooks == {}
    return state_of(model, optimizer)


@pytest.mark.parametrize("model", [models.MLP, lambda: models.MLP(shared=True), models.CNN, models.OldMLP])
@pytest.mark.parametrize("optimizer_given", [False, True])
def test_hand_written_loop(model: Any, optimizer_given: bool) -> None:
    assert by_hand(model, watched=True, optimizer_given=optimizer_given) == by_hand(model, watched=False)


def by_trainer(model: Any, out: Any, *, watched: bool) -> tuple[dict[str, bytes], list[dict[str, float]]]:
    np.random.seed(3)  # noqa: NPY002
    classifier = L.Classifier(model())
    trainer = models.trainer_of(classifier, out)
    if watched:
        watch = bnwatch.chainer.BatchNormWatch(None, every=2, on_diagnosis="log")
        trainer.extend(watch)
    trainer.run()
    if watched:
        assert watch.report().evaluations == 3
        assert not [d for d in watch.diagnoses if d.rule == "BN903"]
    assert not chainer.get_function_hooks()
    assert not chainer._get_link_hooks()
    assert all(not link._n_local_link_hooks and "forward" not in vars(link) for link in classifier.links())
    log = json.loads((out / "log").read_text())
    for entry in log:
        del entry["elapsed_time"]
    return state_of(classifier, trainer.updater.get_optimizer("main")), log


@pytest.mark.parametrize("model", [models.MLP, lambda: models.MLP(shared=True), models.CNN])
def test_trainer(model: Any, tmp_path: Any) -> None:
    watched = by_trainer(model, tmp_path / "a", watched=True)
    assert watched == by_trainer(model, tmp_path / "b", watched=False)


def test_values_that_a_model_keeps_are_those_of_the_users_own_pass() -> None:
    np.random.seed(0)  # noqa: NPY002
    model = L.Classifier(models.MLP())
    optimizer = chainer.optimizers.Adam().setup(model)
    x, t = models.data()
    with bnwatch.chainer.watch(model, None, every=1, on_diagnosis="log") as watching:
        for _ in range(4):
            loss = model(x, t)
            model.cleargrads()
            loss.backward()
            optimizer.update()
            before = model.loss, model.y, model.accuracy, model.predictor.l1.W.grad.copy()
            watching.step(accuracy=model.accuracy)
            watching.evaluation(accuracy=0.1, examples=10)
            assert (model.loss, model.y, model.accuracy)[0] is before[0]
            assert model.y is before[1]
            assert model.accuracy is before[2]
            np.testing.assert_array_equal(model.predictor.l1.W.grad, before[3])


def test_an_interrupted_loop_leaves_no_hook() -> None:
    model = models.MLP()
    with pytest.raises(KeyboardInterrupt), bnwatch.chainer.watch(model, None):
        F.relu(model(models.data()[0]))
        raise KeyboardInterrupt
    assert not chainer.get_function_hooks()


@pytest.mark.parametrize("kept", [pickle.dumps, copy.deepcopy, lambda one: one.copy(), state_of])
def test_what_is_kept_of_a_model_in_mid_training(kept: Any) -> None:
    found = []
    for watched in (False, True):
        np.random.seed(3)  # noqa: NPY002
        model = models.CNN()
        optimizer = chainer.optimizers.Adam().setup(model)
        watching = bnwatch.chainer.watch(model, None, every=1, on_diagnosis="log") if watched else nullcontext()
        (x, t), copies = models.data(64), []
        with watching as watch:
            for _ in range(6):
                loss = F.softmax_cross_entropy(model(x), t)
                copies.append(kept(model))  # between the pass and the update
                model.cleargrads()
                loss.backward()
                optimizer.update()
                copies.append(kept(model))
                if watched:
                    watch.step(loss=loss)
                with chainer.using_config("train", False), chainer.no_backprop_mode():
                    copies.append(kept(model))
                    model(x)
                if watched:
                    watch.evaluation(accuracy=0.5, examples=64)
        if watched:
            assert watch.report().samples == 6
            assert not [d for d in watch.diagnoses if d.rule == "BN903"]
        links = [one for one in copies if isinstance(one, chainer.Link)]
        assert all(set(vars(link)) == set(vars(model)) for link in links)
        found.append([state_of(one) if isinstance(one, chainer.Link) else one for one in copies])
    assert found[0] == found[1]
