import numpy as np
import pytest

from bnwatch import testing
from bnwatch.records import Structure
from tests.rules import cases


def behind(*rates, trainable=True):
    layers = [
        testing.usage(f"bn_{n}", testing.place(f"bn_{n}", dropout=f"drop_{n}", rate=rate), trainable=trainable)
        for n, rate in enumerate(rates)
    ]
    return lambda: testing.signals(Structure(tuple(layers)))


INFO = {
    "above_shift": behind(0.174),
    "half": behind(0.5),
    "several": behind(0.0, 0.3, 0.5, 0.2),
}
QUIET = {
    "below_shift": behind(0.173),
    "no dropout": lambda: testing.signals(Structure((testing.usage("bn", testing.place()),))),
    "frozen": behind(0.5, trainable=False),
    "all dropped, which trains nothing": behind(1.0),
}
SKIPS = {"nothing known": (testing.signals, None)}

test_cases = cases.runner("BN108", info=INFO, quiet=QUIET, skips=SKIPS)


def test_one_line_for_the_whole_model():
    ((finding,), _) = cases.look("BN108", INFO["several"]())
    assert finding.subject == "model"
    assert "`bn_1`, `bn_2`, `bn_3`" in finding.message
    assert finding.evidence["rate"].value == 0.5
    assert finding.evidence["rate"].unit == "set to zero by drop_2"


def test_one_layer_is_the_subject():
    ((finding,), _) = cases.look("BN108", INFO["half"]())
    assert finding.subject == "bn_0"


@pytest.mark.parametrize("rate", [0.2, 0.5, 0.8])
def test_the_excess_is_that_of_inverted_dropout(rate):
    rng = np.random.default_rng(0)
    values = rng.normal(size=1_000_000)
    dropped = values * (rng.random(values.size) >= rate) / (1.0 - rate)
    ((finding,), _) = cases.look("BN108", behind(rate)())
    assert finding.evidence["excess"].value == pytest.approx(dropped.std() / values.std() - 1.0, abs=0.01)
