"""Helps name the arguments and functions of the framework that is watched, and of no other."""

import pytest

from bnwatch import engine, testing
from bnwatch.records import Attachment, EvaluationRecord, Structure
from bnwatch.rules import BEFORE_TRAINING
from tests.rules import cases

SICK = Structure(
    (
        testing.usage("shared", testing.place("shared"), testing.place("shared", 1)),
        testing.usage(
            "axis", testing.place("axis", rank=4, axis=3, layout="channels_first", producer="c", kind="Conv")
        ),
        testing.usage("bn", testing.place(dropout="drop", rate=0.5, bias=True, producer="c"), decay=0.1),
        testing.usage("slow", testing.place("slow"), decay=0.999),
    ),
    steps_per_epoch=10,
    epochs=2,
)

SAID = {
    "BN101": ("split_shared", "link.copy(mode='init')"),
    "BN102": ("with axis=1", "without axis="),
    "BN108": ("bnwatch.keras.recalibrate", "bnwatch.chainer.recalibrate"),
    "BN110": ("use_bias=False", "nobias=True"),
    "BN202": ("momentum=0", "decay=0"),
}


@pytest.mark.parametrize("rule", SAID)
def test_before_training(rule):
    for number, framework in enumerate(("keras 3.15.1", "chainer 7.8.1")):
        report = engine.check(SICK, run="model", framework=framework)
        helps = " ".join(help_ for d in report.diagnoses if d.rule == rule for help_ in d.helps)
        assert SAID[rule][number] in helps
        assert SAID[rule][1 - number] not in helps
    by_hand = " ".join(help_ for d in engine.check(SICK, run="", framework="").diagnoses for help_ in d.helps)
    assert "bnwatch." not in by_hand
    assert "Keras: momentum" in by_hand


def test_every_rule_that_speaks_before_training_is_run():
    report = engine.check(SICK, run="model", framework="chainer")
    assert {d.rule for d in report.diagnoses} == set(SAID)
    assert (report.run, report.layers, report.sites) == ("model", 4, 5)
    assert {rule.id for rule in BEFORE_TRAINING} > set(SAID)


@pytest.mark.parametrize("name", ["batch_size", "steps_per_epoch", "epochs"])
def test_a_plan_of_nothing_is_refused(name):
    with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0"):
        engine.check(Structure(**{name: 0}), run="", framework="")


@pytest.mark.parametrize(
    ("framework", "axis", "undecided"), [("chainer", 1, 0), ("chainer", 3, 1), ("keras", 1, 1), ("keras", 3, 0)]
)
def test_the_default_axis_of_the_framework_is_no_question(framework, axis, undecided):
    signals = testing.signals(Structure((testing.usage("bn", testing.place(rank=4, axis=axis)),)))
    signals.framework = framework
    assert [len(outcome) for outcome in cases.look("BN102", signals)] == [0, undecided]


@pytest.mark.parametrize(("framework", "helps"), [("chainer 7", 1), ("keras 3", 1), ("recorded by hand", 2)])
def test_bn103_says_how_to_evaluate(framework, helps):
    signals = testing.signals(
        Attachment((testing.layer(),), framework=framework), EvaluationRecord(1, 0, batch_statistics=("bn",))
    )
    (finding,) = cases.look("BN103", signals)[0]
    assert len(finding.helps) == helps
    assert all(help_.lower().startswith(framework.partition(" ")[0]) for help_ in finding.helps if helps == 1)
