"""BN201: evaluation while the running statistics still hold their initial values."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from bnwatch import moments
from bnwatch.diagnosis import Quantity, Severity, Skipped
from bnwatch.rules import _settling
from bnwatch.rules._base import Finding, Limits, Threshold, decay_argument, refresh, rule
from bnwatch.signals import gap

if TYPE_CHECKING:
    from collections.abc import Iterator

    from bnwatch.signals import Signals, SiteSignals

SHORT = 0.9
"""A decay that settles within an epoch of all but the smallest data sets."""


@rule(
    "BN201",
    "unsettled-running-statistics",
    severity=Severity.WARNING,
    weight=Threshold(_settling.WEIGHT, "convention", "share of the initial values that may be left"),
    shift=Threshold(0.1, "convention", "standard deviations by which the initial values move the normalized output"),
    alpha=Threshold(1e-3, "convention", "false alarms per evaluation, for the accuracy it costs"),
    loss=Threshold(2.0, "convention", "evaluation loss, in training losses, where no accuracy is known"),
    rest=Threshold(_settling.REST, "convention", "share of the planned training for which they must be settled"),
    patience=Threshold(_settling.PATIENCE, "convention", "evaluations of a training whose length is not known"),
)
def unsettled_running_statistics(signals: Signals, limits: Limits) -> Iterator[Finding | Skipped]:
    """Evaluation runs while the moving averages still hold their initial values."""
    if not signals.evaluations:
        yield Skipped("BN201", "no evaluation was seen")
        return
    sites = _settling.moving(signals)
    if sites and all(math.isnan(s.updates) for s in sites):
        yield Skipped("BN201", "how often the running statistics were updated before this run is not known")
        return
    if _settling.initial_weight(signals, signals.evaluations[-1].step) <= limits["weight"]:
        return
    updates = {s.spec.path: n for s, n in _settling.updates_at(signals, sites, signals.evaluations[-1].step)}
    left = {s.spec.path: _settling.held(s, updates.get(s.spec.path, math.inf)) for s in sites}
    unsettled = [s for s in sites if left[s.spec.path] > limits["weight"] and _moved_by_initial(s) > limits["shift"]]
    if not unsettled:
        return
    worst = max(unsettled, key=lambda s: left[s.spec.path])
    weight, count = left[worst.spec.path], updates[worst.spec.path]
    settled_at = _settling.updates_until(worst, limits["weight"])
    power = moments.initial_weight(worst.spec.decay, count)
    passing = _settling.passes(signals, **{name: limits[name] for name in ("weight", "rest", "patience")})
    likely = _costs_loss(signals, limits["loss"])
    costs = likely is not None or _costs_accuracy(signals, limits["alpha"])
    evaluation = signals.evaluations[-1]
    yield Finding(
        subject="model",
        severity=Severity.WARNING if costs and not passing else Severity.INFO,
        message=f"evaluation ran while moving averages still held {100 * weight:.3g}% of their initial values",
        evidence={
            "initial_weight": Quantity(weight, "of the initial value left"),
            "updates": Quantity(count, f"at decay {worst.spec.decay:g}"),
            "settled_after": Quantity(settled_at, f"updates, below {limits['weight']:.0%}"),
            "layers": Quantity(len(unsettled), f"of {len(sites)} unsettled"),
            **({"evaluation_accuracy": Quantity(evaluation.accuracy)} if evaluation.accuracy is not None else {}),
        },
        notes=(
            f"{worst.spec.decay:g}^{count:.0f} = {power:.3g}"
            + (f" of a variance that began as {worst.spec.initial[1]:g}, far above that of the data" * (weight > power))
            + f"; {_outlook(signals, limits)}",
            *((likely,) if likely is not None else ()),
        ),
        helps=_helps(signals, worst.spec.decay, settled_at, limits["weight"]),
    )


def _helps(signals: Signals, decay: float, settled_at: int, weight: float) -> tuple[str, ...]:
    """Return what to do: wait, where waiting helps in this training."""
    wait, shorter = f"first trust evaluation after update {settled_at:,}", _shorter(signals, decay, weight)
    steps = _settling.planned(signals)
    never = steps is not None and _settling.settled_step(signals, weight) > steps
    if not (signals.ended or never):
        return (wait, *(f"or {text}" for text in shorter))
    return (*shorter, ("or " if shorter else "") + refresh(signals), f"or train longer: {wait}")


def _shorter(signals: Signals, decay: float, weight: float) -> tuple[str, ...]:
    """Name a shorter memory, where there is one that is worth it."""
    if decay <= SHORT:
        return ()
    updates = moments.updates_until(SHORT, weight)
    return (f"use a shorter memory: {decay_argument(signals, str(SHORT))} settles in {updates} updates",)


def _outlook(signals: Signals, limits: Limits) -> str:
    """Return whether and when it clears."""
    if signals.ended:
        return "training has ended, so this is what is evaluated from now on"
    step, steps = _settling.settled_step(signals, limits["weight"]), _settling.planned(signals)
    if steps is None:
        return f"this clears by itself as training goes on, at step {step:,}"
    if step > steps:
        return f"training is to end at step {steps:,}, and this would clear at step {step:,}"
    return f"this clears by itself as training goes on, at step {step:,} of {steps:,} planned"


def _moved_by_initial(site: SiteSignals) -> float:
    """Return by how many standard deviations the initial values move the normalized output.

    Bounded by the distance that was measured, since initial values that happen to fit do no harm.
    """
    scale = abs(site.std_ratio - 1.0)
    return max(scale, site.mean_shift)


def _costs_loss(signals: Signals, limit: float) -> str | None:
    """Return what the losses of this evaluation say where no accuracy is known; None where they say nothing."""
    last = signals.evaluations[-1]
    held, trained = last.loss, last.train_loss
    if last.accuracy is not None or held is None or trained is None or not held > limit * trained > 0.0:
        return None
    return (
        f"likely that is why the evaluation loss is {held:.3g} and the training loss {trained:.3g}; what decides: the "
        "evaluation loss with statistics re-estimated on training data"
    )


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
