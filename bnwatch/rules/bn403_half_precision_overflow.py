"""BN403: running statistics beyond what float16 holds."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from bnwatch.diagnosis import Quantity, Severity, Skipped
from bnwatch.rules._base import Finding, Limits, Threshold, rule
from bnwatch.signals import STATISTICS, Flag

if TYPE_CHECKING:
    from collections.abc import Iterator

    from bnwatch.records import CallSite
    from bnwatch.signals import Signals

LARGEST = 65504.0
"""The largest number of float16."""

KEEP = {
    "bnwatch.chainer": (
        "Chainer: chainer.global_config.dtype = chainer.mixed16, or L.BatchNormalization(size, dtype=numpy.float32): "
        "computes in half precision and keeps statistics in float32"
    ),
    "bnwatch.keras": (
        "Keras: the policy mixed_float16 in place of float16: computes in half precision and keeps statistics in "
        "float32"
    ),
}


@rule(
    "BN403",
    "half-precision-overflow",
    severity=Severity.ERROR,
    share=Threshold(0.5, "convention", "share of the largest float16: a batch of twice the variance overflows"),
)
def half_precision_overflow(signals: Signals, limits: Limits) -> Iterator[Finding | Skipped]:
    """Running statistics are kept in float16, and the variance goes beyond what that holds."""
    seen = [(s, _largest(signals, s.site)) for s in signals.sites(Flag.HALF)]
    over = [(s, largest) for s, largest in seen if largest > limits["share"] * LARGEST]
    if not over:
        return
    first, largest = over[0]
    gone = any(s.flag & (Flag.NON_FINITE_RUNNING | Flag.NON_FINITE_BATCH) for s, _ in over)
    yield Finding(
        subject=first.spec.path,
        severity=None if gone else Severity.WARNING,
        message=f"`{first.spec.path}` keeps its running statistics in float16, and a variance "
        + (f"of {largest:,.0f}" if math.isfinite(largest) else "beyond its range")
        + (" is infinity there" if gone else f" is near {LARGEST:,.0f}, the most that it holds"),
        evidence={
            "variance": Quantity(largest, "largest seen, mean over channels"),
            "largest": Quantity(LARGEST, "that float16 holds"),
            "sites": Quantity(len(over), "call sites affected"),
        },
        notes=(
            "activations of size 256 have a variance of 65,536: float16 holds them, and not their squares",
            "divided by the root of infinity every output is 0 in evaluation, whatever the input"
            if gone
            else "a batch with a larger variance makes it infinity, which a moving average never forgets",
        ),
        helps=(
            *(how for adapter, how in KEEP.items() if signals.adapter in {adapter, None}),
            "scale the inputs down, best to mean 0 and variance 1",
        ),
    )


def _largest(signals: Signals, site: CallSite) -> float:
    """Return the largest variance that a call site showed or held in any sample."""
    columns = [STATISTICS.index(name) for name in ("batch_std", "running_std")]
    squares = [
        float(table.values[table.sites.index(site), column]) ** 2
        for table in signals.tables
        if site in table.sites
        for column in columns
    ]
    return max((square for square in squares if not math.isnan(square)), default=0.0)
