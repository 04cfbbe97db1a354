"""What one forward pass says of a define-by-run network, held against programs whose structure is known."""

from __future__ import annotations

import random
import weakref
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from chainer import training
from chainer.training import extensions, triggers

import bnwatch.chainer
from bnwatch.chainer.structure import CHANGING, UNCALLED
from bnwatch.diagnosis import Severity
from bnwatch.evidence import ExperimentNotPossibleError
from bnwatch.render import report_text
from bnwatch.sinks.tensorboard import read_runs

from . import chainer_models as models
from .chainer_models import F, L, chainer, state_of

if TYPE_CHECKING:
    from bnwatch.records import Place, Structure

IMAGES = np.random.default_rng(0).normal(size=(6, 3, 8, 8)).astype(np.float32)
VECTORS = np.random.default_rng(1).normal(size=(6, 5)).astype(np.float32)


class Net(chainer.Chain):
    """Any links by name, and a forward pass given as a function."""

    def __init__(self, forward: Any, **links: Any) -> None:
        super().__init__()
        self._forward = forward
        with self.init_scope():
            for name, link in links.items():
                setattr(self, name, link)

    def forward(self, x: Any) -> Any:
        return self._forward(self, x)


def step(model: Any, optimizer: Any, x: np.ndarray, t: Any = None) -> None:
    y = model(x)
    loss = F.sum(y * y) if t is None else F.softmax_cross_entropy(y, t)
    model.cleargrads()
    loss.backward()
    optimizer.update()


def seen(model: Any, x: np.ndarray, t: Any = None, steps: int = 1) -> tuple[Structure, Any]:
    """Return what a hand-written loop of some steps says, and the watch."""
    optimizer = chainer.optimizers.SGD(1e-3).setup(model)
    with bnwatch.chainer.watch(model, None, on_diagnosis="log") as watching:
        for _ in range(steps):
            step(model, optimizer, x, t)
            watching.step()
    assert not [d for d in watching.diagnoses if d.rule == "BN903"]
    return watching.watch.signals.structure, watching


def places(model: Any, x: np.ndarray, t: Any = None) -> dict[str, tuple[Place, ...]]:
    return {usage.path: usage.places for usage in seen(model, x, t)[0].layers}


def place(forward: Any, x: np.ndarray, t: Any = None, **links: Any) -> Place:
    (found,) = places(Net(forward, bn=links.pop("bn", L.BatchNormalization(4)), **links), x, t)["bn"]
    return found


def rules(report: Any) -> dict[str, Any]:
    return {d.rule: d for d in report.diagnoses if d.rule in {"BN101", "BN102", "BN108", "BN109", "BN110", "BN202"}}


def conv(**arguments: Any) -> Any:
    return L.Convolution2D(3, 4, 3, pad=1, **arguments)


# call sites


def test_places_are_the_call_sites_that_training_records() -> None:
    np.random.seed(0)  # noqa: NPY002
    model = models.MLP(shared=True)
    with bnwatch.chainer.watch(model, None, every=1, on_diagnosis="log") as watching:
        models.loop(model, watching)
    known = watching.watch.signals.structure
    graph = [place.site for use in known.layers for place in use.places]
    assert graph == list(watching.watch.signals.table.sites)
    assert [place.producer for place in known.layers[0].places] == ["l1", "l2"]
    assert (known.hidden, known.batch_size) == (None, 32)


def test_a_nested_chain_is_named_by_its_paths() -> None:
    class Block(chainer.Chain):
        def __init__(self) -> None:
            super().__init__()
            with self.init_scope():
                self.conv, self.bn = L.Convolution2D(None, 4, 3, pad=1), L.BatchNormalization(4)

        def forward(self, x: Any) -> Any:
            return F.relu(self.bn(self.conv(x)))

    tower = chainer.Sequential(Block(), Block())
    known = places(Net(lambda self, x: F.mean(self.tower(x), axis=(2, 3)), tower=tower), IMAGES)
    assert {path: [p.producer for p in of] for path, of in known.items()} == {
        "tower/0/bn": ["tower/0/conv"],
        "tower/1/bn": ["tower/1/conv"],
    }


def test_direct_calls_of_forward_and_a_call_of_old_are_followed() -> None:
    model = models.OldMLP(dropout=0.0)
    known = places(model, models.data(32)[0])
    assert [known[name][0].producer for name in ("bn1", "bn2")] == ["l1", "l2"]
    found = place(lambda self, x: self.bn.forward(self.l.forward(x)), VECTORS, l=L.Linear(5, 4))
    assert (found.producer, found.kind, found.bias) == ("l", "Linear", True)


