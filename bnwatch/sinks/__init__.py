"""Where what was seen and concluded goes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol, TypeAlias

if TYPE_CHECKING:
    from bnwatch.diagnosis import Diagnosis, Report, Skipped
    from bnwatch.evidence import Attribution, Cells, Composition, Entering, Look
    from bnwatch.records import Attachment, ChannelStatistics, EvaluationRecord, Structure
    from bnwatch.signals import Replicas, SignalTable

    Measured: TypeAlias = Cells | Attribution | Composition | Entering | Look | Replicas
    Seen: TypeAlias = Attachment | Structure | SignalTable | ChannelStatistics | EvaluationRecord | Measured
    Item: TypeAlias = Seen | Diagnosis | Skipped


class Sink(Protocol):
    """A place to write to; two methods and no more."""

    def write(self, item: Item, /) -> None:
        """Take one item: what was seen, or a diagnosis each time it appears, changes or clears."""

    def close(self, report: Report, /) -> None:
        """Write what is known at the end and close; a second call does nothing."""
