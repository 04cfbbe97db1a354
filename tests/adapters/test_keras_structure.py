"""What the graph says before the first step, held against models whose structure is known."""

from __future__ import annotations

import numpy as np
import pytest

from bnwatch.diagnosis import Severity
from bnwatch.keras import check
from bnwatch.keras.structure import structure
from bnwatch.records import Structure
from bnwatch.render import report_text
from bnwatch.sinks.memory import MemorySink
from bnwatch.sinks.tensorboard import read_runs
from tests.adapters.keras_models import CLASSES, attributes, convolutional, data, make, quiet_watch
from tests.adapters.library import LEGACY, keras, layers, ops, to_numpy


def places(model, **arguments):
    return {use.path: use.places for use in structure(model, **arguments).layers}


def place(*stack, shape=(8, 8, 3), name="bn"):
    """Return what is known of the one call of ``name`` in a stack of layers."""
    return places(keras.Sequential([keras.Input(shape), *stack]))[name][0]


def norm(name="bn", **arguments):
    return layers.BatchNormalization(name=name, **arguments)


def rules(report):
    return {d.rule: d for d in report.diagnoses}


@keras.saving.register_keras_serializable("structure")
class Block(layers.Layer):
    """A layer with batch normalization in code of its own."""

    def __init__(self, **arguments):
        super().__init__(**arguments)
        self.conv, self.norm = layers.Conv2D(6, 3, padding="same", name="conv"), norm("norm")
        self.drop = layers.Dropout(0.5, name="drop")

    def call(self, x, training=None):
        return self.drop(ops.relu(self.norm(self.conv(x), training=training)), training=training)


class Subclassed(keras.Model):
    def __init__(self):
        super().__init__(name="subclassed")
        self.first, self.second, self.shared = Block(name="first"), Block(name="second"), norm("shared")
        self.scores = layers.Dense(CLASSES, name="scores")

    def call(self, x, training=None):
        x = self.shared(self.first(x, training=training), training=training)
        x = self.shared(self.second(x, training=training), training=training)
        return self.scores(ops.mean(x, axis=(1, 2)))


symbolic = pytest.mark.skipif(LEGACY, reason="Keras 2 calls no model of code alone on tensors without values")


def state(model):
    return [to_numpy(v).tobytes() for v in model.variables], attributes(model)


# call sites


def test_call_sites_of_a_functional_model_and_what_feeds_them():
    known = places(convolutional())
    assert [(p.producer, p.kind, str(p.site)) for p in known["shared"]] == [
        ("relu_1", "ReLU", "shared#0"),
        ("conv_2", "Conv2D", "shared#1"),
    ]
    assert [(p.rank, p.axis, p.elements, p.layout) for p in known["own"]] == [(4, 3, 64, "channels_last")]


def test_call_sites_are_those_that_training_records():
    model = make()
    watch = quiet_watch(every=1)
    x, y = data(64)
    model.fit(x, y, batch_size=32, verbose=0, callbacks=[watch])
    graph = [place.site for use in watch.watch.signals.structure.layers for place in use.places]
    assert sorted(graph) == sorted(watch.watch.signals.table.sites)


def test_a_nested_model_is_taken_apart_at_each_call():
    inner = keras.Sequential([keras.Input((8,)), layers.Dense(8, name="dense"), norm()], name="tower")
    left, right = keras.Input((8,)), keras.Input((8,))
    known = places(keras.Model([left, right], layers.Add()([inner(left), inner(inner(right))])))
    assert [p.producer for p in known["tower/bn"]] == ["tower/dense"] * 3


def test_an_unbuilt_model_says_so_and_stays_unbuilt():
    model = keras.Sequential([layers.Dense(4), norm()])
    known = structure(model)
    assert known.hidden == "the model has no graph, and the shape of its input is not known"
    assert not model.built
    assert structure(model, input_shape=(None, 3)).hidden == "the model has no graph, and is not built yet"
    assert not model.built


def test_a_model_without_batch_normalization():
    assert structure(keras.Sequential([keras.Input((3,)), layers.Dense(2)])) == Structure()


