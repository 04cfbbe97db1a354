import math

import numpy as np
import pytest

from bnwatch import testing
from tests.rules import cases


def one(**fields):
    return testing.signals(testing.snapshot(1, testing.call(testing.layer(), **fields)))


FIRES = {
    "NaN in the batch": lambda: one(mean=math.nan),
    "infinity in the batch": lambda: one(var=[1, math.inf, 1, 1]),
    "NaN in the running mean": lambda: one(running_mean=[0, 0, 0, math.nan]),
    "infinity in the running variance": lambda: one(running_var=math.inf),
}
QUIET = {
    "finite": one,
    "as large as float32 holds": lambda: one(mean=3e38, running_mean=-3e38, var=3e38, running_var=3e38),
    "no variance at all": lambda: one(var=0.0, running_var=0.0),
    "a variance below zero is another matter": lambda: one(running_var=-1.0),
    "nothing seen": testing.signals,
    "mended since": lambda: testing.signals(
        testing.snapshot(1, testing.call(testing.layer(), mean=math.nan)),
        testing.snapshot(2, testing.call(testing.layer())),
    ),
}

test_cases = cases.runner("BN401", fires=FIRES, quiet=QUIET)


def test_the_first_broken_layer_of_the_forward_pass_is_named():
    layers = [testing.layer(path) for path in ("a", "b", "c")]
    means = 0.0, math.nan, math.nan
    running = math.nan, math.nan, 0.0
    fed = testing.signals(
        testing.snapshot(
            1, *(testing.call(s, mean=m, running_mean=r) for s, m, r in zip(layers, means, running, strict=True))
        )
    )
    ((finding,), _) = cases.look("BN401", fed)
    assert finding.subject == "b"
    assert finding.evidence["sites"].value == 3


@pytest.mark.parametrize("bad", [1, 3])
def test_channels_are_counted(bad):
    mean = np.zeros(4)
    mean[:bad] = np.inf
    ((finding,), _) = cases.look("BN401", one(mean=mean))
    assert finding.evidence["non_finite"].value == bad
