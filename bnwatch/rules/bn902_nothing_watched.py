"""BN902: there is no batch normalization to watch."""

from __future__ import annotations

from typing import TYPE_CHECKING

from bnwatch.diagnosis import Quantity, Severity
from bnwatch.rules._base import Finding, Limits, rule

if TYPE_CHECKING:
    from collections.abc import Iterator

    from bnwatch.signals import Signals


@rule("BN902", "nothing-watched", severity=Severity.WARNING)
def nothing_watched(signals: Signals, _: Limits) -> Iterator[Finding]:
    """The model has no batch-normalization layer that can be watched."""
    attachment, structure = signals.attachment, signals.structure
    layers = structure.layers if attachment is None and structure is not None else attachment and attachment.layers
    if layers is None:
        return
    unsupported = [f"`{path}`: {reason}" for path, reason in (attachment.unsupported if attachment else {}).items()]
    some = bool(layers or signals.specs)
    if some and not unsupported:
        return
    yield Finding(
        subject="model",
        severity=Severity.INFO if some else Severity.WARNING,
        message=f"{len(unsupported)} of the layers that normalize cannot be watched"
        if some
        else "the model has no batch-normalization layer that can be watched",
        evidence={"unsupported": Quantity(len(unsupported), "layers that normalize but cannot be watched")}
        if unsupported
        else {},
        notes=(*unsupported, *(() if some else ("accuracy is watched all the same (BN302, BN306)",))),
        helps=() if some else ("check that the watched model is the one that is trained",),
    )
