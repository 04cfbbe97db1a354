"""BN206: the odd last batch of an epoch distorts the running statistics."""

from __future__ import annotations

import math
from statistics import median
from typing import TYPE_CHECKING, NamedTuple

from bnwatch.diagnosis import Quantity, Severity, Skipped
from bnwatch.rules._base import (
    Finding,
    Limits,
    Threshold,
    cells_table,
    costs,
    decay_argument,
    harmless,
    restores,
    rule,
    within_epochs,
)
from bnwatch.signals import stacked

if TYPE_CHECKING:
    from collections.abc import Iterator

    from bnwatch.signals import Signals, SignalTable

LONGER = 0.9
"""Decay at which a batch of one example moves running statistics by no more than their usual noise."""


class _Moved(NamedTuple):
    """What the last batch does to one layer, in standard deviations of the channel."""

    layer: str
    decay: float
    last: float
    usual: float
    shift: float
    scale: float
    held: float

    @property
    def most(self) -> float:
        return max(self.shift, self.scale)


@rule(
    "BN206",
    "trailing-batch",
    severity=Severity.WARNING,
    part=Threshold(0.25, "convention", "size of the last batch, in usual batches"),
    shift=Threshold(0.1, "convention", "standard deviations by which the last batch alone moves running statistics"),
    alone=Threshold(0.25, "convention", "the same, where no accuracy can be measured"),
    cost=Threshold(0.01, "convention", "share of the examples: a smaller loss is not worth a warning"),
    alpha=Threshold(1e-3, "convention", "false alarms per experiment (paired test on the same examples)"),
)
def trailing_batch(signals: Signals, limits: Limits) -> Iterator[Finding | Skipped]:
    """Evaluation comes right after a batch much smaller than the others, which distorts the running statistics."""
    table = _last(signals)
    if table is None:
        if signals.tables and signals.evaluations:
            yield Skipped("BN206", "the step right before the evaluation was not sampled")
        return
    found = [moved for moved in _moved(signals, table, limits["part"]) if moved.most > limits["shift"]]
    if not found:
        return
    worst = max(found, key=lambda moved: moved.most)
    cells = signals.cells
    split = None
    for name, row in cells.rows() if cells is not None else ():
        if costs(row, limits["cost"], limits["alpha"]) and (
            "population" not in row or restores(row["population"], row["batch"], row["running"])
        ):
            split = name
    if cells is None:
        yield Skipped("BN206", "whether the last batch costs accuracy is not measured yet", needs="cells")
    certain = split is not None or (cells is None and not harmless(signals) and worst.most > limits["alone"])
    yield _finding(signals, worst, len(found), split, certain=certain)


def _last(signals: Signals) -> SignalTable | None:
    """Return the sample of the step right before the latest evaluation, None where there is none."""
    if not signals.evaluations:
        return None
    step = signals.evaluations[-1].step
    return next((table for table in reversed(signals.tables) if table.step == step and table.sites), None)


def _moved(signals: Signals, table: SignalTable, part: float) -> Iterator[_Moved]:
    """Yield the layers that the last batch moves.

    A batch of k samples has a mean that is off by 1/sqrt(k) and a variance of (k - 1)/k on average; the running
    statistics take in 1 - decay of either.
    """
    others = [other for other in within_epochs(signals) if other.sites is table.sites or other.sites == table.sites]
    if not others:
        return
    count_of = stacked("count", others)
    if not (table.column("count") <= part * count_of.max(axis=0)).any():
        return
    counts, spreads = count_of.tolist(), stacked("batch_std", others).tolist()
    held, effective = table.column("running_std").tolist(), table.column("effective_samples").tolist()
    for number, site in enumerate(table.sites):
        usual, last = median(count[number] for count in counts), float(table.column("count")[number])
        decay = signals.specs[site.layer].decay
        if last > part * usual or decay >= 1.0 or site.replica:
            continue
        of_one = effective[number] / usual if effective[number] < usual else 1.0
        k = max(1.0, last * of_one)
        narrower = 1.0 - (1.0 - decay) / k
        yield _Moved(
            layer=site.layer,
            decay=decay,
            last=last,
            usual=usual,
            shift=(1.0 - decay) / math.sqrt(k),
            scale=abs(math.log(narrower)) / 2.0 if narrower > 0.0 else math.inf,
            held=held[number] / middle if (middle := median(spread[number] for spread in spreads)) > 0.0 else math.nan,
        )


def _finding(signals: Signals, worst: _Moved, layers: int, split: str | None, *, certain: bool) -> Finding:
    cells, cost, evidence = signals.cells, "", {}
    if split is not None and cells is not None:
        row = cells.training if split == "training" else cells.evaluation
        gained, p = row["batch"].gain_over(row["running"])
        cost = f", which costs {100 * gained:.1f} points of {split} accuracy"
        evidence = {"cost": Quantity(gained, f"of {split} accuracy"), "p_value": Quantity(p, "of the paired test")}
    return Finding(
        subject="model",
        severity=None if certain else Severity.INFO,
        message=f"the last batch before evaluation holds {worst.last:.0f} element{'s' * (worst.last > 1)} a channel, "
        f"others {worst.usual:.0f}, and makes up {1.0 - worst.decay:.0%} of the running statistics{cost}",
        evidence={
            "last": Quantity(worst.last, f"elements a channel, at `{worst.layer}`"),
            "usual": Quantity(worst.usual, "elements a channel"),
            "weight": Quantity(1.0 - worst.decay, "of the last batch in the running statistics"),
            "shift": Quantity(worst.shift, "standard deviations that it moves the running mean, typically"),
            "held": Quantity(worst.held, "running / usual batch standard deviation, as measured"),
            "layers": Quantity(layers, "of which this is so"),
            **evidence,
        },
        table=cells_table(cells) if cost and cells is not None else None,
        notes=(
            (
                f"a batch of k samples has a mean that is off by 1/sqrt(k) standard deviations and (k-1)/k of the "
                f"variance; at decay {worst.decay:g} the running statistics take in {1.0 - worst.decay:.0%} of that"
            ),
            f"at `{worst.layer}` evaluation now divides by {worst.held:.2f} times the usual standard deviation",
        ),
        helps=(
            "leave out the incomplete batch at the end of an epoch (drop_remainder=True, repeat=True)"
            if signals.adapter is None
            else "leave out the incomplete batch at the end of an epoch: `dataset.batch(n, drop_remainder=True)`, or a "
            "number of examples that batches divide"
            if signals.adapter == "bnwatch.keras"
            else "let the iterator fill the last batch: `SerialIterator(dataset, n, repeat=True)`",
            f"or use a longer memory: {decay_argument(signals, f'{LONGER:g}')} or more",
        ),
    )
