import math
from dataclasses import replace

import numpy as np
import pytest

from bnwatch import moments, testing
from bnwatch.diagnosis import Severity
from bnwatch.records import Attachment, EvaluationRecord, Structure
from tests.rules import cases

RULE = "BN101"
LIMITS = {name: threshold.value for name, threshold in cases.rule(RULE).thresholds.items()}


def sites(difference, noise, samples=16, spread=1.0):
    """Two sites whose means differ by ``difference`` plus an alternating ``noise``, whose spreads by ``spread``."""
    spec = testing.layer(channels=3, epsilon=0.0)
    steps = []
    for n in range(1, samples + 1):
        half = (difference + noise * (-1) ** n) / 2
        wobble = 1 + 1e-3 * (-1) ** n
        first = testing.call(spec, mean=3 + n + half, var=spread * wobble)
        steps.append(testing.snapshot(n, first, testing.call(spec, site=1, mean=3 + n - half, var=1 / spread)))
    return testing.signals(*steps)


def at_p_value(p, samples=16):
    """F is (n - 1) D^2 / s^2 for a difference D and an alternating noise s; both tests share alpha."""
    limit = moments.same_sites_limit(p / 2, 2, samples)
    return sites(1.0, math.sqrt((samples - 1) / limit), samples)


def at_shift(shift):
    """Two means D apart have standard deviation D / sqrt(2)."""
    return sites(shift * math.sqrt(2), 1e-3)


def trained(*draws, steps=40, channels=16, **fields):
    return testing.signals(*testing.train(testing.layer(channels=channels, **fields), *draws, steps=steps))


