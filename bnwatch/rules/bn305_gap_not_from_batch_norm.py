"""BN305: evaluation is worse than training, and batch normalization is not why."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from bnwatch import moments
from bnwatch.diagnosis import Quantity, Severity, Skipped
from bnwatch.rules._base import Finding, Limits, Threshold, cells_table, rule, unexplained_gap

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from bnwatch.evidence import Cell, Cells, Statistics
    from bnwatch.signals import Signals

LEARNED = 0.95
"""Training accuracy, in running statistics, from which the training examples are said to be known by heart."""


@rule(
    "BN305",
    "gap-not-from-batch-norm",
    severity=Severity.INFO,
    gap=Threshold(0.05, "convention", "training minus evaluation accuracy, both with running statistics"),
    part=Threshold(0.2, "convention", "share of that gap that other statistics may explain for them to be innocent"),
    unseen=Threshold(0.2, "convention", "share of the evaluation labels whose class is not among the training labels"),
    alpha=Threshold(1e-3, "convention", "false alarms per experiment (z test of two samples, binomial test)"),
)
def gap_not_from_batch_norm(signals: Signals, limits: Limits) -> Iterator[Finding | Skipped]:
    """Evaluation is worse than training, and the statistics of batch normalization are not why."""
    cells = signals.cells
    last = signals.evaluations[-1] if signals.evaluations else None
    if cells is None or (last is not None and cells.step < last.step):
        suspicion = unexplained_gap(signals, limits["alpha"])
        reason = suspicion or "no experiment was run: nothing called for one"
        yield Skipped("BN305", reason, needs="cells" if suspicion else None)
    if cells is None:
        return
    if not (cells.training and cells.evaluation):
        yield Skipped("BN305", cells.missing or "training or evaluation examples are missing")
        return
    training, evaluation = cells.training["running"], cells.evaluation["running"]
    gap, p = training.accuracy - evaluation.accuracy, _same(training, evaluation)
    if gap <= limits["gap"] or p >= limits["alpha"]:
        return
    explained = max(_explained(row) for _, row in cells.rows())
    if explained > limits["part"] * gap:
        return
    yield Finding(
        subject="model",
        message=f"evaluation accuracy is {100 * gap:.1f} points below training accuracy, and batch normalization is "
        f"not why: {evaluation.accuracy:.1%} with running and {cells.evaluation['batch'].accuracy:.1%} with batch "
        "statistics",
        evidence={
            "gap": Quantity(gap, "training minus evaluation accuracy, with running statistics"),
            "p_value": Quantity(p, "that both are one accuracy (z test of two samples)"),
            "explained": Quantity(explained, "of accuracy that other statistics win back at most, on either split"),
            "accuracy": Quantity(evaluation.accuracy, "on evaluation data", evaluation.interval),
        },
        table=cells_table(cells),
        notes=(
            f"the same {evaluation.examples:,} evaluation examples come out as wrong with batch statistics, and the "
            f"same {training.examples:,} training examples as right: no choice of statistics closes the gap",
            *_looks_like(cells, training, evaluation, limits),
        ),
    )


def _same(one: Cell, two: Cell) -> float:
    """Return the one-sided p-value that two samples have the same accuracy."""
    pooled = (one.accuracy * one.examples + two.accuracy * two.examples) / (one.examples + two.examples)
    error = math.sqrt(pooled * (1.0 - pooled) * (1.0 / one.examples + 1.0 / two.examples))
    return 1.0 if error == 0.0 else 0.5 * math.erfc((one.accuracy - two.accuracy) / error / math.sqrt(2.0))


def _explained(row: Mapping[Statistics, Cell]) -> float:
    """Return what the best other statistics win over running ones."""
    return max((cell.accuracy - row["running"].accuracy for cell in row.values()), default=0.0)


def _looks_like(cells: Cells, training: Cell, evaluation: Cell, limits: Limits) -> Iterator[str]:
    """Yield what the numbers look like, the most particular first."""
    unseen = cells.unseen
    if unseen is not None and unseen > limits["unseen"]:
        yield (
            f"{unseen:.0%} of the evaluation labels are of classes that are not among the {training.examples:,} "
            "training labels measured: likely data that are sorted by class and were split without a shuffle"
        )
        return
    chance = max(evaluation.majority, 1.0 / cells.classes)
    below = moments.binomial_survival(
        round((1.0 - evaluation.accuracy) * evaluation.examples), evaluation.examples, 1.0 - 1.0 / cells.classes
    )
    if evaluation.accuracy <= chance and training.accuracy > LEARNED:
        worse = "worse than guessing" if below < limits["alpha"] else "what guessing gives"
        yield (
            f"evaluation accuracy is {worse}: likely the evaluation labels do not belong to their inputs (another "
            "order, another encoding of the classes)"
        )
    elif training.accuracy > LEARNED:
        yield f"it looks like overfitting: {training.accuracy:.1%} of the training examples are right"
    else:
        yield "the two sets differ otherwise: likely harder or other examples, or labels of another quality"
