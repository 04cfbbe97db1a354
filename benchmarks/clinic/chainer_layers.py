"""What stands before or behind batch normalization, and numbers that are too large, too small or none."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import chainer
import numpy as np
from chainer import functions as F  # noqa: N812 - the name that all Chainer code uses
from chainer import links as L  # noqa: N812 - likewise
from chainer import training
from chainer.training import extensions

from benchmarks.clinic.case import case
from benchmarks.clinic.chainer_nets import CNN, by_hand, finished, logged, scored, shuffled, train
from benchmarks.clinic.data import Data, digits

if TYPE_CHECKING:
    from benchmarks.clinic.case import Run


class Dropped(chainer.Chain):
    """A wide layer, then dropout, linear, batch norm and ReLU four times."""

    def __init__(self, ratio: float) -> None:
        super().__init__()
        self._ratio = ratio
        with self.init_scope():
            self.first = L.Linear(64, 256)
            for n in range(4):
                setattr(self, f"l{n}", L.Linear(None, 128))
                setattr(self, f"bn{n}", L.BatchNormalization(128))
            self.out = L.Linear(128, 10)

    def forward(self, x: Any) -> Any:
        """Return the scores."""
        x = F.relu(self.first(x))
        for n in range(4):
            x = F.relu(getattr(self, f"bn{n}")(getattr(self, f"l{n}")(F.dropout(x, self._ratio))))
        return self.out(x)


@case("BN-110/chainer", expects="BN108", framework="chainer")
def dropout_before(run: Run) -> None:
    """Strong dropout in front of every batch norm; https://github.com/keras-team/keras/issues/8542."""
    train(run, Dropped(0.7), digits(flat=True), epochs=10, batch=64, optimizer=chainer.optimizers.Adam(2e-3))


@case("BN-110/chainer-half", expects="BN108", framework="chainer")
def dropout_of_half(run: Run) -> None:
    """Dropout of .5, by hand; https://github.com/keras-team/keras/issues/8542."""
    by_hand(run, Dropped(0.5), digits(flat=True), epochs=8, batch=64, optimizer=chainer.optimizers.Adam(2e-3))


class Regression(chainer.Chain):
    """Four sums of pixels, and batch norm on the output."""

    def __init__(self) -> None:
        super().__init__()
        with self.init_scope():
            self.l1, self.l2 = L.Linear(64, 64), L.Linear(64, 4)
            self.bn = L.BatchNormalization(4)

    def forward(self, x: Any) -> Any:
        """Return the sums."""
        return self.bn(self.l2(F.relu(self.l1(x))))


def sums() -> tuple[Any, Any, Any, Any]:
    """Return digits and, to be regressed, the sums of four bands of their pixels, from 0 to 200."""
    data = digits(flat=True)
    y, yv = (16 * x.reshape(-1, 4, 16).sum(axis=2) for x in (data.x, data.xv))
    return data.x, y, data.xv, yv


@case("BN-114/chainer", expects="BN109", framework="chainer")
def normalized_output(run: Run) -> None:
    """Regression of large numbers with batch norm at the end, which learns their scale only step by step.

    https://discuss.tensorflow.org/t/applying-batch-normalization-on-the-output-layer-in-a-regression-problem/14056
    """
    x, y, xv, yv = sums()
    model = L.Classifier(Regression(), lossfun=F.mean_squared_error)
    model.compute_accuracy = False
    optimizer = chainer.optimizers.Adam(1e-3).setup(model)
    iterator = chainer.iterators.SerialIterator(chainer.datasets.TupleDataset(x, y), 16)
    trainer = training.Trainer(
        training.updaters.StandardUpdater(iterator, optimizer), (10, "epoch"), f"{run.log_dir}/result"
    )
    held_out = chainer.datasets.TupleDataset(xv, yv)
    trainer.extend(
        extensions.Evaluator(chainer.iterators.SerialIterator(held_out, 100, repeat=False, shuffle=False), model)
    )
    trainer.extend(extensions.LogReport())
    run.extend(trainer)
    trainer.run()
    finished(run, model.predictor, Data(x, y, xv, yv), *logged(trainer))


