"""BN108: dropout in front of batch normalization."""

from __future__ import annotations

from typing import TYPE_CHECKING

from bnwatch.diagnosis import Quantity, Severity, Skipped
from bnwatch.rules import _settling
from bnwatch.rules._base import Finding, Limits, Threshold, blind, cells_table, measured, named, rule

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from bnwatch.evidence import Cell, SiteShift, Split, Statistics
    from bnwatch.records import Place
    from bnwatch.signals import Signals

    Cost = tuple[Split, Mapping[Statistics, Cell]]


@rule(
    "BN108",
    "dropout-before-batch-norm",
    severity=Severity.WARNING,
    shift=Threshold(0.1, "convention", "relative excess of the standard deviation in training over that in evaluation"),
    held=Threshold(0.9, "convention", "standard deviation without dropout, of that which running statistics hold"),
    cost=Threshold(0.01, "convention", "share of the examples: a smaller loss is not worth a warning"),
    alpha=Threshold(1e-3, "convention", "false alarms per experiment (paired test on the same examples)"),
)
def dropout_before_batch_norm(signals: Signals, limits: Limits) -> Iterator[Finding | Skipped]:
    """Dropout widens what batch normalization sees in training, and evaluation has no dropout."""
    yield from blind("BN108", signals)
    found: dict[str, Place] = {}
    for layer, place in signals.structure.places() if signals.structure else ():
        if layer.trainable and _excess(place.rate) > limits["shift"]:
            found.setdefault(layer.path, place)
    if not found:
        return
    narrow = _narrow(signals, found, limits["held"])
    # where evaluation data were measured, it is their accuracy that counts
    tried = [one for one in signals.cells.rows() if "population" in one[1]][-1:] if signals.cells is not None else []
    lost = bool(tried) and _costs(tried[0][1], limits)
    # a re-estimate mends more than dropout
    cost = tried[0] if lost and narrow is not None else None
    told = cost or (tried[0] if tried and not lost else None)
    worst = max(found, key=lambda path: found[path].rate) if narrow is None else narrow.layer
    place = found[worst]
    by = f": `{signals.adapter}.recalibrate(model, batches)`" if signals.adapter else ""
    yield Finding(
        subject=worst if len(found) == 1 else "model",
        severity=Severity.INFO if cost is None else None,
        message=f"dropout comes before batch normalization at {named(found)}: running statistics are "
        + (
            f"too wide for evaluation, which costs {_points(cost)}"
            if cost is not None
            else f"those of training, which costs no {told[0]} accuracy for certain"
            if told is not None
            else "likely too wide for evaluation"
        ),
        evidence={
            "layers": Quantity(len(found), "of batch normalization behind a dropout"),
            "rate": Quantity(place.rate, f"set to zero by {place.dropout}"),
            "excess": Quantity(_excess(place.rate), "of the standard deviation in training"),
            **({} if narrow is None else {"held": Quantity(narrow.held_ratio or 0.0, _held(signals, narrow))}),
        },
        table=None if cost is None or signals.cells is None else cells_table(signals.cells),
        notes=(
            (
                "dropout of rate p multiplies the variance of inputs of mean zero by 1/(1-p) in training and is "
                "absent in evaluation, but the running variance is that of training"
                + ("; whether it matters depends on the weights in between" if cost is None else "")
            ),
            measured(*told, "with statistics re-estimated with dropout off")
            if told is not None
            else "what decides: accuracy with running statistics against statistics re-estimated with dropout off "
            "(BN301)",
        ),
        helps=(
            "put dropout behind the last batch normalization",
            f"or re-estimate the running statistics without dropout after training{by}",
        ),
    )


def _excess(rate: float) -> float:
    """Return the excess of the standard deviation behind inverted dropout, for inputs of mean zero."""
    return (1.0 - rate) ** -0.5 - 1.0 if rate < 1.0 else 0.0


def _narrow(signals: Signals, found: Mapping[str, Place], held: float) -> SiteShift | None:
    """Return the call site behind a dropout whose inputs are the narrowest without it, against those with it, if any.

    Those with it are the batches of the training, so running statistics that lag behind are not put down to dropout.
    """
    entering = signals.entering
    if entering is None or _settling.initial_weight(signals, entering.step) > _settling.WEIGHT:
        return None
    trained = {site.spec.path: site.std_ratio for site in signals.sites() if site.site.index == 0}
    ratios = {
        site: site.held_ratio / trained.get(site.layer, 1.0)
        for site in entering.sites
        if site.layer in found and site.held_ratio is not None
    }
    narrowest = min(ratios, key=lambda site: ratios[site], default=None)
    return narrowest if narrowest is not None and ratios[narrowest] < held else None


def _costs(row: Mapping[Statistics, Cell], limits: Limits) -> bool:
    """Return whether statistics re-estimated with dropout off are better than the running ones."""
    gained, p = row["population"].gain_over(row["running"])
    return gained > limits["cost"] and p < limits["alpha"]


def _points(cost: Cost) -> str:
    split, row = cost
    return f"{100 * (row['population'].accuracy - row['running'].accuracy):.1f} points of {split} accuracy"


def _held(signals: Signals, site: SiteShift) -> str:
    examples = signals.entering.training if signals.entering is not None else 0
    return f"spread of {examples:,} training examples without dropout at {site.subject}, of what is held"
