"""How far the running statistics have left the values that they started from, and whether the rest goes by itself."""

from __future__ import annotations

import math
from collections import Counter
from typing import TYPE_CHECKING

from bnwatch import moments
from bnwatch.signals import Flag

if TYPE_CHECKING:
    from collections.abc import Iterator

    from bnwatch.records import LayerSpec
    from bnwatch.signals import Signals, SiteSignals

WEIGHT = 0.05
"""Share of the initial values that may be left in settled running statistics."""

REST = 0.1
"""Share of the planned training that settled statistics must have before it ends: then nobody is misled for long."""

PART = 0.1
"""Share of all batches so far beyond which an average over them is one over many states of the weights."""

UNMOVED = int(Flag.UNMOVED)

PATIENCE = 10
"""Evaluations through which a training of unknown length may pass for one that has only begun."""


def moving(signals: Signals) -> list[SiteSignals]:
    """Return the first call site of every layer whose running statistics take something in."""
    table = signals.table
    if table is None:
        return []
    moved = table.column("flags").astype(int) & UNMOVED == 0
    return [site for site in signals.at(moved) if site.site.index == 0 and site.spec.decay < 1.0]


def updates_at(signals: Signals, sites: list[SiteSignals], step: int) -> Iterator[tuple[SiteSignals, float]]:
    """Yield how often each layer had been updated at a step: once a call, each step; not those of unknown updates."""
    table = signals.table
    if table is None:
        return
    calls = Counter(site.layer for site in table.sites if site.replica == 0)
    for site in sites:
        if not math.isnan(site.updates):
            yield site, max(0.0, site.updates + (step - table.step) * calls[site.spec.path])


def initial_weight(signals: Signals, step: int) -> float:
    """Return the largest share of the initial values that any layer holds at a step; 0 where it is not known."""
    table, most = signals.table, 0.0
    if table is None:
        return most
    calls = Counter(site.layer for site in table.sites if site.replica == 0)
    columns = (table.column(name).tolist() for name in ("flags", "updates", "running_std"))
    # for each layer, and several rules ask: columns, as a call site by itself is slow to make
    for site, flags, updates, deviation in zip(table.sites, *columns, strict=True):
        spec = signals.specs[site.layer]
        if site.index or spec.decay >= 1.0 or int(flags) & UNMOVED or math.isnan(updates):
            continue
        n = max(0.0, updates + (step - table.step) * calls[site.layer])
        most = max(most, _held(spec, n, deviation**2))
    return most


def held(site: SiteSignals, updates: float) -> float:
    """Return the share of the initial values in the running statistics after that many updates.

    That is d^n of the mean, and of the variance d^n of the initial one: where the data have a far smaller variance,
    what is left of the initial one is most of it. A share w of a mean that began two standard deviations off is 2 w of
    them, a share s of the variance widens the standard deviation by s / 2: so of the variance a quarter counts.
    """
    return _held(site.spec, updates, site.running_std**2)


def _held(spec: LayerSpec, updates: float, variance: float) -> float:
    weight, initial = moments.initial_weight(spec.decay, updates), spec.initial[1]
    return min(1.0, max(weight, weight * initial / variance / 4.0)) if variance > 0.0 else weight


def settled_step(signals: Signals, weight: float = WEIGHT) -> int:
    """Return the training step at which every layer holds less than a share of its initial values, at this pace."""
    steps = [0]
    for site, n in updates_at(signals, moving(signals), signals.step):
        still = moments.updates_until(site.spec.decay, weight) - n
        steps.append(signals.step + math.ceil(still * signals.step / n) if n else signals.step)
    return max(steps)


def updates_until(site: SiteSignals, weight: float = WEIGHT) -> int:
    """Return the updates after which a layer holds less than a share of its initial values, see `held`."""
    mean = moments.updates_until(site.spec.decay, weight)
    smaller = site.batch_std**2 / site.spec.initial[1] if site.spec.initial[1] > 0.0 else 1.0
    if not 0.0 < 4.0 * smaller < 1.0:
        return mean
    return moments.updates_until(site.spec.decay, weight * 4.0 * smaller)


def lagging(signals: Signals) -> bool:
    """Return whether the running statistics of a layer average over much of the training so far.

    Its weights move on meanwhile, less and less as training goes on.
    """
    decays = {spec.decay for spec in signals.specs.values() if spec.trainable and spec.decay < 1.0}
    return any(moments.effective_batches(decay) > PART * signals.step for decay in decays)


def planned(signals: Signals) -> int | None:
    """Return the planned training steps; None where they are unknown or past, as when training goes on."""
    steps = signals.structure.steps if signals.structure is not None else None
    return steps if steps is not None and steps >= signals.step else None


def passes(signals: Signals, *, weight: float = WEIGHT, rest: float = REST, patience: float = PATIENCE) -> bool:
    """Return whether unsettled statistics are those of a training that has only begun.

    They settle by themselves, with a share ``rest`` of the planned training to go. Where no plan is known the first
    evaluations are given the benefit of the doubt. What training ends with no longer passes.
    """
    if initial_weight(signals, signals.step) <= weight:
        return True
    if signals.ended:
        return False
    steps = planned(signals)
    if steps is None:
        return signals.evaluated < patience
    return settled_step(signals, weight) <= (1.0 - rest) * steps
