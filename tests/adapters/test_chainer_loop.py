"""Hand-written loops as people write them: right layers, right call sites, right number of updates."""

from __future__ import annotations

import copy
import multiprocessing
import os
import pickle
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

import bnwatch.chainer

from . import chainer_models as models
from .chainer_models import F, L, Record, chainer, state_of, training
from .test_chainer_updaters import Discriminator, Generator, adam, classifier, sites

if TYPE_CHECKING:
    from collections.abc import Callable

X, T = models.data(64)


def watching(model: Any, **arguments: Any) -> Any:
    return bnwatch.chainer.watch(model, None, **{"every": 1, "on_diagnosis": "log", **arguments})


def update(model: Any, optimizer: Any, loss: Any = None) -> None:
    loss = F.softmax_cross_entropy(model(X), T) if loss is None else loss
    model.cleargrads()
    loss.backward()
    optimizer.update()


def steps_of(model: Any, monkeypatch: Any, step: Callable[[int], None], count: int = 4, **arguments: Any) -> Any:
    """Run ``step`` in a watch, and return what was recorded."""
    record = Record(monkeypatch)
    with watching(model, **arguments) as watch:
        for number in range(count):
            step(number)
            watch.step()
    assert not [d for d in watch.diagnoses if d.rule == "BN903"]
    assert not chainer.get_function_hooks()
    return record


def updates(record: Any, path: str = "bn1") -> list[int | None]:
    return [next(c.running.updates for c in step.calls if c.spec.path == path) for step in record.steps]


PLAIN = ["bn1#0", "bn2#0"]

# Several models


def adversarial(watch: Any, *, by_optimizer: bool = False) -> dict[str, bytes]:
    np.random.seed(4)  # noqa: NPY002
    gen, dis = Generator(), Discriminator()
    optimizers = adam(gen), adam(dis)

    def loop(watch: Any) -> None:
        for _ in range(6):
            fake = gen(np.random.normal(size=(16, 4)).astype(np.float32))  # noqa: NPY002
            y_fake, y_real = dis(fake), dis(X[:16])
            for model, loss in ((dis, F.mean(F.softplus(-y_real) + F.softplus(y_fake))), (gen, -F.mean(y_fake))):
                model.cleargrads()
                loss.backward()
            for optimizer in reversed(optimizers):
                optimizer.update()
            if watch is not None:
                watch.step(loss=1.0)

    if watch is None:
        loop(None)
    else:
        with watch({"gen": gen, "dis": dis}, optimizer=optimizers[0] if by_optimizer else None) as opened:
            loop(opened)
        assert opened.report().steps == 6
        assert not [d for d in opened.diagnoses if d.rule == "BN903"]
    assert not any(optimizer._hookable._post_update_hooks for optimizer in optimizers)
    return state_of(gen, dis, *optimizers)


@pytest.mark.parametrize("by_optimizer", [False, True])
def test_several_models_by_name(by_optimizer: bool, monkeypatch: Any) -> None:
    expected = adversarial(None)
    record = Record(monkeypatch)
    assert adversarial(watching, by_optimizer=by_optimizer) == expected
    assert [spec.path for spec in record.attachments[0].layers] == ["gen/bn1", "dis/bn1"]
    assert [sites(step) for step in record.steps] == [["gen/bn1#0", "dis/bn1#0", "dis/bn1#1"]] * 6
    assert updates(record, "dis/bn1") == [2, 4, 6, 8, 10, 12]


def test_one_link_in_two_models_is_known_once(monkeypatch: Any) -> None:
    model = classifier()
    optimizer = adam(model)
    both = {"a": model, "b": model.predictor}
    record = steps_of(both, monkeypatch, lambda _: optimizer.update(model, X, T))
    assert [spec.path for spec in record.attachments[0].layers] == ["a/predictor/bn1", "a/predictor/bn2"]
    assert updates(record, "a/predictor/bn1") == [1, 2, 3, 4]


# Which passes are training


