"""Which layer costs accuracy, what enters it, and new running statistics."""

from __future__ import annotations

import copy
import functools
import random
from typing import Any

import numpy as np
import pytest

import bnwatch.chainer
from bnwatch import evidence
from bnwatch.chainer.experiments import ChainerLaboratory, batches_of
from bnwatch.chainer.forward import ForwardCall
from bnwatch.chainer.layers import Layers
from bnwatch.evidence import Examples, ExperimentNotPossibleError
from bnwatch.records import CallSite

from . import chainer_models as models
from .chainer_models import F, L, chainer, state_of

NAMES = ("bn1", "bn2", "bn3", "bn4")


class Deep(chainer.Chain):
    """Four batch normalizations."""

    def __init__(self, bn: Any = L.BatchNormalization) -> None:
        super().__init__()
        with self.init_scope():
            for number, name in enumerate(NAMES):
                setattr(self, f"l{number + 1}", L.Linear(models.FEATURES if number == 0 else 16, 16))
                setattr(self, name, bn(16))
            self.last = L.Linear(16, models.CLASSES)

    def forward(self, x: Any) -> Any:
        for number, name in enumerate(NAMES):
            x = F.relu(self[name](self[f"l{number + 1}"](x)))
        return self.last(x)


@functools.cache
def _trained(build: Any, *args: Any, **kwargs: Any) -> Any:
    np.random.seed(0)  # noqa: NPY002
    model = build(*args, **kwargs)
    models.loop(model, None, chainer.optimizers.Adam(0.01).setup(model), epochs=8)
    return model


def trained(build: Any, *args: Any, **kwargs: Any) -> Any:
    return copy.deepcopy(_trained(build, *args, **kwargs))


def laboratory(model: Any, batches: Any = ()) -> ChainerLaboratory:
    return ChainerLaboratory(Layers({"": model}), lambda _split, _limit: batches)


def batch_of(model: Any, examples: int = 64, size: int = 64) -> Examples:
    return batches_of(model, models.data(examples), "probe", size)[0]


def accuracy(model: Any) -> float:
    x, t = models.data(200, seed=1)
    with chainer.using_config("train", False), chainer.no_backprop_mode():
        return float(F.accuracy(model(x), t).array)


@pytest.mark.parametrize("damaged", NAMES)
def test_the_layer_with_damaged_statistics_is_named(damaged: str) -> None:
    model = trained(Deep)
    model[damaged].avg_mean += 4 * np.sqrt(model[damaged].avg_var)
    before = state_of(model)
    found = bnwatch.chainer.attribute(model, models.data(200, seed=1), batch_size=50)
    assert found.explained(0.5).subject == damaged
    assert found.cost.gained > 0.2
    assert {cost.subject for cost in found.costs} == set(NAMES)
    assert found.examples == 200
    assert found.running == pytest.approx(accuracy(model))
    assert max(found.costs, key=lambda cost: cost.distance).subject == damaged
    assert state_of(model) == before


def test_the_calls_of_a_shared_link_are_told_apart() -> None:
    model = trained(models.MLP, shared=True)
    found = bnwatch.chainer.attribute(model, models.data(200, seed=1), batch_size=50)
    assert {cost.subject for cost in found.costs} == {"bn1", "bn1#0", "bn1#1"}
    (whole,) = (cost for cost in found.costs if cost.index is None)
    assert whole.recovered == found.cost == whole.lost  # with batch statistics at all sites nothing else is left


def normalized(model: Any, x: np.ndarray, kinds: str) -> np.ndarray:
    """Return the logits of `Deep` in NumPy; each letter of ``kinds`` says what a layer normalizes with."""
    for number, (name, kind) in enumerate(zip(NAMES, kinds, strict=True)):
        linear, bn = model[f"l{number + 1}"], model[name]
        z = x.astype(np.float64) @ linear.W.array.T + linear.b.array
        mean, var = (z.mean(0), z.var(0)) if kind == "b" else (bn.avg_mean, bn.avg_var)
        x = np.maximum((z - mean) / np.sqrt(var + bn.eps) * bn.gamma.array + bn.beta.array, 0)
    return x @ model.last.W.array.T + model.last.b.array


