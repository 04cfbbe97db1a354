"""How training batches are composed: the numbers against NumPy and SciPy, the test's false alarms, and the bounds."""

import numpy as np
import pytest
from scipy import stats

from bnwatch import testing
from bnwatch.evidence import Budget, Examples, ExperimentNotPossibleError, composition
from bnwatch.evidence.composition import LEAST_BATCHES, RESHUFFLES, _two_groups
from bnwatch.rules._batches import CHANCE


def laboratory(inputs, labels=None, calls=("bn",)):
    """Return a laboratory over training batches, each of shape ``(n, channels)``."""
    channels = np.shape(inputs[0])[1]
    labels = labels or [np.arange(len(x)) % channels for x in inputs]
    data = [Examples(np.asarray(x), np.asarray(y, np.int64), "training") for x, y in zip(inputs, labels, strict=True)]
    shape = len(set(calls)), channels
    return testing.FakeLaboratory(np.eye(channels), {"training": data}, np.zeros(shape), np.ones(shape), calls=calls)


def batches(rng, offsets, size=32, channels=8, std=1.0):
    """Return a batch an offset, which is a number or one a channel."""
    return [rng.normal(offset, std, (size, channels)) for offset in offsets]


def test_random_batches_are_not_dispersed():
    found = composition(laboratory(batches(np.random.default_rng(0), [5.0] * 16)), step=7, epoch=2)
    (site,) = found.sites
    assert (found.step, found.epoch, found.batches, found.examples) == (7, 2, 16, 512)
    assert (found.smallest, found.median) == (32, 32)
    assert site.dispersion == pytest.approx(1.0, abs=0.5)
    assert site.p_value > 0.01
    assert site.tail < 1.5


def test_dispersion_is_the_spread_of_batch_means_over_that_of_the_same_examples_reshuffled():
    rng = np.random.default_rng(1)
    lab = laboratory(batches(rng, rng.normal(0.0, 1.0, (16, 8))))
    (site,) = composition(lab).sites
    means = np.array([batch.inputs.mean(axis=0) for batch in lab.data["training"]])
    whole = np.concatenate([batch.inputs for batch in lab.data["training"]])
    between = (means.var(axis=0, ddof=1) / whole.var(axis=0)).sum()
    random = np.mean(
        [
            (np.reshape(rng.permutation(whole), (16, 32, 8)).mean(axis=1).var(axis=0, ddof=1) / whole.var(axis=0)).sum()
            for _ in range(200)
        ]
    )
    assert site.dispersion == pytest.approx(between / random, rel=0.25)
    assert site.p_value < 1e-6


@pytest.mark.parametrize("sizes", [[32] * 15 + [1], [32] * 15 + [3], [2, 64] * 8], ids=str)
def test_batches_of_unequal_size_are_not_dispersed(sizes):
    rng = np.random.default_rng(0)
    found = [composition(laboratory([rng.normal(3.0, 1.0, (size, 8)) for size in sizes])).sites[0] for _ in range(20)]
    assert np.mean([site.dispersion for site in found]) == pytest.approx(1.0, abs=0.15)
    assert min(site.p_value for site in found) > 1e-3


def correlated(rng, shape):
    return rng.normal(size=shape) + 3.0 * rng.normal(size=(shape[0], 1))


KINDS = {
    "normal": lambda rng, shape: rng.normal(size=shape),
    "correlated": correlated,
    "student t": lambda rng, shape: rng.standard_t(2.5, shape),
    "lognormal": lambda rng, shape: rng.lognormal(0.0, 1.5, shape),
}


@pytest.mark.parametrize("size", [2, 16])
@pytest.mark.parametrize("kind", KINDS)
def test_of_random_batches_few_are_called_dispersed(kind, size):
    rng, trials = np.random.default_rng(0), 100
    p = np.array(
        [
            composition(laboratory([KINDS[kind](rng, (size, 8)) for _ in range(12)])).sites[0].p_value
            for _ in range(trials)
        ]
    )
    for alpha in (0.05, 0.01):
        alarms = int((p < alpha).sum())
        assert stats.binomtest(alarms, trials, alpha, alternative="greater").pvalue > 1e-3


def test_with_one_channel_it_is_the_f_test_of_two_variances():
    """One channel has as many degrees of freedom as batches but one."""
    lab = laboratory(batches(np.random.default_rng(3), np.linspace(0.0, 1.0, 8), channels=1), [np.arange(32) % 1] * 8)
    (site,) = composition(lab).sites
    assert site.p_value == pytest.approx(stats.f.sf(site.dispersion, 7, 7 * RESHUFFLES), rel=1e-6)


@pytest.mark.parametrize(
    ("offsets", "clusters", "smaller"),
    [
        ([0.0, 2.0] * 8, (0.9, 1.0), 0.5),
        ([0.0, 2.0, 2.0, 2.0] * 4, (0.9, 1.0), 0.25),
        ([0.0] * 15 + [9.0], (0.9, 1.0), 1 / 16),
        (list(3.0 * np.eye(8)) * 2, (0.0, 0.6), None),
    ],
    ids=["alternating", "one in four", "an outlier", "eight groups"],
)
def test_two_groups_account_for_the_spread_where_there_are_two(offsets, clusters, smaller):
    (site,) = composition(laboratory(batches(np.random.default_rng(0), offsets))).sites
    assert site.dispersion > 5.0
    assert clusters[0] <= site.clusters <= clusters[1]
    assert smaller is None or site.smaller == pytest.approx(smaller)


