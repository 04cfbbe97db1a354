"""Where links of real programs were built, and from which lines they are called: of files whose lines are marked.

``# built NAME`` stands at the line that builds the link of that path, ``# calls NAME`` at that of its next call.
"""

from __future__ import annotations

import importlib
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

import bnwatch.chainer
from bnwatch.lines import Callers

from .chainer_models import L, chainer, state_of, training

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from bnwatch.records import LayerSpec

PROGRAM = """
import chainer
import chainer.functions as F
import chainer.links as L


class Own(L.BatchNormalization):
    def forward(self, x, **kwargs):
        return super().forward(x, **kwargs)


class Block(chainer.Chain):
    def __init__(self):
        super().__init__()
        with self.init_scope():
            self.l = L.Linear(None, 6)
            self.bn = L.BatchNormalization(6)  # built block/bn

    def forward(self, x):
        return F.relu(self.bn(self.l(x)))


class Net(chainer.Chain):
    def __init__(self, wide=True):
        super().__init__()
        with self.init_scope():
            self.block = Block()
            self.shared = L.BatchNormalization(  # built shared
                6,
            )
            self.own = Own(6)  # built own
            self.stack = chainer.Sequential(
                L.Linear(6, 6),
                L.BatchNormalization(6),  # built stack/1
                F.relu,
                L.BatchNormalization(6),  # built stack/2
            )
            self.many = chainer.ChainList(*[L.BatchNormalization(6) for _ in "ab"])  # built many/0 # built many/1
            if wide:
                self.either = L.BatchNormalization(6)
            else:
                self.either = L.BatchNormalization(6, decay=0.5)
            self.scores = L.Linear(None, 2)
        self.add_link("added", L.BatchNormalization(6))  # built added

    def forward(self, x):
        a = self.block(x)  # calls block/bn
        b = self.block(2 * x + 1)  # calls block/bn
        x = self.shared(a)  # calls shared
        x = x + self.shared(  # calls shared
            b)
        x = self.own.forward(self.own(x))  # calls own # calls own
        x = self.stack(x)
        for one in self.many:
            x = one(x)  # calls many/0 # calls many/1
        x = F.forget(self.either, x)  # calls either
        return self.scores(self.added(x))  # calls added


def train(critic, x, optimizer, watching):
    for step in range(4):
        critic.cleargrads()
        real = critic(x)  # calls critic
        fake = critic(x + 1)  # calls critic
        F.sum(real * fake).backward()
        optimizer.update()
        watching.step()
        if step == 2:
            x = x[:-1]


class Switching(chainer.Chain):
    def __init__(self):
        super().__init__()
        with self.init_scope():
            self.bn = L.BatchNormalization(5)  # built bn

    def forward(self, x):
        self.odd = not getattr(self, "odd", False)
        if self.odd:
            return self.bn(x)
        return self.bn(2 * x)


def alternate(model, x, optimizer, watching):
    for step in range(4):
        model.cleargrads()
        F.sum(model(x) ** 2).backward()
        optimizer.update()
        watching.step()
"""


@pytest.fixture
def program(tmp_path: Path, monkeypatch: Any) -> Iterator[Any]:
    """Return the program, imported from a file; lines are named from its directory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "program.py").write_text(PROGRAM)
    yield importlib.import_module("program")
    del sys.modules["program"]


def marked(kind: str) -> dict[str, list[str]]:
    """Return the marked lines by the path of a link."""
    found: dict[str, list[str]] = {}
    for number, line in enumerate(Path("program.py").read_text().splitlines(), 1):
        for name in re.findall(rf"# {kind} (\S+)", line):
            found.setdefault(name, []).append(f"program.py:{number}")
    return found


def trained(net: Any, steps: int = 6, **options: Any) -> Any:
    """Return a watch that saw a Trainer, and the classifier."""
    x = np.random.default_rng(0).normal(size=(96, 5)).astype(np.float32)
    classifier = L.Classifier(net)
    optimizer = chainer.optimizers.SGD().setup(classifier)
    dataset = chainer.datasets.TupleDataset(x, (x[:, 0] > 0).astype(np.int32))
    iterator = chainer.iterators.SerialIterator(dataset, 16, shuffle=False)
    updater = training.updaters.StandardUpdater(iterator, optimizer)
    trainer = training.Trainer(updater, (steps, "iteration"), "out")
    watch = None
    if options.pop("watched", True):
        watch = bnwatch.chainer.BatchNormWatch(None, on_diagnosis="log", **{"experiments": False, **options})
        trainer.extend(watch)
    trainer.run()
    assert watch is None or not watch.watch.signals.faults
    return watch, classifier


def specs_of(watch: Any) -> dict[str, LayerSpec]:
    return {path.removeprefix("predictor/"): spec for path, spec in watch.watch.signals.specs.items()}


def test_a_model_of_the_users_own_classes(program: Any) -> None:
    specs = specs_of(trained(program.Net())[0])
    built, calls = marked("built"), marked("calls")
    del built["bn"], calls["critic"]
    assert {name: [spec.built_at] for name, spec in specs.items() if spec.built_at} == built
    assert {name: list(spec.called_at) for name, spec in specs.items() if spec.called_at} == calls
    assert specs["either"].built_at is None
    assert len(specs) == 9


def test_a_model_without_a_class_of_the_user_has_no_line(program: Any) -> None:
    specs = specs_of(trained(chainer.Sequential(L.Linear(None, 6), L.BatchNormalization(6), L.Linear(None, 2)))[0])
    assert [(spec.built_at, spec.called_at) for spec in specs.values()] == [(None, ())]


def loop(run: Callable[..., None], model: Any) -> LayerSpec:
    optimizer = chainer.optimizers.SGD(1e-3).setup(model)
    x = np.random.default_rng(0).normal(size=(8, 5)).astype(np.float32)
    with bnwatch.chainer.watch(model, None, on_diagnosis="log", experiments=False) as watching:
        run(model, x, optimizer, watching)
    (spec,) = watching.watch.signals.specs.values()
    return spec


def test_calls_of_a_loop_are_told_apart(program: Any) -> None:
    spec = loop(program.train, chainer.Sequential(L.Linear(5, 6), L.BatchNormalization(6)))
    assert (spec.built_at, list(spec.called_at)) == (None, marked("calls")["critic"])


def test_a_call_site_that_moves_from_step_to_step_has_no_line(program: Any) -> None:
    spec = loop(program.alternate, program.Switching())
    assert ([spec.built_at], spec.called_at) == (marked("built").pop("bn"), ())


def test_lines_are_looked_for_in_the_first_sampled_steps_alone(program: Any, monkeypatch: Any) -> None:
    found, own = [], Callers.trail
    monkeypatch.setattr(Callers, "trail", lambda *arguments: found.append(1) or own(*arguments))
    watch, _ = trained(program.Net(), 40, every=1)
    sites = len(watch.watch.signals.table.sites)
    assert len(watch.watch.signals.tables) == 40
    assert (sites, len(found)) == (12, 8 * sites)
    found.clear()
    watch, _ = trained(program.Net(), 40, every=20)
    assert len(found) == 8 * sites


def test_a_watched_model_is_trained_to_the_same_bits(program: Any) -> None:
    states = []
    for watched in (False, True):
        np.random.seed(3)  # noqa: NPY002
        states.append(state_of(trained(program.Net(), watched=watched)[1]))
    assert states[0] == states[1]
