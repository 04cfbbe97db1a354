"""Small Chainer programs for the tests."""

from __future__ import annotations

import pickle
from typing import Any

import chainer
import numpy as np
from chainer import functions as F  # noqa: N812
from chainer import links as L  # noqa: N812
from chainer import training
from chainer.training import extensions

import bnwatch.chainer
from bnwatch.watch import Watch

FEATURES, CLASSES = 8, 4


class MLP(chainer.Chain):
    """Two normalized layers, dropout between them; ``shared`` passes both through one link."""

    def __init__(self, *, shared: bool = False, bn: Any = L.BatchNormalization, dropout: float = 0.2, width: int = 16):
        super().__init__()
        self._dropout = dropout
        with self.init_scope():
            self.l1 = L.Linear(FEATURES, width)
            self.bn1 = bn(width)
            self.l2 = L.Linear(width, width)
            if not shared:
                self.bn2 = bn(width)
            self.l3 = L.Linear(width, CLASSES)

    def forward(self, x: Any) -> Any:
        h = F.relu(self.bn1(self.l1(x)))
        h = F.dropout(h, self._dropout)
        h = F.relu(getattr(self, "bn2", self.bn1)(self.l2(h)))
        return self.l3(h)


class OldMLP(MLP):
    """The same as it was written before Chainer 5: ``__call__`` overridden, arguments assigned to."""

    def __call__(self, x: Any) -> Any:
        x = self.l1(x)
        x = F.relu(self.bn1(x))
        x = F.relu(self.bn2(self.l2(x)))
        return self.l3(x)


class CNN(chainer.Chain):
    """A convolution, batch normalization over pixels, global pooling."""

    def __init__(self) -> None:
        super().__init__()
        with self.init_scope():
            self.c1 = L.Convolution2D(1, 6, 3, pad=1, nobias=True)
            self.bn1 = L.BatchNormalization(6)
            self.c2 = L.Convolution2D(6, 8, 3, pad=1, nobias=True)
            self.bn2 = L.BatchNormalization(axis=(0, 2, 3))
            self.l3 = L.Linear(8, CLASSES)

    def forward(self, x: Any) -> Any:
        h = F.relu(self.bn1(self.c1(x.reshape(-1, 1, 2, 4))))
        h = F.relu(self.bn2(self.c2(h)))
        return self.l3(F.mean(h, axis=(2, 3)))


class Written(chainer.Chain):
    """Batch normalization written anew on `F.batch_normalization`."""

    def __init__(self, size: int, decay: float = 0.8, eps: float = 1e-4) -> None:
        super().__init__()
        self.decay, self.eps = decay, eps
        dtype = chainer.get_dtype(map_mixed16=np.float32)
        self.avg_mean, self.avg_var = np.zeros(size, dtype), np.ones(size, dtype)
        self.register_persistent("avg_mean")
        self.register_persistent("avg_var")
        with self.init_scope():
            self.scale = L.Scale(W_shape=(size,), bias_term=True)

    def forward(self, x: Any) -> Any:
        ones, zeros = np.ones_like(self.avg_mean), np.zeros_like(self.avg_mean)
        if chainer.config.train:
            running = {"running_mean": self.avg_mean, "running_var": self.avg_var}
            return self.scale(F.batch_normalization(x, ones, zeros, eps=self.eps, decay=self.decay, **running))
        return self.scale(F.fixed_batch_normalization(x, ones, zeros, self.avg_mean, self.avg_var, self.eps))


class WrittenLongAgo(Written):
    """The same, from before Chainer 5."""

    def __call__(self, x: Any) -> Any:
        return Written.forward(self, x)

    @property
    def forward(self) -> Any:
        raise AttributeError


def update(running: Any, batch: Any, count: int, decay: float) -> None:
    """Update running mean and variance in place, as Chainer documents it."""
    for array, statistic, correction in zip(running, batch, (1.0, count / (count - 1.0)), strict=True):
        np.multiply(array, decay, out=array)
        np.add(array, (1 - decay) * correction * statistic, out=array, casting="same_kind")


