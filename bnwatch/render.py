"""Placeholder until the record branch lands."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from bnwatch.diagnosis import Diagnosis


def diagnosis_text(diagnosis: Diagnosis, consequences: Sequence[Diagnosis] = ()) -> str:
    """Return the diagnosis as text."""
    lines = []
    for d in (diagnosis, *consequences):
        lines += [f"{d.severity}[{d.rule}]: {d.message}", f"  --> {d.subject}, step {d.step}"]
        lines += [f"      {k}: {q.value:.6g} {q.unit}" for k, q in d.evidence.items()]
        if d.table:
            lines += ["      " + "  ".join(d.table.columns)] + ["      " + "  ".join(map(str, r)) for r in d.table.rows]
        lines += [f"  note: {n}" for n in d.notes] + [f"  help: {n}" for n in d.helps]
    return "\n".join(lines)
