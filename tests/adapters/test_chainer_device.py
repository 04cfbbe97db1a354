"""What the watch does to arrays that are not on the host: nothing, but for one copy a device on a sampled step.

The device is a fake, see `chainer_device`; functions are shown to the tap as Chainer would show them on a GPU.
"""

from __future__ import annotations

from collections import Counter
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from chainer.function import FunctionAdapter
from chainer.functions.evaluation.accuracy import Accuracy
from chainer.functions.normalization import batch_normalization, batch_renormalization

from bnwatch.chainer.arrays import Average, collect, to_float, to_host
from bnwatch.chainer.quiet import undisturbed
from bnwatch.chainer.session import Session
from bnwatch.watch import Watch

from . import chainer_device
from .chainer_device import DeviceArray, log
from .chainer_models import L, Record, chainer


@pytest.fixture(autouse=True)
def generators(monkeypatch: Any) -> dict[int, Any]:
    return chainer_device.connect(monkeypatch)


RANDOM = np.random.default_rng(0)


def values(size: int, dtype: str = "float32") -> np.ndarray:
    return RANDOM.normal(1.0, 3.0, size).astype(dtype)


def test_the_fake_is_taken_for_a_device_and_refuses_the_host() -> None:
    array = DeviceArray(values(3), device=1)
    device = chainer.backend.get_device_from_array(array)
    assert (type(device).__name__, device.name) == ("GpuDevice", "@cupy:1")
    assert isinstance(array, chainer.get_array_types())
    for convert in (np.array, np.asarray, np.mean):
        with pytest.raises(TypeError, match="Implicit conversion"):
            convert(array)
    assert log == []


def test_one_concatenation_and_one_copy_a_device() -> None:
    kinds = ["float32", "float16", "float32", "float64", "float32"]
    host = [values(n + 1, kind).reshape(1, -1) for n, kind in enumerate(kinds)]
    arrays = [DeviceArray(array, device=n % 2) for n, array in enumerate(host)]
    found = to_host([arrays[0], host[1], *arrays[1:]])
    assert Counter(log) == Counter({("concatenate", n): 1 for n in (0, 1)} | {("to host", n): 1 for n in (0, 1)})
    for array, expected in zip(found, [host[0], host[1], *host[1:]], strict=True):
        assert (array.dtype, array.shape) == (expected.dtype, expected.shape)
        np.testing.assert_array_equal(array, expected)


def test_one_array_is_copied_without_another_on_the_device() -> None:
    (found,) = to_host([DeviceArray(np.arange(6).reshape(2, 3))])
    assert found.shape == (2, 3)
    assert log == [("to host", 0)]


def test_integers_keep_every_digit_beside_other_types() -> None:
    large = np.array([2**62 + 1, -(2**62) - 1])
    number, numbers, flags = to_host(
        [DeviceArray(np.float32(0.1)), DeviceArray(large), DeviceArray(np.array([True, False]))]
    )
    np.testing.assert_array_equal(numbers, large)
    assert numbers.dtype == np.int64
    assert number == np.float32(0.1)
    assert flags.tolist() == [True, False]


def test_an_average_waits_for_nothing_until_it_is_read() -> None:
    accuracy, loss = Average(), Average()
    for n in range(50):
        accuracy.add(chainer.Variable(np.array(n, "f")))
        accuracy.add(DeviceArray(np.float32(n)))
        loss.add(DeviceArray(np.array([n, n + 1], np.float32)))
    assert log == []
    (array,) = collect([DeviceArray(np.ones(3))], accuracy, loss)
    assert log == [("concatenate", 0), ("to host", 0)]
    assert array.tolist() == [1, 1, 1]
    assert (accuracy.read(), loss.read()) == (24.5, 25.0)
    assert log == [("concatenate", 0), ("to host", 0)]
    assert to_float(DeviceArray(np.float32(2))) == 2


class Clock:
    @staticmethod
    def now(*, trained: bool) -> int:
        return 0


