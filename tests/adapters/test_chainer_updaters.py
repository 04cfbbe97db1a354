"""Every updater of a Trainer: replicas, several models, updaters of the user's own."""

from __future__ import annotations

import io
import json
import random
from collections import Counter
from typing import Any
from unittest.mock import MagicMock

import numpy as np
import pytest
from chainer.training.updaters import multiprocess_parallel_updater

import bnwatch.chainer
from bnwatch.chainer.extension import _replicas, _targets

from . import chainer_models as models
from .chainer_models import F, L, Record, chainer, extensions, state_of, training

DEVICES = {"main": "@numpy", "second": "@numpy", "third": "@numpy"}


class Generator(chainer.Chain):
    def __init__(self) -> None:
        super().__init__()
        with self.init_scope():
            self.l1 = L.Linear(4, 12, nobias=True)
            self.bn1 = L.BatchNormalization(12)
            self.l2 = L.Linear(12, models.FEATURES)

    def forward(self, z: Any) -> Any:
        return self.l2(F.relu(self.bn1(self.l1(z))))


class Discriminator(chainer.Chain):
    def __init__(self) -> None:
        super().__init__()
        with self.init_scope():
            self.l1 = L.Linear(models.FEATURES, 12, nobias=True)
            self.bn1 = L.BatchNormalization(12)
            self.l2 = L.Linear(12, 1)

    def forward(self, x: Any) -> Any:
        return self.l2(F.leaky_relu(self.bn1(self.l1(x))))


class GANUpdater(training.updaters.StandardUpdater):
    """As in Chainer's example of a DCGAN, with ``critic`` updates of the discriminator for each of the generator."""

    critic = 1

    def update_core(self) -> None:
        gen, dis = (self.get_optimizer(name) for name in ("gen", "dis"))
        for number in range(self.critic):
            x = chainer.Variable(self.converter(self.get_iterator("main").next(), self.device)[0])
            fake = gen.target(np.random.normal(size=(len(x), 4)).astype(np.float32))  # noqa: NPY002
            y_real, y_fake = dis.target(x), dis.target(fake)
            if number == 0:
                gen.update(lambda y: F.sum(F.softplus(-y)) / len(y), y_fake)
            dis.update(lambda y, z: F.sum(F.softplus(-y)) / len(y) + F.sum(F.softplus(z)) / len(z), y_real, y_fake)
            chainer.report({"loss": F.mean(y_fake)}, dis.target)


class CountingFirst(training.updaters.StandardUpdater):
    """An ``update`` of the user's own: counts before it computes, and calls the model twice."""

    def update(self) -> None:
        self.iteration += 1
        x, t = self.converter(self.get_iterator("main").next(), self.device)
        optimizer = self.get_optimizer("main")
        loss = optimizer.target(x[:16], t[:16]) + optimizer.target(x[16:], t[16:])
        optimizer.target.cleargrads()
        loss.backward()
        optimizer.update()


class OwnUpdater(training.Updater):
    """No StandardUpdater at all."""

    def __init__(self, iterator: Any, optimizers: dict[str, Any]) -> None:
        self.iterator, self.optimizers, self.iteration = iterator, optimizers, 0

    def get_optimizer(self, name: str) -> Any:
        return self.optimizers[name]

    def get_all_optimizers(self) -> dict[str, Any]:
        return self.optimizers

    def update(self) -> None:
        x, t = chainer.dataset.concat_examples(self.iterator.next())
        for optimizer in self.optimizers.values():
            optimizer.update(optimizer.target, x, t)
        self.iteration += 1

    @property
    def epoch(self) -> int:
        return int(self.iterator.epoch)

    @property
    def epoch_detail(self) -> float:
        return float(self.iterator.epoch_detail)

    def finalize(self) -> None:
        self.iterator.finalize()


def iterator() -> Any:
    return chainer.iterators.SerialIterator(models.dataset(), 32)


def classifier() -> Any:
    return L.Classifier(models.MLP())


def adam(model: Any) -> Any:
    return chainer.optimizers.Adam().setup(model)


def standard() -> Any:
    return training.updaters.StandardUpdater(iterator(), adam(classifier()))


def parallel() -> Any:
    return training.updaters.ParallelUpdater(iterator(), adam(classifier()), devices=DEVICES)


def gan(critic: int = 1) -> Any:
    updater = GANUpdater(iterator(), {"gen": adam(Generator()), "dis": adam(Discriminator())})
    updater.critic = critic
    return updater


