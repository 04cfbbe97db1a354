"""Experiments and repair on models that leave traces wherever one can: everything is put back."""

from __future__ import annotations

import pickle
import random
from collections import Counter, OrderedDict, defaultdict, deque
from typing import Any

import numpy as np
import pytest

import bnwatch.chainer
from bnwatch.chainer.quiet import undisturbed

from . import chainer_models as models
from .chainer_models import F, L, chainer, state_of

TRAIN, EVALUATION = models.data(64), models.data(48, seed=1)


def crosscheck(model: Any) -> Any:
    return bnwatch.chainer.crosscheck(model, train=TRAIN, eval=EVALUATION, batch_size=16)


def attribute(model: Any) -> Any:
    return bnwatch.chainer.attribute(model, EVALUATION, batch_size=16)


def localise(model: Any) -> Any:
    return bnwatch.chainer.localise(model, TRAIN, batch_size=16)


def recalibrate(model: Any) -> Any:
    return bnwatch.chainer.recalibrate(model, np.split(TRAIN[0], 4))


def recalibrate_exactly(model: Any) -> Any:
    return bnwatch.chainer.recalibrate(model, np.split(TRAIN[0], 4), exact=True)


def check(model: Any) -> Any:
    return bnwatch.chainer.check(model, TRAIN[0])


HARMLESS = [crosscheck, attribute, localise, check]
REPAIRS = [recalibrate, recalibrate_exactly]


class Hostile(chainer.Chain):
    """Changes everything that a forward pass can change, and may break off at any of its calls."""

    def __init__(self) -> None:
        super().__init__()
        with self.init_scope():
            self.l1, self.bn = L.Linear(models.FEATURES, 12), L.BatchNormalization(12)
            self.l2, self.norm = L.Linear(12, 12), L.BatchNormalization(12)
            self.memory, self.last = L.LSTM(12, 12), L.Linear(12, models.CLASSES)
            self.scale = chainer.Parameter(1.0, (1,))
        self.add_persistent("steps", np.zeros(2))
        self.history: list[Any] = [[0]]
        self.counted, self.last_few = Counter(a=1), deque([1, 2, 3], maxlen=3)
        self.named: dict[str, Any] = {"own": np.zeros(3, np.float32), "deep": {"list": []}}
        self.groups, self.ordered, self.seen = defaultdict(list), OrderedDict(a=1), {1, 2}
        self.raw, self.bytes_ = np.zeros(4), bytearray(b"ab")
        self.draws = np.random.RandomState(3), np.random.default_rng(4), random.Random(5)  # noqa: S311
        self.breaks_at, self.error = 0, None
        self.calls = Counter()

    def forward(self, x: Any) -> Any:
        passes["n"] += 1
        if passes["n"] == self.breaks_at:
            raise self.error
        self.history.append(x)
        self.history[0].append(passes["n"])
        self.counted["a"] += 1
        self.last_few.append(passes["n"])
        self.named["own"] += 1
        self.named["deep"]["list"].append(x)
        self.named["new"] = x
        self.groups["x"].append(x)
        self.ordered["b"] = 2
        self.seen.add(passes["n"])
        self.raw[...] += 1
        self.bytes_ += b"c"
        self.steps += 1
        self.cache = x
        self.draws[0].normal(), self.draws[1].normal(), self.draws[2].random()
        np.random.normal()  # noqa: NPY002
        random.random()  # noqa: S311
        chainer.config.flag_of_mine = passes["n"]
        chainer.config.train = bool(chainer.config.train)
        chainer.global_config.another_of_mine = passes["n"]
        if not hasattr(self, "made_late"):
            with self.init_scope():
                self.made_late = L.Linear(12, 12)
        self.cleargrads()
        chainer.report({"passes": passes["n"]}, self)
        h = self.norm(self.l2(F.dropout(F.relu(self.bn(self.l1(x))))))
        self.memory.reset_state()
        return self.last(self.memory(self.made_late(h))) * F.broadcast_to(self.scale, (len(x), models.CLASSES))


passes = Counter()


def everything(model: Any, optimizer: Any) -> dict[str, Any]:
    """Return what can be compared of a model, with the identity of what is to stay the same object."""
    seen: dict[str, Any] = {"state": state_of(model, optimizer), "python": random.getstate()}
    for path, link in model.namedlinks():
        own = vars(link)
        seen[f"{path} attributes"] = {name: id(value) for name, value in own.items()}
        values = {n: v for n, v in own.items() if not isinstance(v, chainer.Variable | chainer.Link)}
        values = {n: sorted(v) if isinstance(v, set) else v for n, v in values.items()}
        seen[f"{path} values"] = pickle.dumps([(n, v) for n, v in values.items() if n != "_local_link_hooks"])
    for path, parameter in model.namedparams():
        grad = parameter.grad
        seen[path] = id(parameter.array), id(grad), None if grad is None else grad.tobytes()
    seen["config"] = dict(vars(chainer.config._local)), dict(vars(chainer.global_config))
    seen["hooks"] = dict(chainer.get_function_hooks()), dict(chainer._get_link_hooks())
    return seen


