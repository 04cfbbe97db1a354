import math

import pytest

from bnwatch import testing
from bnwatch.diagnosis import Severity
from bnwatch.records import EvaluationRecord
from tests.rules import cases

RULE = "BN304"
FINE = {"batch": 0.999, "running": 0.998, "population": 1.0}
SHIFTED = {"batch": 0.987, "running": 0.486, "population": 0.486}
X16 = testing.site_shift("bn", shift=7.2, ratio=16.0)
# A z test of two samples of 1,000, .8 right in the first, gives p = .00101 at .742 in the second and .00085 at .741.
CHANCE, LOSS = 0.742, 0.741


def run(*sites, training=FINE, evaluation=SHIFTED, examples=1000, untold=None, step=2, extra=()):
    return testing.signals(
        *extra,
        testing.cells(2, training=training, evaluation=evaluation, examples=examples),
        testing.entering(step, *(sites or (X16,)), untold=untold),
    )


def cost(batch, running, examples=10_000):
    row = {"batch": batch, "running": running, "population": running}
    fine = {"batch": 0.95, "running": 0.95}
    return run(testing.site_shift(shift=1.0), training=fine, evaluation=row, examples=examples)


def paired(lost, examples=500):
    """``lost`` examples are right under batch statistics only: p = 2^-lost."""
    return cost(0.9, 0.9 - lost / examples, examples)


def gap(accuracy, *, layers=()):
    return EvaluationRecord(
        2, 0, accuracy, examples=1000, train_accuracy=0.8, train_examples=1000, batch_statistics=layers
    )


def at_first(**difference):
    """No accuracy is lost; what enters the first layer differs all the same."""
    return run(testing.site_shift("bn", **difference), evaluation=FINE)


def astray(accuracy, **difference):
    """Evaluation inputs that are strongly different, and that no statistics help to 0.8."""
    row = dict.fromkeys(("batch", "running", "population"), accuracy)
    fine = {"batch": 0.8, "running": 0.8}
    return run(testing.site_shift("bn", **difference), training=fine, evaluation=row, examples=10_000)


FIRES = {
    "inputs x16": run,
    "above_gap": lambda: astray(0.749, shift=3.01),
    "above_gap, by the spread": lambda: astray(0.4, ratio=1 / 3.01),
    "above_cost": lambda: cost(0.9, 0.8899),
    "below_alpha": lambda: paired(10),
    "below_same": lambda: run(testing.site_shift("a", shift=1.0, p=0.0049), testing.site_shift("b", p=1.0)),
    "above_apart of the means": lambda: run(testing.site_shift(shift=0.101)),
    "above_apart of the spreads": lambda: run(testing.site_shift(ratio=math.exp(-0.101))),
    "from the second layer on": lambda: run(testing.site_shift("a", p=0.4), testing.site_shift("b", shift=2.0)),
    "an older look still holds": lambda: run(extra=[gap(CHANCE)]),
}
INFO = {
    "below_gap": lambda: astray(0.751, shift=3.01),
    "above_strong of the means": lambda: at_first(shift=3.01),
    "above_strong of the spreads": lambda: at_first(ratio=3.01),
    "above_strong of the spreads, the other way": lambda: at_first(ratio=1 / 3.01),
}
QUIET = {
    "below_cost": lambda: cost(0.9, 0.8901),
    "above_alpha": lambda: paired(9),
    "above_same": lambda: run(testing.site_shift("a", shift=1.0, p=0.0051), testing.site_shift("b", p=1.0)),
    "below_apart": lambda: run(testing.site_shift(shift=0.099, ratio=math.exp(-0.099))),
    "below_strong": lambda: at_first(shift=2.99, ratio=2.99),
    "augmentation: inputs differ and nothing is lost": lambda: at_first(shift=0.8, ratio=0.7),
    "strongly, but from the second layer on: what was learned by heart": lambda: run(
        testing.site_shift("a", p=0.2), testing.site_shift("b", shift=4.0), evaluation=FINE
    ),
    "ordinary overfitting": lambda: run(
        testing.site_shift("a", p=0.7),
        testing.site_shift("b", shift=0.5),
        training={"batch": 1.0, "running": 1.0, "population": 1.0},
        evaluation={"batch": 0.569, "running": 0.567, "population": 0.567},
    ),
    "running statistics that cost accuracy on both, which is BN301": lambda: run(
        testing.site_shift(shift=0.5), training={"batch": 1.0, "running": 0.88, "population": 0.9}
    ),
    "a re-estimate on training data restores it": lambda: run(
        evaluation={"batch": 0.9, "running": 0.8, "population": 0.86}
    ),
    "the same inputs": lambda: run(testing.site_shift(p=0.3)),
}
SKIPS = {
    "nothing was seen": (testing.signals, None),
    "nothing calls for it": (lambda: testing.signals(gap(0.8)), None),
    "above_alpha of the gap": (lambda: testing.signals(gap(CHANCE)), None),
    "below_alpha of the gap": (lambda: testing.signals(gap(LOSS)), "cells"),
    "augmentation makes training harder": (lambda: testing.signals(gap(0.95)), None),
    "no training examples": (lambda: testing.signals(testing.cells(2, evaluation=SHIFTED, missing="none kept")), None),
    "no evaluation examples": (lambda: testing.signals(testing.cells(2, training=FINE)), None),
    "what enters was not measured": (
        lambda: testing.signals(testing.cells(2, training=FINE, evaluation=SHIFTED)),
        None,
    ),
    "what enters is of another time": (lambda: run(step=1), None),
    "too few batches": (lambda: run(testing.site_shift(shift=9.0, p=None), untold="fewer than two"), None),
    "evaluation in training mode": (lambda: run(extra=[gap(LOSS, layers=("bn",))]), None),
}

