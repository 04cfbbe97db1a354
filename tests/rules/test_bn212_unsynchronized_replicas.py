import math

import numpy as np
import pytest

from bnwatch import moments, testing
from bnwatch.diagnosis import Severity
from bnwatch.records import Attachment, EvaluationRecord
from tests.rules import cases

RULE = "BN212"
LIMITS = {name: threshold.value for name, threshold in cases.rule(RULE).thresholds.items()}
UNSEEN = "statistics of the other ranks are not seen: pass comm=comm on every rank"


def replicas(*draws, steps=40, every=1, seed=0, layer=None, evaluated=True, synchronized=None):
    """Replicas of one layer, each with data of its own; ``synchronized`` averages what they evaluate with."""
    layer = layer or testing.layer(channels=16)
    runs = [testing.train(layer, draw, steps=steps, every=every, seed=100 * seed + n) for n, draw in enumerate(draws)]
    fed = testing.signals()
    for snapshots in zip(*runs, strict=True):
        calls = [
            testing.call(
                layer, mean=c.batch.mean, var=c.batch.var, count=c.batch.count, replica=n,
                running_mean=c.running.mean, running_var=c.running.var,
            )
            for n, snapshot in enumerate(snapshots)
            for c in snapshot.calls
        ]  # fmt: skip
        fed.observe(testing.snapshot(snapshots[0].step, *calls))
    if evaluated:
        held = None
        if synchronized:
            ours = [np.mean([getattr(c.running, name) for c in calls], axis=0) for name in ("mean", "var")]
            held = {layer.path: [tuple(ours)] * len(draws)}
        fed.evaluate(EvaluationRecord(steps, 0, 0.5))
        fed.compare(steps, 0, held)
    return fed


def held(difference, *, noise=1e-3, batch=1.0, spread=1.0, samples=16, decay=0.9):
    """Two replicas whose batch means are ``batch`` plus an alternating ``noise`` apart, whose running ones differ."""
    layer = testing.layer(channels=3, epsilon=0.0, decay=decay)
    steps = []
    for n in range(1, samples + 1):
        half = (batch + noise * (-1) ** n) / 2
        calls = (
            testing.call(layer, replica=k, mean=3 + n + sign * half, var=1 + 1e-3 * k * (-1) ** n)
            for k, sign in enumerate((1, -1))
        )
        steps.append(testing.snapshot(n, *calls))
    fed = testing.signals(*steps)
    one = np.ones(3)
    fed.compare(samples, 0, {"bn": [(one * difference / 2, one * spread), (-one * difference / 2, one / spread)]})
    return fed


def at_p_value(p, samples=16):
    """F is (n - 1) D^2 / s^2 for a difference D and an alternating noise s; both tests share alpha."""
    limit = moments.same_sites_limit(p / 2, 2, samples)
    return held(9.0, noise=math.sqrt((samples - 1) / limit), samples=samples)


def at_shift(shift):
    """Two means D apart have standard deviation D / sqrt(2)."""
    return held(shift * math.sqrt(2))


def normal(**how):
    return testing.normal(16, 64, **how)


