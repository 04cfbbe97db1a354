import math
import tracemalloc
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bnwatch import testing
from bnwatch.records import Attachment, EvaluationRecord
from bnwatch.signals import HISTORY, SITE_STATISTICS, STATISTICS, WINDOW, Flag, Signals, gap

EXACT = ("count", "updates", "non_finite", "flags")


def draw(rng, channels, bessel):
    spec = testing.layer(f"bn{channels}", channels, epsilon=1e-2, decay=0.9, bessel_corrected=bessel)

    def at(step):
        return testing.call(
            spec,
            mean=rng.normal(3, 2, channels),
            var=rng.gamma(2, 1, channels),
            running_mean=rng.normal(3, 2, channels),
            running_var=rng.gamma(2, 1, channels),
            count=7 + step,
            updates=step,
        )

    return at


def expected(calls):
    """One row of STATISTICS for the last of several samples of one site, in float64."""
    last = calls[-1]
    batch_mean, batch_var = last.batch.mean.astype(float), last.batch.var.astype(float)
    mean, stored = last.running.mean.astype(float), last.running.var.astype(float)
    m, eps = last.batch.count, last.spec.epsilon
    var = stored * (m - 1) / m if last.spec.bessel_corrected else stored
    row = {
        "count": m,
        "updates": last.running.updates,
        "batch_mean": batch_mean.mean(),
        "batch_std": math.sqrt(batch_var.mean()),
        "running_mean": mean.mean(),
        "running_std": math.sqrt(var.mean()),
        "mean_shift": math.sqrt(np.mean((batch_mean - mean) ** 2 / (var + eps))),
        "std_ratio": math.exp(np.mean(np.log(np.sqrt(batch_var + eps) / np.sqrt(var + eps)))),
        "effective_samples": math.nan,
        "non_finite": 0,
        "flags": 0,
        "zero_variance": 0,
        "unexplained": math.nan,
        "recovered_std": math.nan,
    }
    if len(calls) > 1:
        decay, before = last.spec.decay, calls[-2].running
        factor = (m - 2) / (m - 1) if last.spec.bessel_corrected else 1.0  # of the sample before, with one less
        explained = decay * before.mean.astype(float) + (1 - decay) * batch_mean
        taken_in = (var - decay * before.var.astype(float) * factor) / (1 - decay)
        row["unexplained"] = math.sqrt(np.mean((mean - explained) ** 2 / var))
        row["recovered_std"] = math.sqrt(max(taken_in.mean(), 0.0))
    noise = [
        np.mean((b.batch.mean.astype(float) - a.batch.mean) ** 2 / 2 / (b.batch.var.astype(float) + eps))
        for a, b in pairwise(calls)
    ][-WINDOW:]
    if noise:
        row["effective_samples"] = 1 / np.mean(noise)
        row["flags"] = Flag.BATCH_VARIED
    else:
        row["flags"] = Flag.UNMOVED
    return [row[name] for name in STATISTICS]


@given(st.integers(0, 2**32 - 1), st.integers(1, 20), st.lists(st.booleans(), min_size=1, max_size=3))
@settings(max_examples=40, deadline=None)
def test_every_column_against_numpy(seed, samples, bessel):
    rng = np.random.default_rng(seed)
    layers = [draw(rng, width, corrected) for width, corrected in zip((1, 5, 64), bessel, strict=False)]
    seen = [[at(step) for at in layers] for step in range(1, samples + 1)]
    fed = testing.signals(*(testing.snapshot(n, *calls) for n, calls in enumerate(seen, start=1)))
    assert fed.table.values.dtype == np.float32
    for n, calls in enumerate(zip(*seen, strict=True)):
        np.testing.assert_allclose(fed.table.values[n], expected(calls), rtol=2e-5, atol=1e-6)


