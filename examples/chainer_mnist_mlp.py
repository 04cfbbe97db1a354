"""A Chainer program whose evaluation lags far behind its training: two layers share one BatchNormalization link.

Sharing the link shares its running statistics, which then describe neither layer. ``--bn separate`` is the repair.
"""

from __future__ import annotations

import sys
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import numpy as np

from bnwatch.chainer import compat
from bnwatch.examples import data

compat.install()  # before Chainer is imported: it was written for older Python and NumPy

import chainer  # noqa: E402
import chainer.functions as F  # noqa: E402, N812
import chainer.links as L  # noqa: E402, N812
from chainer import training  # noqa: E402
from chainer.training import extensions  # noqa: E402

import bnwatch.chainer  # noqa: E402

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterator, Sequence


class MLP(chainer.Chain):
    """784-100-100-10, normalized in front of both ReLUs by one link (``shared``) or by one each (``separate``)."""

    def __init__(self, bn: str = "shared") -> None:
        super().__init__()
        he = chainer.initializers.HeNormal()
        with self.init_scope():
            self.l1 = L.Linear(784, 100, initialW=he)
            self.l2 = L.Linear(100, 100, initialW=he)
            self.l3 = L.Linear(100, 10, initialW=he)
            self.bn = L.BatchNormalization(100, decay=0.9, eps=0.001)
            if bn == "separate":
                self.bn_2 = L.BatchNormalization(100, decay=0.9, eps=0.001)

    def forward(self, x: Any) -> Any:
        """Return the logits."""
        second = getattr(self, "bn_2", self.bn)
        h = F.relu(self.bn(self.l1(x)))
        h = F.relu(second(self.l2(h)))
        return self.l3(h)


def batches(x: Any, y: Any, size: int) -> Iterator[tuple[Any, Any]]:
    """Yield the examples once, in random order."""
    order = np.random.permutation(len(x))
    for start in range(0, len(x), size):
        chosen = order[start : start + size]
        yield x[chosen], y[chosen]


def by_hand(model: MLP, images: data.Dataset, options: argparse.Namespace) -> None:
    """Train in a hand-written loop."""
    x, y, xv, yv = images
    optimizer = chainer.optimizers.Adam(alpha=0.01).setup(model)
    watching = nullcontext() if options.no_watch else bnwatch.chainer.watch(model, options.log_dir)
    with watching as watch:
        for epoch in range(1, options.epochs + 1):
            correct = 0.0
            for x_batch, y_batch in batches(x, y, options.batch):
                logits = model(x_batch)
                loss = F.softmax_cross_entropy(logits, y_batch)
                model.cleargrads()
                loss.backward()
                optimizer.update()
                accuracy = float(F.accuracy(logits, y_batch).array)
                correct += accuracy * len(y_batch)
                if watch:
                    watch.step(accuracy=accuracy, loss=float(loss.array))

            with chainer.using_config("train", False), chainer.no_backprop_mode():
                evaluation = float(F.accuracy(model(xv), yv).array)
            if watch:
                watch.evaluation(accuracy=evaluation, examples=len(yv))
            training_accuracy = correct / len(y)
            print(
                f"epoch {epoch:2}: training accuracy {training_accuracy:.3f}, evaluation accuracy {evaluation:.3f}",
                flush=True,
            )


def with_trainer(model: MLP, images: data.Dataset, options: argparse.Namespace) -> None:
    """Train with Chainer's Trainer."""
    x, y, xv, yv = images
    classifier = L.Classifier(model)
    optimizer = chainer.optimizers.Adam(alpha=0.01).setup(classifier)
    train = chainer.iterators.SerialIterator(chainer.datasets.TupleDataset(x, y), options.batch)
    test = chainer.iterators.SerialIterator(
        chainer.datasets.TupleDataset(xv, yv), options.batch, repeat=False, shuffle=False
    )
    updater = training.updaters.StandardUpdater(train, optimizer)
    trainer = training.Trainer(updater, (options.epochs, "epoch"), out=options.log_dir)
    trainer.extend(extensions.Evaluator(test, classifier))
    trainer.extend(extensions.LogReport(filename=None))
    trainer.extend(extensions.PrintReport(["epoch", "main/accuracy", "validation/main/accuracy"]))
    if not options.no_watch:
        trainer.extend(bnwatch.chainer.BatchNormWatch(options.log_dir))
    trainer.run()


def main(arguments: Sequence[str] | None = None) -> int:
    """Train as the command line says and return the exit status."""
    downloads = {"mnist": mnist}
    parser = data.parser(__doc__, downloads, epochs=10, batch=1000)
    parser.add_argument("--bn", choices=["shared", "separate"], default="shared", help="default: %(default)s")
    parser.add_argument("--trainer", action="store_true", help="train with Chainer's Trainer")
    options = parser.parse_args(arguments)
    try:
        images = data.load(options.data, (28, 28), downloads, limit=options.limit, shifts=2)
    except data.DataError as error:
        parser.error(str(error))
    np.random.seed(options.seed)
    images = images._replace(x_train=flat(images.x_train), x_test=flat(images.x_test))
    (with_trainer if options.trainer else by_hand)(MLP(options.bn), images, options)
    return 0


def flat(images: data.Images) -> Any:
    """Return the images as rows of numbers from 0 to 1."""
    return images.reshape(len(images), -1).astype(np.float32) / 255


def mnist() -> data.Arrays:
    """Return MNIST as Chainer downloads it."""
    train, test = chainer.datasets.get_mnist(ndim=2, scale=255)

    def arrays(examples: Any) -> tuple[Any, Any]:
        x, y = chainer.dataset.concat_examples(examples)
        return x.round().astype(np.uint8), y

    return arrays(train), arrays(test)


if __name__ == "__main__":
    sys.exit(main())
