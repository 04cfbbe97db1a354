"""Programs with nothing wrong."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import chainer
import numpy as np
from chainer import functions as F  # noqa: N812 - the name that all Chainer code uses
from chainer import links as L  # noqa: N812 - likewise

from benchmarks.clinic.case import case
from benchmarks.clinic.chainer_modes import Transfer, backbone, target_task
from benchmarks.clinic.chainer_nets import CNN, by_hand, finished, scored, shuffled, train
from benchmarks.clinic.chainer_shared import Siamese
from benchmarks.clinic.data import Data, digits

if TYPE_CHECKING:
    from benchmarks.clinic.case import Run


@case("OK-06/chainer", expects=None, framework="chainer")
def convolutions(run: Run) -> None:
    """A CNN in a Trainer, as in Chainer's examples; https://github.com/chainer/chainer/tree/master/examples/cifar."""
    train(run, CNN(), digits(channels_first=True), epochs=8, optimizer=chainer.optimizers.Adam(3e-3))


@case("OK-01/chainer", expects=None, framework="chainer")
def convolutions_by_hand(run: Run) -> None:
    """A CNN in a loop by hand; https://github.com/keras-team/keras-io."""
    by_hand(run, CNN(), digits(channels_first=True), epochs=6)


class Block(chainer.Chain):
    """Convolution, batch norm, ReLU."""

    def __init__(self, width: int) -> None:
        super().__init__()
        with self.init_scope():
            self.conv = L.Convolution2D(None, width, 3, pad=1, nobias=True)
            self.bn = L.BatchNormalization(width)

    def forward(self, x: Any) -> Any:
        """Return the block's output."""
        return F.relu(self.bn(self.conv(x)))


class VGG(chainer.Chain):
    """Chainer's VGG for CIFAR, cut to the size of digits: dropout between the blocks."""

    def __init__(self) -> None:
        super().__init__()
        with self.init_scope():
            self.block1_1, self.block1_2 = Block(16), Block(16)
            self.block2_1, self.block2_2 = Block(32), Block(32)
            self.fc1 = L.Linear(None, 64, nobias=True)
            self.bn_fc1 = L.BatchNormalization(64)
            self.fc2 = L.Linear(None, 10, nobias=True)

    def forward(self, x: Any) -> Any:
        """Return the scores."""
        h = F.dropout(self.block1_1(x), ratio=0.3)
        h = F.max_pooling_2d(self.block1_2(h), ksize=2, stride=2)
        h = F.dropout(self.block2_1(h), ratio=0.4)
        h = F.max_pooling_2d(self.block2_2(h), ksize=2, stride=2)
        h = F.dropout(h, ratio=0.5)
        h = F.relu(self.bn_fc1(self.fc1(h)))
        return self.fc2(F.dropout(h, ratio=0.5))


@case("OK-16/chainer", expects=None, framework="chainer")
def vgg(run: Run) -> None:
    """Dropout between blocks; https://github.com/chainer/chainer/tree/master/examples/cifar."""
    train(run, VGG(), digits(channels_first=True), epochs=10, batch=64)


@case("OK-shared/chainer", expects=None, framework="chainer")
def shared_on_like_data(run: Run) -> None:
    """A shared encoder whose two inputs are of one kind."""
    data, rng = digits(flat=True), np.random.default_rng(run.seed)

    def pairs(x: Any, y: Any, number: int) -> tuple[Any, Any]:
        first = rng.integers(0, len(x), number)
        same = rng.random(number) < 0.5
        second = np.array([rng.choice(np.flatnonzero((y == y[i]) == s)) for i, s in zip(first, same, strict=True)])
        return np.stack([x[first], x[second]], axis=1), same.astype(np.int32)

    train(run, Siamese(), Data(*pairs(data.x, data.y, 4000), *pairs(data.xv, data.yv, 800)), epochs=6, batch=64)


@case("OK-09/chainer", expects=None, framework="chainer")
def frozen_on_purpose(run: Run) -> None:
    """A backbone that is frozen, and in evaluation mode on purpose; https://keras.io/guides/transfer_learning/."""
    model = Transfer(backbone(), inference=True)
    classifier, optimizer = L.Classifier(model), chainer.optimizers.Adam(1e-3)
    optimizer.setup(classifier)
    model.backbone.disable_update()
    train(run, classifier, target_task(), epochs=8, optimizer=optimizer)


