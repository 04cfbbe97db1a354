"""Which layers, channels and samples are recorded channel by channel, and what of them."""

from __future__ import annotations

import dataclasses
import gc
import itertools
import json
import weakref

import numpy as np
import pytest

from bnwatch import Watch, channels, testing
from bnwatch.channels import CHANNELS, FOLLOWED, NUMBERS, SITES, ChannelChoice
from bnwatch.records import CHANNEL_STATISTICS, Attachment, ChannelStatistics
from bnwatch.signals import CHOSEN, WINDOW
from bnwatch.sinks.memory import MemorySink
from bnwatch.sinks.tensorboard import read_runs


def watched(log_dir=None, **arguments):
    sink = MemorySink()
    return Watch(log_dir, on_diagnosis=lambda _: None, experiments=False, sinks=[sink], **arguments), sink


def network(layers=8, of=4, sites=1):
    return [(testing.layer(f"bn_{n}", of), range(sites)) for n in range(layers)]


def sample(step, layers, *, off=(), seed=0, **fields):
    """Return a sample in which the layers named in ``off`` are farther off than the others."""
    rng = np.random.default_rng((seed, step))
    return testing.snapshot(
        step,
        *(
            testing.call(
                spec, site=site, mean=0.1 * rng.normal(size=spec.channels) + 2.0 * (spec.path in off),
                var=rng.chisquare(64, spec.channels) / 64, running_mean=0.01 * rng.normal(size=spec.channels),
                running_var=0.99 + 0.02 * rng.random(spec.channels), updates=1000 + step, **fields,
            )
            for spec, sites in layers for site in sites
        ),
    )  # fmt: skip


def recorded(sink):
    found = {}
    for item in sink.of(ChannelStatistics):
        found.setdefault(item.layer, []).append(item.step)
    return found


def suspects(snapshot, choice, number, *paths):
    """Return the layers recorded of a sample in which a diagnosis is about ``paths``."""
    table = watched()[0].signals.observe(snapshot)
    return [item.layer for item in choice.take(snapshot, table, number, paths)]


def test_ever_fewer_samples_are_recorded():
    due = [n for n in range(1, 1_000_001) if channels.due(n)]
    assert due[:31] == list(range(1, 32))
    assert len([n for n in due if n <= 2000]) == 127
    assert len(due) < 300
    assert all(later - n <= n / 8 for n, later in itertools.pairwise(due[15:]))


def test_values_are_those_of_the_sample_and_comparable(tmp_path):
    spec = testing.layer("bn", 3, epsilon=0.5, bessel_corrected=True)
    mean, var = np.array([1.0, -2.0, 0.0]), np.array([4.0, 1.0, 0.0])
    running = np.array([0.5, -2.0, 0.0]), np.array([2.0, 1.0, -1.0])
    snapshot = testing.snapshot(
        3, testing.call(spec, mean=mean, var=var, running_mean=running[0], running_var=running[1], count=5), epoch=2
    )
    watch, sink = watched(tmp_path)
    watch.open(Attachment((spec,)))
    watch.observe(snapshot)
    watch.close()
    (found,) = sink.of(ChannelStatistics)
    (read,) = read_runs(tmp_path)[0].channels
    for item in (found, read):
        assert (item.step, item.epoch, item.layer, item.channels, item.of) == (3, 2, "bn", (0, 1, 2), 3)
        assert item.values.dtype == np.float32
        assert item.values.shape == (4, 3)
        # the batch variance is biased: Bessel's correction, 5/4 here, is taken out of the running one
        expected = mean, np.sqrt(var), running[0], np.sqrt(np.where(running[1] < 0, np.nan, running[1]) / 1.25)
        for name, row in zip(CHANNEL_STATISTICS, expected, strict=True):
            assert np.allclose(item[name], [row], equal_nan=True)
        apart = item.apart(spec.epsilon)
        assert apart["mean_shift"][0, 0] == pytest.approx(0.5 / np.sqrt(2.0 / 1.25 + 0.5))
        assert apart["std_ratio"][0, 0] == pytest.approx(np.sqrt(4.5 / (2.0 / 1.25 + 0.5)))
        assert np.isnan(apart["std_ratio"][0, 2])