def test_what_the_moving_average_took_in_between_samples_is_recovered():
    spec = testing.layer(channels=3, decay=0.9)
    rng = np.random.default_rng(0)
    mean, var, fed = np.zeros(3), np.ones(3), Signals()
    taken_in = []
    for step in range(1, 31):
        batch = rng.normal(size=3), rng.gamma(3, size=3)
        mean, var = 0.9 * mean + 0.1 * batch[0], 0.9 * var + 0.1 * batch[1]
        taken_in.append(batch[1])
        if step % 10 == 0:
            call = testing.call(
                spec, mean=batch[0], var=batch[1], running_mean=mean, running_var=var, updates=step
            )  # fmt: skip
            fed.observe(testing.snapshot(step, call))
    weights = 0.9 ** np.arange(9, -1, -1)
    (site,) = fed.sites()
    assert site.recovered_std == pytest.approx(math.sqrt((weights @ taken_in[20:]).mean() / weights.sum()), rel=1e-5)
    assert math.isnan(site.unexplained)


def test_a_movement_that_no_call_explains():
    spec = testing.layer(decay=0.9)
    fed = Signals()
    fed.observe(testing.snapshot(1, testing.call(spec, mean=1.0, running_mean=0.1, updates=1)))
    fed.observe(testing.snapshot(2, testing.call(spec, mean=1.0, running_mean=0.19, updates=2)))
    assert next(fed.sites()).unexplained == pytest.approx(0.0, abs=1e-6)
    fed.observe(testing.snapshot(3, testing.call(spec, mean=1.0, running_mean=0.9 * 0.271 + 0.1 * 5.0, updates=3)))
    assert next(fed.sites()).unexplained == pytest.approx(0.9 * 0.271 + 0.5 - 0.271, rel=1e-5)


def test_constant_channels_are_counted():
    spec = testing.layer(epsilon=1e-3)
    mean, var = [0.5, 0.0, 3.0, 1.0], [1e-14, 0.0, 1e-3, 3e-3]
    fed = testing.signals(testing.snapshot(1, testing.call(spec, mean=mean, var=var)))
    (site,) = fed.sites()
    assert site.zero_variance == 2
    assert site.epsilon_share == pytest.approx(0.5, rel=1e-5)


def test_statistics_kept_in_half_precision_are_told():
    spec = testing.layer()
    half = testing.call(spec)
    half = replace(half, running=replace(half.running, var=half.running.var.astype(np.float16)))
    fed = testing.signals(testing.snapshot(1, half))
    assert flags(fed) == [Flag.UNMOVED | Flag.INITIAL | Flag.HALF]


def test_bessels_correction_is_taken_out():
    plain, corrected = testing.layer("a"), testing.layer("b", bessel_corrected=True)
    biased, m = 2.0, 4
    fed = testing.signals(
        testing.snapshot(
            1,
            testing.call(plain, var=biased, running_var=biased, count=m),
            testing.call(corrected, var=biased, running_var=biased * m / (m - 1), count=m),
        )
    )
    np.testing.assert_allclose(fed.table.column("std_ratio"), 1.0, rtol=1e-6)
    np.testing.assert_allclose(fed.table.column("running_std"), math.sqrt(2.0), rtol=1e-6)


def anova(values):
    steps, sites = values.shape
    rows, columns = values.mean(axis=1, keepdims=True), values.mean(axis=0, keepdims=True)
    between = steps * np.square(columns - values.mean()).sum() / (sites - 1)
    within = np.square(values - rows - columns + values.mean()).sum() / ((steps - 1) * (sites - 1))
    return between, within


