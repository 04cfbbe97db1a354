"""Running statistics that are kept in half precision."""

from __future__ import annotations

import numpy as np
import pytest

from tests.adapters.keras_models import CLASSES, data, faked, make
from tests.adapters.library import LEGACY, dtype_policy, keras, layers


def net():
    return keras.Sequential([keras.Input((5,)), layers.BatchNormalization(name="bn"), layers.Dense(CLASSES)])


@pytest.mark.parametrize(
    ("policy", "dtype"), [("float32", "float32"), ("float16", "float16"), ("mixed_float16", "float32")]
)
def test_running_statistics_keep_their_type(policy, dtype):
    if LEGACY:  # Keras 2 keeps them in single precision in any case
        dtype = "float32"
    callback, seen = faked()
    with dtype_policy(policy):
        model = make(net)
    x, y = data(64, shape=(5,))
    model.fit(x, y, batch_size=16, verbose=0, callbacks=[callback])
    assert seen.faults == []
    running = seen.snapshots[-1].calls[0].running
    assert (running.mean.dtype, running.var.dtype) == (np.dtype(dtype), np.dtype(dtype))
    _, _, mean, var = model.get_layer("bn").get_weights()
    np.testing.assert_array_equal(running.mean, mean)
    np.testing.assert_array_equal(running.var, var)
