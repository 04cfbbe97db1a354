"""What the tap reads is what batch normalization used, to the bit."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from bnwatch.chainer.forward import Stack
from bnwatch.chainer.session import Session
from bnwatch.watch import Watch

from . import chainer_models as models
from .chainer_models import F, L, Record, chainer


class Clock:
    @staticmethod
    def now(*, trained: bool) -> int:
        return 0


def session_of(link: Any) -> Session:
    session = Session(Watch(None, every=1, on_diagnosis="log", experiments=False), {"": link}, Clock())
    session.start()
    return session


def finish(session: Session, step: int = 1) -> None:
    session.end_step([call for call, _ in session.tap.take()], step, 0)
    session.tap.leave()


CONFIGURATIONS = [
    ({"size": 5}, (16, 5), (0,)),
    ({"size": 5}, (4, 5, 6, 7), (0, 2, 3)),
    ({"size": (5, 6)}, (4, 5, 6, 7), (0, 3)),
    ({"axis": (0, 2, 3)}, (4, 5, 6, 7), (0, 2, 3)),
    ({"axis": (0, 1, 2)}, (4, 5, 6, 7), (0, 1, 2)),
    ({"axis": 0}, (9, 5, 6), (0,)),
    ({"size": 5, "use_gamma": False}, (16, 5), (0,)),
    ({"size": 5, "use_beta": False, "use_gamma": False}, (4, 5, 6, 7), (0, 2, 3)),
    ({"size": 5, "initial_avg_mean": 2.0, "initial_avg_var": 3.0}, (16, 5), (0,)),
    ({"size": 5, "decay": 0.99, "eps": 1e-3}, (16, 5), (0,)),
    ({"size": 1}, (16, 1), (0,)),
]


@pytest.mark.parametrize(("arguments", "shape", "axis"), CONFIGURATIONS)
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_two_calls_equal_numpy_bit_for_bit(
    arguments: dict[str, Any], shape: tuple[int, ...], axis: tuple[int, ...], dtype: str, monkeypatch: Any
) -> None:
    record = Record(monkeypatch)
    link = L.BatchNormalization(**arguments)
    random = np.random.default_rng(0)
    inputs = [(random.normal(1, 3, shape)).astype(dtype) for _ in range(2)]
    session = session_of(link)
    for x in inputs:
        link(x)
    finish(session)

    (step,) = record.steps
    assert [str(call.site) for call in step.calls] == ["BatchNormalization#0", "BatchNormalization#1"]
    mean = np.full(link.avg_mean.shape, arguments.get("initial_avg_mean", 0.0), np.float32)
    var = np.full(link.avg_mean.shape, arguments.get("initial_avg_var", 1.0), np.float32)
    decay = arguments.get("decay", 0.9)
    for x, call in zip(inputs, step.calls, strict=True):
        assert call.batch.count == x.size // mean.size
        assert call.batch.source == "measured"
        np.testing.assert_array_equal(call.batch.mean, x.mean(axis=axis, dtype=np.float32).ravel())
        np.testing.assert_array_equal(call.batch.var, x.var(axis=axis, dtype=np.float32).ravel())
        mean *= decay
        mean += (1 - decay) * call.batch.mean.reshape(mean.shape)
        var *= decay
        var += (1 - decay) * (call.batch.count / max(call.batch.count - 1.0, 1.0)) * call.batch.var.reshape(var.shape)
        np.testing.assert_array_equal(call.running.mean, link.avg_mean.ravel())
        np.testing.assert_array_equal(call.running.var, link.avg_var.ravel())
        assert (call.running.updates, call.running.decay, call.running.bessel_corrected) == (2, decay, True)
        assert call.spec.channels == mean.size
    np.testing.assert_array_equal(link.avg_mean, mean)
    np.testing.assert_array_equal(link.avg_var, var)


def test_half_precision_link() -> None:
    link = L.BatchNormalization(5, dtype=np.float16)
    x = np.random.default_rng(0).normal(1, 3, (32, 5)).astype(np.float16)
    session = session_of(link)
    link(x)
    (record,) = session._records([call for call, _ in session.tap.take()])
    session.tap.leave()
    assert record.batch.mean.dtype == np.float16
    np.testing.assert_array_equal(record.batch.mean, x.mean(axis=0, dtype=np.float16))
    np.testing.assert_array_equal(record.batch.var, x.var(axis=0, dtype=np.float16))


def test_batch_renormalization_to_rounding(monkeypatch: Any) -> None:
    record = Record(monkeypatch)
    np.random.seed(0)  # noqa: NPY002
    link = L.BatchRenormalization(5, rmax=3, dmax=5)
    inputs = [np.random.default_rng(n).normal(100, 1, (4, 5, 6, 7 - n)).astype("f") for n in range(2)]
    session = session_of(link)
    for x in inputs:
        link(x)
    finish(session)
    assert [call.spec.kind for call in record.steps[0].calls] == ["BatchRenormalization"] * 2
    for x, call in zip(inputs, record.steps[0].calls, strict=True):
        np.testing.assert_allclose(call.batch.mean, x.mean(axis=(0, 2, 3)), rtol=1e-6)
        np.testing.assert_allclose(call.batch.var, x.var(axis=(0, 2, 3)), rtol=1e-4)


def test_forget_recomputes_without_a_second_call(monkeypatch: Any) -> None:
    record = Record(monkeypatch)
    link = L.BatchNormalization(5)
    session = session_of(link)
    y = F.forget(link, chainer.Variable(np.random.default_rng(0).normal(size=(8, 5)).astype("f")))
    F.sum(y * y).backward()
    finish(session)
    assert [str(call.site) for call in record.steps[0].calls] == ["BatchNormalization#0"]
    assert record.steps[0].calls[0].running.updates == 1


def test_finetuning_leaves_the_number_of_updates_unknown(monkeypatch: Any) -> None:
    record = Record(monkeypatch)
    link = L.BatchNormalization(5)
    session = session_of(link)
    x = np.random.default_rng(0).normal(size=(8, 5)).astype("f")
    link.start_finetuning()
    link(x, finetune=True)
    finish(session)
    (call,) = record.steps[0].calls
    assert call.running.updates is None
    np.testing.assert_array_equal(call.running.mean, x.mean(axis=0))


def test_updates_are_unknown_for_statistics_that_had_moved_before(monkeypatch: Any) -> None:
    record = Record(monkeypatch)
    link = L.BatchNormalization(5)
    x = np.random.default_rng(0).normal(size=(8, 5)).astype("f")
    link(x)
    session = session_of(link)
    link(x)
    finish(session)
    assert record.steps[0].calls[0].running.updates is None


def test_new_arrays_are_found_again(monkeypatch: Any) -> None:
    record = Record(monkeypatch)
    model = models.MLP()
    session = session_of(model)
    x = models.data()[0]
    for layer in (model.bn1, model.bn2):  # what to_gpu and to_cpu do
        layer.avg_mean, layer.avg_var = layer.avg_mean.copy(), layer.avg_var.copy()
    model(x)
    finish(session)
    assert [call.spec.path for call in record.steps[0].calls] == ["bn1", "bn2"]


def test_another_model_is_not_ours(monkeypatch: Any) -> None:
    record = Record(monkeypatch)
    model, other = models.MLP(), models.MLP()
    session = session_of(model)
    x = models.data()[0]
    other(x)
    model(x)
    finish(session)
    assert [str(call.site) for call in record.steps[0].calls] == ["bn1#0", "bn2#0"]


def test_layers_are_told_in_the_order_of_the_forward_pass(monkeypatch: Any) -> None:
    class Backwards(chainer.Chain):
        def __init__(self) -> None:
            super().__init__()
            with self.init_scope():
                self.last = L.BatchNormalization(8)
                self.unused = L.BatchNormalization(8)
                self.first = L.BatchNormalization(axis=0)

        def forward(self, x: Any) -> Any:
            return self.last(self.first(x))

    record = Record(monkeypatch)
    model = Backwards()
    session = session_of(model)
    model(models.data()[0])
    finish(session)
    assert [spec.path for spec in record.attachments[0].layers] == ["first", "last", "unused"]
    assert [spec.channels for spec in record.attachments[0].layers] == [8, 8, 8]


def test_unsupported_links_are_named(monkeypatch: Any) -> None:
    record = Record(monkeypatch)
    session = session_of(chainer.Sequential(L.Linear(8, 8), L.DecorrelatedBatchNormalization(8)))
    finish(session)
    assert record.attachments[0].layers == ()
    assert "DecorrelatedBatchNormalization" in record.attachments[0].unsupported["1"]


def test_nothing_is_kept_on_a_step_that_is_not_sampled() -> None:
    model = models.MLP()
    session = session_of(model)
    session.tap.sampled = False
    model(models.data()[0])
    calls = [call for call, _ in session.tap.take()]
    session.tap.leave()
    assert [(call.mean, call.scale) for call in calls] == [(None, None)] * 2
    assert session.layers.watched[0].updates == 1
    assert isinstance(session.passes._stack, Stack)


def test_cudnn_keeps_only_the_inverse_deviation() -> None:
    from bnwatch.chainer.session import _batch_statistics
    from bnwatch.chainer.tap import Call

    var = np.array([0.5, 4.0, 1e-9], np.float32)
    inv_std = (1 / np.sqrt(var.astype(np.float64) + 2e-5)).astype(np.float32)
    call = Call(0, 0, 8, 8, 2e-5, 0.9, None, None, "inv_std", recomputed=False)
    found = _batch_statistics(call, np.zeros(3, np.float32), inv_std)
    np.testing.assert_allclose(found.var, var, rtol=1e-5, atol=1e-11)
    assert (found.var >= 0).all()