def test_several_passes_of_one_step_are_call_sites(monkeypatch: Any) -> None:
    model = models.MLP()
    optimizer = adam(model)

    def accumulate(_: int) -> None:
        model.cleargrads()
        for part in range(3):
            rows = slice(16 * part, 16 * part + 16)
            F.softmax_cross_entropy(model(X[rows]), T[rows]).backward()
        optimizer.update()

    record = steps_of(model, monkeypatch, accumulate)
    assert {tuple(sites(step)) for step in record.steps} == {
        ("bn1#0", "bn2#0", "bn1#1", "bn2#1", "bn1#2", "bn2#2"),
    }
    assert updates(record) == [3, 6, 9, 12]


@pytest.mark.parametrize("backprop", [False, True])
@pytest.mark.parametrize("bn", [L.BatchNormalization, L.BatchRenormalization])
def test_a_pass_that_nothing_differentiates_is_an_update_and_no_call_site(
    bn: Any, backprop: bool, monkeypatch: Any
) -> None:
    model = models.MLP(bn=bn)
    optimizer = adam(model)

    def step(_: int) -> None:
        with chainer.using_config("enable_backprop", backprop):
            model(X)
        update(model, optimizer)

    record = steps_of(model, monkeypatch, step)
    assert {tuple(sites(step)) for step in record.steps} == {tuple(PLAIN)}
    assert updates(record) == [2, 4, 6, 8]


def test_a_step_that_differentiates_nothing_is_recorded_by_its_passes(monkeypatch: Any) -> None:
    model = models.MLP()
    record = steps_of(model, monkeypatch, lambda _: model(X))
    assert {tuple(sites(step)) for step in record.steps} == {tuple(PLAIN)}
    assert updates(record) == [1, 2, 3, 4]


def switched(how: str) -> Callable[[bool], Any]:
    """Return a function that sets ``train`` as people do."""
    return {
        "config": lambda on: setattr(chainer.config, "train", on),
        "global": lambda on: setattr(chainer.global_config, "train", on),
    }[how]


@pytest.fixture
def _train_is_put_back() -> Any:
    before = chainer.global_config.train
    yield
    chainer.global_config.train = before
    if "train" in vars(chainer.config._local):
        del chainer.config.train


@pytest.mark.usefixtures("_train_is_put_back")
@pytest.mark.parametrize("how", ["config", "global"])
@pytest.mark.parametrize("backprop", [False, True])
@pytest.mark.parametrize("forgotten", [False, True])
def test_train_switched_by_assignment(how: str, backprop: bool, forgotten: bool, monkeypatch: Any) -> None:
    record = Record(monkeypatch)
    model = models.MLP()
    optimizer, switch = adam(model), switched(how)
    with watching(model) as watch:
        for _ in range(3):
            switch(True)
            for _ in range(4):
                update(model, optimizer)
                watch.step()
            if not forgotten:
                switch(False)
            with chainer.using_config("enable_backprop", backprop):
                accuracy = F.accuracy(model(X), T)
            watch.evaluation(accuracy=accuracy, examples=64)
    assert [e.batch_statistics for e in record.evaluations] == [("bn1", "bn2") if forgotten else ()] * 3
    assert any(d.rule == "BN103" for d in watch.diagnoses) is forgotten
    assert {tuple(sites(step)) for step in record.steps} == {tuple(PLAIN)}


def test_running_statistics_renewed_before_an_evaluation_are_no_evaluation_in_training_mode() -> None:
    """A look-alike of BN103: passes in training mode over training data, ended as a step of their own."""
    model = models.MLP()
    optimizer = adam(model)
    with watching(model) as watch:
        for _ in range(3):
            update(model, optimizer)
            watch.step()
            with chainer.no_backprop_mode():
                model(X)
            watch.step()
            with chainer.using_config("train", False), chainer.no_backprop_mode():
                watch.evaluation(accuracy=F.accuracy(model(X), T), examples=64)
    assert "BN103" not in {d.rule for d in watch.diagnoses}


# Links that are copied