def trained() -> tuple[Any, Any]:
    np.random.seed(0)  # noqa: NPY002
    passes.clear()
    model = Hostile()
    optimizer = chainer.optimizers.Adam().setup(model)
    for rows in np.split(np.arange(64), 4):
        loss = F.softmax_cross_entropy(model(TRAIN[0][rows]), TRAIN[1][rows])
        loss.backward()
        optimizer.update()
    del model.made_late
    model.history[1:], model.cache = [], None
    model.named.pop("new")
    model.named["deep"]["list"].clear()
    model.groups.clear()
    return model, optimizer


@pytest.fixture(autouse=True)
def _configuration() -> Any:
    yield
    for level in (vars(chainer.config._local), vars(chainer.global_config)):
        for name in ("flag_of_mine", "another_of_mine", "train"):
            if level is vars(chainer.config._local) or name != "train":
                level.pop(name, None)


@pytest.mark.parametrize("experiment", HARMLESS)
def test_an_experiment_leaves_a_hostile_model_as_it_was(experiment: Any) -> None:
    model, optimizer = trained()
    before, observation, reporter = everything(model, optimizer), {}, chainer.Reporter()
    order = [list(link._persistent) for link in model.links()]  # sets, in which a snapshot comes
    reporter.add_observer("model", model)
    calls: list[Any] = []

    class Mine(chainer.FunctionHook):
        def forward_preprocess(self, node: Any, inputs: Any) -> None:
            calls.append(node)

    with reporter, reporter.scope(observation), Mine() as mine:
        experiment(model)
        assert dict(chainer.get_function_hooks()) == {mine.name: mine}
    assert (observation, calls) == ({}, [])
    assert passes["n"] > 4
    assert [list(link._persistent) for link in model.links()] == order
    assert everything(model, optimizer) == before


@pytest.mark.parametrize("experiment", HARMLESS + REPAIRS)
@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError, SystemExit])
@pytest.mark.parametrize("at", [1, 3])
def test_one_that_breaks_off_leaves_it_as_it_was_too(experiment: Any, error: Any, at: int) -> None:
    model, optimizer = trained()
    model.breaks_at, model.error = passes["n"] + (1 if experiment is check else at), error("stop")  # which calls once
    before = everything(model, optimizer)
    with pytest.raises((error, bnwatch.evidence.ExperimentNotPossibleError)) as raised:
        experiment(model)
    assert raised.type is error or error is MemoryError
    assert everything(model, optimizer) == before


@pytest.mark.parametrize("experiment", REPAIRS)
def test_a_repair_changes_running_statistics_alone_in_their_arrays(experiment: Any) -> None:
    model, optimizer = trained()
    for bn in (model.bn, model.norm):
        bn.avg_mean[...] = 9.0
    kept = [(bn.avg_mean.copy(), bn.avg_var.copy()) for bn in (model.bn, model.norm)]
    before = everything(model, optimizer)
    experiment(model)
    for bn, (mean, var) in zip((model.bn, model.norm), kept, strict=True):
        assert (bn.avg_mean != mean).all()
        assert (bn.avg_var != var).any()
        bn.avg_mean[...], bn.avg_var[...] = mean, var
    assert everything(model, optimizer) == before


class Lazy(chainer.Chain):
    """Nothing has a shape before the first pass."""

    def __init__(self) -> None:
        super().__init__()
        with self.init_scope():
            self.l1, self.bn, self.l2 = L.Linear(10), L.BatchNormalization(axis=0), L.Linear(models.CLASSES)

    def forward(self, x: Any) -> Any:
        return self.l2(F.relu(self.bn(self.l1(x))))


def first_step(model: Any) -> dict[str, bytes]:
    optimizer = chainer.optimizers.Adam().setup(model)
    loss = F.softmax_cross_entropy(model(TRAIN[0]), TRAIN[1])
    model.cleargrads()
    loss.backward()
    optimizer.update()
    return state_of(model, optimizer)


@pytest.mark.parametrize("experiment", [crosscheck, localise, check])
def test_a_model_without_shapes_stays_without_and_begins_the_same(experiment: Any) -> None:
    np.random.seed(1)  # noqa: NPY002
    expected = first_step(Lazy())
    np.random.seed(1)  # noqa: NPY002
    model = Lazy()
    shaped = {path: parameter.is_initialized for path, parameter in model.namedparams()}
    experiment(model)
    assert {path: parameter.is_initialized for path, parameter in model.namedparams()} == shaped
    assert not shaped["/l1/W"]
    assert model.bn.avg_mean is None
    assert first_step(model) == expected


