import pytest

from bnwatch import testing
from bnwatch.records import Attachment, EvaluationRecord
from tests.rules import cases

RULE = "BN211"
PATHS = ("a", "b", "c")


def restored(*lost, extra=(), by="keras 3", **fields):
    """A model of three layers, of which some were restored without their statistics."""
    specs = tuple(testing.layer(path, **fields) for path in PATHS)
    return testing.signals(Attachment(specs, framework=by, unrestored=lost, initial=lost), *extra)


def trained(updates, **fields):
    """One step in which every layer has been updated so often."""
    calls = (testing.call(testing.layer(path, **fields), mean=1.0, running_mean=0.5, updates=updates) for path in PATHS)
    return testing.snapshot(1, *calls)


FIRES = {
    "all layers": lambda: restored(*PATHS),
    "one of three": lambda: restored("b"),
    "evaluated so": lambda: restored(*PATHS, extra=[EvaluationRecord(0, 0, 0.37)]),
    # .9^28 = .0523 and .9^29 = .0471
    "above_weight": lambda: restored(*PATHS, extra=[trained(28)]),
    "an unknown number of updates": lambda: restored(*PATHS, extra=[trained(None)]),
    "a backbone in inference mode": lambda: restored(
        "a", extra=[testing.snapshot(n, testing.call(testing.layer("b"), updates=n), idle=("a",)) for n in range(1, 90)]
    ),
    "one layer settled, another not": lambda: restored(
        "a", "b", extra=[testing.snapshot(1, testing.call(testing.layer("a"), updates=90), idle=("b",))]
    ),
}
QUIET = {
    "all restored": restored,
    "below_weight": lambda: restored(*PATHS, extra=[trained(29)]),
    "re-estimated since": lambda: restored(*PATHS, extra=[EvaluationRecord(0, 0, 0.98, moved=PATHS)]),
}
SKIPS = {"nothing attached": (testing.signals, None)}

test_cases = cases.runner(RULE, fires=FIRES, quiet=QUIET, skips=SKIPS)


def test_it_says_how_many_and_which():
    ((finding,), _) = cases.look(RULE, restored("a", "c"))
    assert finding.subject == "model"
    assert finding.message.startswith("2 of 3 layers have trained scale and offset")
    assert finding.message.endswith("`a`, `c`")
    ((finding,), _) = cases.look(RULE, FIRES["one layer settled, another not"]())
    assert finding.subject == "b"
    assert finding.message.startswith("1 of 3 layers has ")


@pytest.mark.parametrize(
    ("framework", "first", "last"),
    [
        ("keras 3", "set_weights", "bnwatch.keras.recalibrate(model, batches)"),
        ("chainer 7", "copy_persistent", "bnwatch.chainer.recalibrate(model, batches)"),
    ],
)
def test_the_helps_are_those_of_the_framework(framework, first, last):
    ((finding,), _) = cases.look(RULE, restored("a", by=framework))
    assert first in finding.helps[0]
    assert last in finding.helps[-1]
    assert len(finding.helps) == 2
