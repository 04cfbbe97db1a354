"""The order of decision: which rule is believed first where several find something, and which finding is read first.

What comes earlier can explain what comes later and never the other way round, so that one sick program has one headline
and the rest follows from it. Calls that are wrong make statistics wrong, statistics that are wrong cost accuracy; a
distance between statistics alone is no fault. Where two rules explain each other's evidence, the one that rests on an
exact fact comes before the one that rests on an estimate.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from bnwatch.diagnosis import Severity

if TYPE_CHECKING:
    from collections.abc import Iterable

    from bnwatch.diagnosis import Diagnosis

NUMERICS = ("BN403", "BN402", "BN401")
"""Numbers that are none: whatever is measured behind them means nothing."""

CALLS = ("BN103", "BN107", "BN104", "BN105", "BN203", "BN211", "BN210", "BN106")
"""Exact facts of how a layer is called, and of whether its statistics moved when they were to."""

SAMPLES = ("BN205", "BN213", "BN204", "BN206")
"""How many examples statistics are made of: too few of them hide every other difference."""

MIXTURES = ("BN101", "BN208", "BN207", "BN209")
"""Statistics of what is not one population: no re-estimate mends them."""

AGE = ("BN202", "BN201")
"""Statistics of one population, and of another time: a re-estimate mends them."""

STATISTICS = (*NUMERICS, *CALLS, *SAMPLES, *MIXTURES, *AGE)

ORDER = (
    *NUMERICS,
    *CALLS,
    "BN102",
    *SAMPLES,
    "BN212",
    *MIXTURES,
    *AGE,
    "BN108",
    "BN306",
    "BN405",
    "BN404",
    "BN304",
    "BN301",
    "BN302",
    "BN303",
    "BN109",
    "BN214",
    "BN305",
    "BN110",
    "BN901",
    "BN902",
    "BN903",
    "BN904",
)
"""Every rule, the one that is believed first at the front."""


CAUSES: dict[str, tuple[str, ...]] = {
    "BN402": ("BN403",),
    "BN401": ("BN403", "BN402"),
    "BN104": ("BN107",),
    "BN203": ("BN107", "BN104", "BN105"),
    "BN211": ("BN107", "BN104", "BN203"),
    "BN210": ("BN107", "BN104", "BN105", "BN203", "BN211"),
    "BN106": ("BN103", "BN105"),
    "BN213": ("BN205",),
    "BN204": ("BN205", "BN213"),
    "BN206": ("BN103", "BN211", "BN210", "BN205"),
    "BN212": (*NUMERICS, *CALLS, "BN205"),
    "BN101": (*NUMERICS, "BN205"),
    "BN208": (*NUMERICS, "BN205", "BN206", "BN212", "BN101"),
    "BN207": (*NUMERICS, "BN205", "BN206", "BN212", "BN101", "BN208"),
    "BN209": (*NUMERICS, "BN106", "BN205", "BN206", "BN101", "BN208", "BN207"),
    "BN202": (*NUMERICS, *CALLS, *SAMPLES, *MIXTURES),
    "BN201": (*NUMERICS, *CALLS, "BN205", *MIXTURES),
    "BN108": STATISTICS,
    "BN404": (*NUMERICS, "BN104", "BN205", "BN306"),
    "BN405": (*NUMERICS, "BN205"),
    "BN304": (*NUMERICS, *CALLS, "BN205", "BN404"),
    "BN306": NUMERICS,
    "BN301": (*STATISTICS, "BN108", "BN212", "BN404", "BN304"),
    # training at chance is no matter of running statistics: these must be seen to cost accuracy, which is BN301; but
    # what was loaded without them may be trained on in inference mode, as a frozen backbone is
    "BN302": (*NUMERICS, "BN203", "BN211", "BN205", "BN208", "BN207", "BN405", "BN306", "BN301"),
    "BN303": (*STATISTICS, "BN108", "BN212", "BN404", "BN304", "BN301"),
}
"""For each rule those whose diagnoses, of warning or above, explain its own: it is then shown as a consequence."""


def rank(rule_id: str) -> int:
    """Return the place of a rule in the order; one that is not in it comes last."""
    return ORDER.index(rule_id) if rule_id in ORDER else len(ORDER)


def ordered(diagnoses: Iterable[Diagnosis]) -> tuple[Diagnosis, ...]:
    """Return diagnoses as they are to be read: active first, causes before consequences, in order of decision."""
    return tuple(sorted(diagnoses, key=_place))


def _place(diagnosis: Diagnosis) -> tuple[bool, bool, bool, int, int, int, str]:
    """Return what diagnoses are sorted by: what is merely worth knowing never comes before what is wrong."""
    return (
        diagnosis.state != "active",
        bool(diagnosis.causes),
        diagnosis.severity < Severity.WARNING,
        rank(diagnosis.rule),
        -diagnosis.severity,
        diagnosis.step,
        diagnosis.key,
    )