@case("BN-114/chainer-hand", expects="BN109", framework="chainer")
def normalized_output_by_hand(run: Run) -> None:
    """The same in a loop by hand.

    https://discuss.tensorflow.org/t/applying-batch-normalization-on-the-output-layer-in-a-regression-problem/14056
    """
    x, y, xv, yv = sums()
    model = Regression()
    optimizer = chainer.optimizers.Adam(1e-3).setup(model)
    history: dict[str, list[float]] = {"loss": [], "val_loss": []}
    with run.loop(model) as watch:
        for _ in range(10):
            for rows in shuffled(len(x), 16):
                loss = F.mean_squared_error(model(x[rows]), y[rows])
                model.cleargrads()
                loss.backward()
                optimizer.update()
                watch.step(loss=loss)
            with chainer.using_config("train", False), chainer.no_backprop_mode():
                held_out = F.mean_squared_error(model(xv), yv)
            watch.evaluation(loss=held_out, examples=len(xv))
            history["loss"].append(float(loss.array))
            history["val_loss"].append(float(held_out.array))
    finished(run, model, Data(x, y, xv, yv), history)


class Bottleneck(chainer.Chain):
    """One ReLU unit between two layers."""

    def __init__(self, bias: float) -> None:
        super().__init__()
        with self.init_scope():
            self.l1, self.l2 = L.Linear(64, 32), L.Linear(32, 1, initial_bias=bias)
            self.bn = L.BatchNormalization(1, decay=0.99)
            self.l3, self.l4 = L.Linear(1, 32), L.Linear(32, 10)

    def forward(self, x: Any) -> Any:
        """Return the scores."""
        h = self.bn(F.relu(self.l2(F.relu(self.l1(x)))))
        return self.l4(F.relu(self.l3(h)))


@case("BN-118/chainer", expects="BN306", framework="chainer", fast=True)
def dead_unit(run: Run) -> None:
    """A bottleneck of one ReLU unit that is dead; https://github.com/keras-team/keras/issues/3752."""
    train(run, Bottleneck(-30.0), digits(flat=True, raw=True), epochs=6, optimizer=chainer.optimizers.Adam(1e-2))


class DeadLayer(chainer.Chain):
    """A narrow layer behind many large features."""

    def __init__(self) -> None:
        super().__init__()
        with self.init_scope():
            self.l1, self.bn1 = L.Linear(64, 512), L.BatchNormalization(512)
            self.l2 = L.Linear(512, 16, initial_bias=-60.0)
            self.bn2, self.l3 = L.BatchNormalization(16), L.Linear(16, 10)

    def forward(self, x: Any) -> Any:
        """Return the scores."""
        h = F.relu(self.bn1(self.l1(x)))
        return self.l3(self.bn2(F.relu(self.l2(h))))


@case("BN-118/chainer-hand", expects="BN306", framework="chainer")
def dead_layer(run: Run) -> None:
    """All 16 units of a layer are dead, in a loop by hand; https://github.com/keras-team/keras/issues/3752."""
    by_hand(run, DeadLayer(), digits(flat=True), epochs=6)


class Normalized(chainer.Chain):
    """Batch norm on the inputs, then a layer."""

    def __init__(self, eps: float) -> None:
        super().__init__()
        with self.init_scope():
            self.bn = L.BatchNormalization(64, eps=eps)
            self.l1, self.l2 = L.Linear(64, 64), L.Linear(64, 10)

    def forward(self, x: Any) -> Any:
        """Return the scores."""
        return self.l2(F.relu(self.l1(self.bn(x))))


def with_constant_features(seed: int) -> Data:
    """Return digits of which 8 features are .5 in training, and vary in validation."""
    data = digits(flat=True)
    x, xv = data.x.copy(), data.xv.copy()
    x[:, :8] = 0.5
    xv[:, :8] = 0.5 + np.random.default_rng(seed).normal(size=(len(xv), 8))
    return Data(x, data.y, xv, data.yv)


@case("BN-102/chainer", expects="BN404", framework="chainer", fast=True)
def constant_features(run: Run) -> None:
    """Eight features are constant in training alone; https://github.com/chainer/chainer/pull/2214."""
    train(run, Normalized(1e-3), with_constant_features(run.seed), epochs=8)


@case("BN-102/chainer-hand", expects="BN404", framework="chainer")
def constant_features_by_hand(run: Run) -> None:
    """The same with Chainer's own epsilon, in a loop by hand; https://github.com/chainer/chainer/pull/2214."""
    by_hand(run, Normalized(2e-5), with_constant_features(run.seed), epochs=8)


