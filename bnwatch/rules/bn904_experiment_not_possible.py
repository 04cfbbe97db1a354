"""BN904: an experiment was wanted and could not be run."""

from __future__ import annotations

from typing import TYPE_CHECKING

from bnwatch.diagnosis import Severity, Skipped
from bnwatch.rules._base import Finding, Limits, rule

if TYPE_CHECKING:
    from collections.abc import Iterator

    from bnwatch.signals import Signals


@rule("BN904", "experiment-not-possible", severity=Severity.INFO)
def experiment_not_possible(signals: Signals, _: Limits) -> Iterator[Finding | Skipped]:
    """A diagnosis called for an experiment that could not be run."""
    if signals.refused:
        yield Finding(
            subject="model",
            message=f"an experiment that would decide could not be run: {signals.refused}",
            notes=("diagnoses that rest on it stay undecided",),
            helps=(
                "where outputs are a score for each class: pass `probe=(x, y)` with a few hundred examples and their "
                "class labels",
                f"else compare the evaluation loss before and after `{signals.adapter or 'bnwatch.keras'}"
                ".recalibrate(model, batches)`, on a copy of the model",
            ),
        )
