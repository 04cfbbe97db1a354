"""Running statistics that are not those of the data under the weights as they are."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import chainer
import numpy as np
from chainer import functions as F  # noqa: N812 - the name that all Chainer code uses
from chainer import links as L  # noqa: N812 - likewise
from chainer import serializers
from chainer.training import extensions, updaters

from benchmarks.clinic.case import case
from benchmarks.clinic.chainer_nets import CNN, MLP, by_hand, finished, logged, scored, shuffled, train, trainer_of
from benchmarks.clinic.data import Data, digits

if TYPE_CHECKING:
    from pathlib import Path

    from benchmarks.clinic.case import Run


@case("BN-024/chainer", expects="BN201", framework="chainer", also=("BN202",))
def long_memory(run: Run) -> None:
    """Three epochs at decay .999 on raw pixels; https://github.com/chainer/chainer/issues/4553."""
    train(run, CNN(decay=0.999), digits(raw=True, channels_first=True), epochs=3)


@case("BN-013/chainer", expects="BN201", framework="chainer")
def one_batch(run: Run) -> None:
    """One batch is learned by heart and evaluated on itself; https://github.com/keras-team/keras/issues/7265."""
    data = digits(raw=True, channels_first=True)
    one = Data(data.x[:128], data.y[:128], data.x[:128], data.y[:128])
    by_hand(run, CNN(decay=0.99), one, epochs=25, batch=128, optimizer=chainer.optimizers.Adam(1e-2))


@case("BN-018/chainer", expects=("BN201", "BN202"), framework="chainer")
def short_fine_tuning(run: Run) -> None:
    """A loaded network is tuned for 40 steps on other contrast at decay .99.

    https://github.com/tensorflow/tensorflow/issues/36065
    """
    data = digits(channels_first=True)
    model, optimizer = CNN(decay=0.99), chainer.optimizers.Adam(1e-3)
    optimizer.setup(model)
    for _ in range(12):
        for rows in shuffled(len(data.x), 32):
            loss = F.softmax_cross_entropy(model(data.x[rows]), data.y[rows])
            model.cleargrads()
            loss.backward()
            optimizer.update()
    bright = Data(12 * data.x[:640] + 4, data.y[:640], 12 * data.xv + 4, data.yv)
    train(run, model, bright, epochs=2)


@case("BN-029/chainer", expects="BN202", framework="chainer")
def decay_from_pytorch(run: Run) -> None:
    """PyTorch's momentum of .1 given as decay, batches of 4; https://github.com/r9y9/tacotron_pytorch/issues/19."""
    train(run, MLP(64, 64, decay=0.1), digits(flat=True), epochs=5, batch=4)


@case("BN-030/chainer", expects="BN202", framework="chainer")
def decay_of_a_hundredth(run: Run) -> None:
    """Decay .01 and batches of 8, by hand; https://github.com/vlawhern/arl-eegmodels/issues/39."""
    by_hand(run, MLP(64, 64, decay=0.01), digits(flat=True), epochs=5, batch=8)


@case("BN-033/chainer", expects="BN203", framework="chainer")
def never_updated(run: Run) -> None:
    """Decay 1.0 keeps the initial values for good; https://github.com/tensorflow/tensorflow/issues/11965."""
    train(run, CNN(decay=1.0), digits(raw=True, channels_first=True), epochs=5,
          optimizer=chainer.optimizers.Adam(3e-3))  # fmt: skip


@case("BN-039/chainer", expects="BN203", framework="chainer")
def never_updated_standardised(run: Run) -> None:
    """The same on standardised inputs, by hand; https://github.com/svishwa/crowdcount-mcnn/issues/64."""
    data = digits(flat=True)
    mean, sd = data.x.mean(axis=0), data.x.std(axis=0) + np.float32(0.1)
    data = Data((data.x - mean) / sd, data.y, (data.xv - mean) / sd, data.yv)
    by_hand(run, MLP(64, 64, decay=1.0), data, epochs=8)


class MeanOnly(L.BatchNormalization):
    """Keeps the variance it began with."""

    def forward(self, x: Any, **options: Any) -> Any:
        """Normalize, and take the variance back."""
        before = None if self.avg_var is None else self.avg_var.copy()
        output = super().forward(x, **options)
        if before is not None:
            self.avg_var[...] = before
        return output


