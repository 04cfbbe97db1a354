"""Links that are not quite `L.BatchNormalization`, those that cannot be watched, and numbers out of the ordinary."""

from __future__ import annotations

import warnings
from functools import partial
from typing import Any

import chainerx
import hypothesis
import numpy as np
import pytest
from chainer.functions.normalization import batch_normalization as functions
from hypothesis import strategies

import bnwatch.chainer
from bnwatch.chainer.quiet import statistics_of, undisturbed

from . import chainer_models as models
from .chainer_models import CLASSES, FEATURES, F, L, Record, chainer, state_of


def seen(link: Any, *inputs: Any, **arguments: Any) -> Any:
    """Return the calls of one step in which a link is called on these inputs, and the watch."""
    with pytest.MonkeyPatch.context() as patch:
        record = Record(patch)
        with bnwatch.chainer.watch(link, None, every=1, on_diagnosis="log", experiments=False) as watch:
            for x in inputs:
                F.sum(link(chainer.Variable(x), **arguments)).backward()
            watch.step()
    assert not [diagnosis for diagnosis in watch.diagnoses if diagnosis.rule == "BN903"]
    return (record.steps[0].calls if record.steps else ()), watch


def normal(*shape: int, mean: float = 1.0, seed: int = 0) -> Any:
    return np.random.default_rng(seed).normal(mean, 2.0, shape).astype(np.float32)


@hypothesis.given(data=strategies.data())
@hypothesis.settings(max_examples=60, deadline=None)
def test_any_shape_and_axis(data: Any) -> None:
    shape = tuple(data.draw(strategies.lists(strategies.integers(1, 5), min_size=2, max_size=5)))
    axis = tuple(sorted(data.draw(strategies.sets(strategies.integers(0, len(shape) - 1), min_size=1))))
    hypothesis.assume(len(axis) < len(shape))
    dtype = data.draw(strategies.sampled_from([np.float16, np.float32, np.float64]))
    order = data.draw(strategies.permutations(range(len(shape))))
    x = np.random.default_rng(0).normal(3, 2, [shape[n] for n in np.argsort(order)]).astype(dtype).transpose(order)
    link = L.BatchNormalization(axis=axis, dtype=data.draw(strategies.sampled_from([np.float32, dtype])))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # one element a channel
        ((call,), _) = seen(link, x)
    wide = np.promote_types(dtype, link.avg_mean.dtype)
    np.testing.assert_array_equal(call.batch.mean, x.mean(axis=axis, dtype=wide).ravel())
    np.testing.assert_array_equal(call.batch.var, x.var(axis=axis, dtype=wide).ravel())
    assert call.batch.count == np.prod([shape[n] for n in axis])
    assert call.spec.axis == axis


RENORMALIZING = [
    ((16, 5), {}),
    ((4, 5, 6, 7), {"rmax": 3, "dmax": 5}),
    ((16, 5), {"use_gamma": False, "use_beta": False, "decay": 0.5, "eps": 1e-3}),
]


