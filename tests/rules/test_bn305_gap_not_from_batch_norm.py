import numpy as np
import pytest

from bnwatch import testing
from bnwatch.evidence import Cell, Cells
from bnwatch.records import EvaluationRecord
from tests.rules import cases

RULE = "BN305"
# A z test of two samples of 1,000, .8 right in the first, gives p = .00101 at .742 in the second and .00085 at .741.
CHANCE, LOSS = 0.742, 0.741


def row(batch, running=None, population=None):
    running = batch if running is None else running
    return {"batch": batch, "running": running, "population": running if population is None else population}


def run(training, evaluation, *, examples=1000, extra=(), **more):
    measured = testing.cells(2, training=training, evaluation=evaluation, examples=examples, **more)
    return testing.signals(*extra, measured)


def gap(accuracy):
    return EvaluationRecord(2, 0, accuracy, examples=1000, train_accuracy=0.8, train_examples=1000)


def labelled(known, new, *, right=0):
    """All training examples are right; of the evaluation examples ``right`` are."""
    known, new = (np.asarray(labels, np.int64) for labels in (known, new))
    wrong = np.where(np.arange(len(new)) < right, new, (new + 1) % 10)
    training = dict.fromkeys(("batch", "running", "population"), Cell(known, known))
    evaluation = dict.fromkeys(("batch", "running", "population"), Cell(wrong, new))
    return testing.signals(Cells(2, 0, 10, training, evaluation))


def sorted_by_class(unseen):
    """Of 1,000 evaluation labels, ``unseen`` are of class 9, which is not among the training labels."""
    return labelled(np.arange(1000) % 9, [9] * unseen + [0] * (1000 - unseen))


def entered(*sites, step=2, training=1.0):
    """A gap that no statistics close, and how evaluation inputs enter the layers."""
    return run(row(training), row(0.6), extra=[testing.entering(step, *sites)])


INFO = {
    "above_same": lambda: entered(testing.site_shift("a", shift=1.0, p=0.0051), testing.site_shift("b", p=1.0)),
    "below_same": lambda: entered(testing.site_shift("a", shift=1.0, p=0.0049), testing.site_shift("b", p=1.0)),
    "above_apart": lambda: entered(testing.site_shift(shift=0.101)),
    "below_apart": lambda: entered(testing.site_shift(shift=0.099, ratio=1.1)),
    "overfitting": lambda: run(row(1.0), row(0.554, 0.567, 0.557)),
    "above_gap": lambda: run(row(0.9), row(0.849), examples=10_000),
    "below_alpha": lambda: run(row(0.8), row(LOSS)),
    "below_part": lambda: run(row(0.9), row(0.619, 0.6)),
    "above_unseen": lambda: sorted_by_class(201),
    "below_unseen": lambda: sorted_by_class(199),
    "labels that do not belong to their inputs": lambda: run(row(0.99), row(0.1)),
    "classes that were never trained": lambda: sorted_by_class(1000),
    "all evaluation data are harder": lambda: run(row(0.85), row(0.6)),
}
QUIET = {
    "below_gap": lambda: run(row(0.9), row(0.851), examples=10_000),
    "above_alpha": lambda: run(row(0.8), row(CHANCE)),
    "above_part": lambda: run(row(0.9), row(0.661, 0.6)),
    "running statistics cost accuracy on training data": lambda: run(row(1.0, 0.8), row(0.6)),
    "evaluation inputs that are distributed otherwise": lambda: run(row(0.999), row(0.987, 0.486)),
    "re-estimated statistics restore it": lambda: run(row(0.9), row(0.6, 0.6, 0.85)),
    "no gap": lambda: run(row(0.9), row(0.89)),
    "evaluation is better": lambda: run(row(0.9), row(0.98)),
}
SKIPS = {
    "nothing was seen": (testing.signals, None),
    "above_alpha of the gap": (lambda: testing.signals(gap(CHANCE)), None),
    "below_alpha of the gap": (lambda: testing.signals(gap(LOSS)), "cells"),
    "no training examples": (lambda: run(None, row(0.5), missing="none kept"), None),
    "no evaluation examples": (lambda: run(row(0.5), None), None),
}

test_cases = cases.runner(RULE, info=INFO, quiet=QUIET, skips=SKIPS)


@pytest.mark.parametrize(
    ("case", "words"),
    [
        (INFO["overfitting"], "it looks like overfitting: 100.0% of the training examples"),
        (INFO["above_unseen"], "20% of the evaluation labels are of classes that are not among the 1,000"),
        (lambda: sorted_by_class(199), "likely the labels of one of the two do not belong"),
        (INFO["labels that do not belong to their inputs"], "what guessing gives: likely the labels of one"),
        (lambda: run(row(0.99), row(0.004)), "worse than guessing: likely the labels of one"),
        (lambda: run(row(0.47), row(0.09)), "what guessing gives: likely the labels of one"),
        (INFO["all evaluation data are harder"], "the two sets differ otherwise"),
        (INFO["above_same"], "it looks like overfitting"),
        (INFO["below_same"], "training examples that went through the evaluation's preprocessing"),
        (INFO["above_apart"], "training examples that went through the evaluation's preprocessing"),
        (INFO["below_apart"], "it looks like overfitting"),
        (lambda: entered(testing.site_shift("a", p=0.5), testing.site_shift("b", shift=2.0)), "like overfitting"),
        (lambda: entered(testing.site_shift(shift=2.0), step=1), "it looks like overfitting"),
    ],
    ids=[
        "overfitting",
        "above_unseen",
        "below_unseen",
        "guessing",
        "worse than guessing",
        "guessing, and still learning",
        "harder",
        "above_same",
        "below_same",
        "above_apart",
        "below_apart",
        "from the second layer on",
        "inputs of another time",
    ],
)
def test_what_it_looks_like(case, words):
    ((finding,), _) = cases.look(RULE, case())
    assert any(words in note for note in finding.notes[1:])
    assert len([note for note in finding.notes if "what decides" in note]) == ("of classes that are not" not in words)


def test_batch_norm_is_cleared_in_the_first_line():
    ((finding,), _) = cases.look(RULE, INFO["overfitting"]())
    assert finding.message == (
        "evaluation accuracy is 43.3 points below training accuracy, and batch normalization is not why: 56.7% with "
        "running and 55.4% with batch statistics"
    )


def test_older_cells_go_on_to_hold_while_new_ones_are_asked_for():
    later = EvaluationRecord(9, 0, LOSS, examples=1000, train_accuracy=0.8, train_examples=1000)
    findings, skipped = cases.look(RULE, run(row(1.0), row(0.567), extra=[later]))
    assert len(findings) == 1
    assert [s.needs for s in skipped] == ["cells"]


def test_rare_classes_may_be_missing_by_chance():
    """Of 100 classes, 50 training labels hold half at most."""
    rng = np.random.default_rng(0)
    fed = labelled(rng.integers(0, 100, 50), rng.integers(0, 100, 1000))
    assert fed.cells.unseen == 0.0
