"""BN202: the memory of the running statistics does not fit the training."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from bnwatch import moments
from bnwatch.diagnosis import Quantity, Severity, Skipped
from bnwatch.rules import _settling
from bnwatch.rules._base import (
    Finding,
    Limits,
    Threshold,
    additional,
    blind,
    cells_table,
    costs,
    decay_argument,
    measured,
    named,
    refresh,
    restless,
    restores,
    rule,
)

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from bnwatch.evidence import Cell, Split, Statistics
    from bnwatch.records import Structure
    from bnwatch.signals import Signals

    Cost = tuple[Split, Mapping[Statistics, Cell]]


@rule(
    "BN202",
    "decay-out-of-range",
    severity=Severity.WARNING,
    memory=Threshold(3.0, "convention", "batches that the running statistics average over, effectively"),
    weight=Threshold(0.05, "derived", "a tenth of a standard deviation left of a start that was two off"),
    part=Threshold(
        _settling.PART, "convention", "share of all batches so far that they average over: weights move on meanwhile"
    ),
    cost=Threshold(0.01, "convention", "share of the examples: a smaller loss is not worth a warning"),
    alpha=Threshold(1e-3, "convention", "false alarms per experiment (paired test on the same examples)"),
)
def decay_out_of_range(signals: Signals, limits: Limits) -> Iterator[Finding | Skipped]:
    """The running statistics remember about one batch, or more than the training has."""
    structure = signals.structure
    yield from blind("BN202", signals) if structure is None else ()
    if structure is not None and structure.steps is None:
        yield Skipped("BN202", "how many steps the training is to have is not known")
    every = structure.layers if structure is not None else signals.specs.values()
    by_decay: dict[float, list[str]] = {}
    for layer in every:
        if layer.trainable:
            by_decay.setdefault(layer.decay, []).append(layer.path)
    cost = _cost_of_age(signals, limits)
    for decay, paths in by_decay.items():
        subject = "model" if len(by_decay) == 1 else paths[0]
        if decay < 1.0 and moments.effective_batches(decay) < limits["memory"]:
            of_few = _cost_of_few(signals, limits)
            if decay > 0.0 or of_few is not None:
                yield _short(signals, subject, decay, paths, of_few)
        elif cost is not None and _settled(signals, decay) and _part(signals, decay) > limits["part"]:
            yield _lagging(signals, subject, decay, paths, cost, limits["part"])
        elif structure is not None and structure.steps is not None:
            yield from _long(signals, structure, subject, decay, paths, limits["weight"], cost)


def _cost_of_age(signals: Signals, limits: Limits) -> Cost | None:
    """Return where running statistics cost accuracy that a re-estimate restores, settled as they are; None if nowhere.

    Then they are of one population, and of other batches than they should be. Not where they are no numbers, where
    the weights measured are not those that they were made with, or where other passes moved them.
    """
    cells, last = signals.cells, signals.evaluations[-1] if signals.evaluations else None
    if cells is None or cells.swapped or cells.moved or additional(signals):
        return None
    if last is not None and (last.swapped or last.moved):
        return None
    if signals.table is not None and signals.table.column("non_finite").any():
        return None
    if restless(signals) or _settling.initial_weight(signals, cells.step) > _settling.WEIGHT:
        return None
    found = [(split, row) for split, row in cells.rows() if costs(row, limits["cost"], limits["alpha"])]
    mended = all("population" in row and restores(row["population"], row["batch"], row["running"]) for _, row in found)
    return found[-1] if found and mended else None


def _cost_of_few(signals: Signals, limits: Limits) -> Cost | None:
    """Return where running statistics, which are of a batch or two, cost accuracy that a re-estimate restores.

    Batch statistics are of one batch as well, and no better where batches are small: the re-estimate is the measure.
    """
    cells = signals.cells
    found = cells.gain("population", "running") if cells is not None else None
    if cells is None or found is None or found[0] <= limits["cost"] or found[1] >= limits["alpha"]:
        return None
    rows = list(cells.rows())
    mended = all("batch" in row and restores(row["population"], row["batch"], row["running"]) for _, row in rows)
    return rows[-1] if mended else None


def _settled(signals: Signals, decay: float) -> bool:
    """Return whether the training so far has replaced what the running statistics began with, whatever that was."""
    return decay < 1.0 and moments.initial_weight(decay, signals.step) <= _settling.WEIGHT


def _part(signals: Signals, decay: float) -> float:
    """Return the share of all batches so far that running statistics average over."""
    return moments.effective_batches(decay) / max(signals.step, 1)


def _short(signals: Signals, subject: str, decay: float, paths: list[str], cost: Cost | None) -> Finding:
    told = f"; likely PyTorch's momentum={decay:g}, which weighs the new value: in Keras and Chainer that is "
    return Finding(
        subject=subject,
        severity=Severity.INFO if cost is None else None,
        message=f"a decay of {decay:g} makes running statistics of the last batch or two{_named(cost)}: {named(paths)}",
        evidence={
            "effective_batches": Quantity(moments.effective_batches(decay), "averaged over"),
            "decay": Quantity(decay, "weight of the old value"),
            "layers": Quantity(len(paths), "with this decay"),
        },
        table=None if cost is None or signals.cells is None else cells_table(signals.cells),
        notes=(
            "evaluation then depends on the batches that happened to be last"
            + (f"{told}{1.0 - decay:g}" if decay > 0.0 else ""),
            "what decides: the accuracy with running against re-estimated statistics (BN301)"
            if cost is None
            else measured(*cost, "with statistics re-estimated on training data"),
        ),
        helps=(
            f"{decay_argument(signals, '0.9')}, or up to 0.99 in a long training",
            *(() if cost is None else (refresh(signals),)),
        ),
    )


def _lagging(  # noqa: PLR0917
    signals: Signals, subject: str, decay: float, paths: list[str], cost: Cost, part: float
) -> Finding:
    steps = max(signals.step, 1)
    batches, wanted = moments.effective_batches(decay), max(part * steps, 3.0)
    shorter = math.floor(100.0 * (wanted - 1.0) / (wanted + 1.0)) / 100.0
    return Finding(
        subject=subject,
        severity=None if signals.ended else Severity.INFO,
        message=f"running statistics lag behind the weights{_named(cost)}: at decay {decay:g} they average over "
        f"{batches:.0f} of the {steps:,} batches so far: {named(paths)}",
        evidence={
            "effective_batches": Quantity(batches, "averaged over"),
            "part": Quantity(batches / steps, f"of {steps:,} batches so far"),
            "decay": Quantity(decay, "weight of the old value"),
            "layers": Quantity(len(paths), "with this decay"),
        },
        table=None if signals.cells is None else cells_table(signals.cells),
        notes=(
            "the weights move on while the average is taken, so it describes what the layer saw long ago",
            measured(*cost, "with statistics re-estimated on training data"),
        ),
        helps=(
            refresh(signals),
            "or "
            + (f"{decay_argument(signals, f'{shorter:g}')}, " if 2.0 * wanted <= batches else "")
            + "a longer training, or a learning rate that falls in time",
        ),
    )


def _named(cost: Cost | None) -> str:
    if cost is None:
        return ""
    split, row = cost
    gained = row["population"].gain_over(row["running"])[0]
    return f", which costs {100 * gained:.1f} points of {split} accuracy"


def _long(  # noqa: PLR0917
    signals: Signals,
    structure: Structure,
    subject: str,
    decay: float,
    paths: list[str],
    limit: float,
    cost: Cost | None,
) -> Iterator[Finding]:
    """Yield a finding if the layers of one decay are to keep too much of what they started from."""
    steps = structure.steps or 0
    own = set(paths)
    updates = {layer.path: steps * max(1, len(layer.places)) for layer in structure.layers if layer.path in own}
    late = [path for path, n in updates.items() if n and moments.initial_weight(decay, n) > limit]
    if not late:
        return
    fewest = min(updates[path] for path in late)
    weight = moments.initial_weight(decay, fewest)
    fitting = math.floor(100.0 * limit ** (1.0 / fewest)) / 100.0
    yield Finding(
        subject=subject,
        severity=None if signals.ended and cost is not None else Severity.INFO,
        message=f"after the planned {steps:,} steps, {100 * weight:.3g}% of the running statistics are still what they "
        f"began with{_named(cost)}: {named(late)}",
        evidence={
            "initial_weight": Quantity(weight, "of the first values left at the end"),
            "updates": Quantity(fewest, f"planned, at decay {decay:g}"),
            "layers": Quantity(len(late), "that remember more than the training"),
        },
        notes=(
            f"{decay:g}^{fewest} = {weight:.3g}; an evaluation before the end still holds more of them",
            "of no harm where a later training goes on, or where the first values were trained on such data"
            if cost is None
            else measured(*cost, "with statistics re-estimated on training data"),
        ),
        helps=(
            f"{decay_argument(signals, f'{fitting:g}')} or less, or a longer training",
            *(() if cost is None else (f"or {refresh(signals)}",)),
        ),
    )