@pytest.mark.parametrize(("shape", "arguments"), RENORMALIZING)
@pytest.mark.parametrize("mean", [0.0, 100.0])
def test_batch_renormalization_within_its_rounding(
    shape: tuple[int, ...], arguments: dict[str, Any], mean: float
) -> None:
    """The link keeps ``x_hat = (x - mean) / std`` and ``std``; the mean is ``x - x_hat * std`` at one element.

    With u = eps / 2, two roundings in x_hat, one in the product and one in the difference put it off by
    3 u |x - mean| + u |mean| at most, to first order; four u and one u here. The variance is ``std**2 - eps`` in
    float64 from a sum and a root that were rounded: (1 + 2) u of ``var + eps``, and u for the type of the record.
    """
    np.random.seed(0)  # noqa: NPY002
    link = L.BatchRenormalization(shape[1], **arguments)
    running = [np.zeros(shape[1], np.float32), np.ones(shape[1], np.float32)]
    inputs = [normal(*shape, mean=mean, seed=seed) for seed in range(3)]
    calls, _ = seen(link, *inputs)
    u, eps = np.finfo(np.float32).eps / 2, arguments.get("eps", 2e-5)
    axis = (0, *range(2, len(shape)))
    assert [str(call.site) for call in calls] == [f"BatchRenormalization#{n}" for n in range(3)]
    for x, call in zip(inputs, calls, strict=True):
        expected, var = x.mean(axis=axis, dtype=np.float32), x.var(axis=axis, dtype=np.float32)
        first = x[(0, slice(None), *(0,) * (x.ndim - 2))]
        limit = 4 * u * np.abs(first - expected) + 2 * u * np.abs(expected)
        assert (np.abs(call.batch.mean - expected) <= limit).all()
        assert (np.abs(call.batch.var - var) <= 4 * u * (var + eps)).all()
        m = x.size // shape[1]
        assert call.batch.count == m
        models.update(running, (expected, var), m, link.decay)
    for call in calls:
        np.testing.assert_array_equal(call.running.mean, running[0])
        np.testing.assert_array_equal(call.running.var, running[1])
        assert (call.running.updates, call.running.decay) == (3, link.decay)


def test_batch_renormalization_takes_its_initial_mean_for_an_axis() -> None:
    """Chainer 7 passes ``initial_avg_mean`` on by position, where ``axis`` is; the link computes as if it had none."""
    link = L.BatchRenormalization(5, initial_avg_mean=2, initial_avg_var=3)
    x = normal(8, 5)
    ((call,), _) = seen(link, x)
    np.testing.assert_allclose(call.batch.mean, x.mean(axis=0), rtol=1e-5)
    assert (call.spec.axis, call.spec.initial) == ((2,), (3.0, 1.0))
    np.testing.assert_array_equal(link.avg_mean, call.running.mean)


def choose(monkeypatch: Any, kind: type) -> None:
    """Let every function run by this implementation."""
    defaults = functions.BatchNormalization.__init__.__defaults__
    monkeypatch.setattr(functions.BatchNormalization.__init__, "__defaults__", (*defaults[:-1], lambda *_: kind()))


def test_what_cudnn_keeps_is_read(monkeypatch: Any) -> None:
    """There ``node.var`` is the running variance, and of the batch variance only ``inv_std`` is left."""

    class _CudnnBatchNormalizationImpl(functions.GeneralBatchNormalizationImpl):
        def forward(self, **arguments: Any) -> Any:
            kept = list(super().forward(**arguments))
            kept[5] = arguments["running_var"]
            return tuple(kept)

    choose(monkeypatch, _CudnnBatchNormalizationImpl)
    link = L.BatchNormalization(5)
    x = normal(16, 5)
    calls, _ = seen(link, x, 3 * x)
    for call, given in zip(calls, (x, 3 * x), strict=True):
        np.testing.assert_array_equal(call.batch.mean, given.mean(axis=0))
        # a root, a reciprocal and the sum in it, each rounded: at most (1 + 2 + 2) u of var + eps, and u of the result
        var = given.var(axis=0)
        assert (np.abs(call.batch.var - var) <= 6 * 2.0**-24 * (var + link.eps)).all()
        assert (np.abs(call.batch.var - link.avg_var) > 1e-2).all()


class FakeIdeepArray:
    """What iDeep returns: an array that is none of NumPy's, on the host."""

    def __init__(self, array: Any) -> None:
        self._array = array
        self.shape, self.size, self.ndim, self.dtype = array.shape, array.size, array.ndim, array.dtype

    def __array__(self, dtype: Any = None, copy: Any = None) -> Any:
        return np.array(self._array, dtype)


