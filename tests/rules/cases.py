"""Runs the tables of a rule: name -> builder of the signals it looks at.

A name that begins with ``above_X`` or ``below_X`` is the case just above or just below the threshold ``X``;
``test_catalogue.py`` asks for both of every threshold.
"""

import pytest

from bnwatch.diagnosis import Severity, Skipped
from bnwatch.rules import CATALOGUE, Finding

TABLES = ("FIRES", "INFO", "QUIET", "SKIPS")


def rule(rule_id):
    return next(r for r in CATALOGUE if r.id == rule_id)


def look(rule_id, signals):
    """Return the findings and what was skipped."""
    outcomes = rule(rule_id).check(signals)
    return [o for o in outcomes if isinstance(o, Finding)], [o for o in outcomes if isinstance(o, Skipped)]


def severities(rule_id, findings):
    return {finding.severity or rule(rule_id).severity for finding in findings}


def runner(rule_id, *, fires=None, info=None, quiet=None, skips=None):
    """Return the test of the tables of one rule; a case of ``skips`` is a builder and what the skip asks for."""
    tables = {"fires": fires or {}, "info": info or {}, "quiet": quiet or {}, "skips": skips or {}}
    cases = [
        pytest.param(kind, case, id=f"{kind}-{name}") for kind, table in tables.items() for name, case in table.items()
    ]

    @pytest.mark.parametrize(("kind", "case"), cases)
    def test(kind, case):
        build, needs = case if kind == "skips" else (case, None)
        findings, skipped = look(rule_id, build())
        if kind == "fires":
            assert findings
            assert min(severities(rule_id, findings)) >= min(Severity.WARNING, rule(rule_id).severity)
        elif kind == "info":
            assert severities(rule_id, findings) == {Severity.INFO}
        elif kind == "quiet":
            assert findings == []
            assert skipped == []
        else:
            assert findings == []
            assert {s.rule for s in skipped} == {rule_id}
            assert needs in {s.needs for s in skipped}

    return test
