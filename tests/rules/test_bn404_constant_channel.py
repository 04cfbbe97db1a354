import math

import numpy as np
import pytest

from bnwatch import testing
from tests.rules import cases

LIMITS = {name: threshold.value for name, threshold in cases.rule("BN404").thresholds.items()}


def constant(dead, channels=20, count=64):
    var = np.where(np.arange(channels) < dead, 0.0, 1.0)
    return lambda: testing.signals(
        testing.snapshot(1, testing.call(testing.layer(channels=channels), mean=0.5, var=var, count=count))
    )


def woken(
    *before, batch=0.95, running=0.18, train=(0.99, 0.99), examples=397, ratio=1.0, awakened=8, step=10, measured=10
):
    """Channels wake up at ``bn``, behind the sites ``before``."""
    site = testing.site_shift("bn", shift=5.0, ratio=ratio, awakened=awakened)
    return lambda: testing.signals(
        testing.snapshot(step, testing.call(testing.layer())),
        testing.cells(
            measured,
            training={"batch": train[0], "running": train[1]},
            evaluation={"batch": batch, "running": running},
            examples=examples,
        ),
        testing.entering(step, *before, site),
    )


def before(p, *, shift=0.0, ratio=1.0):
    """A call site in front, of two, with this p-value once corrected for their number."""
    return testing.site_shift("first", shift=shift, ratio=ratio, p=p / 2)


FIRES = {
    "eight features that never varied": woken(),
    "above_cost": woken(batch=0.95, running=0.9399, examples=10_000),
    "below_alpha": woken(batch=0.95, running=0.93, examples=500),
    "below_apart": woken(ratio=math.exp(LIMITS["apart"] / 1.01)),
    "above_same": woken(before(LIMITS["same"] * 1.01, ratio=16.0)),
    "certain and small in front": woken(before(1e-9, shift=LIMITS["apart"] / 1.01)),
}
INFO = {
    "above_share": constant(11),
    "below_cost": woken(batch=0.95, running=0.9401, examples=10_000),
    "above_alpha": woken(batch=0.95, running=0.932, examples=500),
    "above_apart": woken(ratio=math.exp(LIMITS["apart"] * 1.01)),
    "below_same": woken(before(LIMITS["same"] / 1.01, ratio=16.0)),
    "dead units that wake up and cost nothing": woken(batch=0.95, running=0.95),
    "training suffers as much, so it is something else": woken(train=(0.99, 0.5)),
    "cells of another step": woken(measured=5),
}
QUIET = {
    "below_share": constant(10),
    "a few dead units, as in healthy networks": constant(2),
    "one element a channel is BN205's": constant(20, count=1),
    "none wakes up": woken(awakened=0),
    "nothing watched": testing.signals,
}

test_cases = cases.runner("BN404", fires=FIRES, info=INFO, quiet=QUIET)


def test_the_number_that_evaluation_multiplies_by():
    ((finding,), _) = cases.look("BN404", woken()())
    assert "8 channels of `bn` are constant in training and vary in evaluation, which costs 77.1 points" in (
        finding.message
    )
    assert "1/0.001^0.5 = 32" in finding.notes[0]
    assert finding.evidence["awakened"].value == 8


def test_one_channel_is_told_as_one():
    ((finding,), _) = cases.look("BN404", woken(awakened=1)())
    assert finding.message.startswith("1 channel of `bn` is constant in training and varies in evaluation")


@pytest.mark.parametrize("dead", [11, 20])
def test_how_many_are_constant(dead):
    ((finding,), _) = cases.look("BN404", constant(dead)())
    assert finding.evidence["constant"].value == pytest.approx(dead / 20)