def test_functions_without_a_link_are_named_behind_one() -> None:
    found = place(lambda self, x: self.bn(F.relu(self.l(x))), VECTORS, l=L.Linear(5, 4))
    assert (found.producer, found.kind, found.bias) == ("l -> ReLU", "ReLU", False)
    found = place(lambda self, x: self.bn(x), VECTORS, bn=L.BatchNormalization(5))
    assert (found.producer, found.kind, found.layout) == (None, None, None)


def test_residual_and_concat() -> None:
    def forward(self: Any, x: Any) -> Any:
        h = self.a(x)
        return self.last(F.concat([h, self.bn(self.b(h) + h)], axis=1))

    links = {"a": conv(), "b": L.Convolution2D(4, 4, 1), "last": L.BatchNormalization(8)}
    known = places(Net(forward, bn=L.BatchNormalization(4), **links), IMAGES)
    assert [(p.producer, p.layout, p.bias) for p in known["bn"]] == [("b -> Add", "channels_first", False)]
    assert [(p.producer, p.layout, p.bias) for p in known["last"]] == [("a -> Concat", "channels_first", False)]


def test_a_recurrent_net_has_a_site_for_each_step_of_time() -> None:
    def forward(self: Any, x: Any) -> Any:
        h = chainer.Variable(np.zeros((6, 4), np.float32))
        for _ in range(3):
            h = F.tanh(self.bn(self.x(x) + self.h(h)))
        return h

    known = places(Net(forward, bn=L.BatchNormalization(4), x=L.Linear(5, 4), h=L.Linear(4, 4)), VECTORS)
    assert [str(p.site) for p in known["bn"]] == ["bn#0", "bn#1", "bn#2"]
    assert {(p.producer, p.bias, p.elements) for p in known["bn"]} == {("x -> Add", False, 1)}


def test_a_pass_that_is_to_be_computed_again() -> None:
    def forward(self: Any, x: Any) -> Any:
        return F.relu(F.forget(lambda x: self.bn(self.l(x)), x))

    found = place(forward, VECTORS, l=L.Linear(5, 4))
    assert (found.producer, found.kind, found.bias) == ("l", "Linear", True)


def test_passes_that_differ_are_said_to_differ() -> None:
    lengths = iter([2, 2, 3, 3])

    def forward(self: Any, x: Any) -> Any:
        h = self.l(x)
        for _ in range(next(lengths)):
            h = self.bn(h)
        return h

    known, watching = seen(Net(forward, bn=L.BatchNormalization(4), l=L.Linear(5, 4)), VECTORS, steps=4)
    assert (known.hidden, len(known.layers[0].places)) == (CHANGING, 2)
    assert {s.rule: s.reason for s in watching.skipped}["BN109"] == CHANGING


def test_a_net_that_only_evaluates_its_batch_normalization_says_so() -> None:
    def forward(self: Any, x: Any) -> Any:
        with chainer.using_config("train", False):
            return self.bn(self.l(x))

    known, watching = seen(Net(forward, bn=L.BatchNormalization(4), l=L.Linear(5, 4)), VECTORS, steps=12)
    assert known.hidden == UNCALLED
    assert not rules(watching)


def test_an_evaluation_before_the_training_is_no_part_of_it() -> None:
    model = models.MLP(dropout=0.0)
    optimizer = chainer.optimizers.SGD(1e-3).setup(model)
    x, t = models.data(32)
    with bnwatch.chainer.watch(model, None, on_diagnosis="log") as watching:
        with chainer.using_config("train", False), chainer.no_backprop_mode():
            F.accuracy(model(x), t)
        watching.evaluation(accuracy=0.2, examples=32)
        F.accuracy(model(x), t)  # in training mode: forgotten, and not differentiated
        step(model, optimizer, x, t)
        watching.step()
    known = watching.watch.signals.structure
    assert [len(use.places) for use in known.layers] == [1, 1]
    assert [use.places[0].producer for use in known.layers] == ["l1", "l2"]


def test_no_array_is_kept_alive() -> None:
    alive: list[Any] = []

    def forward(self: Any, x: Any) -> Any:
        h = self.l(x)
        alive.append(weakref.ref(h.array))
        return self.bn(F.relu(h))

    model = Net(forward, bn=L.BatchNormalization(4), l=L.Linear(5, 4))
    with bnwatch.chainer.watch(model, None, experiments=False, on_diagnosis="log") as watching:
        y = model(VECTORS)
        del y
        assert alive[0]() is None
        assert watching._session.tap.trace is not None
        watching.step()
        assert watching._session.tap.trace is None
        assert not hasattr(watching._session.tap, "forward_preprocess") or (
            "forward_preprocess" not in vars(watching._session.tap)
        )


