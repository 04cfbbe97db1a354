"""BN102: a layer normalizes another axis than that of the channels."""

from __future__ import annotations

from typing import TYPE_CHECKING

from bnwatch.diagnosis import Quantity, Severity, Skipped
from bnwatch.rules._base import Finding, Limits, blind, rule

if TYPE_CHECKING:
    from collections.abc import Iterator

    from bnwatch.records import Place
    from bnwatch.signals import Signals


@rule("BN102", "wrong-channel-axis", severity=Severity.WARNING)
def wrong_channel_axis(signals: Signals, _: Limits) -> Iterator[Finding | Skipped]:
    """The normalized axis is not that of the channels of the data layout."""
    yield from blind("BN102", signals)
    found: dict[str, Place] = {}
    undecided: dict[str, Place] = {}
    for layer, place in signals.structure.places() if signals.structure else ():
        if place.axis is None or place.rank is None:
            continue
        usual = 1 if signals.adapter == "bnwatch.chainer" else place.rank - 1
        if place.channel_axis is None and place.axis != usual:
            undecided.setdefault(layer.path, place)
        if place.channel_axis not in (None, place.axis):
            found.setdefault(layer.path, place)
    for path, place in undecided.items():
        if path not in found:
            why = "the layers before it do not say whether that is the axis of the channels"
            yield Skipped("BN102", f"`{path}` normalizes axis {place.axis}, and {why}")
    for path, place in found.items():
        yield _finding(path, place, signals.adapter)


def _finding(path: str, place: Place, adapter: str | None) -> Finding:
    layout, right = place.layout, place.channel_axis
    made_by = f"`{place.producer}` ({place.kind})" if place.producer else "the model's input"
    return Finding(
        subject=path,
        message=f"`{path}` normalizes axis {place.axis} of {place.rank}, and the channels of {made_by} are in axis "
        f"{right}",
        evidence={
            "axis": Quantity(place.axis or 0, "normalized"),
            "channel_axis": Quantity(right or 0, f"of data laid out {layout}"),
            "rank": Quantity(place.rank or 0, "axes, the first for the examples"),
        },
        notes=(
            (
                "each row or position then gets a mean and variance of its own, and the channels share them: accuracy "
                "may look well until inputs are shifted"
            ),
        ),
        helps=(
            f"for data laid out {layout} build the layer {_right(place, adapter)}",
            "if normalizing positions is what you want, allow it with that reason",
        ),
    )


def _right(place: Place, adapter: str | None) -> str:
    """Return how a layer is given the axis of the channels; Chainer's argument names the other axes."""
    right, rank = place.channel_axis or 0, place.rank or 0
    if adapter == "bnwatch.chainer":
        others = tuple(axis for axis in range(rank) if axis != right)
        return "without axis=" if right == 1 else f"with axis={others}, the axes that share a mean and a variance"
    return "with axis=1" if right == 1 else "with axis=-1 (the default)"