@pytest.mark.parametrize(
    ("statistics", "other", "kinds"),
    [
        ("batch", (), "bbbb"),
        ("running", (), "rrrr"),
        ("running", ("bn2",), "rbrr"),
        ("batch", ("bn2",), "brbb"),
        ("batch", ("bn1", "bn4"), "rbbr"),
    ],
)
@pytest.mark.parametrize("train", [False, True])
def test_other_call_sites_use_the_other_statistics(statistics: Any, other: Any, kinds: str, train: bool) -> None:
    model = trained(Deep)
    before = state_of(model)
    with chainer.using_config("train", train):
        found = laboratory(model).outputs(batch_of(model), statistics, [CallSite(name) for name in other])
    np.testing.assert_allclose(found, normalized(model, models.data(64)[0], kinds), rtol=1e-3, atol=1e-4)
    assert state_of(model) == before
    assert all("forward" not in vars(link) for link in model.links())


def test_one_call_of_a_shared_link_is_switched_alone() -> None:
    model = trained(models.MLP, shared=True)
    x, lab, batch = models.data(64)[0], laboratory(model), batch_of(model)
    seen = {}
    for first in "br":
        for second in "br":
            h = x.astype(np.float64)
            for linear, kind in ((model.l1, first), (model.l2, second)):
                z = h @ linear.W.array.T + linear.b.array
                mean, var = (z.mean(0), z.var(0)) if kind == "b" else (model.bn1.avg_mean, model.bn1.avg_var)
                h = (z - mean) / np.sqrt(var + model.bn1.eps) * model.bn1.gamma.array + model.bn1.beta.array
                h = np.maximum(h, 0)
            seen[first + second] = h @ model.l3.W.array.T + model.l3.b.array
    one, two = CallSite("bn1", 0), CallSite("bn1", 1)
    for statistics, other, kinds in [
        ("batch", [one], "rb"), ("batch", [two], "br"), ("running", [one], "br"), ("batch", [one, two], "rr"),
    ]:  # fmt: skip
        np.testing.assert_allclose(lab.outputs(batch, statistics, other), seen[kinds], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("statistics", ["batch", "running"])
def test_moments_of_what_enters_equal_numpy(statistics: Any) -> None:
    model = trained(Deep)
    entered = laboratory(model).inputs(batch_of(model), statistics)
    assert [seen.site for seen in entered] == [CallSite(name) for name in NAMES]
    x = models.data(64)[0].astype(np.float64)
    for number, seen in enumerate(entered):
        linear, bn = model[f"l{number + 1}"], model[NAMES[number]]
        z = x @ linear.W.array.T + linear.b.array
        np.testing.assert_allclose(seen.moments.mean, z.mean(0), rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(seen.moments.var, z.var(0), rtol=1e-4)
        assert seen.moments.count == 64
        assert seen.moments.mean.dtype == np.float64
        mean, var = (z.mean(0), z.var(0)) if statistics == "batch" else (bn.avg_mean, bn.avg_var)
        x = np.maximum((z - mean) / np.sqrt(var + bn.eps) * bn.gamma.array + bn.beta.array, 0)


def test_moments_of_images_are_of_every_pixel() -> None:
    model = trained(models.CNN)
    batch = batch_of(model)
    first, second = laboratory(model).inputs(batch, "batch")
    with chainer.using_config("train", False):
        pixels = model.c1(models.data(64)[0].reshape(-1, 1, 2, 4)).array.astype(np.float64)
    np.testing.assert_allclose(first.moments.mean, pixels.mean((0, 2, 3)), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(first.moments.var, pixels.var((0, 2, 3)), rtol=1e-4)
    assert (first.moments.count, second.moments.count, second.moments.mean.shape) == (64 * 8, 64 * 8, (8,))


def test_running_statistics_are_set_in_the_arrays_that_are_there() -> None:
    model = Deep()
    model(models.data(64)[0])
    lab = laboratory(model)
    arrays = {name: (model[name].avg_mean, model[name].avg_var) for name in NAMES}
    kept = lab.running()
    lab.assign({"bn2": (np.arange(16.0), np.arange(16.0) + 1)})
    assert model.bn2.avg_mean.tolist() == list(range(16))
    assert model.bn2.avg_var.tolist() == list(range(1, 17))
    assert kept["bn2"][0].tolist() != list(range(16))  # a copy
    for name, (mean, var) in arrays.items():
        assert model[name].avg_mean is mean
        assert model[name].avg_var is var
        if name != "bn2":
            np.testing.assert_array_equal(mean, kept[name][0])
    assert lab.specs()["bn2"].bessel_corrected


class Lazy(chainer.Chain):
    """Its statistics take their size from the first batch; one link is never called."""

    def __init__(self) -> None:
        super().__init__()
        with self.init_scope():
            self.bn = L.BatchNormalization(axis=0)
            self.unused = L.BatchNormalization(axis=0)
            self.last = L.Linear(models.FEATURES, models.CLASSES)

    def forward(self, x: Any) -> Any:
        return self.last(self.bn(x))


def test_a_link_that_was_never_called_has_no_statistics() -> None:
    model = Lazy()
    assert laboratory(model).running() == {}
    (seen,) = laboratory(model).inputs(batch_of(model), "batch")
    assert seen.moments.mean.shape == (models.FEATURES,)
    assert model.bn.avg_mean is None
    with pytest.raises(ExperimentNotPossibleError, match="`bn` has no running statistics before its first call"):
        bnwatch.chainer.attribute(model, models.data())
    with pytest.raises(ValueError, match="`bn` has no running statistics before its first call"):
        bnwatch.chainer.recalibrate(model, batches())
    assert model.bn.avg_mean is None


def test_a_link_that_is_never_called_is_in_nobodys_way() -> None:
    model = Lazy()
    model(models.data()[0])
    assert {cost.subject for cost in bnwatch.chainer.attribute(model, models.data()).costs} == {"bn"}
    found = bnwatch.chainer.recalibrate(model, batches())
    assert ([change.layer for change in found.layers], found.uncalled) == (["bn"], ("unused",))
    np.testing.assert_allclose(model.bn.avg_mean, models.data()[0].mean(0), rtol=1e-4)


# --- repair --------------------------------------------------------------------------------------------------------


def cold(*build: Any) -> Any:
    """Return a trained model whose running statistics are those of a cold start."""
    model = trained(*build)
    for link in model.links():
        if isinstance(link, L.BatchNormalization):
            link.avg_mean[...], link.avg_var[...] = 0.0, 1.0
    return model


def batches(size: int = 64) -> list[np.ndarray]:
    return list(np.split(models.data()[0], 256 // size))


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("bn", [L.BatchNormalization, L.BatchRenormalization])
def test_a_cold_start_is_repaired(exact: bool, bn: Any) -> None:
    model = cold(Deep, bn)
    arrays = [(model[name].avg_mean, model[name].avg_var) for name in NAMES]
    rest = [parameter.array.tobytes() for parameter in model.params()]
    before, python, numpy = accuracy(model), random.getstate(), state_of()
    found = bnwatch.chainer.recalibrate(model, batches(), exact=exact)
    assert accuracy(model) > before + 0.2
    assert accuracy(model) > accuracy(trained(Deep, bn)) - 0.05
    assert [change.layer for change in found.layers] == list(NAMES)
    assert (found.examples, found.batches, found.exact) == (256, 4, exact)
    assert [parameter.array.tobytes() for parameter in model.params()] == rest
    assert random.getstate() == python
    assert state_of() == numpy
    for name, (mean, var) in zip(NAMES, arrays, strict=True):
        assert model[name].avg_mean is mean
        assert model[name].avg_var is var


def test_exact_statistics_are_those_of_an_evaluation() -> None:
    """In evaluation on the very examples, what enters each layer has the mean and variance it normalizes with."""
    model = cold(Deep)
    bnwatch.chainer.recalibrate(model, batches(32), exact=True)
    x = models.data()[0].astype(np.float64)
    for number, name in enumerate(NAMES):
        linear, bn = model[f"l{number + 1}"], model[name]
        z = x @ linear.W.array.T + linear.b.array
        np.testing.assert_allclose(bn.avg_mean, z.mean(0), rtol=1e-3, atol=1e-4)
        np.testing.assert_allclose(bn.avg_var, z.var(0, ddof=1), rtol=1e-3)
        x = np.maximum((z - bn.avg_mean) / np.sqrt(bn.avg_var + bn.eps) * bn.gamma.array + bn.beta.array, 0)


def test_only_the_layers_that_were_named_change() -> None:
    model = cold(Deep)
    found = bnwatch.chainer.recalibrate(model, batches(), ["bn1", "bn[34]"])
    assert [change.layer for change in found.layers] == ["bn1", "bn3", "bn4"]
    assert not model.bn2.avg_mean.any()
    assert model.bn3.avg_mean.any()


def test_a_shared_link_whose_sites_differ_is_refused_and_nothing_changes() -> None:
    model = trained(models.MLP, shared=True)
    before = state_of(model)
    with pytest.raises(ValueError, match="`bn1` is called at 2 sites that see different data: bn1#0 and bn1#1 are"):
        bnwatch.chainer.recalibrate(model, batches(32))
    assert state_of(model) == before


@pytest.mark.parametrize("exact", [False, True])
def test_nothing_changes_where_the_model_raises_in_the_middle(exact: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model = cold(Deep)
    before, calls = state_of(model), []
    forward = model.forward

    def failing(x: Any) -> Any:
        calls.append(x)
        if len(calls) == (10 if exact else 3):
            raise MemoryError
        return forward(x)

    monkeypatch.setattr(model, "forward", failing)
    with pytest.raises(ExperimentNotPossibleError, match="MemoryError"):
        bnwatch.chainer.recalibrate(model, batches(), exact=exact)
    assert state_of(model) == before
    assert all("forward" not in vars(model[name]) for name in NAMES)


def test_an_interrupt_in_the_middle_leaves_no_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    model = cold(Deep)
    before, assigned = state_of(model), []
    assign = ChainerLaboratory.assign

    def interrupted(self: Any, statistics: Any) -> None:
        assign(self, statistics)
        assigned.append(statistics)
        if len(assigned) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(ChainerLaboratory, "assign", interrupted)
    with pytest.raises(KeyboardInterrupt):
        bnwatch.chainer.recalibrate(model, batches(), exact=True)
    assert state_of(model) == before
    assert [list(statistics) for statistics in assigned] == [["bn1"], ["bn2"], list(NAMES)]


def test_a_model_that_raises_in_an_experiment_is_restored() -> None:
    model = trained(Deep)
    before = state_of(model)
    call = ForwardCall(model, "__call__", (np.zeros((3, 3), "f"),))
    broken, lab = Examples(call, np.zeros(3, np.int64), "probe"), laboratory(model)
    for fails in (lambda: lab.outputs(broken, "batch", [CallSite("bn1")]), lambda: lab.inputs(broken, "batch")):
        with pytest.raises(ExperimentNotPossibleError, match="calling the model again failed"):
            fails()
    assert state_of(model) == before
    assert all("forward" not in vars(link) for link in model.links())


def test_localise_names_where_the_signal_ends() -> None:
    model = trained(Deep)
    assert bnwatch.chainer.localise(model, models.data(), batch_size=64).first is None
    model.bn3.gamma.array[:] = 0.0
    found = bnwatch.chainer.localise(model, models.data(), batch_size=64)
    assert found.first.path == "bn3"
    assert (found.look.examples, found.first.spread) == (256, 0.0)


def test_the_watch_names_the_layer_in_its_diagnosis() -> None:
    np.random.seed(0)  # noqa: NPY002
    model = Deep()
    model.bn3.decay = 1.0  # never moves
    model.bn3.avg_mean[...] = 3.0
    optimizer = chainer.optimizers.Adam(0.01).setup(model)
    with bnwatch.chainer.watch(model, None, every=4, on_diagnosis="log") as watching:
        models.loop(model, watching, optimizer, epochs=8)
    (gap,) = (d for d in watching.diagnoses if d.rule == "BN301")
    assert "most of it at `bn3`" in gap.message
    assert gap.further[0].rows[0][0] == "bn3"
    assert isinstance(watching.watch.signals.attribution, evidence.Attribution)


class Scaled:
    """Evaluation inputs of another scale than those of the training."""

    def __init__(self, model: Any, factor: float) -> None:
        self.model, self.factor = model, np.float32(factor)
        self.cleargrads = model.cleargrads

    def __call__(self, x: Any) -> Any:
        return self.model(x if chainer.config.train else self.factor * x)


@pytest.mark.parametrize("factor", [1.0, 1 / 255])
def test_evaluation_inputs_of_another_scale_are_told_at_the_first_layer(factor: float) -> None:
    np.random.seed(0)  # noqa: NPY002
    model = Deep()
    optimizer = chainer.optimizers.Adam(0.01).setup(model)
    with bnwatch.chainer.watch(model, None, every=4, on_diagnosis="log") as watching:
        models.loop(Scaled(model, factor), watching, optimizer, epochs=8)
    found = [d for d in watching.diagnoses if d.rule in {"BN301", "BN304"} and d.state == "active"]
    assert [d.rule for d in found] == ([] if factor == 1.0 else ["BN304"])
    assert [site.subject for site in watching.watch.signals.entering.sites] == list(NAMES)
    assert watching.watch.signals.entering.sites[0].std_ratio == pytest.approx(factor, rel=0.15)
    assert all("from `bn1` on" in d.message and str(d.severity) == "warning" for d in found)