def test_nothing_else_runs_and_nothing_is_drawn() -> None:
    calls: list[str] = []

    class Count(chainer.FunctionHook):
        def forward_preprocess(self, node: Any, inputs: Any) -> None:
            calls.append(type(node).__name__)

    def run(*, watched: bool) -> list[str]:
        np.random.seed(5)  # noqa: NPY002
        model = models.MLP()
        optimizer = chainer.optimizers.Adam().setup(model)
        calls.clear()
        x, t = models.data(32)
        with Count():
            if watched:
                with bnwatch.chainer.watch(model, None, experiments=False, on_diagnosis="log") as watching:
                    step(model, optimizer, x, t)
                    watching.step()
                    assert watching.watch.signals.structure.hidden is None
            else:
                step(model, optimizer, x, t)
        return [*calls, str(state_of(model, optimizer))]

    assert run(watched=True) == run(watched=False)


# axis and layout


@pytest.mark.parametrize(
    ("axis", "normalized", "elements"),
    [(None, 1, 64), ((0, 2, 3), 1, 64), ((0, 1, 2), 3, 32), ((0, 1, 3), 2, 32), (0, None, 1)],
)
def test_the_axis_is_the_one_that_is_not_averaged_over(axis: Any, normalized: Any, elements: int) -> None:
    bn = L.BatchNormalization(4) if axis is None else L.BatchNormalization(axis=axis)
    found = place(lambda self, x: self.bn(self.c(x)), IMAGES, c=conv(), bn=bn)
    assert (found.rank, found.axis, found.elements, found.channel_axis) == (4, normalized, elements, 1)


@pytest.mark.parametrize(
    ("between", "channel"),
    [
        (lambda h: F.max_pooling_2d(F.relu(h), 2), 1),
        (lambda h: F.dropout(h * 2.0 + 1.0, 0.1), 1),
        (lambda h: F.transpose(h, (0, 2, 3, 1)), 3),
        (lambda h: F.reshape(h, (6, 4, 64)), 1),
        (lambda h: F.reshape(h, (6, 64, 4)), None),
        (lambda h: F.transpose(h, (0, 2, 1, 3)), None),
        (lambda h: h + np.ones((6, 4, 8, 8), np.float32), None),
        (lambda h: F.mean(h, axis=(2, 3)), 1),
        (lambda h: F.sum(h, axis=1), None),
    ],
    ids=["pooling", "elementwise", "transpose", "reshape", "other reshape", "odd", "raw array", "mean", "sum"],
)
def test_the_layout_passes_through_what_keeps_it(between: Any, channel: Any) -> None:
    found = place(lambda self, x: self.bn(between(self.c(x))), IMAGES, c=conv(), bn=L.BatchNormalization(axis=0))
    assert found.channel_axis == channel


def test_a_linear_link_over_time() -> None:
    x = np.zeros((6, 7, 5), np.float32)
    links = {"l": L.Linear(5, 4), "bn": L.BatchNormalization(axis=(0, 1))}
    found = place(lambda self, x: self.bn(self.l(x, n_batch_axes=2)), x, **links)
    assert (found.axis, found.channel_axis, found.elements, found.bias) == (2, 2, 7, True)
    links = {"l": L.Linear(5, 4), "bn": L.BatchNormalization(7)}
    found = place(lambda self, x: self.bn(self.l(x, n_batch_axes=2)), x, **links)
    assert (found.axis, found.channel_axis, found.bias) == (1, 2, False)


# bias, dropout, output


def add(h: Any, layer: Any) -> Any:
    return h + layer(h)


BIASES = {
    "linear": (lambda self, x: self.bn(self.l(x)), True),
    "relu between": (lambda self, x: self.bn(F.relu(self.l(x))), False),
    "seen by another": (lambda self, x: self.bn(self.l(x)) + F.sum(self.l(x)), False),
    "skipped": (lambda self, x: add(self.l(x), self.bn), False),
    "dropout between": (lambda self, x: self.bn(F.dropout(self.l(x))), False),
}


