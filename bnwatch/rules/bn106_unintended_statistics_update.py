"""BN106: running statistics move by something else than the call of each training step."""

from __future__ import annotations

import math
from collections import Counter
from itertools import pairwise
from typing import TYPE_CHECKING

from bnwatch.diagnosis import Quantity, Severity, Skipped
from bnwatch.rules._base import (
    SAME,
    Finding,
    Limits,
    Threshold,
    current_cells,
    differ,
    fitting,
    named,
    passes,
    restored_cost,
    rule,
)
from bnwatch.signals import Flag

if TYPE_CHECKING:
    from collections.abc import Iterator

    from bnwatch.diagnosis import Quantity as Number
    from bnwatch.signals import Signals

HOW = {
    "bnwatch.chainer": (
        "Chainer: run every pass that is no training step inside `with chainer.using_config('train', False):`",
    ),
    "bnwatch.keras": (
        "Keras: run every pass that is no training step with `training=False`, `model(x, training=False)`",
    ),
}


@rule(
    "BN106",
    "unintended-statistics-update",
    severity=Severity.INFO,
    samples=Threshold(3, "convention", "pairs of sampled steps in a row whose movement is not explained"),
    unexplained=Threshold(
        0.01, "derived", "running standard deviations; rounding of float32 reaches it at a mean of 10,000 of them"
    ),
    cost=Threshold(0.01, "convention", "share of the examples: a smaller loss is not worth a warning"),
    alpha=Threshold(0.01, "convention", "false alarms per experiment; that statistics moved is certain"),
)
def unintended_statistics_update(signals: Signals, limits: Limits) -> Iterator[Finding | Skipped]:
    """Running statistics move outside of the training steps, or by more forward passes than the model has."""
    if not signals.evaluations and not signals.tables:
        yield Skipped("BN106", "neither a training step nor an evaluation was seen")
        return
    foreign = _moved(signals) or _unexplained(signals, limits)
    found = foreign or _extra(signals)
    if found is None:
        return
    layers, fact, evidence = found
    # extra calls that see other data are told as BN101
    cost = restored_cost(signals, limits["cost"], limits["alpha"]) if foreign else None
    yield Finding(
        subject=layers[0] if len(layers) == 1 else "model",
        severity=None if cost is None else Severity.WARNING,
        message=f"running statistics of {named(layers)} {fact}",
        evidence=evidence,
        notes=(
            cost
            or "of no harm where these passes see the same kind of data, as those of which gradients are added up "
            "do, or where statistics were set on purpose",
        ),
        helps=fitting(HOW, signals),
    )


def _moved(signals: Signals) -> tuple[list[str], str, dict[str, Number]] | None:
    """Return the layers that an evaluation moved, or what came after it.

    With other parameters, both were changed together and on purpose.
    """
    last, cells = signals.evaluations[-1] if signals.evaluations else None, current_cells(signals)
    own = () if last is None else last.batch_statistics
    if last is not None and not last.swapped and (layers := [path for path in last.moved if path not in own]):
        fact = f"moved between the last training step and the end of the evaluation at step {last.step}"
    elif cells is not None and cells.moved and not cells.swapped:
        layers, evaluated = list(cells.moved), last is not None and last.step == cells.step
        fact = f"moved after {'the evaluation at' if evaluated else 'training'} step {cells.step}"
    else:
        return None
    evidence = {"layers": Quantity(len(layers), f"of {len(signals.specs)} moved after the last training step")}
    return layers, fact, evidence


def _unexplained(signals: Signals, limits: Limits) -> tuple[list[str], str, dict[str, Number]] | None:
    """Return the layers of which most pairs of steps leave a movement unexplained."""
    table = signals.table
    if table is None or (signals.attachment is not None and signals.attachment.unseen is not None):
        return None
    in_a_row = [later for earlier, later in pairwise(signals.tables) if later.step == earlier.step + 1]
    # most trainings end here, without a look at each site of all samples
    if sum(bool((t.column("unexplained") > limits["unexplained"]).any()) for t in in_a_row) < limits["samples"]:
        return None
    found = signals.columns("unexplained")
    beyond, told = (found > limits["unexplained"]).sum(axis=0), (found < math.inf).sum(axis=0)
    moves = table.column("flags").astype(int) & Flag.UNMOVED == 0  # else it is BN203
    found_at = (beyond >= limits["samples"]) & (2 * beyond > told) & moves
    layers = [table.sites[number].layer for number in found_at.nonzero()[0].tolist()]
    if not layers:
        return None
    worst = float(found.max(where=found < math.inf, initial=0.0))
    evidence = {
        "unexplained": Quantity(worst, "running standard deviations of the mean beyond the call of the step, at most"),
        "steps": Quantity(int(beyond.max()), f"of {int(told.max())} sampled steps with such a movement"),
    }
    return layers, "move by more than the training-mode call of the step explains", evidence


def _extra(signals: Signals) -> tuple[list[str], str, dict[str, Number]] | None:
    """Return the layers that a step calls in training mode more often than the graph of the model does.

    Where the graph is not known, those that it calls several times, on like data. Not with Chainer: its graph is that
    of the step itself, so that each of its calls is one that is trained, and BN101 tells of them.
    """
    structure, table = signals.structure, signals.table
    if structure is None or table is None or signals.adapter == "bnwatch.chainer" or passes(signals) > 1:
        return None
    calls = Counter(site.layer for site in table.sites if site.replica == 0)
    if structure.hidden is None:
        places = {usage.path: len(usage.places) for usage in structure.layers if usage.places}
        layers = [path for path, times in calls.items() if path in places and times > places[path]]
        fact = "one forward pass makes fewer"
    else:
        shared = [apart for _, _, apart in signals.shared() if apart is not None]
        layers = [apart.layer for apart in shared if not differ(signals, apart, SAME)]
        fact = "on like data"
    if not layers:
        return None
    evidence = {"calls": Quantity(calls[layers[0]], f"of {layers[0]} in training mode a step")}
    return layers, f"are updated by {calls[layers[0]]} training-mode calls a step, {fact}", evidence
