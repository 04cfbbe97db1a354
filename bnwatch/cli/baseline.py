"""The baseline: a file of diagnoses that are known, so that only what is new fails.

    {"schema": 1, "diagnoses": [{"rule": "BN101", "subject": "bn", "severity": "warning"}]}

It names no run, as the next run has another name.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bnwatch import render
from bnwatch.cli.terminal import MisuseError, cannot, put
from bnwatch.diagnosis import Severity

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from bnwatch.diagnosis import Report

    Known = Mapping[str, Severity]

SCHEMA = 1
_LARGEST = 1 << 24


def write(path: str, reports: Sequence[Report]) -> int:
    """List what is active in any of the reports, and return how many there are.

    Raises:
        MisuseError: the file cannot be written.
    """
    active = [d for report in reports for d in report.diagnoses if d.state == "active"]
    known: dict[tuple[str, str], Severity] = {}
    for diagnosis in active:
        place = diagnosis.rule, diagnosis.subject
        known[place] = max(diagnosis.severity, known.get(place, diagnosis.severity))
    entries = [
        {"rule": rule, "subject": subject, "severity": str(severity)}
        for (rule, subject), severity in sorted(known.items())
    ]
    put(render.dumps({"schema": SCHEMA, "diagnoses": entries}, indent=2), path)
    return len(entries)


def read(path: str) -> Known:
    """Return the known keys with their severities.

    Raises:
        MisuseError: the file cannot be read or is no baseline; the message says where.
    """
    try:
        file = Path(path)
        if file.exists() and not (file.is_file() and file.stat().st_size <= _LARGEST):
            msg = f"{path!r} is no baseline: it is no file, or larger than {_LARGEST >> 20} MB"
            raise MisuseError(msg)
        text = file.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        msg = f"{path!r} is no baseline: it is not JSON"
        raise MisuseError(msg) from None
    except (OSError, ValueError) as error:
        raise MisuseError(cannot("read", path, error)) from None
    try:
        data = json.loads(text)
    except (ValueError, RecursionError) as error:
        where = f" at line {error.lineno}" if isinstance(error, json.JSONDecodeError) else ""
        msg = f"{path!r} is no baseline: it is not JSON{where}"
        raise MisuseError(msg) from None
    try:
        return _parse(data)
    except ValueError as error:
        msg = f"{path!r} is no baseline: {error}; bnwatch report DIR --write-baseline FILE writes one"
        raise MisuseError(msg) from None


def _parse(data: Any) -> Known:
    if not isinstance(data, dict) or not isinstance(data.get("diagnoses"), list):
        msg = "it lists no diagnoses"
        raise ValueError(msg)  # noqa: TRY004 - a file of the wrong form, whatever is wrong with it
    if data.get("schema") != SCHEMA:
        msg = f"its schema is {render.shorten(repr(data.get('schema')), 40)}, and this bnwatch reads {SCHEMA}"
        raise ValueError(msg)
    known = {}
    for place, entry in enumerate(data["diagnoses"], 1):
        texts = [entry.get(name) if isinstance(entry, dict) else None for name in ("rule", "subject", "severity")]
        if not all(isinstance(text, str) for text in texts):
            msg = f"entry {place} must have the texts rule, subject and severity"
            raise ValueError(msg)
        rule, subject, severity = map(str, texts)
        try:
            known[f"{rule} {subject}"] = Severity.parse(severity)
        except ValueError as error:
            msg = f"entry {place}: {render.shorten(str(error), 200)}"
            raise ValueError(msg) from None
    return known


def apply(report: Report, known: Known, path: str) -> Report:
    """Return the report with what is known as allowed; what is graver than it was known to be stays active."""
    return replace(
        report,
        diagnoses=tuple(
            replace(d, state="allowed", reason=f"known, listed in {path}")
            if d.state == "active" and d.severity <= known.get(d.key, 0)
            else d
            for d in report.diagnoses
        ),
    )


def gone(known: Known, reports: Sequence[Report]) -> list[str]:
    """Return the known keys that are active in none of the reports."""
    active = {d.key for report in reports for d in report.diagnoses if d.state == "active"}
    return [key for key in known if key not in active]
