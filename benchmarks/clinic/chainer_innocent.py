"""Programs that fail for another reason than their batch normalization."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import chainer
import numpy as np
from chainer import functions as F  # noqa: N812 - the name that all Chainer code uses
from chainer import links as L  # noqa: N812 - likewise

from benchmarks.clinic.case import case
from benchmarks.clinic.chainer_nets import CNN, MLP, by_hand, train
from benchmarks.clinic.data import Data, digits

if TYPE_CHECKING:
    from benchmarks.clinic.case import Run


@case("BN-175/chainer", expects="innocent", framework="chainer")
def overfitting(run: Run) -> None:
    """150 noisy examples, two wide layers, 40 epochs; https://github.com/keras-team/keras/issues/3894."""
    data, rng = digits(flat=True), np.random.default_rng(run.seed)
    x, xv = (x + rng.normal(0, 0.5, x.shape).astype(np.float32) for x in (data.x, data.xv))
    train(run, MLP(512, 512), Data(x[:150], data.y[:150], xv, data.yv), epochs=40)


@case("BN-174/chainer", expects="innocent", framework="chainer", fast=True)
def shuffled_labels(run: Run) -> None:
    """The training labels are in another order than the inputs; https://github.com/keras-team/keras/issues/5162."""
    data = digits(flat=True)
    y = np.random.default_rng(run.seed).permutation(data.y)
    by_hand(run, MLP(64, 64), Data(data.x, y, data.xv, data.yv), epochs=8)


@case("BN-174/chainer-validation", expects="innocent", framework="chainer")
def shuffled_validation_labels(run: Run) -> None:
    """The validation labels are in another order than the inputs; https://github.com/keras-team/keras/issues/5162."""
    data = digits(flat=True)
    yv = np.random.default_rng(run.seed).permutation(data.yv)
    train(run, MLP(64, 64), Data(data.x, data.y, data.xv, yv), epochs=8)


@case("BN-178/chainer", expects="innocent", framework="chainer")
def learning_rate_of_ten(run: Run) -> None:
    """SGD with a learning rate of 10; https://github.com/facebookresearch/maskrcnn-benchmark/issues/295."""
    with np.errstate(all="ignore"):
        train(run, MLP(64, 64), digits(flat=True), epochs=6, optimizer=chainer.optimizers.SGD(10.0))


@case("BN-178/chainer-small", expects="innocent", framework="chainer")
def learning_rate_of_nothing(run: Run) -> None:
    """SGD with a learning rate of 1e-8, in a loop by hand.

    https://github.com/facebookresearch/maskrcnn-benchmark/issues/295
    """
    by_hand(run, MLP(64, 64), digits(flat=True), epochs=8, optimizer=chainer.optimizers.SGD(1e-8))


@case("BN-171/chainer", expects="innocent", framework="chainer")
def unseen_classes(run: Run) -> None:
    """Sorted by class, the last fifth held out: no example of its classes was trained on.

    https://github.com/keras-team/keras/issues/8346
    """
    data = digits(channels_first=True)
    order = np.argsort(data.y, kind="stable")
    x, y = data.x[order], data.y[order]
    train(run, CNN(), Data(x[:1120], y[:1120], x[1120:], y[1120:]), epochs=6)


@case("BN-168/chainer", expects="innocent", framework="chainer")
def wrong_loss(run: Run) -> None:
    """Softmax over one output, with a binary cross-entropy of even or odd.

    https://github.com/keras-team/keras/issues/126
    """

    class Single(MLP):
        def forward(self, x: Any) -> Any:
            return F.softmax(super().forward(x))

    def loss(p: Any, t: Any) -> Any:
        t = t[:, None].astype(np.float32)
        return -F.mean(t * F.log(F.clip(p, 1e-7, 1.0)) + (1 - t) * F.log(F.clip(1 - p, 1e-7, 1.0)))

    def accuracy(p: Any, t: Any) -> Any:
        return F.binary_accuracy(p[:, 0] - 0.5, t)

    data = digits(flat=True)
    data = data._replace(y=data.y % 2, yv=data.yv % 2)
    train(run, L.Classifier(Single(64, 64, classes=1), lossfun=loss, accfun=accuracy), data, epochs=6)
