"""BN305: evaluation is worse than training, and batch normalization is not why."""

from __future__ import annotations

from typing import TYPE_CHECKING

from bnwatch import moments
from bnwatch.diagnosis import Quantity, Severity, Skipped
from bnwatch.rules._base import (
    Finding,
    Limits,
    Threshold,
    cells_table,
    first_difference,
    rule,
    same_accuracy,
    unexplained_gap,
    unmeasured,
)

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from bnwatch.evidence import Cell, Cells, SiteShift, Statistics
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
    same=Threshold(0.01, "convention", "false alarms per experiment, all call sites together, that inputs differ"),
    apart=Threshold(0.1, "convention", "standard deviations of the means, or log ratio of spreads, at the first layer"),
    alpha=Threshold(1e-3, "convention", "false alarms per experiment (z test of two samples, binomial test)"),
)
def gap_not_from_batch_norm(signals: Signals, limits: Limits) -> Iterator[Finding | Skipped]:
    """Evaluation is worse than training, and the statistics of batch normalization are not why."""
    cells = signals.cells
    last = signals.evaluations[-1] if signals.evaluations else None
    if cells is None or (last is not None and cells.step < last.step):
        suspicion = unexplained_gap(signals, limits["alpha"])
        reason = suspicion or unmeasured(signals)
        yield Skipped("BN305", reason, needs="cells" if suspicion else None)
    if cells is None:
        return
    if not (cells.training and cells.evaluation):
        yield Skipped("BN305", cells.missing or "training or evaluation examples are missing")
        return
    training, evaluation = cells.training["running"], cells.evaluation["running"]
    gap, p = training.accuracy - evaluation.accuracy, same_accuracy(training, evaluation)
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
            *_looks_like(signals, cells, limits),
        ),
    )


def _explained(row: Mapping[Statistics, Cell]) -> float:
    """Return what the best other statistics win over running ones."""
    return max((cell.accuracy - row["running"].accuracy for cell in row.values()), default=0.0)


def _looks_like(signals: Signals, cells: Cells, limits: Limits) -> Iterator[str]:
    """Yield what the numbers look like, the most particular first."""
    training, evaluation = cells.training["running"], cells.evaluation["running"]
    unseen, other = cells.unseen, _other_inputs(signals, cells, limits)
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
    if other is not None:
        yield (
            f"evaluation inputs differ from training inputs: what enters `{other.subject}`, by {other.mean_shift:.3g} "
            f"standard deviations in the mean and a factor of {other.std_ratio:.3g} in the spread; where training does "
            "not augment its inputs, likely by another preprocessing or domain"
        )
        yield "what decides: the accuracy of training examples that went through the evaluation's preprocessing"
        return
    if evaluation.accuracy <= chance:
        worse = "worse than guessing" if below < limits["alpha"] else "what guessing gives"
        yield (
            f"evaluation accuracy is {worse}: likely the labels of one of the two do not belong to their inputs "
            "(another order, another encoding of the classes); a network learns those of the training by heart"
        )
    elif training.accuracy > LEARNED:
        yield f"it looks like overfitting: {training.accuracy:.1%} of the training examples are right"
    else:
        yield "the two sets differ otherwise: likely harder or other examples, or labels of another quality"

    yield (
        "what decides: a part of the training data held out of the training. Where its accuracy is as low, it is "
        "overfitting; where not, the evaluation data or their labels are others"
    )


def _other_inputs(signals: Signals, cells: Cells, limits: Limits) -> SiteShift | None:
    """Return how inputs differ at the first layer, None where they do not or were not measured.

    Behind it the training examples that were learned by heart differ from any others.
    """
    entering = signals.entering
    if entering is None or entering.step != cells.step:
        return None
    return entering.sites[0] if first_difference(entering, limits["same"], limits["apart"]) == 0 else None
