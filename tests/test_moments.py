import math

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy import stats

from bnwatch import moments, testing
from bnwatch.moments import Moments


def of(values):
    return Moments(values.mean(axis=0), values.var(axis=0), len(values))


sizes = st.integers(1, 40)
seeds = st.integers(0, 2**32 - 1)
offsets = st.floats(-1e6, 1e6)
decays = st.floats(0.01, 0.9999)


@given(sizes, sizes, seeds, offsets, st.floats(1e-2, 1e3))
def test_pool_equals_concatenation(n, m, seed, offset, scale):
    rng = np.random.default_rng(seed)
    a, b = rng.normal(offset, scale, (n, 3)), rng.normal(offset + scale, 2 * scale, (m, 3))
    pooled, whole = moments.pool(of(a), of(b)), of(np.concatenate([a, b]))
    assert pooled.count == n + m
    # What float64 can hold of values of this size bounds either way of computing it.
    rounding = np.finfo(float).eps * (abs(offset) + 4 * scale)
    np.testing.assert_allclose(pooled.mean, whole.mean, rtol=1e-13, atol=4 * rounding)
    np.testing.assert_allclose(pooled.var, whole.var, rtol=1e-9, atol=100 * rounding * scale)


@given(sizes, sizes, sizes, seeds, offsets)
def test_pool_is_free_of_order(n, m, k, seed, offset):
    rng = np.random.default_rng(seed)
    a, b, c = (of(rng.normal(offset, 1.0, (size, 2))) for size in (n, m, k))
    left, right = moments.pool(moments.pool(a, b), c), moments.pool(a, moments.pool(c, b))
    np.testing.assert_allclose(left.mean, right.mean, rtol=1e-12, atol=1e-9)
    np.testing.assert_allclose(left.var, right.var, rtol=1e-7, atol=1e-9)


@given(st.integers(2, 10_000))
def test_bessel_factor_makes_a_variance_unbiased(m):
    values = np.arange(m, dtype=float)
    assert values.var() * moments.bessel_factor(m) == pytest.approx(values.var(ddof=1))


def test_a_single_element_has_nothing_to_correct():
    assert moments.bessel_factor(1) == 1.0


@given(decays)
def test_effective_batches_is_kishs_sample_size_of_the_weights(decay):
    weights = (1 - decay) * decay ** np.arange(300_000 if decay > 0.999 else 30_000)
    assert moments.effective_batches(decay) == pytest.approx(weights.sum() ** 2 / np.square(weights).sum(), rel=1e-6)


@pytest.mark.parametrize("decay", [-0.1, 1.0, 2.0, math.nan])
def test_effective_batches_refuses_what_is_no_decay(decay):
    with pytest.raises(ValueError, match=r"decay must lie in \[0, 1\)"):
        moments.effective_batches(decay)


@given(decays, st.integers(0, 500), seeds)
def test_weights_of_a_moving_average_sum_to_one(decay, n, seed):
    values = np.random.default_rng(seed).normal(size=n)
    average, weight = 7.0, 1.0
    for value in values:
        average, weight = decay * average + (1 - decay) * value, weight * decay
    direct = 7.0 * moments.initial_weight(decay, n) + ((1 - decay) * decay ** np.arange(n)[::-1] * values).sum()
    assert average == pytest.approx(direct, abs=1e-9)
    assert moments.initial_weight(decay, n) == pytest.approx(weight)


@given(decays, st.floats(1e-4, 0.999))
def test_updates_until_is_the_first_below_the_weight(decay, weight):
    n = moments.updates_until(decay, weight)
    # One part in 10^12 leaves room for weights that are a power of the decay, to rounding.
    assert moments.initial_weight(decay, n) < weight * (1 + 1e-12)
    assert n == 0 or moments.initial_weight(decay, n - 1) >= weight * (1 - 1e-12)


def test_updates_until_at_the_ends():
    assert moments.updates_until(0.99, 0.05) == 299
    assert moments.updates_until(0.9, 0.05) == 29
    assert moments.updates_until(0.0, 0.05) == 1
    with pytest.raises(ValueError, match="never forgets"):
        moments.updates_until(1.0, 0.05)


@pytest.mark.parametrize("decay", [0.0, 0.5, 0.9, 0.99])
@pytest.mark.parametrize("samples", [4, 64])
def test_shift_noise_is_what_a_simulated_average_shows(decay, samples):
    rng = np.random.default_rng(1)
    channels, settle = 2000, int(8 / (1 - decay))
    running, previous, seen = np.zeros(channels), None, []
    for step in range(settle + 40):
        mean = rng.normal(0.0, 1 / math.sqrt(samples), channels)
        if step >= settle:
            seen.append(np.mean(np.square(mean - running)))
        running, previous = decay * running + (1 - decay) * mean, mean
    assert previous is not None
    assert math.sqrt(np.mean(seen)) == pytest.approx(moments.shift_noise(decay, samples), rel=0.03)


