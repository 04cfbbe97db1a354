"""What changes outside of the training steps: statistics, parameters, and those that never change."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import numpy as np
import pytest
from chainer import serializers
from chainer.training import extensions

import bnwatch.chainer
from bnwatch.chainer.changes import ENTRIES, After, sample_of
from bnwatch.watch import Watch

from . import chainer_models as models
from .chainer_models import F, L, chainer, training

BOTH = ("bn1", "bn2")
IN_CLASSIFIER = ("predictor/bn1", "predictor/bn2")


@pytest.fixture
def record(monkeypatch: pytest.MonkeyPatch) -> models.Record:
    return models.Record(monkeypatch)


def watched(trainer: Any, **arguments: Any) -> Any:
    """Run a Trainer to its end; return its watch, which left no hook."""
    watch = bnwatch.chainer.BatchNormWatch(None, on_diagnosis="log", **arguments)
    trainer.extend(watch)
    trainer.run()
    assert not [d for d in watch.diagnoses if d.rule == "BN903"]
    assert not trainer.updater.get_optimizer("main")._hookable._post_update_hooks
    return watch


def model_of(trainer: Any) -> Any:
    return trainer.updater.get_optimizer("main").target.predictor


class Average:
    """Keeps an average of the parameters, and puts it into the model for the evaluation alone."""

    def __init__(self, model: Any) -> None:
        self.model, self.average = model, [p.array.copy() for p in model.params()]

    def update(self) -> None:
        for number, parameter in enumerate(self.model.params()):
            self.average[number] = 0.5 * (self.average[number] + parameter.array)

    def swap(self, _: Any = None) -> None:
        for number, parameter in enumerate(self.model.params()):
            self.average[number], parameter.array = parameter.array.copy(), self.average[number]


def test_a_healthy_trainer_moves_swaps_and_keeps_nothing(tmp_path: Any, record: models.Record) -> None:
    watched(models.trainer_of(models.MLP(), tmp_path))
    assert [e.step for e in record.evaluations] == [8, 16, 24]
    assert [(e.moved, e.swapped, e.still) for e in record.evaluations] == [((), False, ())] * 3


@pytest.mark.parametrize("after_the_watch", [False, True])
def test_an_average_that_is_swapped_in_by_extensions(
    tmp_path: Any, record: models.Record, after_the_watch: bool
) -> None:
    trainer = models.trainer_of(models.MLP(), tmp_path)
    average = Average(model_of(trainer))
    once = {"trigger": (1, "epoch")}
    trainer.extend(lambda _: average.update(), name="keep", trigger=(1, "iteration"), priority=500)
    trainer.extend(lambda _: average.swap(), name="in", priority=400, **once)
    trainer.extend(lambda _: average.swap(), name="out", priority=100 if after_the_watch else 250, **once)
    watched(trainer, every=100)
    assert [e.swapped for e in record.evaluations] == [True] * 3
    assert [e.moved for e in record.evaluations] == [()] * 3


@pytest.mark.parametrize("statistics", [False, True])
def test_what_was_evaluated_is_measured_and_taken_out_again(
    tmp_path: Any, record: models.Record, monkeypatch: pytest.MonkeyPatch, statistics: bool
) -> None:
    """The experiment sees what the evaluator saw, and the training goes on with its own."""
    trainer = models.trainer_of(models.MLP(), tmp_path)
    model, seen, evaluated, outside = model_of(trainer), [], [], []
    own = [model.bn1.avg_mean, model.bn1.avg_var] if statistics else []
    held: list[Any] = []

    def now() -> list[bytes]:
        return [array.tobytes() for array in (*(p.array for p in model.params()), *own)]

    def put_in(_: Any) -> None:
        arrays = [p.array for p in model.params()] + own
        held[:] = [array.copy() for array in arrays]
        for array in arrays:
            array[...] = 0.5 * array
        evaluated.append(now())

    def take_out(_: Any) -> None:
        for array, values in zip([p.array for p in model.params()] + own, held, strict=True):
            array[...] = values
        outside.append(now())

    monkeypatch.setattr(Watch, "experiment", lambda *_, **__: seen.append(now()))
    trainer.extend(put_in, priority=400, trigger=(1, "epoch"), name="in")
    trainer.extend(take_out, priority=250, trigger=(1, "epoch"), name="out")
    trainer.extend(lambda _: outside.append(now()), priority=50, trigger=(1, "epoch"), name="behind the watch")
    watched(trainer, every=100)
    assert seen == [*evaluated, evaluated[-1]]
    assert outside[0::2] == outside[1::2]
    assert [e.moved for e in record.evaluations] == [("predictor/bn1",) if statistics else ()] * 3


def test_weights_loaded_before_an_evaluation(tmp_path: Any, record: models.Record) -> None:
    trainer = models.trainer_of(models.MLP(), tmp_path)
    serializers.save_npz(str(tmp_path / "best.npz"), model_of(trainer))

    @training.make_extension(trigger=(2, "epoch"), priority=400)
    def load(trainer: Any) -> None:
        serializers.load_npz(str(tmp_path / "best.npz"), model_of(trainer))

    trainer.extend(load, name="load")
    watched(trainer)
    assert [e.swapped for e in record.evaluations] == [False, True, False]
    assert [e.moved for e in record.evaluations] == [(), IN_CLASSIFIER, ()]


def test_an_extension_that_predicts_in_training_mode_moves_statistics(tmp_path: Any, record: models.Record) -> None:
    trainer = models.trainer_of(models.MLP(), tmp_path)
    x, _ = models.data(50, seed=5)

    @training.make_extension(trigger=(2, "epoch"), priority=400)
    def predict(trainer: Any) -> None:
        with chainer.no_backprop_mode():
            model_of(trainer)(10 * x)

    trainer.extend(predict, name="predict")
    watched(trainer)
    assert [e.moved for e in record.evaluations] == [(), IN_CLASSIFIER, ()]
    assert [e.swapped for e in record.evaluations] == [False] * 3
    assert [e.batch_statistics for e in record.evaluations] == [()] * 3  # the evaluator had running ones


class Clipping(training.updaters.StandardUpdater):
    """Clips the weights after the update, as a critic's are."""

    def update_core(self) -> None:
        super().update_core()
        for parameter in self.get_optimizer("main").target.params():
            np.clip(parameter.array, -0.1, 0.1, out=parameter.array)