@pytest.mark.parametrize(("forward", "biased"), BIASES.values(), ids=BIASES)
def test_bias(forward: Any, biased: bool) -> None:
    assert place(forward, VECTORS, l=L.Linear(5, 4)).bias is biased


def test_no_bias_without_one_or_without_an_offset_or_with_a_frozen_layer() -> None:
    def forward(self: Any, x: Any) -> Any:
        return self.bn(self.l(x))

    assert not place(forward, VECTORS, l=L.Linear(5, 4, nobias=True)).bias
    assert not place(forward, VECTORS, l=L.Linear(5, 4), bn=L.BatchNormalization(4, use_beta=False)).bias
    assert place(forward, VECTORS, l=L.Linear(5, 4), bn=L.BatchNormalization(4, use_gamma=False)).bias
    model = Net(forward, bn=L.BatchNormalization(4), l=L.Linear(5, 4))
    optimizer = chainer.optimizers.SGD().setup(model)
    model.bn.disable_update()
    with bnwatch.chainer.watch(model, None, on_diagnosis="log") as watching:
        step(model, optimizer, VECTORS)
        watching.step()
    (usage,) = watching.watch.signals.structure.layers
    assert (usage.trainable, usage.places[0].bias) == (False, False)


DROPOUTS = {
    "direct": (lambda self, x: self.bn(F.dropout(self.c(x), 0.5)), 0.5, "c -> Dropout"),
    "conv and relu": (lambda self, x: self.bn(F.relu(self.d(F.dropout(self.c(x), 0.3)))), 0.3, "c -> Dropout"),
    "at the input": (lambda self, x: self.bn(self.c(F.dropout(x, 0.3))), 0.3, "Dropout"),
    "zero": (lambda self, x: self.bn(F.dropout(self.c(x), 0.0)), 0.0, None),
    "pooling": (lambda self, x: self.bn(F.average_pooling_2d(F.dropout(self.c(x)), 2)), 0.0, None),
    "layer norm": (lambda self, x: self.bn(F.group_normalization(F.dropout(self.c(x)), 2, *NORM)), 0.0, None),
    "behind": (lambda self, x: F.dropout(self.bn(self.c(x))), 0.0, None),
}
NORM = np.ones(4, np.float32), np.zeros(4, np.float32)


@pytest.mark.parametrize(("forward", "rate", "where"), DROPOUTS.values(), ids=DROPOUTS)
def test_dropout(forward: Any, rate: float, where: Any) -> None:
    found = place(forward, IMAGES, c=conv(), d=L.Convolution2D(4, 4, 1))
    assert (found.rate, found.dropout) == (rate, where)


OUTPUTS = {
    "scores": (lambda self, x: self.bn(self.l(x)), True),
    "dropped": (lambda self, x: F.dropout(self.bn(self.l(x)), 0.1), True),
    "probabilities": (lambda self, x: F.softmax(self.bn(self.l(x))), True),
    "relu": (lambda self, x: F.relu(self.bn(self.l(x))), False),
    "another layer": (lambda self, x: self.m(self.bn(self.l(x))), False),
    "both": (lambda self, x: add(self.bn(self.l(x)), self.m), False),
}


@pytest.mark.parametrize(("forward", "output"), OUTPUTS.values(), ids=OUTPUTS)
def test_output(forward: Any, output: bool) -> None:
    labels = np.array([0, 1, 2, 3, 0, 1], np.int32)
    links = {"l": L.Linear(5, 4), "m": L.Linear(4, 4)}
    assert place(forward, VECTORS, labels, **links).output is output
    report = bnwatch.chainer.check(Net(forward, bn=L.BatchNormalization(4), **links), VECTORS)
    assert ("BN109" in rules(report)) is output


# the plan


@pytest.mark.parametrize(
    ("stop", "plan"),
    [
        ((3, "epoch"), (8, 3)),
        ((21, "iteration"), (21, 1)),
        (triggers.EarlyStoppingTrigger(max_trigger=(2, "epoch")), (8, 2)),
        (lambda trainer: trainer.updater.iteration >= 3, (None, None)),
    ],
    ids=["epochs", "iterations", "early", "code"],
)
def test_what_a_trainer_plans(stop: Any, plan: Any, tmp_path: Any) -> None:
    trainer = models.trainer_of(models.MLP(), tmp_path, evaluate=False)
    trainer.stop_trigger = training.get_trigger(stop)
    watch = bnwatch.chainer.BatchNormWatch(str(tmp_path / "watch"), on_diagnosis="log")
    trainer.extend(watch)
    trainer.run()
    known = watch.watch.signals.structure
    assert (known.steps_per_epoch, known.epochs) == plan
    (run,) = read_runs(tmp_path / "watch")
    assert run.structure == known