shapes = st.floats(0.5, 5000.0)


@given(st.floats(0.0, 1.0), shapes, shapes)
def test_regularized_beta(x, a, b):
    assert moments.regularized_beta(x, a, b) == pytest.approx(stats.beta.cdf(x, a, b), rel=1e-6, abs=1e-11)


@pytest.mark.parametrize(("x", "a", "b"), [(-0.1, 1, 1), (1.1, 1, 1), (0.5, 0, 1), (0.5, 1, -1), (math.nan, 1, 1)])
def test_regularized_beta_refuses_what_it_is_not_defined_for(x, a, b):
    with pytest.raises(ValueError, match="need 0 <= x <= 1"):
        moments.regularized_beta(x, a, b)


@given(st.floats(1e-3, 1e3), st.integers(1, 40), st.integers(1, 500))
def test_f_survival(f, between, within):
    assert moments.f_survival(f, between, within) == pytest.approx(
        stats.f.sf(f, between, within), rel=1e-6, abs=1e-12
    )  # fmt: skip


def test_f_survival_at_the_ends():
    assert moments.f_survival(0.0, 1, 5) == 1.0
    assert moments.f_survival(math.inf, 1, 5) == 0.0


@given(st.data(), st.integers(1, 20_000), st.floats(0.001, 0.999))
def test_binomial_survival(data, trials, chance):
    successes = data.draw(st.integers(0, trials))
    expected = stats.binom.sf(successes - 1, trials, chance)
    assert moments.binomial_survival(successes, trials, chance) == pytest.approx(expected, rel=1e-5, abs=1e-11)


def test_binomial_survival_at_the_ends():
    assert moments.binomial_survival(0, 10, 0.1) == 1.0
    assert moments.binomial_survival(10, 10, 0.1) == pytest.approx(1e-10)


@given(st.data(), st.integers(1, 100_000))
def test_binomial_interval(data, trials):
    successes = data.draw(st.integers(0, trials))
    expected = stats.binomtest(successes, trials).proportion_ci(0.95, method="wilson")
    low, high = moments.binomial_interval(successes / trials, trials, stats.norm.ppf(0.975))
    assert (low, high) == pytest.approx((expected.low, expected.high), abs=1e-9)


def test_nothing_seen_leaves_the_share_open():
    assert moments.binomial_interval(0.0, 0) == (0.0, 1.0)


@given(st.integers(0, 3000), st.integers(0, 3000))
def test_mcnemar(first, second):
    expected = stats.binomtest(first, first + second, 0.5, "greater").pvalue if first + second else 1.0
    assert moments.mcnemar(first, second) == pytest.approx(expected, rel=1e-5, abs=1e-11)


# --- the interval of a paired difference: Newcombe (1998), method 10 ---


def test_paired_interval_of_the_published_example():
    assert moments.paired_interval(36, 12, 2, 0, stats.norm.ppf(0.975)) == pytest.approx((0.0569, 0.3404), abs=5e-5)


@given(*[st.integers(0, 500)] * 4)
def test_paired_interval_holds_the_difference_and_turns_around(both, first, second, neither):
    assume(both + first + second + neither)
    low, high = moments.paired_interval(both, first, second, neither)
    assert -1.0 <= low <= (first - second) / (both + first + second + neither) <= high <= 1.0
    assert moments.paired_interval(both, second, first, neither) == pytest.approx((-high, -low))
    assert moments.paired_interval(neither, first, second, both) == pytest.approx((low, high))


def test_no_example_has_no_paired_interval():
    with pytest.raises(ValueError, match="at least one example"):
        moments.paired_interval(0, 0, 0, 0)


@pytest.mark.parametrize("chances", [(0.8, 0.1, 0.05, 0.05), (0.5, 0.2, 0.1, 0.2), (0.9, 0.04, 0.01, 0.05)])
def test_paired_interval_covers_as_often_as_it_says(chances):
    """By enumeration: every table of thirty examples, with its probability."""
    n, truth = 30, chances[1] - chances[2]
    tables = [(a, b, c, n - a - b - c) for a in range(n + 1) for b in range(n + 1 - a) for c in range(n + 1 - a - b)]
    weights = stats.multinomial.pmf(tables, n, chances)
    covered = [low <= truth <= high for low, high in (moments.paired_interval(*table) for table in tables)]
    assert weights.sum() == pytest.approx(1.0)
    assert weights[covered].sum() > 0.935  # and at most a little too wide: see the bootstrap


