import pytest

from bnwatch import testing
from bnwatch.records import EvaluationRecord
from tests.rules import cases

RULE = "BN303"
LOST = {"batch": 0.95, "running": 0.6, "population": 0.95}
FINE = {"batch": 0.95, "running": 0.95, "population": 0.95}


def run(*accuracies, training=(), examples=2000, row=None, measured=1000):
    trained = training or [0.9 + 0.005 * n for n in range(len(accuracies))]
    seen = [
        EvaluationRecord(n, n, accuracy, examples=examples, train_accuracy=train, train_examples=5000)
        for n, (accuracy, train) in enumerate(zip(accuracies, trained, strict=True))
    ]
    return testing.signals(*seen, *([testing.cells(9, evaluation=row, examples=measured)] if row else []))


JUMPS = (0.8, 0.4, 0.85, 0.5, 0.9)


def cells(batch, running, measured=10_000):
    return run(*JUMPS, row={"batch": batch, "running": running, "population": batch}, measured=measured)


def settling(decay):
    """The same jumps, in the first steps of a training."""
    signals = run(*JUMPS)
    signals.observe(testing.snapshot(1, testing.call(testing.layer(decay=decay), updates=1)))
    signals.observe(testing.snapshot(4, testing.call(testing.layer(decay=decay), running_mean=0.1, updates=4)))
    return signals


FIRES = {
    "jumps, unmeasured": lambda: run(*JUMPS),
    "jumps, and running statistics cost accuracy": lambda: run(*JUMPS, row=LOST),
    "above_evaluations": lambda: run(0.8, 0.4, 0.8, 0.4),
    "above_falls": lambda: run(0.8, 0.4, 0.8, 0.4, 0.8),
    "above_jump": lambda: run(0.8, 0.699, 0.8, 0.699, 0.8, examples=50_000),
    "above_errors": lambda: run(0.8, 0.6, 0.8, 0.6, 0.8, examples=162),
    "above_cost": lambda: cells(0.9, 0.8899),
    "below_alpha": lambda: cells(0.9, 0.88, 500),
}
FIRES["above_alpha and not known to be harmless"] = lambda: cells(0.9, 0.882, 500)
INFO = {
    "the last weights cost nothing": lambda: run(*JUMPS, row=FINE),
    "below_cost": lambda: cells(0.9, 0.8901),
}
QUIET = {
    "below_evaluations": lambda: run(0.8, 0.4, 0.8),
    "below_falls": lambda: run(0.8, 0.4, 0.8, 0.85, 0.9),
    "below_jump": lambda: run(0.8, 0.701, 0.8, 0.701, 0.8, examples=50_000),
    "below_errors": lambda: run(0.8, 0.6, 0.8, 0.6, 0.8, examples=158),
    "progress": lambda: run(0.3, 0.5, 0.7, 0.8, 0.9),
    "training jumps as well: the learning rate": lambda: run(*JUMPS, training=(0.8, 0.5, 0.85, 0.5, 0.9)),
    "a few points up and down": lambda: run(0.96, 0.99, 0.95, 0.98, 0.96),
    "training accuracy is not known": lambda: run(*JUMPS, training=[None] * 5),
    "how many examples is not known": lambda: run(*JUMPS, examples=0),
    "initial values that are still to go": lambda: settling(0.99),
    "long ago": lambda: run(0.8, 0.4, 0.8, 0.4, *([0.9] * 9)),
}

test_cases = cases.runner(RULE, fires=FIRES, info=INFO, quiet=QUIET)


@pytest.mark.parametrize(
    ("case", "words"),
    [
        (FIRES["jumps, and running statistics cost accuracy"], "a re-estimate restores it"),
        (FIRES["jumps, unmeasured"], "likely the running statistics; what decides"),
        (FIRES["above_cost"], "a re-estimate restores it"),
        (INFO["below_cost"], "innocent at the last evaluation"),
        (lambda: cells(0.9, 0.882, 500), "likely the running statistics"),
        (INFO["the last weights cost nothing"], "innocent at the last evaluation"),
    ],
    ids=["costs", "unmeasured", "above_cost", "below_cost", "above_alpha", "innocent"],
)
def test_what_is_behind_it_is_said_as_far_as_it_is_known(case, words):
    ((finding,), _) = cases.look(RULE, case())
    assert sum(words in note for note in finding.notes) == 1


def test_the_evaluations_are_listed():
    ((finding,), skipped) = cases.look(RULE, FIRES["jumps, unmeasured"]())
    assert finding.message == (
        "evaluation accuracy fell 2 times within 5 evaluations, by up to 40 points, and training accuracy did not"
    )
    assert [row[1] for row in finding.table.rows] == [80.0, 40.0, 85.0, 50.0, 90.0]
    assert [s.needs for s in skipped] == ["cells"]