class DropoutBehind(chainer.Chain):
    """Linear, ReLU, batch norm, dropout, twice."""

    def __init__(self) -> None:
        super().__init__()
        with self.init_scope():
            self.l1, self.bn1 = L.Linear(64, 128), L.BatchNormalization(128)
            self.l2, self.bn2 = L.Linear(128, 128), L.BatchNormalization(128)
            self.out = L.Linear(128, 10)

    def forward(self, x: Any) -> Any:
        """Return the scores."""
        x = F.dropout(self.bn1(F.relu(self.l1(x))), 0.3)
        return self.out(F.dropout(self.bn2(F.relu(self.l2(x))), 0.3))


@case("OK-03/chainer", expects=None, framework="chainer", fast=True)
def dropout_behind(run: Run) -> None:
    """A dense net with dropout behind batch norm, in a loop by hand; https://github.com/ageron/handson-ml."""
    by_hand(run, DropoutBehind(), digits(flat=True), epochs=10)


class Autoencoder(chainer.Chain):
    """A narrow code between two normalized layers; its loss is its output in training."""

    def __init__(self) -> None:
        super().__init__()
        with self.init_scope():
            self.l1, self.bn1 = L.Linear(64, 64), L.BatchNormalization(64)
            self.code = L.Linear(64, 16)
            self.l2, self.bn2 = L.Linear(16, 64), L.BatchNormalization(64)
            self.out = L.Linear(64, 64)

    def forward(self, x: Any) -> Any:
        """Return what is made of the code."""
        code = self.code(F.relu(self.bn1(self.l1(x))))
        return F.sigmoid(self.out(F.relu(self.bn2(self.l2(code)))))


@case("OK-autoencoder/chainer", expects=None, framework="chainer")
def autoencoder(run: Run) -> None:
    """An autoencoder: no labels, no accuracy."""
    data = digits(flat=True)
    model = L.Classifier(Autoencoder(), lossfun=F.mean_squared_error)
    model.compute_accuracy = False
    train(run, model, Data(data.x, data.x, data.xv, data.xv), epochs=8)


@case("OK-20/chainer", expects=None, framework="chainer")
def statistics_made_anew(run: Run) -> None:
    """Weights are averaged, and statistics re-estimated by ``finetune=True`` before the evaluation.

    https://github.com/timgaripov/swa
    """
    data = digits(channels_first=True)
    model = CNN()
    optimizer = chainer.optimizers.Adam(3e-3).setup(model)
    kept: list[dict[str, Any]] = []
    history: dict[str, list[float]] = {"accuracy": [], "val_accuracy": []}
    with run.loop(model) as watch:
        for epoch in range(8):
            accuracies = []
            for rows in shuffled(len(data.x), 32):
                scores = model(data.x[rows])
                loss = F.softmax_cross_entropy(scores, data.y[rows])
                model.cleargrads()
                loss.backward()
                optimizer.update()
                watch.step(accuracy=F.accuracy(scores, data.y[rows]), loss=loss)
                accuracies.append(float(F.accuracy(scores, data.y[rows]).array))
            if epoch >= 4:
                kept.append({name: p.array.copy() for name, p in model.namedparams()})
            if epoch == 7:
                for name, parameter in model.namedparams():
                    parameter.array[...] = np.mean([snapshot[name] for snapshot in kept], axis=0)
                re_estimate(model, data)
            with chainer.using_config("train", False):
                val_accuracy, val_loss = scored(model, data.xv, data.yv)
            watch.evaluation(accuracy=val_accuracy, loss=val_loss, examples=len(data.xv))
            history["accuracy"].append(float(np.mean(accuracies)))
            history["val_accuracy"].append(val_accuracy)
    finished(run, model, data, history)


def re_estimate(model: CNN, data: Data) -> None:
    """Take the statistics anew over the training data, as Chainer offers it."""
    for link in model.links():
        if isinstance(link, L.BatchNormalization):
            link.start_finetuning()
    with chainer.no_backprop_mode():
        for rows in shuffled(len(data.x), 100):
            model.features(data.x[rows], finetune=True)
