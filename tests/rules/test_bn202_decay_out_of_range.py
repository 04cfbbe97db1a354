from dataclasses import replace

import numpy as np
import pytest

from bnwatch import testing
from bnwatch.records import EvaluationRecord, Structure
from tests.rules import cases


def planned(*decays, steps=10_000, epochs=1, sites=1, trainable=True):
    layers = tuple(
        testing.usage(f"bn_{n}", *(testing.place(f"bn_{n}", k) for k in range(sites)), decay=d, trainable=trainable)
        for n, d in enumerate(decays)
    )
    return lambda: testing.signals(Structure(layers, steps_per_epoch=steps, epochs=epochs))


def settled(
    decay, steps, *, batch=0.98, running=0.94, population=0.98, examples=10_000, updates=0, split="training", ended=True
):
    """A training of ``steps`` steps, and what its running statistics cost; ``updates`` are as many unless given."""
    spec = testing.layer(decay=decay)
    row = {"batch": batch, "running": running, "population": population}
    first, last = (None, None) if updates is None else (1, updates or steps)

    def built():
        signals = testing.signals(
            Structure((testing.usage(decay=decay),), steps_per_epoch=steps, epochs=1),
            testing.snapshot(1, testing.call(spec, updates=first)),
            testing.snapshot(steps, testing.call(spec, mean=0.3, running_mean=0.1, updates=last)),
            testing.cells(steps, **{split: row}, examples=examples),
        )
        signals.ended = ended
        return signals

    return built


FIRES = {
    "PyTorch's .01 taken literally": settled(0.01, 660),
    "a decay of zero that costs": settled(0.0, 660),
    # 199 batches are a tenth of 1,990
    "above_part": settled(0.99, 1989),
    "above_cost": settled(0.1, 660, batch=0.9, running=0.8899, population=0.9),
    "below_alpha": settled(0.1, 660, batch=0.9, running=0.88, population=0.9, examples=500),
    "statistics of another training, most of which are left": settled(0.99, 40, updates=None),
    "evaluation data alone": settled(0.99, 660, split="evaluation"),
    "below_weight, with costs": settled(0.99, 299),
    "batches so small that theirs are no better": settled(0.01, 660, batch=0.92, running=0.91, population=0.95),
}
INFO = {
    "a lag while training goes on": settled(0.99, 660, ended=False),
    "statistics of another training, while this one goes on": settled(0.99, 40, updates=None, ended=False),
    "statistics of another training that fit": settled(0.99, 40, updates=None, running=0.98),
    "above_alpha": settled(0.1, 660, batch=0.9, running=0.882, population=0.9, examples=500),
    "as good as a re-estimate": settled(0.1, 660, batch=0.98, running=0.95, population=0.95),
    "below_cost": settled(0.1, 660, batch=0.9, running=0.8901, population=0.9),
    "a mixture, which no decay mends": settled(0.1, 660, running=0.5, population=0.6),
    "above_weight, with costs": settled(0.99, 298),
    "below_memory": planned(0.499),
    "PyTorch's momentum": planned(0.1),
    "above_weight": planned(0.99, steps=298),
    "never forgets": planned(1.0),
    "calls that are hidden count as one": planned(0.99, steps=200, sites=0),
    "two kinds at once": planned(0.1, 0.9, 0.9999),
}


def restless(build):
    def built():
        fed = build()
        fed.looks.append(testing.look(1, testing.layer_look("dense", update=0.2)))
        return fed

    return built


def after(build, change):
    """The same, with what else is known in the end."""

    def built():
        fed = build()
        change(fed)
        return fed

    return built


def averaged(fed):
    fed.cells = replace(fed.cells, swapped=True)


def poisoned(fed):
    fed.observe(testing.snapshot(660, testing.call(testing.layer(decay=0.99), running_mean=np.nan, updates=660)))


def shared(places, shift):
    """Two calls a step whose means differ, of which one forward pass of the model makes ``places``."""
    draws = testing.normal(4, 64), testing.normal(4, 64, mean=shift)
    fed = testing.signals(
        *testing.train(testing.layer(decay=0.99), *draws, steps=660, every=40),
        Structure(
            (testing.usage("bn", *(testing.place(index=n) for n in range(places)), decay=0.99),), None, None, 660, 1
        ),
        testing.cells(640, training={"batch": 0.98, "running": 0.94, "population": 0.98}, examples=10_000),
    )
    fed.ended = True
    return fed


