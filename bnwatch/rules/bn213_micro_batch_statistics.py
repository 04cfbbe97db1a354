"""BN213: statistics of the parts of a batch, one after the other."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from bnwatch.diagnosis import Quantity, Severity, Skipped
from bnwatch.rules._base import FEW, Finding, Limits, Threshold, passes, rule

if TYPE_CHECKING:
    from collections.abc import Iterator

    from bnwatch.signals import Signals


@rule(
    "BN213",
    "micro-batch-statistics",
    severity=Severity.INFO,
    samples=Threshold(3, "derived", "effective examples a batch: what six independent ones give, n of them n - 3"),
    steps=Threshold(4, "convention", "sampled steps from which effective examples are estimated"),
)
def micro_batch_statistics(signals: Signals, limits: Limits) -> Iterator[Finding | Skipped]:
    """Gradients are accumulated over several batches, each of which is normalized by its own statistics."""
    table = signals.table
    if signals.structure is None and table is None:
        yield Skipped("BN213", "neither the training plan nor a training step is known")
        return
    accumulated = signals.structure.accumulated if signals.structure is not None else 1
    parts = accumulated if accumulated > 1 else passes(signals)
    if parts < 2:  # noqa: PLR2004 - of one there is nothing to say
        return
    columns = (
        (table.column(name).tolist() for name in ("effective_samples", "count")) if table is not None else ((), ())
    )
    found = zip(table.sites if table is not None else (), *columns, strict=True)
    known = {site.layer: (samples, count) for site, samples, count in found if not math.isnan(samples)}
    fewest = min(known, key=lambda path: known[path], default=None)
    enough = len(signals.tables) >= limits["steps"]
    few = enough and fewest is not None and known[fewest][0] < limits["samples"]
    yield Finding(
        subject="model",
        severity=Severity.WARNING if few else None,
        message=f"gradients of {parts} batches are accumulated for one update, and each is normalized alone"
        if accumulated > 1
        else f"each training step calls every layer {parts} times on like data: each part is normalized alone",
        evidence={
            "parts": Quantity(parts, "batches an update of the parameters"),
            **({} if fewest is None else _samples(fewest, *known[fewest])),
        },
        notes=(
            (
                "accumulation makes the gradient that of a large batch, and not the statistics: these are as noisy as "
                "those of one part"
            )
            if accumulated > 1
            else (
                "be it for several views of the examples or to add up gradients: the statistics are as noisy as those "
                "of one part"
            ),
            "running statistics are updated with each part, so they settle sooner than steps suggest",
        ),
        helps=(
            "make the parts larger and fewer",
            "or use a normalization that does not depend on the batch: GroupNormalization, LayerNormalization",
        )
        if few
        else (),
    )


def _samples(layer: str, effective: float, elements: float) -> dict[str, Quantity]:
    """Return the samples of a batch: of a few elements, whose variance is next to none at times, how many these are."""
    if elements < FEW:
        return {"elements": Quantity(elements, f"a batch and channel at {layer}, fewest of all layers")}
    return {"effective_samples": Quantity(effective, f"a batch at {layer}, fewest of all layers")}