def test_half_precision_is_widened_before_anything_is_done():
    spec = testing.layer("bn", 2, bessel_corrected=True)
    call = testing.call(spec, mean=[1, 2], var=[1, 4], count=2)
    half = dataclasses.replace(call.running, var=np.array([6e4, 1e-7], np.float16))
    watch, sink = watched()
    watch.open(Attachment((spec,)))
    watch.observe(testing.snapshot(1, dataclasses.replace(call, running=half)))
    (found,) = sink.of(ChannelStatistics)
    assert found["running_std"][0].tolist() == np.sqrt(half.var.astype(np.float32) / 2).tolist()
    assert (found["running_std"] > 0).all()


def test_three_layers_stay_the_same_through_the_run():
    layers = network()
    watch, sink = watched()
    for step in range(1, 100):
        watch.observe(sample(step, layers, off={"bn_1", "bn_5", "bn_6"} if step == WINDOW else {"bn_0", "bn_2"}))
    found = recorded(sink)
    expected = [n for n in range(WINDOW, 100) if channels.due(n)]
    assert [[n for n in found[path] if n >= WINDOW] for path in ("bn_1", "bn_5", "bn_6")] == 3 * [expected]
    assert len(found) <= CHOSEN + FOLLOWED


def test_few_layers_are_recorded_from_the_first_sample():
    watch, sink = watched()
    watch.observe(sample(1, network(CHOSEN)))
    assert recorded(sink) == {f"bn_{n}": [1] for n in range(CHOSEN)}


def test_a_layer_with_a_diagnosis_is_recorded_at_once_and_goes_on():
    layers = network()
    watch, sink = watched()
    for step in range(1, 201):
        watch.observe(sample(step, layers))
        if step == 101:
            assert not channels.due(101)
            number = next(n for n, (spec, _) in enumerate(layers) if spec.path not in recorded(sink))
            broken = sample(102, layers)
            broken.calls[number].batch.mean[0] = np.nan
            watch.observe(broken)
    steps = recorded(sink)[f"bn_{number}"]
    assert [d.subject for d in watch.diagnoses if d.rule == "BN401"] == [f"bn_{number}"]
    assert steps[0] == 102
    assert len(steps) > 5


def test_of_many_suspects_three_are_followed_the_active_first():
    layers, choice = network(12), ChannelChoice()
    names = [f"bn_{n}" for n in range(12)]
    assert suspects(sample(1, layers), choice, 1, *names[:5]) == names[:FOLLOWED]
    # one that clears stays until another one needs its place
    assert suspects(sample(2, layers), choice, 2, "bn_1") == ["bn_1", "bn_0", "bn_2"]
    assert suspects(sample(3, layers), choice, 3, "bn_9", "bn_1") == ["bn_9", "bn_1", "bn_0"]
    # between the samples that are recorded only what never was
    suspects(sample(32, layers), choice, 32)
    known = set(choice.memory["chosen"]) | {*names[:FOLLOWED], "bn_9"}
    fresh = next(name for name in names if name not in known)
    assert suspects(sample(33, layers), choice, 33, "bn_9", fresh) == [fresh]