# axis and layout


def test_the_layout_passes_through_what_keeps_it():
    passing = [layers.ReLU(), layers.Dropout(0.1), norm("first"), layers.Activation("tanh")]
    assert place(layers.Conv2D(4, 3), *passing, norm()).layout == "channels_last"
    assert place(norm()).layout is None
    assert place(layers.Conv2D(4, 3), layers.Reshape((6, 24)), norm()).layout is None
    assert place(layers.Conv2D(4, 3), layers.Permute((3, 1, 2)), norm()).layout is None
    assert place(layers.Flatten(), norm()).layout == "channels_last"


def test_channels_first():
    first = place(layers.Conv2D(4, 3, data_format="channels_first", name="conv"), norm(axis=1), shape=(3, 8, 8))
    assert (first.layout, first.axis, first.channel_axis, first.elements) == ("channels_first", 1, 1, 36)


def test_one_dimensional():
    conv = place(layers.Conv1D(4, 3), norm(axis=1), shape=(10, 3))
    assert (conv.rank, conv.axis, conv.channel_axis) == (3, 1, 2)


def test_branches_that_disagree_are_not_known():
    image = keras.Input((8, 8, 8))
    first = layers.Conv2D(8, 1, data_format="channels_first")(image)
    mixed = layers.Add()([first, layers.Conv2D(8, 1)(image)])
    assert places(keras.Model(image, norm()(mixed)))["bn"][0].layout is None


def test_functions_of_the_graph_pass_the_layout_on():
    image = keras.Input((8, 8, 3))
    x = ops.relu(layers.Conv2D(4, 3)(image) * 2.0) + 1.0
    assert places(keras.Model(image, norm()(x)))["bn"][0].layout == "channels_last"


# bias


@pytest.mark.parametrize(
    ("stack", "biased"),
    [
        ([layers.Conv2D(4, 3), norm()], True),
        ([layers.Dense(4), norm()], True),
        ([layers.Conv2D(4, 3, use_bias=False), norm()], False),
        ([layers.Conv2D(4, 3, activation="relu"), norm()], False),
        ([layers.Conv2D(4, 3), layers.ReLU(), norm()], False),
        ([layers.Conv2D(4, 3), norm(center=False)], False),
        ([layers.Conv2D(4, 3), norm(trainable=False)], False),
        ([layers.Conv2D(4, 3), norm(axis=1)], False),
        ([layers.Conv2D(4, 3, name="out")], None),
    ],
    ids=["conv", "dense", "none", "activation", "layer", "no beta", "frozen", "axis", "no batch norm"],
)
def test_bias(stack, biased):
    known = places(keras.Sequential([keras.Input((8, 8, 3)), *stack]))
    assert [p.bias for of in known.values() for p in of] == ([] if biased is None else [biased])


def test_a_bias_that_is_seen_elsewhere_is_not_redundant():
    image = keras.Input((8, 8, 3))
    x = layers.Conv2D(4, 3)(image)
    assert not places(keras.Model(image, layers.Add()([x, norm()(x)])))["bn"][0].bias
    assert not places(keras.Model(image, [x, norm()(x)]))["bn"][0].bias


def test_a_shared_layer_needs_its_bias_if_one_call_does():
    a, b = keras.Input((4,)), keras.Input((4,))
    dense = layers.Dense(4)
    both = keras.Model([a, b], layers.Add()([norm("a")(dense(a)), norm("b")(dense(b))]))
    one = keras.Model([a, b], layers.Add()([norm("a")(dense(a)), dense(b)]))
    assert [p.bias for of in places(both).values() for p in of] == [True, True]
    assert [p.bias for of in places(one).values() for p in of] == [False]


# output


def test_output():
    assert place(layers.Dense(4), norm(), shape=(3,)).output
    assert place(layers.Dense(4), norm(), layers.Softmax(), shape=(3,)).output
    assert place(layers.Dense(4), norm(), layers.Activation("sigmoid"), shape=(3,)).output
    assert not place(layers.Dense(4), norm(), layers.ReLU(), shape=(3,)).output
    assert not place(layers.Dense(4), norm(), layers.Dense(1), shape=(3,)).output


