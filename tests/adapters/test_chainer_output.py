"""How a model ends, and how many passes go into one update."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import bnwatch.chainer
from bnwatch.records import Output

from . import chainer_models as models
from .chainer_models import F, L, chainer, training


def double_backward(y: Any, t: Any) -> Any:
    """A cross-entropy of the user's own."""
    return -F.mean(F.select_item(F.log_softmax(y), t))


def one_hot(t: np.ndarray) -> np.ndarray:
    return np.eye(models.CLASSES, dtype=np.float32)[t]


class Ending(models.MLP):
    """Any function of the last layer."""

    def __init__(self, end: Any, **arguments: Any) -> None:
        super().__init__(**arguments)
        self._end = end

    def forward(self, x: Any) -> Any:
        return self._end(super().forward(x))


def structure_of(model: Any, loss: Any, *, steps: int = 1) -> Any:
    """Train by hand for some steps."""
    x, t = models.data(32)
    optimizer = chainer.optimizers.SGD(1e-3).setup(model)
    with bnwatch.chainer.watch(model, None, on_diagnosis="log") as watch:
        for _ in range(steps):
            value = loss(model(x), t)
            model.cleargrads()
            value.backward()
            optimizer.update()
            watch.step()
    assert not [d for d in watch.diagnoses if d.rule == "BN903"]
    return watch.watch.signals.structure


def by_square(y: Any, t: Any) -> Any:
    return F.mean_squared_error(one_hot(t), y)


def same(y: Any) -> Any:
    return y


ENDS = {
    "logits": (same, F.softmax_cross_entropy, Output("l3", 4, "linear", "softmax_cross_entropy", from_logits=True)),
    "twice": (
        F.softmax,
        F.softmax_cross_entropy,
        Output("l3", 4, "softmax", "softmax_cross_entropy", from_logits=True),
    ),
    "relu": (F.relu, F.softmax_cross_entropy, Output("l3", 4, "relu", "softmax_cross_entropy", from_logits=True)),
    "reshaped": (
        lambda y: F.reshape(F.softmax(y), (-1, 4)),
        F.softmax_cross_entropy,
        Output("l3", 4, "softmax", "softmax_cross_entropy", from_logits=True),
    ),
    "squares": (F.sigmoid, by_square, Output("l3", 4, "sigmoid", "mean_squared_error", from_logits=False)),
    "one column": (
        lambda y: y[:, 0],
        lambda y, t: F.sigmoid_cross_entropy(y, (t > 1).astype(np.int32)),
        Output("l3 -> GetItem", 1, "linear", "sigmoid_cross_entropy", from_logits=True),
    ),
    "of one's own": (same, double_backward, None),
    "with accuracy": (
        same,
        lambda y, t: (F.accuracy(y, t), double_backward(y, t))[1],
        Output("l3", 4, "linear", None, None),
    ),
    "two": (
        same,
        lambda y, t: F.softmax_cross_entropy(y, t) + F.softmax_cross_entropy(F.softmax(y), t),
        None,
    ),
}


@pytest.mark.parametrize(("end", "loss", "output"), ENDS.values(), ids=ENDS)
def test_how_a_model_ends(end: Any, loss: Any, output: Output | None) -> None:
    assert structure_of(Ending(end), loss).output == output


def test_check_knows_the_end_without_a_loss_and_with_one() -> None:
    x, t = models.data(32)
    seen: list[Any] = []
    from bnwatch import engine

    own = engine.check
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine, "check", lambda known, **named: seen.append(known) or own(known, **named))
        bnwatch.chainer.check(Ending(F.softmax), x)
        bnwatch.chainer.check(L.Classifier(models.MLP()), x, t)
    assert seen[0].output == Output("l3", 4, "softmax")
    assert seen[1].output == Output("predictor/l3", 4, "linear", "softmax_cross_entropy", from_logits=True)


def test_a_trainer_knows_the_end(tmp_path: Any) -> None:
    trainer = models.trainer_of(models.MLP(), tmp_path, epochs=1)
    watch = bnwatch.chainer.BatchNormWatch(None, on_diagnosis="log")
    trainer.extend(watch)
    trainer.run()
    structure = watch.watch.signals.structure
    assert structure.output == Output("predictor/l3", 4, "linear", "softmax_cross_entropy", from_logits=True)
    assert structure.accumulated == 1


