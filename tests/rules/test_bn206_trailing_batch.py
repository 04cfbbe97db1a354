import math

import pytest

from bnwatch import testing
from bnwatch.records import Attachment, EvaluationRecord
from tests.rules import cases

RULE = "BN206"
LOST = {"batch": 0.994, "running": 0.946, "population": 0.994}
FINE = {"batch": 0.99, "running": 0.99, "population": 0.99}


def run(last, *, usual=64, decay=0.5, row=None, samples=None, sampled=True, examples=1000, framework=None):
    """An epoch of 8 batches and the last, then an evaluation."""
    spec = testing.layer(channels=8, decay=decay)
    attached = [Attachment((spec,), framework=framework)] if framework else []
    fed = testing.signals(*attached, *testing.train(spec, testing.normal(8, usual), steps=8))
    calls = next(iter(testing.train(spec, testing.normal(8, last), steps=1))).calls
    if sampled:
        fed.observe(testing.snapshot(9, *calls))
        fed.tables[-1].column("effective_samples")[:] = usual if samples is None else samples
    fed.evaluate(EvaluationRecord(9, 0, 0.9, examples=1000))
    if row is not None:
        fed.cells = testing.cells(9, training=row, examples=examples)
    return fed


FIRES = {
    "one example at decay .5": lambda: run(1, row=LOST),
    "one example, a regression": lambda: run(1),
    "below_part": lambda: run(15, decay=0.1, row=LOST),
    "above_shift": lambda: run(1, decay=0.899, row=LOST),
    "above_alone": lambda: run(1, decay=0.749),
    "above_cost": lambda: run(1, row={"batch": 0.9, "running": 0.8899, "population": 0.9}, examples=10_000),
    "below_alpha": lambda: run(1, row={"batch": 0.9, "running": 0.88, "population": 0.9}, examples=500),
    "a map of 64 pixels that are worth one": lambda: run(64, usual=4096, samples=64, row=LOST),
    "decay 0": lambda: run(1, decay=0.0, row=LOST),
}
INFO = {
    "it costs nothing": lambda: run(1, row=FINE),
    "below_alone": lambda: run(1, decay=0.751),
    "below_cost": lambda: run(1, row={"batch": 0.9, "running": 0.8901, "population": 0.9}, examples=10_000),
    "above_alpha": lambda: run(1, row={"batch": 0.9, "running": 0.882, "population": 0.9}, examples=500),
    "a re-estimate does not restore it: no matter of the last batch": lambda: run(
        1, row={"batch": 0.99, "running": 0.6, "population": 0.65}
    ),
}
QUIET = {
    "above_part": lambda: run(17, decay=0.1, row=LOST),
    "below_shift": lambda: run(1, decay=0.901, row=LOST),
    "56 of 64": lambda: run(56, row=LOST),
    "one example at decay .99": lambda: run(1, decay=0.99, row=LOST),
    "PointNet: decay 0, full last batch": lambda: run(64, decay=0.0, row=LOST),
    "a map of 64 pixels that are worth as many": lambda: run(64, decay=0.5, usual=4096, samples=4096, row=LOST),
    "never updated": lambda: run(1, decay=1.0, row=LOST),
    "no evaluation": lambda: testing.signals(*testing.train(testing.layer(), testing.normal(4, 8), steps=4)),
}
SKIPS = {"the last step was not sampled": (lambda: run(1, sampled=False), None)}

test_cases = cases.runner(RULE, fires=FIRES, info=INFO, quiet=QUIET, skips=SKIPS)


def test_samples_at_the_end_of_epochs_are_not_the_usual_ones():
    """Where epochs are shorter than the interval of sampling, most samples are last batches."""
    fed = run(1, row=LOST)
    calls = next(iter(testing.train(testing.layer(channels=8, decay=0.5), testing.normal(8, 1), steps=1))).calls
    for step in range(20, 200, 10):
        fed.observe(testing.snapshot(step, *calls))
        fed.evaluate(EvaluationRecord(step, 0, 0.9, examples=1000))
    ((finding,), _) = cases.look(RULE, fed)
    assert finding.evidence["usual"].value == 64
    assert cases.look("BN204", fed) == ([], [])
    assert cases.look("BN205", fed) == ([], [])


def test_what_it_costs_is_asked_for():
    assert [s.needs for s in cases.look(RULE, run(1))[1]] == ["cells"]


def test_the_numbers_are_those_of_a_batch_of_k():
    """At decay .5 one example leaves half the variance, and moves the mean by half a standard deviation."""
    ((finding,), _) = cases.look(RULE, run(1, row=LOST))
    assert finding.evidence["shift"].value == 0.5
    assert finding.evidence["weight"].value == 0.5
    assert finding.evidence["held"].value == pytest.approx(math.sqrt(0.5), rel=0.2)
    assert finding.message == (
        "the last batch before evaluation holds 1 element a channel, others 64, and makes up 50% of the running "
        "statistics, which costs 4.8 points of training accuracy"
    )


@pytest.mark.parametrize(
    ("framework", "words"),
    [
        ("keras 3.15.1 (jax)", "drop_remainder"),
        ("chainer 7.8.1", "SerialIterator"),
        (None, "drop_remainder=True, repeat=True"),
    ],
)
def test_the_repair_is_in_the_words_of_the_framework(framework, words):
    ((finding,), _) = cases.look(RULE, run(1, row=LOST, framework=framework))
    assert words in finding.helps[0]
