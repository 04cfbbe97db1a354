import dataclasses

import numpy as np
import pytest

from bnwatch import testing
from bnwatch.records import Attachment, Structure
from bnwatch.rules._base import FEW
from tests.rules import cases

RULE = "BN213"
LIMITS = {name: threshold.value for name, threshold in cases.rule(RULE).thresholds.items()}
STEPS = int(LIMITS["steps"])
TWO = ("a", "b")


def alternating(
    samples,
    effective,
    *,
    calls=1,
    layers=TWO,
    apart=0.0,
    places=1,
    by="keras 3",
    accumulated=1,
    hidden=None,
    count=32,
):
    """Steps whose batch means alternate, so that successive differences give exactly ``effective`` samples.

    The means are d and -d: half the squared difference is 2 d^2, so 1 / (2 d^2) samples.
    """
    distance = (2.0 * effective) ** -0.5
    specs = [testing.layer(path, epsilon=0.0) for path in layers]
    rng = np.random.default_rng(3)
    usages = tuple(testing.usage(p, *(testing.place(p, k) for k in range(places))) for p in layers)

    def mean(n, site):
        return distance * (-1) ** n + apart * site + (rng.normal(0, 1e-3, 4) if calls > 1 else 0.0)

    return testing.signals(
        Attachment(tuple(specs), framework=by),
        Structure(usages, hidden, accumulated=accumulated),
        *(
            testing.snapshot(
                n, *(testing.call(s, site=k, mean=mean(n, k), count=count) for k in range(calls) for s in specs)
            )
            for n in range(1, samples + 1)
        ),
    )


def graph(accumulated):
    return testing.signals(Structure((testing.usage("bn", testing.place()),), accumulated=accumulated))


ACCUMULATED = {"accumulated": 16}
FIRES = {
    "below_samples": lambda: alternating(9, LIMITS["samples"] * 0.99, **ACCUMULATED),
    "above_steps": lambda: alternating(STEPS, 2.0, **ACCUMULATED),
    "by hand, with few examples": lambda: alternating(9, 2.0, calls=16, hidden="a subclassed model"),
}
INFO = {
    "above_samples": lambda: alternating(9, LIMITS["samples"] * 1.01, **ACCUMULATED),
    "below_steps": lambda: alternating(STEPS - 1, 2.0, **ACCUMULATED),
    "planned": lambda: graph(4),
    "by hand": lambda: alternating(9, 32.0, calls=4),
    "by hand, in a model that hides its calls": lambda: alternating(9, 32.0, calls=4, hidden="a subclassed model"),
    "by hand, in Chainer, whose graph is the step": lambda: alternating(9, 32.0, calls=4, places=4, by="chainer 7"),
}
QUIET = {
    "one batch a step": lambda: alternating(9, 2.0),
    "one batch an update": lambda: graph(1),
    "towers that the graph shares": lambda: alternating(9, 32.0, calls=2, places=2),
    "one shared layer of a model that hides its calls": lambda: alternating(
        9, 32.0, calls=2, layers=("a",), hidden="a subclassed model"
    ),
    "passes over other data, which is BN101": lambda: alternating(9, 32.0, calls=2, apart=1.0),
    "one layer of two": lambda: _once(alternating(9, 32.0)),
}
SKIPS = {"nothing was seen": (testing.signals, None)}


def _once(signals):
    both = testing.layer("a"), testing.layer("b")
    for n in range(10, 14):
        calls = [testing.call(both[0]), testing.call(both[0], site=1), testing.call(both[1])]
        signals.observe(testing.snapshot(n, *calls))
    return signals


test_cases = cases.runner(RULE, fires=FIRES, info=INFO, quiet=QUIET, skips=SKIPS)


def test_parts_and_effective_examples_are_measured():
    ((finding,), _) = cases.look(RULE, alternating(9, 2.0, **ACCUMULATED))
    assert finding.evidence["parts"].value == 16
    assert finding.evidence["effective_samples"].value == pytest.approx(2.0, rel=1e-5)
    assert finding.message.startswith("gradients of 16 batches are accumulated")
    ((finding,), _) = cases.look(RULE, alternating(9, 32.0, calls=4))
    assert finding.evidence["parts"].value == 4
    assert "calls every layer 4 times" in finding.message


@pytest.mark.parametrize(("fields", "note"), [(ACCUMULATED, "accumulation makes"), ({"calls": 2}, "be it for several")])
def test_passes_are_called_accumulation_where_they_are_known_to_be(fields, note):
    ((finding,), _) = cases.look("BN213", alternating(6, 20, **fields))
    assert finding.notes[0].startswith(note)


@pytest.mark.parametrize("places", [1, 2])
def test_passes_of_the_whole_model_are_not_told_as_sharing(places):
    """Where the graph itself calls each layer twice it is sharing, which BN101 tells."""
    signals = alternating(9, 32.0, calls=2, places=places)
    told = [len(cases.look(rule, signals)[0]) for rule in ("BN101", RULE)]
    assert told == ([0, 1] if places == 1 else [2, 0])


def test_a_graph_that_is_hidden_counts_as_none():
    signals = alternating(9, 32.0, calls=2, places=2)
    signals.structure = dataclasses.replace(signals.structure, hidden="a subclassed model")
    assert len(cases.look(RULE, signals)[0]) == 1


@pytest.mark.parametrize(("count", "told"), [(FEW - 1, {"elements": FEW - 1}), (FEW, {"effective_samples": 0.01})])
def test_of_a_few_elements_their_number_is_told(count, told):
    """The variance of two elements is next to none at times: by it a batch is worth a hundredth of an example."""
    ((finding,), _) = cases.look(RULE, alternating(9, 0.01, count=count, accumulated=16))
    shown = {name: value.value for name, value in finding.evidence.items() if name != "parts"}
    assert shown == pytest.approx(told)
