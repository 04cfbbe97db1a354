"""Examples for the experiments are found without asking."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import bnwatch.chainer
from bnwatch import evidence
from bnwatch.chainer.forward import Stack, read_call
from bnwatch.evidence import ExperimentNotPossibleError

from . import chainer_models as models
from .chainer_models import F, L, chainer


class Methods(models.MLP):
    """Trained through a method of its own, with keyword arguments."""

    def loss(self, x: Any, t: Any, *, scale: float = 1.0) -> Any:
        y = self(x)
        F.accuracy(y, t)
        return scale * F.softmax_cross_entropy(y, t)


class Decorated(models.MLP):
    def __call__(self, *inputs: Any) -> Any:
        return super().__call__(*inputs)


def two_epochs(model: Any, call: Any = None, **arguments: Any) -> tuple[Any, Any, Any]:
    """Train, and return the cells measured in the middle of training and the laboratory's examples."""
    (x, t), (xv, tv) = models.data(), models.data(200, seed=1)
    optimizer = chainer.optimizers.Adam().setup(model)
    call = call or (lambda model, x, t: F.softmax_cross_entropy(model(x), t))
    buffer = np.empty((32, models.FEATURES), np.float32)
    with bnwatch.chainer.watch(model, None, on_diagnosis="log", **arguments) as watch:
        for _ in range(2):
            for start in range(0, 256, 32):
                buffer[:] = x[start : start + 32]
                loss = call(model, buffer, t[start : start + 32])
                model.cleargrads()
                loss.backward()
                optimizer.update()
                watch.step()
            with chainer.using_config("train", False), chainer.no_backprop_mode():
                for start in range(0, 200, 50):
                    call(model, xv[start : start + 50], tv[start : start + 50])
            watch.evaluation(accuracy=0.5, examples=200)
        lab = watch._session.lab
        kept = lab.examples("training", 2000), lab.examples("evaluation", 2000)
        return evidence.crosscheck(lab), *kept


@pytest.mark.parametrize(
    ("model", "call"),
    [
        (models.MLP, None),
        (models.OldMLP, None),
        (Decorated, None),
        (models.MLP, lambda model, x, t: F.softmax_cross_entropy(model.forward(chainer.Variable(x)), t)),
        (Methods, lambda model, x, t: model.loss(x, t, scale=2.0)),
        (lambda: L.Classifier(models.MLP()), lambda model, x, t: model(x, t)),
        (lambda: L.Classifier(models.MLP()), lambda m, x, t: F.softmax_cross_entropy(m.predictor(x), t)),
    ],
)
def test_batches_are_kept_as_they_were_composed(model: Any, call: Any) -> None:
    cells, train, evaluation = two_epochs(model(), call)
    (x, t), (xv, tv) = models.data(), models.data(200, seed=1)
    composed = {t[i : i + 32].tobytes(): x[i : i + 32] for i in range(0, 256, 32)}
    for batch in train:
        kept = np.asarray(batch.inputs.args[0].array)
        np.testing.assert_array_equal(kept, composed[batch.labels.astype(np.int32).tobytes()])
    assert len(train) >= 4
    np.testing.assert_array_equal(np.concatenate([b.labels for b in evaluation])[-50:], tv[-50:])
    np.testing.assert_array_equal(evaluation[-1].inputs.args[0].array, xv[-50:])
    assert cells.training["running"].examples == sum(len(b.labels) for b in train)
    assert cells.evaluation["running"].examples == sum(len(b.labels) for b in evaluation) >= 150
    assert {b.origin for b in train} == {"training"}
    assert {b.origin for b in evaluation} == {"evaluation"}


@pytest.mark.parametrize("left", [False, True])
def test_evaluation_examples_are_those_of_one_evaluation(left: bool) -> None:
    """Each counts once; training examples that run in inference mode, in a step or before it, are none of them."""
    model, (x, t), (xv, tv) = models.MLP(), models.data(256), models.data(40, seed=1)
    optimizer = chainer.optimizers.Adam().setup(model)
    with bnwatch.chainer.watch(model, None, on_diagnosis="log") as watch:
        for _ in range(3):
            for start in range(0, 256, 32):
                with chainer.using_config("train", not left):
                    loss = F.softmax_cross_entropy(model(x[start : start + 32]), t[start : start + 32])
                model.cleargrads()
                loss.backward()
                optimizer.update()
                watch.step()
            with chainer.using_config("train", False), chainer.no_backprop_mode():
                F.softmax_cross_entropy(model(x), t)
                for start in (0, 20):
                    F.softmax_cross_entropy(model(xv[start : start + 20]), tv[start : start + 20])
            watch.evaluation(accuracy=0.5, examples=40)
        kept = watch._session.passes.evaluation.newest(2000)
    assert np.concatenate([examples.labels for examples in kept]).tolist() == tv.tolist()


