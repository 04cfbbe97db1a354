"""Which Keras the tests run on: the one place that knows; everything that differs between them is asked for here.

``KERAS_BACKEND`` chooses the backend of Keras 3; ``BNWATCH_TEST_KERAS=tf_keras`` chooses tf-keras, which is Keras 2.
"""

from __future__ import annotations

import os
from contextlib import contextmanager
from importlib.util import find_spec
from types import SimpleNamespace

import numpy as np
import pytest

if os.environ.get("BNWATCH_TEST_KERAS") == "tf_keras":
    import tf_keras as keras
else:
    import keras

VERSION = tuple(int(number) for number in keras.__version__.split(".")[:2])
LEGACY = VERSION < (3, 0)
"""Keras 2: its fused kernel does not show the statistics of a batch, and keeps the corrected variance."""

BACKEND = "tensorflow" if LEGACY else keras.backend.backend()
TENSORFLOW, TORCH = (find_spec(name) is not None for name in ("tensorflow", "torch"))

OLDEST = (3, 0) <= VERSION < (3, 5)
"""Keras 3.4, the oldest Keras 3 that is tried."""

layers = keras.layers


def _operations():
    """Return operations under the names of ``keras.ops``, those that models of the tests use."""
    if not LEGACY:
        return keras.ops
    import tensorflow as tf

    return SimpleNamespace(relu=tf.nn.relu, mean=tf.reduce_mean)


ops = _operations()
set_random_seed = keras.utils.set_random_seed
PyDataset = keras.utils.Sequence if LEGACY else keras.utils.PyDataset

MODES = {
    "default": {},
    "jit": {"jit_compile": True},
    "no_jit": {"jit_compile": False},
    "eager": {"run_eagerly": True},
    "two_steps": {"steps_per_execution": 2},
    "bfloat16": {"policy": "mixed_bfloat16"},
    "float16": {"policy": "mixed_float16"},
}
"""Ways of training: arguments of `compile`, and the policy of data types."""

IMPOSSIBLE = {
    ("torch", "jit"): "torch.compile takes more than a minute a net on two busy cores",
    ("torch", "two_steps"): "Keras refuses steps_per_execution > 1 on torch",
}
"""Ways of training that a backend (or ``legacy``, Keras 2) lacks, or that outlast a test, and why."""
if OLDEST and BACKEND == "tensorflow":
    IMPOSSIBLE["tensorflow", "two_steps"] = "Keras 3.4 warns that data ran out where the last execution is not full"


def modes(*names):
    """Return pytest's parameters for ways of training, all by default; the impossible ones are skipped with reason."""
    found = []
    for name in names or MODES:
        reason = IMPOSSIBLE.get(("legacy" if LEGACY else BACKEND, name))
        marks = () if reason is None else pytest.mark.skip(reason=reason)
        found.append(pytest.param(MODES[name], id=name, marks=marks))
    return found


@contextmanager
def dtype_policy(name):
    """Make layers of another policy inside the context."""
    keras.mixed_precision.set_global_policy(name)
    try:
        yield
    finally:
        keras.mixed_precision.set_global_policy("float32")


def to_numpy(value):
    """Return a tensor or variable of the backend as an array of its own memory."""
    if isinstance(value, np.ndarray | np.generic | float | int):
        return np.array(value)
    return np.array(value.numpy() if LEGACY else keras.ops.convert_to_numpy(value))


def variables_of(model):
    """Return every variable that training moves: weights, running statistics, seeds of random layers, optimizer."""
    return [*model.variables, *model.optimizer.variables]


def random_numbers():
    """Return numbers that the global generators draw next: that of the backend, and that of NumPy."""
    if BACKEND == "tensorflow":
        import tensorflow as tf

        drawn = tf.random.normal((3,)).numpy()
    elif BACKEND == "torch":
        import torch

        drawn = torch.randn(3).numpy()
    elif OLDEST:
        drawn = np.zeros(3)  # JAX has none, and that of Keras 3.4 does not begin anew with the seed
    else:
        drawn = to_numpy(keras.random.normal((3,)))  # JAX has none: that of Keras
    return drawn.tolist(), np.random.standard_normal(3).tolist()  # noqa: NPY002 - the global one is meant