class Program:
    """A link on a device, and the functions of its training as the tap sees them."""

    def __init__(self, *, device: int = 0, renormalization: bool = False, dtype: str = "float32") -> None:
        self.device, self.dtype = device, dtype
        self.link = L.BatchRenormalization(5) if renormalization else L.BatchNormalization(5)
        self.link.avg_mean, self.link.avg_var = self.array(np.zeros(5)), self.array(np.ones(5))
        self.x, self.gamma = self.array(values(60).reshape(12, 5)), self.array(np.ones(5))
        self.mean, self.var = self.x._values.mean(axis=0), self.x._values.var(axis=0)
        self.labels = DeviceArray(np.arange(12, dtype=np.int32) % 3, device)

    def array(self, array: Any) -> DeviceArray:
        return DeviceArray(np.asarray(array, self.dtype), self.device)

    def node(self, implementation: str) -> Any:
        if implementation == "renormalization":
            std = np.sqrt(self.var + self.link.eps)
            function = batch_renormalization.BatchRenormalizationFunction(
                self.link.eps, self.link.avg_mean, self.link.avg_var
            )
            function.std, function.x_hat = self.array(std), self.array((self.x._values - self.mean) / std)
            self.function = function  # its node does not own it
            return FunctionAdapter(function)
        node = batch_normalization.BatchNormalization.__new__(batch_normalization.BatchNormalization)
        node.running_mean, node.running_var, node.eps = self.link.avg_mean, self.link.avg_var, self.link.eps
        node.decay = self.link.decay
        node._impl = getattr(batch_normalization, implementation).__new__(getattr(batch_normalization, implementation))
        node.mean, node.inv_std = self.array(self.mean), self.array(1 / np.sqrt(self.var + self.link.eps))
        node.var = self.link.avg_var if "Cudnn" in implementation else self.array(self.var)
        return node

    def step(self, session: Session, implementation: str, *, calls: int = 2) -> None:
        for _ in range(calls):
            session.tap.forward_postprocess(self.node(implementation), (self.x, self.gamma, self.gamma))
        session.tap.forward_postprocess(Accuracy(), (self.x, self.labels))
        session.accuracy.add(self.array(0.25))
        session.loss.add(chainer.Variable(np.array(2.0, "f")))
        session.loss.add(self.array(1.0))
        session.end_step([call for call, _ in session.tap.take()], session.step + 1, 0)


GENERAL, CUDNN, RENORMALIZATION = "GeneralBatchNormalizationImpl", "_CudnnBatchNormalizationImpl", "renormalization"


def failed(error: Exception) -> None:
    raise error


def session_of(*programs: Program, every: int = 1) -> Session:
    models = {str(n) if n else "": program.link for n, program in enumerate(programs)}
    session = Session(Watch(None, every=every, on_diagnosis="log", experiments=False), models, Clock())
    session.tap._failed = failed  # what would disable the watch fails the test
    session.start()
    log.clear()
    return session


@pytest.mark.parametrize("implementation", [GENERAL, CUDNN, RENORMALIZATION])
def test_nothing_touches_the_device_on_steps_that_are_not_sampled(implementation: str, monkeypatch: Any) -> None:
    record = Record(monkeypatch)
    program = Program(renormalization=implementation == RENORMALIZATION)
    session = session_of(program, every=10)
    touched: dict[int, list[Any]] = {}
    for step in range(1, 201):
        log.clear()
        program.step(session, implementation)
        touched[step] = list(log)
    session.tap.leave()
    sampled = {step.step for step in record.steps}
    assert 200 in sampled
    assert len(sampled) < 100
    assert {step for step, done in touched.items() if done} == sampled
    assert session.watch.enabled


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("implementation", [GENERAL, CUDNN, RENORMALIZATION])
def test_a_sample_is_one_concatenation_and_one_copy(implementation: str, dtype: str, monkeypatch: Any) -> None:
    record = Record(monkeypatch)
    program = Program(renormalization=implementation == RENORMALIZATION, dtype=dtype)
    session = session_of(program)
    program.step(session, implementation)
    session.tap.leave()
    kernels = 4 if implementation == RENORMALIZATION else 0  # the mean at one element, twice
    assert log == [("kernel", 0)] * kernels + [("concatenate", 0), ("to host", 0)]
    (step,) = record.steps
    assert (step.accuracy, step.loss) == (0.25, 1.5)
    tolerance = {"float32": 2e-5, "float16": 5e-2}[dtype] if implementation != GENERAL else 0
    for call in step.calls:
        np.testing.assert_allclose(call.batch.mean, program.mean, rtol=tolerance, atol=tolerance)
        np.testing.assert_allclose(call.batch.var, program.var, rtol=tolerance, atol=tolerance)
        assert call.batch.mean.dtype == dtype
        np.testing.assert_array_equal(call.running.var, np.ones(5))


