"""The rule type: a named, documented, tunable check."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from importlib import resources
from itertools import takewhile
from typing import TYPE_CHECKING, Literal

from bnwatch import moments
from bnwatch.diagnosis import Skipped, Table
from bnwatch.order import CAUSES, rank
from bnwatch.signals import LEARNING_ALPHA, SharedSites, Signals, SignalTable, gap

if TYPE_CHECKING:
    from bnwatch.diagnosis import Quantity, Severity
    from bnwatch.evidence import Cell, Cells, Entering, Split, Statistics
    from bnwatch.records import EvaluationRecord

COLUMNS: dict[Statistics, str] = {
    "batch": "batch statistics",
    "reshuffled": "in random batches",
    "running": "running statistics",
    "population": "re-estimated",
}

INNOCENT = 0.05
"""p-value of the paired test from which on running statistics are not said to be innocent: they may cost accuracy."""

SAME = 1e-4
"""False alarms a layer and look, at which call sites count as different."""

SHIFT = 0.1
"""Standard deviations between call sites, noise taken out: a difference can be certain and too small to matter."""

HARMLESS = 0.01
"""Accuracy that running statistics may cost and still count as harmless."""

ENOUGH = 250
"""Examples it takes to say so: a cost of five points shows as one point or less with p = 3e-4."""

GAP_ALPHA = 1e-3
"""p-value below which an evaluation that is worse than the training is not put down to its sampling."""

RESTLESS = 0.1
"""Relative change of a layer's parameters in one step; healthy trainings show .001 to .02."""

FEW = 5
"""Elements a call below which its variance says too little to be compared."""

NAMED = 3
"""Layers that a message names; the others are counted."""

OTHER_PASSES = {
    "bnwatch.chainer": (
        "Chainer: make the other passes of a training step inside `with chainer.using_config('train', False):`, which "
        "leaves the running statistics alone",
    ),
    "bnwatch.keras": (
        "Keras: make the other passes of a training step with `training=False`, which leaves the running statistics "
        "alone",
    ),
}
"""What helps where a step calls the model on other data besides, by adapter."""


@dataclass(frozen=True, slots=True)
class Threshold:
    """A number that decides, and where it comes from."""

    value: float
    kind: Literal["derived", "measured", "convention"]
    why: str


@dataclass(frozen=True, slots=True)
class Finding:
    """What a rule body yields where it fires; the engine adds the rest of the `Diagnosis`.

    ``severity`` is given where it differs from the rule's own.
    """

    subject: str
    message: str
    evidence: Mapping[str, Quantity] = field(default_factory=dict)
    table: Table | None = None
    further: tuple[Table, ...] = ()
    notes: tuple[str, ...] = ()
    helps: tuple[str, ...] = ()
    severity: Severity | None = None


Limits = Mapping[str, float]
Body = Callable[[Signals, Limits], Iterator[Finding | Skipped]]


@dataclass(frozen=True, slots=True)
class Rule:
    """One entry of the catalogue.

    Attributes:
        id: public id, never reused.
        name: states the bad pattern; reads well after "allow".
        severity: of its findings, unless a finding says otherwise.
        since: version that brought it.
        summary: one line, from the docstring of the body.
        causes: ids of rules whose diagnoses explain this one: it is then shown as their consequence. The one that is
            believed first comes first.
        thresholds: the numbers that decide.
        body: yields findings, or `Skipped` where it could not look.
    """

    id: str
    name: str
    severity: Severity
    since: str
    summary: str
    causes: tuple[str, ...]
    thresholds: Mapping[str, Threshold]
    body: Body

    def check(self, signals: Signals, overrides: Limits | None = None) -> list[Finding | Skipped]:
        """Run the body with the rule's thresholds, or others."""
        limits = {name: threshold.value for name, threshold in self.thresholds.items()}
        return list(self.body(signals, {**limits, **(overrides or {})}))

    def page(self) -> str:
        """Return the rule's page, Markdown."""
        return (resources.files("bnwatch.rules") / "pages" / f"{self.id}.md").read_text(encoding="utf-8")


def innocence(cells: Cells | None) -> tuple[str, ...]:
    """Return the note that clears the running statistics where the cells do, none where they do not or are missing."""
    if cells is None:
        return ()
    split, row = next(cells.rows())
    batch, running = row["batch"], row["running"]
    gained, p = batch.gain_over(running)
    if gained > 0.0 and p < INNOCENT:
        return ()
    return (
        (
            f"the running statistics are innocent: the same {batch.examples:,} {split} examples give "
            f"{batch.accuracy:.1%} with batch statistics and {running.accuracy:.1%} with running statistics"
        ),
    )


