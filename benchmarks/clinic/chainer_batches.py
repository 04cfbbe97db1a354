"""Batches that say little or wrong things about the data: tiny, odd, sorted, with outliers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import chainer
import numpy as np
from chainer import functions as F  # noqa: N812 - the name that all Chainer code uses
from chainer import links as L  # noqa: N812 - likewise

from benchmarks.clinic.case import case
from benchmarks.clinic.chainer_nets import CNN, MLP, by_hand, scored, shuffled, train
from benchmarks.clinic.data import Data, digits

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from numpy.typing import NDArray

    from benchmarks.clinic.case import Run


class Pooled(CNN):
    """The CNN with one more batch norm, behind global pooling."""

    def __init__(self) -> None:
        super().__init__()
        with self.init_scope():
            self.last = L.BatchNormalization(32)

    def forward(self, x: Any) -> Any:
        """Return the scores."""
        return self.out(self.last(F.mean(self.features(x), axis=(2, 3))))


@case("BN-055/chainer", expects="BN204", framework="chainer")
def batches_of_two(run: Run) -> None:
    """A convolutional net on batches of 2; https://github.com/keras-team/keras/issues/8837."""
    data = digits(channels_first=True)
    train(run, Pooled(), Data(data.x[:600], data.y[:600], data.xv, data.yv), epochs=3, batch=2)


@case("BN-062/chainer", expects="BN204", framework="chainer")
def two_at_a_time(run: Run) -> None:
    """A dense net on batches of 2, by hand; https://github.com/leondgarse/keras_efficientnet_v2/issues/12."""
    data = digits(flat=True)
    by_hand(run, MLP(64, 64), Data(data.x[:800], data.y[:800], data.xv, data.yv), epochs=4, batch=2)


@case("BN-063/chainer", expects="BN205", framework="chainer", fast=True)
def one_array(run: Run) -> None:
    """Three lines: a link on one example in training mode; https://github.com/chainer/chainer/pull/3996."""
    link = L.BatchNormalization(4)
    with run.loop(link) as watch:
        output = link(np.array([[1.0, 2.0, 3.0, 4.0]], np.float32))
        watch.step()
    run.measure(largest_output=float(abs(output.array).max()), running_variance=float(link.avg_var[0]))


@case("BN-063/chainer-inference", expects=("BN103", "BN205"), framework="chainer")
def inference_of_one(run: Run) -> None:
    """The trained network is asked one example at a time without switching training mode off.

    https://github.com/chainer/chainer/pull/3996
    """
    data = digits(flat=True)
    model = MLP(64, 64)
    optimizer = chainer.optimizers.Adam(1e-3).setup(model)
    with run.loop(model) as watch:
        for _ in range(6):
            for rows in shuffled(len(data.x), 32):
                scores = model(data.x[rows])
                loss = F.softmax_cross_entropy(scores, data.y[rows])
                model.cleargrads()
                loss.backward()
                optimizer.update()
                watch.step(accuracy=F.accuracy(scores, data.y[rows]), loss=loss)
        accuracy, loss = scored(model, data.xv, data.yv, batch=1)
        watch.evaluation(accuracy=accuracy, loss=loss, examples=len(data.xv))
    run.measure(val_accuracy=accuracy)


@case("BN-066/chainer", expects="BN205", framework="chainer")
def single_samples(run: Run) -> None:
    """A dense net on batches of one; https://github.com/tensorflow/tensorflow/issues/34062."""
    data = digits(flat=True)
    by_hand(run, MLP(64, 64), Data(data.x[:400], data.y[:400], data.xv, data.yv), epochs=4, batch=1)


@case("BN-066/chainer-pooled", expects="BN205", framework="chainer")
def one_pixel_each(run: Run) -> None:
    """Batch norm behind global pooling, one image a batch: the other links see pixels enough.

    https://github.com/tensorflow/tensorflow/issues/34062
    """
    data = digits(channels_first=True)
    train(run, Pooled(), Data(data.x[:200], data.y[:200], data.xv, data.yv), epochs=3, batch=1)


@case("BN-068/chainer", expects="BN206", framework="chainer")
def odd_last_batch(run: Run) -> None:
    """1345 examples in batches of 64 leave one for the last; decay .5; https://github.com/fastai/fastai/pull/1095."""
    data = digits(flat=True)
    by_hand(run, MLP(64, 64, decay=0.5), Data(data.x[:1345], data.y[:1345], data.xv, data.yv), epochs=12, batch=64)


