"""What the watch records of every kind of Chainer link: against NumPy, to the bit.

Bit-equality is the right expectation. On the CPU Chainer computes ``x.mean(axis, dtype)`` and ``x.var(axis, dtype)`` by
NumPy itself, in the wider type of input and gamma (`GeneralBatchNormalizationImpl`): float16 for a link of float16, and
float32 for float16 inputs of a link made under ``chainer.mixed16``. The same call on the same array, strides included,
adds in the same order. The watch computes nothing: any difference is a wrong axis, array, call site or moment.

The reference is told of every call by a hook around links, where the watch has one around functions, and takes the axes
from the table below. It keeps running statistics of its own, by the formula of Chainer's documentation:
``avg = decay * avg + (1 - decay) * stat``, with m/(m-1) for the variance.

NumPy itself is held against float64, with the bounds of Higham (2002, ch. 4) for sums in any order.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pytest

import bnwatch.chainer

from . import chainer_models as models
from .chainer_models import CLASSES, FEATURES, F, L, Record, chainer, training

if TYPE_CHECKING:
    from collections.abc import Callable

BATCH, STEPS = 16, 3


def net(links: dict[str, Any], forward: Callable[[Any, Any], Any]) -> Any:
    """Return a chain of these links."""

    class Net(chainer.Chain):
        def __init__(self) -> None:
            super().__init__()
            with self.init_scope():
                for name, link in links.items():
                    setattr(self, name, link)

        def forward(self, x: Any) -> Any:
            return forward(self, x)

    return Net()


def linear(link: Any) -> Any:
    return net(
        {"l1": L.Linear(FEATURES, 6), "bn": link, "l2": L.Linear(6, CLASSES)},
        lambda self, x: self.l2(F.relu(self.bn(self.l1(x)))),
    )


def image(x: Any) -> Any:
    return F.reshape(x, (-1, 1, 2, 4))


def pixels(link: Any, *, last: bool = False) -> Any:
    def forward(self: Any, x: Any) -> Any:
        h = self.c1(image(x))
        h = self.bn(F.transpose(h, (0, 2, 3, 1)) if last else h)
        return self.l2(F.relu(h))

    return net({"c1": L.Convolution2D(1, 6, 3, pad=1), "bn": link, "l2": L.Linear(None, CLASSES)}, forward)


def shared() -> Any:
    return models.MLP(shared=True, dropout=0.0)


def in_time() -> Any:
    """Return a recurrent net that normalizes at each of four time steps."""

    def forward(self: Any, x: Any) -> Any:
        h = self.start(x[:, :2])
        for step in range(4):
            h = F.tanh(self.bn(self.h(h) + self.x(x[:, 2 * step : 2 * step + 2])))
        return self.out(h)

    links = {"start": L.Linear(2, 5), "h": L.Linear(5, 5), "x": L.Linear(2, 5), "out": L.Linear(5, CLASSES)}
    return net({**links, "bn": L.BatchNormalization(5)}, forward)


def inception() -> Any:
    def forward(self: Any, x: Any) -> Any:
        return self.out(self.plain(self.inception(image(x))))

    block = L.InceptionBN(1, 2, 3, 3, 2, 3, "avg", 2)
    return net({"inception": block, "plain": L.Inception(None, 2, 2, 2, 2, 2, 2), "out": L.Linear(None, 4)}, forward)


class Block(chainer.Chain):
    """A residual block as in ResNet, with a projection."""

    def __init__(self) -> None:
        super().__init__()
        with self.init_scope():
            self.conv1 = L.Convolution2D(4, 4, 3, pad=1, nobias=True)
            self.bn1 = L.BatchNormalization(4)
            self.conv2 = L.Convolution2D(4, 6, 1, nobias=True)
            self.bn2 = L.BatchNormalization(6)
            self.conv3 = L.Convolution2D(4, 6, 1, nobias=True)
            self.bn3 = L.BatchNormalization(6)

    def forward(self, x: Any) -> Any:
        h = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(h)) + self.bn3(self.conv3(x)))


def residual() -> Any:
    def forward(self: Any, x: Any) -> Any:
        h = F.max_pooling_2d(self.blocks[0](self.stem(image(x))), 2)
        return self.out(h)

    stem = chainer.Sequential(L.Convolution2D(1, 4, 3, pad=1), L.BatchNormalization(4), F.relu)
    return net({"stem": stem, "blocks": chainer.ChainList(Block()), "out": L.Linear(None, CLASSES)}, forward)


def micro_networks() -> Any:
    links = {"mlp": L.MLPConvolution2D(1, (3, 4), 3, pad=1), "bn": L.BatchNormalization(4), "out": L.Linear(None, 4)}
    return net(links, lambda self, x: self.out(self.bn(self.mlp(image(x)))))


class Doubling(L.BatchNormalization):
    """A user's own class."""

    def forward(self, x: Any, **kwargs: Any) -> Any:
        return super().forward(2.0 * x, **kwargs)