def at_chance(signals: Signals, evaluation: EvaluationRecord, alpha: float) -> bool:
    """Return whether training and evaluation accuracy are what a constant predictor or a guesser can reach."""
    known = (
        (evaluation.accuracy, evaluation.examples, signals.chance_on("evaluation")),
        (evaluation.train_accuracy, evaluation.train_examples, signals.chance_on("training")),
    )
    return all(
        moments.binomial_survival(round(accuracy * examples), examples, chance) > alpha
        for accuracy, examples, chance in known
        if accuracy is not None and examples and chance is not None
    )


def stuck(signals: Signals, alpha: float) -> int:
    """Return for how many evaluations in a row, the last one among them, accuracy has been what guessing gives."""
    known = [e for e in signals.evaluations if e.accuracy is not None and e.examples]
    if signals.chance is None:
        return 0
    times = sum(1 for _ in takewhile(lambda evaluation: at_chance(signals, evaluation, alpha), reversed(known)))
    cells = signals.cells
    return 0 if times and cells is not None and cells.step >= known[-times].step and _telling(cells, alpha) else times


def _telling(cells: Cells, alpha: float) -> bool:
    """Return whether predictions go with the labels, be they right no more often than the most frequent class is.

    Of predictions that do not, a share s of one class is right for s m at most, m the share of the most frequent label,
    and the others for min(m, 1 - m). It matters where classes are rare, or weighted in the loss.
    """
    for _, row in cells.rows():
        cell = row["running"]
        m, s = cell.majority, cell.largest_share
        right = round(cell.accuracy * cell.examples)
        if moments.binomial_survival(right, cell.examples, s * m + (1.0 - s) * min(m, 1.0 - m)) < alpha:
            return True
    return False


def harmless(signals: Signals, statistics: Statistics = "running") -> bool:
    """Return whether running statistics are known to cost nothing: a distance between statistics is then no fault.

    The cells show that on every split they measured, for a network that has learned something; where they are older
    than the last evaluation, that evaluation is no worse than the training either. Of ``"population"`` statistics it
    says that those re-estimated from these batches cost nothing: then the running ones are no mixture.
    """
    cells, last = signals.cells, signals.evaluations[-1] if signals.evaluations else None
    if cells is None or not (cells.training or cells.evaluation):
        return False
    if last is not None and cells.step < last.step and unexplained_gap(signals, GAP_ALPHA) is not None:
        return False
    return all(statistics in row and _free(row["batch"], row[statistics]) for _, row in cells.rows())


def _free(batch: Cell, other: Cell) -> bool:
    """Return whether other statistics cost next to nothing against batch statistics that are better than guessing."""
    right = round(batch.accuracy * batch.examples)
    learned = moments.binomial_survival(right, batch.examples, batch.majority) < LEARNING_ALPHA
    return learned and batch.examples >= ENOUGH and batch.gain_over(other)[0] <= HARMLESS


def costs(row: Mapping[Statistics, Cell], cost: float, alpha: float) -> bool:
    """Return whether running statistics cost more than a share of these examples against batch statistics."""
    if "batch" not in row:
        return False
    gained, p = row["batch"].gain_over(row["running"])
    return gained > cost and p < alpha


def unexplained_gap(signals: Signals, alpha: float) -> str | None:
    """Return that the last evaluation is worse than the training beyond chance, None where it is not."""
    found = gap(signals.evaluations[-1]) if signals.evaluations else None
    if found is None or found[0] <= 0.0 or found[1] >= alpha:
        return None
    return f"training accuracy is {100 * found[0]:.1f} points above evaluation accuracy; why is not measured yet"


def unmeasured(signals: Signals) -> str:
    """Return why no experiment was run where no rule asked for one, or where it was not to be had."""
    if signals.refused is not None:
        return "the experiment could not be run, which is BN904"
    if all(evaluation.accuracy is None for evaluation in signals.evaluations):
        return "no experiment was run: it takes an evaluation accuracy to call for one, and none was seen"
    return "no experiment was run: nothing called for one"


