"""What the composition of the training batches says: whether they are random parts of the data, and what it costs."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

from bnwatch import moments
from bnwatch.diagnosis import Quantity, Table
from bnwatch.rules._base import restores
from bnwatch.signals import LEARNING_ALPHA

if TYPE_CHECKING:
    from collections.abc import Iterator

    from bnwatch.evidence import Cell, Cells, Composition, SiteComposition, Split, Statistics
    from bnwatch.rules._base import Limits
    from bnwatch.signals import Signals

ALPHA, DISPERSION = 1e-3, 2.0
"""False alarms per experiment, and spread of batch means in that of random ones: beyond, batches are not random."""

GROUPS = 0.85
"""Share of the spread, noise taken out, beyond which batches are of two kinds: two halves of a normal distribution
account for 2/pi of its variance, those of a uniform one for 3/4."""

CHANCE = 0.64
"""Few batches may gather in two groups by chance: of n from a uniform distribution one set in a hundred has two groups
that account for more than 3/4 + .64 / sqrt(n), n of 8 to 64."""

SMALLER = 0.2
"""Share of the batches in the smaller group from which it is no outlier."""

FEWEST = 8
"""Batches from which two groups of them are looked for."""

LONGEST = 5
"""Rows of the table."""

OTHERS: dict[Statistics, str] = {
    "reshuffled": "in random batches of the same sizes",
    "running": "with running statistics",
}
"""What the batches as they were are compared with."""


class Dispersed(NamedTuple):
    """Where batches are farthest from random ones."""

    composition: Composition
    site: SiteComposition
    split_share: float

    @property
    def two(self) -> bool:
        """Return whether two groups of batches account for it."""
        enough = self.composition.batches >= FEWEST and self.site.smaller >= SMALLER
        return enough and self.split_share > max(GROUPS, 0.75 + CHANCE / math.sqrt(self.composition.batches))


def dispersed(signals: Signals, limits: Limits) -> Dispersed | None:
    """Return where batch means scatter beyond those of random batches, None where they do nowhere."""
    found = signals.composition
    if found is None:
        return None
    certain = [s for s in found.sites if s.p_value * len(found.sites) < limits["alpha"]]
    far = [s for s in certain if s.dispersion > limits["dispersion"]]
    if not far:
        return None
    site = max(far, key=lambda s: s.dispersion)
    return Dispersed(found, site, min(1.0, site.clusters * site.dispersion / (site.dispersion - 1.0)))


def random(signals: Signals) -> float | None:
    """Return how far batch means spread at most, in those of random batches; None if they are not random or unknown."""
    found = signals.composition
    if found is None or not found.sites or dispersed(signals, {"alpha": ALPHA, "dispersion": DISPERSION}) is not None:
        return None
    return max(site.dispersion for site in found.sites)


class Cost(NamedTuple):
    """What other statistics lose against those of the batches as they were, on the same examples."""

    split: Split
    batch: Cell
    other: Cell
    name: str
    gained: float
    p_value: float

    @property
    def clause(self) -> str:
        """Return the end of a message."""
        return f", which costs {100 * self.gained:.1f} points of {self.split} accuracy"

    @property
    def note(self) -> str:
        """Return what was measured."""
        return (
            f"on the same {self.batch.examples:,} {self.split} examples: {self.batch.accuracy:.1%} in their own "
            f"batches, {self.other.accuracy:.1%} {self.name}"
        )


def cost_of(cells: Cells | None, limits: Limits) -> Cost | None:
    """Return what the batches cost: in random ones, or with running statistics that no re-estimate mends."""
    found = []
    for split, row in cells.rows() if cells is not None else ():
        for other, name in OTHERS.items():
            if other not in row or "batch" not in row:
                continue
            mended = other == "running" and "population" in row
            mended = mended and restores(row["population"], row["batch"], row["running"])
            gained, p = row["batch"].gain_over(row[other])
            if gained > limits["cost"] and p < limits["alpha"] and not mended:
                found.append(Cost(split, row["batch"], row[other], name, gained, p))
    return max(found, key=lambda cost: cost.gained, default=None)


def harmless(cells: Cells | None) -> str:
    """Return what the batches and other statistics give where it is not certain that the batches cost accuracy."""
    names: dict[Statistics, str] = {**OTHERS, "population": "with re-estimated statistics"}
    for split, row in cells.rows() if cells is not None else ():
        others = [f"{row[other].accuracy:.1%} {name}" for other, name in names.items() if other in row]
        if "batch" in row and others:
            batch = row["batch"]
            return (
                f"no lost accuracy can be laid to the batches so far: the same {batch.examples:,} {split} examples "
                f"give {batch.accuracy:.1%} in their own batches, {', '.join(others)}"
            )
    return "whether it costs accuracy is not measured yet"


def guesses(signals: Signals, pure: float) -> bool:
    """Return whether each batch is of one class and the network does no better than guessing on these very batches.

    Normalization takes out of a batch what its examples have in common: here that is what tells the classes apart.
    """
    found, cells = signals.composition, signals.cells
    batch = cells.training.get("batch") if cells is not None else None
    if found is None or batch is None or (found.purity or 0.0) <= pure or not any(labels(found)):
        return False
    right = round(batch.accuracy * batch.examples)
    return moments.binomial_survival(right, batch.examples, batch.majority) >= LEARNING_ALPHA


def evidence(found: Dispersed, cost: Cost | None) -> dict[str, Quantity]:
    """Return the numbers behind it."""
    composition, site = found.composition, found.site
    numbers = {
        "dispersion": Quantity(site.dispersion, f"spread of batch means / of random batches, at {site.subject}"),
        "p_value": Quantity(site.p_value, f"that the {composition.batches} batches are random (F test)"),
        "two_groups": Quantity(found.split_share, "of the spread between batches accounted for by two groups"),
        "smaller": Quantity(site.smaller, "of the batches in the smaller group"),
    }
    if composition.purity is not None and composition.expected is not None:
        numbers["purity"] = Quantity(composition.purity, "of a batch are of its most frequent class")
        numbers["expected_purity"] = Quantity(composition.expected, "are in random batches")
    if cost is not None:
        numbers["cost"] = Quantity(cost.gained, f"of {cost.split} accuracy")
        numbers["cost_p_value"] = Quantity(cost.p_value, "that chance explains the cost (paired, McNemar)")
    return numbers


def table(found: Dispersed) -> Table:
    """Return the call sites at which batches are farthest from random ones."""
    sites = sorted(found.composition.sites, key=lambda s: -s.dispersion)[:LONGEST]
    return Table(
        ("what enters", "spread of batch means / of random ones", "p of random batches", "two groups explain"),
        tuple((s.subject, round(s.dispersion, 1), f"{s.p_value:.1g}", f"{s.clusters:.0%}") for s in sites),
    )


def labels(found: Composition, many: float = 1.5) -> Iterator[str]:
    """Yield what the labels say that batches have in common, where they do."""
    if found.purity is None or found.expected is None or found.purity < many * found.expected:
        return
    yield (
        f"the labels say what batches have in common: {found.purity:.0%} of a batch are of one class, in random "
        f"batches {found.expected:.0%}"
    )
