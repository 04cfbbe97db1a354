"""BN902: there is no batch normalization to watch."""

from __future__ import annotations

from typing import TYPE_CHECKING

from bnwatch.diagnosis import Quantity, Severity, Skipped
from bnwatch.rules._base import Finding, Limits, rule

if TYPE_CHECKING:
    from collections.abc import Iterator

    from bnwatch.signals import Signals


@rule("BN902", "nothing-watched", severity=Severity.WARNING)
def nothing_watched(signals: Signals, _: Limits) -> Iterator[Finding | Skipped]:
    """The model has no batch-normalization layer that can be watched."""
    attachment, structure = signals.attachment, signals.structure
    layers = structure.layers if attachment is None and structure is not None else attachment and attachment.layers
    if layers is None or layers or signals.specs:
        return
    unsupported = [f"`{path}`: {reason}" for path, reason in (attachment.unsupported if attachment else {}).items()]
    yield Finding(
        subject="model",
        message="the model has no batch-normalization layer that can be watched",
        evidence={"unsupported": Quantity(len(unsupported), "layers that normalize but cannot be watched")}
        if unsupported
        else {},
        notes=(*unsupported, "accuracy is watched all the same (BN302, BN306)"),
        helps=("check that the watched model is the one that is trained",),
    )