@pytest.mark.parametrize("mode", ["copy", "init"])
def test_a_copied_link_is_a_layer_of_its_own(mode: str, monkeypatch: Any) -> None:
    model = models.MLP()
    del model.bn2
    with model.init_scope():
        model.bn2 = model.bn1.copy(mode)
    optimizer = adam(model)
    record = steps_of(model, monkeypatch, lambda _: update(model, optimizer))
    assert {tuple(sites(step)) for step in record.steps} == {tuple(PLAIN)}
    assert updates(record, "bn2") == [1, 2, 3, 4]


def test_a_link_that_shares_its_arrays_is_a_call_site_of_the_first(monkeypatch: Any) -> None:
    model = models.MLP()
    del model.bn2
    with model.init_scope():
        model.bn2 = model.bn1.copy("share")
    optimizer = adam(model)
    record = Record(monkeypatch)
    with watching(model) as watch:
        for _ in range(4):
            update(model, optimizer)
            watch.step()
        lab = watch._session.lab
        with pytest.raises(
            bnwatch.evidence.ExperimentNotPossibleError, match="`bn2` has the running statistics of `bn1`"
        ):
            lab.examples("training", 64)
    assert {tuple(sites(step)) for step in record.steps} == {("bn1#0", "bn1#1")}
    assert [spec.path for spec in record.attachments[0].layers] == ["bn1"]
    assert updates(record) == [2, 4, 6, 8]
    with pytest.raises(bnwatch.evidence.ExperimentNotPossibleError, match="make it one link"):
        bnwatch.chainer.recalibrate(model, [X])


@pytest.mark.parametrize(
    ("mode", "expected"), [("init", ["0/1#0", "1/1#0"]), ("copy", ["0/1#0", "1/1#0"]), ("share", ["0/1#0", "0/1#1"])]
)
def test_a_repeated_block(mode: str, expected: list[str], monkeypatch: Any) -> None:
    block = chainer.Sequential(L.Linear(models.FEATURES, models.FEATURES), L.BatchNormalization(models.FEATURES))
    model = block.repeat(2, mode)
    optimizer = adam(model)
    record = steps_of(model, monkeypatch, lambda _: update(model, optimizer))
    assert {tuple(sites(step)) for step in record.steps} == {tuple(expected)}


def test_a_teacher_copied_of_the_model_is_another_model(monkeypatch: Any) -> None:
    model = models.MLP()
    teacher, optimizer = model.copy("copy"), adam(model)

    def step(_: int) -> None:
        with chainer.no_backprop_mode():
            teacher(X)
        update(model, optimizer)

    record = steps_of(model, monkeypatch, step)
    assert updates(record) == [1, 2, 3, 4]


def test_examples_of_a_shared_copy_have_to_be_given() -> None:
    model = models.MLP()
    optimizer = adam(model)
    with watching(model) as watch:
        update(model, optimizer)
        watch.step()
        with chainer.using_config("train", False), chainer.no_backprop_mode():
            watch.evaluation(accuracy=F.accuracy(model.copy()(X), T), examples=64)
        with pytest.raises(bnwatch.evidence.ExperimentNotPossibleError, match=r"pass probe=\(inputs, labels\)"):
            watch._session.lab.examples("evaluation", 64)
    assert "BN103" not in {d.rule for d in watch.diagnoses}


class Deepening(chainer.ChainList):
    def __init__(self) -> None:
        super().__init__(*self.block())

    @staticmethod
    def block() -> list[Any]:
        return [L.Linear(models.FEATURES, models.FEATURES), L.BatchNormalization(models.FEATURES)]

    def forward(self, x: Any) -> Any:
        for link in self:
            x = link(x)
        return x


def test_the_updates_of_a_link_that_is_added_after_an_evaluation_are_known(monkeypatch: Any) -> None:
    """Also where the next sampled step is far: links are looked for at the first call of the next training step."""
    record, model = Record(monkeypatch), Deepening()
    optimizer = adam(model)
    with watching(model, every=100) as watch:
        for step in range(40):
            if step == 17:
                with chainer.using_config("train", False), chainer.no_backprop_mode():
                    watch.evaluation(accuracy=F.accuracy(model(X), T), examples=64)
                for link in model.block():
                    model.add_link(link)
                optimizer.setup(model)
            update(model, optimizer)
            watch.step()
    last = record.steps[-1]
    assert {str(call.site): last.step - call.running.updates for call in last.calls} == {"1#0": 0, "3#0": 17}
    assert [spec.path for spec in record.attachments[-1].layers] == ["1", "3"]