@case("BN-037/chainer", expects="BN203", framework="chainer")
def only_the_mean(run: Run) -> None:
    """A link of one's own updates the mean only; https://github.com/keras-team/keras-core/issues/338."""
    train(run, CNN(link=MeanOnly), digits(raw=True, channels_first=True), epochs=5)


@case("BN-140/chainer", expects="BN210", framework="chainer")
def averaged_snapshots(run: Run) -> None:
    """The mean of the last epochs' weights is evaluated with the last statistics.

    https://github.com/kristpapadopoulos/keras-stochastic-weight-averaging/issues/4
    """
    data = digits(flat=True)
    model = MLP(64, 64, 64)
    optimizer = chainer.optimizers.Adam(3e-2).setup(model)
    kept: list[dict[str, Any]] = []
    with run.loop(model) as watch:
        for epoch in range(6):
            for rows in shuffled(len(data.x), 32):
                scores = model(data.x[rows])
                loss = F.softmax_cross_entropy(scores, data.y[rows])
                model.cleargrads()
                loss.backward()
                optimizer.update()
                watch.step(accuracy=F.accuracy(scores, data.y[rows]), loss=loss)
            if epoch >= 1:
                kept.append({name: p.array.copy() for name, p in model.namedparams()})
            if epoch == 5:
                for name, parameter in model.namedparams():
                    parameter.array[...] = np.mean([snapshot[name] for snapshot in kept], axis=0)
            with chainer.using_config("train", False):
                val_accuracy, val_loss = scored(model, data.xv, data.yv)
            watch.evaluation(accuracy=val_accuracy, loss=val_loss, examples=len(data.xv))
            run.measure(**{f"val_accuracy_{epoch}": val_accuracy})
    run.subject(model, train=(data.x, data.y), evaluation=(data.xv, data.yv))


@case("BN-142/chainer", expects="BN210", framework="chainer")
def averaged_before_each_evaluation(run: Run) -> None:
    """An exponential average of the weights is swapped in for each evaluation, with the statistics of the raw ones.

    https://github.com/odegeasslbc/FastGAN-pytorch/issues/4
    """
    data = digits(flat=True)
    model = MLP(64, 64, 64)
    optimizer = chainer.optimizers.Adam(2e-2).setup(model)
    slow: dict[str, Any] = {}
    with run.loop(model) as watch:
        for epoch in range(8):
            for rows in shuffled(len(data.x), 32):
                scores = model(data.x[rows])
                loss = F.softmax_cross_entropy(scores, data.y[rows])
                model.cleargrads()
                loss.backward()
                optimizer.update()
                watch.step(accuracy=F.accuracy(scores, data.y[rows]), loss=loss)
                for name, parameter in model.namedparams():
                    slow[name] = 0.99 * slow.get(name, parameter.array) + 0.01 * parameter.array
            raw = {name: parameter.array.copy() for name, parameter in model.namedparams()}
            for name, parameter in model.namedparams():
                parameter.array[...] = slow[name]
            with chainer.using_config("train", False):
                val_accuracy, val_loss = scored(model, data.xv, data.yv)
            watch.evaluation(accuracy=val_accuracy, loss=val_loss, examples=len(data.xv))
            run.measure(**{f"val_accuracy_{epoch}": val_accuracy})
            if epoch < 7:
                for name, parameter in model.namedparams():
                    parameter.array[...] = raw[name]
    run.subject(model, train=(data.x, data.y), evaluation=(data.xv, data.yv))


def learned(model: Any, data: Data, epochs: int = 8) -> Any:
    """Train a model, unwatched."""
    optimizer = chainer.optimizers.Adam(1e-3).setup(model)
    for _ in range(epochs):
        for rows in shuffled(len(data.x), 32):
            loss = F.softmax_cross_entropy(model(data.x[rows]), data.y[rows])
            model.cleargrads()
            loss.backward()
            optimizer.update()
    return model


