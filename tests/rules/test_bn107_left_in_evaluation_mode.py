import pytest

from bnwatch import testing
from bnwatch.records import Attachment, EvaluationRecord
from bnwatch.signals import HISTORY
from tests.rules import cases

RULE = "BN107"
LIMITS = {name: int(threshold.value) for name, threshold in cases.rule(RULE).thresholds.items()}
ONE = (testing.layer(decay=0.99),)
TWO = (testing.layer("a"), testing.layer("b"))


def steps(pattern, specs, start=1):
    """A snapshot a letter: ``T`` in training mode, ``I`` in inference mode, ``b`` with only the second layer in it."""
    for n, mode in enumerate(pattern, start=start):
        on = {"T": specs, "I": (), "b": specs[:1]}[mode]
        idle = tuple(s.path for s in specs if s not in on)
        yield testing.snapshot(n, *(testing.call(s, mean=n, running_mean=n / 9, updates=n) for s in on), idle=idle)


def switched(before="TTTTTTTT", after="II", *, evaluation=True, specs=ONE, by="chainer 7"):
    """A training in which an evaluation ran between two patterns of steps."""
    return testing.signals(
        Attachment(tuple(specs), framework=by),
        *steps(before, specs),
        *([EvaluationRecord(len(before), 0, 0.5)] if evaluation else []),
        *steps(after, specs, len(before) + 1),
    )


FROZEN = {"specs": (testing.layer(trainable=False),)}

FIRES = {
    "above_samples": lambda: switched(after="I" * LIMITS["samples"]),
    "above_before": lambda: switched("T" * LIMITS["before"]),
    "some layers, at an evaluation": lambda: switched(after="bb", specs=TWO),
    "all layers, where no evaluation was told of": lambda: switched(specs=TWO, evaluation=False),
    "longer ago than what is kept": lambda: switched(after="I" * (HISTORY + 9)),
}
INFO = {
    "a layer that was frozen": lambda: switched(**FROZEN),
    "some layers, between two steps": lambda: switched(after="bb", specs=TWO, evaluation=False),
}
QUIET = {
    "below_samples": lambda: switched(after="I" * (LIMITS["samples"] - 1)),
    "below_before": lambda: switched("T" * (LIMITS["before"] - 1)),
    "in training mode throughout": lambda: switched(after="TTTT"),
    "back in training mode": lambda: switched(after="IIT"),
    "never in training mode, which is BN104": lambda: switched("IIIIIIII"),
    "turns": lambda: switched("TITITITI", "TIT" + "II"),
    "turns, five to one": lambda: switched("TIIIIITIIIII", "TIIII"),
}
SKIPS = {"no training": (lambda: testing.signals(Attachment(TWO)), None)}

test_cases = cases.runner(RULE, fires=FIRES, info=INFO, quiet=QUIET, skips=SKIPS)


def test_it_names_the_step_the_evaluation_and_what_is_frozen_in():
    ((finding,), _) = cases.look(RULE, switched(after="IIII"))
    assert finding.subject == "bn"
    assert finding.message == "since the evaluation at step 8, training runs `bn` in inference mode"
    assert finding.evidence["steps"].value == 4
    assert finding.evidence["initial_weight"].value == pytest.approx(0.99**8)
    ((finding,), _) = cases.look(RULE, switched(specs=TWO, evaluation=False))
    assert finding.message == "since step 8, training runs `a`, `b` in inference mode"


@pytest.mark.parametrize(("framework", "said"), [("keras 3", "model(x, training=True)"), ("chainer 7", "using_config")])
def test_the_helps_are_those_of_the_framework(framework, said):
    ((finding,), _) = cases.look(RULE, switched(by=framework))
    assert said in finding.helps[0]


@pytest.mark.parametrize(
    ("evaluated", "said"),
    [(15, "step 16"), (16, "the evaluation at step 16"), (23, "the evaluation at step 23"), (24, "step 16")],
)
def test_an_evaluation_counts_that_ran_between_the_last_sample_and_the_first_in_inference_mode(evaluated, said):
    bn = testing.layer()
    active = [testing.snapshot(n, testing.call(bn, mean=n), idle=()) for n in (4, 8, 12, 16)]
    idle = [testing.snapshot(n, idle=("bn",)) for n in (24, 32)]
    seen = sorted([*active, *idle, EvaluationRecord(evaluated, 0, 0.5)], key=lambda item: item.step)
    ((finding,), _) = cases.look(RULE, testing.signals(*seen))
    assert finding.message == f"since {said}, training runs `bn` in inference mode"