def data(examples: int = 256, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Return a task that is learned in a few epochs."""
    random = np.random.default_rng(seed)
    x = random.normal(1.0, 2.0, (examples, FEATURES)).astype(np.float32)
    return x, ((x[:, 0] > 1).astype(np.int32) + 2 * (x[:, 1] > 1)).astype(np.int32)


def dataset(examples: int = 256, seed: int = 0) -> Any:
    return chainer.datasets.TupleDataset(*data(examples, seed))


def trainer_of(model: Any, out: Any, *, epochs: int = 3, batch: int = 32, evaluate: bool = True) -> Any:
    """Return a Trainer; the training order is drawn from NumPy's global generator."""
    classifier = model if isinstance(model, L.Classifier) else L.Classifier(model)
    optimizer = chainer.optimizers.Adam().setup(classifier)
    optimizer.add_hook(chainer.optimizer_hooks.WeightDecay(1e-4))
    iterator = chainer.iterators.SerialIterator(dataset(), batch)
    updater = training.updaters.StandardUpdater(iterator, optimizer)
    trainer = training.Trainer(updater, (epochs, "epoch"), out=str(out))
    if evaluate:
        iterator = chainer.iterators.SerialIterator(dataset(200, seed=1), 64, repeat=False, shuffle=False)
        trainer.extend(extensions.Evaluator(iterator, classifier))
    trainer.extend(extensions.LogReport(trigger=(1, "epoch")))
    return trainer


def state_of(*things: Any) -> dict[str, bytes]:
    """Return everything that links and optimizers save, and the state of NumPy's generator, as bytes."""
    state = {"random": pickle.dumps(np.random.get_state())}  # noqa: NPY002
    for number, thing in enumerate(things):
        serializer = chainer.serializers.DictionarySerializer()
        thing.serialize(serializer)
        for name, value in serializer.target.items():
            array = np.asarray(value)
            state[f"{number}/{name}"] = array.tobytes() if array.dtype.kind != "O" else pickle.dumps(value)
    return state


def loop(  # noqa: PLR0917 - what varies between the tests
    model: Any,
    watching: Any,
    optimizer: Any = None,
    epochs: int = 3,
    batch: int = 32,
    evaluation_config: dict[str, bool] | None = None,
) -> Any:
    """Train by hand, in the watch given or in none; return the optimizer."""
    (x, t), (xv, tv) = data(), data(200, seed=1)
    optimizer = optimizer or chainer.optimizers.Adam().setup(model)
    config = {"train": False, "enable_backprop": False} if evaluation_config is None else evaluation_config
    for _ in range(epochs):
        order = np.random.permutation(len(x))  # noqa: NPY002
        for start in range(0, len(x), batch):
            rows = order[start : start + batch]
            scores = model(x[rows])
            loss = F.softmax_cross_entropy(scores, t[rows])
            model.cleargrads()
            loss.backward()
            optimizer.update()
            if watching is not None:
                watching.step(accuracy=F.accuracy(scores, t[rows]), loss=loss)
        saved = {name: getattr(chainer.config, name) for name in config}
        for name, value in config.items():
            setattr(chainer.config, name, value)
        accuracies = [F.accuracy(model(xv[i : i + 50]), tv[i : i + 50]).array for i in range(0, 200, 50)]
        for name, value in saved.items():
            setattr(chainer.config, name, value)
        if watching is not None:
            watching.evaluation(accuracy=np.mean(accuracies), examples=200)
    return optimizer


def by_hand(model: Any, *, watched: bool, seed: int = 3) -> tuple[dict[str, bytes], Any, Any]:
    """Train what ``model()`` makes by hand; return its state and the optimizer's, the watch if any, and the model."""
    np.random.seed(seed)  # noqa: NPY002
    trained = model()
    optimizer = chainer.optimizers.Adam().setup(trained)
    if not watched:
        loop(trained, None, optimizer)
        return state_of(trained, optimizer), None, trained
    with bnwatch.chainer.watch(trained, None, every=2, on_diagnosis="log") as watch:
        loop(trained, watch, optimizer)
    return state_of(trained, optimizer), watch, trained


class Record:
    """What a `Watch` was told."""

    def __init__(self, monkeypatch: Any) -> None:
        self.steps: list[Any] = []
        self.evaluations: list[Any] = []
        self.attachments: list[Any] = []
        for name, kept in (("observe", self.steps), ("evaluated", self.evaluations), ("open", self.attachments)):
            monkeypatch.setattr(Watch, name, self._keeping(getattr(Watch, name), kept))

    @staticmethod
    def _keeping(method: Any, kept: list[Any]) -> Any:
        def keep(watch: Any, record: Any) -> None:
            kept.append(record)
            method(watch, record)

        return keep
