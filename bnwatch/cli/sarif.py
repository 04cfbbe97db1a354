"""SARIF 2.1.0, which code hosts show as annotations: https://docs.oasis-open.org/sarif/sarif/v2.1.0/."""

from __future__ import annotations

import re
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import bnwatch
from bnwatch import render
from bnwatch.cli.report import name_below
from bnwatch.records import CallSite
from bnwatch.rules import CATALOGUE

if TYPE_CHECKING:
    from bnwatch.cli.report import Shown
    from bnwatch.diagnosis import Diagnosis, Severity
    from bnwatch.rules import Rule
    from bnwatch.sinks.tensorboard import RunRecord

_SCHEMA = "https://docs.oasis-open.org/sarif/sarif/v2.1.0/errata01/os/schemas/sarif-schema-2.1.0.json"
_CALLS = 20
"""Lines that a layer is called from, at most: a code host shows no more."""
_LEVELS = {"info": "note", "warning": "warning", "error": "error"}


def sarif(shown: Shown) -> str:
    """Return one SARIF log with one run of the tool, whatever the number of trainings.

    What cleared is left out, so that a host closes it; what is allowed is there and suppressed. Rules that could not
    look and damage in the record are notifications of the tool.
    """
    places = {rule.id: place for place, rule in enumerate(CATALOGUE)}
    named = [(name_below(shown.top, run), run) for run in shown.runs]
    return render.dumps(
        {
            "$schema": _SCHEMA,
            "version": "2.1.0",
            "runs": [
                {
                    "tool": {
                        "driver": {
                            "name": "bnwatch",
                            "version": bnwatch.__version__,
                            "rules": [_rule(rule) for rule in CATALOGUE],
                        }
                    },
                    "automationDetails": {"id": "bnwatch/"},
                    "columnKind": "unicodeCodePoints",
                    "invocations": [
                        {
                            "executionSuccessful": True,
                            "toolExecutionNotifications": [n for name, run in named for n in _notes(name, run, places)],
                        }
                    ],
                    "results": [
                        _result(name, run, diagnosis, places)
                        for name, run in named
                        for diagnosis in run.report.diagnoses
                        if diagnosis.state != "cleared"
                    ],
                }
            ],
        },
        indent=2,
    )


def _rule(rule: Rule) -> dict[str, Any]:
    try:
        page = rule.page()
    except OSError:
        page = rule.summary
    return {
        "id": rule.id,
        "name": rule.name,
        "shortDescription": {"text": rule.summary},
        "help": {"text": page, "markdown": page},
        "defaultConfiguration": {"level": _level(rule.severity)},
    }


def _level(severity: Severity) -> str:
    return _LEVELS[str(severity)]


def _result(name: str, run: RunRecord, diagnosis: Diagnosis, places: dict[str, int]) -> dict[str, Any]:
    result: dict[str, Any] = {
        "ruleId": render.clean(diagnosis.rule),
        "level": _level(diagnosis.severity),
        "message": {"text": _plain(diagnosis.message), "markdown": render.diagnosis_markdown(diagnosis)},
        "locations": [_location(run, diagnosis.subject)],
        # the same finding of the next training is the same alert; several trainings are told apart by their names
        "partialFingerprints": {
            "bnwatch/v1": render.clean(diagnosis.key if name == "." else f"{name} {diagnosis.key}")
        },
        "properties": {
            "run": render.clean(name),
            "state": diagnosis.state,
            "firstStep": diagnosis.step,
            "lastStep": diagnosis.last_step,
            "epoch": diagnosis.epoch,
        },
    }
    if calls := _calls(run, diagnosis.subject):
        result["relatedLocations"] = calls
    if diagnosis.rule in places:
        result["ruleIndex"] = places[diagnosis.rule]
    if diagnosis.state == "allowed":
        result["suppressions"] = [{"kind": "external", "justification": render.shorten(diagnosis.reason or "")}]
    return result


def _location(run: RunRecord, subject: str) -> dict[str, Any]:
    """Return the layer, and the line that built it, or the first that calls it, where one of them is known."""
    path = render.shorten(subject)
    location: dict[str, Any] = {
        "logicalLocations": [{"fullyQualifiedName": path, "kind": "module" if subject == "model" else "object"}]
    }
    spec = run.specs.get(subject)
    lines = () if spec is None else (spec.built_at, *spec.called_at)
    place = next(filter(None, map(_place, lines)), None)
    return location if place is None else {**location, "physicalLocation": place}


def _calls(run: RunRecord, subject: str) -> list[dict[str, Any]]:
    """Return the lines that a layer is called from, each once."""
    spec = run.specs.get(subject)
    sites: dict[str, list[str]] = {}
    for index, line in enumerate(() if spec is None else spec.called_at):
        sites.setdefault(line or "", []).append(str(CallSite(subject, index)))
    known = [(place, names) for line, names in sites.items() if (place := _place(line)) is not None]
    return [
        {"id": number, "physicalLocation": place, "message": {"text": _plain(f"{', '.join(names)} called here")}}
        for number, (place, names) in enumerate(known[:_CALLS])
    ]


def _place(line: str | None) -> dict[str, Any] | None:
    found = re.fullmatch(r"(.+):(\d{1,9})", line or "", re.DOTALL)
    if found is None or not int(found[2]):
        return None
    return {"artifactLocation": {"uri": _uri(found[1])}, "region": {"startLine": int(found[2])}}


def _uri(path: str) -> str:
    """Return a file relative to the current directory, as code hosts want it, where it lies below."""
    here = Path.cwd().as_posix().rstrip("/") + "/"
    path = path.replace("\\", "/").removeprefix(here)
    lead = "file://" if path.startswith("/") else ""
    return lead + quote(str(PurePosixPath(path)), errors="surrogatepass")


def _notes(name: str, run: RunRecord, places: dict[str, int]) -> list[dict[str, Any]]:
    notes = [
        {
            "level": "note",
            "message": {"text": _plain(f"{name}: {skipped.rule} could not look: {skipped.reason}")},
            **({"associatedRule": {"id": skipped.rule}} if skipped.rule in places else {}),
        }
        for skipped in run.report.skipped
    ]
    return notes + [{"level": "warning", "message": {"text": _plain(problem)}} for problem in run.problems]


def _plain(text: str) -> str:
    """Return a message in which nothing is a link or a placeholder."""
    return re.sub(r"([\\\[\]])", r"\\\1", render.shorten(text)).replace("{", "{{").replace("}", "}}")