@given(st.integers(0, 2**32 - 1), st.integers(2, WINDOW + 5), st.integers(2, 4))
@settings(max_examples=30, deadline=None)
def test_shared_sites_against_numpy(seed, samples, sites):
    stats = pytest.importorskip("scipy.stats")
    rng = np.random.default_rng(seed)
    spec, channels = testing.layer(channels=3), 3
    means = rng.normal(size=(samples, sites, channels)) + np.arange(sites)[None, :, None]
    spreads = rng.gamma(4, 1, (samples, sites, channels))
    fed = testing.signals(
        *(
            testing.snapshot(
                n + 1,
                *(
                    testing.call(spec, site=k, mean=means[n, k], var=spreads[n, k], running_mean=0.5, running_var=4.0)
                    for k in range(sites)
                ),
            )
            for n in range(samples)
        )
    )
    ((shared_spec, rows, apart),) = fed.shared()
    assert shared_spec == spec
    assert [r.site.index for r in rows] == list(range(sites))
    window, logs = means[-WINDOW:], 0.5 * np.log(spreads + spec.epsilon)[-WINDOW:]
    steps, pooled = len(window), (spreads[-1] + spec.epsilon).mean(axis=0)
    ratios, squares = [], []
    for values, unit in ((window, pooled[:, None]), (logs, 1.0)):
        tests = np.array([anova(values[:, :, c]) for c in range(channels)]) / unit
        ratios.append(tests[:, 0].sum() / tests[:, 1].sum())
        squares.append(np.maximum(tests[:, 0] - tests[:, 1], 0) / steps)
    assert apart["between_shift"] == pytest.approx(math.sqrt(np.mean(squares[0])), rel=1e-4, abs=1e-6)
    assert apart["between_scale"] == pytest.approx(math.sqrt(np.mean(squares[1])), rel=1e-4, abs=1e-6)
    assert apart["between_ratio"] == pytest.approx(max(ratios), rel=1e-4)
    assert apart["steps"] == steps
    p = 2 * stats.f.sf(max(ratios), sites - 1, (steps - 1) * (sites - 1))
    assert apart.p_value == pytest.approx(min(1.0, p), rel=1e-3, abs=1e-7)
    for alpha in (1e-4, 0.05):
        assert apart.differ(alpha) == (apart.p_value < alpha)
    deviation = np.abs(means[-1] - means[-1].mean(axis=0)).max(axis=0) / np.sqrt(pooled)
    channel = int(apart["channel"])
    assert deviation[channel] == pytest.approx(deviation.max(), rel=1e-5)
    for k, row in enumerate(apart.rows()):
        assert row["batch_mean"] == pytest.approx(means[-1, k, channel], rel=1e-5)
        assert row["batch_std"] == pytest.approx(math.sqrt(spreads[-1, k, channel] + spec.epsilon), rel=1e-5)
        assert row["running_mean"] == pytest.approx(0.5)
        assert row["running_std"] == pytest.approx(2.0)


def test_shared_layers_of_different_widths_and_numbers_of_sites_are_kept_apart():
    wide, narrow, three = testing.layer("wide", 32), testing.layer("narrow", 2), testing.layer("three", 5)
    rng = np.random.default_rng(0)

    def calls():
        return [
            testing.call(spec, site=k, mean=rng.normal(shift * k, 0.1, spec.channels), var=1.0)
            for spec, sites, shift in ((wide, 2, 0.0), (narrow, 2, 3.0), (three, 3, 0.0))
            for k in range(sites)
        ]

    fed = testing.signals(*(testing.snapshot(n, *calls()) for n in range(1, 9)))
    apart = {spec.path: found for spec, _, found in fed.shared()}
    assert {path: len(found.values) for path, found in apart.items()} == {"wide": 2, "narrow": 2, "three": 3}
    # Two means 3 apart have standard deviation 3 / sqrt(2).
    assert apart["narrow"]["between_shift"] == pytest.approx(3 / math.sqrt(2), rel=0.1)
    assert apart["narrow"].p_value < 1e-6
    assert min(apart["wide"].p_value, apart["three"].p_value) > 1e-3
    assert len(fed.table.shared[0].values[0]) == len(SITE_STATISTICS)


def test_replicas_are_no_shared_sites():
    spec = testing.layer()
    fed = testing.signals(
        *(testing.snapshot(n, testing.call(spec), testing.call(spec, replica=1)) for n in range(1, 4))
    )
    assert list(fed.shared()) == []
    assert [str(s.site) for s in fed.sites()] == ["bn#0", "bn#0@1"]