@dataclass(frozen=True)
class Net:
    """A net, the sites a step of each link, and over which axes these average; 0 where nothing else is said."""

    build: Callable[[], Any]
    sites: dict[str, int]
    axes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    initial: tuple[float, float] | None = (0.0, 1.0)


def one(build: Callable[[], Any], *axes: int, initial: tuple[float, float] | None = (0.0, 1.0)) -> Net:
    return Net(lambda: linear(build()), {"bn": 1}, {"bn": axes or (0,)}, initial)


def BN(**arguments: Any) -> Callable[[], Any]:  # noqa: N802
    return lambda: L.BatchNormalization(6, **arguments)


PIXELS = (0, 2, 3)
STATISTICS = np.linspace(-1, 1, 6), np.linspace(0.5, 2, 6)
NETS = {
    "mlp": Net(lambda: models.MLP(dropout=0.0), {"bn1": 1, "bn2": 1}),
    "shared": Net(shared, {"bn1": 2}),
    "cnn": Net(models.CNN, {"bn1": 1, "bn2": 1}, {"bn1": PIXELS, "bn2": PIXELS}),
    "in time": Net(in_time, {"bn": 4}),
    "residual": Net(
        residual,
        dict.fromkeys(("stem/1", "blocks/0/bn1", "blocks/0/bn2", "blocks/0/bn3"), 1),
        dict.fromkeys(("stem/1", "blocks/0/bn1", "blocks/0/bn2", "blocks/0/bn3"), PIXELS),
    ),
    "inception": Net(
        inception,
        {f"inception/{n}": 1 for n in ("conv1n", "proj3n", "conv3n", "proj33n", "conv33an", "conv33bn", "poolpn")},
        {f"inception/{n}": PIXELS for n in ("conv1n", "proj3n", "conv3n", "proj33n", "conv33an", "conv33bn", "poolpn")},
    ),
    "micro networks": Net(micro_networks, {"bn": 1}, {"bn": PIXELS}),
    "axis int": one(lambda: L.BatchNormalization(6, axis=0)),
    "axis int, lazy": one(lambda: L.BatchNormalization(axis=0)),
    "a mean per pixel": Net(lambda: pixels(L.BatchNormalization(axis=0)), {"bn": 1}),
    "channels first": Net(lambda: pixels(L.BatchNormalization(axis=(0, 2, 3))), {"bn": 1}, {"bn": PIXELS}),
    "channels last": Net(
        lambda: pixels(L.BatchNormalization(6, axis=(0, 1, 2)), last=True), {"bn": 1}, {"bn": (0, 1, 2)}
    ),
    "channels and rows": Net(lambda: pixels(L.BatchNormalization((6, 2))), {"bn": 1}, {"bn": (0, 3)}),
    "no gamma": one(BN(use_gamma=False)),
    "no beta": one(BN(use_beta=False)),
    "neither": one(BN(use_gamma=False, use_beta=False)),
    "initial gamma and beta": one(BN(initial_gamma=STATISTICS[1], initial_beta=STATISTICS[0])),
    "initial statistics": one(BN(initial_avg_mean=2, initial_avg_var=3.0), initial=(2.0, 3.0)),
    "initial statistics, lazy": one(
        lambda: L.BatchNormalization(
            axis=0, initial_avg_mean=np.float32(2), initial_avg_var=chainer.initializers.One()
        ),
        initial=(2.0, 1.0),
    ),
    "initial arrays": one(BN(initial_avg_mean=STATISTICS[0], initial_avg_var=STATISTICS[1]), initial=None),
    "initial arrays, lazy": one(
        lambda: L.BatchNormalization(axis=0, initial_avg_mean=STATISTICS[0], initial_avg_var=STATISTICS[1]),
        initial=None,
    ),
    "decay 0": one(BN(decay=0.0)),
    "decay 0.99, eps": one(BN(decay=0.99, eps=1e-3)),
    "own class": one(lambda: Doubling(6)),
    "written anew": one(lambda: models.Written(6)),
}

