"""BN214: padded positions are counted."""

from __future__ import annotations

from typing import TYPE_CHECKING

from bnwatch.diagnosis import Quantity, Severity, Skipped
from bnwatch.rules._base import Finding, Limits, blind, named, rule

if TYPE_CHECKING:
    from collections.abc import Iterator

    from bnwatch.signals import Signals


@rule("BN214", "padding-in-statistics", severity=Severity.INFO)
def padding_in_statistics(signals: Signals, _: Limits) -> Iterator[Finding | Skipped]:
    """Masked positions go into the statistics of batch normalization."""
    if signals.adapter == "bnwatch.chainer":
        yield Skipped("BN214", "Chainer has no masks: which positions are padding is not known")
        return
    yield from blind("BN214", signals)
    padded = {
        layer.path: place.mask
        for layer, place in (signals.structure.places() if signals.structure else ())
        if place.mask is not None and layer.trainable
    }
    if not padded:
        return
    yield Finding(
        subject=next(iter(padded)) if len(padded) == 1 else "model",
        message=f"positions that {named(padded.values())} marks as padding are counted in the statistics of "
        f"{named(padded)}",
        evidence={"layers": Quantity(len(padded), "of batch normalization behind a mask that they do not get")},
        notes=(
            "mean and variance then likely depend on how much of a batch is padding; on small networks it was "
            "harmless as long as training and evaluation pad alike",
            "what decides: evaluation accuracy with the same examples padded to another length",
        ),
        helps=(
            "let the mask reach the layer: Keras 3 counts unmasked positions alone where the layer before hands it on",
            "or sort examples by length, so that batches hold little padding",
        ),
    )