def test_a_recurrent_state_is_the_same_object_and_is_used() -> None:
    class Recurrent(chainer.Chain):
        def __init__(self) -> None:
            super().__init__()
            with self.init_scope():
                self.bn, self.memory = L.BatchNormalization(models.FEATURES), L.LSTM(models.FEATURES, models.CLASSES)

        def forward(self, x: Any) -> Any:
            return self.memory(self.bn(x))

    model = Recurrent()
    model(TRAIN[0][:16])
    c, h = model.memory.c, model.memory.h
    values = c.array.copy(), h.array.copy()
    for experiment in (crosscheck, attribute, localise):
        experiment(model)
        assert model.memory.c is c
        assert model.memory.h is h
        np.testing.assert_array_equal(c.array, values[0])
        np.testing.assert_array_equal(h.array, values[1])


def test_arrays_too_large_for_state_are_not_copied() -> None:
    model = chainer.Chain()
    model.data = np.zeros(2**22, np.float64)
    with undisturbed([model]):
        model.data[0] = 1.0
    assert model.data[0] == 1.0  # documented: it is taken for data


# repair of links of every kind


LINKS = {
    "plain": lambda: L.BatchNormalization(6),
    "without gamma": lambda: L.BatchNormalization(6, use_gamma=False),
    "without beta": lambda: L.BatchNormalization(6, use_beta=False),
    "axis": lambda: L.BatchNormalization(axis=(0,)),
    "float16": lambda: L.BatchNormalization(6, dtype=np.float16),
    "renormalization": lambda: L.BatchRenormalization(6),
}


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("finetuned", [False, True])
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("link", LINKS.values(), ids=LINKS)
def test_every_kind_of_link_is_repaired(link: Any, frozen: bool, finetuned: bool, exact: bool) -> None:
    np.random.seed(0)  # noqa: NPY002
    model = chainer.Sequential(L.Linear(models.FEATURES, 6), link(), L.Linear(6, models.CLASSES))
    x, bn = TRAIN[0], model[1]
    if bn.avg_mean is not None and bn.avg_mean.dtype == np.float16:
        model.insert(1, lambda h: F.cast(h, np.float16))
        model.insert(3, lambda h: F.cast(h, np.float32))
    if finetuned:
        bn.start_finetuning()
    with chainer.no_backprop_mode():
        model(x) if not finetuned else bn(model[0](x).array.astype(bn._highprec_dtype), finetune=True)
    if frozen:
        chainer.optimizers.SGD().setup(model)
        bn.disable_update()
    bn.avg_mean[...], updates = 50.0, bn.N
    arrays = bn.avg_mean, bn.avg_var
    found = bnwatch.chainer.recalibrate(model, np.split(x, 4), exact=exact)
    z = x.astype(np.float64) @ model[0].W.array.T + model[0].b.array
    rounding = 2e-3 if bn.avg_mean.dtype == np.float16 else 1e-4
    np.testing.assert_allclose(bn.avg_mean, z.mean(0), rtol=rounding, atol=5 * rounding)
    np.testing.assert_allclose(bn.avg_var, z.var(0, ddof=1), rtol=10 * rounding)
    assert (bn.avg_mean is arrays[0], bn.avg_var is arrays[1], bn.N) == (True, True, updates)
    assert [change.count for change in found.layers] == [64]


# localisation


class Dying(chainer.Chain):
    """A block whose activation is zero for every example."""

    def __init__(self, bias: float) -> None:
        super().__init__()
        with self.init_scope():
            self.conv, self.bn = L.Convolution2D(1, 4, 3, pad=1), L.BatchNormalization(4)
            self.narrow = L.Linear(None, 6, initial_bias=bias)

    def forward(self, x: Any) -> Any:
        return F.relu(self.narrow(F.relu(self.bn(self.conv(x)))))


@pytest.mark.parametrize("bias", [0.0, -1000.0])
def test_the_first_dead_activation_is_named_by_its_path_and_its_function(bias: float) -> None:
    def images(x: Any) -> Any:
        return F.reshape(x, (-1, 1, 2, 4))

    inner = chainer.Sequential(images, Dying(bias), lambda h: F.tanh(h) * 2, L.Linear(6, models.CLASSES))
    model = L.Classifier(chainer.Sequential(inner))
    found = localise(model)
    names = [look.path for look in found.look.layers]
    block = "predictor/0/0"
    assert names == [
        f"{block}/conv", f"{block}/bn", f"{block}/bn -> ReLU", f"{block}/narrow", f"{block}/narrow -> ReLU",
        f"{block}/narrow -> Tanh", f"{block}/narrow -> MulConstant", "predictor/0/1",
    ]  # fmt: skip
    if bias:
        assert (found.first.path, found.first.kind, found.first.dead_units) == (f"{block}/narrow -> ReLU", "ReLU", 1.0)
        assert str(found) == (
            f"from `{block}/narrow -> ReLU` (ReLU) on, nothing varies across 64 examples: "
            "100% of its units are zero for every one"
        )
    else:
        assert found.first is None
