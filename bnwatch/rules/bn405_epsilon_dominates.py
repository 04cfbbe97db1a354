"""BN405: the variance of the input is far below epsilon."""

from __future__ import annotations

from typing import TYPE_CHECKING

from bnwatch.diagnosis import Quantity, Severity, Skipped
from bnwatch.rules._base import Finding, Limits, Threshold, named, rule, stuck

if TYPE_CHECKING:
    from collections.abc import Iterator

    from bnwatch.signals import Signals


@rule(
    "BN405",
    "epsilon-dominates",
    severity=Severity.WARNING,
    share=Threshold(0.5, "derived", "of variance plus epsilon: the output then has less than .71 of its size"),
    alpha=Threshold(1e-3, "convention", "probability that a guesser reaches this accuracy: above it, it is chance"),
    patience=Threshold(3, "convention", "evaluations in a row at chance, training and evaluation"),
)
def epsilon_dominates(signals: Signals, limits: Limits) -> Iterator[Finding | Skipped]:
    """The variance of a layer's input is below epsilon, so the layer does not normalize."""
    table = signals.table
    if table is None:
        return
    epsilon, batch_std = signals.of_layers("epsilon"), table.column("batch_std").astype(float)
    dominates = epsilon > limits["share"] * (batch_std**2 + epsilon)
    varying = (table.column("count") > 1) & (table.column("zero_variance") < signals.of_layers("channels"))
    small = list(signals.at(dominates & varying))
    if not small:
        return
    first = small[0]
    learns = stuck(signals, limits["alpha"]) < limits["patience"]
    first_of_all = table.sites[0] == first.site
    size = (1.0 - first.epsilon_share) ** 0.5
    yield Finding(
        subject=first.spec.path,
        severity=Severity.INFO if learns else None,
        message=f"`{first.spec.path}` sees a variance of {first.batch_std**2:.2g}, below its epsilon of "
        f"{first.spec.epsilon:g}: it does not normalize" + ("" if learns else ", and accuracy is what guessing gives"),
        evidence={
            "epsilon_share": Quantity(first.epsilon_share, "of the mean variance plus epsilon"),
            "batch_std": Quantity(first.batch_std, "what enters"),
            "layers": Quantity(len({s.spec.path for s in small}), f"affected: {named(s.spec.path for s in small)}"),
        },
        notes=(
            f"its output has about {size:.2g} of the size it is meant to have, and shrinks with its input",
            *(("it is the first of these layers: likely its inputs are scaled down twice",) if first_of_all else ()),
            "accuracy is above chance, so it does no visible harm"
            if learns
            else "what decides: train a few hundred steps with inputs of mean 0 and variance 1",
        ),
        helps=(
            "look at the inputs as the model gets them: mean, standard deviation, smallest and largest value "
            "(x / 255 twice leaves 0 to 0.004)",
            "if they are meant to be that small, build the layer with a smaller epsilon",
        ),
    )