def test_a_run_that_goes_on_keeps_what_was_seen_and_takes_the_new_plan(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = []
    for epochs in (1, 3):
        trainer = models.trainer_of(models.MLP(), tmp_path, epochs=epochs, evaluate=False)
        watch = bnwatch.chainer.BatchNormWatch(str(tmp_path / "watch"), on_diagnosis="log")
        trainer.extend(watch)
        trainer.extend(extensions.snapshot(filename="at"), trigger=(1, "epoch"))
        if known:
            chainer.serializers.load_npz(str(tmp_path / "at"), trainer)
            monkeypatch.setattr("bnwatch.chainer.session.structure", None)
        trainer.run()
        assert watch.watch.enabled
        known.append(watch.watch.signals.structure)
    assert known[1] == replace(known[0], epochs=3)
    assert read_runs(tmp_path / "watch")[0].structure == known[1]


# the rules


class Sick(chainer.Chain):
    """One of each."""

    def __init__(self) -> None:
        super().__init__()
        with self.init_scope():
            self.conv = L.Convolution2D(1, 4, 3, pad=1)
            self.rows = L.BatchNormalization(axis=(0, 1, 2))
            self.shared = L.BatchNormalization(6)
            self.l1, self.l2, self.l3 = L.Linear(None, 6), L.Linear(6, 6), L.Linear(6, models.CLASSES)
            self.scores = L.BatchNormalization(models.CLASSES, decay=0.1)

    def forward(self, x: Any) -> Any:
        h = F.relu(self.rows(self.conv(F.reshape(x, (-1, 1, 2, 4)))))
        h = F.dropout(F.relu(self.shared(self.l1(h))), 0.5)
        return self.scores(self.l3(F.relu(self.shared(self.l2(h)))))


class Healthy(chainer.Chain):
    """The look-alikes: everything in its place."""

    def __init__(self) -> None:
        super().__init__()
        with self.init_scope():
            self.conv = L.Convolution2D(1, 4, 3, pad=1, nobias=True)
            self.rows = L.BatchNormalization(axis=(0, 2, 3))
            self.l1, self.l2 = L.Linear(None, 6, nobias=True), L.Linear(6, 6, nobias=True)
            self.first, self.second = L.BatchNormalization(6), L.BatchNormalization(6)
            self.l3 = L.Linear(6, models.CLASSES)

    def forward(self, x: Any) -> Any:
        h = F.relu(self.rows(self.conv(F.reshape(x, (-1, 1, 2, 4)))))
        h = F.relu(self.second(self.l2(F.relu(self.first(self.l1(h))))))
        return self.l3(F.dropout(h, 0.5))


def by_trainer(model: Any, out: Any) -> Any:
    trainer = models.trainer_of(model, out, epochs=5)
    watch = bnwatch.chainer.BatchNormWatch(None, on_diagnosis="log")
    trainer.extend(watch)
    trainer.run()
    return watch


def by_loop(model: Any, _out: Any) -> Any:
    with bnwatch.chainer.watch(model, None, on_diagnosis="log") as watch:
        models.loop(model, watch)
    return watch


@pytest.mark.parametrize("train", [by_trainer, by_loop])
def test_each_rule_fires_on_a_sick_program(train: Any, tmp_path: Any) -> None:
    np.random.seed(0)  # noqa: NPY002
    report = train(Sick(), tmp_path).report()
    found = rules(report)
    assert set(found) >= {"BN102", "BN108", "BN109", "BN110", "BN202"}
    prefix = "predictor/" if train is by_trainer else ""
    assert (found["BN102"].subject, found["BN102"].severity) == (f"{prefix}rows", Severity.WARNING)
    assert found["BN102"].message == (
        f"`{prefix}rows` normalizes axis 3 of 4, and the channels of `{prefix}conv` (Convolution2D) are in axis 1"
    )
    assert found["BN102"].helps[0] == "for data laid out channels_first build the layer without axis="
    assert found["BN108"].subject == f"{prefix}shared"
    assert "`bnwatch.chainer.recalibrate(model, batches)`" in found["BN108"].helps[1]
    assert found["BN109"].subject == f"{prefix}scores"
    assert found["BN110"].helps == ("nobias=True in these layers",)
    assert f"`{prefix}l2`" in found["BN110"].message
    assert [d.subject for d in report.diagnoses if d.rule == "BN202" and "0.1" in d.message] == [f"{prefix}scores"]
    assert found["BN202"].helps[0].startswith("decay=0.")
    assert not [s for s in report.skipped if s.rule in {"BN101", "BN102", "BN108", "BN109", "BN110"}]
    assert "Keras: " not in report_text(report)


@pytest.mark.parametrize("train", [by_trainer, by_loop])
def test_no_rule_fires_on_its_look_alike(train: Any, tmp_path: Any) -> None:
    np.random.seed(0)  # noqa: NPY002
    report = train(Healthy(), tmp_path).report()
    assert not rules(report)
    expected = {"BN202"} if train is by_loop else set()  # nobody knows how long a loop is to be
    assert {s.rule for s in report.skipped if s.rule < "BN203"} == expected


# check


def test_check_finds_one_of_each_and_changes_nothing() -> None:
    x, t = models.data(16)
    model = L.Classifier(Sick())
    before = [dict(vars(link)) for link in model.links()], state_of(model), random.getstate()
    for inputs in ((x, t), (x,)):
        report = bnwatch.chainer.check(model, *inputs, batch_size=1, steps_per_epoch=10, epochs=2)
        assert {(d.rule, d.subject.rpartition("/")[2]) for d in report.diagnoses} == {
            ("BN101", "shared"), ("BN102", "rows"), ("BN108", "shared"), ("BN109", "scores"), ("BN110", "model"),
            ("BN202", "rows"), ("BN202", "scores"), ("BN205", "shared"), ("BN205", "scores"),
        }  # fmt: skip
        assert (report.layers, report.sites, [s.rule for s in report.skipped]) == (3, 4, ["BN214"])  # no masks
        assert "Keras: " not in report_text(report)
        (shared,) = [d for d in report.diagnoses if d.rule == "BN101"]
        assert shared.causes  # with one element a channel the call sites cannot be seen to differ
        assert "link.copy(mode='init')" in shared.helps[0]
    assert [dict(vars(link)) for link in model.links()] == before[0]
    assert state_of(model) == before[1]
    assert random.getstate() == before[2]
    assert model.predictor.l1.W.array is None
    assert model.predictor.rows.avg_mean is None


def test_check_is_silent_about_a_healthy_model() -> None:
    report = bnwatch.chainer.check(Healthy(), models.data(16)[0], batch_size=32, steps_per_epoch=100, epochs=10)
    assert (report.diagnoses, [s.rule for s in report.skipped]) == ((), ["BN214"])  # no masks


def test_a_copy_as_the_help_says_has_statistics_of_its_own() -> None:
    link = L.BatchNormalization(4)
    other = link.copy(mode="init")
    other(VECTORS[:, :4] + 5)
    assert other.avg_mean.any()
    assert not link.avg_mean.any()
    assert link.gamma is not other.gamma


def test_the_default_axis_on_the_input_is_no_question() -> None:
    def silent(bn: Any) -> bool:
        report = bnwatch.chainer.check(Net(lambda self, x: self.c(self.bn(x)), bn=bn, c=conv()), IMAGES)
        return not [s for s in report.skipped if s.rule == "BN102"]

    assert silent(L.BatchNormalization(3))
    assert not silent(L.BatchNormalization(axis=(0, 1, 2)))


def test_check_refuses_what_it_cannot_use() -> None:
    x = models.data(16)[0]
    with pytest.raises(TypeError, match="check needs a chainer.Link, got int"):
        bnwatch.chainer.check(3, x)
    with pytest.raises(ValueError, match="check needs what the model is called with, got no inputs"):
        bnwatch.chainer.check(models.MLP())
    with pytest.raises(ValueError, match="epochs must be at least 1, got 0"):
        bnwatch.chainer.check(models.MLP(), x, epochs=0)
    with pytest.raises(ExperimentNotPossibleError, match="calling the model failed: InvalidType"):
        bnwatch.chainer.check(models.MLP(), x[:, :3])
    assert not chainer.get_function_hooks()


def test_a_trace_that_fails_does_not_reach_the_training(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> None:
        raise KeyError

    for name in ("_note", "value"):
        monkeypatch.setattr(f"bnwatch.chainer.structure.Trace.{name}", broken)
        model = models.MLP()
        with bnwatch.chainer.watch(model, None, on_diagnosis="log") as watching:
            models.loop(model, watching, epochs=1)
        assert [d.rule for d in watching.diagnoses] == ["BN903"]
        assert not chainer.get_function_hooks()