@given(st.integers(0, 2**32 - 1), st.integers(2, WINDOW + 5), st.integers(2, 4), st.sampled_from([0.0, 0.9, 1.0]))
@settings(max_examples=30, deadline=None)
def test_replicas_against_numpy(seed, samples, replicas, decay):
    rng = np.random.default_rng(seed)
    spec, channels = testing.layer(channels=3, decay=decay), 3
    means = rng.normal(size=(samples, replicas, channels)) + np.arange(replicas)[None, :, None]
    spreads = rng.gamma(4, 1, (samples, replicas, channels))
    fed = testing.signals(
        *(
            testing.snapshot(
                n + 1,
                *(testing.call(spec, replica=k, mean=means[n, k], var=spreads[n, k]) for k in range(replicas)),
            )
            for n in range(samples)
        )
    )
    held = rng.normal(0, 2, (replicas, channels)), rng.gamma(4, 1, (replicas, channels))
    (apart,) = fed.compare(7, 1, {"bn": list(zip(*held, strict=True))}).layers
    assert (fed.replicas.step, fed.replicas.epoch, apart.layer) == (7, 1, "bn")
    window, logs = means[-WINDOW:], 0.5 * np.log(spreads + spec.epsilon)[-WINDOW:]
    pooled = (spreads[-1] + spec.epsilon).mean(axis=0)
    noise = (1 - decay) / (1 + decay)
    found = [apart["between_shift"], apart["between_scale"]]
    running = held[0] / np.sqrt(pooled), 0.5 * np.log(held[1] + spec.epsilon)
    for value, of_batches, unit, shift in zip(running, (window, logs), (pooled, 1.0), found, strict=True):
        within = np.array([anova(of_batches[:, :, c])[1] for c in range(channels)]) / unit
        square = np.maximum(value.var(axis=0, ddof=1) - noise * within, 0)
        assert shift == pytest.approx(math.sqrt(square.mean()), rel=1e-4, abs=1e-5)
    channel = int(apart["channel"])
    assert np.abs(running[0] - running[0].mean(axis=0)).max(axis=0).argmax() == channel
    for k, row in enumerate(apart.rows()):
        assert row["running_mean"] == pytest.approx(held[0][k, channel], rel=1e-5)
        assert row["running_std"] == pytest.approx(math.sqrt(held[1][k, channel]), rel=1e-5)


def test_replicas_that_cannot_be_compared():
    spec, one = testing.layer(), np.ones(4)
    calls = testing.call(spec), testing.call(spec, replica=1, mean=1.0)
    assert testing.signals().compare(1, 0) is None
    fed = testing.signals(testing.snapshot(1, *calls))
    assert fed.compare(1, 0) is None  # a single sample
    fed.observe(testing.snapshot(2, *calls))
    assert fed.compare(2, 0, {"bn": [(one, one)]}) is None  # of one replica only
    assert fed.compare(2, 0, {"other": [(one, one)] * 2}) is None
    assert fed.compare(2, 0, {"bn": [(one, one), (one * np.nan, one)]}) is None
    assert fed.replicas is None
    assert fed.compare(2, 0) is fed.replicas is not None
    assert (fed.replicated, testing.signals(testing.snapshot(1, calls[0])).replicated) == (2, 1)
    uneven = testing.call(testing.layer(channels=3), replica=1)
    assert testing.signals(*(testing.snapshot(n, calls[0], uneven) for n in (1, 2))).compare(2, 0) is None


def test_replicas_are_compared_as_before_after_a_recall():
    rng = np.random.default_rng(0)
    spec = testing.layer()
    steps = [
        testing.snapshot(n, *(testing.call(spec, replica=k, mean=rng.normal(k, 1, 4)) for k in range(2)))
        for n in range(1, 8)
    ]
    whole, half, rest = testing.signals(*steps), testing.signals(*steps[:5]), testing.signals()
    rest.recall(half.memory)
    assert rest.compare(5, 0).layers[0].values.tobytes() == half.compare(5, 0).layers[0].values.tobytes()
    for step in steps[5:]:
        rest.observe(step)
    assert rest.compare(7, 0).layers[0].values.tobytes() == whole.compare(7, 0).layers[0].values.tobytes()
    damaged = {**half.memory, "groups": [{**half.memory["groups"][0], "latest": [np.ones(3)] * 4}]}
    with pytest.raises(ValueError, match="shape"):
        testing.signals().recall(damaged)