def drifting(channels=16, count=64):
    """Two calls a step see the same data, which move from step to step."""
    calls = iter(range(10**6))
    return lambda rng: rng.normal(next(calls) // 2 * 0.2, 1.0, (count, channels))


def heavy(channels, count):
    return lambda rng: rng.standard_t(2.5, (count, channels))


def correlated(channels, count):
    return lambda rng: rng.normal(size=(count, channels)) + 3.0 * rng.normal(size=(count, 1))


def pictures(channels):
    """Neighbouring pixels nearly repeat each other: 4 x 256 elements, worth 4 samples or so."""
    return lambda rng: np.repeat(rng.normal(size=(4, channels)), 256, axis=0) + rng.normal(0, 0.05, (1024, channels))


FIRES = {
    "two means": lambda: trained(testing.normal(16, 64), testing.normal(16, 64, mean=1.0)),
    "two spreads": lambda: trained(testing.normal(16, 64), testing.normal(16, 64, std=2.0)),
    "three sites, one apart": lambda: trained(*[testing.normal(16, 64)] * 2, testing.normal(16, 64, mean=1.0)),
    "Bessel's correction kept": lambda: trained(
        testing.normal(16, 32), testing.normal(16, 32, mean=0.5), bessel_corrected=True
    ),
    "above_few": lambda: trained(testing.normal(16, 5), testing.normal(16, 5, mean=3.0)),
    "above_samples": lambda: sites(1.0, 1e-3, samples=4),
    "below_alpha": lambda: at_p_value(LIMITS["alpha"] / 1.1),
    "above_shift": lambda: at_shift(LIMITS["shift"] * 1.02),
    "above_shift of the spreads": lambda: sites(0.0, 1e-3, spread=math.exp(LIMITS["shift"] * math.sqrt(2) * 1.03)),
}


def costing(*, batch=0.99, running=0.985, population=0.7, step=16, evaluations=(), examples=1000):
    """Two sites that differ, and what the cells say of it."""
    signals = at_shift(1.0)
    row = {"batch": batch, "running": running, "population": population}
    signals.cells = testing.cells(step, training=row, examples=examples)
    signals.evaluations.extend(evaluations)
    return signals


def besides(*, places=1, adapter="keras", composed=None, running=0.4, shift=1.0, hidden=None):
    """Two calls a step that differ, of which one forward pass of the model makes ``places``."""
    signals = at_shift(shift)
    row = {"batch": 0.99, "running": running, "population": 0.985}
    signals.cells = testing.cells(16, training=row, examples=1000)
    signals.attach(Attachment(tuple(signals.specs.values()), framework=adapter))
    usage = testing.usage("bn", *(testing.place(index=index) for index in range(places)))
    signals.structure = Structure((usage,), hidden=hidden)
    if composed is not None:
        indices = [None] if composed == 1 else range(composed)
        signals.composition = testing.composition(16, *(testing.site_composition(index=index) for index in indices))
    return signals


FIRES |= {
    "statistics re-estimated without the second call restore it": besides,
    "above_shift and the second call is another pass": lambda: besides(shift=LIMITS["shift"] * 1.02),
    "and so does the composition say where the graph is not known": lambda: besides(
        places=0, composed=1, hidden="no graph"
    ),
    "as in Chainer, whose graph is that of the step": lambda: besides(places=2, adapter="chainer 7.8.1", composed=1),
    "the cells show that it costs": lambda: costing(running=0.9),
    "half of what it costs is age": lambda: costing(running=0.4, population=0.8),
    "too few examples to call it harmless": lambda: costing(examples=100),
    "a network that has learned nothing shows nothing": lambda: costing(batch=0.1, running=0.1),
    "a later evaluation that is worse than the training": lambda: costing(
        evaluations=[EvaluationRecord(20, 0, 0.8, examples=1000, train_accuracy=0.99, train_examples=1000)]
    ),
}
INFO = {
    "below_few": lambda: trained(testing.normal(16, 4), testing.normal(16, 4, mean=3.0)),
    "sites that differ and cost nothing": costing,
    "what it costs is age": lambda: costing(running=0.4, population=0.985),
    "what it costs is age, and one pass makes both calls": lambda: besides(places=2),
    "one pass makes both calls, the composition says": lambda: besides(places=0, composed=2, hidden="no graph"),
    "the second call is another pass, and costs nothing": lambda: besides(running=0.985),
    "nothing tells what one pass calls": lambda: besides(places=0, hidden="no graph"),
    "and a later evaluation is as good as the training": lambda: costing(
        evaluations=[EvaluationRecord(20, 0, 0.98, examples=1000, train_accuracy=0.99, train_examples=1000)]
    ),
    "above_alpha": lambda: at_p_value(LIMITS["alpha"] * 1.1),
    "below_shift": lambda: at_shift(LIMITS["shift"] / 1.02),
    "below_shift of the spreads": lambda: sites(0.0, 1e-3, spread=math.exp(LIMITS["shift"] * math.sqrt(2) / 1.03)),
    "the same data at both sites": lambda: trained(testing.normal(16, 64), testing.normal(16, 64)),
    "tiny batches": lambda: trained(testing.normal(512, 8), testing.normal(512, 8), channels=512),
    "heavy tails": lambda: trained(heavy(64, 16), heavy(64, 16), channels=64),
    "channels that move together": lambda: trained(correlated(64, 16), correlated(64, 16), channels=64),
    "pixels that repeat each other": lambda: trained(pictures(32), pictures(32), channels=32),
    "unsettled running statistics": lambda: trained(
        testing.normal(16, 64, mean=5.0), testing.normal(16, 64, mean=5.0), steps=6, decay=0.99
    ),
    "one bitwise the same call twice": lambda: testing.signals(
        *(
            testing.snapshot(n, *(testing.call(testing.layer(), site=k, mean=n / 7, var=1 + n / 3) for k in (0, 1)))
            for n in range(1, 9)
        )
    ),
    "a decay of zero, as in PointNet": lambda: trained(testing.normal(16, 64), testing.normal(16, 64), decay=0.0),
}
QUIET = {
    "one site": lambda: trained(testing.normal(16, 64)),
    "a site on each replica": lambda: testing.signals(
        *(
            testing.snapshot(n, *(testing.call(testing.layer(), replica=k, mean=k + n / 9) for k in (0, 1)))
            for n in range(1, 9)
        )
    ),
    "nothing seen": testing.signals,
}
SKIPS = {
    "below_samples": (lambda: sites(1.0, 1e-3, samples=3), None),
    "NaN in the statistics": (
        lambda: testing.signals(
            *(
                testing.snapshot(n, *(testing.call(testing.layer(), site=k, mean=math.nan) for k in (0, 1)))
                for n in range(1, 9)
            )
        ),
        None,
    ),
}

test_cases = cases.runner(RULE, fires=FIRES, info=INFO, quiet=QUIET, skips=SKIPS)


def test_both_sites_are_named_with_their_means():
    ((finding,), _) = cases.look(RULE, FIRES["two means"]())
    assert [row[0] for row in finding.table.rows] == ["bn#0", "bn#1"]
    first, second = (row[1] for row in finding.table.rows)
    assert (first, second) == (pytest.approx(0.0, abs=0.5), pytest.approx(1.0, abs=0.5))
    assert finding.evidence["between_shift"].value == pytest.approx(1 / math.sqrt(2), rel=0.1)
    assert finding.evidence["p_value"].value < 1e-4


@pytest.mark.parametrize(
    ("lines", "cells"),
    [
        ((), []),
        (("model.py:31", "model.py:35"), ["model.py:31", "model.py:35"]),
        ((None, "model.py:35"), ["not known", "model.py:35"]),
        (("model.py:31",), ["model.py:31", "not known"]),
        (("model.py:31", "model.py:35", "model.py:36"), ["model.py:31", "model.py:35"]),
    ],
)
def test_the_lines_that_call_the_sites_are_named_where_they_are_known(lines, cells):
    signals = at_shift(1.0)
    signals.specs["bn"] = replace(signals.specs["bn"], called_at=lines)
    ((finding,), _) = cases.look(RULE, signals)
    assert ("called from" in finding.table.columns) is bool(cells)
    assert [row[5] for row in finding.table.rows if cells] == cells
    assert {len(row) for row in finding.table.rows} == {len(finding.table.columns)}


@pytest.mark.parametrize(
    ("batch", "running", "note"), [(0.9, 0.9, True), (0.8, 0.9, True), (0.95, 0.75, False), (None, None, False)]
)
def test_that_it_costs_nothing_is_said_where_it_was_measured(batch, running, note):
    fed = at_shift(1.0)
    if batch is not None:
        fed.cells = testing.cells(16, evaluation={"batch": batch, "running": running, "population": running})
    ((finding,), _) = cases.look(RULE, fed)
    assert str(finding.severity or "warning") == ("info" if note else "warning")
    assert any("innocent: the same 1,000 evaluation examples" in n for n in finding.notes) is note


def test_drift_of_both_sites_alike_is_no_difference():
    draw = drifting()
    (findings, _) = cases.look(RULE, trained(draw, draw))
    assert {str(s) for s in cases.severities(RULE, findings)} == {"info"}


def healthy(rng):
    """A draw of one of the kinds that a fixed limit gets wrong: few elements, many channels, tails, correlation."""
    channels, count = int(rng.choice([8, 64, 512, 2048])), int(rng.choice([8, 32, 128]))
    kind = rng.choice(["normal", "correlated", "heavy"])
    return channels, {"normal": testing.normal, "correlated": correlated, "heavy": heavy}[kind](channels, count)


def test_healthy_shared_layers_raise_no_false_alarm():
    """Alpha is 1e-4 a look: 60 layers at 13 looks each should see 0.08 at most, so none is what to expect."""
    rng = np.random.default_rng(2024)
    alarms = 0
    for seed in range(60):
        channels, draw = healthy(rng)
        spec, fed = testing.layer(channels=channels), testing.signals()
        for snapshot in testing.train(spec, draw, draw, steps=16, seed=seed):
            fed.observe(snapshot)
            if len(fed.tables) >= LIMITS["samples"]:
                (findings, _) = cases.look(RULE, fed)
                alarms += {str(s) for s in cases.severities(RULE, findings)} != {"info"}
    assert alarms == 0


def test_what_the_graph_says_before_training():
    graph = Structure((testing.usage("bn", testing.place(producer="a"), testing.place(index=1, producer="b")),))
    ((finding,), skipped) = cases.look("BN101", testing.signals(graph))
    assert finding.severity is Severity.INFO
    assert finding.message == "`bn` is shared by 2 call sites; whether they differ shows in training"
    assert finding.table.rows == (("bn#0", "a"), ("bn#1", "b"))
    assert skipped == []


def test_the_graph_is_silent_once_training_is_watched():
    graph = Structure((testing.usage("bn", testing.place(), testing.place(index=1)),))
    assert cases.look("BN101", testing.signals(Attachment((testing.layer(),)), graph)) == ([], [])


def test_a_layer_with_one_place_is_not_shared():
    assert cases.look("BN101", testing.signals(Structure((testing.usage("bn", testing.place()),)))) == ([], [])


def test_that_the_other_calls_of_a_step_spoil_the_statistics_is_said():
    ((finding,), _) = cases.look(RULE, besides())
    assert "what spoils the running statistics are the other calls of a training step" in finding.notes[-1]
    assert "make the other passes of a training step with `training=False`" in finding.helps[0]
    assert not any("split_shared" in text for text in finding.helps)
    ((finding,), _) = cases.look(RULE, besides(places=2))
    assert "what costs accuracy is how old the running statistics are" in finding.notes[-1]


@pytest.mark.parametrize(("framework", "helps"), [("keras 3.15.1 (jax)", 2), ("chainer 7.8.1", 1)])
def test_the_repair_that_keras_models_have_is_offered_where_it_fits(framework, helps):
    known = at_shift(1.0)
    known.attach(Attachment(tuple(known.specs.values()), framework=framework))
    findings, _ = cases.look("BN101", known)
    assert len(findings[0].helps) == helps