def counting_first() -> Any:
    return CountingFirst(iterator(), adam(classifier()))


def own() -> Any:
    return OwnUpdater(iterator(), {"main": adam(classifier())})


def sites(step: Any) -> list[str]:
    return [str(call.site) for call in step.calls]


def watched(updater: Any, out: Any, steps: int = 4, **arguments: Any) -> Any:
    trainer = training.Trainer(updater, (steps, "iteration"), out=str(out))
    watch = bnwatch.chainer.BatchNormWatch(None, **{"every": 1, "on_diagnosis": "log", **arguments})
    trainer.extend(watch)
    trainer.run()
    assert not chainer.get_function_hooks()
    assert not [d for d in watch.diagnoses if d.rule == "BN903"]
    return watch


# ParallelUpdater


class Shards:
    """A converter that remembers what each replica was given."""

    def __init__(self) -> None:
        self.seen: list[Any] = []

    def __call__(self, batch: Any, device: Any) -> Any:
        self.seen.append(np.stack([x for x, _ in batch]).astype(np.float64))
        return chainer.dataset.concat_examples(batch, device)


class Normalizing(chainer.Chain):
    """Normalizes its input, so that NumPy knows the statistics without the weights."""

    def __init__(self) -> None:
        super().__init__()
        with self.init_scope():
            self.bn = L.BatchNormalization(models.FEATURES)
            self.fc = L.Linear(models.FEATURES, models.CLASSES)

    def forward(self, x: Any) -> Any:
        return self.fc(self.bn(x))


def test_each_replica_has_the_statistics_of_its_shard(tmp_path: Any, monkeypatch: Any) -> None:
    record, shards, replicas = Record(monkeypatch), Shards(), len(DEVICES)
    updater = training.updaters.ParallelUpdater(
        iterator(), adam(L.Classifier(Normalizing())), converter=shards, devices=DEVICES
    )
    watched(updater, tmp_path, steps=5)
    running = np.zeros(models.FEATURES), np.ones(models.FEATURES)
    for number, step in enumerate(record.steps):
        assert sites(step) == ["predictor/bn#0", "predictor/bn#0@1", "predictor/bn#0@2"]
        after = []
        for shard, call in zip(shards.seen[replicas * number :], step.calls, strict=False):
            m = len(shard)
            mean, var = shard.mean(axis=0), shard.var(axis=0)
            assert call.batch.count == m
            assert call.running.updates == number + 1
            np.testing.assert_allclose(call.batch.mean, mean, rtol=1e-5, atol=1e-6)
            np.testing.assert_allclose(call.batch.var, var, rtol=1e-5)
            after.append((0.9 * running[0] + 0.1 * mean, 0.9 * running[1] + 0.1 * m / (m - 1) * var))
            np.testing.assert_allclose(call.running.mean, after[-1][0], rtol=1e-5, atol=1e-6)
            np.testing.assert_allclose(call.running.var, after[-1][1], rtol=1e-5)
        running = after[0]  # copyparams gives every replica the running statistics of the main model
    for model in updater._models.values():
        np.testing.assert_allclose(model.predictor.bn.avg_mean, running[0], rtol=1e-5, atol=1e-6)


def test_replicas_of_a_deeper_model(tmp_path: Any, monkeypatch: Any) -> None:
    record = Record(monkeypatch)
    model = L.Classifier(models.MLP(shared=True))
    updater = training.updaters.ParallelUpdater(iterator(), adam(model), devices=DEVICES)
    trainer = training.Trainer(updater, (2, "epoch"), out=str(tmp_path))
    held_out = chainer.iterators.SerialIterator(models.dataset(200, seed=1), 64, repeat=False, shuffle=False)
    trainer.extend(extensions.Evaluator(held_out, model))
    watch = bnwatch.chainer.BatchNormWatch(None, every=1, on_diagnosis="log")
    trainer.extend(watch)
    trainer.run()
    expected = [f"predictor/bn1#{n}" + (f"@{k}" if k else "") for k in range(3) for n in (0, 1)]
    assert [sites(step) for step in record.steps] == [expected] * 16
    assert [step.calls[-1].running.updates for step in record.steps] == list(range(2, 34, 2))
    # the accuracy that the Trainer observes is the main model's, over its shard of 11 of 32
    assert [e.train_examples for e in record.evaluations] == [88, 88]
    assert [e.examples for e in record.evaluations] == [200, 200]
    assert watch.watch.signals.cells is not None
    training_cell = watch.watch.signals.cells.training["running"]
    assert training_cell.examples == 11 * 16  # only the main model's shards are kept
    assert {s.rule for s in watch.skipped}.isdisjoint({"BN101"})