# Arrays that are replaced or overwritten


def reload(model: Any, path: Any) -> None:
    chainer.serializers.save_npz(f"{path}.npz", model)
    chainer.serializers.load_npz(f"{path}.npz", model)


def fresh_arrays(model: Any, _: Any) -> None:
    for link in (model.bn1, model.bn2):
        link.avg_mean, link.avg_var = link.avg_mean.copy(), link.avg_var.copy()


CHANGES = {
    "to_cpu": lambda model, _: model.to_cpu(),
    "to_device": lambda model, _: model.to_device("@numpy"),
    "copyparams": lambda model, _: model.copyparams(copy.deepcopy(model)),
    "load_npz": reload,
    "new arrays": fresh_arrays,
    "copy": lambda model, _: (model.copy("copy"), pickle.dumps(model)),
}


@pytest.mark.filterwarnings("ignore:to_cpu is deprecated:DeprecationWarning")
@pytest.mark.parametrize("change", CHANGES)
def test_a_model_that_changes_while_it_is_trained(change: str, monkeypatch: Any, tmp_path: Any) -> None:
    model = models.MLP()
    optimizer = adam(model)

    def step(number: int) -> None:
        if number == 2:
            CHANGES[change](model, tmp_path / "model")
        update(model, optimizer)

    record = steps_of(model, monkeypatch, step)
    assert {tuple(sites(step)) for step in record.steps} == {tuple(PLAIN)}
    assert updates(record) == [1, 2, 3, 4]
    np.testing.assert_array_equal(record.steps[-1].calls[0].running.mean, model.bn1.avg_mean)


def test_sizes_of_the_first_batch(monkeypatch: Any) -> None:
    model = models.MLP()
    del model.bn1, model.l2
    with model.init_scope():
        model.bn1, model.l2 = L.BatchNormalization(axis=0), L.Linear(None, 16)
    optimizer = adam(model)
    record = steps_of(model, monkeypatch, lambda _: update(model, optimizer))
    assert {tuple(sites(step)) for step in record.steps} == {tuple(PLAIN)}
    assert updates(record) == [1, 2, 3, 4]
    assert record.attachments[0].layers[0].channels == 16


class Growing(models.MLP):
    def forward(self, x: Any) -> Any:
        h = super().forward(x)
        return self.head(h) if hasattr(self, "head") else h


def test_a_model_that_gains_a_link(monkeypatch: Any) -> None:
    model = Growing()
    optimizer = adam(model)

    def step(number: int) -> None:
        update(model, optimizer)
        if number == 1:
            with model.init_scope():
                model.head = L.BatchNormalization(models.CLASSES)
            optimizer.setup(model)

    record = steps_of(model, monkeypatch, step, count=5)
    assert [sites(step) for step in record.steps] == [PLAIN] * 2 + [[*PLAIN, "head#0"]] * 3
    assert [[spec.path for spec in a.layers] for a in record.attachments] == [["bn1", "bn2"], ["bn1", "bn2", "head"]]


def test_a_link_that_takes_the_place_of_another(monkeypatch: Any) -> None:
    model = models.MLP()
    optimizer = adam(model)

    def step(number: int) -> None:
        if number == 2:
            del model.bn1
            with model.init_scope():
                model.bn1 = L.BatchNormalization(16)
            optimizer.setup(model)
        update(model, optimizer)

    record = steps_of(model, monkeypatch, step, count=6)
    assert sites(record.steps[-1]) == PLAIN
    assert len(record.attachments) == 1
    np.testing.assert_array_equal(record.steps[-1].calls[0].running.mean, model.bn1.avg_mean)


# The optimizer