def test_two_devices_are_read_once_each(monkeypatch: Any) -> None:
    record = Record(monkeypatch)
    programs = [Program(device=n, renormalization=True) for n in range(2)]
    session = session_of(*programs)
    for program in programs:
        session.tap.forward_postprocess(program.node(RENORMALIZATION), (program.x, program.gamma, program.gamma))
    session.end_step([call for call, _ in session.tap.take()], 1, 0)
    session.tap.leave()
    reads = [done for done in log if done[0] != "kernel"]
    assert Counter(reads) == Counter({(what, n): 1 for n in range(2) for what in ("concatenate", "to host")})
    for call, program in zip(record.steps[0].calls, programs, strict=True):
        np.testing.assert_allclose(call.batch.mean, program.mean, rtol=1e-5)


def test_no_array_of_a_step_outlives_it() -> None:
    import weakref

    program = Program()
    session = session_of(program, every=1)
    node = program.node(GENERAL)
    session.tap.forward_postprocess(node, (program.x, program.gamma, program.gamma))
    kept = weakref.ref(node.mean)
    session.end_step([call for call, _ in session.tap.take()], 1, 0)
    session.tap.leave()
    del node
    assert kept() is None


def test_an_evaluation_is_counted_without_its_labels(monkeypatch: Any) -> None:
    record = Record(monkeypatch)
    program = Program()
    session = session_of(program)
    with chainer.using_config("train", False):
        session.tap.forward_postprocess(Accuracy(), (program.x, program.labels))
    assert log == []
    session.end_evaluation(accuracy=program.array(0.5), loss=chainer.Variable(np.array(1, "f")))
    session.tap.leave()
    together = [("concatenate", 0), ("to host", 0)]
    # what is restored, as no step came before; what moved; the accuracy
    assert log == [*together, *together, ("to host", 0)]
    (evaluation,) = record.evaluations
    assert (evaluation.examples, evaluation.classes, evaluation.accuracy) == (12, 5, 0.5)
    assert evaluation.majority is None


def test_moving_a_model_in_mid_training_is_followed(monkeypatch: Any) -> None:
    record = Record(monkeypatch)
    program = Program()
    session = session_of(program)
    program.step(session, GENERAL)
    link = program.link
    link.avg_mean, link.avg_var = np.zeros(5, "f"), np.ones(5, "f")  # to_cpu
    link(values(60).reshape(12, 5))
    session.end_step([call for call, _ in session.tap.take()], 2, 0)
    program.device = 1
    link.avg_mean, link.avg_var = program.array(np.zeros(5)), program.array(np.ones(5))  # to_gpu(1)
    program.x = program.array(values(60).reshape(12, 5))
    program.step(session, GENERAL)
    session.tap.leave()
    assert [len(step.calls) for step in record.steps] == [2, 1, 2]
    assert [step.calls[-1].running.updates for step in record.steps] == [2, 3, 5]


def test_persistent_arrays_come_back_in_place_and_generators_as_they_were(generators: dict[int, Any]) -> None:
    program = Program()
    mean = program.link.avg_mean
    before = mean._values.copy()
    generators[0] = own = SimpleNamespace(draws=7)
    with undisturbed([program.link]):
        assert generators == {}
        generators[0] = SimpleNamespace(draws=8)  # what CuPy does when a model draws in an experiment
        mean._values += 1
    assert program.link.avg_mean is mean
    np.testing.assert_array_equal(mean._values, before)
    assert generators == {0: own}
    assert {what for what, _ in log} == {"kernel"}  # copies on the device: nothing waits