@pytest.mark.parametrize("updater", [Clipping, training.updaters.StandardUpdater])
def test_an_updater_that_clips_is_not_taken_for_a_swap(tmp_path: Any, record: models.Record, updater: Any) -> None:
    plain = models.trainer_of(models.MLP(), tmp_path)
    classifier = plain.updater.get_optimizer("main").target
    optimizer = plain.updater.get_optimizer("main")
    trainer = training.Trainer(updater(plain.updater.get_iterator("main"), optimizer), (3, "epoch"), str(tmp_path))
    held = chainer.iterators.SerialIterator(models.dataset(200, seed=1), 64, repeat=False, shuffle=False)
    trainer.extend(extensions.Evaluator(held, classifier))
    watched(trainer)
    expected = None if updater is Clipping else False
    assert [e.swapped for e in record.evaluations] == [expected] * 3


def test_an_evaluator_by_iterations_and_a_trigger_of_ones_own(tmp_path: Any, record: models.Record) -> None:
    for trigger in ((5, "iteration"), lambda trainer: trainer.updater.iteration % 5 == 0):
        trainer = models.trainer_of(models.MLP(), tmp_path, evaluate=False)
        held = chainer.iterators.SerialIterator(models.dataset(200, seed=1), 64, repeat=False, shuffle=False)
        classifier = trainer.updater.get_optimizer("main").target
        trainer.extend(extensions.Evaluator(held, classifier), trigger=trigger)
        watched(trainer)
    known = [e.swapped for e in record.evaluations]
    assert known[:4] == [False] * 4  # its trigger tells when it comes
    assert known[4:] == [None, False, False, False]  # the first comes as a surprise


def frozen(model: Any) -> Any:
    model.bn1.disable_update()
    return model


def test_a_layer_whose_update_is_off_stays_still(tmp_path: Any, record: models.Record) -> None:
    trainer = models.trainer_of(models.MLP(), tmp_path)
    frozen(model_of(trainer))
    watched(trainer)
    assert [e.still for e in record.evaluations] == [("predictor/bn1",)] * 3
    assert {s.path: s.trainable for s in record.attachments[0].layers} == {
        "predictor/bn1": False,
        "predictor/bn2": True,
    }


