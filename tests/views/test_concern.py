"""What matters: healthy layers stay below 1, and each fault is in units of its rule."""

from __future__ import annotations

import math

import numpy as np
import pytest

from bnwatch import moments
from bnwatch.records import BatchStatistics, CallRecord, CallSite, LayerSpec, RunningStatistics, StepSnapshot
from bnwatch.rules import CATALOGUE
from bnwatch.signals import SITE_STATISTICS, STATISTICS, Flag, SharedSites, Signals
from bnwatch.views.concern import MOST, Concern, why
from bnwatch.views.statistics import CHOICES, MATTERS, judged, unknown_is_null

SPEC = LayerSpec("bn", "BatchNormalization", 16, 1e-3, 0.9)
SITE = CallSite("bn")
LIMITS = {f"{rule.id}.{name}": limit.value for rule in CATALOGUE for name, limit in rule.thresholds.items()}


def row(**changes):
    healthy = {
        "count": 64, "updates": 1000, "batch_mean": 0.1, "batch_std": 1.0, "running_mean": 0.1, "running_std": 1.0,
        "mean_shift": 0.1, "std_ratio": 1.0, "effective_samples": 64, "non_finite": 0, "flags": Flag.BATCH_VARIED,
        "zero_variance": 0, "unexplained": 0, "recovered_std": 1.0,
    }  # fmt: skip
    return np.array([[float({**healthy, **changes}[name]) for name in STATISTICS]], np.float32)


def judge(values, shared=()):
    found = Concern([SITE], {"bn": SPEC}).worst(values, shared)
    return float(found.matters[0]), why(int(found.term[0]), float(found.measured[0]))


NOISE = 3.8906  # of a normal distribution, 1e-4 lies beyond


@pytest.mark.parametrize(
    ("changes", "matters", "words"),
    [
        ({"mean_shift": 2.0}, 2.0 / math.hypot(NOISE * math.sqrt(2 / 1.9 / 64), 0.1), "batch mean 2 running"),
        ({"mean_shift": 2.0, "effective_samples": 1e9}, 20.0, "batch mean 2 running"),
        (
            {"std_ratio": 0.25},
            math.log(4.0) / math.hypot(NOISE * math.sqrt(1 / 1.9 / 64), 0.1),
            "batch standard deviation 0.25 times",
        ),
        ({"updates": 10, "mean_shift": 0.5}, 5.0, "35% of the initial values"),
        ({"updates": 10, "mean_shift": 9.0}, 0.9**10 / 0.05, "35% of the initial values"),
        ({"count": 2}, 2.5, "2 elements"),
        ({"zero_variance": 12}, 1.5, "75% of the channels constant"),
        ({"batch_std": 0.01}, (1e-3 / (1e-4 + 1e-3)) / 0.5, "epsilon is 91%"),
        ({"unexplained": 0.05}, 5.0, "moved 0.05 standard"),
        ({"non_finite": 3, "batch_mean": math.nan}, MOST, "NaN, infinity"),
        ({"flags": Flag.NEGATIVE_VARIANCE}, MOST, "NaN, infinity"),
        ({"mean_shift": math.inf}, MOST, "batch mean inf"),
        ({"flags": math.inf, "effective_samples": -1.0}, None, ""),
    ],
)
def test_each_fault_is_in_units_of_its_rule(changes, matters, words):
    with np.errstate(all="raise"):
        found, said = judge(row(**changes))
    if matters is None:
        assert 0.0 <= found < 1.0
    else:
        if "updates" in changes and changes["mean_shift"] == 9.0:
            # its mean is the farther off
            matters, words = 9.0 / math.hypot(NOISE * math.sqrt(2 / 1.9 / 64), 0.1), "batch mean 9"
        assert found == pytest.approx(matters, rel=1e-3)
        assert words in said
    many = Concern([SITE], {"bn": SPEC}).matters(np.stack([row(**changes), row()]))
    assert many[:, 0] == pytest.approx([found, judge(row())[0]], rel=1e-5)


def test_a_layer_that_nobody_described_is_judged_by_its_numbers():
    found = Concern([SITE], {}).worst(row(count=1))
    assert found.matters[0] == pytest.approx(5.0)