def same_accuracy(one: Cell, two: Cell) -> float:
    """Return the one-sided p-value that two samples have the same accuracy (z test), against the first being better."""
    pooled = (one.accuracy * one.examples + two.accuracy * two.examples) / (one.examples + two.examples)
    error = math.sqrt(pooled * (1.0 - pooled) * (1.0 / one.examples + 1.0 / two.examples))
    return 1.0 if error == 0.0 else 0.5 * math.erfc((one.accuracy - two.accuracy) / error / math.sqrt(2.0))


def first_difference(entering: Entering, same: float, apart: float) -> int | None:
    """Return the number of the first call site at which evaluation inputs differ, None where they do at none.

    ``same`` is the share of false alarms, all call sites together, ``apart`` the standard deviations between the means
    or the logarithm of the ratio of spreads that it takes besides. That there is a difference is tested over all call
    sites; where it begins, at each by itself.
    """
    differ = {
        number: site.p_value
        for number, site in enumerate(entering.sites)
        if site.p_value is not None
        and site.p_value < same
        and max(site.mean_shift, abs(math.log(site.std_ratio))) > apart
    }
    return min(differ) if differ and min(differ.values()) * len(entering.sites) < same else None


def restores(population: Cell, batch: Cell, running: Cell) -> bool:
    """Return whether re-estimated statistics win back more than half of what running statistics cost."""
    return population.accuracy - running.accuracy > 0.5 * (batch.accuracy - running.accuracy)


def measured(split: Split, row: Mapping[Statistics, Cell], otherwise: str, *, by: Statistics = "population") -> str:
    """Return what the same examples give with running and with other statistics."""
    running = row["running"]
    return (
        f"on the same {running.examples:,} {split} examples: {running.accuracy:.1%} with running statistics, "
        f"{row[by].accuracy:.1%} {otherwise}"
    )


def refresh(signals: Signals) -> str:
    """Return the repair where a re-estimate restores accuracy."""
    by = f": `{signals.adapter}.recalibrate(model, batches)`" if signals.adapter else ""
    return f"re-estimate the running statistics over training data with frozen weights before evaluating{by}"


def cells_table(cells: Cells) -> Table:
    """Return the accuracies of the cells; random batches have a column only where they lose accuracy."""
    columns = {name: title for name, title in COLUMNS.items() if name != "reshuffled" or _apart(cells.training)}
    return Table(
        ("accuracy in % on", *columns.values(), "examples"),
        tuple(
            (
                f"{split} data",
                *(round(100 * row[c].accuracy, 1) if c in row else "not measured" for c in columns),
                float(row["running"].examples),
            )
            for split, row in cells.rows()
        ),
    )


def _apart(row: Mapping[Statistics, Cell]) -> bool:
    """Return whether random batches lose accuracy against batches as they were."""
    return "reshuffled" in row and row["batch"].gain_over(row["reshuffled"])[1] < INNOCENT


def blind(rule_id: str, signals: Signals) -> Iterator[Skipped]:
    """Yield why a rule that looks at how layers are connected cannot look, at some of them or at any."""
    if signals.structure is None:
        yield Skipped(rule_id, "how the layers are connected is not known")
    elif signals.structure.hidden is not None:
        yield Skipped(rule_id, signals.structure.hidden)


def fitting(helps: Mapping[str, tuple[str, ...]], signals: Signals) -> tuple[str, ...]:
    """Return the helps by adapter that fit the framework at hand; all of them where it is not known."""
    return tuple(help_ for adapter, some in helps.items() if signals.adapter in {adapter, None} for help_ in some)


def restored_cost(signals: Signals, cost: float, alpha: float) -> str | None:
    """Return what running statistics cost in cells of the last evaluation and a re-estimate restores, None for nothing.

    ``cost`` is the share of the examples above which a loss counts, ``alpha`` the p-value of the paired test below
    which it does.
    """
    cells = current_cells(signals)
    for split, row in () if cells is None else reversed(list(cells.rows())):
        if "population" not in row:
            continue
        gained, p = row["population"].gain_over(row["running"])
        if gained > cost and p < alpha and restores(row["population"], row["batch"], row["running"]):
            return (
                f"the same {row['running'].examples:,} {split} examples give {row['running'].accuracy:.1%} with the "
                f"running statistics and {row['population'].accuracy:.1%} with re-estimated ones"
            )
    return None


def restless(signals: Signals) -> bool:
    """Return whether steps are so large that statistics of a few batches ago are those of another network."""
    layers = signals.looks[-1].layers if signals.looks else ()
    return any(layer.update is not None and layer.update > RESTLESS for layer in layers)