@pytest.mark.parametrize("size", [8, 16, 32])
def test_the_limit_of_two_groups_is_what_an_even_spread_reaches_in_one_of_a_hundred(size):
    rng = np.random.default_rng(size)
    shares = [_two_groups(rng.uniform(-1.0, 1.0, (size, 1)))[0] for _ in range(500)]
    assert 0.0 < np.mean(np.array(shares) > 0.75 + CHANCE / np.sqrt(size)) < 0.03


def test_a_batch_that_was_kept_several_times_counts_once():
    inputs = batches(np.random.default_rng(0), np.random.default_rng(1).normal(0.0, 1.0, (10, 8)))
    once, often = composition(laboratory(inputs)), composition(laboratory([*inputs, *inputs[:7], inputs[3][::-1]]))
    assert (once.batches, often.batches, often.examples) == (10, 10, 320)
    assert often.sites[0].dispersion == pytest.approx(once.sites[0].dispersion, rel=0.5)
    # the same inputs under other labels are other examples
    rng = np.random.default_rng(0)
    labels = [rng.integers(0, 8, 32) for _ in range(18)]
    assert composition(laboratory([*inputs, *inputs[:8]], labels)).batches == 18


def test_one_batch_again_and_again_is_left_as_it_is():
    inputs = batches(np.random.default_rng(0), [0.0])
    found = composition(laboratory(inputs * 9))
    assert (found.batches, found.sites[0].dispersion) == (9, pytest.approx(0.0, abs=1e-9))


def test_tail_is_the_largest_variance_over_the_median():
    inputs = batches(np.random.default_rng(0), [0.0] * 15) + batches(np.random.default_rng(1), [0.0], std=10.0)
    (site,) = composition(laboratory(inputs)).sites
    spreads = [x.var(axis=0).mean() for x in inputs]
    assert site.tail == pytest.approx(max(spreads) / np.median(spreads))
    assert site.tail == pytest.approx(100.0, rel=0.3)


def test_purity_is_that_of_the_labels():
    rng = np.random.default_rng(0)
    inputs = batches(rng, [0.0] * 8)
    pure = composition(laboratory(inputs, [np.full(32, n) for n in range(8)]))
    assert pure.purity == 1.0
    assert pure.expected == pytest.approx(0.24, abs=0.04)
    random = composition(laboratory(inputs, [rng.integers(0, 8, 32) for _ in range(8)]))
    assert random.purity == pytest.approx(random.expected, abs=0.04)
    none = composition(laboratory(inputs, [np.zeros(32)] * 8))
    assert (none.purity, none.expected) == (None, None)


def test_sites_come_in_the_order_of_the_calls_and_channels_that_do_not_vary_count_nothing():
    rng = np.random.default_rng(0)
    inputs = batches(rng, rng.normal(0.0, 1.0, (8, 8)))
    for x in inputs:
        x[:, 1:] = 1e4
    lab = laboratory(inputs, calls=("one", "two", "one"))
    found = composition(lab)
    assert [site.subject for site in found.sites] == ["one#0", "two", "one#1"]
    assert set(lab.asked) == {"examples", "inputs", "reshuffled"}
    alone = composition(laboratory([x[:, :1] for x in inputs], [np.zeros(32)] * 8))
    assert found.sites[0].dispersion == pytest.approx(alone.sites[0].dispersion)
    (still,) = composition(laboratory([np.ones((8, 4))] * 4)).sites
    assert (still.dispersion, still.p_value, still.clusters, still.tail) == (1.0, 1.0, 0.0, 1.0)


def test_what_is_not_finite_is_left_out():
    inputs = batches(np.random.default_rng(0), [0.0] * 8)
    inputs[3][0, 0] = np.nan
    assert composition(laboratory(inputs)).sites == ()


@pytest.mark.parametrize(("seconds", "measured", "passes"), [(None, 32, 5), (0.0, LEAST_BATCHES, 2)])
def test_as_many_batches_as_the_time_allows_taken_evenly(seconds, measured, passes):
    rng = np.random.default_rng(0)
    lab = laboratory(batches(rng, np.repeat([0.0, 3.0], 16)))
    ticks = []
    found = composition(lab, budget=Budget(seconds=seconds), progress=lambda *tick: ticks.append(tick[1:]))
    assert found.batches == measured
    assert lab.asked.count("inputs") == len(ticks) == passes * measured
    assert all(done <= total for done, total in ticks)
    assert 0.3 < found.sites[0].smaller <= 0.5  # of both halves


def test_one_batch_has_no_spread():
    with pytest.raises(ExperimentNotPossibleError, match="fewer than two training batches"):
        composition(laboratory(batches(np.random.default_rng(0), [0.0])))


def test_without_training_examples_it_is_not_possible():
    lab = testing.FakeLaboratory.separable()
    lab.data = {"evaluation": lab.data["evaluation"]}
    with pytest.raises(ExperimentNotPossibleError, match="no training examples"):
        composition(lab)
