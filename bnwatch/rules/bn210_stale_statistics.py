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
    last, cells = signals.evaluations[-1] if signals.evaluations else None, current_cells(signals)
    if last is None and cells is None:
        yield Skipped("BN210", "no evaluation was seen")
        return
    measured = None if cells is None else cells.swapped
    known = [swapped for swapped in (last and last.swapped, measured) if swapped is not None]
    if not known:
        yield Skipped("BN210", "whether the evaluated weights are those of the last training step is not known")
        return
    if not any(known):
        return
    if measured is False:  # the weights were swapped for the evaluation alone
        cells = None
    cost = None if cells is None else restored_cost(signals, limits["cost"], limits["alpha"])
    if cells is None:
        yield Skipped("BN210", "weights were swapped; what their statistics cost is not measured", needs="cells")
    moved = last is not None and last.moved
    if cost is None and moved:
        return  # both are another's, as in a checkpoint
    step = last.step if last is not None and last.swapped else signals.step
    yield Finding(
        subject="model",
        severity=None if cost else Severity.INFO,
        message=f"the weights evaluated at step {step} are not those of the last training step, and the running "
        f"statistics {'were swapped with them' if moved else 'are still those of the other weights'}"
        + (", which costs accuracy" if cost else ""),
        evidence={"step": Quantity(step, "training steps before the evaluation")},
        table=None if cells is None else cells_table(cells),
        notes=(cost or ("what it costs is not measured yet" if cells is None else "so far it costs no accuracy"),),
        helps=(
            refresh(signals),
            "or average, save and restore the running statistics together with the weights",
        ),
    )
