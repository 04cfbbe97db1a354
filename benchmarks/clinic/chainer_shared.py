"""Two kinds of data through one batch normalization: at two places of the network, or in batches by turns."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import chainer
import numpy as np
from chainer import functions as F  # noqa: N812 - the name that all Chainer code uses
from chainer import links as L  # noqa: N812 - likewise

from benchmarks.clinic.case import case
from benchmarks.clinic.chainer_nets import MLP, by_hand, scored, shuffled, train
from benchmarks.clinic.data import Data, digits

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from benchmarks.clinic.case import Run


class Siamese(chainer.Chain):
    """Tells whether two inputs belong together, from the difference of their codes."""

    def __init__(self) -> None:
        super().__init__()
        with self.init_scope():
            self.encoder = MLP(64, 64, classes=32)
            self.out = L.Linear(None, 2)

    def forward(self, x: Any) -> Any:
        """Return the scores of apart and together."""
        one, other = (self.encoder(x[:, k]) for k in (0, 1))
        return self.out(abs(one - other))


def pairs(x: NDArray[Any], y: NDArray[Any], number: int, rng: np.random.Generator) -> tuple[NDArray[Any], ...]:
    """Return pairs, the second of another sensor: scaled by 4 and raised by 3, half of them of one class."""
    first = rng.integers(0, len(x), number)
    same = rng.random(number) < 0.5
    second = np.array([rng.choice(np.flatnonzero((y == y[i]) == s)) for i, s in zip(first, same, strict=True)])
    return np.stack([x[first], 4 * x[second] + 3], axis=1), same.astype(np.int32)


@case("BN-001/chainer", expects="BN101", framework="chainer")
def siamese_sensors(run: Run) -> None:
    """Two sensors of different scale go through one encoder; https://github.com/keras-team/keras/issues/8794."""
    data, rng = digits(flat=True), np.random.default_rng(run.seed)
    train(run, Siamese(), Data(*pairs(data.x, data.y, 4000, rng), *pairs(data.xv, data.yv, 800, rng)), epochs=8,
          batch=64)  # fmt: skip


class OneLink(chainer.Chain):
    """Two layers that are normalized by one link."""

    def __init__(self) -> None:
        super().__init__()
        with self.init_scope():
            self.l1 = L.Linear(64, 64)
            self.l2 = L.Linear(64, 64)
            self.bn = L.BatchNormalization(64)
            self.l3 = L.Linear(64, 10)

    def forward(self, x: Any) -> Any:
        """Return the scores."""
        h = F.relu(self.bn(self.l1(x)))
        return self.l3(F.relu(self.bn(self.l2(h))))


@case("BN-001/chainer-layers", expects="BN101", framework="chainer", fast=True)
def one_link_for_two_layers(run: Run) -> None:
    """The second founding program on digits: one link for both layers, in a loop by hand.

    https://github.com/keras-team/keras/issues/8794
    """
    by_hand(run, OneLink(), digits(flat=True), epochs=20, optimizer=chainer.optimizers.Adam(3e-3))


@case("BN-005/chainer", expects="BN101", framework="chainer")
def triplets(run: Run) -> None:
    """Anchor, positive and negative of other scales, one shared encoder.

    https://github.com/keras-team/keras/issues/11927
    """
    data, rng = digits(flat=True), np.random.default_rng(run.seed)
    encoder = MLP(64, 64, classes=16)
    optimizer = chainer.optimizers.Adam(1e-3).setup(encoder)

    def some(x: NDArray[Any], y: NDArray[Any], number: int) -> list[NDArray[Any]]:
        anchors = rng.integers(0, len(x), number)
        positives = np.array([rng.choice(np.flatnonzero(y == y[i])) for i in anchors])
        negatives = np.array([rng.choice(np.flatnonzero(y != y[i])) for i in anchors])
        return [x[anchors], 2 * x[positives], 10 * x[negatives]]

    def loss_of(parts: list[NDArray[Any]]) -> tuple[Any, Any]:
        anchor, positive, negative = map(encoder, parts)
        near, far = F.sum((anchor - positive) ** 2, axis=1), F.sum((anchor - negative) ** 2, axis=1)
        return F.mean(F.relu(near - far + 0.2)), (near.array < far.array).mean()

    with run.loop(encoder) as watch:
        for _ in range(4):
            for _ in range(100):
                loss, right = loss_of(some(data.x, data.y, 8))
                encoder.cleargrads()
                loss.backward()
                optimizer.update()
                watch.step(loss=loss)
            with chainer.using_config("train", False), chainer.no_backprop_mode():
                held_out, right = loss_of(some(data.xv, data.yv, 400))
            watch.evaluation(loss=held_out, examples=400)
    run.measure(loss=float(loss.array), val_loss=float(held_out.array), val_right=right)