def test_a_probe_takes_the_place_of_evaluation_examples() -> None:
    probe = models.data(100, seed=7)
    cells, train, evaluation = two_epochs(models.MLP(), probe=probe)
    assert {b.origin for b in train} == {"training"}
    assert {b.origin for b in evaluation} == {"probe"}
    np.testing.assert_array_equal(cells.evaluation["running"].labels, probe[1])


def numpy_loss(model: Any, x: Any, t: Any) -> Any:
    """A cross-entropy that no hook would know."""
    log = F.log_softmax(model(x))
    return -F.mean(F.sum(log * np.eye(models.CLASSES, dtype=np.float32)[t], axis=1))


def test_without_labels_the_reason_says_what_to_pass() -> None:
    with pytest.raises(ExperimentNotPossibleError, match=r"no labels were seen.*pass probe=\(inputs, labels\)"):
        two_epochs(models.MLP(), numpy_loss)


def test_a_probe_serves_both_splits_where_nothing_else_is_had() -> None:
    cells, train, _ = two_epochs(models.MLP(), numpy_loss, probe=models.data(100, seed=7))
    assert {b.origin for b in train} == {"probe"}
    assert cells.training["running"].examples == cells.evaluation["running"].examples == 100


def test_a_step_of_several_calls_is_not_taken_for_one() -> None:
    def twice(model: Any, x: Any, t: Any) -> Any:
        return F.softmax_cross_entropy(model(x[:16]), t[:16]) + F.softmax_cross_entropy(model(x[16:]), t[16:])

    with pytest.raises(ExperimentNotPossibleError, match="not one call of the model"):
        two_epochs(models.MLP(), twice)


def test_arguments_assigned_to_before_the_first_function_are_not_trusted() -> None:
    class Scaling(models.OldMLP):
        def __call__(self, x: Any) -> Any:
            x = x / 2
            return super().__call__(x)

    with pytest.raises(ExperimentNotPossibleError, match="assigns to its arguments"):
        two_epochs(Scaling())


def test_the_stack_finds_the_outermost_call() -> None:
    model = L.Classifier(models.MLP())
    stack = Stack([model])
    found: list[Any] = []

    class Hook(chainer.FunctionHook):
        name = "test"

        def forward_preprocess(self, _node: Any, _inputs: Any) -> None:
            frame = stack.outermost()
            found.append(frame and read_call(frame))

    x, t = models.data(4)
    with Hook():
        model(x, t)
        F.relu(x)
    assert found[-1] is None
    assert {(call.link is model, call.method, len(call.args)) for call in found[:-1]} == {(True, "__call__", 2)}


def test_examples_are_bounded() -> None:
    from bnwatch.chainer.examples import ENOUGH, KeptExamples
    from bnwatch.chainer.forward import ForwardCall
    from bnwatch.evidence import Examples

    kept = KeptExamples()
    kept.renew()
    for number in range(1000):
        if kept.wanted:
            kept.add(Examples(ForwardCall(None), np.full(10, number), "training"))
    assert len(kept._batches) == 64
    kept.renew()
    for _ in range(10):
        kept.add(Examples(ForwardCall(None), np.zeros(1500, np.int64), "training"))
    assert sum(len(b.labels) for b in kept._batches) <= ENOUGH + 1500
    assert [len(b.labels) for b in kept.newest(100)] == [1500]


def test_nothing_is_kept_where_experiments_are_off() -> None:
    model = models.MLP()
    with bnwatch.chainer.watch(model, None, experiments=False, every=1, on_diagnosis="log") as watch:
        models.loop(model, watch, epochs=1)
        assert not watch._session.passes.training.newest(1)
        assert not watch._session.passes.evaluation.newest(1)
