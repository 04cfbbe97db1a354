import numpy as np
import pytest

from bnwatch import testing
from bnwatch.records import Structure
from tests.rules import cases

LIMITS = {name: threshold.value for name, threshold in cases.rule("BN108").thresholds.items()}


def behind(*rates, trainable=True):
    layers = [
        testing.usage(f"bn_{n}", testing.place(f"bn_{n}", dropout=f"drop_{n}", rate=rate), trainable=trainable)
        for n, rate in enumerate(rates)
    ]
    return lambda: testing.signals(Structure(tuple(layers)))


def narrow(
    held=0.6, *, running=0.6, population=0.77, decay=0.9, examples=397, layer="bn_1", trained=1.0, training=None
):
    """What enters two layers in evaluation against what they hold, and what statistics without dropout are worth."""
    signals = behind(0.0, 0.7)()
    spec = testing.layer("bn_1", decay=decay)
    for step in (1, 1000):
        signals.observe(testing.snapshot(step, testing.call(spec, var=trained**2, running_mean=step, updates=step)))
    signals.cells = testing.cells(
        1000,
        training=training,
        evaluation={"batch": population, "running": running, "population": population},
        examples=examples,
    )
    signals.entering = testing.entering(
        1000, testing.site_shift("bn_0", held=(0.0, 1.0)), testing.site_shift(layer, held=(0.0, held))
    )
    return lambda: signals


FIRES = {
    "the variance of dropout .7": narrow(0.6),
    "below_held": narrow(LIMITS["held"] - 0.01),
    "above_cost": narrow(running=0.9, population=0.9101, examples=10_000),
    "below_alpha": narrow(running=0.6, population=0.62, examples=500),
}
INFO = {
    "above_held": narrow(LIMITS["held"] + 0.01),
    "below_cost": narrow(running=0.9, population=0.9099, examples=10_000),
    "above_alpha": narrow(running=0.6, population=0.618, examples=500),
    "mild, as between the layers of a VGG": narrow(0.95, running=0.9, population=0.9),
    "lost on training data alone": narrow(
        running=0.9, population=0.905, examples=2000, training={"batch": 0.95, "running": 0.9, "population": 0.95}
    ),
    "too narrow where no dropout is": narrow(layer="bn_0"),
    "initial values that are still to go": narrow(decay=0.999),
    "running statistics that lag behind narrow batches": narrow(0.6, trained=0.6),
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

test_cases = cases.runner("BN108", fires=FIRES, info=INFO, quiet=QUIET, skips=SKIPS)


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


def test_what_was_measured_is_said():
    ((finding,), _) = cases.look("BN108", narrow()())
    assert "costs 17.1 points of evaluation accuracy" in finding.message
    assert finding.evidence["held"].value == pytest.approx(0.6)
    assert "397 evaluation examples: 59.9% with running" in finding.notes[1]
    assert "likely" not in finding.message


def test_what_costs_nothing_is_not_called_likely():
    ((finding,), _) = cases.look("BN108", INFO["mild, as between the layers of a VGG"]())
    assert finding.message.endswith(
        "running statistics are those of training, which costs no evaluation accuracy for certain"
    )
    assert "397 evaluation examples: 89.9% with running" in finding.notes[1]


@pytest.mark.parametrize("unknown", [behind(0.5), narrow(layer="bn_0")], ids=["not measured", "of another origin"])
def test_what_is_not_known_to_be_dropout_is_likely(unknown):
    ((finding,), _) = cases.look("BN108", unknown())
    assert finding.message.endswith("running statistics are likely too wide for evaluation")
    assert finding.notes[1].startswith("what decides: ")
