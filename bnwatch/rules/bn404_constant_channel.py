"""BN404: channels without variance."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from bnwatch.diagnosis import Quantity, Severity, Skipped
from bnwatch.rules._base import Finding, Limits, Threshold, cells_table, costs, rule

if TYPE_CHECKING:
    from collections.abc import Iterator

    from bnwatch.evidence import Entering, SiteShift
    from bnwatch.signals import Signals


@rule(
    "BN404",
    "constant-channel",
    severity=Severity.WARNING,
    share=Threshold(0.5, "measured", "channels of a layer that are constant; healthy nets with ReLU show .12 to .5"),
    cost=Threshold(0.01, "convention", "share of the examples: a smaller loss is not worth a warning"),
    alpha=Threshold(1e-3, "convention", "false alarms per experiment (paired test on the same examples)"),
    same=Threshold(0.01, "convention", "false alarms per experiment that inputs differ, where channels vary"),
    apart=Threshold(0.1, "convention", "log ratio of the spreads, where channels vary: beyond it all inputs differ"),
)
def constant_channel(signals: Signals, limits: Limits) -> Iterator[Finding | Skipped]:
    """Channels are constant in training; where they vary in evaluation they are divided by the root of epsilon."""
    entering, cells = signals.entering, signals.cells
    woken = _woken(entering) if entering is not None else None
    if entering is not None and woken is not None:
        number, site = woken
        alone = _alone(entering, number, limits)
        rows = dict(cells.rows()) if cells is not None and cells.step == entering.step else {}
        guilty = alone and [s for s, row in rows.items() if costs(row, limits["cost"], limits["alpha"])] == [
            "evaluation"
        ]
        yield _awake(signals, site, costs=guilty)
        return
    table = signals.table
    if table is None:
        return
    many = table.column("zero_variance") > limits["share"] * signals.of_layers("channels")
    for one in signals.at(many & (table.column("count") > 1)):
        constant = one.zero_variance / one.spec.channels
        if one.site.index == 0:
            yield Finding(
                subject=one.spec.path,
                severity=Severity.INFO,
                message=f"{one.zero_variance:.0f} of {one.spec.channels} channels of `{one.spec.path}` are constant "
                "over the batch",
                evidence={"constant": Quantity(constant, "of the channels have no variance")},
                notes=("they give beta whatever the input, and learn nothing: likely units of a ReLU that are dead",),
                helps=("put batch normalization in front of the activation, or use LeakyReLU there",),
            )


def _woken(entering: Entering) -> tuple[int, SiteShift] | None:
    """Return the first call site with channels that vary in evaluation alone, and its number."""
    return next(((number, site) for number, site in enumerate(entering.sites) if site.awakened), None)


def _alone(entering: Entering, number: int, limits: Limits) -> bool:
    """Return whether nothing but such channels differs: not what enters before, and not the spread of the others."""
    return abs(math.log(entering.sites[number].std_ratio)) <= limits["apart"] and not any(
        site.p_value is not None
        and site.p_value * len(entering.sites) < limits["same"]
        and max(site.mean_shift, abs(math.log(site.std_ratio))) > limits["apart"]
        for site in entering.sites[:number]
    )


def _awake(signals: Signals, site: SiteShift, *, costs: bool) -> Finding:
    cells, entering = signals.cells, signals.entering
    epsilon = signals.specs[site.layer].epsilon if site.layer in signals.specs else 0.0
    row = cells.evaluation if cells is not None else {}
    examples = f"{entering.training:,} training" if entering is not None else "training"
    by = f"1/{epsilon:g}^0.5 = {epsilon**-0.5:,.0f}" if epsilon > 0.0 else "1/epsilon^0.5"
    cost = f", which costs {100 * row['batch'].gain_over(row['running'])[0]:.1f} points of accuracy" if costs else ""
    plural = site.awakened > 1
    many, are, vary = (f"{site.awakened} channels", "are", "vary") if plural else ("1 channel", "is", "varies")
    return Finding(
        subject=site.subject,
        severity=None if costs else Severity.INFO,
        message=f"{many} of `{site.subject}` {are} constant in training and {vary} in evaluation{cost}",
        evidence={
            "awakened": Quantity(site.awakened, f"channels constant over {examples} examples"),
            "epsilon": Quantity(epsilon, "is all that evaluation divides them by, under the root"),
        },
        table=cells_table(cells) if costs and cells is not None else None,
        notes=(
            f"their running variance goes to 0, so evaluation multiplies them by {by}: what was never seen in "
            "training becomes the loudest input of the next layer",
        ),
        helps=(
            "leave out inputs that are constant in the training data, or collect training data in which they vary",
            "compare the preprocessing of both pipelines, if the same inputs are to vary in neither or in both",
            "a larger epsilon makes it milder and mends nothing",
        ),
    )