def grouped(y: NDArray[Any], classes: list[tuple[int, ...]], batch: int) -> Callable[[], Iterator[NDArray[np.intp]]]:
    """Return what yields an epoch's batches, each of one group of classes, in random order."""

    def batches() -> Iterator[NDArray[np.intp]]:
        found = []
        for group in classes:
            rows = np.random.permutation(np.flatnonzero(np.isin(y, group)))  # noqa: NPY002 - seeded before
            found += [rows[start : start + batch] for start in range(0, len(rows) - batch + 1, batch)]
        for n in np.random.permutation(len(found)):  # noqa: NPY002 - likewise
            yield found[n]

    return batches


@case("BN-073/chainer", expects="BN207", framework="chainer")
def one_class_a_batch(run: Run) -> None:
    """A folder of images a class, a batch a folder; https://github.com/vlfeat/matconvnet/issues/393."""
    data = digits(flat=True)
    batches = grouped(data.y, [(c,) for c in range(10)], 32)
    by_hand(run, MLP(64, 64), data, epochs=20, batches=batches)


@case("BN-077/chainer", expects="BN207", framework="chainer")
def two_classes_a_batch(run: Run) -> None:
    """Batches of pairs of classes; https://github.com/happynear/NormFace/issues/4."""
    data = digits(flat=True)
    batches = grouped(data.y, [(c, c + 1) for c in range(0, 10, 2)], 32)
    by_hand(run, MLP(128, 128), data, epochs=20, batches=batches)


class Sequences(chainer.Chain):
    """One-dimensional convolutions over windows."""

    def __init__(self) -> None:
        super().__init__()
        with self.init_scope():
            self.c1, self.b1 = L.Convolution1D(1, 16, 5, pad=2), L.BatchNormalization(16)
            self.c2, self.b2 = L.Convolution1D(16, 16, 5, pad=2), L.BatchNormalization(16)
            self.out = L.Linear(16, 4)

    def forward(self, x: Any) -> Any:
        """Return the scores."""
        h = F.relu(self.b2(self.c2(F.relu(self.b1(self.c1(x))))))
        return self.out(F.mean(h, axis=2))


def windows(rng: np.random.Generator, sequences: int) -> tuple[NDArray[np.float32], NDArray[np.int32], int]:
    """Return 32 windows of each sequence, one sequence after the other; each has an offset and a scale of its own."""
    x, y, each = [], [], 32
    for _ in range(sequences):
        scale, offset = rng.uniform(0.3, 3), rng.normal(0, 3)
        kinds = rng.integers(0, 4, each)
        time = np.arange(40) + rng.uniform(0, 40, (each, 1))
        waves = np.sin(time * (0.2 + 0.25 * kinds[:, None])) + rng.normal(0, 0.2, (each, 40))
        x.append(scale * waves + offset)
        y.append(kinds)
    return np.concatenate(x)[:, None].astype(np.float32), np.concatenate(y).astype(np.int32), each


@case("BN-072/chainer", expects="BN207", framework="chainer")
def one_sequence_a_batch(run: Run) -> None:
    """Each batch holds the windows of one sequence; https://github.com/pytorch/pytorch/issues/4741."""
    rng = np.random.default_rng(run.seed)
    x, y, each = windows(rng, 40)
    xv, yv, _ = windows(rng, 12)

    def batches() -> Iterator[NDArray[np.intp]]:
        for n in np.random.permutation(len(x) // each):  # noqa: NPY002 - seeded before
            yield np.arange(n * each, (n + 1) * each)

    by_hand(run, Sequences(), Data(x, y, xv, yv), epochs=10, batches=batches)


@case("BN-155/chainer", expects="BN209", framework="chainer")
def one_outlier(run: Run) -> None:
    """One broken sample, a thousand times too large; https://github.com/keras-team/keras/issues/12400."""
    data = digits(flat=True)
    x = data.x.copy()
    x[17] *= 1000
    train(run, MLP(64, 64), Data(x, data.y, data.xv, data.yv), epochs=8)


@case("BN-155/chainer-images", expects="BN209", framework="chainer")
def some_outliers(run: Run) -> None:
    """Images of which one in 300 was not divided by 255 as the others, and is larger still.

    https://github.com/keras-team/keras/issues/12400
    """
    data = digits(channels_first=True)
    x = data.x.copy()
    x[::300] *= 1000
    by_hand(run, CNN(), Data(x, data.y, data.xv, data.yv), epochs=5)
