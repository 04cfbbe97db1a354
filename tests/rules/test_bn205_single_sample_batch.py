import pytest

from bnwatch import testing
from bnwatch.records import EvaluationRecord, Structure
from tests.rules import cases


def counts(*numbers):
    spec = testing.layer()
    return testing.signals(
        *(testing.snapshot(n, testing.call(spec, mean=n, count=count)) for n, count in enumerate(numbers, start=1))
    )


def epochs(*, evaluated):
    """Ends of epochs, sampled in a row; the last of them is not evaluated yet."""
    fed = counts(64, 64, 1, 1, 1)
    for step in range(3, 3 + evaluated):
        fed.evaluate(EvaluationRecord(step, 0, 0.5))
    return fed


def convolution_of_one_example():
    return testing.signals(*testing.train(testing.layer(), testing.normal(4, 28 * 28), steps=4))


FIRES = {
    "above_samples": lambda: counts(1, 1),
    "all the time": lambda: counts(1, 1, 1, 1, 1),
    "since lately": lambda: counts(64, 64, 1, 1),
}
QUIET = {
    "below_samples": lambda: counts(1),
    "a trailing batch of one": lambda: counts(64, 64, 1),
    "a trailing batch of one now and then": lambda: counts(1, 64, 1),
    "the last batches of three epochs": lambda: epochs(evaluated=3),
    "the last batches of three epochs, the third before its evaluation": lambda: epochs(evaluated=2),
    "mended since": lambda: counts(1, 1, 64),
    "two elements": lambda: counts(2, 2, 2),
    "one picture of many pixels": convolution_of_one_example,
    "another layer has one element": lambda: testing.signals(
        testing.snapshot(1, testing.call(testing.layer("a"), count=1)),
        testing.snapshot(2, testing.call(testing.layer("b"), count=1)),
    ),
    "nothing seen": testing.signals,
}

test_cases = cases.runner("BN205", fires=FIRES, quiet=QUIET)


@pytest.mark.parametrize(
    ("batch", "elements", "found"), [(1, 1, 1), (2, 1, 0), (1, 2, 0), (1, None, 0), (None, 1, 0)], ids=str
)
def test_what_the_graph_says_before_training(batch, elements, found):
    layer = testing.usage("bn", testing.place(elements=elements))
    findings, skipped = cases.look("BN205", testing.signals(Structure((layer,), batch_size=batch)))
    assert [f.subject for f in findings] == ["bn"] * found
    assert skipped == []


@pytest.mark.parametrize(("counted", "found"), [((1,), 1), ((64,), 0), ((1, 1), 1), ((1, 64), 0)], ids=str)
def test_the_graph_is_believed_until_it_was_measured(counted, found):
    layer = testing.layer("bn")
    steps = (testing.snapshot(n, testing.call(layer, count=count)) for n, count in enumerate(counted, start=1))
    planned = Structure((testing.usage("bn", testing.place(elements=1)),), batch_size=1)
    findings, _ = cases.look("BN205", testing.signals(planned, *steps))
    assert [f.subject for f in findings] == ["bn"] * found