def test_the_end_of_a_nested_model_is_not_the_output():
    inner = keras.Sequential([keras.Input((8,)), layers.Dense(8), norm()], name="tower")
    inputs = keras.Input((8,))
    assert not places(keras.Model(inputs, layers.Dense(2)(inner(inputs))))["tower/bn"][0].output
    assert places(keras.Model(inputs, inner(inputs)))["tower/bn"][0].output


# dropout


@pytest.mark.parametrize(
    ("stack", "rate"),
    [
        ([layers.Dropout(0.5), norm()], 0.5),
        ([layers.Dropout(0.5), layers.Conv2D(4, 3, activation="relu"), norm()], 0.5),
        ([layers.SpatialDropout2D(0.3), layers.Conv2D(4, 3), layers.ReLU(), norm()], 0.3),
        ([layers.Dropout(0.0), norm()], 0.0),
        ([layers.Dropout(0.5), layers.LayerNormalization(), norm()], 0.0),
        ([layers.Dropout(0.5), norm("first"), layers.Conv2D(4, 3), norm()], 0.0),
        ([layers.Dropout(0.5), layers.GlobalAveragePooling2D(), norm()], 0.0),
        ([norm(), layers.Dropout(0.5)], 0.0),
    ],
    ids=["direct", "conv", "spatial", "zero", "layer norm", "batch norm", "pooling", "behind"],
)
def test_dropout(stack, rate):
    assert place(*stack).rate == rate


# models without a graph


@symbolic
def test_a_subclassed_model_is_observed_and_left_as_it_was():
    model = Subclassed()
    model(np.zeros((2, 8, 8, 3), "float32"))
    before = state(model)
    known = places(model, input_shape=(None, 8, 8, 3))
    assert state(model) == before
    assert [str(p.site) for p in known["shared"]] == ["shared#0", "shared#1"]
    assert [p.producer for p in known["shared"]] == ["first/drop", "second/drop"]
    assert known["first/norm"][0].producer == "first/conv"
    assert known["first/norm"][0].bias
    assert [p.rate for p in known["shared"]] == [0.5, 0.5]


@symbolic
def test_a_model_that_was_built_knows_its_input():
    model = Subclassed()
    assert structure(model).hidden == "the model has no graph, and the shape of its input is not known"
    model(np.zeros((2, 8, 8, 3), "float32"))
    assert structure(model).hidden is None


@symbolic
def test_a_block_inside_a_functional_model():
    image = keras.Input((8, 8, 3))
    model = keras.Model(image, Block(name="block")(Block(name="entry")(image)))
    before = state(model)
    known = places(model)
    assert state(model) == before
    assert [p.producer for p in known["block/norm"]] == ["block/conv"]


@symbolic
def test_a_block_inside_a_sequential_model_that_was_never_called():
    model = keras.Sequential([keras.Input((8, 8, 3)), Block(name="entry"), Block(name="block")])
    before = state(model)
    known = places(model)
    assert state(model) == before
    assert [p.producer for p in known["block/norm"]] == ["block/conv"]


@symbolic
def test_a_model_that_cannot_be_called_without_data():
    class Stubborn(Subclassed):
        def call(self, x, training=None):
            if getattr(self, "stubborn", False):
                raise RuntimeError
            return super().call(x, training=training)

    model = Stubborn()
    model(np.zeros((2, 8, 8, 3), "float32"))
    model.stubborn = True
    before = state(model)
    assert structure(model).hidden == "the model could not be called without data: RuntimeError"
    assert state(model) == before


@pytest.mark.skipif(not LEGACY, reason="Keras 3 calls models on tensors without values")
def test_a_model_of_code_alone_is_not_known_in_keras_2():
    model = Subclassed()
    model(np.zeros((2, 8, 8, 3), "float32"))
    report = check(model, steps_per_epoch=1000, epochs=10)
    assert report.diagnoses == ()
    assert {skipped.rule for skipped in report.skipped} == {"BN101", "BN102", "BN108", "BN109", "BN110", "BN214"}
    assert all("the model has no graph" in skipped.reason for skipped in report.skipped)


