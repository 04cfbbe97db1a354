"""BN208: training batches come from two populations in turn."""

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
    "BN208",
    "alternating-batches",
    severity=Severity.WARNING,
    dispersion=Threshold(_batches.DISPERSION, "convention", "spread of batch means, in that of random batches"),
    pure=Threshold(0.9, "convention", "share of a batch that is of one class, where random batches are mixed"),
    cost=Threshold(0.01, "convention", "share of the examples: a smaller loss is not worth a warning"),
    alpha=Threshold(_batches.ALPHA, "convention", "false alarms per experiment, of the F test and of the paired test"),
)
def alternating_batches(signals: Signals, limits: Limits) -> Iterator[Finding | Skipped]:
    """Training batches come from two populations in turn, and the running statistics describe neither."""
    found = _batches.dispersed(signals, limits)
    if found is None or not found.two:
        return
    cells, cost = signals.cells, _batches.cost_of(signals.cells, limits)
    composition, site = found.composition, found.site
    guesses = _batches.guesses(signals, limits["pure"])
    smaller = round(site.smaller * composition.batches)
    yield Finding(
        subject="model",
        severity=None if guesses or cost is not None else Severity.INFO,
        message=f"training batches come from two populations: {found.split_share:.0%} of the spread between batches at "
        f"`{site.subject}` is that of two groups, of {composition.batches - smaller} and {smaller} batches"
        + ("" if cost is None else cost.clause),
        evidence=_batches.evidence(found, cost),
        table=_batches.table(found),
        further=() if cells is None else (cells_table(cells),),
        notes=(
            (
                "training normalizes each batch with the statistics of its own population; evaluation normalizes both "
                "with one mixture, which describes neither"
            ),
            f"the means of batches spread {site.dispersion:.1f} times as much as those of the same examples in random "
            "batches",
            *_batches.labels(composition),
            *(
                (
                    "normalization takes out of a batch what its examples have in common, here what tells the classes "
                    "apart: on these very batches the network does no better than guessing",
                )
                if guesses
                else ()
            ),
            _batches.harmless(cells) if cost is None else cost.note,
        ),
        helps=(
            "put examples of both populations into every batch (real and fake together, both domains together)",
            "or give each population a BatchNormalization of its own, chosen by the population also in evaluation",
        ),
    )