def test_what_ideep_keeps_is_read(monkeypatch: Any) -> None:
    class _IDeepBatchNormalizationImpl(functions.GeneralBatchNormalizationImpl):
        def forward(self, **arguments: Any) -> Any:
            kept = list(super().forward(**arguments))
            kept[4:6] = map(FakeIdeepArray, kept[4:6])
            return tuple(kept)

    choose(monkeypatch, _IDeepBatchNormalizationImpl)
    x, link, record = normal(16, 5), L.BatchNormalization(5), Record(monkeypatch)
    with bnwatch.chainer.watch(link, None, every=1, on_diagnosis="log", experiments=False) as watch:
        link(x)  # not differentiated: that part is not faked
        watch.step()
    (call,) = record.steps[0].calls
    np.testing.assert_array_equal(call.batch.mean, x.mean(axis=0))
    np.testing.assert_array_equal(call.batch.var, x.var(axis=0))


def reasons(model: Any, *inputs: Any) -> dict[str, str]:
    """Return what a watched step calls unsupported, after BN902 has said it."""
    with pytest.MonkeyPatch.context() as patch:
        record = Record(patch)
        with bnwatch.chainer.watch(model, None, every=1, on_diagnosis="log", experiments=False) as watch:
            for x in inputs:
                F.sum(model(x)).backward()
            watch.step()
    (attachment,) = record.attachments
    found = dict(attachment.unsupported)
    told = [diagnosis for diagnosis in watch.diagnoses if diagnosis.rule == "BN902"]
    assert [note for d in told for note in d.notes if note[0] == "`"] == [f"`{p}`: {why}" for p, why in found.items()]
    assert {diagnosis.rule for diagnosis in watch.diagnoses} <= {"BN902"}
    return found


class Calling(chainer.Link):
    """Calls a function of x, gamma and beta by itself."""

    def __init__(self, function: Any, **persistent: Any) -> None:
        super().__init__()
        self._function = function
        for name, value in persistent.items():
            self.add_persistent(name, value)
        with self.init_scope():
            self.gamma = chainer.Parameter(np.ones(5, np.float32))

    def forward(self, x: Any) -> Any:
        return self._function(self, x, self.gamma, np.zeros(5, np.float32))


def arrays() -> tuple[Any, Any]:
    return np.zeros(5, np.float32), np.ones(5, np.float32)


RUNNING = arrays()
UNSUPPORTED = {
    "decorrelated": (
        lambda: L.DecorrelatedBatchNormalization(4, groups=2),
        normal(16, 4),
        {
            "DecorrelatedBatchNormalization": "DecorrelatedBatchNormalization keeps no running variance (avg_var), "
            "and its batch statistics to itself"
        },
    ),
    "no running statistics": (
        lambda: Calling(lambda _, *inputs: F.batch_normalization(*inputs)),
        normal(16, 5),
        {
            "F.batch_normalization": "called without running statistics: evaluation normalizes with batch statistics, "
            "too"
        },
    ),
    "running statistics of no link": (
        lambda: Calling(
            lambda _, *inputs: F.batch_normalization(*inputs, running_mean=RUNNING[0], running_var=RUNNING[1])
        ),
        normal(16, 5),
        {
            "F.batch_normalization": "called with running statistics that no link keeps as persistent avg_mean and "
            "avg_var"
        },
    ),
    "a link without decay": (
        lambda: Calling(
            lambda self, *inputs: F.batch_normalization(*inputs, running_mean=self.avg_mean, running_var=self.avg_var),
            avg_mean=arrays()[0],
            avg_var=arrays()[1],
        ),
        normal(16, 5),
        {
            "Calling": "Calling has no number `decay`",
            "F.batch_normalization": "called with running statistics that no link keeps as persistent avg_mean and "
            "avg_var",
        },
    ),
    "computed in its own way": (
        lambda: Calling(
            lambda _, x, gamma, __: (x - F.broadcast_to(F.mean(x, axis=0), x.shape)) * F.broadcast_to(gamma, x.shape),
            avg_mean=arrays()[0],
            avg_var=arrays()[1],
            decay=0.9,
            eps=1e-5,
        ),
        normal(16, 5),
        {"Calling": "Calling: F.batch_normalization was not called with its avg_mean as running_mean"},
    ),
    "fixed statistics": (lambda: Calling(lambda _, *i: F.fixed_batch_normalization(*i, *arrays())), normal(16, 5), {}),
    "group normalization": (lambda: L.GroupNormalization(2, 4), normal(16, 4), {}),
    "layer normalization": (lambda: L.LayerNormalization(5), normal(16, 5), {}),
}


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_what_cannot_be_watched_is_said(name: str) -> None:
    build, x, expected = UNSUPPORTED[name]
    assert reasons(build(), x) == expected