def test_call_sites_that_differ_matter_as_bn101_says():
    values = np.zeros((2, len(SITE_STATISTICS)), np.float32)
    values[:, SITE_STATISTICS.index("steps")] = 16
    values[:, SITE_STATISTICS.index("between_shift")] = 0.7
    values[:, SITE_STATISTICS.index("between_ratio")] = 1e4
    shared = SharedSites("bn", values)
    sites = [CallSite("bn"), CallSite("bn", 1)]
    found = Concern(sites, {"bn": SPEC}).worst(np.concatenate([row(), row()]), [shared])
    assert found.matters == pytest.approx([7.0, 7.0])
    assert why(int(found.term[0]), float(found.measured[0])) == "call sites 0.7 standard deviations apart"
    values[:, SITE_STATISTICS.index("between_ratio")] = 1.0
    assert Concern(sites, {"bn": SPEC}).worst(np.concatenate([row(), row()]), [shared]).matters.max() < 1.0
    values[:, SITE_STATISTICS.index("between_ratio")] = 1e4
    values[:, SITE_STATISTICS.index("steps")] = 2
    assert Concern(sites, {"bn": SPEC}).worst(np.concatenate([row(), row()]), [shared]).matters.max() < 1.0


@pytest.mark.parametrize("decay", [0.9, 0.99])
@pytest.mark.parametrize("together", [False, True])
@pytest.mark.parametrize("count", [16, 256])
def test_healthy_layers_stay_below_1(decay, together, count):
    """None is off where channels are independent, and one in 200 at most where 16 channels are all the same."""
    rng = np.random.default_rng(0)
    spec = LayerSpec("bn", "BatchNormalization", 16, 1e-3, decay)
    layers, signals = 10, Signals()
    mean, var = np.zeros((layers, 16)), np.ones((layers, 16))
    late, off = 0, 0
    specs = {f"bn{n}": LayerSpec(f"bn{n}", spec.kind, 16, 1e-3, decay) for n in range(layers)}
    concern = Concern([CallSite(path) for path in specs], specs)
    settled = moments.updates_until(decay, LIMITS["BN201.weight"]) + 16
    for step in range(1, settled + 60):
        batch = rng.normal(0.3, 1.0, (layers, count, 1 if together else 16)).repeat(16 if together else 1, axis=2)
        batch_mean, batch_var = batch.mean(axis=1), batch.var(axis=1)
        mean, var = decay * mean + (1 - decay) * batch_mean, decay * var + (1 - decay) * batch_var
        calls = [
            CallRecord(
                one,
                CallSite(path),
                BatchStatistics(batch_mean[n], batch_var[n], count),
                RunningStatistics(mean[n], var[n], decay, step),
            )
            for n, (path, one) in enumerate(specs.items())
        ]
        table = signals.observe(StepSnapshot(step, 0, tuple(calls)))
        if step > settled:
            matters = concern.matters(table.values)
            late += matters.size
            off += int((matters >= 1.0).sum())
    assert late == 590
    assert off <= (late / 200 if together else 0)


@pytest.mark.parametrize("name", CHOICES)
def test_the_farthest_from_healthy_is_found(name):
    unhealthy = {
        "count": 1, "updates": 2, "batch_mean": 9.0, "batch_std": 50.0, "running_mean": -9.0, "running_std": 0.1,
        "mean_shift": 5.0, "std_ratio": 0.01, "effective_samples": 1.5, "non_finite": 3, "zero_variance": 9,
        "unexplained": 0.5, "recovered_std": 50.0, MATTERS: None,
    }  # fmt: skip
    change = {"mean_shift": 9.0} if name == MATTERS else {name: unhealthy[name]}
    values, distance = judged(name, np.stack([row(), row(**change), row()]), Concern([SITE], {"bn": SPEC}))
    assert values.shape == distance.shape == (3, 1)
    assert distance[:, 0].argmax() == 1
    if name != MATTERS:
        assert values[1, 0] == pytest.approx(unhealthy[name])
        _, distance = judged(name, np.stack([row(), row(**{name: math.nan})]), Concern([SITE], {"bn": SPEC}))
        assert distance[1, 0] == (-np.inf if unknown_is_null(name) else np.inf)