@pytest.mark.parametrize(
    ("layers", "sites", "of"), [(3, 1, 4000), (6, 2, 4000), (1, 1, 600), (2, 40, 300), (3, 1, 512)]
)
def test_what_a_sample_costs_is_bounded(layers, sites, of):
    choice = ChannelChoice()
    snapshot = sample(16, network(layers, of, sites))
    table = watched()[0].signals.observe(snapshot)
    found = choice.take(snapshot, table, 16, [f"bn_{n}" for n in range(layers)])
    assert len(found) == layers
    for item in found:
        assert item.of == of
        assert len(item.sites) == min(sites, SITES)
        assert len(item.channels) == min(of, CHANNELS, NUMBERS // layers // len(item.sites))
        assert list(item.channels) == sorted(set(item.channels))
        assert item.values.shape == (4 * len(item.sites), len(item.channels))
    assert sum(item.values.nbytes for item in found) <= 16 * NUMBERS


def test_channels_kept_are_the_ones_farthest_off_and_some_of_all():
    of = 5000
    spec = testing.layer("bn", of)
    mean = np.zeros(of)
    worst = [17, 1234, 4999]
    mean[worst] = 3.0, -4.0, np.nan
    watch, sink = watched()
    watch.observe(testing.snapshot(1, testing.call(spec, mean=mean, updates=10)))
    (found,) = sink.of(ChannelStatistics)
    assert len(found.channels) == CHANNELS
    assert set(worst) <= set(found.channels)
    assert np.diff(found.channels).max() < of / 100
    assert np.array_equal(found["batch_mean"][0], mean[list(found.channels)].astype(np.float32), equal_nan=True)


def test_channels_kept_change_only_when_samples_double():
    spec = testing.layer("bn", 1000)
    watch, sink = watched()
    for step in range(1, 65):
        mean = np.random.default_rng(step).normal(size=1000)
        watch.observe(testing.snapshot(step, testing.call(spec, mean=mean, updates=step)))
    items = sink.of(ChannelStatistics)
    changed = [b.step for a, b in itertools.pairwise(items) if a.channels != b.channels]
    assert changed == [2, 4, 8, 16, 32, 64]


def test_other_channels_of_the_same_layer_are_chosen_anew():
    watch, sink = watched()
    for step, of in enumerate((1000, 700, 5), 3):
        watch.observe(sample(step, network(1, of)))
    assert [(item.of, len(item.channels)) for item in sink.of(ChannelStatistics)] == [(1000, 512), (700, 512), (5, 5)]


def test_call_sites_of_other_lengths_are_left_out():
    first, second = testing.layer("bn", 4), testing.layer("bn", 6)
    watch, sink = watched()
    watch.observe(testing.snapshot(1, testing.call(first), testing.call(second, site=1)))
    (found,) = sink.of(ChannelStatistics)
    assert [site.index for site in found.sites] == [0]


def test_a_sample_without_calls_is_none():
    watch, sink = watched()
    watch.observe(testing.snapshot(1))
    watch.observe(sample(2, network(2)))
    watch.observe(testing.snapshot(3))
    assert recorded(sink) == {"bn_0": [2], "bn_1": [2]}


def test_nothing_of_a_sample_is_kept_alive():
    watch = Watch(None, on_diagnosis=lambda _: None, experiments=False)
    alive = []
    for step in range(1, 40):
        snapshot = sample(step, network(2))
        alive += [weakref.ref(call.batch.var) for call in snapshot.calls]
        watch.observe(snapshot)
        del snapshot
    gc.collect()
    assert sum(ref() is not None for ref in alive) == 0


def test_a_choice_goes_on_where_it_was():
    layers, whole = network(of=1000), ChannelChoice()
    watch = watched()[0]
    half = ChannelChoice.recalled({})
    found = {whole: [], half: []}
    for step in range(1, 80):
        snapshot = sample(step, layers)
        table = watch.signals.observe(snapshot)
        if step in (5, 20, 41):
            memory = half.memory
            found[anew := ChannelChoice.recalled(json.loads(json.dumps(memory, default=np.ndarray.tolist)))] = (
                found.pop(half)
            )
            half = anew
        for choice in (whole, half):
            found[choice] += choice.take(snapshot, table, step, ["bn_7"] if 10 < step < 30 else [])
    assert len(found[whole]) > 100
    for mine, theirs in zip(found[half], found[whole], strict=True):
        assert dataclasses.replace(mine, values=None) == dataclasses.replace(theirs, values=None)
        assert mine.values.tobytes() == theirs.values.tobytes()


@pytest.mark.parametrize(
    "kept",
    [[["bn", 4, [4]]], [["bn", 4, [-1]]], [["bn", 4, [[1]]]], [["bn", 4]], [["bn", "x", [1]]], [["bn", 4, ["x"]]], 5],
)
def test_a_memory_that_is_none_is_refused(kept):
    with pytest.raises((TypeError, ValueError)):
        ChannelChoice.recalled({"chosen": [], "followed": [], "kept": kept})


def test_a_fault_here_leaves_the_training_running(monkeypatch):
    def broken(*_):
        raise RuntimeError

    monkeypatch.setattr(ChannelChoice, "take", broken)
    watch, sink = watched(every=1)
    watch.record("bn", batch_mean=[0.0], batch_var=[1.0], count=8, running_mean=[0.0], running_var=[1.0], decay=0.9)
    watch.step()
    assert not watch.enabled
    assert "RuntimeError while ending a step" in next(d.message for d in watch.diagnoses if d.rule == "BN903")
    assert sink.of(ChannelStatistics) == []
