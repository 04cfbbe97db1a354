"""BN214: padded positions are counted."""

from __future__ import annotations

from typing import TYPE_CHECKING

from bnwatch.diagnosis import Quantity, Severity, Skipped
from bnwatch.rules._base import Finding, Limits, Threshold, blind, cells_table, costs, measured, named, restores, rule

if TYPE_CHECKING:
    from collections.abc import Iterator

    from bnwatch.signals import Signals


@rule(
    "BN214",
    "padding-in-statistics",
    severity=Severity.INFO,
    cost=Threshold(0.01, "convention", "share of the examples: a smaller loss is not worth a warning"),
    alpha=Threshold(1e-3, "convention", "false alarms per experiment (paired test on the same examples)"),
)
def padding_in_statistics(signals: Signals, limits: Limits) -> Iterator[Finding | Skipped]:
    """Masked positions go into the statistics of batch normalization."""
    if signals.adapter == "bnwatch.chainer":
        yield Skipped("BN214", "Chainer has no masks: which positions are padding is not known")
        return
    yield from blind("BN214", signals)
    padded = {
        layer.path: place.mask
        for layer, place in (signals.structure.places() if signals.structure else ())
        if place.mask is not None and layer.trainable
    }
    if not padded:
        return
    cells = signals.cells
    rows = list(cells.rows()) if cells is not None else []
    lost = [(split, row) for split, row in rows if costs(row, limits["cost"], limits["alpha"])]
    mended = any("population" in row and restores(row["population"], row["batch"], row["running"]) for _, row in lost)
    cost = lost[-1] if lost and not mended else None
    yield Finding(
        severity=None if cost is None else Severity.WARNING,
        table=None if cost is None or cells is None else cells_table(cells),
        subject=next(iter(padded)) if len(padded) == 1 else "model",
        message=f"positions that {named(padded.values())} marks as padding are counted in the statistics of "
        f"{named(padded)}",
        evidence={"layers": Quantity(len(padded), "of batch normalization behind a mask that they do not get")},
        notes=(
            "mean and variance then likely depend on how much of a batch is padding; on small networks it was "
            "harmless as long as training and evaluation pad alike",
            "what decides: evaluation accuracy with the same examples padded to another length",
            *(() if cost is None else (measured(*cost, "with the statistics of their batches", by="batch"),)),
        ),
        helps=(
            "let the mask reach the layer: Keras 3 counts unmasked positions alone where the layer before hands it on",
            "or sort examples by length, so that batches hold little padding",
        ),
    )