def test_a_layer_that_infers_or_has_nothing_to_train_is_not_still(tmp_path: Any, record: models.Record) -> None:
    class Bare(models.MLP):
        def forward(self, x: Any) -> Any:
            with chainer.using_config("train", False):
                h = F.relu(self.bn1(self.l1(x)))
            return self.l3(F.relu(self.bn2(self.l2(h))))

    model = Bare(bn=lambda size: L.BatchNormalization(size, use_gamma=False, use_beta=False))
    trainer = models.trainer_of(frozen(model), tmp_path)
    watched(trainer)
    assert [e.still for e in record.evaluations] == [()] * 3


def test_where_no_parameter_moves_none_is_still(tmp_path: Any, record: models.Record) -> None:
    trainer = models.trainer_of(models.MLP(), tmp_path)
    trainer.updater.get_optimizer("main").target.disable_update()
    watched(trainer)
    assert [e.still for e in record.evaluations] == [()] * 3


def test_lazy_parameters_are_known_from_the_first_step_on(tmp_path: Any, record: models.Record) -> None:
    class Lazy(models.MLP):
        def __init__(self) -> None:
            super().__init__(bn=lambda _: L.BatchNormalization(axis=0))

    watched(models.trainer_of(Lazy(), tmp_path))
    assert [(e.moved, e.swapped, e.still) for e in record.evaluations] == [((), False, ())] * 3


def loop(model: Any, *, epochs: int = 3, before: Any = None, after: Any = None, backprop: bool = False) -> Any:
    """Train by hand; call ``before`` and ``after`` around each evaluation with the number of the epoch."""
    (x, t), (xv, tv) = models.data(), models.data(200, seed=1)
    optimizer = chainer.optimizers.Adam().setup(model)
    with bnwatch.chainer.watch(model, None, on_diagnosis="log") as watch:
        for epoch in range(epochs):
            for start in range(0, 256, 64):
                loss = F.softmax_cross_entropy(model(x[start : start + 64]), t[start : start + 64])
                model.cleargrads()
                loss.backward()
                optimizer.update()
                watch.step(loss=loss)
            if before is not None:
                before(epoch)
            with chainer.using_config("train", False), chainer.using_config("enable_backprop", backprop):
                accuracy = F.accuracy(model(xv), tv)
            if after is not None:
                after(epoch)
            watch.evaluation(accuracy=accuracy, examples=200)
    assert not [d for d in watch.diagnoses if d.rule == "BN903"]
    return watch


@pytest.mark.parametrize("backprop", [False, True])
def test_a_healthy_loop(record: models.Record, backprop: bool) -> None:
    loop(models.MLP(), backprop=backprop)
    assert [e.swapped for e in record.evaluations] == [None, False, False]  # the first comes as a surprise
    assert [(e.moved, e.still) for e in record.evaluations] == [((), ())] * 3


@pytest.mark.parametrize("backprop", [False, True])
def test_a_loop_that_evaluates_an_average(record: models.Record, backprop: bool) -> None:
    model = models.MLP()
    average = Average(model)

    def swap_in(_: int) -> None:
        average.update()
        average.swap()

    loop(model, before=swap_in, after=average.swap, epochs=4, backprop=backprop)
    assert [e.swapped for e in record.evaluations] == [None, True, True, True]


def test_a_loop_that_evaluates_in_training_mode_too(record: models.Record) -> None:
    model, (x, _) = models.MLP(), models.data(50, seed=5)

    def predict(epoch: int) -> None:
        if epoch != 1:
            with chainer.no_backprop_mode():
                model(x)

    loop(model, before=predict)
    assert [e.moved for e in record.evaluations] == [BOTH, (), BOTH]
    assert [e.batch_statistics for e in record.evaluations] == [()] * 3
    assert [e.swapped for e in record.evaluations] == [None, False, False]


def test_two_evaluations_after_one_step(record: models.Record) -> None:
    model = models.MLP()
    (x, t), average = models.data(64), Average(model)
    optimizer = chainer.optimizers.Adam().setup(model)
    with bnwatch.chainer.watch(model, None, on_diagnosis="log") as watch:
        for _ in range(3):
            loss = F.softmax_cross_entropy(model(x), t)
            model.cleargrads()
            loss.backward()
            optimizer.update()
            watch.step(loss=loss)
        watch.evaluation(accuracy=0.5, examples=64)
        average.swap()
        watch.evaluation(accuracy=0.25, examples=64)
    assert [e.swapped for e in record.evaluations] == [None, True]