FIRES |= {
    "two calls of one pass": lambda: shared(2, 1.0),
    "another pass, on like data": lambda: shared(1, 0.0),
}
QUIET = {
    "another pass, on other data": lambda: shared(1, 1.0),
    "averaged weights, which the statistics never saw": after(settled(0.99, 660), averaged),
    "averaged weights at an evaluation": after(
        settled(0.99, 660), lambda fed: fed.evaluate(EvaluationRecord(660, 0, 0.9, swapped=True))
    ),
    "statistics that other passes moved": after(
        settled(0.99, 660), lambda fed: fed.evaluate(EvaluationRecord(660, 0, 0.9, moved=("bn",)))
    ),
    "statistics that passes after the evaluation moved": after(
        settled(0.99, 660), lambda fed: setattr(fed, "cells", replace(fed.cells, moved=("bn",)))
    ),
    "statistics that are no numbers": after(settled(0.99, 660), poisoned),
    "above_memory": planned(0.5),
    "below_weight": planned(0.99, steps=299),
    "below_part": settled(0.99, 1991),
    "a mixture in a short training": settled(0.99, 660, running=0.5, population=0.6),
    "steps that make another network each time": restless(settled(0.99, 660)),
    "harmless": settled(0.99, 660, running=0.98),
    "not seen to be restored": settled(0.99, 660, population=0.94),
    "several epochs": planned(0.99, steps=30, epochs=10),
    "several call sites, each an update": planned(0.99, steps=150, sites=2),
    "PointNet, on purpose": planned(0.0),
    "frozen": planned(0.1, 0.9999, trainable=False),
    "no layer": planned(),
}
SKIPS = {
    "how long is not known": (lambda: testing.signals(Structure((testing.usage(),))), None),
    "nothing known": (testing.signals, None),
}

test_cases = cases.runner("BN202", fires=FIRES, info=INFO, quiet=QUIET, skips=SKIPS)


def test_a_short_memory_shows_without_a_plan():
    findings, skipped = cases.look("BN202", testing.signals(Structure((testing.usage(decay=0.1),))))
    assert [f.subject for f in findings] == ["model"]
    assert findings[0].evidence["effective_batches"].value == pytest.approx(1.1 / 0.9)
    assert len(skipped) == 1


def test_each_decay_has_a_subject_of_its_own():
    findings, _ = cases.look("BN202", INFO["two kinds at once"]())
    assert [f.subject for f in findings] == ["bn_0", "bn_2"]


def test_what_is_left_at_the_end_and_a_decay_that_fits():
    ((finding,), _) = cases.look("BN202", planned(0.99, steps=100)())
    assert finding.message == (
        "after the planned 100 steps, 36.6% of the running statistics are still what they began with: `bn_0`"
    )
    assert finding.evidence["initial_weight"].value == pytest.approx(0.99**100)
    assert finding.helps == ("decay 0.97 (Keras: momentum=0.97) or less, or a longer training",)
    assert 0.97**100 < 0.05


def test_the_threshold_is_what_its_reason_says():
    """Two standard deviations off, times what is left, is the shift from which BN201 speaks."""
    shift = cases.rule("BN201").thresholds["shift"].value
    assert 2 * cases.rule("BN202").thresholds["weight"].value == pytest.approx(shift)


def test_what_a_short_memory_costs_and_where_the_number_comes_from():
    ((finding,), _) = cases.look("BN202", settled(0.1, 660)())
    assert "costs 4.0 points of training accuracy" in finding.message
    assert "PyTorch's momentum=0.1" in finding.notes[0]
    assert "94.0% with running statistics, 98.0% with statistics re-estimated" in finding.notes[1]
    ((zero,), _) = cases.look("BN202", settled(0.0, 660)())
    assert "PyTorch" not in zero.notes[0]


def test_a_shorter_memory_is_a_tenth_of_the_training():
    ((finding,), _) = cases.look("BN202", settled(0.99, 660)())
    assert "average over 199 of the 660 batches so far" in finding.message
    assert finding.helps[1].startswith("or decay 0.97 (Keras: momentum=0.97)")
    # (1 + d) / (1 - d) = 66
    assert pytest.approx(66, abs=1) == 1.97 / 0.03


@pytest.mark.parametrize(("steps", "offered"), [(990, True), (1000, False)])
def test_a_shorter_memory_is_offered_where_it_is_half_as_long(steps, offered):
    """199 batches are twice a tenth of 995 steps."""
    ((finding,), _) = cases.look("BN202", settled(0.99, steps)())
    assert ("decay" in finding.helps[1]) is offered


def test_without_a_graph_the_layers_of_the_training_are_judged():
    signals = settled(0.01, 660)()
    signals.structure = None
    findings, skipped = cases.look("BN202", signals)
    assert [finding.subject for finding in findings] == ["model"]
    assert len(skipped) == 1