DTYPES = {"float16": np.float16, "float32": np.float32, "float64": np.float64, "mixed16": chainer.mixed16}


class Seen(NamedTuple):
    """What NumPy makes of one call: statistics, and the running statistics after it."""

    mean: np.ndarray
    var: np.ndarray
    count: int
    running_mean: np.ndarray
    running_var: np.ndarray
    wide: np.ndarray
    """The input in float64, channels first."""


class Reference(chainer.LinkHook):
    """Computes with NumPy what every call of some links should give."""

    name = "reference"

    def __init__(self, model: Any, axes: dict[str, tuple[int, ...]]) -> None:
        self._links = {id(link): path.strip("/") for path, link in model.namedlinks()}
        self._axes = axes
        self._running: dict[str, list[np.ndarray]] = {}
        self.calls: dict[str, list[Seen]] = {path: [] for path in axes}

    def forward_preprocess(self, args: Any) -> None:
        path = self._links.get(id(args.link))
        if path in self._axes and chainer.config.train:
            link, x = args.link, args.args[0]
            x = getattr(x, "array", x)
            if isinstance(link, Doubling):
                x = (2.0 * chainer.Variable(x)).array
            axis = self._axes[path]
            kept = tuple(n for n in range(x.ndim) if n not in axis)
            shape = tuple(x.shape[n] for n in kept)
            running = self._running.setdefault(path, self._begin(link, shape))
            dtype = np.promote_types(x.dtype, running[0].dtype)
            mean, var, m = x.mean(axis=axis, dtype=dtype), x.var(axis=axis, dtype=dtype), x.size // int(np.prod(shape))
            models.update(running, (mean, var), m, link.decay)
            wide = np.moveaxis(x.astype(np.float64), kept, range(len(kept))).reshape(mean.size, m)
            self.calls[path].append(Seen(mean.ravel(), var.ravel(), m, *(a.ravel().copy() for a in running), wide))

    @staticmethod
    def _begin(link: Any, shape: tuple[int, ...]) -> list[np.ndarray]:
        if link.avg_mean is not None:
            return [link.avg_mean.copy(), link.avg_var.copy()]
        given = (link._initial_avg_mean, 0.0), (link._initial_avg_var, 1.0)
        values = [default if value is None else getattr(value, "fill_value", value) for value, default in given]
        return [np.full(shape, value, link._highprec_dtype) for value in values]


def examples(dtype: Any) -> tuple[np.ndarray, np.ndarray]:
    x, t = models.data(BATCH * STEPS)
    return x.astype(chainer.get_dtype(dtype)), t


def by_hand(model: Any, dtype: Any, _out: Any) -> Any:
    optimizer = chainer.optimizers.SGD(0.01).setup(model)
    x, t = examples(dtype)
    with bnwatch.chainer.watch(model, None, every=1, on_diagnosis="log", experiments=False) as watch:
        for start in range(0, len(x), BATCH):
            loss = F.softmax_cross_entropy(model(x[start : start + BATCH]), t[start : start + BATCH])
            model.cleargrads()
            loss.backward()
            optimizer.update()
            watch.step(loss=loss)
    return watch


