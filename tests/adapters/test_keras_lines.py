"""Where layers of real programs were built, and from which lines they are called: of files whose lines are marked.

``# built NAME`` stands at the line that builds the layer of that attribute, ``# calls NAME`` at that of its next call.
"""

from __future__ import annotations

import importlib
import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest

from bnwatch import cli
from bnwatch.keras import watch
from bnwatch.lines import Callers
from tests.adapters.keras_models import CLASSES, compiled, data, quiet_watch, state
from tests.adapters.library import BACKEND, LEGACY, keras, modes, set_random_seed

HEAD = "from tests.adapters.library import keras, layers\n"

SUBCLASSED = """
class Block(layers.Layer):
    def __init__(self, **arguments):
        super().__init__(**arguments)
        self.dense = layers.Dense(6)
        self.inner = layers.BatchNormalization(name="inner")  # built inner

    def call(self, x, training=None):
        return self.inner(self.dense(x), training=training)

    def get_config(self):
        return super().get_config()


class Net(keras.Model):
    def __init__(self):
        super().__init__()
        self.block = Block(name="block")
        self.shared = layers.BatchNormalization(  # built shared
            name="shared",
        )
        self.stack = keras.Sequential([
            layers.Dense(5),
            layers.BatchNormalization(name="first"),  # built first
            layers.ReLU(),
            layers.BatchNormalization(name="second"),  # built second
        ])
        self.many = [layers.BatchNormalization(name=f"many_{n}") for n in range(2)]  # built many_0 # built many_1
        if CLASSES > 1:
            self.either = layers.BatchNormalization(name="either")
        else:
            self.either = layers.BatchNormalization(name="either", center=False)
        self.scores = layers.Dense(CLASSES)

    def call(self, x, training=None):
        a = self.block(x, training=training)  # calls inner
        b = self.block(2.0 * x + 1.0, training=training)  # calls inner
        x = self.shared(a, training=training)  # calls shared
        x = x + self.shared(
            b, training=training)
        x = self.stack(x, training=training)
        for one in self.many:
            x = one(x, training=training)  # calls many_0 # calls many_1
        x = self.either(x, training=training)  # calls either
        return self.scores(x)
""".replace("        x = x + self.shared(\n", "        x = x + self.shared(  # calls shared\n").replace(
    "CLASSES", str(CLASSES)
)

FUNCTIONAL = """
def build():
    inputs = keras.Input((5,))
    shared = layers.BatchNormalization(name="shared")
    x = shared(layers.Dense(6)(shared(layers.Dense(6)(inputs))))
    return keras.Model(inputs, layers.Dense(CLASSES)(x))
""".replace("CLASSES", str(CLASSES))

NESTED = """
class Block(layers.Layer):
    def __init__(self, **arguments):
        super().__init__(**arguments)
        self.inner = layers.BatchNormalization(name="inner")  # built inner

    def call(self, x, training=None):
        return self.inner(x, training=training)  # calls inner

    def get_config(self):
        return super().get_config()


def build():
    return keras.Sequential([keras.Input((5,)), Block(), layers.Dense(CLASSES)])
""".replace("CLASSES", str(CLASSES))

STEPPING = (
    FUNCTIONAL.replace("keras.Model(", "Net(")
    + """

class Net(keras.Model):
    def train_step(self, *arguments):
        return super().train_step(*arguments)
"""
)

LOOPS = {
    "tensorflow": """
import tensorflow as tf

def train(model, x, watching):
    for _ in range(3):
        with tf.GradientTape():
            model(x, training=True)  # calls shared
            model(x + 1.0, training=True)  # calls shared
        watching.step()
""",
    "torch": """
import torch

def train(model, x, watching):
    for _ in range(3):
        model(torch.as_tensor(x), training=True)  # calls shared
        model(torch.as_tensor(x + 1.0), training=True)  # calls shared
        watching.step()
""",
}
ALONE = """
def build():
    return keras.Sequential([keras.Input((5,)), layers.BatchNormalization(name="shared")])
"""


