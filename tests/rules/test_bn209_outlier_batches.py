import numpy as np
import pytest

from bnwatch import testing
from bnwatch.records import EvaluationRecord
from tests.rules import cases

RULE = "BN209"
LOST = {"batch": 0.95, "running": 0.4, "population": 0.6}
FINE = {"batch": 0.95, "running": 0.95}


def poisoned(std, *, at=(40,), steps=48, every=2, row=None, decay=0.9, epsilon=1e-3, examples=1000, sites=1):
    """A layer on N(0, 1), of which the batches ``at`` hold one row of ``std`` standard deviations."""
    step = [0]

    def draw(rng):
        values = rng.normal(size=(64, 16))
        if step[0] // sites + 1 in at:
            values[0] *= std
        step[0] += 1
        return values

    spec = testing.layer(channels=16, decay=decay, epsilon=epsilon)
    seen = [*testing.train(spec, *[draw] * sites, steps=steps, every=every), EvaluationRecord(steps, 0, 0.5)]
    return testing.signals(*seen, *([testing.cells(steps, training=row, examples=examples)] if row else []))


def steady(wide, tail, row=LOST, samples=16, examples=1000):
    """Batches of a standard deviation of 1, running ones ``wide``, and one batch of ``tail`` times the variance."""
    spec = testing.layer(channels=4, decay=0.5)
    calls = [
        testing.call(spec, mean=0.1 * n, var=tail if n == 1 else 1.0, running_var=wide**2, updates=100 + n)
        for n in range(samples)
    ]
    seen = [testing.snapshot(n + 1, call) for n, call in enumerate(calls)]
    fed = testing.signals(*seen, testing.cells(samples, training=row, examples=examples))
    for table in fed.tables:
        table.column("recovered_std")[:] = np.nan
    return fed


def growing(factor, samples=16):
    """Batches whose deviation is ``factor`` times as large from the middle on; a rare one of the first half is wide."""
    spec = testing.layer(channels=4, decay=0.5)
    deviations = [20.0 if n == 1 else 1.0 if n < samples // 2 else factor for n in range(samples)]
    calls = [
        testing.call(spec, mean=0.1 * n, var=std**2, running_var=9.0 * factor**2, updates=100 + n)
        for n, std in enumerate(deviations)
    ]
    fed = testing.signals(*(testing.snapshot(n + 1, call) for n, call in enumerate(calls)))
    fed.cells = testing.cells(samples, training=LOST)
    for table in fed.tables:
        table.column("recovered_std")[:] = np.nan
    return fed


def before(evaluations=0, *, ended=False):
    """The outlier, and no experiment so far."""
    spec = testing.layer(channels=4, decay=0.5)
    calls = [
        testing.call(spec, mean=0.1 * n, var=20.0**2 if n == 1 else 1.0, running_var=9.0, updates=100 + n)
        for n in range(16)
    ]
    fed = testing.signals(
        *(testing.snapshot(n + 1, call) for n, call in enumerate(calls)),
        *(EvaluationRecord(16, 0, None) for _ in range(evaluations)),
    )
    fed.ended = ended
    return fed


def same_order():
    """Every epoch of 8 batches ends with the batch of the outlier, and most samples are those of ends of epochs."""
    spec, fed = testing.layer(channels=4, decay=0.9), testing.signals()
    for step in [*range(1, 9), *range(16, 400, 8)]:
        end = step % 8 == 0
        var, held = (1e4, 900.0) if end else (1.0, 500.0)
        fed.observe(testing.snapshot(step, testing.call(spec, mean=step, var=var, running_var=held, updates=step)))
        if end:
            fed.evaluate(EvaluationRecord(step, 0, 0.5))
    fed.cells = testing.cells(392, training=LOST)
    return fed


def steps_of(update):
    """The outlier, while parameters change by a share ``update`` of their size each step."""
    fed = poisoned(1000.0, row=LOST)
    fed.looks.append(
        testing.look(48, testing.layer_look("dense", update=0.001), testing.layer_look("out", update=update))
    )
    return fed


def row(batch, running):
    return {"batch": batch, "running": running}


FIRES = {
    "one row a thousand times as wide": lambda: poisoned(1000.0, row=LOST),
    "steps of the usual size": lambda: steps_of(0.099),
    "in a batch that was not sampled": lambda: poisoned(1000.0, at=(41,), row=LOST),
    "in the same order in every epoch": same_order,
    "batches grow a little meanwhile": lambda: growing(1.99),
    "evaluated, and not measured": lambda: before(1),
    "not evaluated when training ends": lambda: before(ended=True),
    "a regression": lambda: poisoned(1000.0),
    "above_wide": lambda: steady(2.01, 20.0),
    "above_tail": lambda: steady(3.0, 10.1),
    "above_samples": lambda: steady(3.0, 20.0, samples=7),
    "above_cost": lambda: steady(3.0, 20.0, row(0.9, 0.8899), examples=10_000),
    "below_alpha": lambda: steady(3.0, 20.0, row(0.9, 0.88), examples=500),
}
INFO = {
    "not evaluated yet": before,
    "it costs nothing": lambda: steady(3.0, 20.0, FINE),
    "below_cost": lambda: steady(3.0, 20.0, row(0.9, 0.8901), examples=10_000),
    "above_alpha": lambda: steady(3.0, 20.0, row(0.9, 0.882), examples=500),
}
QUIET = {
    "batches grow": lambda: growing(2.01),
    "batches shrink": lambda: growing(1 / 2.01),
    "steps that make another network each time": lambda: steps_of(0.101),
    "below_wide": lambda: steady(1.99, 20.0),
    "below_tail": lambda: steady(3.0, 9.9),
    "below_samples": lambda: steady(3.0, 20.0, samples=5),
    "it is long ago": lambda: poisoned(1000.0, at=(4,), steps=200, row=LOST),
    "a healthy layer": lambda: poisoned(1.0, row=LOST),
    "initial values far above the data": lambda: testing.signals(
        *testing.train(testing.layer(decay=0.99), testing.normal(4, 64, std=0.01), steps=40)
    ),
    "two call sites of different spread, which is BN101": lambda: testing.signals(
        *testing.train(testing.layer(), testing.normal(4, 64, std=0.1), testing.normal(4, 64, std=5.0), steps=48)
    ),
    "nothing was seen": testing.signals,
    "constant": lambda: testing.signals(*testing.train(testing.layer(), lambda _: np.ones((8, 4)), steps=48)),
}

test_cases = cases.runner(RULE, fires=FIRES, info=INFO, quiet=QUIET)


def test_how_wide_is_measured():
    ((finding,), _) = cases.look(RULE, poisoned(1000.0, at=(45,), row=LOST))
    # 1 + (1000^2 / 64) of a batch, a tenth of it taken in at step 45 and .9 kept at each step from then on
    expected = (0.1 * 1e6 / 64 * 0.9**3) ** 0.5
    assert finding.evidence["wide"].value == pytest.approx(expected, rel=0.3)
    assert finding.evidence["tail"].value > 100.0


def test_what_it_costs_is_asked_for():
    assert [s.needs for s in cases.look(RULE, poisoned(1000.0))[1]] == ["cells"]
