"""Add up the results of all test sessions: why tests were skipped, and one last line of totals.

``python tests/summary.py FOLDER SESSION...`` reads ``FOLDER/SESSION.xml``, which pytest wrote, and
``FOLDER/SESSION+PART.xml`` of a session that runs it several times. The exit status is 0 only if none failed and every
session ran at least one test, or says itself why it could not: it then left one testcase, skipped with the type
``session``.
"""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path
from xml.etree import ElementTree as ET


def outcome(case: ET.Element) -> tuple[str, str]:
    """Return ``passed``, ``failed`` or ``skipped``, and why it was skipped."""
    if case.find("failure") is not None or case.find("error") is not None:
        return "failed", ""
    skipped = case.find("skipped")
    if skipped is None:
        return "passed", ""
    return "skipped", skipped.get("message") or "no reason given"


def main(arguments: list[str]) -> int:
    """Print the summary of the sessions and return the exit status."""
    folder, *sessions = arguments
    total: Counter[str] = Counter()
    sound = True
    for session in sessions:
        try:
            paths = [Path(folder) / f"{session}.xml", *sorted(Path(folder).glob(f"{session}+*.xml"))]
            results = [ET.parse(path).getroot() for path in paths]  # noqa: S314  written by our own pytest
        except (OSError, ET.ParseError):
            print(f"{session}: no result, its tests did not run to the end")
            sound = False
            continue
        counts: Counter[str] = Counter()
        reasons: Counter[str] = Counter()
        for case in (case for result in results for case in result.iter("testcase")):
            name, reason = outcome(case)
            counts[name] += 1
            if reason:
                reasons[reason] += 1
        for reason, times in sorted(reasons.items()):
            print(f"{session}: skipped {times}: {reason}")
        if not counts["passed"] + counts["failed"] and results[0].find(".//skipped[@type='session']") is None:
            print(f"{session}: ran no test")
            sound = False
        total += counts
    print(", ".join(f"{total[name]} {name}" for name in ("passed", "failed", "skipped")))
    return 0 if sound and not total["failed"] else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