# check


def sick():
    """Return a model with one of each."""
    inputs = keras.Input((16, 3))
    shared = norm("shared")
    x = norm("rows", axis=1)(layers.Conv1D(4, 3, name="conv")(inputs))
    x = shared(layers.Dense(4, name="dense")(layers.Dropout(0.5, name="drop")(shared(x))))
    x = layers.Dense(CLASSES, name="head")(layers.Flatten()(x))
    return keras.Model(inputs, layers.Activation("linear")(norm("scores", momentum=0.1)(x)))


def test_check_finds_one_of_each():
    report = check(sick(), batch_size=1, steps_per_epoch=10, epochs=2)
    assert {(d.rule, d.subject) for d in report.diagnoses} == {
        ("BN101", "shared"), ("BN102", "rows"), ("BN108", "shared"), ("BN109", "scores"), ("BN110", "model"),
        ("BN202", "rows"), ("BN202", "scores"), ("BN205", "scores"),
    }  # fmt: skip
    assert (report.layers, report.sites, report.skipped) == (3, 4, ())
    assert "could not look" not in report_text(report)


def test_check_is_silent_about_a_healthy_model():
    model = keras.Sequential(
        [keras.Input((8, 8, 3)), layers.Conv2D(4, 3, use_bias=False), norm(momentum=0.9), layers.ReLU(),
         layers.GlobalAveragePooling2D(), layers.Dropout(0.5), layers.Dense(CLASSES)]
    )  # fmt: skip
    report = check(model, batch_size=32, steps_per_epoch=100, epochs=10)
    assert (report.diagnoses, report.skipped) == ((), ())


def test_check_says_what_it_could_not_look_at():
    report = check(Subclassed())
    assert {s.rule for s in report.skipped} == {"BN101", "BN102", "BN108", "BN109", "BN110", "BN202", "BN214"}


def test_check_changes_nothing():
    keras.utils.set_random_seed(1)
    model = make()
    before, draw = state(model), np.random.get_state()[1].tobytes()  # noqa: NPY002 - Keras seeds the old generator
    check(model, batch_size=8, steps_per_epoch=5, epochs=5)
    assert state(model) == before
    assert np.random.get_state()[1].tobytes() == draw  # noqa: NPY002


def test_check_refuses_what_is_no_model_and_no_number():
    with pytest.raises(TypeError, match="check needs a Keras model, got int"):
        check(3)
    with pytest.raises(ValueError, match="epochs must be at least 1, got 0"):
        check(make(), epochs=0)


# in training


def test_training_says_the_same_and_the_record_keeps_it(tmp_path):
    model = make(sick)
    watch = quiet_watch(tmp_path)
    sink = MemorySink()
    watch.watch._given = (sink,)
    x, y = data(64, shape=(16, 3))
    model.fit(x, y, batch_size=32, epochs=3, verbose=0, callbacks=[watch])
    (seen,) = sink.of(Structure)
    assert (seen.steps_per_epoch, seen.epochs, seen.hidden) == (2, 3, None)
    found = rules(watch)
    assert set(found) >= {"BN102", "BN108", "BN109", "BN110", "BN202"}
    assert found["BN102"].severity is Severity.WARNING
    assert found["BN102"].step == 0
    (run,) = read_runs(tmp_path)
    assert run.structure == seen


def test_a_graph_that_cannot_be_read_does_not_switch_the_watch_off(monkeypatch):
    def broken(*_):
        raise KeyError

    monkeypatch.setattr("bnwatch.keras.structure.trace", broken)
    model, watch = make(), quiet_watch()
    x, y = data(64)
    model.fit(x, y, batch_size=32, verbose=0, callbacks=[watch])
    assert watch.watch.enabled
    reasons = {s.rule: s.reason for s in watch.skipped}
    assert reasons["BN110"] == "the graph of the model could not be read: KeyError"
