import pytest

from bnwatch import testing
from bnwatch.records import Structure
from tests.rules import cases


def planned(*decays, steps=10_000, epochs=1, sites=1, trainable=True):
    layers = tuple(
        testing.usage(f"bn_{n}", *(testing.place(f"bn_{n}", k) for k in range(sites)), decay=d, trainable=trainable)
        for n, d in enumerate(decays)
    )
    return lambda: testing.signals(Structure(layers, steps_per_epoch=steps, epochs=epochs))


INFO = {
    "below_memory": planned(0.499),
    "PyTorch's momentum": planned(0.1),
    "above_weight": planned(0.99, steps=298),
    "never forgets": planned(1.0),
    "calls that are hidden count as one": planned(0.99, steps=200, sites=0),
    "two kinds at once": planned(0.1, 0.9, 0.9999),
}
QUIET = {
    "above_memory": planned(0.5),
    "below_weight": planned(0.99, steps=299),
    "several epochs": planned(0.99, steps=30, epochs=10),
    "several call sites, each an update": planned(0.99, steps=150, sites=2),
    "PointNet, on purpose": planned(0.0),
    "frozen": planned(0.1, 0.9999, trainable=False),
    "no layer": planned(),
}
SKIPS = {
    "how long is not known": (lambda: testing.signals(Structure((testing.usage(),))), None),
    "nothing known": (testing.signals, None),
}

test_cases = cases.runner("BN202", info=INFO, quiet=QUIET, skips=SKIPS)


def test_a_short_memory_shows_without_a_plan():
    findings, skipped = cases.look("BN202", testing.signals(Structure((testing.usage(decay=0.1),))))
    assert [f.subject for f in findings] == ["model"]
    assert findings[0].evidence["effective_batches"].value == pytest.approx(1.1 / 0.9)
    assert len(skipped) == 1


def test_each_decay_has_a_subject_of_its_own():
    findings, _ = cases.look("BN202", INFO["two kinds at once"]())
    assert [f.subject for f in findings] == ["bn_0", "bn_2"]


def test_what_is_left_at_the_end_and_a_decay_that_fits():
    ((finding,), _) = cases.look("BN202", planned(0.99, steps=100)())
    assert finding.message == (
        "after the planned 100 steps, 36.6% of the running statistics are still what they are now: `bn_0`"
    )
    assert finding.evidence["initial_weight"].value == pytest.approx(0.99**100)
    assert finding.helps == ("decay 0.97 (Keras: momentum=0.97) or less, or a longer training",)
    assert 0.97**100 < 0.05


def test_the_threshold_is_what_its_reason_says():
    """Two standard deviations off, times what is left, is the shift from which BN201 speaks."""
    shift = cases.rule("BN201").thresholds["shift"].value
    assert 2 * cases.rule("BN202").thresholds["weight"].value == pytest.approx(shift)
