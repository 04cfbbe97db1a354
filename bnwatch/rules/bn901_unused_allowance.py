"""BN901: an allowance matched nothing."""

from __future__ import annotations

from typing import TYPE_CHECKING

from bnwatch.diagnosis import Severity, Skipped
from bnwatch.rules._base import Finding, Limits, rule

if TYPE_CHECKING:
    from collections.abc import Iterator

    from bnwatch.signals import Signals


@rule("BN901", "unused-allowance", severity=Severity.INFO)
def unused_allowance(signals: Signals, _: Limits) -> Iterator[Finding | Skipped]:
    """An entry of `allow` matched no diagnosis in the whole run."""
    for pattern in signals.unused_allowances:
        yield Finding(
            subject=pattern,
            message=f"the allowance `{pattern}` matched no diagnosis",
            notes=("it may be misspelt, or what it allowed is gone",),
            helps=("remove it, or compare it with the rule and layer names of `bnwatch report`",),
        )
