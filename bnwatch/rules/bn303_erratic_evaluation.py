"""BN303: evaluation accuracy jumps, and training accuracy does not."""

from __future__ import annotations

import itertools
import math
from typing import TYPE_CHECKING

from bnwatch.diagnosis import Quantity, Severity, Skipped, Table
from bnwatch.rules import _settling
from bnwatch.rules._base import Finding, Limits, Threshold, cells_table, costs, harmless, refresh, restores, rule

if TYPE_CHECKING:
    from collections.abc import Iterator

    from bnwatch.records import EvaluationRecord
    from bnwatch.signals import Signals

RECENT = 8
"""Evaluations that are looked back on."""

SMOOTH = 0.5
"""A fall of evaluation accuracy counts where training accuracy falls by no more than this part of it."""


@rule(
    "BN303",
    "erratic-evaluation",
    severity=Severity.WARNING,
    evaluations=Threshold(4, "convention", "evaluations from which jumps are told from progress"),
    falls=Threshold(2, "convention", "of the last 8 evaluations that are worse than the one before: one may be chance"),
    jump=Threshold(0.1, "convention", "accuracy by which each of them is worse"),
    errors=Threshold(4.0, "derived", "standard errors of the difference of two accuracies: 3e-5 a fall"),
    cost=Threshold(0.01, "convention", "share of the examples: a smaller loss is not worth a warning"),
    alpha=Threshold(1e-3, "convention", "false alarms per experiment (paired test on the same examples)"),
)
def erratic_evaluation(signals: Signals, limits: Limits) -> Iterator[Finding | Skipped]:
    """Evaluation accuracy jumps far beyond its sampling error, and training accuracy does not."""
    known = [e for e in signals.evaluations if e.accuracy is not None and e.examples][-RECENT:]
    if len(_falls(known, limits)) < limits["falls"]:
        return
    known = [evaluation for evaluation in known if _settled(signals, evaluation)]
    falls = _falls(known, limits)
    if len(known) < limits["evaluations"] or len(falls) < limits["falls"]:
        return
    cells = signals.cells
    if cells is None:
        yield Skipped("BN303", "whether running statistics are behind the jumps is not measured yet", needs="cells")
    rows = dict(cells.rows()) if cells is not None else {}
    guilty = [split for split, row in rows.items() if costs(row, limits["cost"], limits["alpha"])]
    mended = bool(guilty) and all(
        "population" in rows[s] and restores(rows[s]["population"], rows[s]["batch"], rows[s]["running"])
        for s in guilty
    )
    innocent = not guilty and harmless(signals)
    last = known[-1]
    yield Finding(
        subject="model",
        severity=Severity.INFO if innocent else None,
        message=f"evaluation accuracy fell {len(falls)} times within {len(known)} evaluations, by up to "
        f"{100 * max(falls):.0f} points, and training accuracy did not",
        evidence={
            "largest_fall": Quantity(max(falls), "of evaluation accuracy, from one evaluation to the next"),
            "falls": Quantity(len(falls), f"of that kind in {len(known)} evaluations"),
            "standard_error": Quantity(_error(last, last), f"of a difference, on {last.examples:,} examples"),
        },
        table=Table(
            ("evaluation at step", "evaluation accuracy in %", "training accuracy in %"),
            tuple((float(e.step), _percent(e.accuracy), _percent(e.train_accuracy)) for e in known),
        ),
        further=() if cells is None else (cells_table(cells),),
        notes=(
            "the weights change little from one evaluation to the next, as training accuracy shows: what changes is "
            "what evaluation uses and training does not",
            *(("running statistics cost accuracy on the same examples, and a re-estimate restores it",) * mended),
            *(
                ("running statistics are innocent at the last evaluation: on the same examples they cost nothing",)
                * innocent
            ),
            *(
                (
                    "likely the running statistics; what decides: the accuracy with running against re-estimated "
                    "statistics on the same examples (BN301)",
                )
                if not guilty and not innocent
                else ()
            ),
        ),
        helps=(
            "use a smaller learning rate, or one that falls: the weights at single evaluations differ that much"
            if innocent
            else refresh(signals),
            "evaluate on more examples, or judge by the mean of several evaluations",
        ),
    )


def _settled(signals: Signals, evaluation: EvaluationRecord) -> bool:
    """Return whether an evaluation is judged: while initial values are still in the statistics, BN201 is."""
    return _settling.initial_weight(signals, evaluation.step) <= _settling.WEIGHT


def _percent(accuracy: float | None) -> float | str:
    return "not known" if accuracy is None else round(100 * accuracy, 1)


def _error(one: EvaluationRecord, two: EvaluationRecord) -> float:
    """Return the standard error of the difference of two accuracies."""
    parts = ((e.accuracy or 0.0) * (1.0 - (e.accuracy or 0.0)) / e.examples for e in (one, two))
    return math.sqrt(sum(parts))


def _falls(known: list[EvaluationRecord], limits: Limits) -> list[float]:
    return [fall for one, two in itertools.pairwise(known) if (fall := _fall(one, two, limits)) is not None]


def _fall(one: EvaluationRecord, two: EvaluationRecord, limits: Limits) -> float | None:
    """Return by how much an evaluation is worse than the one before, where that is beyond chance and training."""
    fall = (one.accuracy or 0.0) - (two.accuracy or 0.0)
    trained = None
    if one.train_accuracy is not None and two.train_accuracy is not None:
        trained = one.train_accuracy - two.train_accuracy
    if trained is None or trained > SMOOTH * fall:
        return None
    return fall if fall > limits["jump"] and fall > limits["errors"] * _error(one, two) else None
