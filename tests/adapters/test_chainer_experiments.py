"""The laboratory: right numbers, and not a trace."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest

import bnwatch.chainer
from bnwatch import evidence
from bnwatch.chainer.experiments import ChainerLaboratory, batches_of, within
from bnwatch.chainer.forward import ForwardCall
from bnwatch.chainer.layers import Layers
from bnwatch.evidence import Examples, ExperimentNotPossibleError

from . import chainer_models as models
from .chainer_models import F, L, chainer, state_of


def trained(model: Any | None = None, *, seed: int = 0, epochs: int = 2) -> Any:
    np.random.seed(seed)  # noqa: NPY002
    model = model or models.MLP()
    models.loop(model, None, epochs=epochs)
    return model


def laboratory(model: Any, batches: Any = ()) -> ChainerLaboratory:
    return ChainerLaboratory(Layers({"": model}), lambda _split, _limit: batches)


def by_hand(model: Any, x: np.ndarray, normalize: Any) -> np.ndarray:
    """Return the logits of an MLP in NumPy, dropout off."""
    h = x
    for number, (linear, bn) in enumerate([(model.l1, model.bn1), (model.l2, model.bn2)]):
        z = h @ linear.W.array.T + linear.b.array
        mean, var = normalize(number, bn, z)
        h = np.maximum((z - mean) / np.sqrt(var + bn.eps) * bn.gamma.array + bn.beta.array, 0)
    return h @ model.l3.W.array.T + model.l3.b.array


def test_cells_equal_numpy() -> None:
    model = trained()
    train, evaluation = models.data(), models.data(200, seed=1)
    cells = bnwatch.chainer.crosscheck(model, train=train, eval=evaluation, batch_size=64)

    def batch(_number: int, _bn: Any, z: np.ndarray) -> tuple[Any, Any]:
        return z.mean(0), z.var(0)

    parts: dict[int, list[tuple[Any, Any]]] = {0: [], 1: []}

    def estimate(number: int, _bn: Any, z: np.ndarray) -> tuple[Any, Any]:
        parts[number].append((z.mean(0), z.var(0) * len(z) / (len(z) - 1)))
        return z.mean(0), z.var(0)

    chunks = {"training": train, "evaluation": evaluation}
    for start in range(0, 256, 64):
        by_hand(model, train[0][start : start + 64], estimate)
    normalizers = {
        "batch": batch,
        "running": lambda _number, bn, _z: (bn.avg_mean, bn.avg_var),
        "population": lambda number, _bn, _z: tuple(np.mean([p[i] for p in parts[number]], axis=0) for i in (0, 1)),
    }
    for split, row in cells.rows():
        for statistics, cell in row.items():
            x, t = chunks[split]
            np.testing.assert_array_equal(cell.labels, t)
            if statistics == "reshuffled":  # its examples are told in their own order, whatever the random one was
                order = np.random.default_rng(0).permutation(len(x))
                logits = np.concatenate([by_hand(model, x[order[i : i + 64]], batch) for i in range(0, len(x), 64)])
                assert (cell.predicted[order] == logits.argmax(1)).mean() > 0.99
                continue
            logits = [by_hand(model, x[i : i + 64], normalizers[statistics]) for i in range(0, len(x), 64)]
            assert (cell.predicted == np.concatenate(logits).argmax(1)).mean() > 0.99  # ties within rounding


def test_scores_equal_a_forward_pass_of_the_users_own() -> None:
    model = trained()
    (batch,) = batches_of(model, models.data(), "probe", 256)
    lab = laboratory(model)
    with chainer.using_config("train", False), chainer.no_backprop_mode():
        expected = model(models.data()[0]).array
    np.testing.assert_array_equal(lab.outputs(batch, "running"), expected)
    model._dropout = 0.0
    copy = model.copy("copy")
    np.testing.assert_array_equal(lab.outputs(batch, "batch"), copy(models.data()[0]).array)


def test_cells_in_a_trainer_are_of_its_own_examples(tmp_path: Any) -> None:
    np.random.seed(0)  # noqa: NPY002
    classifier = L.Classifier(models.MLP())
    trainer = models.trainer_of(classifier, tmp_path)
    watch = bnwatch.chainer.BatchNormWatch(None, every=2, on_diagnosis="log")
    measured: list[Any] = []

    def measure(trainer: Any) -> None:
        cells = evidence.crosscheck(watch._session.lab)
        measured.append((cells, float(trainer.observation["validation/main/accuracy"])))
        (kept,) = {example.origin for example in watch._session.lab.examples("training", 2000)}
        assert kept == "training"

    trainer.extend(watch)
    trainer.extend(measure, trigger=(1, "epoch"), priority=50)
    trainer.run()
    for cells, reported in measured:
        assert cells.evaluation["running"].examples == 200
        weights = np.array([64, 64, 64, 8])
        correct = np.split(cells.evaluation["running"].correct, np.cumsum(weights)[:-1])
        assert np.mean([c.mean() for c in correct]) == pytest.approx(reported, abs=1e-6)  # Chainer averages batches
        assert cells.training["batch"].examples >= 32 * 6
        assert cells.classes == models.CLASSES
        assert cells.training["batch"].examples % 32 == 0  # whole batches


class Leaky(chainer.Chain):
    """Keeps things from its last forward pass, draws random numbers, counts, reports."""

    def __init__(self) -> None:
        super().__init__()
        with self.init_scope():
            self.l1 = L.Linear(models.FEATURES, 6)
            self.bn = L.BatchNormalization(6)
            self.memory = L.LSTM(6, models.CLASSES)
        self.seen = np.zeros(3)
        self.register_persistent("seen")
        self.count = 0

    def forward(self, x: Any) -> Any:
        self.count += 1
        self.seen += 1
        random.random()  # noqa: S311
        np.random.normal()  # noqa: NPY002
        self.last = self.memory(F.dropout(self.bn(self.l1(x))))
        chainer.report({"count": self.count}, self)
        return self.last


def test_nothing_is_left_behind() -> None:
    model = Leaky()
    model(models.data()[0])
    model.memory.reset_state()
    layers = Layers({"": model})
    batches = batches_of(model, models.data(64), "probe", 64)
    lab = ChainerLaboratory(layers, lambda _split, _limit: batches)
    attributes = [(link, dict(vars(link))) for link in model.links()]
    before, python = state_of(model), random.getstate()
    observation: dict[str, Any] = {}
    reporter = chainer.Reporter()
    reporter.add_observer("model", model)
    with reporter, reporter.scope(observation), chainer.using_config("train", True):
        for statistics in ("batch", "running"):
            lab.outputs(batches[0], statistics)
        with lab.population(batches):
            lab.outputs(batches[0], "running")
        lab.look(batches[0], gradients=True)
    assert observation == {}
    assert state_of(model) == before
    assert random.getstate() == python
    for link, values in attributes:
        assert vars(link).keys() == values.keys()
        assert all(vars(link)[name] is values[name] for name in values)
    assert all(parameter.grad is None or np.isnan(parameter.grad).all() for parameter in model.params())


@pytest.mark.parametrize("bn", [L.BatchNormalization, L.BatchRenormalization])
def test_population_restores_bits_and_identity_also_after_an_error(bn: Any) -> None:
    model = trained(models.MLP(bn=bn))
    batches = batches_of(model, models.data(), "probe", 64)
    lab = laboratory(model)
    arrays = [(layer.avg_mean, layer.avg_var) for layer in (model.bn1, model.bn2)]
    before = state_of(model)
    with pytest.raises(ZeroDivisionError), lab.population(batches):
        z = np.concatenate([b.inputs.args[0].array for b in batches]) @ model.l1.W.array.T + model.l1.b.array
        chunks = np.split(z, 4)
        np.testing.assert_allclose(model.bn1.avg_mean, np.mean([c.mean(0) for c in chunks], 0), rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(model.bn1.avg_var, np.mean([c.var(0) * 64 / 63 for c in chunks], 0), rtol=1e-4)
        raise ZeroDivisionError
    assert state_of(model) == before
    for layer, (mean, var) in zip((model.bn1, model.bn2), arrays, strict=True):
        assert layer.avg_mean is mean
        assert layer.avg_var is var
        assert "forward" not in vars(layer)


def test_a_model_that_raises_is_no_internal_failure_and_is_restored() -> None:
    model = trained()
    before = state_of(model)
    (batch,) = batches_of(model, models.data(32), "probe", 32)
    call = ForwardCall(model, "__call__", (np.zeros((3, 3), "f"),))
    broken = Examples(call, batch.labels, "probe")
    with pytest.raises(ExperimentNotPossibleError, match="calling the model again failed"):
        laboratory(model).outputs(broken, "batch")
    assert state_of(model) == before
    assert chainer.config.train is True
    assert "forward" not in vars(model.bn1)


def test_a_deliberately_frozen_layer_is_unfrozen_inside() -> None:
    class Frozen(models.MLP):
        def forward(self, x: Any) -> Any:
            with chainer.using_config("train", False):
                return super().forward(x)

    model = Frozen()
    (batch,) = batches_of(model, models.data(), "probe", 256)
    lab = laboratory(model)
    assert not np.array_equal(lab.outputs(batch, "batch"), lab.outputs(batch, "running"))


class Bottleneck(chainer.Chain):
    def __init__(self, bias: float) -> None:
        super().__init__()
        with self.init_scope():
            self.l1 = L.Linear(models.FEATURES, 16)
            self.bn = L.BatchNormalization(16)
            self.l2 = L.Linear(16, 6)
            self.l3 = L.Linear(6, models.CLASSES)
        self.l2.b.array[:] = bias

    def forward(self, x: Any) -> Any:
        return self.l3(F.relu(self.l2(F.relu(self.bn(self.l1(x))))))


def test_a_look_finds_a_dead_activation_and_no_gradient_before_it() -> None:
    model = Bottleneck(bias=-1000.0)
    (batch,) = batches_of(model, models.data(), "probe", 256)
    looks = {look.path: look for look in laboratory(model).look(batch, gradients=True).layers}
    assert list(looks) == ["l1", "bn", "bn -> ReLU", "l2", "l2 -> ReLU", "l3"]
    dead = looks["l2 -> ReLU"]
    assert (dead.kind, dead.units, dead.zero_samples, dead.dead_units, dead.spread) == ("ReLU", 6, 1.0, 1.0, 0.0)
    assert [looks[path].gradient for path in ("l1", "bn", "l2")] == [0.0, 0.0, 0.0]
    assert looks["l3"].spread < 1e-6
    assert looks["l3"].gradient > 0
    assert looks["l2"].spread > 0


def test_a_look_at_a_healthy_net_has_the_gradients_of_its_loss() -> None:
    model = Bottleneck(bias=0.0)
    x, t = models.data()
    (batch,) = batches_of(model, (x, t), "probe", 256)
    looks = {look.path: look for look in laboratory(model).look(batch, gradients=True).layers}
    copy = model.copy("copy")
    loss = F.softmax_cross_entropy(copy(x), t)
    copy.cleargrads()
    loss.backward()
    for path in ("l1", "l2", "l3"):
        expected = max(abs(parameter.grad).max() for parameter in copy[path].params())
        assert looks[path].gradient == pytest.approx(float(expected), rel=1e-4)
    assert looks["l2 -> ReLU"].zero_samples < 0.5
    assert all(look.gradient is None for look in laboratory(model).look(batch, gradients=False).layers)


def test_a_look_names_the_calls_of_a_shared_link() -> None:
    model = models.MLP(shared=True)
    (batch,) = batches_of(model, models.data(), "probe", 256)
    paths = [look.path for look in laboratory(model).look(batch, gradients=False).layers]
    assert paths == ["l1", "bn1#0", "bn1#0 -> ReLU", "l2", "bn1#1", "bn1#1 -> ReLU", "l3"]


def test_a_look_through_a_classifier_ends_with_the_logits() -> None:
    model = L.Classifier(models.MLP())
    call = ForwardCall(model, "__call__", models.data())
    batch = Examples(call, models.data()[1].astype(np.int64), "probe")
    looks = laboratory(model).look(batch, gradients=True).layers
    assert (looks[-1].path, looks[-1].units) == ("predictor/l3", models.CLASSES)
    assert looks[-1].gradient > 0
    assert laboratory(model).outputs(batch, "running").shape == (256, models.CLASSES)


class TwoClasses(chainer.Chain):
    def __init__(self, *, probability: bool = False) -> None:
        super().__init__()
        self._probability = probability
        with self.init_scope():
            self.bn = L.BatchNormalization(models.FEATURES)
            self.l = L.Linear(models.FEATURES, 1)

    def forward(self, x: Any) -> Any:
        y = self.l(self.bn(x))
        return F.sigmoid(y) if self._probability else y


@pytest.mark.parametrize("probability", [False, True])
def test_one_output_becomes_two_columns(probability: bool) -> None:
    model = TwoClasses(probability=probability)
    x, t = models.data()
    (batch,) = batches_of(model, (x, t % 2), "probe", 256)
    scores = laboratory(model).outputs(batch, "running")
    assert scores.shape == (256, 2)
    np.testing.assert_allclose(scores[:, 0], 1 - scores[:, 1] if probability else -scores[:, 1])


def test_outputs_that_are_no_classes_are_refused() -> None:
    model = chainer.Sequential(L.BatchNormalization(8), F.sum)
    (batch,) = batches_of(model, models.data(), "probe", 256)
    with pytest.raises(ExperimentNotPossibleError, match="no scores of classes"):
        laboratory(model).outputs(batch, "running")


def test_batches_are_spread_over_sorted_data() -> None:
    model = models.MLP()
    x, t = models.data()
    batches = batches_of(model, (x, np.sort(t)), "probe", 16)
    chosen = within(batches, 64)
    assert [len(batch.labels) for batch in chosen] == [16] * 4
    assert len({label for batch in chosen for label in batch.labels}) == models.CLASSES


def test_crosscheck_without_examples_says_so() -> None:
    with pytest.raises(ExperimentNotPossibleError, match="examples were given"):
        bnwatch.chainer.crosscheck(models.MLP())
