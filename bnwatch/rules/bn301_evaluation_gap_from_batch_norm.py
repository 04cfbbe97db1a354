"""BN301: the running statistics cost accuracy, measured."""

from __future__ import annotations

from typing import TYPE_CHECKING

from bnwatch.diagnosis import Quantity, Severity, Skipped, Table
from bnwatch.rules._base import Finding, Limits, Threshold, rule
from bnwatch.signals import gap

if TYPE_CHECKING:
    from collections.abc import Iterator

    from bnwatch.evidence import Cell, Cells, Split, Statistics
    from bnwatch.signals import Signals

COLUMNS: tuple[Statistics, ...] = ("batch", "running", "population")


@rule(
    "BN301",
    "evaluation-gap-from-batch-norm",
    severity=Severity.WARNING,
    causes=("BN101", "BN201", "BN203", "BN401"),
    cost=Threshold(0.01, "convention", "share of the examples: a smaller loss is not worth a warning"),
    alpha=Threshold(1e-3, "convention", "false alarms per experiment (paired test on the same examples)"),
)
def evaluation_gap_from_batch_norm(signals: Signals, limits: Limits) -> Iterator[Finding | Skipped]:
    """Running statistics cost accuracy against batch statistics on the same examples."""
    cells = signals.cells
    if cells is None or (signals.evaluations and cells.step < signals.evaluations[-1].step):
        suspicion = _suspicion(signals, limits["alpha"])
        reason = suspicion or "no experiment was run: nothing called for one"
        yield Skipped("BN301", reason, needs="cells" if suspicion else None)
    if cells is None:
        return
    rows = dict(cells.rows())
    costs = {split: row["batch"].gain_over(row["running"]) for split, row in rows.items()}
    if not all(gained > limits["cost"] and p < limits["alpha"] for gained, p in costs.values()):
        return
    split: Split = "evaluation" if "evaluation" in rows else "training"
    row, (cost, p) = rows[split], costs[split]
    restored = "population" in row and _restores(row["population"], row["batch"], row["running"])
    yield Finding(
        subject="model",
        message=f"running statistics cost {100 * cost:.1f} points of {split} accuracy: "
        f"{row['running'].accuracy:.1%} with them, {row['batch'].accuracy:.1%} with batch statistics, "
        f"on the same {row['batch'].examples:,} examples",
        evidence={
            "cost": Quantity(cost, f"of {split} accuracy"),
            "p_value": Quantity(p, "that chance explains it (paired, McNemar)"),
            "accuracy": Quantity(
                row["running"].accuracy, f"on {split} data with running statistics", row["running"].interval
            ),
        },
        table=_table(cells),
        notes=_notes(cells, restored=restored),
        helps=(
            ("re-estimate the running statistics over training data with frozen weights before evaluating",)
            if restored
            else (
                (
                    "look for two kinds of data behind one set of running statistics: a layer called at several "
                    "places, batches that alternate, batches of one class"
                ),
            )
        ),
    )


def _suspicion(signals: Signals, alpha: float) -> str | None:
    """Return why the experiment is worth its time, None where nothing calls for it."""
    if not signals.evaluations:
        return None
    found = gap(signals.evaluations[-1])
    if found is not None and found[0] > 0.0 and found[1] < alpha:
        return f"training accuracy is {100 * found[0]:.1f} points above evaluation accuracy; why is not measured yet"
    if any(apart is not None and apart.differ(alpha) for _, _, apart in signals.shared()):
        return "a layer is shared by call sites that differ; what explains it is not measured yet"
    return None


def _restores(population: Cell, batch: Cell, running: Cell) -> bool:
    """Return whether re-estimated statistics win back more than half of what running statistics cost."""
    return population.accuracy - running.accuracy > 0.5 * (batch.accuracy - running.accuracy)


def _notes(cells: Cells, *, restored: bool) -> tuple[str, ...]:
    where = "re-estimated statistics restore it" if restored else "re-estimated statistics do not restore it"
    meaning = (
        "so the running statistics are out of date or unsettled, and a re-estimate mends them"
        if restored
        else "so one mean and variance a channel cannot describe what this layer sees: it is a mixture"
    )
    notes = ["the weights and the examples are the same, so nothing but the statistics makes the difference"]
    if cells.training:
        notes.append(f"{where}, {meaning}")
    if cells.missing:
        notes.append(f"measured on part of the data only: {cells.missing}")
    return tuple(notes)


def _table(cells: Cells) -> Table:
    return Table(
        ("accuracy in % on", "batch statistics", "running statistics", "re-estimated", "examples"),
        tuple(
            (
                f"{split} data",
                *(round(100 * row[c].accuracy, 1) if c in row else "not measured" for c in COLUMNS),
                float(row["running"].examples),
            )
            for split, row in cells.rows()
        ),
    )
