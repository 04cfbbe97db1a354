import numpy as np
import pytest

from bnwatch import testing
from tests.rules import cases


def held(*variance, decay=0.9):
    spec = testing.layer(decay=decay)
    return lambda: testing.signals(testing.snapshot(1, testing.call(spec, running_var=variance)))


FIRES = {
    "one channel": held(1.0, 1.0, -1e-9, 1.0),
    "every channel": held(-1.0, -1.0, -1.0, -1.0),
}
QUIET = {
    "zero": held(0.0, 0.0, 0.0, 0.0),
    "the smallest positive number": held(*[np.nextafter(np.float32(0), np.float32(1))] * 4),
    "negative zero": held(-0.0, -0.0, -0.0, -0.0),
    "NaN is BN401's": held(np.nan, 1.0, 1.0, 1.0),
    "a negative mean": lambda: testing.signals(
        testing.snapshot(1, testing.call(testing.layer(), mean=-3.0, running_mean=-3.0))
    ),
    "nothing watched": testing.signals,
}

test_cases = cases.runner("BN402", fires=FIRES, quiet=QUIET)


@pytest.mark.parametrize(("decay", "why", "helps"), [(0.9, "something else wrote it", 2), (1.1, "outside 0 to 1", 3)])
def test_a_decay_that_is_none_is_named(decay, why, helps):
    ((finding,), _) = cases.look("BN402", held(-1.0, 1.0, 1.0, 1.0, decay=decay)())
    assert why in finding.notes[1]
    assert len(finding.helps) == helps


def test_every_layer_is_in_one_diagnosis():
    specs = [testing.layer(path) for path in ("a", "b")]
    signals = testing.signals(testing.snapshot(1, *(testing.call(spec, running_var=-1.0) for spec in specs)))
    ((finding,), _) = cases.look("BN402", signals)
    assert finding.subject == "a"
    assert "`a`, `b`" in finding.message