def test_an_optimizer_that_is_set_up_again_still_ends_the_steps(monkeypatch: Any) -> None:
    record = Record(monkeypatch)
    model = classifier()
    optimizer = adam(model)
    with watching(model, optimizer=optimizer) as watch:
        for number in range(4):
            if number == 2:
                optimizer.setup(model)
            optimizer.update(model, X, T)
    assert [step.step for step in record.steps] == [1, 2, 3, 4]
    assert not optimizer._hookable._post_update_hooks
    assert not [d for d in watch.diagnoses if d.rule == "BN903"]


def test_an_optimizer_set_up_again_at_the_end_is_no_failure() -> None:
    model = classifier()
    optimizer = adam(model)
    with watching(model, optimizer=optimizer) as watch:
        optimizer.update(model, X, T)
        optimizer.setup(model)
    assert not [d for d in watch.diagnoses if d.rule == "BN903"]


def test_an_optimizer_can_be_copied_while_it_is_watched() -> None:
    model = classifier()
    optimizer = adam(model)
    with watching(model, optimizer=optimizer) as watch:
        optimizer.update(model, X, T)
        again = copy.deepcopy(optimizer)
        for other in (again, pickle.loads(pickle.dumps(optimizer))):  # noqa: S301
            other.update(other.target, X, T)
    assert watch.report().steps == 1


# Forked workers


def count_in_child(model: Any, tap: Any, answers: Any) -> None:
    """A worker as MultiprocessParallelUpdater forks them: trains its copy of the model."""
    optimizer = adam(model)
    for _ in range(3):
        optimizer.update(model, X, T)
    answers.put((len(tap.take()), bool(tap._see), os.getpid()))


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="no fork here")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_worker_forked_in_training_is_silent(monkeypatch: Any, tmp_path: Any) -> None:
    record = Record(monkeypatch)
    model = classifier()
    context = multiprocessing.get_context("fork")
    answers = context.SimpleQueue()
    updater = training.updaters.StandardUpdater(chainer.iterators.SerialIterator(models.dataset(), 32), adam(model))
    trainer = training.Trainer(updater, (6, "iteration"), out=str(tmp_path))
    watch = bnwatch.chainer.BatchNormWatch(tmp_path / "runs", every=1, on_diagnosis="log")
    trainer.extend(watch)
    said: list[Any] = []

    def fork(trainer: Any) -> None:
        if trainer.updater.iteration == 3:
            worker = context.Process(target=count_in_child, args=(model, watch._session.tap, answers))
            worker.start()
            said.append(answers.get())
            worker.join()

    trainer.extend(fork, name="fork", trigger=(1, "iteration"))
    trainer.run()
    ((calls, sees, process),) = said
    assert (calls, sees) == (0, False)
    assert process != os.getpid()
    assert [step.step for step in record.steps] == [1, 2, 3, 4, 5, 6]
    assert updates(record, "predictor/bn1") == [1, 2, 3, 4, 5, 6]
    assert len(list((tmp_path / "runs").rglob("events.out.tfevents.*"))) == 1


def batches(*, watched: bool, out: Any) -> tuple[dict[str, bytes], int]:
    np.random.seed(5)  # noqa: NPY002
    model = L.Classifier(models.MLP(dropout=0.0))
    # a generator of its own: the iterator's thread would draw from NumPy's whenever it gets to run
    order = chainer.iterators.ShuffleOrderSampler(np.random.RandomState(6))
    iterator = chainer.iterators.MultiprocessIterator(
        models.dataset(), 32, n_processes=2, shared_mem=4096, order_sampler=order
    )
    trainer = training.Trainer(
        training.updaters.StandardUpdater(iterator, adam(model)), (12, "iteration"), out=str(out)
    )
    watch = bnwatch.chainer.BatchNormWatch(None, every=1, on_diagnosis="log")
    if watched:
        trainer.extend(watch)
    trainer.run()
    assert not [d for d in watch.diagnoses if d.rule == "BN903"]
    return state_of(model, trainer.updater.get_optimizer("main")), watch.report().samples


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="no fork here")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_beside_the_workers_of_a_multiprocess_iterator(tmp_path: Any) -> None:
    expected, _ = batches(watched=False, out=tmp_path / "a")
    found, samples = batches(watched=True, out=tmp_path / "b")
    assert samples == 12
    assert found == expected
