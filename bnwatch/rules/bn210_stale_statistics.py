"""BN210: the weights are others than those the running statistics were made with."""

from __future__ import annotations

from typing import TYPE_CHECKING

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

    from bnwatch.signals import Signals


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
    cost = restored_cost(signals, limits["cost"], limits["alpha"])
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
        + (", which costs accuracy" if cost else ""),
        evidence={"step": Quantity(last.step, "training steps before the evaluation")},
        table=None if cells is None else cells_table(cells),
        notes=(cost or ("what it costs is not measured yet" if cells is None else "so far it costs no accuracy"),),
        helps=(
            refresh(signals),
            "or average, save and restore the running statistics together with the weights",
        ),
    )
