"""Training mode where evaluation mode is due, and the reverse."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import chainer
import numpy as np
from chainer import functions as F  # noqa: N812 - the name that all Chainer code uses
from chainer import links as L  # noqa: N812 - likewise
from chainer import reporter
from chainer.training import extensions

from benchmarks.clinic.case import case
from benchmarks.clinic.chainer_nets import CNN, MLP, by_hand, finished, logged, scored, shuffled, train, trainer_of
from benchmarks.clinic.data import Data, digits

if TYPE_CHECKING:
    from benchmarks.clinic.case import Run


def step(model: Any, optimizer: Any, x: Any, t: Any) -> tuple[Any, Any]:
    """Make one update, and return accuracy and loss before it."""
    scores = model(x)
    loss = F.softmax_cross_entropy(scores, t)
    model.cleargrads()
    loss.backward()
    optimizer.update()
    return F.accuracy(scores, t), loss


@case("BN-041/chainer", expects="BN104", framework="chainer", fast=True)
def evaluation_mode_from_the_start(run: Run) -> None:
    """A notebook's cell set ``config.train`` to False before; https://github.com/keras-team/keras-io/issues/198."""
    data = digits(raw=True, channels_first=True)
    with chainer.using_config("train", False):
        by_hand(run, CNN(), data, epochs=4, optimizer=chainer.optimizers.Adam(3e-3))


@case("BN-041/chainer-trainer", expects="BN104", framework="chainer")
def evaluation_mode_in_the_predictor(run: Run) -> None:
    """The model itself switches training mode off around its layers.

    https://github.com/keras-team/keras-io/issues/198
    """

    class Predictor(CNN):
        def forward(self, x: Any) -> Any:
            with chainer.using_config("train", False):
                return super().forward(x)

    train(run, Predictor(), digits(raw=True, channels_first=True), epochs=5, optimizer=chainer.optimizers.Adam(3e-3))


@case("BN-161/chainer", expects="BN107", framework="chainer", fast=True)
def left_in_evaluation_mode(run: Run) -> None:
    """``config.train = False`` for the first validation, never set back.

    https://github.com/wkentaro/pytorch-fcn/issues/57
    """
    data = digits(flat=True)
    model = MLP(64, 64, decay=0.99)
    optimizer = chainer.optimizers.Adam(1e-3).setup(model)
    history: dict[str, list[float]] = {"accuracy": [], "val_accuracy": []}
    with chainer.using_config("train", True), run.loop(model) as watch:
        for epoch in range(12):
            accuracies = []
            for rows in shuffled(len(data.x), 64):
                accuracy, loss = step(model, optimizer, data.x[rows], data.y[rows])
                watch.step(accuracy=accuracy, loss=loss)
                accuracies.append(float(accuracy.array))
            if epoch % 2 == 0:
                chainer.config.train = False
                val_accuracy, val_loss = scored(model, data.xv, data.yv)
                watch.evaluation(accuracy=val_accuracy, loss=val_loss, examples=len(data.xv))
            history["accuracy"].append(float(np.mean(accuracies)))
            history["val_accuracy"].append(val_accuracy)
    finished(run, model, data, history)


@case("BN-161/chainer-trainer", expects="BN107", framework="chainer")
def left_by_an_extension(run: Run) -> None:
    """An extension that draws predictions sets ``config.train`` to False for itself, and forgets it.

    https://github.com/wkentaro/pytorch-fcn/issues/57
    """
    data = digits(channels_first=True)

    def preview(trainer: Any) -> None:
        chainer.config.train = False
        with chainer.no_backprop_mode():
            trainer.updater.get_optimizer("main").target.predictor(data.xv[:20])

    class Previewed(extensions.LogReport):
        def __call__(self, trainer: Any) -> None:
            super().__call__(trainer)
            if trainer.updater.iteration == 60:
                preview(trainer)

    model = L.Classifier(CNN(decay=0.99))
    with chainer.using_config("train", True):
        trainer = trainer_of(run, model, data, epochs=6)
        trainer.extend(preview, trigger=(60, "iteration"))
        trainer.run()
    finished(run, model.predictor, data, *logged(trainer))


@case("BN-046/chainer", expects="BN103", framework="chainer", fast=True)
def using_config_forgotten(run: Run) -> None:
    """Validation in a loop by hand without ``using_config``.

    https://community.deeplearning.ai/t/keras-predict-giving-different-results-depending-on-how-used/87440
    """
    data = digits(flat=True)
    model = MLP(64, 64)
    optimizer = chainer.optimizers.Adam(1e-3).setup(model)
    with run.loop(model) as watch:
        for _ in range(8):
            for rows in shuffled(len(data.x), 32):
                accuracy, loss = step(model, optimizer, data.x[rows], data.y[rows])
                watch.step(accuracy=accuracy, loss=loss)
            val_accuracy, val_loss = scored(model, data.xv, data.yv)
            watch.evaluation(accuracy=val_accuracy, loss=val_loss, examples=len(data.xv))
    one_by_one, _ = scored(model, data.xv, data.yv, batch=1)
    run.measure(accuracy=float(accuracy.array), val_accuracy=val_accuracy, one_by_one=one_by_one)
    run.subject(model, train=(data.x, data.y), evaluation=(data.xv, data.yv))


