"""BN304: evaluation inputs are distributed otherwise than training inputs."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from bnwatch.diagnosis import Quantity, Severity, Skipped, Table
from bnwatch.rules._base import (
    Finding,
    Limits,
    Threshold,
    cells_table,
    first_difference,
    restores,
    rule,
    same_accuracy,
    unexplained_gap,
    unmeasured,
)

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from bnwatch.evidence import Cell, Cells, Entering, SiteShift, Statistics
    from bnwatch.signals import Signals

    Row = Mapping[Statistics, Cell]

LONGEST = 6
"""Rows of the table: what lies farther behind the first difference follows from it."""

SCALES = {255.0: "0 to 255 and 0 to 1", 127.5: "0 to 255 and -1 to 1", 16.0: "0 to 16 and 0 to 1"}
"""Ratios of spreads that two common ranges of input values give."""

NEAR = 0.1
"""Relative distance up to which a ratio counts as one of these, and spreads as alike."""

FAR = 1.0
"""Standard deviations between the means that, with spreads alike, look like a mean subtracted on one side only."""


@rule(
    "BN304",
    "evaluation-input-shift",
    severity=Severity.WARNING,
    cost=Threshold(0.01, "convention", "share of the examples: a smaller loss is not worth a warning"),
    alpha=Threshold(1e-3, "convention", "false alarms per experiment (paired test on the same examples)"),
    same=Threshold(0.01, "convention", "false alarms per experiment, all call sites together, that inputs differ"),
    apart=Threshold(
        0.1, "convention", "standard deviations of the means, or log ratio of spreads: less explains little"
    ),
    strong=Threshold(
        3.0, "convention", "standard deviations of the means, or factor of spreads: more than augmentation does"
    ),
    gap=Threshold(0.05, "convention", "training minus evaluation accuracy that a strong difference is held to explain"),
)
def evaluation_input_shift(signals: Signals, limits: Limits) -> Iterator[Finding | Skipped]:
    """Evaluation inputs are distributed otherwise than training inputs."""
    last = signals.evaluations[-1] if signals.evaluations else None
    if last is not None and last.batch_statistics:
        yield Skipped("BN304", "the evaluation did not use running statistics, which is BN103")
        return
    cells = signals.cells
    costs = {} if cells is None else {split: _costs(row, limits) for split, row in cells.rows()}
    found = cells is not None and costs == {"training": False, "evaluation": True} and not _mended(cells.evaluation)
    if cells is None or (last is not None and cells.step < last.step):
        again = "what was found is to be looked at again" if found else None
        suspicion = again or unexplained_gap(signals, limits["alpha"])
        reason = suspicion or unmeasured(signals)
        yield Skipped("BN304", reason, needs="cells" if suspicion else None)
    if cells is None:
        return
    if not (cells.training and cells.evaluation):
        yield Skipped("BN304", cells.missing or "training or evaluation examples are missing")
        return
    entering = signals.entering
    if entering is None or entering.step != cells.step:
        if found:
            yield Skipped("BN304", "running statistics cost evaluation accuracy alone; what enters layers is not known")
        return
    place = first_difference(entering, limits["same"], limits["apart"])
    strong = place == 0 and max(entering.sites[0].mean_shift, _factor(entering.sites[0])) > limits["strong"]
    if place is not None and (found or (strong and not costs["evaluation"])):
        yield _finding(cells, entering, place, costs=found, lost=not found and _lost(cells, limits))
    elif place is None and found and entering.untold is not None:
        yield Skipped("BN304", entering.untold)


def _costs(row: Row, limits: Limits) -> bool:
    gained, p = row["batch"].gain_over(row["running"])
    return gained > limits["cost"] and p < limits["alpha"]


def _mended(row: Row) -> bool:
    """Return whether a re-estimate on training data restores accuracy: then the statistics are old, not the inputs."""
    return "population" in row and restores(row["population"], row["batch"], row["running"])


def _lost(cells: Cells, limits: Limits) -> bool:
    """Return whether evaluation examples come out worse than training examples beyond chance, for whatever reason."""
    training, evaluation = cells.training["running"], cells.evaluation["running"]
    gap = training.accuracy - evaluation.accuracy
    return gap > limits["gap"] and same_accuracy(training, evaluation) < limits["alpha"]


def _factor(site: SiteShift) -> float:
    """Return how many times one spread is the other."""
    return max(site.std_ratio, 1.0 / site.std_ratio) if site.std_ratio > 0.0 else math.inf


def _finding(cells: Cells, entering: Entering, place: int, *, costs: bool, lost: bool) -> Finding:
    site = entering.sites[place]
    batch, running = cells.evaluation["batch"], cells.evaluation["running"]
    trained = cells.training["running"].accuracy
    cost, p = batch.gain_over(running)
    return Finding(
        subject="model",
        message=f"evaluation inputs differ from training inputs from `{site.subject}` on, by {site.mean_shift:.3g} "
        f"standard deviations in the mean and a factor of {site.std_ratio:.3g} in the spread"
        + (f": running statistics cost {100 * cost:.1f} points of evaluation accuracy" if costs else "")
        + (
            f"; likely that is why {100 * (trained - running.accuracy):.1f} points of accuracy are lost" if lost else ""
        ),
        evidence={
            "cost": Quantity(cost, "of evaluation accuracy"),
            "p_value": Quantity(p, "that chance explains the cost (paired, McNemar)"),
            "shift": Quantity(site.mean_shift, "training standard deviations between the means there"),
            "ratio": Quantity(site.std_ratio, "spread in evaluation / in training there"),
            "same_inputs": Quantity(site.p_value or 0.0, "that both are one population (F test over batches)"),
        },
        table=_table(entering, place),
        further=(cells_table(cells),),
        notes=(
            *_outcome(cells, costs=costs, lost=lost),
            *_likely(site),
        ),
        helps=(
            (
                "compare the preprocessing of both pipelines: mean, standard deviation, smallest and largest value of "
                "one training and one evaluation batch, as the model gets them"
            ),
            "scale and normalize in one place for both, best inside the model",
            (
                "if evaluation data are of another domain on purpose, re-estimate the running statistics on "
                "unlabelled data of that domain"
            ),
        ),
        severity=None if costs or lost else Severity.INFO,
    )


def _outcome(cells: Cells, *, costs: bool, lost: bool) -> Iterator[str]:
    """Yield what becomes of the accuracy."""
    batch, running, trained = cells.evaluation["batch"], cells.evaluation["running"], cells.training["running"]
    if costs:
        yield (
            f"running statistics describe training inputs: these reach {trained.accuracy:.1%} with them. Evaluation "
            f"inputs reach {running.accuracy:.1%}, and {batch.accuracy:.1%} with the statistics of their own batches, "
            "so the weights fit them and the running statistics do not"
        )
    elif lost:
        yield (
            f"training inputs reach {trained.accuracy:.1%}. Evaluation inputs reach {running.accuracy:.1%} with "
            f"running statistics and {batch.accuracy:.1%} with those of their own batches: no statistics mend it, as "
            "the weights themselves do not fit them"
        )
        yield "what decides: the accuracy of training examples that went through the evaluation's preprocessing"
    else:
        yield (
            f"it costs no accuracy: evaluation inputs reach {running.accuracy:.1%} with running statistics, "
            f"{batch.accuracy:.1%} with the statistics of their own batches"
        )


def _likely(site: SiteShift) -> tuple[str, ...]:
    """Return what the numbers look like, where they look like something known."""
    factor = _factor(site)
    for scale, ranges in SCALES.items():
        if abs(factor / scale - 1.0) < NEAR:
            larger = "evaluation" if site.std_ratio > 1.0 else "training"
            return (f"a factor of {factor:.3g} is likely that of values {ranges}: {larger} inputs are not scaled down",)
    if factor < 1.0 + NEAR and site.mean_shift > FAR:
        return ("the spreads are alike and the means are not: likely only one pipeline subtracts a mean",)
    return ()


def _table(entering: Entering, place: int) -> Table:
    start = max(0, min(place, len(entering.sites) - LONGEST))
    return Table(
        ("what enters", "means apart, in training std", "spread, evaluation / training", "p of one population"),
        tuple(
            (
                site.subject,
                round(site.mean_shift, 3),
                f"{site.std_ratio:.3g}",
                "not known" if site.p_value is None else f"{site.p_value:.1g}",
            )
            for site in entering.sites[start : start + LONGEST]
        ),
    )
