"""Networks that several Chainer programs train, and the two ways to train them: a Trainer, and a loop by hand."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import chainer
import numpy as np
from chainer import functions as F  # noqa: N812 - the name that all Chainer code uses
from chainer import links as L  # noqa: N812 - likewise
from chainer import training
from chainer.training import extensions

from benchmarks.clinic.networks import chainer_rate

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from numpy.typing import NDArray

    from benchmarks.clinic.case import Run
    from benchmarks.clinic.data import Data


class MLP(chainer.Chain):
    """Linear, batch norm, ReLU, as often as there are widths, and a linear output."""

    def __init__(self, *widths: int, classes: int = 10, **options: Any) -> None:
        super().__init__()
        self.depth = len(widths)
        with self.init_scope():
            for n, width in enumerate(widths):
                setattr(self, f"l{n}", L.Linear(None, width))
                setattr(self, f"bn{n}", L.BatchNormalization(width, **options))
            self.out = L.Linear(None, classes)

    def forward(self, x: Any) -> Any:
        """Return the scores."""
        for n in range(self.depth):
            x = F.relu(getattr(self, f"bn{n}")(getattr(self, f"l{n}")(x)))
        return self.out(x)


class CNN(chainer.Chain):
    """Convolution, batch norm, ReLU three times, pooled twice, and a linear output."""

    def __init__(self, *, classes: int = 10, link: Any = L.BatchNormalization, **options: Any) -> None:
        super().__init__()
        with self.init_scope():
            for n, width in enumerate((16, 32, 32)):
                setattr(self, f"conv{n}", L.Convolution2D(None, width, 3, pad=1, nobias=True))
                setattr(self, f"bn{n}", link(width, **options))
            self.out = L.Linear(None, classes)

    def features(self, x: Any, *, finetune: bool = False) -> Any:
        """Return what the output sees."""
        for n in range(3):
            x = F.relu(getattr(self, f"bn{n}")(getattr(self, f"conv{n}")(x), finetune=finetune))
            x = F.max_pooling_2d(x, 2) if n < 2 else x
        return x

    def forward(self, x: Any) -> Any:
        """Return the scores."""
        return self.out(self.features(x))


def set_up(optimizer: Any, model: Any) -> Any:
    """Return the optimizer, Adam if None, set up for the model unless it was set up before."""
    optimizer = optimizer or chainer.optimizers.Adam(1e-3)
    return optimizer if getattr(optimizer, "target", None) is model else optimizer.setup(model)


def trainer_of(
    run: Run,
    model: Any,
    data: Data,
    *,
    epochs: int,
    batch: int = 32,
    optimizer: Any = None,
    iterator: Any = None,
    evaluator: Any = extensions.Evaluator,
) -> training.Trainer:
    """Return a watched Trainer with an Evaluator, as in Chainer's examples; ``model`` is a Classifier."""
    iterator = iterator or chainer.iterators.SerialIterator(chainer.datasets.TupleDataset(data.x, data.y), batch)
    optimizer = set_up(optimizer, model)
    updater = training.updaters.StandardUpdater(iterator, optimizer)
    trainer = training.Trainer(updater, (epochs, "epoch"), out=f"{run.log_dir}/result")
    held_out = chainer.datasets.TupleDataset(data.xv, data.yv)
    trainer.extend(evaluator(chainer.iterators.SerialIterator(held_out, batch, repeat=False, shuffle=False), model))
    trainer.extend(extensions.LogReport())
    run.extend(trainer)
    return trainer


def train(run: Run, model: Any, data: Data, **options: Any) -> None:
    """Train by `trainer_of`, with what it accepts; a model that returns scores gets a Classifier around it."""
    model = model if isinstance(model, L.Classifier) else L.Classifier(model)
    trainer = trainer_of(run, model, data, **options)
    trainer.run()
    finished(run, model.predictor, data, *logged(trainer))


def logged(trainer: training.Trainer) -> tuple[dict[str, list[float]], Any]:
    """Return the figures of every epoch, and the optimizer."""
    log = trainer.get_extension("LogReport").log
    names = {"main/loss": "loss", "main/accuracy": "accuracy"}
    names |= {f"validation/{name}": f"val_{short}" for name, short in names.items()}
    history = {short: [float(entry[name]) for entry in log if name in entry] for name, short in names.items()}
    return history, trainer.updater.get_optimizer("main")


def finished(run: Run, model: Any, data: Data, history: dict[str, list[float]], optimizer: Any = None) -> None:
    """Hand a trained model on, and note its last figures."""
    run.measure(**{name: values[-1] for name, values in history.items() if values})
    run.subject(model, train=(data.x, data.y), evaluation=(data.xv, data.yv), history=history,
                learning_rate=chainer_rate(optimizer))  # fmt: skip


def shuffled(examples: int, batch: int) -> Iterator[NDArray[np.intp]]:
    """Yield the rows of the batches of one epoch."""
    order = np.random.permutation(examples)  # noqa: NPY002 - seeded with the rest of the program
    for start in range(0, examples, batch):
        yield order[start : start + batch]


def scored(model: Any, x: NDArray[Any], y: NDArray[Any], batch: int = 100) -> tuple[float, float]:
    """Return accuracy and mean loss, in the mode that is set."""
    right, losses = 0.0, 0.0
    with chainer.no_backprop_mode():
        for start in range(0, len(x), batch):
            scores, t = model(x[start : start + batch]), y[start : start + batch]
            right += float(F.accuracy(scores, t).array) * len(t)
            losses += float(F.softmax_cross_entropy(scores, t).array) * len(t)
    return right / len(x), losses / len(x)


def by_hand(
    run: Run,
    model: Any,
    data: Data,
    *,
    epochs: int,
    batch: int = 32,
    optimizer: Any = None,
    batches: Callable[[], Iterable[NDArray[np.intp]]] | None = None,
    before_step: Callable[[], None] | None = None,
    before_evaluation: Callable[[], None] | None = None,
) -> None:
    """Train in a watched loop that evaluates after each epoch.

    Args:
        run: the run.
        model: returns scores.
        data: the data.
        epochs: how many.
        batch: examples a step.
        optimizer: Adam if None.
        batches: yields the rows of an epoch's batches; shuffled ones if None.
        before_step: is called before each step.
        before_evaluation: is called before each evaluation.
    """
    optimizer = set_up(optimizer, model)
    history: dict[str, list[float]] = {"loss": [], "accuracy": [], "val_loss": [], "val_accuracy": []}
    with run.loop(model) as watch:
        for _ in range(epochs):
            sums = np.zeros(3)
            for rows in batches() if batches else shuffled(len(data.x), batch):
                if before_step is not None:
                    before_step()
                scores = model(data.x[rows])
                loss = F.softmax_cross_entropy(scores, data.y[rows])
                accuracy = F.accuracy(scores, data.y[rows])
                model.cleargrads()
                loss.backward()
                optimizer.update()
                watch.step(accuracy=accuracy, loss=loss)
                sums += (float(loss.array), float(accuracy.array), 1)
            if before_evaluation is not None:
                before_evaluation()
            with chainer.using_config("train", False):
                val_accuracy, val_loss = scored(model, data.xv, data.yv)
            watch.evaluation(accuracy=val_accuracy, loss=val_loss, examples=len(data.xv))
            for name, value in zip(history, (*(sums[:2] / sums[2]), val_loss, val_accuracy), strict=True):
                history[name].append(float(value))
    finished(run, model, data, history, optimizer)