@pytest.mark.parametrize("table", [(1500, 300, 50, 150), (700, 20, 260, 20), (1900, 60, 0, 40)])
def test_paired_interval_is_that_of_the_bootstrap(table):
    n = sum(table)
    drawn = np.random.default_rng(0).multinomial(n, np.array(table) / n, 20_000)
    low, high = np.quantile((drawn[:, 1] - drawn[:, 2]) / n, [0.025, 0.975])
    assert moments.paired_interval(*table) == pytest.approx((low, high), abs=0.0025)


@pytest.mark.parametrize("apart", [0.0, 0.3, 2.0])
@pytest.mark.parametrize("sites", [2, 3])
def test_sites_apart_is_what_the_signals_of_a_watch_say(apart, sites):
    spec = testing.layer(channels=6)
    draws = [testing.normal(6, 32, mean=apart * n, std=1.0 + apart * n) for n in range(sites)]
    snapshots = list(testing.train(spec, *draws, steps=8))
    (shared,) = testing.signals(*snapshots).table.shared
    mean, var = (
        np.array([[getattr(call.batch, part) for call in snapshot.calls] for snapshot in snapshots], np.float64)
        for part in ("mean", "var")
    )
    expected = [shared[name] for name in ("between_shift", "between_scale", "between_ratio")]
    assert moments.sites_apart(mean, var + spec.epsilon) == pytest.approx(expected, rel=1e-4, abs=1e-6)


def test_equal_batches_at_every_site_are_no_difference():
    same = np.ones((4, 2, 3))
    shift, scale, ratio = moments.sites_apart(same, same)
    assert (shift, scale) == (0.0, 0.0)
    assert moments.same_sites_p(ratio, 2, 4) == 1.0


def by_hand(values):
    """Two-way analysis of variance of ``values[step, site]``, without repetition."""
    grand, row, column = values.mean(), values.mean(axis=1, keepdims=True), values.mean(axis=0, keepdims=True)
    steps, sites = values.shape
    between = steps * np.square(column - grand).sum() / (sites - 1)
    within = np.square(values - row - column + grand).sum() / ((steps - 1) * (sites - 1))
    return between, within


@given(st.integers(2, 16), st.integers(2, 5), seeds, st.floats(0, 10))
@settings(max_examples=50)
def test_site_variances_are_a_two_way_analysis(steps, sites, seed, drift):
    rng = np.random.default_rng(seed)
    values = rng.normal(size=(steps, sites, 3)) + drift * rng.normal(size=(steps, 1, 1))
    deviation = values - values.mean(axis=1, keepdims=True)
    between, within = moments.site_variances(deviation.sum(axis=0), np.square(deviation).sum(axis=(0, 1)), steps)
    for channel in range(3):
        assert (between[channel], within[channel]) == pytest.approx(by_hand(values[:, :, channel]), rel=1e-6)
    p = moments.same_sites_p(between[0] / within[0], sites, steps)
    assert p == pytest.approx(stats.f.sf(between[0] / within[0], sites - 1, (steps - 1) * (sites - 1)), rel=1e-5)


def test_same_sites_p_without_any_spread():
    assert moments.same_sites_p(math.nan, 2, 4) == 1.0
    assert moments.same_sites_p(math.inf, 2, 4) == 0.0


@pytest.mark.parametrize("alpha", [0.05, 1e-4, 1e-7])
@pytest.mark.parametrize(("sites", "steps"), [(2, 2), (2, 16), (5, 16)])
def test_same_sites_limit_is_where_the_p_value_is_alpha(alpha, sites, steps):
    limit = moments.same_sites_limit(alpha, sites, steps)
    assert limit == pytest.approx(stats.f.isf(alpha, sites - 1, (steps - 1) * (sites - 1)), rel=1e-5)


def test_same_sites_p_is_uniform_where_channels_move_together_and_conservative_otherwise():
    rng = np.random.default_rng(3)
    steps, sites, trials = 8, 2, 4000

    def share_below(alpha, channels):
        hits = 0
        for _ in range(trials):
            values = rng.normal(size=(steps, sites, channels))
            deviation = values - values.mean(axis=1, keepdims=True)
            found = moments.site_variances(deviation.sum(axis=0), np.square(deviation).sum(axis=(0, 1)), steps)
            hits += moments.same_sites_p(found[0].sum() / found[1].sum(), sites, steps) < alpha
        return hits / trials

    assert share_below(0.05, 1) == pytest.approx(0.05, abs=0.012)
    assert share_below(0.05, 16) < 0.01
