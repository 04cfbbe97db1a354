"""How often the rules that rest on a statistical test raise a false alarm on healthy networks; prints tables.

The figures stand in the pages of the rules. Run from the top of the checkout: python -m benchmarks.false_alarms
"""

from __future__ import annotations

import argparse
import time
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from bnwatch import moments, testing
from bnwatch.diagnosis import Severity
from bnwatch.evidence import Cell, Cells, Examples, composition, entering
from bnwatch.records import EvaluationRecord, Structure
from bnwatch.rules import CATALOGUE, Finding

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    from bnwatch.signals import Signals

RULES = {rule.id: rule for rule in CATALOGUE}
LOOKS_FROM = 4
STEPS = 16
FIXED = 0.25


def alarm(rule_id: str, signals: Signals) -> bool:
    """Return whether the rule raises a warning or an error."""
    rule = RULES[rule_id]
    found = [o for o in rule.check(signals) if isinstance(o, Finding)]
    return any((finding.severity or rule.severity) >= Severity.WARNING for finding in found)


def correlated(channels: int, count: int) -> Callable[[np.random.Generator], NDArray[np.float64]]:
    """Return activations whose channels share nine tenths of their variance."""
    return lambda rng: rng.normal(size=(count, channels)) + 3.0 * rng.normal(size=(count, 1))


def heavy(channels: int, count: int) -> Callable[[np.random.Generator], NDArray[np.float64]]:
    """Return activations with the tails of Student's t with 2.5 degrees of freedom."""
    return lambda rng: rng.standard_t(2.5, (count, channels))