def test_models_given_to_a_parallel_updater(tmp_path: Any, monkeypatch: Any) -> None:
    record = Record(monkeypatch)
    main = classifier()
    other = main.copy("copy")
    updater = training.updaters.ParallelUpdater(
        iterator(),
        adam(main),
        models={"other": other, "main": main},
        devices={"other": chainer.get_device("@numpy"), "main": chainer.get_device("@numpy")},
    )
    watched(updater, tmp_path)
    assert sites(record.steps[0]) == [
        "predictor/bn1#0@1",
        "predictor/bn2#0@1",
        "predictor/bn1#0",
        "predictor/bn2#0",
    ]
    assert [spec.path for spec in record.attachments[0].layers] == ["predictor/bn1", "predictor/bn2"]


def test_replicas_with_sizes_of_the_first_batch(tmp_path: Any, monkeypatch: Any) -> None:
    record = Record(monkeypatch)
    model = L.Classifier(Normalizing())
    del model.predictor.bn, model.predictor.fc
    with model.predictor.init_scope():
        model.predictor.bn = L.BatchNormalization(axis=0)
        model.predictor.fc = L.Linear(None, models.CLASSES)
    watched(training.updaters.ParallelUpdater(iterator(), adam(model), devices=DEVICES), tmp_path)
    assert {tuple(sites(step)) for step in record.steps} == {("predictor/bn#0", "predictor/bn#0@1", "predictor/bn#0@2")}
    assert [step.calls[2].running.updates for step in record.steps] == [1, 2, 3, 4]


def test_nothing_is_copied_of_replicas_on_a_step_that_is_not_sampled() -> None:
    from bnwatch.chainer.layers import Layers
    from bnwatch.chainer.tap import Tap

    class Nothing:
        def __getattr__(self, _: str) -> Any:
            return lambda *_, **__: None

    main = models.MLP()
    replica = main.copy("copy")
    tap = Tap(Layers({"": main}, {"": [replica]}), Nothing(), Nothing(), pytest.fail)
    tap.enter()
    for sampled in (False, True):
        tap.sampled = sampled
        replica(models.data()[0])
        calls = [call for call, _ in tap.take()]
        assert [(call.replica, call.running is None) for call in calls] == [(1, not sampled)] * 2
    tap.leave()


def test_what_is_trained_is_told_for_every_updater() -> None:
    updater = parallel()
    main = updater.get_optimizer("main").target
    found = _targets(type("Trainer", (), {"updater": updater}))
    assert found == {"": main}
    assert _replicas(updater, found) == {"": [updater._models["second"], updater._models["third"]]}
    assert _replicas(standard(), found) == {}


def test_the_master_of_a_multiprocess_parallel_updater(tmp_path: Any, monkeypatch: Any) -> None:
    """The real class, of one process: only CuPy and its NCCL, which it asks for, are stood in for."""
    module = multiprocess_parallel_updater
    if not module.MultiprocessParallelUpdater.available():
        with pytest.raises(Exception, match="NCCL is not enabled"):
            module.MultiprocessParallelUpdater([iterator()], adam(classifier()), devices=["@numpy"])
    monkeypatch.setattr(module, "_available", True)
    monkeypatch.setattr(module, "cuda", MagicMock())
    module.cuda.cupy.cuda.driver.CUDADriverError = KeyError
    module.cuda.cupy.cuda.driver.ctxGetCurrent.side_effect = KeyError
    with pytest.warns(UserWarning, match="optimizer.eps is changed"):
        updater = module.MultiprocessParallelUpdater([iterator()], adam(classifier()), devices=["@numpy"])
    assert _targets(type("Trainer", (), {"updater": updater})) == {"": updater.get_optimizer("main").target}
    record = Record(monkeypatch)
    watched(updater, tmp_path)
    assert [sites(step) for step in record.steps] == [["predictor/bn1#0", "predictor/bn2#0"]] * 4
    assert [step.calls[0].running.updates for step in record.steps] == [1, 2, 3, 4]


# Several models


