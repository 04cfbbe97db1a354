"""BN107: training goes on in inference mode."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from bnwatch import moments
from bnwatch.diagnosis import Quantity, Severity, Skipped
from bnwatch.rules._base import Finding, Limits, Threshold, fitting, named, rule

if TYPE_CHECKING:
    from collections.abc import Iterator

    from bnwatch.signals import Signals

HOW = {
    "bnwatch.chainer": (
        "Chainer: evaluate inside `with chainer.using_config('train', False):`, which sets it back; a plain "
        "`chainer.config.train = False` stays",
    ),
    "bnwatch.keras": (
        "Keras: hand the mode on as an argument, `model(x, training=True)` in each training step; a flag kept on the "
        "model is to be set back after evaluation",
    ),
}


@rule(
    "BN107",
    "left-in-evaluation-mode",
    severity=Severity.WARNING,
    before=Threshold(4, "convention", "sampled steps in training mode in a row; steps that take turns have fewer"),
    samples=Threshold(2, "convention", "sampled steps in a row that never came back to training mode"),
)
def left_in_evaluation_mode(signals: Signals, limits: Limits) -> Iterator[Finding | Skipped]:
    """From some step on, training runs in inference mode."""
    if not signals.tables:
        yield Skipped("BN107", "no training step was seen")
        return
    tables = list(signals.tables)
    stopped = _stopped(signals, limits)
    if not stopped:
        return
    since = max(signals.normalized[path] for path in stopped)
    first = next((table.step for table in tables if table.step > since), tables[0].step)
    evaluated = next((e.step for e in signals.evaluations if since <= e.step < first), None)
    trained = [path for path in stopped if signals.specs[path].trainable]
    # a few layers that stop between two steps were switched, all of them at an evaluation were forgotten
    forgotten = trained and (evaluated is not None or len(stopped) == len(signals.normalized))
    weight = _initial_weight(stopped[0], signals)
    yield Finding(
        subject=stopped[0] if len(stopped) == 1 else "model",
        severity=None if forgotten else Severity.INFO,
        message=("since step " if evaluated is None else "since the evaluation at step ")
        + f"{since if evaluated is None else evaluated}, training runs {named(stopped)} in inference mode",
        evidence={
            "layers": Quantity(len(stopped), f"of {len(signals.normalized)} that used batch statistics before"),
            "last": Quantity(since, "last sampled step in training mode"),
            "steps": Quantity(tables[-1].step - since, "steps since"),
            **({"initial_weight": Quantity(weight, "of the initial values, frozen in")} if weight is not None else {}),
        },
        notes=(
            "the running statistics do not move any longer, and the network learns to live with them: training drops, "
            "recovers, and the end result hides it",
        ),
        helps=fitting(HOW, signals) if trained else (),
    )


def _stopped(signals: Signals, limits: Limits) -> list[str]:
    """Return the layers that were in training mode for long, and not since."""
    tables, last = list(signals.tables), signals.tables[-1]
    by_step: dict[int, list[str]] = {}
    for path in last.idle:
        if path in signals.normalized:
            by_step.setdefault(signals.normalized[path], []).append(path)
    found = []
    for since, paths in by_step.items():
        stop = sum(table.step <= since for table in tables)
        before, after = tables[max(0, stop - int(limits["before"])) : stop], tables[stop:]
        if len(after) < limits["samples"] or 0 < len(before) < limits["before"]:
            continue  # with none before, it is longer ago than what is kept
        always = [{site.layer for site in table.sites} for table in before] + [set(table.idle) for table in after]
        found += [path for path in paths if all(path in layers for layers in always)]
    return found


def _initial_weight(path: str, signals: Signals) -> float | None:
    """Return the share of the initial values that a layer stopped with."""
    for table in reversed(signals.tables):
        for number, site in enumerate(table.sites):
            if site.layer == path:
                weight = moments.initial_weight(signals.specs[path].decay, float(table.column("updates")[number]))
                return None if math.isnan(weight) else weight
    return None
