import pytest

from bnwatch import testing
from bnwatch.records import EvaluationRecord, Structure
from tests.rules import cases

RULE = "BN204"


def run(count, *, batch=None, running=None, evaluation=None, examples=1000, size=None, steps=8, evaluated=True, **more):
    """A layer of one channel group on batches of ``count`` elements, and the cells of training data."""
    spec = testing.layer(channels=16, bessel_corrected=more.pop("bessel_corrected", False))
    places = (testing.usage("bn", testing.place("bn", elements=1, **more)),)
    seen = [
        Structure(places, batch_size=size),
        *testing.train(spec, testing.normal(16, count), steps=steps),
        *([EvaluationRecord(steps, 0, 0.9, examples=1000)] if evaluated else []),
    ]
    if batch is not None:
        training = {"batch": batch, "running": running}
        seen.append(testing.cells(steps, training=training, evaluation=evaluation, examples=examples))
    return testing.signals(*seen)


def effective(samples, *, batch=0.66, running=0.857, images=5):
    """Images of many pixels, whose batch means scatter as those of ``samples`` do."""
    fed = run(1024, batch=batch, running=running, size=images)
    fed.tables[-1].column("effective_samples")[:] = samples
    return fed


@pytest.mark.parametrize("known", ["batch size", "composition", "elements an example"])
def test_effective_samples_are_no_fewer_than_the_examples(known):
    """Weights that move on from sample to sample scatter the batch means, too."""
    fed = run(16, batch=0.8, running=0.9, size=16 if known == "batch size" else None)
    fed.tables[-1].column("effective_samples")[:] = 2.0
    if known == "composition":
        fed.composition = testing.composition(batches=10, examples=160)
    assert cases.look(RULE, fed) == ([], [])


def trailing():
    """Batches of 32, the last of 2."""
    spec = testing.layer(channels=16)
    full = list(testing.train(spec, testing.normal(16, 32), steps=7))
    return testing.signals(*full, testing.snapshot(8, testing.call(spec, count=2, running_mean=0.1)))


FIRES = {
    "batches of 2, an MLP": lambda: run(2, batch=0.66, running=0.857),
    "a regression on batches of 2": lambda: run(2),
    "batches of 2, and few examples were kept": lambda: run(2, batch=0.5, running=0.667, examples=108),
    "below_samples": lambda: effective(11.9),
    "above_cost": lambda: run(8, batch=0.8, running=0.8101, examples=10_000),
    "below_alpha": lambda: run(8, batch=0.8, running=0.82, examples=500),
    "few training examples, and evaluation in such batches": lambda: run(
        8, batch=0.94, running=0.99, evaluation={"batch": 0.86, "running": 0.99}, examples=125
    ),
    "below_few images, whatever their pixels seem to be worth": lambda: effective(40.0, images=4),
    "below_few and it costs": lambda: run(4, batch=0.8, running=0.9),
}
INFO = {
    "below_few": lambda: run(4),
    "batches of 3, and few examples were kept": lambda: run(3, batch=0.5, running=0.55, examples=108),
    "batches of 2 that cost nothing": lambda: run(2, batch=0.9, running=0.9),
    "batches of 2 behind dropout, which explains it": lambda: run(2, batch=0.66, running=0.857, dropout="drop"),
}
QUIET = {
    "above_few": lambda: run(5, evaluated=False),
    "above_samples": lambda: effective(12.1),
    "below_cost": lambda: run(8, batch=0.8, running=0.8099, examples=10_000),
    "few training examples, and evaluation in large batches": lambda: run(
        8, batch=0.94, running=0.99, evaluation={"batch": 0.99, "running": 0.99}, examples=125
    ),
    "above_alpha": lambda: run(8, batch=0.8, running=0.818, examples=500),
    "batches of 16, a healthy CNN": lambda: run(16 * 64, batch=0.99, running=0.997, size=16),
    "dropout in front: running statistics do better, too": lambda: run(8, batch=0.799, running=0.951, dropout="drop"),
    "an odd last batch of 2": trailing,
    "batches of 32": lambda: run(32, batch=0.9, running=0.95),
    "one element, which is BN205": lambda: run(1),
    "nothing was seen": testing.signals,
    "one sample": lambda: run(2, steps=1, evaluated=False),
}
SKIPS = {"whether it costs is not measured": (lambda: run(8), "cells")}

test_cases = cases.runner(RULE, fires=FIRES, info=INFO, quiet=QUIET, skips=SKIPS)


def test_small_batches_ask_for_the_cells_that_tell_what_they_cost():
    assert [s.needs for s in cases.look(RULE, run(2))[1]] == ["cells"]
    assert cases.look(RULE, run(2, batch=0.66, running=0.857))[1] == []


def test_the_layer_with_the_fewest_is_named():
    wide, narrow = testing.layer("wide"), testing.layer("narrow")
    seen = [
        testing.snapshot(n, testing.call(wide, count=128, mean=n), testing.call(narrow, count=3, mean=n))
        for n in (1, 2, 3)
    ]
    ((finding,), _) = cases.look(RULE, testing.signals(*seen))
    assert finding.subject == "narrow"
    assert "layers" not in finding.evidence


@pytest.mark.parametrize(("lost", "layers"), [({}, 2), ({"batch": 0.66, "running": 0.857}, 3)])
def test_the_others_are_counted(lost, layers):
    """Of few elements two, of few effective samples three."""
    specs = [testing.layer(path) for path in ("a", "b", "c", "d")]
    seen = [
        testing.snapshot(
            n, *(testing.call(spec, count=count, mean=n) for spec, count in zip(specs, (2, 3, 11, 128), strict=True))
        )
        for n in (1, 2, 3)
    ]
    fed = testing.signals(*seen, *([testing.cells(3, training=lost)] if lost else []))
    fed.tables[-1].column("effective_samples")[:] = 2, 3, 11, 128
    ((finding,), _) = cases.look(RULE, fed)
    assert finding.subject == "a"
    assert finding.evidence["layers"].value == layers


@pytest.mark.parametrize(("corrected", "notes"), [(False, True), (True, False)])
def test_a_variance_kept_without_bessels_correction_is_too_small(corrected, notes):
    ((finding,), _) = cases.look(RULE, run(2, batch=0.66, running=0.857, bessel_corrected=corrected))
    biased = [note for note in finding.notes if "Bessel" in note]
    assert bool(biased) is notes
    assert all("1/2 of that of the data" in note and "1.41 times as wide" in note for note in biased)


def test_what_is_lost_is_said():
    ((finding,), _) = cases.look(RULE, run(2, batch=0.66, running=0.857))
    assert finding.message == (
        "`bn` normalizes with statistics of 2 elements a channel, which costs 19.7 points: 66.0% with batch "
        "statistics, 85.7% with running ones"
    )
    assert finding.evidence["cost"].value == pytest.approx(0.197)