def test_an_evaluation_before_the_first_step_has_no_say() -> None:
    model, (x, t) = models.MLP(), models.data(32)
    optimizer = chainer.optimizers.SGD(1e-3).setup(model)
    with bnwatch.chainer.watch(model, None, on_diagnosis="log") as watch:
        with chainer.using_config("train", False):
            F.softmax_cross_entropy(F.softmax(model(x)), t)
        loss = F.softmax_cross_entropy(model(x), t)
        model.cleargrads()
        loss.backward()
        optimizer.update()
        watch.step()
    assert watch.watch.signals.structure.output.activation == "linear"


def accumulate(model: Any, parts: int, *, told: str, cleared: bool = False, steps: int = 6) -> int:
    """Add up the gradients of several parts for each update; return what the watch makes of it."""
    x, t = models.data(32 * parts)
    optimizer = chainer.optimizers.SGD(1e-3).setup(model)
    arguments = {"optimizer": optimizer} if told == "by the optimizer" else {}
    with bnwatch.chainer.watch(model, None, on_diagnosis="log", **arguments) as watch:
        for _ in range(steps):
            model.cleargrads()
            for start in range(0, 32 * parts, 32):
                loss = F.softmax_cross_entropy(model(x[start : start + 32]), t[start : start + 32]) / parts
                if cleared:
                    model.cleargrads()
                loss.backward()
                if told == "each part":
                    watch.step()
            optimizer.update()
            if told == "each update":
                watch.step()
    assert not [d for d in watch.diagnoses if d.rule == "BN903"]
    return int(watch.watch.signals.structure.accumulated)


@pytest.mark.parametrize("told", ["each update", "each part", "by the optimizer"])
@pytest.mark.parametrize("parts", [1, 2, 5])
def test_gradients_that_are_added_up_are_counted(parts: int, told: str) -> None:
    assert accumulate(models.MLP(), parts, told=told) == parts


def test_gradients_that_are_cleared_are_not_added_up() -> None:
    assert accumulate(models.MLP(), 3, told="each update", cleared=True) == 1


def test_two_calls_for_one_loss_and_two_updates_are_no_accumulation() -> None:
    x, t = models.data(64)
    model = models.MLP()
    optimizer = chainer.optimizers.SGD(1e-3).setup(model)
    with bnwatch.chainer.watch(model, None, on_diagnosis="log") as watch:
        for _ in range(4):
            for _ in range(2):  # as a generator and its critic have
                scores = model(x[:32]), model(x[32:])
                loss = F.softmax_cross_entropy(scores[0], t[:32]) + F.softmax_cross_entropy(scores[1], t[32:])
                loss.backward()
                optimizer.update()
            watch.step()
    assert watch.watch.signals.structure.accumulated == 1


class Accumulating(training.updaters.StandardUpdater):
    """Updates after every third batch."""

    def update_core(self) -> None:
        optimizer = self.get_optimizer("main")
        x, t = self.converter(self.get_iterator("main").next())
        if self.iteration % 3 == 0:
            optimizer.target.cleargrads()
        optimizer.target(x, t).backward()
        if self.iteration % 3 == 2:
            optimizer.update()


def test_an_updater_that_updates_after_some_iterations(tmp_path: Any) -> None:
    classifier = L.Classifier(models.MLP())
    optimizer = chainer.optimizers.Adam().setup(classifier)
    iterator = chainer.iterators.SerialIterator(models.dataset(), 32)
    trainer = training.Trainer(Accumulating(iterator, optimizer), (2, "epoch"), str(tmp_path))
    watch = bnwatch.chainer.BatchNormWatch(None, on_diagnosis="log")
    trainer.extend(watch)
    trainer.run()
    assert watch.watch.signals.structure.accumulated == 3


def test_float16_statistics_keep_their_type(monkeypatch: pytest.MonkeyPatch) -> None:
    record = models.Record(monkeypatch)
    with chainer.using_config("dtype", np.dtype(np.float16)):
        model = models.MLP(bn=lambda size: L.BatchNormalization(size, dtype=np.float16), dropout=0.0)
    (x, t), optimizer = models.data(32), chainer.optimizers.SGD(1e-3).setup(model)
    with bnwatch.chainer.watch(model, None, on_diagnosis="log") as watch:
        loss = F.softmax_cross_entropy(model(x.astype(np.float16)), t)
        model.cleargrads()
        loss.backward()
        optimizer.update()
        watch.step()
    for call in record.steps[0].calls:
        assert {array.dtype for array in (call.running.mean, call.running.var, call.batch.mean)} == {
            np.dtype("float16")
        }
        link = getattr(model, call.site.layer)
        assert call.running.var.tobytes() == link.avg_var.tobytes()
