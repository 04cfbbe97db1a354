from bnwatch import testing
from tests.rules import cases


def counts(*numbers):
    spec = testing.layer()
    return testing.signals(
        *(testing.snapshot(n, testing.call(spec, mean=n, count=count)) for n, count in enumerate(numbers, start=1))
    )


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
