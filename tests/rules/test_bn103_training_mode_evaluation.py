import pytest

from bnwatch import testing
from bnwatch.records import Attachment, EvaluationRecord
from tests.rules import cases


def evaluated(*layers):
    return EvaluationRecord(1, 0, batch_statistics=layers)


FIRES = {
    "one layer": lambda: testing.signals(evaluated("bn")),
    "all layers": lambda: testing.signals(evaluated("a", "b", "c")),
}
QUIET = {
    "running statistics": lambda: testing.signals(evaluated()),
    "mended since": lambda: testing.signals(evaluated("bn"), evaluated()),
}
SKIPS = {"no evaluation": (lambda: testing.signals(testing.snapshot(1)), None)}

test_cases = cases.runner("BN103", fires=FIRES, quiet=QUIET, skips=SKIPS)


def test_one_layer_is_the_subject_and_several_are_the_model():
    assert [cases.look("BN103", build())[0][0].subject for build in FIRES.values()] == ["bn", "model"]


@pytest.mark.parametrize(
    ("layers", "accuracy", "note"),
    [
        (("bn",), 0.95, "1,000 evaluation examples give 90.0% with the statistics of their batches and 60.0%"),
        (("bn", "b"), 0.95, "the evaluation reported 95.0%; 1,000 of its examples give 60.0% with running statistics"),
        (("bn", "b"), None, "1,000 of its examples give 60.0% with running statistics in every layer"),
    ],
)
def test_cells_say_what_running_statistics_would_give(layers, accuracy, note):
    specs = Attachment(tuple(testing.layer(path) for path in layers))
    cells = testing.cells(1, evaluation={"batch": 0.9, "running": 0.6})
    record = EvaluationRecord(1, 0, accuracy, batch_statistics=("bn",))
    ((finding,), _) = cases.look("BN103", testing.signals(specs, record, cells))
    assert note in finding.notes[-1]
    assert ("90.0%" in finding.notes[-1]) is (layers == ("bn",))
