"""BN903: the watch failed and switched itself off."""

from __future__ import annotations

from typing import TYPE_CHECKING

from bnwatch.diagnosis import Severity, Skipped
from bnwatch.rules._base import Finding, Limits, rule

if TYPE_CHECKING:
    from collections.abc import Iterator

    from bnwatch.signals import Signals


@rule("BN903", "watch-disabled", severity=Severity.WARNING)
def watch_disabled(signals: Signals, _: Limits) -> Iterator[Finding | Skipped]:
    """An internal error switched the watch off; training goes on unwatched."""
    if signals.faults:
        yield Finding(
            subject="bnwatch",
            message=f"bnwatch switched itself off: {signals.faults[0]}",
            notes=("training goes on, unwatched from here; its weights and results are not affected",),
            helps=("please report it with the text above and the versions of Python, framework and bnwatch",),
        )