@pytest.mark.parametrize("swap", [False, True])
def test_weights_that_are_swapped_when_a_trainer_ends(tmp_path: Any, swap: bool) -> None:
    trainer = models.trainer_of(models.MLP(), tmp_path, evaluate=False)
    average = Average(model_of(trainer))

    @training.make_extension(trigger=(3, "epoch"), priority=50)
    def last(_: Any) -> None:
        if swap:
            average.swap()

    trainer.extend(last, name="last")
    watch = watched(trainer)
    assert watch.watch.signals.cells is not None
    assert watch.watch.signals.cells.swapped is swap


def test_entries_of_parameters_are_bounded_and_evenly_spread() -> None:
    for size in (1, 255, 256, 257, 1000, 100_000):
        entries = sample_of(np.arange(size).reshape(-1, 1), ENTRIES)
        assert 1 <= len(entries) <= ENTRIES
        assert len(set(np.diff(entries))) <= 1
        assert entries[-1] + size // ENTRIES + 1 >= size - 1


# The hook


def hooks_of(optimizer: Any) -> dict[str, Any]:
    return optimizer._hookable._post_update_hooks


def test_an_optimizer_that_knows_no_hooks_is_left_alone() -> None:
    for optimizer in (object(), None, chainer.optimizers.Adam()):
        After(print).listen(optimizer)
        After(print).leave(optimizer)


def test_the_hook_takes_no_name_that_is_taken() -> None:
    optimizer = chainer.optimizers.Adam().setup(models.MLP())
    optimizer.add_hook(print, name="bnwatch-0", timing="post")
    optimizer.add_hook(print, name="bnwatch-1", timing="pre")
    first, second = After(print), After(print)
    for hook in (first, second, first):
        hook.listen(optimizer)
    assert list(hooks_of(optimizer).items()) == [("bnwatch-0", print), ("bnwatch-2", first), ("bnwatch-3", second)]
    first.leave(optimizer)
    first.leave(optimizer)
    assert list(hooks_of(optimizer)) == ["bnwatch-0", "bnwatch-3"]


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda one: pickle.loads(pickle.dumps(one))])  # noqa: S301
def test_what_is_copied_in_training_trains_on_unwatched_and_needs_no_bnwatch(copied: Any, tmp_path: Any) -> None:
    found = []
    for watching in (False, True):
        np.random.seed(3)  # noqa: NPY002
        trainer = models.trainer_of(models.MLP(dropout=0.0), tmp_path)
        copies: list[Any] = []
        taken = copies.append
        trainer.extend(
            lambda t, taken=taken: taken(copied(t.updater.get_optimizer("main"))),
            name="copy",
            trigger=(1, "epoch"),
            priority=1 if watching else 500,
        )
        if watching:
            trainer.extend(bnwatch.chainer.BatchNormWatch(None, every=2, on_diagnosis="log"))
        trainer.run()
        first = copies[0]
        assert "bnwatch" not in pickle.dumps(first.target).decode("latin1")
        assert b"bnwatch.chainer" not in pickle.dumps(first)
        assert len(hooks_of(first)) == watching
        (x, t), t_before = models.data(64), first.t
        for _ in range(3):
            first.update(first.target, x, t)
        assert first.t == t_before + 3
        found.append(models.state_of(*(one.target for one in copies), *copies))
    assert found[0] == found[1]


def test_a_copied_optimizer_is_watched_like_any_other() -> None:
    model = models.MLP()
    optimizer = chainer.optimizers.Adam().setup(model)
    with bnwatch.chainer.watch(model, None, optimizer=optimizer, on_diagnosis="log"):
        kept = pickle.loads(pickle.dumps(optimizer))  # noqa: S301
    assert not hooks_of(optimizer)
    x, t = models.data(64)
    with bnwatch.chainer.watch(kept.target, None, optimizer=kept, every=1, on_diagnosis="log") as watch:
        for _ in range(4):
            kept.update(lambda: F.softmax_cross_entropy(kept.target(x), t))
    assert watch.report().steps == 4
    assert len(hooks_of(kept)) == 1  # the one that was copied, and does nothing


