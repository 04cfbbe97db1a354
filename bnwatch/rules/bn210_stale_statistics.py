"""BN210: the weights are others than those the running statistics were made with."""

from __future__ import annotations

from typing import TYPE_CHECKING

from bnwatch import moments
from bnwatch.diagnosis import Quantity, Severity, Skipped
from bnwatch.rules._base import (
    Finding,
    Limits,
    Threshold,
    cells_table,
    current_cells,
    refresh,
    restored_cost,
    rule,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

    from bnwatch.evidence import Cells
    from bnwatch.records import EvaluationRecord
    from bnwatch.signals import Signals

NOT_YET = "what it costs is not measured yet"
UNMEASURED = "what it costs is not measured: the weights of the training were back when the experiment ran"


@rule(
    "BN210",
    "stale-statistics",
    severity=Severity.WARNING,
    cost=Threshold(0.005, "convention", "share of the examples: a smaller loss is not worth a warning"),
    alpha=Threshold(0.01, "convention", "false alarms per experiment; that weights were swapped is certain"),
)
def stale_statistics(signals: Signals, limits: Limits) -> Iterator[Finding | Skipped]:
    """Weights were swapped after training made the running statistics: averages of weights, pruned or loaded ones."""
    last = signals.evaluations[-1] if signals.evaluations else None
    if last is None:
        yield Skipped("BN210", "no evaluation was seen")
        return
    cells = current_cells(signals)
    # swapped where training ends, behind the last evaluation: nothing is known of the statistics but what they cost
    ended = cells is not None and bool(cells.swapped) and not last.swapped
    if last.swapped is None and not ended:
        yield Skipped("BN210", "whether the evaluated weights are those of the last training step is not known")
        return
    if not (last.swapped or ended):
        return
    # swapped for the evaluation alone, and taken out again before anything was measured
    back = cells if cells is not None and last.swapped and cells.swapped is False else None
    cost = restored_cost(signals, limits["cost"], limits["alpha"]) if back is None else _lower(last, back)
    if cells is None:
        yield Skipped("BN210", "weights were swapped; what their statistics cost is not measured", needs="cells")
    if cost is None and (last.moved or ended):
        return  # both are another's, as in a checkpoint
    where = "that training ended with" if ended else f"evaluated at step {last.step}"
    whose = "are still those of the other weights"
    if last.moved or ended:
        whose = "do not fit them" if ended else "were swapped with them"
    yield Finding(
        subject="model",
        severity=None if cost else Severity.INFO,
        message=f"the weights {where} are not those of the last training step, and the running statistics {whose}"
        + ("" if not cost else ", which costs accuracy" if back is None else ", and accuracy is lower with them"),
        evidence={"step": Quantity(last.step, "training steps before the evaluation")},
        table=None if cells is None or back is not None else cells_table(cells),
        notes=(cost or (UNMEASURED if back else "so far it costs no accuracy" if cells else NOT_YET),),
        helps=(
            refresh(signals),
            "or average, save and restore the running statistics together with the weights",
        ),
    )


def _lower(last: EvaluationRecord, cells: Cells) -> str | None:
    """Return that what was evaluated is worse than the weights of the training, None where that is not to be told."""
    cell = cells.evaluation.get("running")
    if cell is None or last.accuracy is None or not last.examples:
        return None
    if moments.binomial_interval(last.accuracy, last.examples)[1] >= cell.interval[0]:
        return None
    return (
        f"the evaluation gave {last.accuracy:.1%} with them, and the weights of the training give {cell.accuracy:.1%} "
        f"with the same running statistics: likely these do not fit the others; what decides: re-estimate them while "
        "the others are in the model, and evaluate again"
    )
