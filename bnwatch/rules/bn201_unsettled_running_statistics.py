"""BN201: evaluation while the running statistics still hold their initial values."""

from __future__ import annotations

import math
from collections import Counter
from typing import TYPE_CHECKING

from bnwatch import moments
from bnwatch.diagnosis import Quantity, Severity, Skipped
from bnwatch.rules._base import Finding, Limits, Threshold, decay_argument, rule
from bnwatch.signals import Flag, gap

if TYPE_CHECKING:
    from collections.abc import Iterator

    from bnwatch.signals import Signals, SiteSignals

SHORT = 0.9
"""A decay that settles within an epoch of all but the smallest data sets."""


@rule(
    "BN201",
    "unsettled-running-statistics",
    severity=Severity.WARNING,
    weight=Threshold(0.05, "convention", "share of the initial values that may be left"),
    shift=Threshold(0.1, "convention", "standard deviations by which the initial values move the normalized output"),
    alpha=Threshold(1e-3, "convention", "false alarms per evaluation, for the accuracy it costs"),
)
def unsettled_running_statistics(signals: Signals, limits: Limits) -> Iterator[Finding | Skipped]:
    """Evaluation runs while the moving averages still hold their initial values."""
    if not signals.evaluations:
        yield Skipped("BN201", "no evaluation was seen")
        return
    sites = [s for s in signals.sites() if s.site.index == 0 and s.spec.decay < 1.0 and not s.flag & Flag.UNMOVED]
    if sites and all(math.isnan(s.updates) for s in sites):
        yield Skipped("BN201", "how often the running statistics were updated before this run is not known")
        return
    left = {s.spec.path: moments.initial_weight(s.spec.decay, n) for s, n in _updates(signals, sites)}
    unsettled = [
        s for s in sites if left.get(s.spec.path, 0.0) > limits["weight"] and _moved_by_initial(s) > limits["shift"]
    ]
    if not unsettled:
        return
    worst = max(unsettled, key=lambda s: left[s.spec.path])
    weight = left[worst.spec.path]
    updates = next(n for s, n in _updates(signals, [worst]))
    settled_at = moments.updates_until(worst.spec.decay, limits["weight"])
    costs = _costs_accuracy(signals, limits["alpha"])
    evaluation = signals.evaluations[-1]
    yield Finding(
        subject="model",
        severity=Severity.WARNING if costs else Severity.INFO,
        message=f"evaluation ran while moving averages still held {100 * weight:.3g}% of their initial values",
        evidence={
            "initial_weight": Quantity(weight, "of the initial value left"),
            "updates": Quantity(updates, f"at decay {worst.spec.decay:g}"),
            "settled_after": Quantity(settled_at, f"updates, below {limits['weight']:.0%}"),
            "layers": Quantity(len(unsettled), f"of {len(sites)} unsettled"),
            **({"evaluation_accuracy": Quantity(evaluation.accuracy)} if evaluation.accuracy is not None else {}),
        },
        notes=(f"{worst.spec.decay:g}^{updates:.0f} = {weight:.3g}; this clears by itself as training goes on",),
        helps=(
            f"first trust evaluation after update {settled_at}",
            *_shorter(signals, worst.spec.decay, limits["weight"]),
        ),
    )


def _shorter(signals: Signals, decay: float, weight: float) -> tuple[str, ...]:
    """Name a shorter memory, where there is one that is worth it."""
    if decay <= SHORT:
        return ()
    updates = moments.updates_until(SHORT, weight)
    return (f"or use a shorter memory: {decay_argument(signals, str(SHORT))} settles in {updates} updates",)


def _updates(signals: Signals, sites: list[SiteSignals]) -> Iterator[tuple[SiteSignals, float]]:
    """Yield how often each layer had been updated when the latest evaluation ran: once a call, each step."""
    table = signals.table
    if table is None:
        return
    calls = Counter(site.layer for site in table.sites if site.replica == 0)
    steps = signals.evaluations[-1].step - table.step
    for site in sites:
        if not math.isnan(site.updates):
            yield site, max(0.0, site.updates + steps * calls[site.spec.path])


def _moved_by_initial(site: SiteSignals) -> float:
    """Return by how many standard deviations the initial values move the normalized output.

    Bounded by the distance that was measured, since initial values that happen to fit do no harm.
    """
    scale = abs(site.std_ratio - 1.0)
    return max(scale, site.mean_shift)


def _costs_accuracy(signals: Signals, alpha: float) -> bool:
    """Return whether the cells of this evaluation, or else its accuracy gap, show that accuracy suffers."""
    evaluation = signals.evaluations[-1]
    cells = signals.cells
    if cells is not None and cells.step == evaluation.step:
        row = cells.evaluation or cells.training
        if "batch" in row:
            gained, p = row["batch"].gain_over(row["running"])
            return gained > 0.0 and p < alpha
    found = gap(evaluation)
    return found is not None and found[0] > 0.0 and found[1] < alpha