@pytest.mark.parametrize("rho", [0.0, 0.5, 0.9])
def test_effective_samples_recovers_how_many_elements_are_independent(rho):
    """Rows of pixels, each repeating its neighbour with probability rho: an autocorrelation of rho."""
    rng = np.random.default_rng(5)
    rows, length, channels = 8, 64, 128
    spec = testing.layer(channels=channels)

    def pixels(_rng):
        noise = rng.normal(size=(rows, length, channels))
        values = np.empty_like(noise)
        values[:, 0] = noise[:, 0]
        for t in range(1, length):
            values[:, t] = rho * values[:, t - 1] + math.sqrt(1 - rho * rho) * noise[:, t]
        return values.reshape(-1, channels)

    fed = testing.signals(*testing.train(spec, pixels, steps=17))
    lag = np.arange(1, length)
    exact = rows * length / (1 + 2 * ((1 - lag / length) * rho**lag).sum())
    # The mean over channels of a squared normal has relative error sqrt(2 / (16 * 128)) or so.
    assert float(fed.table.column("effective_samples")[0]) == pytest.approx(exact, rel=0.12)
    assert float(fed.table.column("count")[0]) == rows * length


def test_effective_samples_does_not_take_drift_for_noise():
    spec = testing.layer(channels=256)
    rng = np.random.default_rng(0)
    fed = Signals()
    for n in range(1, 20):
        fed.observe(testing.snapshot(n, testing.call(spec, mean=0.02 * n + rng.normal(0, 0.125, 256), var=1.0)))
    assert float(fed.table.column("effective_samples")[0]) == pytest.approx(64, rel=0.1)


def flags(fed):
    return [s.flag for s in fed.sites()]


def test_flags_are_exact():
    spec = testing.layer()
    fed = Signals()
    fed.observe(testing.snapshot(1, testing.call(spec)))
    assert flags(fed) == [Flag.UNMOVED | Flag.INITIAL]
    fed.observe(testing.snapshot(2, testing.call(spec)))
    assert flags(fed) == [Flag.UNMOVED | Flag.INITIAL]
    fed.observe(testing.snapshot(3, testing.call(spec, mean=np.nextafter(np.float32(0), np.float32(1)))))
    assert flags(fed) == [Flag.UNMOVED | Flag.INITIAL | Flag.BATCH_VARIED]
    half_moved = testing.call(spec, running_mean=np.nextafter(np.float32(0), np.float32(1)))
    other = Signals()
    other.observe(testing.snapshot(1, testing.call(spec)))
    other.observe(testing.snapshot(2, half_moved))
    assert flags(other) == [Flag.UNMOVED_VARIANCE]
    one_ulp = np.array([1, 1, 1, np.nextafter(np.float32(1), np.float32(2))], np.float32)
    fed.observe(testing.snapshot(4, testing.call(spec, running_var=one_ulp)))
    assert flags(fed) == [Flag(0)]
    fed.observe(testing.snapshot(5, testing.call(spec, running_var=[1, 1, -1e-6, 1])))
    assert flags(fed) == [Flag.NEGATIVE_VARIANCE]


def test_initial_values_are_those_of_the_layer():
    spec = testing.layer(initial=(0.5, 2.0))
    at = testing.call(spec, running_mean=0.5, running_var=2.0)
    assert flags(testing.signals(testing.snapshot(1, at))) == [Flag.UNMOVED | Flag.INITIAL]
    assert flags(testing.signals(testing.snapshot(1, testing.call(spec)))) == [Flag.UNMOVED]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(
    ("field", "flag"),
    [
        ("mean", Flag.NON_FINITE_BATCH),
        ("var", Flag.NON_FINITE_BATCH),
        ("running_mean", Flag.NON_FINITE_RUNNING),
        ("running_var", Flag.NON_FINITE_RUNNING),
    ],
)
def test_non_finite_values_are_counted_and_stay_where_they_are(value, field, flag):
    sick, well = testing.layer("sick"), testing.layer("well")
    fed = testing.signals(
        testing.snapshot(1, testing.call(sick, **{field: [0.5, value, value, 0.5]}), testing.call(well, mean=0.25))
    )
    first, second = fed.sites()
    assert first.flag & flag
    assert first.non_finite == 2
    assert second.non_finite == 0
    assert second.mean_shift == pytest.approx(0.25, rel=1e-3)
    assert [s.spec.path for s in fed.sites(flag)] == ["sick"]