def test_what_cannot_be_watched_is_said_beside_what_can() -> None:
    model = chainer.Sequential(L.BatchNormalization(4), L.DecorrelatedBatchNormalization(4, groups=2))
    assert list(reasons(model, normal(16, 4))) == ["1"]


def test_normalization_without_running_statistics_is_no_matter_beside_a_link() -> None:
    """Instance normalization is written so."""
    model = chainer.Sequential(L.BatchNormalization(5), Calling(lambda _, *inputs: F.batch_normalization(*inputs)))
    assert reasons(model, normal(16, 5)) == {}


def test_chainerx_is_refused(monkeypatch: Any) -> None:
    """ChainerX is not built here: it runs its own functions, and no hook sees any of them."""
    device = object.__new__(chainer.backend.ChainerxDevice)
    model = chainer.Sequential(L.BatchNormalization(5))
    monkeypatch.setattr(model[0], "_device", device)
    reason = "BatchNormalization is on a device of ChainerX, which shows function hooks nothing"
    assert reasons(model) == {"0": reason}
    assert not chainerx.is_available()


@pytest.mark.parametrize("kind", [models.Written, models.WrittenLongAgo])
def test_a_link_of_ones_own_takes_part_in_everything(kind: Any, monkeypatch: Any) -> None:
    train = partial(models.by_hand, partial(models.MLP, bn=kind, dropout=0.0), seed=0)
    expected, _, _ = train(watched=False)
    record = Record(monkeypatch)
    found, watch, model = train(watched=True)
    assert type(model.bn1) is kind
    assert found == expected
    assert not [diagnosis for diagnosis in watch.diagnoses if diagnosis.rule.startswith("BN9")]
    assert "BN301" not in {skipped.rule for skipped in watch.skipped}  # the cells were measured
    assert [(spec.path, spec.kind, spec.decay) for spec in record.attachments[0].layers] == [
        ("bn1", kind.__name__, 0.8),
        ("bn2", kind.__name__, 0.8),
    ]
    x, t = models.data()
    before = state_of(model)
    cells = bnwatch.chainer.crosscheck(model, train=(x, t), batch_size=32)
    assert state_of(model) == before
    # by hand, with what the class does itself; the running statistics that it then has are the average over batches
    means = [model.l1(x[n : n + 32]).array.mean(axis=0) for n in range(0, len(x), 32)]
    copied = model.copy("copy")
    with chainer.no_backprop_mode():
        hits = [copied(x[n : n + 32]).array.argmax(axis=1) == t[n : n + 32] for n in range(0, len(x), 32)]
    measured = dict(cells.rows())["training"]
    assert measured["batch"].accuracy == np.mean(hits)
    bnwatch.chainer.recalibrate(copied, [x[n : n + 32] for n in range(0, len(x), 32)])
    np.testing.assert_allclose(copied.bn1.avg_mean, np.mean(means, axis=0), rtol=1e-4, atol=1e-5)
    with chainer.using_config("train", False):
        assert measured["population"].accuracy == pytest.approx((copied(x).array.argmax(axis=1) == t).mean(), abs=0.02)


@pytest.mark.parametrize("kind", [models.Written, models.WrittenLongAgo])
def test_a_link_of_ones_own_that_is_shared_keeps_its_running_statistics_in_an_experiment(kind: Any) -> None:
    """It does not know Chainer's switch for recomputation, and its next call may be one with running statistics."""
    link = kind(5)
    link(normal(8, 5))
    before = state_of(link)
    with undisturbed([link]), statistics_of([link], "batch"):
        link(normal(8, 5, seed=1))
        assert state_of(link) == before


