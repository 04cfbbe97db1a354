"""BN204: the noise of batch statistics moves the output."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

from bnwatch import moments
from bnwatch.diagnosis import Quantity, Severity, Skipped
from bnwatch.rules._base import Finding, Limits, Threshold, cells_table, rule, within_epochs
from bnwatch.signals import stacked

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from bnwatch.evidence import Cell, Cells, Statistics
    from bnwatch.signals import Float64, Signals

RECENT = 4
"""Samples of which the largest batch counts: one small batch alone is the last of an epoch."""

ALIKE = 0.8
"""Share of the elements that effective samples must fall short of to be worth a word."""

TWO = 2
"""Elements of which normalization leaves nothing but the order."""


class _Counted(NamedTuple):
    """Call sites by number, their elements a channel, and their effective samples.

    These lie between the examples, which are independent, and the elements, which may not be.
    """

    numbers: list[int]
    elements: Float64
    effective: Float64


@rule(
    "BN204",
    "too-few-samples",
    severity=Severity.WARNING,
    samples=Threshold(12.0, "derived", "effective samples that leave an error of .41 in the variance, sqrt(2/m)"),
    few=Threshold(5.0, "derived", "elements, or examples: fewer independent ones leave an error of .7 in the variance"),
    cost=Threshold(0.01, "convention", "share of the examples: a smaller loss is not worth a warning"),
    alpha=Threshold(1e-3, "convention", "false alarms per experiment (paired test on the same examples)"),
)
def too_few_samples(signals: Signals, limits: Limits) -> Iterator[Finding | Skipped]:
    """Batch statistics are made of so few samples that their noise moves the output."""
    counted = _counted(signals)
    if counted is None:
        return
    fewest, noisiest = int(counted.elements.argmin()), int(counted.effective.argmin())
    elements, samples = float(counted.elements[fewest]), float(counted.effective[noisiest])
    few = _layers(signals, counted, counted.elements < limits["few"])
    row = signals.cells.training if signals.cells is not None else {}
    if not row:
        if signals.evaluations and (elements < limits["few"] or samples < limits["samples"]) and signals.cells is None:
            reason = "whether the noise of batch statistics costs accuracy is not measured yet"
            yield Skipped("BN204", reason, needs="cells")
        if elements < limits["few"]:
            yield _finding(signals, counted.numbers[fewest], elements, elements, layers=few, certain=elements <= TWO)
        return
    gained, p = _gain(signals.cells, row)
    noisy = gained > limits["cost"] and not _dropout(signals)
    if noisy and p < limits["alpha"] and (samples < limits["samples"] or _examples(signals) < limits["few"]):
        number, elements = counted.numbers[noisiest], float(counted.elements[noisiest])
        layers = _layers(signals, counted, counted.effective < limits["samples"])
        yield _finding(signals, number, samples, elements, layers=layers, certain=True)
    elif elements < limits["few"]:
        # that two elements leave but their order is exact: a test on the few examples that were kept adds nothing
        number, certain = counted.numbers[fewest], noisy and elements <= TWO
        yield _finding(signals, number, elements, elements, layers=few, certain=certain)


def _layers(signals: Signals, counted: _Counted, chosen: Iterable[bool]) -> int:
    """Return how many layers the chosen call sites are of."""
    sites = signals.table.sites if signals.table is not None else ()
    return len({sites[number].layer for number, taken in zip(counted.numbers, chosen, strict=True) if taken})


def _gain(cells: Cells | None, row: Mapping[Statistics, Cell]) -> tuple[float, float]:
    """Return what running statistics gain on training examples, and the p-value, of the evaluation's examples as well.

    Small batches leave few training examples to measure: 60 of two are too few to rule out chance.
    """
    gained, p = row["running"].gain_over(row["batch"])
    both = cells.gain("running", "batch") if cells is not None else None
    return gained, p if both is None else min(p, both[1])


def _counted(signals: Signals) -> _Counted | None:
    """Return the call sites that train on two elements a channel or more in their largest recent batch."""
    table, tables = signals.table, within_epochs(signals)[-RECENT:]
    if table is None or len(tables) < 2:  # noqa: PLR2004 - one batch alone may be the last of an epoch
        return None
    largest = stacked("count", tables).max(axis=0)
    numbers = ((largest > 1.0) & (signals.of_layers("trainable") > 0.0)).nonzero()[0]
    if not len(numbers):
        return None
    elements = largest[numbers].astype(float)
    measured = table.column("effective_samples")[numbers].astype(float)
    unknown = measured != measured  # noqa: PLR0124 - NaN
    measured[unknown] = elements[unknown]
    known = _examples(signals)
    examples = list(_positions(signals, numbers.tolist(), elements.tolist())) if math.isinf(known) else known
    return _Counted(numbers.tolist(), elements, measured.clip(examples, elements))


def _positions(signals: Signals, numbers: list[int], elements: list[float]) -> Iterator[float]:
    """Yield the examples behind the elements of each call site, as far as the graph tells; else one."""
    usages = signals.structure.layers if signals.structure is not None else ()
    positions = {usage.path: usage.places[0].elements for usage in usages if usage.places}
    sites = signals.table.sites if signals.table is not None else ()
    for number, count in zip(numbers, elements, strict=True):
        each = positions.get(sites[number].layer)
        yield count / each if each else 1.0


def _examples(signals: Signals) -> float:
    """Return the examples of a batch, infinity where they are not known."""
    if signals.composition is not None:
        return float(signals.composition.median)
    known = signals.structure.batch_size if signals.structure is not None else None
    return float(known) if known else math.inf


def _dropout(signals: Signals) -> bool:
    """Return whether dropout in front of a layer would explain that running statistics do better."""
    return signals.structure is not None and any(place.dropout for _, place in signals.structure.places())


def _finding(signals: Signals, number: int, samples: float, elements: float, *, layers: int, certain: bool) -> Finding:
    site = list(signals.sites())[number]
    row = signals.cells.training if signals.cells is not None else {}
    measured = ""
    if row and certain:
        gained, p = _gain(signals.cells, row)
        measured = (
            f", which costs {100 * gained:.1f} points: {row['batch'].accuracy:.1%} with batch statistics, "
            f"{row['running'].accuracy:.1%} with running ones"
        )
    few = f", of {_examples(signals):.0f} examples" if _examples(signals) < min(elements, samples) else ""
    about = few if samples > ALIKE * elements else f"{few}, worth about {samples:.0f}"
    kept = 1.0 / moments.bessel_factor(elements)
    biased = not site.spec.bessel_corrected and elements < 12.0  # noqa: PLR2004 - a bias of less is lost in the noise
    return Finding(
        subject=site.spec.path,
        severity=None if certain else Severity.INFO,
        message=f"`{site.spec.path}` normalizes with statistics of {elements:.0f} elements a channel{about}{measured}",
        evidence={
            "effective_samples": Quantity(samples, "per batch and channel"),
            "elements": Quantity(elements, "per batch and channel"),
            **({"layers": Quantity(layers, "of which this is so")} if layers > 1 else {}),
            **(
                {"cost": Quantity(gained, "of training accuracy"), "p_value": Quantity(p, "of the paired test")}
                if measured
                else {}
            ),
        },
        table=cells_table(signals.cells) if measured and signals.cells is not None else None,
        notes=(
            f"a mean of m samples is off by 1/sqrt(m) = {samples**-0.5:.2f} standard deviations, a variance by "
            f"sqrt(2/m) = {math.sqrt(2.0 / samples):.0%}: the network is trained through that noise, and evaluation "
            "has none of it",
            *(
                (
                    f"the running variance is kept without Bessel's correction: {elements - 1:.0f}/{elements:.0f} of "
                    f"that of the data, so evaluation makes outputs {kept**-0.5:.2f} times as wide as the data say",
                )
                if biased
                else ()
            ),
            *(("of two elements normalization leaves only which is the larger",) if elements <= TWO else ()),
        ),
        helps=(
            "train with larger batches (16 or more examples)",
            "or use a normalization that does not depend on the batch: GroupNormalization, LayerNormalization",
        ),
    )