def current_cells(signals: Signals) -> Cells | None:
    """Return the cells if they are no older than the last evaluation."""
    cells, evaluations = signals.cells, signals.evaluations
    return None if cells is None or (evaluations and cells.step < evaluations[-1].step) else cells


def differ(signals: Signals, sites: SharedSites, alpha: float, few: float = FEW) -> bool:
    """Return whether the call sites of a layer see different data; with few elements a call that cannot be told.

    The logarithm of a variance of so few has a long tail, and a last batch may leave some calls next to none.
    """
    table = signals.table
    if table is None or not sites.differ(alpha):
        return False
    counts = zip(table.sites, table.column("count").tolist(), strict=True)
    return min((count for site, count in counts if site.layer == sites.layer), default=math.inf) >= few


def passes(signals: Signals) -> int:
    """Return how many forward passes a training step makes through the whole model; 1 where that is not to be told.

    Every layer is then called equally often, and none is known to see other data in one pass than in the next. Calls
    that the graph holds are of one pass. Chainer has no graph but that of the step itself: there, and where none is
    known, two layers must agree.
    """
    table = signals.table
    calls = Counter(site.layer for site in table.sites if site.replica == 0) if table is not None else Counter[str]()
    if len(set(calls.values())) != 1 or 1 in calls.values() or table is None:
        return 1
    alike = {shared.layer for shared in table.shared if not differ(signals, shared, SAME)}
    if alike != calls.keys():
        return 1
    times = max(calls.values())
    structure = signals.structure
    if structure is None or structure.hidden is not None or signals.adapter == "bnwatch.chainer":
        return times if len(calls) > 1 else 1
    return times if all(len(usage.places) < times for usage in structure.layers) else 1


def additional(signals: Signals) -> list[str]:
    """Return the layers that a training step calls on other data besides its one forward pass of the model.

    The cells make that one pass: what they re-estimate leaves out what the other calls see.
    """
    reached = _reached(signals)
    return [
        spec.path
        for spec, sites, apart in signals.shared()
        if apart is not None
        and 0 < reached[spec.path] < len(sites)
        and max(apart["between_shift"], apart["between_scale"]) > SHIFT
        and differ(signals, apart, SAME)
    ]


def _reached(signals: Signals) -> Counter[str]:
    """Return how often one forward pass of the model calls each layer, as far as it is known."""
    structure = signals.structure
    if structure is not None and structure.hidden is None and signals.adapter != "bnwatch.chainer":
        return Counter(usage.path for usage, _ in structure.places())
    return Counter(site.layer for site in signals.composition.sites) if signals.composition else Counter()


def within_epochs(signals: Signals) -> list[SignalTable]:
    """Return the samples of the present call sites whose step no evaluation followed: these may be odd last batches."""
    ends = {evaluation.step for evaluation in signals.evaluations}
    sites = signals.tables[-1].sites if signals.tables else ()
    alike = (table for table in signals.tables if table.sites is sites or table.sites == sites)
    return [table for table in alike if table.step not in ends]


def decay_argument(signals: Signals, value: str) -> str:
    """Return how a layer is given a decay in the framework at hand."""
    known = {"bnwatch.keras": f"momentum={value}", "bnwatch.chainer": f"decay={value}"}
    return known.get(signals.adapter or "", f"decay {value} (Keras: momentum={value})")


def named(paths: Iterable[str]) -> str:
    """Return the first few of some paths, each once, and how many more there are."""
    first = list(dict.fromkeys(paths))
    more = f" and {len(first) - NAMED} more" if len(first) > NAMED else ""
    return ", ".join(f"`{path}`" for path in first[:NAMED]) + more


def rule(
    rule_id: str,
    name: str,
    *,
    severity: Severity,
    since: str = "0.1",
    causes: tuple[str, ...] = (),
    **thresholds: Threshold,
) -> Callable[[Body], Rule]:
    """Turn a generator function into a `Rule`; the first line of its docstring is the summary.

    Its causes are those of the order of decision, and ``causes``.
    """

    def wrap(body: Body) -> Rule:
        summary = (body.__doc__ or "").strip().splitlines()[0].rstrip(".")
        explained = tuple(sorted({*causes, *CAUSES.get(rule_id, ())}, key=rank))
        return Rule(rule_id, name, severity, since, summary, explained, thresholds, body)

    return wrap
