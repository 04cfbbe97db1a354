"""Every call site its own layer, and the same outputs as before."""

from __future__ import annotations

import numpy as np
import pytest

from bnwatch.keras import check, split_shared
from bnwatch.keras.structure import structure
from tests.adapters.keras_models import convolutional
from tests.adapters.library import LEGACY, keras, layers, ops, to_numpy
from tests.adapters.test_keras_structure import Block, Subclassed, norm


def trained(model, seed=0):
    """Give every weight a value of its own: nothing may come out right by being initial."""
    rng = np.random.default_rng(seed)
    for variable in model.weights:
        if "float" in str(variable.dtype):
            variable.assign(rng.uniform(0.5, 1.5, variable.shape))
    return model


def outputs(model, seed=1):
    rng = np.random.default_rng(seed)
    x = [rng.normal(size=(5, *tensor.shape[1:])).astype("float32") for tensor in model.inputs]
    return model.predict(x if len(x) > 1 else x[0], verbose=0)


def sites(model):
    return {use.path: len(use.places) for use in structure(model).layers}


def siamese():
    """Return two towers that share a nested model, which shares a batch norm and a dense layer inside."""
    inner = keras.Input((4,))
    shared, dense = norm("shared"), layers.Dense(4, name="dense")
    tower = keras.Model(inner, shared(dense(layers.ReLU()(shared(dense(inner))))), name="tower")
    left, right = keras.Input((4,), name="left"), keras.Input((4,), name="right")
    return keras.Model([left, right], layers.Concatenate()([tower(left), tower(right)]), name="siamese")


def functions():
    """Return a model with functions in its graph, and outputs by name."""
    inputs = keras.Input((4,))
    bn = norm("bn")
    x = ops.relu(bn(inputs * 2.0)) + 1.0
    return keras.Model(inputs, {"a": bn(x), "b": norm("bn_2")(x)})


@pytest.mark.parametrize("build", [convolutional, siamese, functions])
def test_the_copy_gives_the_same_outputs_and_shares_nothing(build):
    model = trained(build())
    before = [to_numpy(v).tobytes() for v in model.variables]
    config = model.get_config()
    expected = outputs(model)
    split = split_shared(model)
    found = outputs(split)
    assert type(found) is type(expected)
    for name in expected if isinstance(expected, dict) else [...]:
        np.testing.assert_array_equal(found[name], expected[name])
    assert set(sites(split).values()) == {1}
    assert sum(sites(split).values()) == sum(sites(model).values())
    assert [to_numpy(v).tobytes() for v in model.variables] == before
    assert model.get_config() == config


def test_names_are_free_and_the_first_keeps_its_own():
    assert list(sites(split_shared(convolutional()))) == ["own", "shared", "shared_2"]
    assert sorted(sites(split_shared(functions()))) == ["bn", "bn_2", "bn_3"]


def test_what_is_no_batch_normalization_stays_shared():
    split = split_shared(siamese())
    assert sorted(sites(split)) == ["tower_shared", "tower_shared_2", "tower_shared_3", "tower_shared_4"]
    assert [layer.name for layer in split.layers if isinstance(layer, layers.Dense)] == ["tower_dense"]


def test_a_nested_model_that_is_called_once_stays_nested():
    inner = keras.Input((4,))
    shared = norm("shared")
    inputs = keras.Input((4,))
    tower = keras.Model(inner, shared(layers.Dense(4)(shared(inner))), name="tower")
    model = trained(keras.Model(inputs, layers.Dense(2)(tower(inputs))))
    split = split_shared(model)
    assert sites(split) == {"tower/shared": 1, "tower/shared_2": 1}
    np.testing.assert_array_equal(outputs(split), outputs(model))


def test_what_is_frozen_stays_frozen():
    model = siamese()
    model.get_layer("tower").get_layer("shared").trainable = False
    split = split_shared(model)
    frozen = [layer.name for layer in split.layers if not layer.trainable]
    assert sorted(frozen) == sorted(sites(split))


def test_the_copy_trains_apart_from_the_original_and_can_be_saved(tmp_path):
    model = trained(siamese())
    expected = outputs(model)
    split = split_shared(model)
    assert getattr(split, "optimizer", None) is None
    split.compile("sgd", "mse")
    x = [np.random.default_rng(n).normal(n, 1.0, (32, 4)) for n in (0, 5)]
    split.fit(x, np.zeros((32, 8)), batch_size=16, verbose=0)
    np.testing.assert_array_equal(outputs(model), expected)
    means = [to_numpy(layer.moving_mean) for layer in split.layers if "shared" in layer.name]
    assert len({mean.tobytes() for mean in means}) == 4
    split.save(tmp_path / "split.keras")
    np.testing.assert_array_equal(outputs(keras.models.load_model(tmp_path / "split.keras")), outputs(split))


def test_check_names_the_repair_and_the_repair_helps():
    helps = next(d.helps for d in check(convolutional()).diagnoses if d.rule == "BN101")
    assert any("bnwatch.keras.split_shared(model)" in said for said in helps)
    assert "BN101" not in {d.rule for d in check(split_shared(convolutional())).diagnoses}


def test_state_that_is_no_weight_is_copied_too():
    inputs = keras.Input((4,))
    bn, normalization = norm(), layers.Normalization()
    normalization.adapt(np.random.default_rng(0).normal(3.0, 2.0, (64, 4)))
    model = keras.Model(inputs, bn(layers.Dropout(0.5, seed=3, name="drop")(bn(normalization(inputs)))))
    split = split_shared(model)
    np.testing.assert_array_equal(outputs(split), outputs(model))
    states = [[to_numpy(v).tolist() for v in one.get_layer("drop").variables] for one in (model, split)]
    assert states[0] or LEGACY  # which keeps its seeds elsewhere
    assert states[0] == states[1]


def test_refusals():
    with pytest.raises(ValueError, match="needs a functional Keras model, and this Subclassed has no graph"):
        split_shared(Subclassed())
    with pytest.raises(ValueError, match="is called at more than one place: nothing to split"):
        split_shared(keras.Sequential([keras.Input((3,)), norm()]))
    with pytest.raises(ValueError, match="needs a functional Keras model, and this int"):
        split_shared(3)
    image = keras.Input((8, 8, 6))
    block = Block(name="block")
    with pytest.raises(ValueError, match="'block' is called at 2 places and has batch normalization in code"):
        split_shared(keras.Model(image, block(block(image))))
