"""Where what was seen and concluded goes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from bnwatch.diagnosis import Diagnosis, Skipped
    from bnwatch.evidence import Cells, Look
    from bnwatch.records import Attachment, EvaluationRecord
    from bnwatch.signals import SignalTable

    Item = Attachment | SignalTable | EvaluationRecord | Cells | Look | Diagnosis | Skipped


@dataclass(frozen=True, slots=True)
class Report:
    """What is known about a run: the last state of every diagnosis, and what could not be looked at.

    Attributes:
        run: directory of the run, or a name.
        diagnoses: causes before their consequences, the gravest first.
        skipped: rules that could not look when the run ended, with the reason.
        layers: watched layers.
        sites: call sites seen.
        samples: sampled steps.
        steps: last training step seen.
        evaluations: evaluations seen.
        complete: the run was closed, not cut off.
    """

    run: str
    diagnoses: tuple[Diagnosis, ...] = ()
    skipped: tuple[Skipped, ...] = ()
    layers: int = 0
    sites: int = 0
    samples: int = 0
    steps: int = 0
    evaluations: int = 0
    complete: bool = True


class Sink(Protocol):
    """A place to write to; two methods and no more."""

    def write(self, item: Item, /) -> None:
        """Take one item: what was seen, or a diagnosis each time it appears, changes or clears."""

    def close(self, report: Report, /) -> None:
        """Write what is known at the end and close; a second call does nothing."""
