"""BN205: one element per channel."""

from __future__ import annotations

from typing import TYPE_CHECKING

from bnwatch.diagnosis import Quantity, Severity, Skipped
from bnwatch.rules._base import Finding, Limits, Threshold, rule, within_epochs
from bnwatch.signals import stacked

if TYPE_CHECKING:
    from collections.abc import Iterator

    from bnwatch.signals import Signals


@rule(
    "BN205",
    "single-sample-batch",
    severity=Severity.ERROR,
    samples=Threshold(2, "convention", "sampled steps in a row; one alone may be a trailing batch"),
)
def single_sample_batch(signals: Signals, limits: Limits) -> Iterator[Finding | Skipped]:
    """A layer normalizes one element per channel, so its output is beta whatever the input."""
    if len(signals.tables) < limits["samples"] and all((t.column("count") == 1).any() for t in signals.tables):
        yield from _planned(signals)  # what was sampled so far does not speak against it
    # the last batches of two epochs may be samples in a row, and all that is odd about the training
    last = (within_epochs(signals) or list(signals.tables))[-int(limits["samples"]) :]
    if len(last) < limits["samples"] or any(t.sites != signals.tables[-1].sites for t in last):
        return
    for site in signals.at((stacked("count", [*last, signals.tables[-1]]) == 1).all(axis=0)):
        yield _finding(site.spec.path, site.spec.decay)


def _planned(signals: Signals) -> Iterator[Finding]:
    """Yield the layers that are to normalize one element per channel, as the graph and the size of a batch say."""
    structure = signals.structure
    if structure is None or structure.batch_size is None:
        return
    for layer in structure.layers:
        if layer.trainable and any(structure.batch_size * (place.elements or 2) == 1 for place in layer.places):
            yield _finding(layer.path, layer.decay)


def _finding(path: str, decay: float) -> Finding:
    return Finding(
        subject=path,
        message=f"`{path}` normalizes one element per channel: its output is beta, whatever the input",
        evidence={
            "count": Quantity(1, "element per channel"),
            "effective_samples": Quantity(1, "needed at least 2 for a variance"),
        },
        notes=(
            (
                "with one element the batch mean is the element itself and the batch variance is 0; the running "
                f"variance decays to 0 as {decay:g}^n"
            ),
        ),
        helps=(
            "train with batches of several examples (16 or more)",
            "or use a normalization that does not depend on the batch: GroupNormalization, LayerNormalization",
        ),
    )