def test_a_shared_layer_with_nan_gives_no_comparison():
    spec = testing.layer()
    fed = testing.signals(
        *(testing.snapshot(n, testing.call(spec), testing.call(spec, site=1, mean=math.nan)) for n in (1, 2, 3))
    )
    ((_, _, apart),) = fed.shared()
    assert apart is None


def test_layout_may_change():
    one, two = testing.layer("one", 3), testing.layer("two", 5)
    fed = Signals()
    for n in (1, 2):
        fed.observe(testing.snapshot(n, testing.call(one, mean=n)))
    fed.observe(testing.snapshot(3, testing.call(one, mean=3), testing.call(two)))
    assert [s.site.layer for s in fed.sites()] == ["one", "two"]
    assert math.isnan(fed.table.column("effective_samples")[0])
    fed.observe(testing.snapshot(4, testing.call(two, mean=1)))
    assert [s.site.layer for s in fed.sites()] == ["two"]
    fed.observe(testing.snapshot(5))
    assert list(fed.sites()) == []
    assert list(fed.shared()) == []
    assert fed.table.values.shape == (0, len(STATISTICS))
    assert (fed.step, fed.samples) == (5, 5)


def test_history_is_bounded():
    spec = testing.layer(channels=64)
    fed = Signals()

    def feed(start, number):
        for n in range(start, start + number):
            fed.observe(testing.snapshot(n, testing.call(spec, mean=n), testing.call(spec, site=1, mean=-n)))
            fed.evaluate(EvaluationRecord(n, 0, 0.5))
            fed.looks.append(testing.look(n))

    feed(1, HISTORY + 10)
    assert (len(fed.tables), len(fed.evaluations), len(fed.looks)) == (HISTORY, HISTORY, HISTORY)
    assert (fed.samples, fed.evaluated) == (HISTORY + 10, HISTORY + 10)
    assert fed.tables[0].step == 11
    tracemalloc.start()
    feed(HISTORY + 11, 50)
    before = tracemalloc.get_traced_memory()[0]
    feed(HISTORY + 61, 100)
    grown = tracemalloc.get_traced_memory()[0] - before
    tracemalloc.stop()
    assert grown < 150_000


def test_long_sums_over_the_window_do_not_wear_out():
    """The window is kept as running sums: a spell of huge values must not blunt what comes after it."""
    spec = testing.layer(channels=2)
    rng = np.random.default_rng(0)
    fed, fresh = Signals(), Signals()

    def calls(scale):
        return [testing.call(spec, site=k, mean=scale * rng.normal(k, 0.1, 2)) for k in (0, 1)]

    for n in range(1, 41):
        fed.observe(testing.snapshot(n, *calls(1e12)))
    for n in range(41, 41 + WINDOW):
        snap = testing.snapshot(n, *calls(1.0))
        fed.observe(snap)
        fresh.observe(snap)
    assert fed.table.shared[0]["between_shift"] == pytest.approx(fresh.table.shared[0]["between_shift"], rel=1e-3)
    assert fed.table.shared[0]["between_ratio"] == pytest.approx(fresh.table.shared[0]["between_ratio"], rel=1e-3)


def test_one_silent_quantity_does_not_hide_the_other():
    """Means that are all exactly zero have no variance to compare; the spreads still differ."""
    spec = testing.layer()
    rng = np.random.default_rng(0)
    fed = testing.signals(
        *(
            testing.snapshot(n, *(testing.call(spec, site=k, var=(1 + 3 * k) * rng.gamma(50, 0.02, 4)) for k in (0, 1)))
            for n in range(1, 9)
        )
    )
    assert fed.table.shared[0].p_value < 1e-6


def test_step_and_epoch_are_the_latest_of_anything():
    fed = testing.signals(testing.snapshot(3), EvaluationRecord(7, 2), testing.look(5, epoch=1))
    assert (fed.step, fed.epoch) == (7, 2)
    assert (Signals().step, Signals().epoch) == (0, 0)