FIRES = {
    "two means": lambda: replicas(normal(), normal(mean=1.0)),
    "two spreads": lambda: replicas(normal(), normal(std=2.0)),
    "four replicas, one apart": lambda: replicas(*[normal()] * 3, normal(mean=1.0)),
    "a slow average": lambda: replicas(
        normal(), normal(mean=2.0), steps=400, every=20, layer=testing.layer(channels=16, decay=0.99)
    ),
    "above_samples": lambda: held(1.0, samples=4),
    "below_alpha": lambda: at_p_value(LIMITS["alpha"] / 1.1),
    "above_shift": lambda: at_shift(LIMITS["shift"] * 1.02),
    "above_shift of the spreads": lambda: held(0.0, spread=math.exp(LIMITS["shift"] * math.sqrt(2) * 1.02)),
}
QUIET = {
    "above_alpha": lambda: at_p_value(LIMITS["alpha"] * 1.1),
    "below_shift": lambda: at_shift(LIMITS["shift"] / 1.02),
    "below_shift of the spreads": lambda: held(0.0, spread=math.exp(LIMITS["shift"] * math.sqrt(2) / 1.02)),
    "parts of the same data": lambda: replicas(normal(), normal()),
    "tiny parts": lambda: replicas(*[testing.normal(512, 4)] * 2, layer=testing.layer(channels=512)),
    "eight replicas": lambda: replicas(*[normal()] * 8),
    "before the averages settle": lambda: replicas(normal(mean=5.0), normal(mean=5.0), steps=6),
    "no memory at all": lambda: replicas(normal(), normal(), layer=testing.layer(channels=16, decay=0.0)),
    "no update at all": lambda: replicas(normal(), normal(), layer=testing.layer(channels=16, decay=1.0)),
    "averaged before the evaluation": lambda: replicas(normal(), normal(mean=1.0), synchronized=True),
    "the statistics of all": lambda: held(0.0, batch=0.0, noise=0.0),
    "one replica": lambda: testing.signals(*testing.train(testing.layer(), testing.normal(4, 64), steps=8)),
    "nothing seen": testing.signals,
}
SKIPS = {
    "below_samples": (lambda: held(1.0, samples=3), None),
    "no evaluation yet": (lambda: replicas(normal(), normal(mean=1.0), evaluated=False), None),
    "other ranks unseen": (lambda: testing.signals(Attachment((testing.layer(),), unseen=UNSEEN)), None),
    "NaN on a replica": (lambda: held(math.nan), None),
}

test_cases = cases.runner(RULE, fires=FIRES, quiet=QUIET, skips=SKIPS)


def test_the_worst_layer_comes_first_with_the_mean_of_each_replica():
    ((finding,), _) = cases.look(RULE, FIRES["two means"]())
    assert finding.subject == "model"
    assert "2 replicas" in finding.message
    assert "`bn`" in finding.message
    assert finding.evidence["between_shift"].value == pytest.approx(1 / math.sqrt(2), rel=0.1)
    assert finding.evidence["p_value"].value < 1e-4
    first, second = map(float, finding.table.rows[0][-1].partition(": ")[2].split(", "))
    assert (first, second) == (pytest.approx(0.0, abs=0.2), pytest.approx(1.0, abs=0.2))


@pytest.mark.parametrize(
    ("framework", "said"),
    [("keras 3.15.1 (tensorflow)", "synchronized=True"), ("chainer 7.8.1", "AllreducePersistent")],
)
def test_the_help_is_that_of_the_framework(framework, said):
    known = FIRES["two means"]()
    known.attach(Attachment(tuple(known.specs.values()), framework=framework))
    ((finding,), _) = cases.look(RULE, known)
    assert any(said in text for text in finding.helps)


def test_the_noise_of_the_averages_is_taken_out():
    """Averages of the same data differ by (1 - a) / (1 + a) of the variance of batch means, and by no more."""
    layer = testing.layer(channels=256)
    found = [replicas(*[testing.normal(256, 8)] * 4, seed=seed, layer=layer) for seed in range(5)]
    raw = [np.var([row["running_mean"] for row in one.replicas.layers[0].rows()], ddof=1) for one in found]
    assert np.mean(raw) > 0.1 / 19 / 8  # of the worst channel, so far more than the average one
    assert max(one.replicas.layers[0]["between_shift"] for one in found) < 0.08


def test_parts_of_the_same_data_raise_no_false_alarm():
    for seed in range(40):
        fed = replicas(*[testing.normal(64, 8)] * (2 + seed % 3), steps=24, seed=seed, layer=testing.layer(channels=64))
        assert cases.look(RULE, fed) == ([], [])


def test_a_warning_is_what_it_is():
    assert cases.rule(RULE).severity is Severity.WARNING
