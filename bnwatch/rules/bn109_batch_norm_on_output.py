"""BN109: batch normalization makes the output of the model."""

from __future__ import annotations

from typing import TYPE_CHECKING

from bnwatch.diagnosis import Quantity, Severity, Skipped
from bnwatch.rules._base import Finding, Limits, blind, rule

if TYPE_CHECKING:
    from collections.abc import Iterator

    from bnwatch.signals import Signals


@rule("BN109", "batch-norm-on-output", severity=Severity.INFO)
def batch_norm_on_output(signals: Signals, _: Limits) -> Iterator[Finding | Skipped]:
    """Batch normalization stands on the output of the model: it normalizes scores or probabilities."""
    yield from blind("BN109", signals)
    found: dict[str, int] = {}
    for layer, place in signals.structure.places() if signals.structure else ():
        if place.output:
            found[layer.path] = found.get(layer.path, 0) + 1
    for path, outputs in found.items():
        yield Finding(
            subject=path,
            message=f"`{path}` normalizes an output of the model",
            evidence={"outputs": Quantity(outputs, "of the model made by this layer")},
            notes=(
                (
                    "every output then has the same mean and variance over a batch, whatever the share of its class, "
                    "and the prediction for one example depends on the others of its batch in training"
                ),
            ),
            helps=("end the model with the layer that makes the scores, without batch normalization behind it",),
        )