def by_trainer(model: Any, dtype: Any, out: Any) -> Any:
    classifier = L.Classifier(model)
    iterator = chainer.iterators.SerialIterator(chainer.datasets.TupleDataset(*examples(dtype)), BATCH, shuffle=False)
    optimizer = chainer.optimizers.SGD(0.01).setup(classifier)
    trainer = training.Trainer(training.updaters.StandardUpdater(iterator, optimizer), (STEPS, "iteration"), out=out)
    watch = bnwatch.chainer.BatchNormWatch(None, every=1, on_diagnosis="log", experiments=False)
    trainer.extend(watch)
    trainer.run()
    return watch


def bounds(call: Seen) -> tuple[np.ndarray, np.ndarray]:
    """Return how far mean and variance may be from those in float64.

    With u = eps / 2, a sum of n terms in any order is within (n - 1) u of the sum of their magnitudes (Higham 2002,
    4.4); the input of a wider type is exact, and the division rounds once more: the mean is off by n u mean|x|.
    Deviations are taken from that mean, which adds the square of what it is off, and each term is rounded three times
    before it is summed: n + 3 roundings of the variance. One more each, and 1 %, stand for what is of higher order.
    """
    u = np.finfo(call.mean.dtype).eps / 2
    off = 1.01 * (call.count + 1) * u * np.abs(call.wide).mean(axis=1)
    var = call.wide.var(axis=1) + np.square(off)
    return off, 1.01 * ((call.count + 4) * u * var) + np.square(off) + np.finfo(call.mean.dtype).tiny


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("way", [by_hand, by_trainer])
@pytest.mark.parametrize("name", NETS)
def test_every_call_equals_numpy(name: str, way: Any, dtype: str, monkeypatch: Any, tmp_path: Any) -> None:
    """The nets are float16 under ``float16`` and ``mixed16``, where only batch normalization is float32."""
    case, record = NETS[name], Record(monkeypatch)
    np.random.seed(0)  # noqa: NPY002
    with chainer.using_config("dtype", DTYPES[dtype]):
        model = case.build()
        reference = Reference(model, {path: case.axes.get(path, (0,)) for path in case.sites})
        with reference:
            watch = way(model, DTYPES[dtype], tmp_path)

    prefix = "predictor/" if way is by_trainer else ""
    assert not [diagnosis.message for diagnosis in watch.diagnoses if diagnosis.rule.startswith("BN9")]
    assert [spec.path for spec in record.attachments[0].layers] == [prefix + path for path in case.sites]
    assert len(record.steps) == STEPS
    for number, step in enumerate(record.steps):
        found = {path: [c for c in step.calls if c.spec.path == prefix + path] for path in case.sites}
        assert {path: len(calls) for path, calls in found.items()} == case.sites
        for path, calls in found.items():
            sites = case.sites[path]
            expected = reference.calls[path][number * sites : (number + 1) * sites]
            for index, (call, seen) in enumerate(zip(calls, expected, strict=True)):
                assert (call.site.index, call.batch.count, call.batch.source) == (index, seen.count, "measured")
                assert call.batch.mean.dtype == seen.mean.dtype
                np.testing.assert_array_equal(call.batch.mean, seen.mean)
                np.testing.assert_array_equal(call.batch.var, seen.var)
                mean, var = bounds(seen)
                assert (np.abs(call.batch.mean - seen.wide.mean(axis=1)) <= mean).all()
                assert (np.abs(call.batch.var - seen.wide.var(axis=1)) <= var).all()
                np.testing.assert_array_equal(call.running.mean, expected[-1].running_mean)
                np.testing.assert_array_equal(call.running.var, expected[-1].running_var)
                assert call.running.bessel_corrected
                assert call.running.updates == (None if case.initial is None else (number + 1) * sites)
                assert call.spec.initial == (case.initial or (0.0, 1.0))
                assert call.spec.channels == seen.mean.size
