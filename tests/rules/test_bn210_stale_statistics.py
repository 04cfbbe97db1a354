from dataclasses import replace

import pytest

from bnwatch import testing
from bnwatch.moments import binomial_interval as interval
from bnwatch.records import Attachment, EvaluationRecord
from tests.rules import cases

RULE = "BN210"


def swapped(measured=None, *, step=9, by="keras 3", swapped=True, **fields):
    known = Attachment((testing.layer(),), framework=by)
    record = EvaluationRecord(9, 0, 0.9, swapped=swapped, **fields)
    return testing.signals(known, record, *([] if measured is None else [measured]))


def cells(lost, examples=500, *, step=9, split="evaluation", population=0.9):
    """Running statistics lose ``lost`` examples that batch statistics get right; p = 2^-lost, .0078 for 7."""
    row = {"batch": 0.9, "running": 0.9 - lost / examples, "population": population}
    return testing.cells(step, **{split: row}, examples=examples)


def ended(lost, *, swapped=True):
    """Training puts other weights into the model when it ends, behind the last evaluation."""
    known = Attachment((testing.layer(),), framework="keras 3")
    measured = replace(cells(lost), swapped=swapped)
    return testing.signals(known, EvaluationRecord(9, 0, 0.9, swapped=False), measured)


def back(accuracy, *, running=0.9, split="evaluation", swapped=False):
    """Other weights are evaluated on 500 examples, and taken out again before the experiment."""
    known = Attachment((testing.layer(),), framework="keras 3")
    record = EvaluationRecord(9, 0, accuracy, examples=500, swapped=True)
    row = {"batch": 0.9, "running": running, "population": 0.9}
    measured = replace(testing.cells(9, **{split: row}, examples=500), swapped=swapped)
    return testing.signals(known, record, measured)


# the first accuracy whose interval does not reach down to that of .9 in 500 examples
APART = next(n for n in range(450, 0, -1) if interval(n / 500, 500)[1] < interval(0.9, 500)[0]) / 500

FIRES = {
    "other weights do worse than those of the training": lambda: back(APART),
    "swapped when training ends": lambda: ended(50),
    "averaged weights": lambda: swapped(
        testing.cells(
            9,
            training={"batch": 1.0, "running": 0.8, "population": 1.0},
            evaluation={"batch": 0.98, "running": 0.78, "population": 0.98},
        )
    ),
    "above_cost": lambda: swapped(cells(11, 2000)),
    "below_alpha": lambda: swapped(cells(7)),
    "training data alone": lambda: swapped(cells(50, split="training")),
    "measured later": lambda: swapped(cells(50, step=20)),
    "statistics of yet another training": lambda: swapped(cells(50), moved=("bn",)),
}
INFO = {
    "other weights may do worse than those of the training": lambda: back(APART + 1 / 500),
    "what the weights of the training lose is no matter of the others": lambda: back(0.8, running=0.8),
    "how those of the training do is not known": lambda: back(0.5, split="training"),
    "below_cost": lambda: swapped(cells(9, 2000)),
    "above_alpha": lambda: swapped(cells(6)),
    "no cost": lambda: swapped(cells(0)),
    "a cost that a re-estimate does not restore": lambda: swapped(cells(50, population=0.81)),
}
QUIET = {
    "swapped when training ends, with statistics that fit": lambda: ended(0),
    "nothing swapped when training ends": lambda: ended(50, swapped=False),
    "the weights of the last step": lambda: swapped(cells(50), swapped=False),
    "the best checkpoint, with its statistics": lambda: swapped(cells(0), moved=("bn",)),
    "swapped once, and back": lambda: testing.signals(
        EvaluationRecord(1, 0, swapped=True), EvaluationRecord(2, 0, swapped=False)
    ),
}
SKIPS = {
    "no evaluation": (lambda: testing.signals(testing.snapshot(1)), None),
    "not known": (lambda: swapped(swapped=None), None),
    "a checkpoint, not measured": (lambda: swapped(moved=("bn",)), "cells"),
}

test_cases = cases.runner(RULE, fires=FIRES, info=INFO, quiet=QUIET, skips=SKIPS)


@pytest.mark.parametrize("measured", [None, cells(50, step=4)])
def test_what_is_not_measured_is_asked_for(measured):
    ((finding,), (skipped,)) = cases.look(RULE, swapped(measured))
    assert str(finding.severity) == "info"
    assert finding.notes == ("what it costs is not measured yet",)
    assert finding.table is None
    assert skipped.needs == "cells"


def test_what_it_costs_is_said_with_what_restores_it():
    ((finding,), skipped) = cases.look(RULE, FIRES["averaged weights"]())
    assert skipped == []
    assert "are still those of the other weights, which costs accuracy" in finding.message
    assert "78.0% with the running statistics and 98.0% with re-estimated ones" in finding.notes[0]
    assert [row[0] for row in finding.table.rows] == ["training data", "evaluation data"]


@pytest.mark.parametrize(("framework", "said"), [("keras 3", "bnwatch.keras.recalibrate"), ("", "frozen weights")])
def test_the_re_estimate_of_the_framework_is_named(framework, said):
    ((finding,), _) = cases.look(RULE, swapped(cells(50), by=framework))
    assert said in finding.helps[0]


def test_weights_that_training_ended_with_are_named_so():
    ((finding,), skipped) = cases.look(RULE, ended(50))
    assert skipped == []
    assert finding.message.startswith("the weights that training ended with are not those of the last training step")
    assert "the running statistics do not fit them, which costs accuracy" in finding.message


def test_what_was_measured_with_the_weights_of_the_training_is_not_said_of_the_others():
    ((finding,), skipped) = cases.look(RULE, back(0.8, running=0.8))
    assert skipped == []
    assert finding.table is None
    assert finding.notes == (
        "what it costs is not measured: the weights of the training were back when the experiment ran",
    )
    ((finding,), _) = cases.look(RULE, back(APART))
    assert "accuracy is lower with them" in finding.message
    assert f"gave {APART:.1%} with them, and the weights of the training give 90.0%" in finding.notes[0]
    ((finding,), _) = cases.look(RULE, back(0.8, running=0.8, swapped=True))
    assert finding.table is not None
