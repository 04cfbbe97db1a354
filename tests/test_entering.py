"""What enters each layer in evaluation against training: the numbers against NumPy and SciPy, and the bounds."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from bnwatch import testing
from bnwatch.evidence import Budget, Examples, ExperimentNotPossibleError, entering
from bnwatch.evidence.entering import BATCHES, LEAST_BATCHES


def laboratory(training, evaluation, channels=4, calls=("bn",)):
    """Return a laboratory over batches of inputs, each of shape ``(n, channels)``."""

    def batches(split, inputs):
        return [Examples(np.asarray(x), np.arange(len(x), dtype=np.int64) % channels, split) for x in inputs]

    data = {
        split: batches(split, inputs)
        for split, inputs in (("training", training), ("evaluation", evaluation))
        if inputs
    }
    shape = len(set(calls)), channels
    return testing.FakeLaboratory(np.eye(channels), data, np.zeros(shape), np.ones(shape), calls=calls)


def draws(rng, sizes, channels=4, mean=0.0, std=1.0):
    return [rng.normal(mean, std, (size, channels)) for size in sizes]


SIZES = st.lists(st.integers(1, 40), min_size=2, max_size=8)


@settings(deadline=None)
@given(SIZES, SIZES, st.integers(0, 1000), st.floats(-3, 3), st.floats(-2, 2))
def test_shift_and_ratio_are_those_of_all_examples_at_once(training, evaluation, seed, shift, scale):
    rng, offset = np.random.default_rng(seed), 1e3 * (seed % 2)
    seen = draws(rng, training, mean=offset), draws(rng, evaluation, mean=offset + shift, std=10.0**scale)
    (site,) = entering(laboratory(*seen)).sites
    known, new = map(np.concatenate, seen)
    expected = np.sqrt(np.mean((new.mean(axis=0) - known.mean(axis=0)) ** 2 / (known.var(axis=0) + 1e-3)))
    assert site.mean_shift == pytest.approx(expected, rel=1e-6)
    assert site.std_ratio == pytest.approx(stats.gmean(new.std(axis=0) / known.std(axis=0)), rel=1e-6)


@settings(deadline=None)
@given(SIZES, SIZES, st.integers(0, 1000), st.floats(-3, 3), st.floats(-1, 1))
def test_with_one_channel_it_is_the_t_test_over_groups_of_batches(training, evaluation, seed, shift, scale):
    rng = np.random.default_rng(seed)
    seen = draws(rng, training, 1), draws(rng, evaluation, 1, mean=shift, std=10.0**scale)
    (site,) = entering(laboratory(*seen, channels=1)).sites
    steps = min(len(training), len(evaluation))
    groups = [[np.concatenate(batches[n::steps]) for n in range(steps)] for batches in seen]
    middle = sum(np.concatenate(batches).mean() for batches in seen) / 2.0
    means, squares = (
        [np.array([value(group) for group in split]) for split in groups]
        for value in (np.mean, lambda group: np.mean((group - middle) ** 2))
    )
    expected = min(stats.ttest_rel(*means).pvalue, stats.ttest_rel(*squares).pvalue)
    assert site.p_value == pytest.approx(min(1.0, 2.0 * expected), rel=1e-6, abs=1e-12)


@pytest.mark.parametrize(
    "sizes",
    [((32,) * 8, (32,) * 8), ((4,) * 32, (64,) * 4), ((32,) * 8, (50, 50, 50, 7))],
    ids=["equal", "unequal", "trailing"],
)
@pytest.mark.parametrize("tails", ["normal", "heavy"])
@pytest.mark.parametrize("channels", [1, 16])
def test_of_one_population_few_differ_whatever_the_sizes_of_batches(sizes, tails, channels):
    """A variance would be smaller in small batches, and its logarithm more so."""
    rng = np.random.default_rng(0)
    draw = rng.normal if tails == "normal" else lambda _mean, _std, shape: rng.standard_t(3.0, shape)
    alarms, trials = 0, 200
    for _ in range(trials):
        seen = [[draw(0.0, 1.0, (size, channels)) for size in split] for split in sizes]
        (site,) = entering(laboratory(*seen, channels=channels)).sites
        alarms += site.p_value < 0.05
    assert stats.binomtest(alarms, trials, 0.05, alternative="greater").pvalue > 1e-3


@pytest.mark.parametrize(("mean", "std"), [(1.0, 1.0), (0.0, 2.0), (0.0, 1 / 255), (0.0, 16.0)])
def test_another_population_is_told_from_few_batches(mean, std):
    rng = np.random.default_rng(0)
    found = entering(laboratory(draws(rng, [64] * 8), draws(rng, [64] * 8, mean=mean, std=std)))
    assert found.sites[0].p_value < 1e-4
    assert (found.training, found.evaluation, found.untold) == (512, 512, None)


def test_the_sites_come_in_the_order_of_the_calls_under_running_statistics():
    lab = testing.FakeLaboratory.stacked("one", "two", "one")
    found = entering(lab, step=7, epoch=2)
    assert [site.subject for site in found.sites] == ["one#0", "two", "one#1"]
    assert (found.step, found.epoch) == (7, 2)
    assert set(lab.asked) == {"examples", "inputs"}
    pooled = [np.concatenate([b.inputs for b in lab.data[split]]) for split in ("training", "evaluation")]
    mean, var = lab.running()["one"]
    known, new = (np.maximum((x - mean) / np.sqrt(var + lab.epsilon), 0.0) for x in pooled)
    shift = np.sqrt(np.mean((new.mean(axis=0) - known.mean(axis=0)) ** 2 / (known.var(axis=0) + lab.epsilon)))
    assert found.sites[1].mean_shift == pytest.approx(shift)


def test_channels_that_are_constant_have_no_ratio():
    rng = np.random.default_rng(0)
    training, evaluation = draws(rng, [32] * 4), draws(rng, [32] * 4, std=4.0)
    for batch in (*training, *evaluation):
        batch[:, 0] = 1e4
    evaluation[0][:, 1] = evaluation[1][:, 1] = evaluation[2][:, 1] = evaluation[3][:, 1] = 0.0
    (site,) = entering(laboratory(training, evaluation)).sites
    assert site.std_ratio == pytest.approx(4.0, rel=0.2)
    (site,) = entering(laboratory([np.ones((8, 4))] * 2, [np.ones((8, 4))] * 2)).sites
    assert (site.std_ratio, site.mean_shift, site.p_value) == (1.0, 0.0, 1.0)


def test_batches_are_taken_evenly_from_those_that_were_kept():
    """Evaluation data sorted by class: its beginning is another population, the whole is not."""
    rng = np.random.default_rng(0)
    levels = np.repeat(np.arange(4.0), 8)
    training = [rng.choice(levels, (32, 1)) + rng.normal(0.0, 0.1, (32, 1)) for _ in range(32)]
    evaluation = [np.full((32, 1), level) + rng.normal(0.0, 0.1, (32, 1)) for level in levels]
    (site,) = entering(laboratory(training, evaluation, channels=1)).sites
    assert site.mean_shift < 0.1
    assert site.p_value > 0.05


@pytest.mark.parametrize(
    ("size", "seconds", "measured"),
    [(64, None, BATCHES), (64, 0.0, LEAST_BATCHES), (8, None, 32), (8, 0.0, LEAST_BATCHES), (500, None, 4)],
)
def test_as_many_batches_as_the_test_needs_and_the_time_allows(size, seconds, measured):
    rng = np.random.default_rng(0)
    lab = laboratory(draws(rng, [size] * 40), draws(rng, [size] * 40))
    ticks = []
    found = entering(lab, budget=Budget(seconds=seconds), progress=lambda *tick: ticks.append(tick[1:]))
    assert (found.training, found.evaluation) == (measured * size, measured * size)
    assert lab.asked.count("inputs") == len(ticks) == 2 * measured
    assert all(done <= total for done, total in ticks)


def test_what_cannot_be_told_has_a_reason():
    rng = np.random.default_rng(0)
    one = entering(laboratory(draws(rng, [64] * 8), draws(rng, [64])))
    assert one.sites[0].p_value is None
    assert "fewer than two evaluation batches" in one.untold
    broken = draws(rng, [64] * 4)
    broken[2][0, 0] = math.nan
    infinite = entering(laboratory(draws(rng, [64] * 4), broken))
    assert (infinite.sites[0].p_value, infinite.untold) == (None, "what enters a layer is not finite")


@pytest.mark.parametrize("missing", ["training", "evaluation"])
def test_without_both_splits_it_is_not_possible(missing):
    lab = testing.FakeLaboratory.separable()
    lab.data = {split: batches for split, batches in lab.data.items() if split != missing}
    with pytest.raises(ExperimentNotPossibleError, match=missing):
        entering(lab)


def test_a_site_that_is_not_called_in_both_is_left_out(monkeypatch):
    lab = testing.FakeLaboratory.separable()
    inputs = lab.inputs
    monkeypatch.setattr(lab, "inputs", lambda batch, kind: inputs(batch, kind) if batch.origin == "training" else [])
    found = entering(lab)
    assert found.sites == ()
    assert "fewer than two evaluation batches" in found.untold


def held(training, mean, var, *, bessel_corrected=False):
    lab = laboratory(training, draws(np.random.default_rng(1), [32] * 4))
    lab.mean, lab.var, lab.bessel_corrected = np.array([mean]), np.array([var]), bessel_corrected
    return entering(lab).sites[0]


def test_what_the_running_statistics_hold_is_compared_with_training_examples():
    training = draws(np.random.default_rng(0), [32] * 8, mean=1.0, std=2.0)
    known, mean, var = np.concatenate(training), np.array([1.0, 2.0, 0.0, 1.0]), np.array([4.0, 1.0, 16.0, 4.0])
    site = held(training, mean, var)
    expected = np.sqrt(np.mean((known.mean(axis=0) - mean) ** 2 / (var + 1e-3)))
    assert site.held_shift == pytest.approx(expected)
    assert site.held_ratio == pytest.approx(stats.gmean(np.sqrt((known.var(axis=0) + 1e-3) / (var + 1e-3))))


def test_bessels_correction_is_no_difference():
    """Batches of 4 keep 4/3 of the variance."""
    training = draws(np.random.default_rng(0), [4] * 64)
    plain = held(training, np.zeros(4), np.full(4, 0.75))
    corrected = held(training, np.zeros(4), np.ones(4), bessel_corrected=True)
    assert corrected.held_ratio == pytest.approx(plain.held_ratio)


def test_layers_without_running_statistics_hold_nothing(monkeypatch):
    lab = testing.FakeLaboratory.stacked("one", "two")
    known = {"one": lab.running()["one"]}
    inputs = lab.inputs

    def after_the_passes(batch, kind):
        monkeypatch.undo()
        found = inputs(batch, kind)
        monkeypatch.setattr(lab, "running", lambda: known)
        monkeypatch.setattr(lab, "inputs", after_the_passes)
        return found

    monkeypatch.setattr(lab, "inputs", after_the_passes)
    one, two = entering(lab).sites
    assert one.held_shift is not None
    assert (two.held_shift, two.held_ratio) == (None, None)


def test_channels_that_only_evaluation_examples_move_are_awakened():
    rng = np.random.default_rng(0)
    training, evaluation = draws(rng, [32] * 4), draws(rng, [32] * 4)
    for batch in training:
        batch[:, :2] = 0.5
    for batch in evaluation:
        batch[:, 0] = 0.7
    assert entering(laboratory(training, evaluation)).sites[0].awakened == 1
    assert entering(laboratory(evaluation, training)).sites[0].awakened == 0
