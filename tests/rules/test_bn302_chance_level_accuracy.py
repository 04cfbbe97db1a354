import pytest
from scipy import stats

from bnwatch import moments, testing
from bnwatch.records import EvaluationRecord
from tests.rules import cases

RULE = "BN302"
LIMITS = {name: threshold.value for name, threshold in cases.rule(RULE).thresholds.items()}
EXAMPLES = 1000
# The most that a guesser among ten classes reaches with probability alpha or more.
MOST = int(stats.binom.isf(LIMITS["alpha"], EXAMPLES, 0.1))


def evaluations(*accuracies, train=None, classes=10, majority=None, examples=EXAMPLES, train_examples=EXAMPLES):
    return [
        EvaluationRecord(
            10 * n, n - 1, accuracy, examples=examples, train_accuracy=accuracy if train is None else train,
            train_examples=train_examples, classes=classes, majority=majority,
        )
        for n, accuracy in enumerate(accuracies, start=1)
    ]  # fmt: skip


def looks(spread, number=2):
    layers = (
        testing.layer_look("conv"),
        testing.layer_look("dense", spread=spread),
        testing.layer_look("out", spread=spread),
    )
    return [testing.look(n, *layers) for n in range(1, number + 1)]


def at(*items):
    return testing.signals(*items)


def examples_for(margin):
    return next(n for n in range(1, 10**4) if moments.binomial_interval(0.1, n)[1] - 0.1 <= margin)


ENOUGH = examples_for(LIMITS["margin"])
INNOCENT = testing.cells(10, evaluation={"batch": 0.1, "running": 0.1})

FIRES = {
    "above_patience": lambda: at(*evaluations(0.1, 0.1, 0.1)),
    "below_constant": lambda: at(*evaluations(0.1), *looks(LIMITS["constant"] / 1.01)),
    "above_alpha": lambda: at(*evaluations(*[MOST / EXAMPLES] * 3)),
    "below_margin": lambda: at(*evaluations(*[0.1] * 3, examples=ENOUGH, train_examples=ENOUGH)),
    "training examples tell where the others are few": lambda: at(*evaluations(*[0.1] * 3, examples=10)),
    "a constant predictor of the most frequent class": lambda: at(*evaluations(*[0.6] * 3, classes=2, majority=0.6)),
    "training accuracy not known": lambda: at(
        *(EvaluationRecord(n, 0, 0.1, examples=1000, classes=10) for n in (1, 2, 3))
    ),
    "few examples, and the output is constant": lambda: at(
        *evaluations(0.1, examples=10, train_examples=10), *looks(0.0)
    ),
}
QUIET = {
    "below_alpha": lambda: at(*evaluations(*[(MOST + 1) / EXAMPLES] * 3)),
    "training accuracy is above chance": lambda: at(*evaluations(0.1, 0.1, 0.1, train=0.4)),
    "it got away in the end": lambda: at(*evaluations(0.1, 0.1, 0.1, 0.4)),
    "a fair coin that is right by skill": lambda: at(*evaluations(0.6, 0.6, 0.6, classes=2)),
}
SKIPS = {
    "no evaluation": (at, None),
    "no accuracy": (lambda: at(EvaluationRecord(1, 0, None, classes=10)), None),
    "classes not known": (lambda: at(*evaluations(0.1, 0.1, 0.1, classes=0)), "cells"),
    "below_patience": (lambda: at(*evaluations(0.1, 0.1)), "look"),
    "above_constant": (lambda: at(*evaluations(0.1), *looks(LIMITS["constant"] * 1.01)), "look"),
    "one look may be a passing state": (lambda: at(*evaluations(0.1), *looks(0.0, number=1)), "look"),
    "above_margin": (lambda: at(*evaluations(*[0.1] * 3, examples=ENOUGH - 1, train_examples=ENOUGH - 1)), None),
}

test_cases = cases.runner(RULE, fires=FIRES, quiet=QUIET, skips=SKIPS)


def test_the_boundary_is_where_the_test_puts_it():
    assert stats.binom.sf(MOST - 1, EXAMPLES, 0.1) > LIMITS["alpha"] > stats.binom.sf(MOST, EXAMPLES, 0.1)


def test_the_first_constant_layer_is_named():
    ((finding,), _) = cases.look(RULE, at(*evaluations(0.1), *looks(0.0), INNOCENT))
    assert "`dense` is the first layer" in finding.notes[1]
    assert "same output for every example" in finding.message


def test_it_asks_for_the_cells_and_then_speaks_of_them():
    findings, skipped = cases.look(RULE, at(*evaluations(0.1, 0.1, 0.1)))
    assert len(findings) == 1
    assert [s.needs for s in skipped] == ["cells"]
    ((finding,), skipped) = cases.look(RULE, at(*evaluations(0.1, 0.1, 0.1), INNOCENT))
    assert skipped == []
    assert "innocent" in finding.notes[-1]


def test_running_statistics_that_are_to_blame_are_not_called_innocent():
    guilty = testing.cells(10, evaluation={"batch": 0.4, "running": 0.1})
    ((finding,), _) = cases.look(RULE, at(*evaluations(0.1, 0.1, 0.1), guilty))
    assert not any("innocent" in note for note in finding.notes)
    assert "BN301" in cases.rule(RULE).causes


def test_the_accuracies_and_their_chance_are_in_the_evidence():
    ((finding,), _) = cases.look(RULE, at(*evaluations(0.1, 0.1, 0.1), INNOCENT))
    assert finding.evidence["chance"].value == pytest.approx(0.1)
    assert finding.evidence["evaluations"].value == 3
    assert finding.evidence["evaluation_accuracy"].interval == pytest.approx(moments.binomial_interval(0.1, 1000))
    assert finding.evidence["training_accuracy"].value == 0.1
