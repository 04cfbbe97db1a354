"""BN302: accuracy is what guessing gives."""

from __future__ import annotations

from typing import TYPE_CHECKING

from bnwatch import moments
from bnwatch.diagnosis import Quantity, Severity, Skipped
from bnwatch.rules import _guessing
from bnwatch.rules._base import RESTLESS, Finding, Limits, Threshold, innocence, rule, stuck

if TYPE_CHECKING:
    from collections.abc import Iterator

    from bnwatch.records import EvaluationRecord
    from bnwatch.signals import Signals


@rule(
    "BN302",
    "chance-level-accuracy",
    severity=Severity.ERROR,
    alpha=Threshold(1e-3, "convention", "probability that a guesser reaches this accuracy: above it, it is chance"),
    constant=Threshold(1e-6, "derived", "relative spread of the output over examples that float32 rounding can give"),
    patience=Threshold(3, "convention", "evaluations in a row at chance where the output is not constant"),
    margin=Threshold(0.05, "convention", "share above chance that the number of examples must be able to tell from it"),
    bounds=Threshold(0.99, "convention", "share of outputs at a bound of their activation: saturated"),
    fast=Threshold(
        RESTLESS, "convention", "relative change of parameters in a step; healthy trainings show .001 to .02"
    ),
    worse=Threshold(3.0, "convention", "times the loss of guessing: confident and wrong"),
    slow=Threshold(1e-6, "convention", "relative change of parameters in a step, below which nothing is learned"),
    near=Threshold(0.1, "convention", "relative distance of a loss from that of guessing"),
)
def chance_level_accuracy(signals: Signals, limits: Limits) -> Iterator[Finding | Skipped]:
    """Training and evaluation accuracy are what guessing gives."""
    evaluations = [e for e in signals.evaluations if e.accuracy is not None]
    if not evaluations:
        yield Skipped("BN302", "no evaluation accuracy was seen")
        return
    chance = signals.chance_on("evaluation")
    last = evaluations[-1]
    if chance is None or not last.examples:
        yield Skipped("BN302", "the number of classes or of evaluation examples is not known", needs="cells")
        return
    times = stuck(signals, limits["alpha"])
    if not times:
        return
    current = [look for look in signals.looks if look.step <= signals.step][-2:]
    constant = len(current) == 2 and all(  # noqa: PLR2004 - two looks, as the catalogue asks
        look.layers and look.layers[-1].spread < limits["constant"] for look in current
    )
    if not constant and times < limits["patience"]:
        looked = len(current) == 2 and current[-1].step >= last.step  # noqa: PLR2004
        seen = f"the output varies, so it counts from {limits['patience']:.0f}" if looked else "is the output constant?"
        yield Skipped("BN302", f"at chance for {times} in a row; {seen}", needs=None if looked else "look")
        return
    examples = max(last.examples, last.train_examples if last.train_accuracy is not None else 0)
    if not constant and moments.binomial_interval(chance, examples)[1] - chance > limits["margin"]:
        yield Skipped("BN302", f"{examples} examples are too few to tell guessing from a slow start")
        return
    cells = signals.cells
    if cells is None or cells.step < evaluations[-times].step:
        cells = None
        yield Skipped("BN302", "whether the running statistics are to blame is to be measured", needs="cells")
    blamed = None if cells is None else _guessing.statistics(cells, limits["alpha"])
    why = blamed or _guessing.kind(
        _guessing.Case(signals, last, signals.looks[-1] if signals.looks else None, limits, constant=constant)
    )
    yield Finding(
        subject="model",
        severity=None if blamed is None else Severity.INFO,  # how grave that is, BN301 says
        message=_message(last, times, why.clause),
        evidence={
            "evaluation_accuracy": Quantity(
                last.accuracy or 0.0,
                f"on {last.examples:,} examples",
                moments.binomial_interval(last.accuracy or 0.0, last.examples),
            ),
            "chance": Quantity(chance, "what always naming the most frequent class gives"),
            "evaluations": Quantity(times, "in a row at chance"),
            **({"training_accuracy": Quantity(last.train_accuracy)} if last.train_accuracy is not None else {}),
        },
        notes=(
            *_odds(last, chance),
            *why.notes,
            *innocence(cells),
        ),
        helps=why.helps,
    )


def _message(last: EvaluationRecord, stuck: int, clause: str) -> str:
    times = f"{stuck} evaluations in a row" if stuck > 1 else "this evaluation"
    both = f" (training {last.train_accuracy:.1%})" if last.train_accuracy is not None else ""
    return f"accuracy is at chance level, {last.accuracy:.1%}{both}, in {times}: {clause}"


def _odds(last: EvaluationRecord, chance: float) -> tuple[str, ...]:
    if last.accuracy is None:
        return ()
    p = moments.binomial_survival(round(last.accuracy * last.examples), last.examples, chance)
    return (
        f"always naming the most frequent class is right for {chance:.1%}; guessing gets this far with p = {p:.2g}",
    )
