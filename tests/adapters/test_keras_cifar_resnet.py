import pytest

from bnwatch.examples import data, keras_cifar_resnet
from tests.adapters.library import keras


def options(*arguments):
    return keras_cifar_resnet.options({}).parse_args(arguments)


def layers(*arguments):
    return [type(layer).__name__ for layer in keras_cifar_resnet.residual_net(options(*arguments)).layers]


@pytest.mark.parametrize(
    ("arguments", "batch_norms"),
    [((), 10), (("--no-bn",), 0), (("--no-last-bn",), 7), (("--head", "bn"), 11), (("--axis", "1"), 10)],
)
def test_the_options_change_the_network_as_they_say(arguments, batch_norms):
    assert layers(*arguments).count("BatchNormalization") == batch_norms


def test_the_network_is_the_one_that_was_posted():
    network = keras_cifar_resnet.residual_net(options())
    dense = [layer for layer in network.layers if isinstance(layer, keras.layers.Dense)]
    assert [layer.units for layer in dense] == [32, 10]
    assert dense[0].input.shape == (None, 32 * 32 * 32)
    assert "GlobalAveragePooling2D" in layers("--head", "pooling")
    assert "LeakyReLU" in layers("--head", "leaky")


def test_the_program_trains_and_shows_each_epoch(tmp_path, capsys):
    assert keras_cifar_resnet.main(["--no-watch", "--epochs", "2", "--limit", "64", "--log-dir", str(tmp_path)]) == 0
    assert [line.split(":")[0] for line in capsys.readouterr().out.splitlines()] == ["epoch  1", "epoch  2"]


def test_the_digits_come_in_the_shape_of_cifar():
    images = data.load("digits", (32, 32, 3), {}, limit=10)
    assert images.x_train.shape == (10, 32, 32, 3)
    assert images.x_test.shape == (359, 32, 32, 3)
