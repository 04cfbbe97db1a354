import dataclasses

import numpy as np
import pytest

from bnwatch import testing
from bnwatch.records import EvaluationRecord
from tests.rules import cases

RULE = "BN301"
# A z test of two samples of 1,000, .8 right in the first, gives p = .00101 at .742 in the second and .00085 at .741.
CHANCE, LOSS = 0.742, 0.741


def measured(batch, running, *, population=None, examples=10_000, split="evaluation", **more):
    row = {"batch": batch, "running": running, "population": batch if population is None else population}
    return testing.signals(testing.cells(2, **{split: row}, examples=examples, **more))


def paired(lost, examples=500):
    """``lost`` examples are right under batch statistics only, none under running statistics only: p = 2^-lost."""
    return measured(0.9, 0.9 - lost / examples, examples=examples)


def gap(accuracy, *, extra=()):
    record = EvaluationRecord(2, 0, accuracy, examples=1000, train_accuracy=0.8, train_examples=1000)
    return testing.signals(*extra, record)


def shared():
    draws = testing.normal(4, 64), testing.normal(4, 64, mean=1.0)
    return testing.signals(*testing.train(testing.layer(), *draws, steps=16), EvaluationRecord(16, 0, 0.5))


FIRES = {
    "the founding program": lambda: testing.signals(
        testing.cells(
            2,
            training={"batch": 1.0, "running": 0.88, "population": 0.9},
            evaluation={"batch": 0.98, "running": 0.855, "population": 0.87},
        )
    ),
    "above_cost": lambda: measured(0.9, 0.8899),
    "below_alpha": lambda: paired(10),
    "training data alone": lambda: measured(0.9, 0.5, split="training"),
}
QUIET = {
    "below_cost": lambda: measured(0.9, 0.8901),
    "above_alpha": lambda: paired(9),
    "running statistics are better, as with tiny batches": lambda: measured(0.66, 0.857),
    "evaluation inputs that are distributed otherwise": lambda: testing.signals(
        testing.cells(
            2,
            training={"batch": 0.999, "running": 0.998, "population": 1.0},
            evaluation={"batch": 0.987, "running": 0.486, "population": 0.486},
        )
    ),
    "ordinary overfitting": lambda: testing.signals(
        EvaluationRecord(2, 0, 0.567, examples=1000, train_accuracy=1.0, train_examples=1000),
        testing.cells(
            2,
            training={"batch": 1.0, "running": 1.0, "population": 1.0},
            evaluation={"batch": 0.569, "running": 0.567, "population": 0.567},
        ),
    ),
    "all at chance": lambda: measured(0.104, 0.104),
}
SKIPS = {
    "nothing was seen": (testing.signals, None),
    "nothing calls for it": (lambda: gap(0.8), None),
    "above_alpha of the gap": (lambda: gap(CHANCE), None),
    "below_alpha of the gap": (lambda: gap(LOSS), "cells"),
    "sites that differ": (shared, "cells"),
    "augmentation makes training harder": (lambda: gap(0.95), None),
}

test_cases = cases.runner(RULE, fires=FIRES, quiet=QUIET, skips=SKIPS)


@pytest.mark.parametrize(("population", "helps", "restored"), [(0.89, "re-estimate", True), (0.6, "two kinds", False)])
def test_what_a_re_estimate_restores_names_the_cause(population, helps, restored):
    ((finding,), _) = cases.look(RULE, measured(0.9, 0.5, population=population, split="training"))
    assert helps in finding.helps[0]
    assert ("do not restore" in finding.notes[1]) is not restored


def test_all_cells_are_in_the_table():
    ((finding,), _) = cases.look(RULE, FIRES["the founding program"]())
    assert finding.table.rows == (
        ("training data", 100.0, 88.0, 90.0, 1000.0),
        ("evaluation data", 98.0, 85.5, 87.0, 1000.0),
    )
    assert finding.evidence["cost"].value == pytest.approx(0.125)
    low, high = finding.evidence["accuracy"].interval
    assert low < 0.855 < high


def test_what_was_not_measured_says_so():
    ((finding,), _) = cases.look(
        RULE,
        testing.signals(testing.cells(2, evaluation={"batch": 0.9, "running": 0.5}, missing="no training examples")),
    )
    assert finding.table.rows[0][3] == "not measured"
    assert finding.notes[1:] == ("measured on part of the data only: no training examples",)


def test_older_cells_go_on_to_hold_while_new_ones_are_asked_for():
    fed = gap(LOSS, extra=[dataclasses.replace(testing.cells(1, evaluation={"batch": 0.9, "running": 0.5}))])
    findings, skipped = cases.look(RULE, fed)
    assert len(findings) == 1
    assert [s.needs for s in skipped] == ["cells"]


def test_pairing_counts_not_the_accuracies_alone():
    """Forty examples won and thirty lost are no significant difference, though ten points apart are."""
    cells = testing.cells(2, evaluation={"batch": 0.9, "running": 0.9}, examples=500)
    running, batch = cells.evaluation["running"], cells.evaluation["batch"]
    wrong = np.where(np.arange(500) < 40, (running.labels + 1) % 10, running.predicted)
    cells.evaluation["running"] = dataclasses.replace(running, predicted=wrong)
    other = np.where((np.arange(500) >= 100) & (np.arange(500) < 130), (batch.labels + 1) % 10, batch.predicted)
    cells.evaluation["batch"] = dataclasses.replace(batch, predicted=other)
    assert cells.evaluation["batch"].accuracy - cells.evaluation["running"].accuracy == pytest.approx(0.02)
    assert cases.look(RULE, testing.signals(cells)) == ([], [])