@pytest.mark.parametrize("critic", [1, 3])
def test_real_and_fake_are_call_sites_of_the_discriminator(critic: int, tmp_path: Any, monkeypatch: Any) -> None:
    record = Record(monkeypatch)
    watch = watched(gan(critic), tmp_path, steps=12)
    assert {spec.path for spec in record.attachments[0].layers} == {"gen/bn1", "dis/bn1"}
    for step in record.steps:
        once = [("gen/bn1", 1), ("dis/bn1", 2)]
        expected = [f"{layer}#{n * count + k}" for n in range(critic) for layer, count in once for k in range(count)]
        assert sites(step) == expected
    updates = {call.spec.path: call.running.updates for call in record.steps[-1].calls}
    assert updates == {"gen/bn1": 12 * critic, "dis/bn1": 24 * critic}
    assert watch.watch.signals.structure.accumulated == 1
    assert watch.report().steps == 12


class Alternating(GANUpdater):
    """Updates the generator in every third iteration only."""

    def update_core(self) -> None:
        if self.iteration % 3 == 0:
            super().update_core()
            return
        dis = self.get_optimizer("dis")
        x = self.converter(self.get_iterator("main").next(), self.device)[0]
        dis.update(lambda x: F.sum(F.softplus(-dis.target(x))), x)


def test_an_alternating_schedule(tmp_path: Any, monkeypatch: Any) -> None:
    record = Record(monkeypatch)
    watched(Alternating(iterator(), {"gen": adam(Generator()), "dis": adam(Discriminator())}), tmp_path, steps=9)
    both = ["gen/bn1#0", "dis/bn1#0", "dis/bn1#1"]
    assert [sites(step) for step in record.steps] == [both, ["dis/bn1#0"], ["dis/bn1#0"]] * 3
    assert [step.calls[0].running.updates for step in record.steps[::3]] == [1, 2, 3]


def test_one_link_of_two_models_is_known_once(tmp_path: Any, monkeypatch: Any) -> None:
    record = Record(monkeypatch)
    one = classifier()
    optimizers = {"first": adam(one), "second": adam(chainer.Sequential(one.predictor))}

    class Once(OwnUpdater):
        def update(self) -> None:
            x, t = chainer.dataset.concat_examples(self.iterator.next())
            optimizers["first"].update(one, x, t)
            self.iteration += 1

    watched(Once(iterator(), optimizers), tmp_path)
    assert [spec.path for spec in record.attachments[0].layers] == ["first/predictor/bn1", "first/predictor/bn2"]


# Updaters of the user's own


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (own, ["predictor/bn1#0", "predictor/bn2#0"]),
        (counting_first, ["predictor/bn1#0", "predictor/bn2#0", "predictor/bn1#1", "predictor/bn2#1"]),
    ],
)
def test_an_update_of_the_users_own(make: Any, expected: list[str], tmp_path: Any, monkeypatch: Any) -> None:
    record = Record(monkeypatch)
    updater = make()
    model = updater.get_optimizer("main").target
    trainer = training.Trainer(updater, (2, "epoch"), out=str(tmp_path))
    held_out = chainer.iterators.SerialIterator(models.dataset(200, seed=1), 64, repeat=False, shuffle=False)
    evaluator = extensions.Evaluator(held_out, model)
    evaluator.trigger = (8, "iteration")
    trainer.extend(evaluator)
    trainer.extend(bnwatch.chainer.BatchNormWatch(None, every=1, on_diagnosis="log"))
    trainer.run()
    assert [(step.step, sites(step)) for step in record.steps] == [(n, expected) for n in range(1, 17)]
    assert [e.batch_statistics for e in record.evaluations] == [(), ()]


def test_a_pass_that_nothing_differentiates_is_an_update_and_no_call_site(tmp_path: Any, monkeypatch: Any) -> None:
    class Looking(training.updaters.StandardUpdater):
        def update_core(self) -> None:
            with chainer.no_backprop_mode():
                self.get_optimizer("main").target.predictor(models.data(16)[0])
            super().update_core()

    record = Record(monkeypatch)
    watched(Looking(iterator(), adam(classifier())), tmp_path)
    assert {tuple(sites(step)) for step in record.steps} == {("predictor/bn1#0", "predictor/bn2#0")}
    assert [step.calls[0].running.updates for step in record.steps] == [2, 4, 6, 8]