@case("BN-046/chainer-trainer", expects="BN103", framework="chainer")
def evaluated_by_an_extension(run: Run) -> None:
    """An extension of one's own in place of the Evaluator validates in training mode.

    https://community.deeplearning.ai/t/keras-predict-giving-different-results-depending-on-how-used/87440
    """
    data = digits(channels_first=True)
    model = L.Classifier(CNN())
    optimizer = chainer.optimizers.Adam(1e-3).setup(model)
    iterator = chainer.iterators.SerialIterator(chainer.datasets.TupleDataset(data.x, data.y), 32)
    updater = chainer.training.updaters.StandardUpdater(iterator, optimizer)
    trainer = chainer.training.Trainer(updater, (5, "epoch"), out=f"{run.log_dir}/result")

    @chainer.training.make_extension(trigger=(1, "epoch"), priority=chainer.training.PRIORITY_WRITER)
    def validate(_trainer: Any) -> None:
        accuracy, loss = scored(model.predictor, data.xv, data.yv)
        reporter.report({"validation/main/accuracy": accuracy, "validation/main/loss": loss})

    trainer.extend(validate, name="validation")
    trainer.extend(extensions.LogReport())
    run.extend(trainer)
    trainer.run()
    run.measure(one_by_one=scored(model.predictor, data.xv, data.yv, batch=1)[0])
    finished(run, model.predictor, data, *logged(trainer))


@case("BN-053/chainer", expects="BN103", framework="chainer")
def model_that_insists(run: Run) -> None:
    """The predictor switches training mode on for itself, dropout included.

    https://github.com/tensorflow/models/pull/2776
    """

    class Predictor(MLP):
        def forward(self, x: Any) -> Any:
            with chainer.using_config("train", True):
                return F.dropout(super().forward(x), 0.2)

    train(run, Predictor(64, 64), digits(flat=True), epochs=8)


class Transfer(chainer.Chain):
    """A head on a backbone."""

    def __init__(self, backbone: CNN, *, inference: bool = False) -> None:
        super().__init__()
        self._inference = inference
        with self.init_scope():
            self.backbone = backbone
            self.head1, self.head2 = L.Linear(None, 32), L.Linear(32, 2)

    def forward(self, x: Any) -> Any:
        """Return the scores."""
        with chainer.using_config("train", chainer.config.train and not self._inference):
            features = self.backbone.features(x)
        return self.head2(F.relu(self.head1(features)))


def target_task() -> Data:
    """Return another contrast and another question: even or odd."""
    data = digits(channels_first=True)
    x, xv = (np.float32(0.3) * (1 - part) + np.float32(0.1) for part in (data.x, data.xv))
    return Data(x[:600], data.y[:600] % 2, xv, data.yv % 2)


def backbone() -> CNN:
    """Return a network that was trained on digits as they are."""
    source, model = digits(channels_first=True), CNN()
    optimizer = chainer.optimizers.Adam(1e-3).setup(model)
    for _ in range(4):
        for rows in shuffled(len(source.x), 32):
            step(model, optimizer, source.x[rows], source.y[rows])
    return model


@case("BN-121/chainer", expects="BN105", framework="chainer")
def frozen_but_moving(run: Run) -> None:
    """``disable_update`` freezes parameters, not statistics; https://github.com/keras-team/keras/pull/9965."""
    model, data = Transfer(backbone()), target_task()
    optimizer = chainer.optimizers.Adam(1e-3)
    classifier = L.Classifier(model)
    optimizer.setup(classifier)
    model.backbone.disable_update()
    train(run, classifier, data, epochs=8, optimizer=optimizer)


@case("BN-121/chainer-hand", expects="BN105", framework="chainer")
def frozen_by_hand(run: Run) -> None:
    """The same in a loop by hand; https://github.com/keras-team/keras/pull/9965."""
    model, data = Transfer(backbone()), target_task()
    optimizer = chainer.optimizers.Adam(1e-3).setup(model)
    model.backbone.disable_update()
    by_hand(run, model, data, epochs=6, optimizer=optimizer)


@case("BN-156/chainer", expects="BN106", framework="chainer")
def monitored_in_training_mode(run: Run) -> None:
    """After each step a look at other data in training mode, for a plot.

    https://github.com/carpedm20/DCGAN-tensorflow/issues/289
    """
    data = digits(flat=True)
    model = MLP(64, 64)
    optimizer = chainer.optimizers.Adam(1e-3).setup(model)
    noise = np.random.default_rng(run.seed).uniform(0, 3, (64, 64)).astype(np.float32)
    history: dict[str, list[float]] = {"accuracy": [], "val_accuracy": []}
    with run.loop(model) as watch:
        for _ in range(8):
            accuracies = []
            for rows in shuffled(len(data.x), 32):
                accuracy, loss = step(model, optimizer, data.x[rows], data.y[rows])
                accuracies.append(float(accuracy.array))
                with chainer.no_backprop_mode():
                    model(noise)
                watch.step(accuracy=accuracy, loss=loss)
            with chainer.using_config("train", False):
                val_accuracy, val_loss = scored(model, data.xv, data.yv)
            watch.evaluation(accuracy=val_accuracy, loss=val_loss, examples=len(data.xv))
            history["accuracy"].append(float(np.mean(accuracies)))
            history["val_accuracy"].append(val_accuracy)
    finished(run, model, data, history)


@case("BN-156/chainer-trainer", expects="BN106", framework="chainer")
def extension_in_training_mode(run: Run) -> None:
    """An extension plots predictions of raw images every second iteration, in training mode.

    https://github.com/carpedm20/DCGAN-tensorflow/issues/289
    """
    data, raw = digits(channels_first=True), digits(channels_first=True, raw=True)
    model = L.Classifier(CNN())
    trainer = trainer_of(run, model, data, epochs=6)

    @chainer.training.make_extension(trigger=(2, "iteration"), priority=chainer.training.PRIORITY_WRITER)
    def plot(_trainer: Any) -> None:
        with chainer.no_backprop_mode():
            model.predictor(raw.xv[:50])

    trainer.extend(plot, name="plot")
    trainer.run()
    finished(run, model.predictor, data, *logged(trainer))
