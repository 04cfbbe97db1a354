"""The totals of the clinic beside those of the field's tools, and the tables of its documentation."""

from __future__ import annotations

import json
from collections import Counter
from typing import TYPE_CHECKING, Any

from benchmarks.clinic.case import INNOCENT, cases, fingerprint
from benchmarks.clinic.peers import NAMES_BATCH_NORM, TOOLS

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    Outcome = dict[str, Any]

HERE = "bnwatch"
WORDS = {"faulty": "faulty", "healthy": "healthy", INNOCENT: "not batch norm"}


def tallies(outcomes: Iterable[Outcome]) -> list[list[str]]:
    """Return a row for bnwatch and each tool of the field.

    A row holds its name, and ``x of n`` in words for four questions: faulty runs of which it reported anything, of
    which it named a cause in batch norm, healthy runs with an alarm, and runs that fail for another reason of which it
    blamed batch norm. A run counts for a tool if it could be shown to it, and for bnwatch alike, for comparison.
    """
    shown = [outcome for outcome in outcomes if TOOLS.keys() <= outcome.get("peers", {}).keys()]
    total = Counter(outcome["kind"] for outcome in shown)
    rows = []
    for tool in (HERE, *TOOLS):
        counted: Counter[str] = Counter()
        for outcome in shown:
            kind = outcome["kind"]
            spoke, named = (
                (bool(outcome["blamed"]), outcome["right"] if kind == "faulty" else _blames_batch_norm(outcome))
                if tool == HERE
                else (bool(outcome["peers"][tool]), bool(outcome["peers"][tool]) and tool in NAMES_BATCH_NORM)
            )
            counted[f"{kind} spoke"] += spoke
            counted[f"{kind} named"] += named
        asked = (("faulty", "spoke"), ("faulty", "named"), ("healthy", "spoke"), (INNOCENT, "named"))
        rows.append([tool, *(f"{counted[f'{kind} {what}']} of {total[kind]}" for kind, what in asked)])
    return rows


def _blames_batch_norm(outcome: Outcome) -> bool:
    return any(key.startswith(("BN1", "BN2")) for key in outcome["blamed"])


QUESTIONS = "faulty: anything reported", "faulty: batch norm named", "healthy: alarm", "other faults: batch norm blamed"


def peers_text(outcomes: Iterable[Outcome]) -> str:
    """Return the tallies as text for the terminal, and why runs could not be shown to the tools."""
    outcomes = list(outcomes)
    rows = [["", *QUESTIONS], *tallies(outcomes)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    refused = [outcome for outcome in outcomes if "none" in outcome.get("peers", {})]
    lines += [f"not shown to the tools: {o['case']} seed {o['seed']}: {o['peers']['none'][0]}" for o in refused]
    return "\n".join(lines)


def kept(out: Path) -> tuple[list[Outcome], int]:
    """Return the results that stand in a folder, those of all cases there are, and how many are of older code."""
    outcomes, old = [], 0
    for one in cases().values():
        for seed in range(one.seeds):
            path = out / one.framework / f"{one.name.replace('/', '_')}-{seed}.json"
            if path.is_file():
                outcomes.append(json.loads(path.read_text(encoding="utf-8")))
                old += outcomes[-1]["code"] != fingerprint(one)
    return outcomes, old


def markdown(outcomes: Iterable[Outcome]) -> str:
    """Return the tables of docs/clinic.md: totals, the tools beside each other, and a line a case."""
    outcomes = list(outcomes)
    parts = [_table(["programs", "runs", "right"], _totals(outcomes))]
    parts.append(_table(["", *QUESTIONS], tallies(outcomes)))
    parts.append(
        _table(["case", "framework", "expected", "headline", "tools that reported something"], _lines(outcomes))
    )
    return "\n\n".join(parts)


def _totals(outcomes: list[Outcome]) -> list[list[str]]:
    rows = []
    for kind, words in WORDS.items():
        some = [outcome for outcome in outcomes if outcome["kind"] == kind]
        programs = len({outcome["case"] for outcome in some})
        rows.append([f"{programs} {words}", str(len(some)), str(sum(outcome["right"] for outcome in some))])
    return rows


def _lines(outcomes: list[Outcome]) -> list[list[str]]:
    rows = []
    for name, framework in dict.fromkeys((outcome["case"], outcome["framework"]) for outcome in outcomes):
        some = [outcome for outcome in outcomes if (outcome["case"], outcome["framework"]) == (name, framework)]
        first = some[0]
        expected = " or ".join(first["expected"]) or "silence"
        expected = {INNOCENT: f"{WORDS[INNOCENT]} {' or '.join(first['expected'])}".strip()}.get(
            first["kind"], expected
        )
        said = ", ".join(dict.fromkeys(map(_said, some)))
        wrong = "" if all(outcome["right"] for outcome in some) else " (wrong)"
        tools = [tool for tool in TOOLS if any(outcome.get("peers", {}).get(tool) for outcome in some)]
        rows.append([name, framework, expected, f"{said}{wrong}", ", ".join(tools)])
    return rows


def _said(outcome: Outcome) -> str:
    headline = outcome.get("headline") or "silence"
    return f"{headline} (info)" if outcome.get("severity") == "info" else headline


def _table(head: list[str], rows: Iterable[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
