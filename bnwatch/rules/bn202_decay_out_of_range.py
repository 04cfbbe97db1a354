"""BN202: the memory of the running statistics does not fit the training."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from bnwatch import moments
from bnwatch.diagnosis import Quantity, Severity, Skipped
from bnwatch.rules._base import Finding, Limits, Threshold, blind, decay_argument, named, rule

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from bnwatch.records import Usage
    from bnwatch.signals import Signals


@rule(
    "BN202",
    "decay-out-of-range",
    severity=Severity.INFO,
    memory=Threshold(3.0, "convention", "batches that the running statistics average over, effectively"),
    weight=Threshold(0.05, "derived", "a tenth of a standard deviation left of a start that was two off"),
)
def decay_out_of_range(signals: Signals, limits: Limits) -> Iterator[Finding | Skipped]:
    """The running statistics remember about one batch, or more than the whole training."""
    structure = signals.structure
    if structure is None:
        yield from blind("BN202", signals)
        return
    if structure.steps is None:
        yield Skipped("BN202", "how many steps the training is to have is not known")
    by_decay: dict[float, list[Usage]] = {}
    layers = [layer for layer in structure.layers if layer.trainable]
    for layer in layers:
        by_decay.setdefault(layer.decay, []).append(layer)
    for decay, group in by_decay.items():
        subject = "model" if len(group) == len(layers) else group[0].path
        if 0.0 < decay < 1.0 and moments.effective_batches(decay) < limits["memory"]:
            yield _short(signals, subject, decay, group)
        elif structure.steps is not None:
            yield from _long(signals, subject, group, limits["weight"])


def _short(signals: Signals, subject: str, decay: float, group: Sequence[Usage]) -> Finding:
    return Finding(
        subject=subject,
        message=f"a decay of {decay:g} makes running statistics of the last batch or two: "
        f"{named(layer.path for layer in group)}",
        evidence={
            "effective_batches": Quantity(moments.effective_batches(decay), "averaged over"),
            "decay": Quantity(decay, "weight of the old value"),
            "layers": Quantity(len(group), "with this decay"),
        },
        notes=(
            f"evaluation then depends on the batches that happened to be last; likely PyTorch's momentum={decay:g}, "
            f"which weighs the new value: in Keras and Chainer that is {1.0 - decay:g}",
            "what decides: the accuracy with running against re-estimated statistics (BN301)",
        ),
        helps=(f"{decay_argument(signals, '0.9')}, or up to 0.99 in a long training",),
    )


def _long(signals: Signals, subject: str, group: Sequence[Usage], limit: float) -> Iterator[Finding]:
    """Yield a finding if the layers of one decay are to keep too much of what they started from."""
    steps = (signals.structure.steps if signals.structure else None) or 0
    updates = {layer.path: steps * max(1, len(layer.places)) for layer in group}
    late = [path for path, n in updates.items() if n and moments.initial_weight(group[0].decay, n) > limit]
    if not late:
        return
    decay, fewest = group[0].decay, min(updates[path] for path in late)
    weight = moments.initial_weight(decay, fewest)
    fitting = math.floor(100.0 * limit ** (1.0 / fewest)) / 100.0
    yield Finding(
        subject=subject,
        message=f"after the planned {steps:,} steps, {100 * weight:.3g}% of the running statistics are still what they "
        f"are now: {named(late)}",
        evidence={
            "initial_weight": Quantity(weight, "of the present values left at the end"),
            "updates": Quantity(fewest, f"planned, at decay {decay:g}"),
            "layers": Quantity(len(late), "that remember more than the training"),
        },
        notes=(
            f"{decay:g}^{fewest} = {weight:.3g}; an evaluation before the end still holds more of them",
            "of no harm where a later training goes on, or where the present values were trained on such data",
        ),
        helps=(f"{decay_argument(signals, f'{fitting:g}')} or less, or a longer training",),
    )