@pytest.fixture
def program(tmp_path, monkeypatch):
    """Return a function that imports a program from a file; lines are named from the directory of the file."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)

    def write(source):
        (tmp_path / "program.py").write_text(HEAD + source)
        return importlib.import_module("program")

    yield write
    sys.modules.pop("program", None)


def marked(kind):
    """Return the marked lines by the name of a layer."""
    found: dict[str, list[str]] = {}
    for number, line in enumerate(Path("program.py").read_text().splitlines(), 1):
        for name in re.findall(rf"# {kind} (\w+)", line):
            found.setdefault(name, []).append(f"program.py:{number}")
    return found


def trained(model, steps=6, batch=16, **arguments):
    x, y = data(steps * batch, shape=(5,))
    watching = quiet_watch(**{"experiments": False, **arguments})
    model.fit(x, y, batch_size=batch, verbose=0, shuffle=False, callbacks=[watching])
    assert not watching.watch.signals.faults
    return {path.rpartition("/")[2]: spec for path, spec in watching.watch.signals.specs.items()}


def built_at(specs):
    return {name: [spec.built_at] for name, spec in specs.items() if spec.built_at}


def called_at(specs):
    return {name: list(spec.called_at) for name, spec in specs.items() if spec.called_at}


@pytest.mark.parametrize("arguments", modes("default", "eager"))
def test_a_subclassed_model(arguments, program):
    model = compiled(program(SUBCLASSED).Net(), **arguments)
    specs = trained(model)
    assert built_at(specs) == marked("built")
    # AutoGraph writes the calls of Keras 2 anew, and what it says of their lines is one off in a loop
    assert called_at(specs) == ({} if LEGACY and not arguments.get("run_eagerly") else marked("calls"))
    assert specs["either"].built_at is None
    again = trained(model)
    assert {name: spec.built_at for name, spec in again.items()} == {name: s.built_at for name, s in specs.items()}
    assert called_at(again) == called_at(specs)


@pytest.mark.parametrize("source", [FUNCTIONAL, STEPPING])
def test_a_functional_model_has_no_line(source, program):
    specs = trained(compiled(program(source).build()))
    assert (specs["shared"].built_at, specs["shared"].called_at) == (None, ())


def test_a_block_of_the_user_in_a_functional_model(program):
    specs = trained(compiled(program(NESTED).build()))
    assert built_at(specs) == marked("built")
    assert called_at(specs) == ({} if LEGACY else marked("calls"))


@pytest.mark.parametrize("eagerly", [True, False])
def test_no_line_is_looked_for_twice(eagerly, program, monkeypatch):
    """In the steps after the first none is looked for, sampled or not: what is traced is traced no more."""
    model = compiled(program(SUBCLASSED).Net(), run_eagerly=eagerly)
    found, steps, own = [], [], Callers.trail
    monkeypatch.setattr(Callers, "trail", lambda *arguments: found.append(len(steps)) or own(*arguments))
    count = keras.callbacks.LambdaCallback(on_train_batch_end=lambda batch, logs=None: steps.append(batch))
    x, y = data(20 * 16, shape=(5,))
    model.fit(x, y, batch_size=16, verbose=0, callbacks=[quiet_watch(every=5, experiments=False), count])
    assert len(steps) == 20
    assert len(found) >= 9  # call sites
    # on JAX the functions are made anew after the first step, with places for the sites that it showed
    assert max(found) <= 1
    if eagerly and BACKEND != "jax":
        assert len(found) == 9


def test_a_watched_model_is_trained_to_the_same_bits(program):
    module, states = program(SUBCLASSED), []
    x, y = data(96, shape=(5,))
    for callbacks in ([], [quiet_watch(experiments=False)]):
        set_random_seed(3)
        model = compiled(module.Net())
        model.fit(x, y, verbose=0, shuffle=False, callbacks=callbacks)
        states.append(state(model))
    assert states[0] == states[1]


@pytest.mark.skipif(BACKEND == "jax", reason="a pure loop on JAX calls the model once a step")
def test_calls_of_a_loop_are_told_apart(program):
    module = program(LOOPS[BACKEND] + ALONE)
    model = module.build()
    with watch(model, None, on_diagnosis="log", experiments=False) as watching:
        module.train(model, np.random.default_rng(0).normal(size=(8, 5)).astype("float32"), watching)
    (spec,) = watching.watch.signals.specs.values()
    assert list(spec.called_at) == marked("calls")["shared"]


@pytest.mark.skipif(BACKEND != "tensorflow", reason="AutoGraph is of TensorFlow")
def test_code_that_autograph_wrote_has_no_line(program):
    import tensorflow as tf

    module = program(LOOPS[BACKEND].replace("with tf.GradientTape():", "with tf.GradientTape() as _:") + ALONE)
    model = module.build()

    def step(model, x):
        with tf.GradientTape():
            return model(x, training=True)

    run = tf.function(step)
    with watch(model, None, on_diagnosis="log", experiments=False) as watching:
        for _ in range(3):
            run(model, tf.zeros((4, 5)))
            watching.step()
    (spec,) = watching.watch.signals.specs.values()
    assert (len(watching.watch.signals.table.sites), spec.called_at) == (1, ())


@pytest.mark.skipif(LEGACY, reason="the calls of Keras 2 have no lines")
def test_the_record_the_report_and_sarif_name_the_lines(program, capsys):
    model = compiled(program(SUBCLASSED).Net())
    trained(model, log_dir="runs")
    assert cli.main(["report", "runs", "--format", "sarif", "--fail-on", "error"]) == 0
    results = json.loads(capsys.readouterr().out)["runs"][0]["results"]
    (result,) = [one for one in results if one["partialFingerprints"]["bnwatch/v1"] == "BN101 block/inner"]
    place = result["locations"][0]["physicalLocation"]
    calls = [one["physicalLocation"] for one in result["relatedLocations"]]
    named = [f"{one['artifactLocation']['uri']}:{one['region']['startLine']}" for one in (place, *calls)]
    assert named == [*marked("built")["inner"], *marked("calls")["inner"]]
    assert cli.main(["report", "runs", "--fail-on", "error"]) == 0
    text = capsys.readouterr().out
    assert f"  --> block/inner, built at {named[0]}, step" in text
    rows = [line.split() for line in text.splitlines() if line.strip().startswith("block/inner#")]
    assert [row[-1] for row in rows] == named[1:]