def test_chance_takes_the_best_that_is_known():
    assert Signals().chance is None
    looked = testing.look(1, testing.layer_look("out", units=4))
    assert testing.signals(looked).chance == 0.25
    assert testing.signals(testing.look(1, testing.layer_look("out", units=1))).chance is None
    assert testing.signals(looked, EvaluationRecord(1, 0, classes=5)).chance == 0.2
    assert testing.signals(EvaluationRecord(1, 0, classes=5, majority=0.7)).chance == 0.7
    assert (
        testing.signals(EvaluationRecord(1, 0, majority=0.7), testing.cells(evaluation={"running": 1.0})).chance == 0.1
    )


def test_learning_is_beyond_guessing():
    evaluation = EvaluationRecord(1, 0, classes=10)
    for accuracy, examples, learns in ((0.1, 1000, False), (0.3, 1000, True), (0.3, 20, False), (None, 1000, False)):
        fed = testing.signals(evaluation, testing.snapshot(1, accuracy=accuracy, examples=examples))
        assert fed.learning is learns
    assert not testing.signals(testing.snapshot(1, accuracy=0.9, examples=1000)).learning


def test_attaching_gives_the_layers():
    fed = testing.signals(Attachment((testing.layer("a"), testing.layer("b"))))
    assert list(fed.specs) == ["a", "b"]


def test_a_site_has_only_the_statistics_of_the_table():
    fed = testing.signals(testing.snapshot(1, testing.call(testing.layer(), updates=10)))
    (site,) = fed.sites()
    assert site.initial_weight == pytest.approx(0.9**10)
    with pytest.raises(AttributeError):
        _ = site.misspelt


def test_initial_weight_is_unknown_without_updates():
    (site,) = testing.signals(testing.snapshot(1, testing.call(testing.layer()))).sites()
    assert math.isnan(site.initial_weight)


def test_gap_is_a_two_proportion_test():
    stats = pytest.importorskip("scipy.stats")
    found = gap(EvaluationRecord(1, 0, 0.8, examples=500, train_accuracy=0.9, train_examples=1000))
    pooled = (0.9 * 1000 + 0.8 * 500) / 1500
    z = 0.1 / math.sqrt(pooled * (1 - pooled) * (1 / 1000 + 1 / 500))
    assert found == pytest.approx((0.1, stats.norm.sf(z)))
    assert gap(EvaluationRecord(1, 0, 1.0, examples=5, train_accuracy=1.0, train_examples=5)) == (0.0, 1.0)
    assert gap(EvaluationRecord(1, 0, 0.8, examples=500)) is None
    assert gap(EvaluationRecord(1, 0, 0.8, train_accuracy=0.9, train_examples=10)) is None


def test_columns_are_of_the_last_samples_with_the_same_call_sites():
    one, two = testing.layer("a"), testing.layer("b")
    fed = testing.signals(
        testing.snapshot(1, testing.call(one, mean=9.0)),
        *(testing.snapshot(n, testing.call(one, mean=n), testing.call(two, mean=5.0)) for n in (2, 3, 4)),
    )
    assert fed.columns("batch_mean").tolist() == [[2.0, 5.0], [3.0, 5.0], [4.0, 5.0]]
    assert fed.columns("batch_mean", 2).tolist() == [[3.0, 5.0], [4.0, 5.0]]
    assert fed.moved("batch_mean", 3).tolist() == [True, False]
    assert testing.signals().columns("batch_mean").shape == (0, 0)
    assert fed.tables[1].sites is fed.tables[3].sites


def test_the_last_step_in_training_mode_is_remembered():
    bn = testing.layer()
    fed = testing.signals(
        testing.snapshot(1, testing.call(bn)),
        testing.snapshot(2, testing.call(bn)),
        *(testing.snapshot(n, idle=("bn",)) for n in range(3, HISTORY + 9)),
    )
    assert fed.normalized == {"bn": 2}
    assert all(not table.sites for table in fed.tables)
