"""What a rule concludes: a diagnosis, or why it could not look."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import IntEnum
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from collections.abc import Mapping

State = Literal["active", "cleared", "allowed"]


class Severity(IntEnum):
    """How much it matters; ordered, so that severities can be compared."""

    INFO = 1
    """Worth knowing."""
    WARNING = 2
    """Accuracy measurably suffers, or will."""
    ERROR = 3
    """The result is wrong."""

    def __str__(self) -> str:
        """Return the lower-case name that users write and read."""
        return self.name.lower()

    @classmethod
    def parse(cls, text: str) -> Severity:
        """Return the severity of that name.

        Raises:
            ValueError: there is none; the message lists what is accepted.
        """
        try:
            return cls[text.upper()]
        except KeyError:
            msg = f"severity must be one of {', '.join(str(s) for s in cls)}, got {text!r}"
            raise ValueError(msg) from None


@dataclass(frozen=True, slots=True)
class Quantity:
    """A measured number and its unit; ``interval`` is its 95 % confidence interval where there is one."""

    value: float
    unit: str = ""
    interval: tuple[float, float] | None = None


@dataclass(frozen=True, slots=True)
class Table:
    """Evidence that reads best side by side; cells are text or numbers."""

    columns: tuple[str, ...]
    rows: tuple[tuple[str | float, ...], ...]


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """One finding about one place, with the numbers that led to it.

    Attributes:
        rule: rule id, ``BN101``.
        name: rule name, ``shared-batch-norm``.
        severity: how much it matters.
        subject: what it is about: a layer path, or ``model``.
        message: one sentence, a fact: no capital, no full stop, no advice.
        step: training step at which it appeared.
        epoch: epoch of that step, from 0.
        last_step: last step at which it still held.
        evidence: measured numbers by name.
        table: evidence to be read side by side.
        further: more of such tables, which explain the first.
        notes: why it is so.
        helps: what to do, one action each, the likeliest first.
        state: active, cleared (no longer holds), or allowed by the user.
        causes: ``rule subject`` of the active diagnoses this one is a consequence of.
        reason: the user's reason, for an allowed diagnosis.
        built_at: ``file.py:12`` where the layer that it is about was built, when known.
    """

    rule: str
    name: str
    severity: Severity
    subject: str
    message: str
    step: int
    epoch: int
    last_step: int
    evidence: Mapping[str, Quantity] = field(default_factory=dict)
    table: Table | None = None
    further: tuple[Table, ...] = ()
    notes: tuple[str, ...] = ()
    helps: tuple[str, ...] = ()
    state: State = "active"
    causes: tuple[str, ...] = ()
    reason: str | None = None
    built_at: str | None = None

    @property
    def tables(self) -> tuple[Table, ...]:
        """Return every table, the first one first."""
        return (*(() if self.table is None else (self.table,)), *self.further)

    @property
    def key(self) -> str:
        """Return ``rule subject``, which identifies the diagnosis within a run."""
        return f"{self.rule} {self.subject}"

    def __str__(self) -> str:
        """Return the diagnosis as a terminal shows it, without colours."""
        from bnwatch import render

        return render.diagnosis_text(self)

    def _repr_html_(self) -> str:
        """Return what a notebook shows."""
        from bnwatch import render

        return render.diagnosis_html(self)


LOOKS_AGAIN = ""
"""Reason of a `Skipped` in a record that takes back the one before: the rule can look again."""


@dataclass(frozen=True, slots=True)
class Skipped:
    """A rule that could not look, and why. "Fine" and "could not look" are never the same.

    ``needs`` names the experiment that would let it look: the ``cells``, their ``attribution`` to layers, a ``look``
    through the network, or one with ``gradients``.
    """

    rule: str
    reason: str
    needs: Literal["cells", "attribution", "look", "gradients"] | None = None


@dataclass(frozen=True, slots=True, repr=False)
class Report:
    """What is known about a run: the last state of every diagnosis, and what could not be looked at.

    Shows itself: as text where Python prints it, as HTML in a notebook.

    Attributes:
        run: directory of the run, or a name.
        diagnoses: causes before their consequences, in the order of decision.
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

    def __repr__(self) -> str:
        """Return the report as text, without colours."""
        from bnwatch import render

        return render.report_text(self)

    def _repr_html_(self) -> str:
        """Return what a notebook shows."""
        from bnwatch import render

        return render.report_html(self)


class BatchNormWarning(UserWarning):
    """Issued once for each diagnosis of severity warning or error; ``-W error::bnwatch.BatchNormWarning`` works."""


class BatchNormError(RuntimeError):
    """Raised into the training for a diagnosis, only where ``on_diagnosis="raise"`` asked for it."""