def fakes(x: NDArray[Any], rng: np.random.Generator) -> NDArray[Any]:
    """Return what a poor generator makes."""
    return (0.6 * x + 0.5 + 0.1 * rng.normal(size=x.shape)).astype(np.float32)


@case("BN-008/chainer", expects="BN208", framework="chainer", fast=True)
def discriminator(run: Run) -> None:
    """A discriminator gets a real batch, then a fake one; https://github.com/carpedm20/DCGAN-tensorflow/issues/266."""
    data, rng = digits(flat=True), np.random.default_rng(run.seed)
    model = MLP(64, 64, classes=2)
    optimizer = chainer.optimizers.Adam(1e-3).setup(model)
    xv = np.concatenate([data.xv, fakes(data.xv, rng)])
    yv = np.repeat(np.array([1, 0], np.int32), len(data.xv))
    accuracies: list[float] = []
    with run.loop(model) as watch:
        for _ in range(8):
            for rows in shuffled(len(data.x), 32):
                for label, x in ((1, data.x[rows]), (0, fakes(data.x[rows], rng))):
                    scores, t = model(x), np.full(len(x), label, np.int32)
                    loss = F.softmax_cross_entropy(scores, t)
                    model.cleargrads()
                    loss.backward()
                    optimizer.update()
                    accuracies.append(float(F.accuracy(scores, t).array))
                    watch.step(accuracy=accuracies[-1], loss=loss)
            with chainer.using_config("train", False):
                accuracy, val_loss = scored(model, xv, yv)
            watch.evaluation(accuracy=accuracy, loss=val_loss, examples=len(xv))
    run.measure(accuracy=np.mean(accuracies[-80:]), val_accuracy=accuracy)
    run.subject(model, train=(np.concatenate([data.x, fakes(data.x, rng)]), np.repeat([1, 0], 1400).astype(np.int32)),
                evaluation=(xv, yv))  # fmt: skip


class InTurns(chainer.iterators.SerialIterator):
    """Takes a batch of one half of the data, then one of the other."""

    def __init__(self, dataset: Any, batch_size: int) -> None:
        half = len(dataset) // 2

        def order(_order: Any, _position: int) -> NDArray[np.intp]:
            halves = [np.random.permutation(half) + k * half for k in (0, 1)]  # noqa: NPY002 - as Chainer draws
            kept = half // batch_size * batch_size
            return np.stack([h[:kept].reshape(-1, batch_size) for h in halves], axis=1).ravel()

        super().__init__(dataset, batch_size, order_sampler=order)


@case("BN-008/chainer-domains", expects="BN208", framework="chainer")
def two_domains_in_turn(run: Run) -> None:
    """Batches of a clean and of a bright, faint domain by turns, validated on both.

    https://github.com/carpedm20/DCGAN-tensorflow/issues/266
    """
    data = digits(flat=True)
    faint = [0.3 * x + 0.65 for x in (data.x, data.xv)]
    both = Data(np.concatenate([data.x, faint[0]]), np.tile(data.y, 2), np.concatenate([data.xv, faint[1]]),
                np.tile(data.yv, 2))  # fmt: skip
    dataset = chainer.datasets.TupleDataset(both.x, both.y)
    train(run, MLP(64, 64), both, epochs=8, iterator=InTurns(dataset, 32))


@case("OK-gan/chainer", expects=None, framework="chainer")
def generator_normalized_twice(run: Run) -> None:
    """Each step of the discriminator runs the generator in training mode, too.

    https://github.com/carpedm20/DCGAN-tensorflow/issues/289
    """
    data, rng = digits(flat=True), np.random.default_rng(run.seed)
    generator = MLP(64, 64, classes=64)
    discriminator = chainer.Sequential(L.Linear(64, 64), F.leaky_relu, L.Linear(64, 1))
    optimizers = [chainer.optimizers.Adam(2e-4, beta1=0.5).setup(m) for m in (generator, discriminator)]
    with run.loop({"gen": generator, "dis": discriminator}) as watch:
        for _ in range(8):
            for rows in shuffled(len(data.x), 32):
                fake = F.sigmoid(generator(rng.normal(size=(len(rows), 16)).astype(np.float32)))
                loss = F.mean(F.softplus(-discriminator(data.x[rows]))) + F.mean(F.softplus(discriminator(fake.array)))
                discriminator.cleargrads()
                loss.backward()
                optimizers[1].update()
                fake = F.sigmoid(generator(rng.normal(size=(len(rows), 16)).astype(np.float32)))
                fooled = F.mean(F.softplus(-discriminator(fake)))
                generator.cleargrads()
                fooled.backward()
                optimizers[0].update()
                watch.step(loss=fooled)
    run.measure(dis_loss=float(loss.array), gen_loss=float(fooled.array))