@case("BN-145/chainer", expects="BN211", framework="chainer", fast=True)
def copied_without_statistics(run: Run) -> None:
    """``copyparams(copy_persistent=False)`` into a fresh model, which is evaluated.

    https://github.com/tinghuiz/SfMLearner/issues/17
    """
    data = digits(raw=True, channels_first=True)
    source, model = learned(CNN(), data, 5), CNN()
    with chainer.using_config("train", False):
        model(data.x[:2])
    model.copyparams(source, copy_persistent=False)
    with run.loop(model, probe=None) as watch, chainer.using_config("train", False):
        val_accuracy, val_loss = scored(model, data.xv, data.yv)
        watch.evaluation(accuracy=val_accuracy, loss=val_loss, examples=len(data.xv))
        trained, _ = scored(source, data.xv, data.yv)
    run.measure(val_accuracy=val_accuracy, source=trained)
    run.subject(model, train=(data.x, data.y), evaluation=(data.xv, data.yv))


def save_parameters(path: str | Path, model: Any) -> None:
    """Save parameters only, as many scripts did with ``namedparams``."""
    np.savez(path, **{name.strip("/"): parameter.array for name, parameter in model.namedparams()})


def load_parameters(path: str | Path, model: Any) -> None:
    """Load what `save_parameters` saved."""
    with np.load(path) as saved:
        for name, parameter in model.namedparams():
            parameter.initialize(saved[name.strip("/")].shape)
            parameter.array[...] = saved[name.strip("/")]


@case("BN-145/chainer-tuning", expects=("BN211", "BN104"), framework="chainer")
def tuned_without_statistics(run: Run) -> None:
    """Only parameters were saved; after loading, the last layer is tuned with the rest in evaluation mode.

    https://github.com/tinghuiz/SfMLearner/issues/17
    """
    data = digits(raw=True, channels_first=True)
    path = f"{run.log_dir}/parameters.npz"
    save_parameters(path, learned(CNN(), data, 5))

    class Tuned(CNN):
        def forward(self, x: Any) -> Any:
            with chainer.using_config("train", False):
                features = self.features(x)
            return self.out(features)

    model = Tuned()
    with chainer.using_config("train", False):
        model(data.x[:2])
    load_parameters(path, model)
    train(run, model, data, epochs=3)


@case("BN-147/chainer", expects="BN211", framework="chainer")
def lazily_made_statistics(run: Run) -> None:
    """Links made by ``axis`` had no statistics yet when parameters were loaded.

    https://github.com/chainer/chainer/issues/8441
    """

    def lazy() -> CNN:
        return CNN(link=lambda _: L.BatchNormalization(axis=(0, 2, 3)))

    data = digits(raw=True, channels_first=True)
    path = f"{run.log_dir}/parameters.npz"
    source = learned(lazy(), data, 5)
    serializers.save_npz(path, source)
    model = lazy()
    with np.load(path) as saved:  # what Chainer 7.0 loaded: it skipped what the link did not have yet
        parameters = serializers.NpzDeserializer({k: v for k, v in saved.items() if "avg_" not in k}, strict=False)
        parameters.load(model)
    classifier = L.Classifier(model)
    trainer = trainer_of(run, classifier, Data(data.x[:160], data.y[:160], data.xv, data.yv), epochs=1)
    trainer.run()
    finished(run, model, data, *logged(trainer))


def two_shards() -> tuple[Data, Data]:
    """Return what two machines hold: digits as they are, and brighter ones of more contrast."""
    data = digits(flat=True)
    half = len(data.x) // 2
    one = Data(data.x[:half], data.y[:half], data.xv, data.yv)
    return one, Data(4 * data.x[half:] + 3, data.y[half:], 4 * data.xv + 3, data.yv)


