"""The totals of the clinic beside those of the field's tools."""

from __future__ import annotations

from typing import Any

from benchmarks.clinic import report
from benchmarks.clinic.peers import TOOLS


def outcome(
    case: str, kind: str, headline: str | None, *, right: bool, peers: Any = (), **changed: Any
) -> dict[str, Any]:
    found = {tool: ["a word"] if tool in peers else [] for tool in TOOLS}
    blamed = [f"{headline} bn"] if headline else []
    expected = ["BN101"] if kind == "faulty" else []
    return {
        "case": case, "seed": 0, "framework": "keras", "kind": kind, "headline": headline, "right": right,
        "blamed": blamed, "expected": expected, "peers": found, **changed,
    }  # fmt: skip


OUTCOMES = [
    outcome("BN-001", "faulty", "BN101", right=True, peers=["TheDeepChecker", "UMLAUT"]),
    outcome("BN-002/b", "faulty", "BN301", right=False, peers=["AUTOTRAINER"]),
    outcome("OK-01", "healthy", None, right=True, peers=["UMLAUT"]),
    outcome("OK-01", "healthy", None, right=True, seed=1),
    outcome("BN-171", "innocent", "BN302", right=True),
    outcome("BN-172", "innocent", "BN201", right=False, peers=["TheDeepChecker"]),
    outcome("BN-003", "faulty", "BN101", right=True) | {"peers": {"none": ["TypeError: no arrays"]}},
]


def test_tallies_count_what_every_tool_was_shown() -> None:
    assert report.tallies(OUTCOMES) == [
        ["bnwatch", "2 of 2", "1 of 2", "0 of 2", "1 of 2"],
        ["TheDeepChecker", "1 of 2", "1 of 2", "0 of 2", "1 of 2"],
        ["AUTOTRAINER", "1 of 2", "0 of 2", "0 of 2", "0 of 2"],
        ["DeepDiagnosis", "0 of 2", "0 of 2", "0 of 2", "0 of 2"],
        ["UMLAUT", "1 of 2", "0 of 2", "1 of 2", "0 of 2"],
    ]


def test_what_could_not_be_shown_is_named() -> None:
    said = report.peers_text(OUTCOMES).splitlines()
    assert said[-1] == "not shown to the tools: BN-003 seed 0: TypeError: no arrays"
    assert len(said) == 7


def test_the_tables_of_the_page() -> None:
    totals, tools, lines = report.markdown(OUTCOMES).split("\n\n")
    assert totals.splitlines()[2:] == [
        "| 3 faulty | 3 | 2 |",
        "| 1 healthy | 2 | 2 |",
        "| 2 not batch norm | 2 | 1 |",
    ]
    assert len(tools.splitlines()) == 7
    assert lines.splitlines()[2:] == [
        "| BN-001 | keras | BN101 | BN101 | TheDeepChecker, UMLAUT |",
        "| BN-002/b | keras | BN101 | BN301 (wrong) | AUTOTRAINER |",
        "| OK-01 | keras | silence | silence | UMLAUT |",
        "| BN-171 | keras | not batch norm | BN302 |  |",
        "| BN-172 | keras | not batch norm | BN201 (wrong) | TheDeepChecker |",
        "| BN-003 | keras | BN101 | BN101 |  |",
    ]
