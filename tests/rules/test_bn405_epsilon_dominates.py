import pytest
from scipy import stats

from bnwatch import testing
from bnwatch.records import EvaluationRecord
from tests.rules import cases

LIMITS = {name: threshold.value for name, threshold in cases.rule("BN405").thresholds.items()}
MOST = int(stats.binom.isf(LIMITS["alpha"], 1000, 0.1))


def entering(var, *, accuracy=0.1, evaluations=3, count=64, epsilon=1e-3, path="bn", examples=1000):
    spec, normal = testing.layer(path, epsilon=epsilon), testing.layer("later")
    return lambda: testing.signals(
        testing.snapshot(1, testing.call(spec, mean=0.1, var=var, count=count), testing.call(normal)),
        *(
            EvaluationRecord(
                n, n, accuracy, examples=examples, train_accuracy=accuracy, train_examples=1000, classes=10
            )
            for n in range(evaluations)
        ),
    )


FIRES = {
    "scaled down twice, and it learns nothing": entering(1e-6),
    "above_alpha": entering(1e-6, accuracy=MOST / 1000),
    "above_patience": entering(1e-6, evaluations=3),
}
INFO = {
    "above_share": entering(0.99e-3, accuracy=0.9),
    "below_alpha": entering(1e-6, accuracy=(MOST + 1) / 1000),
    "below_patience": entering(1e-6, evaluations=2),
    "it learns all the same": entering(1e-6, accuracy=0.9),
    "nothing is known of the accuracy": entering(1e-6, accuracy=None),
    "of how many examples is not known": entering(1e-6, examples=0),
}
QUIET = {
    "below_share": entering(1.01e-3),
    "an epsilon that fits": entering(1e-6, epsilon=1e-8),
    "constant, which is BN404's": entering(0.0),
    "one element a channel is BN205's": entering(1e-6, count=1),
    "nothing watched": testing.signals,
}

test_cases = cases.runner("BN405", fires=FIRES, info=INFO, quiet=QUIET)


def test_what_enters_and_what_leaves():
    ((finding,), _) = cases.look("BN405", entering(1e-6)())
    assert "a variance of 1e-06, below its epsilon of 0.001" in finding.message
    assert finding.notes[0].startswith("its output has about 0.032 of the size")
    assert finding.evidence["epsilon_share"].value == pytest.approx(1e-3 / (1e-3 + 1e-6), rel=1e-3)
    assert "scaled down twice" in finding.notes[1]


def test_a_later_layer_is_no_sign_of_the_inputs():
    spec = testing.layer("bn")
    signals = testing.signals(
        testing.snapshot(1, testing.call(testing.layer("first")), testing.call(spec, mean=0.1, var=1e-6))
    )
    ((finding,), _) = cases.look("BN405", signals)
    assert finding.subject == "bn"
    assert not any("scaled down twice" in note for note in finding.notes)