def test_an_optimizer_that_is_set_up_anew_while_it_trains(tmp_path: Any, record: models.Record) -> None:
    trainer = models.trainer_of(models.MLP(), tmp_path)
    optimizer = trainer.updater.get_optimizer("main")
    trainer.extend(lambda _: optimizer.setup(optimizer.target), name="anew", trigger=(8, "iteration"), priority=50)
    watched(trainer)
    assert [e.swapped for e in record.evaluations] == [False] * 3


def test_hooks_of_the_users_own_run_as_without_a_watch(tmp_path: Any) -> None:
    found = []
    for watching in (False, True):
        np.random.seed(3)  # noqa: NPY002
        trainer = models.trainer_of(models.MLP(), tmp_path)
        optimizer, told = trainer.updater.get_optimizer("main"), []

        def clip(optimizer: Any, told: Any = told) -> None:
            told.append([p.grad is not None for p in optimizer.target.params()])
            for parameter in optimizer.target.params():
                np.clip(parameter.array, -0.5, 0.5, out=parameter.array)
            optimizer.target.cleargrads()

        optimizer.add_hook(clip, name="clip", timing="post")
        trainer.extend(
            lambda _, o=optimizer, clip=clip: o.add_hook(clip, name="later", timing="post"),
            name="add", trigger=(20, "iteration"), priority=50,
        )  # fmt: skip
        if watching:
            trainer.extend(bnwatch.chainer.BatchNormWatch(None, every=2, on_diagnosis="log"))
        trainer.run()
        assert list(hooks_of(optimizer)) == ["clip", "later"]
        grads = [None if p.grad is None else p.grad.tobytes() for p in optimizer.target.params()]
        found.append((told, grads, models.state_of(optimizer.target, optimizer)))
    assert found[0] == found[1]


@pytest.mark.parametrize("error", [KeyboardInterrupt, ZeroDivisionError])
def test_an_update_that_fails_leaves_no_hook(error: type[BaseException], tmp_path: Any) -> None:
    trainer = models.trainer_of(models.MLP(), tmp_path)
    optimizer = trainer.updater.get_optimizer("main")

    def fail(optimizer: Any) -> None:
        if optimizer.t == 5:
            raise error

    optimizer.add_hook(fail, name="fail", timing="post")
    trainer.extend(bnwatch.chainer.BatchNormWatch(None, on_diagnosis="log"))
    with pytest.raises(error):
        trainer.run(show_loop_exception_msg=False)
    assert list(hooks_of(optimizer)) == ["fail"]
    assert not chainer.get_function_hooks()


@pytest.mark.parametrize("loaded_inside", [False, True])
def test_statistics_that_were_not_restored(record: models.Record, loaded_inside: bool) -> None:
    model, random = models.MLP(), np.random.default_rng(0)

    def restore() -> None:
        for link in (model.bn1, model.bn2):
            link.gamma.array[:] = random.normal(1, 0.1, 16)
        model.bn2.avg_mean[:] = random.normal(0, 1, 16)

    if not loaded_inside:
        restore()
    with bnwatch.chainer.watch(model, None, on_diagnosis="log") as watch:
        if loaded_inside:
            restore()
        watch.evaluation(accuracy=0.1, examples=200)
    assert record.attachments[0].unrestored == ("bn1",)


def test_what_is_told_at_attach_is_of_before_the_first_step(record: models.Record) -> None:
    model = models.MLP()
    model.bn2.beta.array[3] = 1.0
    loop(model, epochs=1)
    assert record.attachments[0].unrestored == ("bn2",)


def test_statistics_that_a_file_did_not_bring_to_a_lazy_link(record: models.Record) -> None:
    model = models.MLP(bn=lambda _: L.BatchNormalization(axis=0))
    model.bn1.gamma.initialize((16,))
    model.bn1.gamma.array[:] = np.linspace(0.5, 1.5, 16)
    with bnwatch.chainer.watch(model, None, on_diagnosis="log") as watch:
        watch.evaluation(accuracy=0.1, examples=200)
    assert record.attachments[0].unrestored == ("bn1",)


def test_new_models_and_random_scales_are_not_unrestored(record: models.Record) -> None:
    def random_scale(size: int) -> Any:
        return L.BatchNormalization(size, initial_gamma=chainer.initializers.Normal(1.0))

    for model in (models.MLP(), models.MLP(bn=random_scale), models.MLP(bn=lambda _: L.BatchNormalization(axis=0))):
        loop(model, epochs=1)
    assert [a.unrestored for a in record.attachments] == [()] * 3