@case("BN-105/chainer", expects="BN405", framework="chainer")
def scaled_twice(run: Run) -> None:
    """Pixels of 0 to 1 divided by 255 twice, then batch norm; https://github.com/chainer/chainer/pull/4505."""
    data = digits(flat=True)
    small = np.float32(1 / 255**2)
    train(run, Normalized(2e-5), Data(data.x * small, data.y, data.xv * small, data.yv), epochs=8)


@case("BN-105/chainer-hand", expects=("BN405", "BN201"), framework="chainer")
def scaled_twice_by_hand(run: Run) -> None:
    """The same for images of 0 to 1, in front of convolutions without bias.

    https://github.com/chainer/chainer/pull/4505
    """
    data = digits(channels_first=True)
    small = np.float32(1 / 255**2)
    by_hand(run, CNN(), Data(data.x * small, data.y, data.xv * small, data.yv), epochs=6)


@case("BN-096/chainer", expects="BN401", framework="chainer")
def infinite_pixel(run: Run) -> None:
    """One forward pass in training mode meets an infinite pixel; no update is made.

    https://github.com/pytorch/pytorch/issues/90342
    """
    data = digits(channels_first=True)
    model = CNN()
    optimizer = chainer.optimizers.Adam(1e-3).setup(model)
    with run.loop(model) as watch:
        for epoch in range(5):
            if epoch == 3:
                poisoned = data.x[:32].copy()
                poisoned[5, 0, 3, 3] = np.inf
                with np.errstate(all="ignore"), chainer.no_backprop_mode():
                    model(poisoned)
            for rows in shuffled(len(data.x), 32):
                scores = model(data.x[rows])
                loss = F.softmax_cross_entropy(scores, data.y[rows])
                model.cleargrads()
                loss.backward()
                optimizer.update()
                watch.step(accuracy=F.accuracy(scores, data.y[rows]), loss=loss)
            with chainer.using_config("train", False), np.errstate(all="ignore"):
                accuracy, val_loss = scored(model, data.xv, data.yv)
            watch.evaluation(accuracy=accuracy, loss=val_loss, examples=len(data.xv))
    run.measure(loss=float(loss.array), val_accuracy=accuracy, val_loss=val_loss)
    run.subject(model, train=(data.x, data.y), evaluation=(data.xv, data.yv))


class Half(chainer.Chain):
    """Batch norm in float16."""

    def __init__(self) -> None:
        super().__init__()
        with self.init_scope():
            self.bn = L.BatchNormalization(16, dtype=np.float16)
            self.out = L.Linear(16, 2)

    def forward(self, x: Any) -> Any:
        """Return the scores."""
        return self.out(F.cast(self.bn(x), np.float32))


@case("BN-107/chainer", expects="BN403", framework="chainer", fast=True)
def half_precision(run: Run) -> None:
    """Statistics in float16 of inputs of size 2000.

    https://github.com/microsoft/tensorflow-directml-plugin/pull/321
    """
    rng = np.random.default_rng(run.seed)
    x = rng.normal(0, 2000, (800, 16)).astype(np.float16)
    y = (x[:, 0] > 0).astype(np.int32)
    data = Data(x[:600], y[:600], x[600:], y[600:])
    with np.errstate(all="ignore"):
        by_hand(run, Half(), data, epochs=5)


class HalfCNN(CNN):
    """The CNN in float16 but for its output."""

    def forward(self, x: Any) -> Any:
        """Return the scores."""
        return F.cast(super().forward(F.cast(x, np.float16)), np.float32)


@case("BN-107/chainer-trainer", expects="BN403", framework="chainer")
def half_precision_pixels(run: Run) -> None:
    """``chainer.config.dtype`` is float16, pixels reach from 0 to 4096, in a Trainer.

    https://github.com/microsoft/tensorflow-directml-plugin/pull/321
    """
    data = digits(channels_first=True)
    with chainer.using_config("dtype", np.float16), np.errstate(all="ignore"):
        model = HalfCNN()
        with chainer.using_config("train", False):
            model(data.x[:2])
        big = Data(data.x * 4096, data.y, data.xv * 4096, data.yv)
        train(run, model, big, epochs=3, optimizer=chainer.optimizers.Adam(1e-3, eps=1e-4))
