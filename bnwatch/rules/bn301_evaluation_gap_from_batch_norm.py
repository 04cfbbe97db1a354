"""BN301: the running statistics cost accuracy, measured."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from bnwatch import moments
from bnwatch.diagnosis import Quantity, Severity, Skipped, Table
from bnwatch.rules import _batches, _settling
from bnwatch.rules._base import (
    OTHER_PASSES,
    Finding,
    Limits,
    Threshold,
    additional,
    cells_table,
    decay_argument,
    differ,
    fitting,
    named,
    refresh,
    restores,
    rule,
    unexplained_gap,
    unmeasured,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

    from bnwatch.evidence import Attribution, Cells, SiteCost, Split
    from bnwatch.signals import Signals

SHORT_MEMORY = 0.9
"""Decay that is offered in place of a longer one: running statistics then follow within some 20 batches."""

LONGEST = 5
"""Rows of the ranking: what is farther down explains little."""


@rule(
    "BN301",
    "evaluation-gap-from-batch-norm",
    severity=Severity.WARNING,
    cost=Threshold(0.01, "convention", "share of the examples: a smaller loss is not worth a warning"),
    alpha=Threshold(1e-3, "convention", "false alarms per experiment (paired test on the same examples)"),
    most=Threshold(0.5, "convention", "share of the loss that one layer must win back alone to be named"),
)
def evaluation_gap_from_batch_norm(signals: Signals, limits: Limits) -> Iterator[Finding | Skipped]:
    """Running statistics cost accuracy against batch statistics on the same examples."""
    cells = signals.cells
    rows = dict(cells.rows()) if cells is not None else {}
    costs = {split: row["batch"].gain_over(row["running"]) for split, row in rows.items()}
    found = bool(costs) and all(gained > limits["cost"] and p < limits["alpha"] for gained, p in costs.values())
    if cells is None or (signals.evaluations and cells.step < signals.evaluations[-1].step):
        suspicion = "what was found is to be looked at again" if found else _suspicion(signals, limits["alpha"])
        reason = suspicion or unmeasured(signals)
        yield Skipped("BN301", reason, needs="cells" if suspicion else None)
    if cells is None or not found:
        return
    ranking = signals.attribution if signals.attribution and signals.attribution.step == cells.step else None
    if ranking is None and not (signals.evaluations and cells.step < signals.evaluations[-1].step):
        yield Skipped("BN301", "which layer costs it is not measured yet", needs="attribution")
    guilty = None if ranking is None else ranking.explained(limits["most"])
    split: Split = "evaluation" if "evaluation" in rows else "training"
    row, (cost, p) = rows[split], costs[split]
    restored = "population" in row and restores(row["population"], row["batch"], row["running"])
    besides = additional(signals) if restored else []
    passing = False
    if _settling.initial_weight(signals, cells.step) > _settling.WEIGHT:
        passing = (restored or not cells.training) and _settling.passes(signals)
    elif _settling.lagging(signals):
        passing = restored and not besides and not signals.ended
    yield Finding(
        subject="model",
        severity=Severity.INFO if passing else None,
        message=f"running statistics cost {100 * cost:.1f} points of {split} accuracy{_where(guilty)}: "
        f"{row['running'].accuracy:.1%} with them, {row['batch'].accuracy:.1%} with batch statistics, "
        f"on the same {row['batch'].examples:,} examples",
        evidence={
            "cost": Quantity(cost, f"of {split} accuracy"),
            "p_value": Quantity(p, "that chance explains it (paired, McNemar)"),
            "accuracy": Quantity(
                row["running"].accuracy, f"on {split} data with running statistics", row["running"].interval
            ),
        },
        table=cells_table(cells),
        further=() if ranking is None else (_ranking(ranking),),
        notes=(
            *_notes(cells, besides, restored=restored),
            *(() if restored or not cells.training else _excluded(signals)),
            *(("the running statistics still held initial values, so this passes as training goes on",) * passing),
            *_attributed(ranking, guilty),
        ),
        helps=fitting(OTHER_PASSES, signals) if besides else _refresh(signals) if restored else _kinds(signals),
    )


def _kinds(signals: Signals) -> tuple[str, ...]:
    """Return where two kinds of data may be behind one set of running statistics, without what is excluded."""
    places = () if _batches.random(signals) is not None else ("batches that alternate, or of one class each",)
    if any(True for _ in signals.shared()) or not signals.tables:
        places = ("a layer called at several places", *places)
    if not places:
        return (
            "look for few examples that are far out of range, and for what enters batch normalization in training "
            "alone (dropout, noise): the layers and the batches are of one kind",
        )
    return (f"look for two kinds of data behind one set of running statistics: {', '.join(places)}",)


def _refresh(signals: Signals) -> tuple[str, ...]:
    """Return what helps where a re-estimate restores accuracy."""
    helps = [refresh(signals)]
    decay = max((spec.decay for spec in signals.specs.values()), default=0.0)
    if decay > SHORT_MEMORY:
        helps.append(
            f"or use a shorter memory: at decay {decay:g} the running statistics average over about "
            f"{moments.effective_batches(decay) if decay < 1.0 else math.inf:.0f} batches, in which the weights move "
            f"on; try {decay_argument(signals, f'{SHORT_MEMORY:g}')}"
        )
    return tuple(helps)


def _suspicion(signals: Signals, alpha: float) -> str | None:
    """Return why the experiment is worth its time, None where nothing calls for it."""
    if not signals.evaluations:
        return None
    unexplained = unexplained_gap(signals, alpha)
    if unexplained is not None:
        return unexplained
    if any(apart is not None and differ(signals, apart, alpha) for _, _, apart in signals.shared()):
        return "a layer is shared by call sites that differ; what explains it is not measured yet"
    return None


def _notes(cells: Cells, besides: list[str], *, restored: bool) -> tuple[str, ...]:
    where = "re-estimated statistics restore it" if restored else "re-estimated statistics do not restore it"
    meaning = (
        "so the running statistics are out of date or unsettled, and a re-estimate mends them"
        if restored
        else "so one mean and variance a channel cannot describe what this layer sees: it is a mixture"
    )
    notes = ["the weights and the examples are the same, so nothing but the statistics makes the difference"]
    if besides:
        meaning = (
            f"and these are of forward passes of the model alone: training steps call {named(besides)} on other data "
            "besides"
        )
    elif cells.moved and restored:
        meaning = f"and the running ones of {named(cells.moved)} moved when no step was trained"
    if cells.training:
        notes.append(f"{where}, {meaning}")
    if cells.missing:
        notes.append(f"measured on part of the data only: {cells.missing}")
    return tuple(notes)


def _excluded(signals: Signals) -> tuple[str, ...]:
    """Return that the composition of the batches is not why, where that was measured."""
    spread = _batches.random(signals)
    if spread is None or signals.composition is None:
        return ()
    return (
        f"it is not how batches are composed: the means of {signals.composition.batches} training batches spread at "
        f"most {spread:.2g} times as much as those of random batches",
    )


def _where(guilty: SiteCost | None) -> str:
    return "" if guilty is None else f", most of it at `{guilty.subject}`"


def _ranking(found: Attribution) -> Table:
    return Table(
        ("accuracy points at", "batch statistics there win back", "95% interval", "running statistics there lose"),
        tuple(
            (
                cost.subject,
                round(100 * cost.recovered.gained, 1),
                " to ".join(f"{round(100 * end, 1) + 0.0:.1f}" for end in cost.recovered.interval),
                round(100 * cost.lost.gained, 1),
            )
            for cost in found.costs[:LONGEST]
        ),
    )


def _attributed(found: Attribution | None, guilty: SiteCost | None) -> tuple[str, ...]:
    """Return what the attribution says that its table does not."""
    if found is None or not found.costs:
        return ()
    first, total = found.costs[0], 100 * found.cost.gained
    won = f"{100 * first.recovered.gained:.1f} of {total:.1f} points on {found.examples:,} examples"
    notes = [
        f"batch statistics at `{guilty.subject}` alone, running statistics everywhere else, win back {won}"
        if guilty is not None
        else f"no layer explains it alone: batch statistics at `{first.subject}` win back the most, {won}"
    ]
    if found.unmeasured:
        notes.append(
            f"{len(found.unmeasured)} of {len(found.costs) + len(found.unmeasured)} layers and call sites were not "
            f"measured for lack of time: {', '.join(f'`{name}`' for name in found.unmeasured[:LONGEST])}"
            f"{' and others' if len(found.unmeasured) > LONGEST else ''}"
        )
    return tuple(notes)