@case("BN-135/chainer", expects=("BN212", "BN301", "BN304"), framework="chainer")
def averaged_parameters(run: Run) -> None:
    """Two copies on different shards, parameters averaged after each step.

    https://github.com/chainer/chainermn/issues/62
    """
    shards = two_shards()
    copies = [MLP(64, 64), MLP(64, 64)]
    for model in copies:
        with chainer.using_config("train", False):
            model(shards[0].x[:2])
    copies[1].copyparams(copies[0])
    optimizers = [chainer.optimizers.Adam(1e-3).setup(model) for model in copies]
    xv = np.concatenate([shard.xv for shard in shards])
    yv = np.concatenate([shard.yv for shard in shards])
    with run.loop({"rank0": copies[0], "rank1": copies[1]}) as watch:
        for _ in range(10):
            for each in zip(shuffled(len(shards[0].x), 32), shuffled(len(shards[1].x), 32), strict=True):
                for model, optimizer, shard, rows in zip(copies, optimizers, shards, each, strict=True):
                    scores = model(shard.x[rows])
                    loss = F.softmax_cross_entropy(scores, shard.y[rows])
                    model.cleargrads()
                    loss.backward()
                    optimizer.update()
                for one, other in zip(copies[0].params(), copies[1].params(), strict=True):
                    one.array[...] = other.array[...] = (one.array + other.array) / 2
                watch.step(accuracy=F.accuracy(scores, shard.y[rows]), loss=loss)
            with chainer.using_config("train", False):
                val_accuracy, val_loss = scored(copies[0], xv, yv)
            watch.evaluation(accuracy=val_accuracy, loss=val_loss, examples=len(xv))
    run.measure(val_accuracy=val_accuracy, own_shard=scored_in_evaluation(copies[0], shards[0]))
    run.subject(copies[0], train=(shards[0].x, shards[0].y), evaluation=(xv, yv))


def scored_in_evaluation(model: Any, data: Data) -> float:
    """Return the validation accuracy in evaluation mode."""
    with chainer.using_config("train", False):
        return scored(model, data.xv, data.yv)[0]


@case("BN-135/chainer-parallel", expects="BN212", framework="chainer")
def parallel_updater(run: Run) -> None:
    """``ParallelUpdater`` deals out a data set in which two sensors take turns: each copy sees one of them.

    https://github.com/chainer/chainermn/issues/62
    """
    one, other = two_shards()
    x = np.stack([one.x, other.x], axis=1).reshape(-1, 64)
    y = np.stack([one.y, other.y], axis=1).ravel()
    data = Data(x, y, np.concatenate([one.xv, other.xv]), np.concatenate([one.yv, other.yv]))
    model = L.Classifier(MLP(64, 64))
    with chainer.using_config("train", False):
        model.predictor(data.x[:2])
    optimizer = chainer.optimizers.Adam(1e-3).setup(model)
    iterator = chainer.iterators.SerialIterator(chainer.datasets.TupleDataset(x, y), 64, shuffle=False)
    updater = updaters.ParallelUpdater(iterator, optimizer, devices={"main": -1, "second": -1})
    trainer = chainer.training.Trainer(updater, (10, "epoch"), out=f"{run.log_dir}/result")
    held_out = chainer.iterators.SerialIterator(
        chainer.datasets.TupleDataset(data.xv, data.yv), 64, repeat=False, shuffle=False
    )
    trainer.extend(extensions.Evaluator(held_out, model))
    trainer.extend(extensions.LogReport())
    run.extend(trainer)
    trainer.run()
    finished(run, model.predictor, data, *logged(trainer))


@case("BN-137/chainer", expects=("BN213", "BN204"), framework="chainer")
def accumulated_gradients(run: Run) -> None:
    """Gradients of 16 micro-batches of 2 are added up; https://github.com/andreped/GradientAccumulator/issues/6."""
    data = digits(flat=True)
    model = MLP(64, 64)
    optimizer = chainer.optimizers.Adam(1e-3).setup(model)
    history: dict[str, list[float]] = {"accuracy": [], "val_accuracy": []}
    with run.loop(model) as watch:
        for _ in range(6):
            accuracies = []
            for rows in shuffled(len(data.x) // 32 * 32, 32):
                model.cleargrads()
                for micro in rows.reshape(16, 2):
                    scores = model(data.x[micro])
                    loss = F.softmax_cross_entropy(scores, data.y[micro]) / 16
                    loss.backward()
                    accuracies.append(float(F.accuracy(scores, data.y[micro]).array))
                optimizer.update()
                watch.step(accuracy=np.mean(accuracies[-16:]), loss=16 * loss.array)
            with chainer.using_config("train", False):
                val_accuracy, val_loss = scored(model, data.xv, data.yv)
            watch.evaluation(accuracy=val_accuracy, loss=val_loss, examples=len(data.xv))
            history["accuracy"].append(float(np.mean(accuracies)))
            history["val_accuracy"].append(val_accuracy)
    finished(run, model, data, history)