def test_the_decay_of_finetuning_is_that_of_the_call() -> None:
    link = L.BatchNormalization(5, decay=0.9)
    link.start_finetuning()
    x = normal(8, 5)
    calls, _ = seen(link, x, 3 * x, finetune=True)
    assert [call.running.decay for call in calls] == [0.5, 0.5]  # of the last of two: 1 - 1/2
    assert [call.running.updates for call in calls] == [None, None]
    np.testing.assert_allclose(link.avg_mean, (x.mean(axis=0) + 3 * x.mean(axis=0)) / 2, rtol=1e-6)
    assert calls[0].spec.decay == 0.9


def test_statistics_that_were_loaded_before_have_an_unknown_past(tmp_path: Any) -> None:
    source, link = L.BatchNormalization(5), L.BatchNormalization(axis=0)
    source(normal(8, 5))
    chainer.serializers.save_npz(tmp_path / "link.npz", source)
    chainer.serializers.load_npz(tmp_path / "link.npz", link)
    ((call,), _) = seen(link, normal(8, 5))
    assert call.running.updates is None


NUMBERS = {
    "huge mean": normal(64, 5) * 1e-3 + np.float32(1e4),
    "constant": np.full((16, 5), 3.1, np.float32),
    "zeros": np.zeros((16, 5), np.float32),
    "infinite": np.where(np.eye(16, 5) > 0, np.float32(np.inf), normal(16, 5)),
    "not a number": np.where(np.arange(5) == 2, np.float32(np.nan), normal(16, 5)),
}


@pytest.mark.parametrize("name", NUMBERS)
def test_numbers_out_of_the_ordinary_are_recorded_as_chainer_has_them(name: str) -> None:
    x = NUMBERS[name]
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore", RuntimeWarning)
        ((call,), watch) = seen(L.BatchNormalization(5), x)
        np.testing.assert_array_equal(call.batch.mean, x.mean(axis=0))
        np.testing.assert_array_equal(call.batch.var, x.var(axis=0))
    told = "BN401" in {diagnosis.rule for diagnosis in watch.diagnoses}
    assert told == (not np.isfinite(x).all())


def test_one_element_a_channel(monkeypatch: Any) -> None:
    record, link = Record(monkeypatch), L.BatchNormalization(5)
    with bnwatch.chainer.watch(link, None, every=1, on_diagnosis="log", experiments=False) as watch:
        for seed in range(2):
            with pytest.warns(UserWarning, match="no more than one sample"):
                F.sum(link(chainer.Variable(normal(1, 5, seed=seed)))).backward()
            watch.step()
    call = record.steps[0].calls[0]
    assert call.batch.count == 1
    assert not call.batch.var.any()
    np.testing.assert_array_equal(call.running.var, np.float32(0.9) * np.ones(5, np.float32))
    assert "BN205" in {diagnosis.rule for diagnosis in watch.diagnoses}


class Idle(chainer.Chain):
    """Has a layer that is never called, and one that is called in evaluation mode alone."""

    def __init__(self) -> None:
        super().__init__()
        with self.init_scope():
            self.bn, self.still, self.never = (L.BatchNormalization(FEATURES) for _ in range(3))
            self.out = L.Linear(FEATURES, CLASSES)

    def forward(self, x: Any) -> Any:
        h = self.bn(x)
        with chainer.using_config("train", False):
            h = self.still(h)
        return self.out(h)


def test_layers_that_are_not_trained_have_no_calls(monkeypatch: Any) -> None:
    record = Record(monkeypatch)
    model = Idle()
    with bnwatch.chainer.watch(model, None, every=1, on_diagnosis="log") as watch:
        models.loop(model, watch)
    assert [spec.path for spec in record.attachments[0].layers] == ["bn", "never", "still"]
    assert {call.spec.path for step in record.steps for call in step.calls} == {"bn"}
    assert not [diagnosis.message for diagnosis in watch.diagnoses if diagnosis.rule.startswith("BN9")]
    assert (model.still.avg_mean == 0).all()
