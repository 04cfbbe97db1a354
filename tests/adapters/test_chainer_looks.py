"""What a look through the network sees, against NumPy."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from bnwatch.chainer.experiments import ChainerLaboratory
from bnwatch.chainer.forward import ForwardCall
from bnwatch.chainer.layers import Layers
from bnwatch.evidence import Examples

from . import chainer_models as models
from .chainer_models import F, L, chainer


def laboratory(model: Any) -> ChainerLaboratory:
    return ChainerLaboratory(Layers({"": model}), lambda _split, _limit: ())


def batch_of(model: Any, *arguments: Any, **named: Any) -> Examples:
    labels = models.data(len(next(iter([*arguments, *named.values()]))))[1].astype(np.int64)
    return Examples(ForwardCall(model, "__call__", arguments, named).keep(), labels, "training")


class Ending(chainer.Chain):
    """A linear layer and an activation at the end."""

    def __init__(self, activation: Any, factor: float = 1.0) -> None:
        super().__init__()
        self.activation = activation
        with self.init_scope():
            self.l1 = L.Linear(models.FEATURES, models.CLASSES, initialW=chainer.initializers.Normal(factor))

    def forward(self, x: Any) -> Any:
        return self.activation(self.l1(x))


@pytest.mark.parametrize(
    ("activation", "low", "kind"),
    [(F.softmax, 0.0, "Softmax"), (F.sigmoid, 0.0, "Sigmoid"), (F.tanh, -1.0, "Tanh"), (F.relu, None, "ReLU")],
)
@pytest.mark.parametrize("factor", [0.01, 20.0])
def test_bounds_and_scale_of_an_activation(activation: Any, low: float | None, kind: str, factor: float) -> None:
    model, (x, _) = Ending(activation, factor), models.data(64)
    output = activation(model.l1(x)).array.astype(np.float64)
    *_, linear, look = laboratory(model).look(batch_of(model, x), gradients=False).layers
    assert (look.path, look.kind, linear.bounds) == (f"l1 -> {kind}", kind, None)
    assert look.scale == pytest.approx(np.sqrt(np.mean(output**2)), rel=1e-6)
    if low is None:
        assert look.bounds is None
        return
    expected = np.mean((output - low <= 1e-6) | (1.0 - output <= 1e-6))
    assert look.bounds == pytest.approx(expected)
    assert (look.bounds > 0.5) is (factor > 1)


def relative_spread(x: np.ndarray) -> float:
    flat = x.reshape(len(x), -1).astype(np.float64)
    return float(np.sqrt(flat.var(axis=0).mean()) / np.sqrt(np.mean(flat**2)))


def test_what_enters_the_network() -> None:
    x, t = models.data(64)
    model = models.MLP()
    assert laboratory(model).look(batch_of(model, x), gradients=False).entry == pytest.approx(relative_spread(x))
    assert laboratory(model).look(batch_of(model, x=x + 100), gradients=False).entry == pytest.approx(
        relative_spread(x + 100), rel=1e-4
    )
    assert laboratory(model).look(batch_of(model, np.tile(x[:1], (64, 1))), gradients=False).entry < 1e-6
    classifier = L.Classifier(model)
    assert laboratory(classifier).look(batch_of(classifier, x, t), gradients=True).entry == pytest.approx(
        relative_spread(x)
    )


def cross_entropy(scores: np.ndarray, labels: np.ndarray) -> float:
    scores = scores.astype(np.float64)
    log = scores - np.log(np.exp(scores).sum(axis=1, keepdims=True))
    return -float(log[np.arange(len(labels)), labels].mean())


@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize("wrapped", [False, True])
def test_the_loss_is_that_of_batch_statistics(gradients: bool, wrapped: bool) -> None:
    x, t = models.data(64)
    model = models.MLP(dropout=0.0)
    target = L.Classifier(model) if wrapped else model
    batch = batch_of(target, *((x, t) if wrapped else (x,)))
    found = laboratory(target).look(batch, gradients=gradients).loss
    with chainer.using_config("train", True):
        scores = model(x).array
    assert found == pytest.approx(cross_entropy(scores, t), rel=1e-5)


def test_no_loss_is_made_of_probabilities_or_features() -> None:
    (x, _), single = models.data(64), Ending(F.sigmoid)
    single.l1 = L.Linear(models.FEATURES, 1)
    assert laboratory(single).look(batch_of(single, x), gradients=True).loss is None


@pytest.mark.parametrize(
    ("optimizer", "rate", "later"),
    [
        (lambda: chainer.optimizers.MomentumSGD(lr=0.05), 0.05, "lr"),
        (lambda: chainer.optimizers.Adam(alpha=0.002), 0.002, "alpha"),
        (chainer.optimizers.AdaDelta, None, None),
    ],
)
def test_the_learning_rate_is_that_of_now(optimizer: Any, rate: float | None, later: str | None) -> None:
    (x, _), model = models.data(64), models.MLP()
    lab, batch = laboratory(model), batch_of(model, x)
    assert lab.look(batch, gradients=False).learning_rate is None
    made = optimizer().setup(model)
    assert lab.look(batch, gradients=False).learning_rate == rate
    if later is not None:
        setattr(made, later, 1e-5)
        assert lab.look(batch, gradients=False).learning_rate == 1e-5


def test_how_far_parameters_moved_since_the_look_before() -> None:
    (x, _), model = models.data(64), models.MLP(width=200)
    lab, batch = laboratory(model), batch_of(model, x)
    assert {look.update for look in lab.look(batch, gradients=False, step=3).layers} == {None}
    before = {path: [p.array.copy() for p in link.params()] for path, link in model.namedlinks()}
    random = np.random.default_rng(1)
    model.l1.W.array += random.normal(0, 0.01, model.l1.W.shape).astype(np.float32)
    model.l2.W.array *= 1.02
    model.bn1.beta.array += 0.001
    assert {look.update for look in lab.look(batch, gradients=False).layers} == {None}
    looks = {look.path: look for look in lab.look(batch, gradients=False, step=7).layers}

    def relative(link: Any, path: str) -> float:
        now, then = (
            [p.astype(np.float64).ravel() for p in ps] for ps in ([q.array for q in link.params()], before[path])
        )
        change = np.concatenate(now) - np.concatenate(then)
        return float(np.sqrt(np.mean(change**2) / np.mean(np.concatenate(then) ** 2))) / 4

    assert looks["l1"].update == pytest.approx(relative(model.l1, "/l1"), rel=0.1)
    assert looks["l2"].update == pytest.approx(0.02 / 4, rel=1e-3)
    assert looks["bn1"].update == pytest.approx(relative(model.bn1, "/bn1"), rel=1e-4)
    assert looks["l3"].update == 0.0
    assert looks["bn1 -> ReLU"].update is None
    again = {look.path: look.update for look in lab.look(batch, gradients=True, step=7).layers}
    assert again == {path: look.update for path, look in looks.items()}


def test_a_training_that_does_not_learn_is_looked_at_with_all_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    from bnwatch import evidence

    own = evidence.look
    monkeypatch.setattr(evidence, "look", lambda *args, **kwargs: seen.append(own(*args, **kwargs)) or seen[-1])
    models.by_hand(models.MLP, watched=True)
    assert len(seen) > 2
    assert all(look.learning_rate == 0.001 and look.loss > 0 and look.entry > 0 for look in seen)
    assert all(layer.update > 0 for look in seen[1:] for layer in look.layers if layer.path in {"l1", "bn1", "l3"})