test_cases = cases.runner(RULE, fires=FIRES, info=INFO, quiet=QUIET, skips=SKIPS)


def finding(signals):
    ((found,), _) = cases.look(RULE, signals)
    return found


def test_the_first_layer_at_which_they_differ_is_named_with_how():
    sites = [
        testing.site_shift("a", p=0.4),
        testing.site_shift("tower", index=0, shift=0.05, p=1e-4),
        testing.site_shift("tower", index=1, shift=2.25, ratio=0.5),
        *(testing.site_shift(f"bn_{n}", shift=4.0) for n in range(9)),
    ]
    found = finding(run(*sites))
    assert found.message == (
        "evaluation inputs differ from training inputs from `tower#1` on, by 2.25 standard deviations in the mean and "
        "a factor of 0.5 in the spread: running statistics cost 50.1 points of evaluation accuracy"
    )
    assert found.table.rows[0] == ("tower#1", 2.25, "0.5", "1e-09")
    assert len(found.table.rows) == 6
    assert found.further[0].rows[1][:3] == ("evaluation data", 98.7, 48.6)
    assert "preprocessing" in found.helps[0]
    assert (found.evidence["shift"].value, found.evidence["ratio"].value) == (2.25, 0.5)


@pytest.mark.parametrize(("p", "first"), [(0.0099, "a"), (0.0101, "b")])
def test_where_a_difference_that_is_certain_begins_each_layer_tells_by_itself(p, first):
    sites = [testing.site_shift("a", shift=1.0, p=p), *(testing.site_shift(n, shift=1.0, p=1e-9) for n in "bcd")]
    assert f"from `{first}` on" in finding(run(*sites)).message


@pytest.mark.parametrize(
    ("shift", "ratio", "note"),
    [
        (567.0, 254.0, "values 0 to 255 and 0 to 1: evaluation inputs are not scaled down"),
        (2.2, 1 / 256, "values 0 to 255 and 0 to 1: training inputs are not scaled down"),
        (9.0, 127.0, "values 0 to 255 and -1 to 1: evaluation"),
        (0.0, 15.9, "values 0 to 16 and 0 to 1: evaluation"),
        (1.9, 1.05, "only one pipeline subtracts a mean"),
        (0.9, 1.0, None),
        (1.9, 1.3, None),
        (9.0, 40.0, None),
    ],
)
def test_numbers_that_look_like_something_known_are_said_to(shift, ratio, note):
    notes = finding(run(testing.site_shift(shift=shift, ratio=ratio))).notes[1:]
    assert len(notes) == (note is not None)
    assert all("likely" in text and note in text for text in notes)


def test_what_no_statistics_mend_is_likely_and_says_what_decides():
    found = finding(astray(0.4, shift=5.0))
    assert found.message.endswith("; likely that is why 40.0 points of accuracy are lost")
    assert "40.0% with running statistics and 40.0% with those of their own batches" in found.notes[0]
    assert found.notes[1].startswith("what decides: the accuracy of training examples that went through")
    assert "costs no accuracy" in finding(astray(0.79, shift=5.0)).notes[0]


def test_older_cells_go_on_to_hold_while_new_ones_are_asked_for():
    later = EvaluationRecord(9, 0, 0.5)
    findings, skipped = cases.look(RULE, run(extra=[later]))
    assert [f.severity for f in findings] == [None]
    assert [s.needs for s in skipped] == ["cells"]
    findings, skipped = cases.look(RULE, run(testing.site_shift(shift=5.0), evaluation=FINE, extra=[later]))
    assert [f.severity for f in findings] == [Severity.INFO]
    assert [s.needs for s in skipped] == [None]


@pytest.mark.parametrize("signals", [case() for case in FIRES.values()])
def test_it_never_fires_together_with_bn301(signals):
    assert cases.look("BN301", signals)[0] == []
