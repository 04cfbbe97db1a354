"""BN207: training batches are no random parts of the training data."""

from __future__ import annotations

from typing import TYPE_CHECKING

from bnwatch.diagnosis import Severity
from bnwatch.rules import _batches
from bnwatch.rules._base import Finding, Limits, Threshold, cells_table, rule

if TYPE_CHECKING:
    from collections.abc import Iterator

    from bnwatch.diagnosis import Skipped
    from bnwatch.signals import Signals


@rule(
    "BN207",
    "unrepresentative-batches",
    severity=Severity.WARNING,
    dispersion=Threshold(_batches.DISPERSION, "convention", "spread of batch means, in that of random batches"),
    cost=Threshold(0.01, "convention", "share of the examples: a smaller loss is not worth a warning"),
    pure=Threshold(0.9, "convention", "share of a batch that is of one class, where random batches are mixed"),
    alpha=Threshold(_batches.ALPHA, "convention", "false alarms per experiment, of the F test and of the paired test"),
)
def unrepresentative_batches(signals: Signals, limits: Limits) -> Iterator[Finding | Skipped]:
    """Training batches are no random parts of the training data: sorted, of one class, of one sequence."""
    found = _batches.dispersed(signals, limits)
    if found is None or found.two:
        return
    cells, cost = signals.cells, _batches.cost_of(signals.cells, limits)
    composition, site = found.composition, found.site
    pure = (composition.purity or 0.0) > limits["pure"] and any(_batches.labels(composition))
    kind = "of one class each" if pure else "no random parts of the data"
    yield Finding(
        subject="model",
        severity=None if pure or cost is not None else Severity.INFO,
        message=f"training batches are {kind}: at `{site.subject}` their means spread {site.dispersion:.1f} times as "
        "much as those of random batches" + ("" if cost is None else cost.clause),
        evidence=_batches.evidence(found, cost),
        table=_batches.table(found),
        further=() if cells is None else (cells_table(cells),),
        notes=(
            (
                "each batch is normalized by its own mean, which tells what the batch has in common and not how its "
                "examples differ: the network learns to rely on it, and evaluation has no such batches"
            ),
            *_batches.labels(composition),
            _batches.harmless(cells) if cost is None else cost.note,
        ),
        helps=(
            "shuffle the examples before they are put into batches (a buffer as large as the data set, or shuffled "
            "files), so that each batch is a random part of the data",
            "where batches must stay together, use a normalization that does not depend on them: GroupNormalization, "
            "LayerNormalization",
        ),
    )
