import pytest

from bnwatch import testing
from bnwatch.records import Attachment
from tests.rules import cases

RULE = "BN306"
LIMITS = {name: threshold.value for name, threshold in cases.rule(RULE).thresholds.items()}


def at(step, *, zero=1.0, spread=0.0, gradient=0.0, head_spread=None, dead_units=None):
    """Conv - dense with ReLU - softmax; the dense layer is the one in question."""
    return testing.look(
        step,
        testing.layer_look("conv", gradient=gradient),
        testing.layer_look(
            "dense", kind="Dense relu", units=32, zero=zero, spread=spread, gradient=gradient, dead_units=dead_units
        ),
        testing.layer_look("out", spread=spread if head_spread is None else head_spread, gradient=0.1),
    )


def looks(*found):
    return testing.signals(*found)


def look_at(signals):
    return cases.look(RULE, signals)


def both(**fields):
    return looks(at(12, **fields), at(40, **fields))


ALIVE = {"zero": 0.0, "spread": 0.5, "gradient": 0.3}

FIRES = {
    "above_looks": both,
    "above_zero": lambda: both(zero=LIMITS["zero"]),
    "below_constant": lambda: both(head_spread=LIMITS["constant"] / 1.01),
    "died in training": lambda: looks(at(1, **ALIVE), at(12, **ALIVE), at(20), at(40)),
    "seen dead before gradients were asked for": lambda: looks(at(12, gradient=None), at(40)),
}
QUIET = {
    "below_zero": lambda: both(zero=LIMITS["zero"] - 0.001),
    "above_constant": lambda: both(head_spread=LIMITS["constant"] * 1.01),
    "alive": lambda: both(**ALIVE),
    "nearly all units dead in a net that learns": lambda: both(zero=0.0, dead_units=0.98, spread=0.3, gradient=0.2),
    "a saturated softmax: constant, units alive, no gradient": lambda: both(zero=0.0),
    "gradients still flow": lambda: both(gradient=1e-12),
    "came back to life": lambda: looks(at(12), at(40), at(50, **ALIVE)),
    "a dead branch beside a living one": lambda: both(head_spread=0.4),
    "a network without layers": lambda: looks(testing.look(1), testing.look(2)),
}
SKIPS = {
    "no look": (looks, None),
    "below_looks": (lambda: looks(at(12)), "gradients"),
    "below_looks after a living one": (lambda: looks(at(1, **ALIVE), at(12)), "gradients"),
    "gradients not seen": (lambda: both(gradient=None), "gradients"),
}

test_cases = cases.runner(RULE, fires=FIRES, quiet=QUIET, skips=SKIPS)


def test_it_names_the_layer_its_units_and_when_it_died():
    ((finding,), _) = cases.look(RULE, FIRES["died in training"]())
    assert finding.subject == "dense"
    assert "all 32 units of `dense` are zero for every example since step 20, alive at step 12" in finding.message
    assert finding.evidence["dead_since"].value == 20
    assert finding.evidence["last_alive"].value == 12
    assert "axis" not in " ".join(finding.helps)


def test_a_layer_without_parameters_is_named_with_the_one_that_feeds_it():
    def one(step):
        return testing.look(
            step,
            testing.layer_look("dense", gradient=0.0, zero=0.0, spread=0.2),
            testing.layer_look("relu", kind="ReLU", zero=1.0, spread=0.0),
            testing.layer_look("out", spread=0.0, gradient=0.1),
        )

    ((finding,), _) = look_at(looks(one(1), one(2)))
    assert finding.subject == "dense"
    assert "`dense` (behind its activation `relu`)" in finding.message


@pytest.mark.parametrize("normalized", [False, True])
def test_batch_normalization_is_not_offered_behind_itself(normalized):
    known = [Attachment((testing.layer("dense" if normalized else "bn"),))]
    ((finding,), _) = look_at(looks(*known, at(12), at(40)))
    offered = any("put batch normalization between" in help_ for help_ in finding.helps)
    assert offered is not normalized
    assert ("a smaller learning rate only delays it" in finding.notes) is not normalized


def test_two_looks_at_one_step_are_one():
    findings, skipped = look_at(looks(at(12), at(12)))
    assert findings == []
    assert [s.needs for s in skipped] == ["gradients"]


def test_dead_from_the_first_look_has_no_last_step_alive():
    ((finding,), _) = cases.look(RULE, both())
    assert "since step 12:" in finding.message
    assert "last_alive" not in finding.evidence


@pytest.mark.parametrize(
    ("cells", "innocent"),
    [
        ([], False),
        ([testing.cells(40, training={"batch": 0.1, "running": 0.1})], True),
        ([testing.cells(40, training={"batch": 0.1, "running": 0.05}, examples=20)], True),
        ([testing.cells(40, training={"batch": 0.4, "running": 0.1})], False),
        # Measured while it was alive
        ([testing.cells(5, training={"batch": 0.1, "running": 0.1})], False),
    ],
)
def test_the_running_statistics_are_declared_innocent_once_measured(cells, innocent):
    ((finding,), _) = look_at(looks(at(12), at(40), *cells))
    assert any("innocent" in note for note in finding.notes) is innocent