def pixels(channels: int, count: int) -> Callable[[np.random.Generator], NDArray[np.float64]]:
    """Return maps of 16 pixels an example that all but repeat each other: worth a sixteenth of their number."""
    examples = max(count // 16, 2)
    return lambda rng: (
        np.repeat(rng.normal(size=(examples, channels)), 16, axis=0) + rng.normal(0.0, 0.1, (16 * examples, channels))
    )


def lognormal(channels: int, count: int) -> Callable[[np.random.Generator], NDArray[np.float64]]:
    """Return activations whose logarithm is normal with a standard deviation of 1: skewed, and of heavy tails."""
    return lambda rng: rng.lognormal(0.0, 1.0, (count, channels))


def autoregressive(channels: int, count: int) -> Callable[[np.random.Generator], NDArray[np.float64]]:
    """Return activations of which neighbours along the elements are correlated by .9, in examples of 16 elements."""
    examples, elements = max(count // 16, 2), 16

    def draw(rng: np.random.Generator) -> NDArray[np.float64]:
        noise = rng.normal(size=(elements, examples, channels))
        for n in range(1, elements):
            noise[n] = 0.9 * noise[n - 1] + 0.19**0.5 * noise[n]
        return noise.transpose(1, 0, 2).reshape(examples * elements, channels)

    return draw


KINDS = {
    "normal": testing.normal,
    "correlated": correlated,
    "heavy tails": heavy,
    "lognormal": lognormal,
    "pixels": pixels,
    "neighbours": autoregressive,
}
PER_EXAMPLE = {"pixels": 16, "neighbours": 16}
SIZES = ((8, 8), (64, 8), (2048, 8), (8, 64), (256, 64), (8, 512), (64, 512), (8, 4096))
"""Channels and elements a channel."""
SUSPECTED = {
    "training": {"batch": 0.9, "running": 0.5, "reshuffled": 0.5},
    "evaluation": {"batch": 0.9, "running": 0.5},
}
"""Cells that show a loss, so that nothing but the statistical test of a rule keeps it silent."""
NOISY = {"training": {"batch": 0.5, "running": 0.9}}
"""Cells of noise that costs accuracy."""
SNAPSHOTS = 1000
EVERY = 5


def healthy_layers(snapshots: int) -> None:
    """BN204, BN206, BN209: one healthy layer, looked at after each of its samples, with cells that show a loss."""
    print(f"\nBN204 (batches of 16 examples or more), BN206 (equal batches), BN209: share of {snapshots} looks with a "
          "warning")  # fmt: skip
    print(f"{'channels':>8} {'elements':>8} {'activations':<12} {'looks':>6} {'BN204':>7} {'BN206':>7} {'BN209':>8}")
    totals = np.zeros(4)
    for channels, count in SIZES:
        for kind, draw in KINDS.items():
            counted, seed = np.zeros(4), 0
            while counted[0] < snapshots:
                counted += one_training(channels, count, kind, draw(channels, count), seed)
                seed += 1
            totals += counted
            show(f"{channels:>8} {count:>8} {kind:<12}", counted, (7, 7, 8))
    show(f"{'all':>8} {'':>8} {'':<12}", totals, (7, 7, 8))


def one_training(
    channels: int, count: int, kind: str, draw: Callable[[np.random.Generator], NDArray[np.float64]], seed: int
) -> NDArray[np.float64]:
    """Return the looks at one healthy layer in training, and in how many each rule warned."""
    examples = count // PER_EXAMPLE.get(kind, 1)
    place = testing.place("bn", elements=PER_EXAMPLE.get(kind, 1))
    signals = testing.signals(Structure((testing.usage("bn", place),), batch_size=examples))
    counted = np.zeros(4)
    spec = testing.layer(channels=channels)
    for snapshot in testing.train(spec, draw, steps=40 * EVERY, every=EVERY, seed=seed):
        signals.observe(snapshot)
        if len(signals.tables) < 2 * LOOKS_FROM:
            continue
        signals.evaluate(EvaluationRecord(snapshot.step, 0, 0.5, examples=1000))
        signals.cells = testing.cells(snapshot.step, **SUSPECTED)  # type: ignore[arg-type]
        warned = [alarm(rule, signals) for rule in ("BN206", "BN209")]
        signals.cells = testing.cells(snapshot.step, **NOISY)  # type: ignore[arg-type]
        counted += (1, alarm("BN204", signals) and examples >= 16, *warned)
    return counted


def random_batches(trials: int) -> None:
    """BN207, BN208: random batches, also unequal ones, where the cells show a loss."""
    print(f"\nBN207 and BN208, random batches, {trials} experiments each: share with p below, and with a warning")
    print(f"{'channels':>8} {'batches':<14} {'activations':<12} {'p<.05':>7} {'p<.01':>7} {'p<1e-3':>7} {'warning':>8}")
    rng, totals = np.random.default_rng(0), np.zeros(5)
    cells = testing.cells(**SUSPECTED)  # type: ignore[arg-type]
    for channels, sizes in ((8, (8,) * 16), (64, (32,) * 8), (512, (32,) * 16), (8, (4,) * 64), (8, (32,) * 15 + (1,))):
        for kind, draw in KINDS.items():
            counted = np.zeros(5)
            if kind in PER_EXAMPLE:
                continue  # elements of one example stay together: what is shuffled is their means
            for _ in range(trials):
                data = [Examples(draw(channels, n)(rng), np.zeros(n, np.int64), "training") for n in sizes]
                lab = testing.FakeLaboratory(
                    np.eye(channels), {"training": data}, np.zeros(channels), np.ones(channels)
                )
                found = composition(lab)
                (site,) = found.sites
                signals = testing.signals(cells, found)
                warned = alarm("BN207", signals) or alarm("BN208", signals)
                p = site.p_value
                counted += (1, p < 0.05, p < 0.01, p < 1e-3, warned)
            totals += counted
            what = f"{len(sizes)} of {sizes[0]}" + (f", {sizes[-1]}" if sizes[-1] != sizes[0] else "")
            show(f"{channels:>8} {what:<14} {kind:<12}", counted, (7, 7, 7, 8))
    show(f"{'all':>8} {'':<14} {'':<12}", totals, (7, 7, 7, 8))


def shared_layers(seconds: float) -> None:
    """BN101: healthy layers with two call sites on identically distributed data."""
    print("BN101, identical sites: share of looks (after 4 to 16 samples) with p below, and of looks with a warning")
    print(f"{'channels':>8} {'elements':>8} {'activations':<12} {'looks':>6} {'p<.01':>7} {'p<1e-4':>7} "
          f"{'warning':>8} {'fixed .25':>10}")  # fmt: skip
    totals = np.zeros(5)
    for channels in (8, 64, 512, 2048):
        for count in (8, 32, 128, 512):
            for kind, draw in KINDS.items():
                counted, spent, seed = np.zeros(5), time.perf_counter(), 0
                while time.perf_counter() - spent < seconds:
                    counted += one_layer(channels, draw(channels, count), seed)
                    seed += 1
                totals += counted
                show(f"{channels:>8} {count:>8} {kind:<12}", counted)
    show(f"{'all':>8} {'':>8} {'':<12}", totals)


def show(head: str, counted: NDArray[np.float64], widths: tuple[int, ...] = (7, 7, 8, 10)) -> None:
    """Print one line of the table."""
    looks, *hits = counted
    shares = [f"{100 * hit / looks:>{width - 1}.2f}%" for hit, width in zip(hits, widths, strict=True)]
    print(f"{head} {looks:>6.0f} {' '.join(shares)}", flush=True)


def one_layer(
    channels: int, draw: Callable[[np.random.Generator], NDArray[np.float64]], seed: int
) -> NDArray[np.float64]:
    """Return the looks at one healthy layer, and in how many each criterion was met."""
    signals, counted = testing.signals(), np.zeros(5)
    for snapshot in testing.train(testing.layer(channels=channels), draw, draw, steps=STEPS, seed=seed):
        signals.observe(snapshot)
        if len(signals.tables) < LOOKS_FROM:
            continue
        ((_, _, apart),) = signals.shared()
        assert apart is not None
        first, second = (call.batch for call in snapshot.calls)
        distance = np.abs(first.mean - second.mean) / np.sqrt((first.var + second.var) / 2.0)
        counted += (1, apart.differ(0.01), apart.differ(1e-4), alarm("BN101", signals), bool((distance > FIXED).any()))
    return counted


def replicas(seconds: float) -> None:
    """BN212: replicas that see random parts of the same data, compared after 4 to 16 samples."""
    print(
        "\nBN212, parts of the same data: share of looks with p below, of looks with a warning, and of looks in which"
    )
    print("running statistics alone are .1 standard deviations apart, noise taken out")
    print(f"{'replicas':>8} {'channels':>8} {'elements':>8} {'activations':<12} {'looks':>6} {'p<.01':>7} "
          f"{'p<1e-4':>7} {'warning':>8} {'apart':>7}")  # fmt: skip
    totals = np.zeros(5)
    for number, channels in ((2, 8), (2, 512), (8, 64)):
        for count in (8, 32, 128):
            for kind, draw in KINDS.items():
                counted, spent, seed = np.zeros(5), time.perf_counter(), 0
                while time.perf_counter() - spent < seconds:
                    counted += one_replicated(number, channels, draw(channels, count), seed)
                    seed += 1
                totals += counted
                show(f"{number:>8} {channels:>8} {count:>8} {kind:<12}", counted, (7, 7, 8, 7))
    show(f"{'all':>8} {'':>8} {'':>8} {'':<12}", totals, (7, 7, 8, 7))


def one_replicated(
    number: int, channels: int, draw: Callable[[np.random.Generator], NDArray[np.float64]], seed: int
) -> NDArray[np.float64]:
    """Return the looks at one layer on several replicas, and in how many each criterion was met."""
    layer, signals, counted = testing.layer(channels=channels), testing.signals(), np.zeros(5)
    parts = [testing.train(layer, draw, steps=5 * STEPS, every=5, seed=1000 * seed + n) for n in range(number)]
    for snapshots in zip(*parts, strict=True):
        calls = [
            replace(call, site=replace(call.site, replica=n)) for n, part in enumerate(snapshots) for call in part.calls
        ]
        signals.observe(testing.snapshot(snapshots[0].step, *calls))
        if len(signals.tables) < LOOKS_FROM:
            continue
        found = signals.compare(snapshots[0].step, 0)
        assert found is not None
        (apart,) = found.layers
        far = max(apart["between_shift"], apart["between_scale"]) > 0.1
        counted += (1, apart.differ(0.01), apart.differ(1e-4), alarm("BN212", signals), far)
    return counted


def paired_cells(trials: int) -> None:
    """BN301: two passes over the same examples that are equally good, and differ in some of them."""
    print(f"\nBN301, equally good statistics, {trials} experiments: share with a warning")
    print(f"{'examples':>8} {'disagree':>9} {'one split':>10} {'both splits':>12}")
    rng = np.random.default_rng(0)
    for examples in (100, 500, 2000):
        for disagree in (0.05, 0.2):
            hits = np.zeros(2)
            for _ in range(trials):
                rows = [equal_cells(rng, examples, disagree) for _ in range(2)]
                for number, training in enumerate(({}, rows[0])):
                    cells = Cells(1, 0, 10, training, rows[1])
                    hits[number] += alarm("BN301", testing.signals(cells))
            print(f"{examples:>8} {disagree:>9.0%} {hits[0] / trials:>10.3%} {hits[1] / trials:>12.3%}", flush=True)


def equal_cells(rng: np.random.Generator, examples: int, disagree: float) -> dict:  # type: ignore[type-arg]
    """Return cells of equal expected accuracy, right in different examples."""
    labels = np.zeros(examples, np.int64)
    side = rng.random(examples)
    wrong_batch, wrong_running = side < disagree / 2, side > 1.0 - disagree / 2
    return {
        "batch": Cell(wrong_batch.astype(np.int64), labels),
        "running": Cell(wrong_running.astype(np.int64), labels),
    }


def equal_inputs(trials: int) -> None:
    """BN304: evaluation examples of the same population, where running statistics are said to cost accuracy there."""
    print(f"\nBN304, inputs of one population, {trials} experiments each: share with p below, and with a warning")
    print(f"{'batches':<24} {'activations':<12} {'p<.01':>7} {'warning':>8}")
    rng, channels = np.random.default_rng(0), 16
    suspected = {"training": {"batch": 0.9, "running": 0.9}, "evaluation": {"batch": 0.9, "running": 0.5}}
    for training, evaluation in (((32,) * 8, (32,) * 8), ((8,) * 32, (64,) * 8), ((32,) * 8, (32, 32))):
        for kind, draw in KINDS.items():
            hits = np.zeros(2)
            for _ in range(trials):
                data = {
                    split: [Examples(draw(channels, n)(rng), np.zeros(n, np.int64), split) for n in sizes]
                    for split, sizes in (("training", training), ("evaluation", evaluation))
                }
                zero, one = np.zeros(channels), np.ones(channels)
                found = entering(testing.FakeLaboratory(np.eye(channels), data, zero, one))  # type: ignore[arg-type]
                cells = testing.cells(**suspected)  # type: ignore[arg-type]
                p = found.sites[0].p_value
                hits += p is not None and p < 0.01, alarm("BN304", testing.signals(cells, found))
            sizes = f"{len(training)} of {training[0]}, {len(evaluation)} of {evaluation[0]}"
            print(f"{sizes:<24} {kind:<12} {hits[0] / trials:>7.2%} {hits[1] / trials:>8.2%}", flush=True)


def slow_starts(trials: int) -> None:
    """BN302: a network that is a little better than guessing, seen at three evaluations in a row."""
    print(f"\nBN302, ten classes, {trials} networks that learn slowly: share called stuck at chance")
    print(f"{'examples':>8} " + " ".join(f"{f'accuracy {a:.2f}':>14}" for a in (0.11, 0.12, 0.15, 0.20)))
    rng = np.random.default_rng(0)
    for examples in (20, 100, 500, 1000, 10_000):
        shares = []
        for accuracy in (0.11, 0.12, 0.15, 0.20):
            hits = 0
            for _ in range(trials):
                seen = rng.binomial(examples, accuracy, (3, 2)) / examples
                evaluations = [
                    EvaluationRecord(
                        n, n, float(held), examples=examples, train_accuracy=float(train), train_examples=examples,
                        classes=10,
                    )
                    for n, (held, train) in enumerate(seen)
                ]  # fmt: skip
                hits += alarm("BN302", testing.signals(*evaluations))
            shares.append(f"{hits / trials:>14.1%}")
        print(f"{examples:>8} " + " ".join(shares), flush=True)


def settled(trials: int) -> None:
    """BN201: settled layers evaluated with an accuracy gap, and unsettled ones without a gap."""
    print(f"\nBN201, {trials} trainings of decay 0.9 seen after n updates: share with a finding of any severity")
    for updates in (10, 20, 28, 29, 40, 100):
        hits = 0
        for seed in range(trials):
            draw = testing.normal(16, 64, mean=1.0)
            seen = testing.train(testing.layer(channels=16), draw, steps=updates, every=max(1, updates // 5), seed=seed)
            signals = testing.signals(*seen, EvaluationRecord(updates, 0, 0.5))
            hits += any(isinstance(o, Finding) for o in RULES["BN201"].check(signals))
        weight = moments.initial_weight(0.9, updates)
        print(f"{updates:>8} updates, {weight:>6.2%} initial: {hits / trials:.0%}", flush=True)


def main() -> None:
    """Run all of them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--seconds", type=float, default=2.0, help="for each kind of shared or replicated layer (default: 2)"
    )
    parser.add_argument("--trials", type=int, default=2000, help="simulated experiments each (default: 2000)")
    parser.add_argument(
        "--snapshots", type=int, default=SNAPSHOTS, help="looks at each kind of healthy layer (default: 1000)"
    )
    arguments = parser.parse_args()
    shared_layers(arguments.seconds)
    replicas(arguments.seconds)
    paired_cells(arguments.trials)
    equal_inputs(arguments.trials)
    healthy_layers(arguments.snapshots)
    random_batches(arguments.trials)
    slow_starts(arguments.trials)
    settled(min(arguments.trials, 200))


if __name__ == "__main__":
    main()
