from bnwatch import testing
from bnwatch.records import EvaluationRecord
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


def test_cells_say_what_running_statistics_would_give():
    cells = testing.cells(1, evaluation={"batch": 0.9, "running": 0.6})
    ((finding,), _) = cases.look("BN103", testing.signals(evaluated("bn"), cells))
    assert "1,000 evaluation examples give 90.0% with the statistics of their batches and 60.0%" in finding.notes[-1]
