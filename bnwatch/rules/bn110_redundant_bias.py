"""BN110: a bias that batch normalization takes out again."""

from __future__ import annotations

from typing import TYPE_CHECKING

from bnwatch.diagnosis import Quantity, Severity, Skipped
from bnwatch.rules._base import Finding, Limits, blind, named, rule

if TYPE_CHECKING:
    from collections.abc import Iterator

    from bnwatch.signals import Signals


@rule("BN110", "redundant-bias", severity=Severity.INFO)
def redundant_bias(signals: Signals, _: Limits) -> Iterator[Finding | Skipped]:
    """A layer in front of batch normalization with an offset has a bias, which cannot have an effect."""
    yield from blind("BN110", signals)
    places = signals.structure.places() if signals.structure else ()
    inert = _inert(signals)
    layers = list(dict.fromkeys(p.producer for layer, p in places if p.bias and p.producer and layer.path not in inert))
    if not layers:
        return
    what = "1 layer has" if len(layers) == 1 else f"{len(layers)} layers have"
    yield Finding(
        subject="model",
        message=f"{what} a bias that batch normalization takes out again: {named(layers)}",
        evidence={"layers": Quantity(len(layers), "with a redundant bias")},
        notes=("subtracting the batch mean cancels the bias, and beta does its work: it costs memory, not accuracy",),
        helps=(f"{'nobias=True' if signals.adapter == 'bnwatch.chainer' else 'use_bias=False'} in these layers",),
    )


def _inert(signals: Signals) -> set[str]:
    """Return the layers that training runs in inference mode: they subtract a constant, and the bias stays."""
    idle = (table.idle for table in signals.tables)
    return set[str]().union(*idle) - signals.normalized.keys()