def test_layers_of_which_no_pass_is_differentiated_keep_their_call_sites(tmp_path: Any, monkeypatch: Any) -> None:
    """A teacher that nothing trains, and normalizes with the statistics of each batch."""

    class Distilling(chainer.Chain):
        def __init__(self) -> None:
            super().__init__()
            with self.init_scope():
                self.teacher, self.student = models.MLP(), models.MLP()

        def forward(self, x: Any, t: Any) -> Any:
            with chainer.no_backprop_mode():
                wanted = self.teacher(x).array
            scores = self.student(x)
            return F.softmax_cross_entropy(scores, t) + F.mean_squared_error(scores, wanted)

    record = Record(monkeypatch)
    watched(training.updaters.StandardUpdater(iterator(), adam(Distilling())), tmp_path)
    known = [f"{who}/bn{n}#0" for who in ("teacher", "student") for n in (1, 2)]
    assert {tuple(sites(step)) for step in record.steps} == {tuple(known)}


def test_a_statistic_that_is_stuck_on_every_replica_is_told_once(tmp_path: Any) -> None:
    model = classifier()
    model.predictor.bn1.decay = 1.0
    watch = watched(training.updaters.ParallelUpdater(iterator(), adam(model), devices=DEVICES), tmp_path, steps=6)
    assert [(d.rule, d.subject) for d in watch.diagnoses if d.rule == "BN203"] == [("BN203", "predictor/bn1")]


def test_an_updater_without_a_model_is_told_and_training_goes_on(tmp_path: Any) -> None:
    trainer = training.Trainer(OwnUpdater(iterator(), {}), (3, "iteration"), out=str(tmp_path))
    watch = bnwatch.chainer.BatchNormWatch(None, on_diagnosis="log")
    trainer.extend(watch)
    trainer.run()
    assert trainer.updater.iteration == 3
    assert [d.rule for d in watch.diagnoses] == ["BN902"]


def test_targets_that_are_no_links_are_told_and_training_goes_on(tmp_path: Any) -> None:
    class Odd:
        """What a Trainer takes for a model, and nothing more."""

        target = type("Target", (), {"namedlinks": lambda *_, **__: iter(())})()

    class Odds(OwnUpdater):
        def update(self) -> None:
            self.iteration += 1

    trainer = training.Trainer(Odds(iterator(), {"main": Odd()}), (3, "iteration"), out=str(tmp_path))
    watch = bnwatch.chainer.BatchNormWatch(None, on_diagnosis="log")
    trainer.extend(watch)
    trainer.run()
    assert trainer.updater.iteration == 3
    (diagnosis,) = watch.diagnoses
    assert diagnosis.rule == "BN903"
    assert "the updater's optimizer 'main' trains a Target, no chainer.Link" in diagnosis.message


# Byte for byte


def outcome(make: Any, out: Any, *, watching: bool) -> dict[str, Any]:
    """Train with snapshots and a log, and return all that is left of it."""
    np.random.seed(3)  # noqa: NPY002
    random.seed(3)
    updater = make()
    trainer = training.Trainer(updater, (20, "iteration"), out=str(out))
    trainer.extend(extensions.LogReport(trigger=(5, "iteration")))
    trainer.extend(extensions.snapshot(filename="snapshot"), trigger=(10, "iteration"))
    if watching:
        watch = bnwatch.chainer.BatchNormWatch(out / "runs", every=2, on_diagnosis="log")
        trainer.extend(watch)
    trainer.run()
    if watching:
        assert watch.report().samples > 5
        assert not [d for d in watch.diagnoses if d.rule == "BN903"]
    assert not chainer.get_function_hooks()
    log = json.loads((out / "log").read_text())
    with np.load(out / "snapshot", allow_pickle=True) as npz:
        saved = {name: npz[name] for name in npz.files}
    kept = json.loads(str(saved.pop("extensions/LogReport/_log")))
    for entry in (*log, *kept):
        del entry["elapsed_time"]
    del saved["_snapshot_elapsed_time"]
    optimizers = list(updater.get_all_optimizers().values())
    replicas = list(getattr(updater, "_models", {}).values())
    return {
        "state": state_of(*(o.target for o in optimizers), *optimizers, *replicas),
        "python": random.getstate(),
        "log": log,
        "logged": kept,
        "saved": {name: (value.dtype.str, value.shape, to_bytes(value)) for name, value in saved.items()},
    }


def to_bytes(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array, allow_pickle=True)
    return file.getvalue()


@pytest.mark.parametrize("make", [standard, parallel, gan, counting_first], ids=lambda make: make.__name__)
def test_byte_for_byte(make: Any, tmp_path: Any) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    expected = outcome(make, tmp_path / "a", watching=False)
    found = outcome(make, tmp_path / "b", watching=True)
    assert Counter(name.split("/")[0] for name in expected["saved"])["updater"] > 10
    for key, value in expected.items():
        assert found[key] == value, key
