import pytest

from bnwatch import testing
from bnwatch.records import Attachment, EvaluationRecord
from tests.rules import cases

RULE = "BN104"
SAMPLES = int(cases.rule(RULE).thresholds["samples"].value)

ONE = (testing.layer(),)


def inert(
    samples=SAMPLES,
    *,
    initial=("bn",),
    specs=ONE,
    idle=("bn",),
    training=(),
    extra=(),
    by="keras 3",
    unrestored=(),
):
    """A training whose steps call the layers of ``idle`` in inference mode; ``training`` are calls of the others."""
    return testing.signals(
        Attachment(tuple(specs), framework=by, initial=initial, unrestored=unrestored),
        *(testing.snapshot(n, *training, idle=idle) for n in range(1, samples + 1)),
        *extra,
    )


TWO = {"specs": (testing.layer("a"), testing.layer("b")), "initial": ("a", "b")}
TRAINED = {"training": [testing.call(testing.layer("b"))]}
FROZEN = {"specs": (testing.layer(trainable=False),)}

FIRES = {
    "above_samples": inert,
    "a whole model": lambda: inert(**TWO, idle=("a", "b")),
    "a part of a model, built anew": lambda: inert(**TWO, idle=("a",), **TRAINED),
    "longer than what is kept": lambda: inert(300),
    "evaluated": lambda: inert(extra=[EvaluationRecord(SAMPLES, 0, 0.97, train_accuracy=0.98)]),
}
INFO = {"a layer that the user froze before it saw any data": lambda: inert(**FROZEN)}
QUIET = {
    "a pretrained backbone that is called in inference mode": lambda: inert(initial=()),
    "a pretrained backbone in front of a head that trains": lambda: inert(
        specs=TWO["specs"], initial=("b",), idle=("a",), **TRAINED
    ),
    "in training mode": lambda: inert(idle=(), training=[testing.call(testing.layer())]),
    "in training mode before what is kept": lambda: testing.signals(
        Attachment((testing.layer(),), initial=("bn",)),
        testing.snapshot(1, testing.call(testing.layer())),
        *(testing.snapshot(n, idle=("bn",)) for n in range(2, 400)),
    ),
    "turns, five to one": lambda: testing.signals(
        Attachment((testing.layer(),), initial=("bn",)),
        *(
            testing.snapshot(n, *([] if n % 6 else [testing.call(testing.layer())]), idle=("bn",) if n % 6 else ())
            for n in range(1, 20)
        ),
    ),
    "statistics that were set by other means": lambda: inert(extra=[EvaluationRecord(SAMPLES, 0, moved=("bn",))]),
    "a layer that is not called at all": lambda: inert(idle=()),
}
SKIPS = {
    "no training": (lambda: testing.signals(Attachment((testing.layer(),), initial=("bn",))), None),
    "below_samples": (lambda: inert(SAMPLES - 1), None),
}

test_cases = cases.runner(RULE, fires=FIRES, info=INFO, quiet=QUIET, skips=SKIPS)


@pytest.mark.parametrize(
    ("case", "subject", "words"),
    [
        ("above_samples", "bn", "runs `bn` in inference mode: its running"),
        ("a whole model", "model", "runs `a`, `b` in inference mode: their running"),
        ("a part of a model, built anew", "a", "runs `a` in inference"),
    ],
)
def test_it_names_the_layers_that_are_inert(case, subject, words):
    ((finding,), _) = cases.look(RULE, FIRES[case]())
    assert finding.subject == subject
    assert words in finding.message
    assert "re-estimated statistics make it worse" in finding.notes[1]


def test_frozen_layers_are_left_out_where_others_are_to_be_trained():
    specs = (testing.layer("frozen", trainable=False), testing.layer("bn"))
    ((finding,), _) = cases.look(RULE, inert(specs=specs, initial=("frozen", "bn"), idle=("frozen", "bn")))
    assert finding.subject == "bn"


@pytest.mark.parametrize(
    ("framework", "helps"), [("keras 3.15", ["Keras", "and"]), ("chainer 7.8.1", ["Chainer"]), ("", 3)]
)
def test_the_helps_are_those_of_the_framework(framework, helps):
    ((finding,), _) = cases.look(RULE, inert(by=framework))
    if framework:
        assert [help_.partition(":")[0].split(" ")[0] for help_ in finding.helps] == helps
    else:
        assert len(finding.helps) == helps


@pytest.mark.parametrize(("unrestored", "said"), [(("a",), True), (("b",), False)])
def test_layers_that_were_trained_before_may_have_been_loaded(unrestored, said):
    ((finding,), _) = cases.look(RULE, inert(**TWO, idle=("a",), **TRAINED, unrestored=unrestored))
    assert ("BN211" in finding.notes[1]) is said
    assert ("re-estimated statistics make it worse" in finding.notes[1]) is not said
