import pytest

from bnwatch import testing
from tests.rules import cases

RULE = "BN207"
PAIRS = {"batch": 0.957, "running": 0.909, "population": 0.92, "reshuffled": 0.895}
FINE = {"batch": 0.95, "running": 0.95, "population": 0.95, "reshuffled": 0.95}


def run(*sites, row=PAIRS, evaluation=None, examples=1000, purity=None, batches=32):
    site = testing.site_composition(dispersion=5.6, p=1e-9, clusters=0.3)
    return testing.signals(
        testing.cells(2, training=row, evaluation=evaluation, examples=examples),
        testing.composition(2, *(sites or (site,)), purity=purity, batches=batches),
    )


def at(**numbers):
    return testing.site_composition(**{"dispersion": 5.6, "p": 1e-9, "clusters": 0.3, **numbers})


def cost(batch, reshuffled, examples=10_000):
    return run(row={"batch": batch, "running": batch, "reshuffled": reshuffled}, examples=examples)


FIRES = {
    "pairs of classes": run,
    "one class a batch, all lost": lambda: run(row={"batch": 0.28, "running": 0.093, "reshuffled": 0.09}),
    "above_dispersion": lambda: run(at(dispersion=2.01)),
    "above_cost": lambda: cost(0.9, 0.8899),
    "below_alpha of the cost": lambda: cost(0.9, 0.88, 500),
    "below_alpha of the F test": lambda: run(at(p=0.00049), at(layer="b")),
    "they cannot be taken apart for the cell, and no re-estimate mends it": lambda: run(
        row={"batch": 0.917, "running": 0.734, "population": 0.763}
    ),
    "seen on evaluation examples alone": lambda: run(
        row=FINE, evaluation={"batch": 0.9, "running": 0.6, "population": 0.62}
    ),
    "above_pure as what the weights are made for is in no evaluation, lost accuracy or not": lambda: run(
        row=FINE, purity=(0.91, 0.25)
    ),
    "drift, no two groups": lambda: run(at(clusters=0.6)),
    "two groups, one an outlier": lambda: run(at(clusters=0.95, smaller=0.03)),
    "too few batches for groups": lambda: run(at(clusters=0.95), batches=7),
}
INFO = {
    "it costs nothing": lambda: run(row=FINE),
    "below_pure": lambda: run(row=FINE, purity=(0.89, 0.25)),
    "most examples are of one class": lambda: run(row=FINE, purity=(0.93, 0.9)),
    "below_cost": lambda: cost(0.9, 0.8901),
    "above_alpha of the cost": lambda: cost(0.9, 0.882, 500),
    "old statistics, which a re-estimate mends": lambda: run(
        row={"batch": 0.95, "running": 0.5, "population": 0.95, "reshuffled": 0.95}
    ),
}
QUIET = {
    "below_dispersion": lambda: run(at(dispersion=1.99)),
    "above_alpha of the F test": lambda: run(at(p=0.00051), at(p=0.6, layer="b")),
    "random batches": lambda: run(testing.site_composition()),
    "two populations, which is BN208": lambda: run(at(clusters=0.95)),
    "nothing was measured": lambda: testing.signals(testing.cells(2, training=PAIRS)),
}

test_cases = cases.runner(RULE, fires=FIRES, info=INFO, quiet=QUIET)


def test_the_message_says_what_batches_are_and_what_it_costs():
    ((finding,), _) = cases.look(RULE, run(purity=(1.0, 0.18)))
    assert finding.message == (
        "training batches are of one class each: at `bn` their means spread 5.6 times as much as those of random "
        "batches, which costs 6.2 points of training accuracy"
    )
    assert "95.7% in their own batches, 89.5% in random batches of the same sizes" in finding.notes[-1]


def test_what_costs_nothing_says_what_was_measured():
    row = {"batch": 0.95, "running": 0.5, "population": 0.95, "reshuffled": 0.948}
    ((finding,), _) = cases.look(RULE, run(row=row))
    assert finding.notes[-1] == (
        "no lost accuracy can be laid to the batches so far: the same 1,000 training examples give 95.0% in their own "
        "batches, 94.8% in random batches of the same sizes, 50.0% with running statistics, 95.0% with re-estimated "
        "statistics"
    )
    unmeasured = testing.signals(testing.composition(2, at()))
    ((finding,), _) = cases.look(RULE, unmeasured)
    assert finding.notes[-1] == "whether it costs accuracy is not measured yet"


@pytest.mark.parametrize(("purity", "said"), [((0.51, 0.18), True), ((0.2, 0.18), False), (None, False)])
def test_labels_are_told_where_they_say_something(purity, said):
    ((finding,), _) = cases.look(RULE, run(purity=purity))
    assert any("labels say what batches have in common" in note for note in finding.notes) is said
    assert finding.message.startswith("training batches are no random parts of the data")


def test_the_site_that_is_farthest_off_is_named():
    ((finding,), _) = cases.look(RULE, run(at(layer="a"), at(layer="b", dispersion=9.0), at(layer="c")))
    assert "at `b` their means spread 9.0" in finding.message
    assert [row[0] for row in finding.table.rows] == ["b", "a", "c"]
