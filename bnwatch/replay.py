"""Replay: the rules anew on a record, with the thresholds of today or others."""

from __future__ import annotations

import difflib
import glob
from typing import TYPE_CHECKING, Any

from bnwatch.diagnosis import Report
from bnwatch.engine import Allowances, Engine
from bnwatch.order import ordered
from bnwatch.rules import CATALOGUE
from bnwatch.signals import Signals

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from bnwatch.diagnosis import Diagnosis
    from bnwatch.sinks.tensorboard import RunRecord

    Thresholds = Mapping[str, Mapping[str, float]]

_OF_THE_WATCH = frozenset({"BN901", "BN903", "BN904"})
"""Rules about the watch itself: what they looked at is in no record, so what they said then stands."""


def replay(run: RunRecord, thresholds: Thresholds | None = None) -> Report:
    """Return what the rules say of a recorded run.

    Findings that were allowed then are allowed again.

    Args:
        run: the record.
        thresholds: numbers that differ from those of the catalogue, by rule id and name.
    """
    kept = [diagnosis for diagnosis in run.report.diagnoses if diagnosis.rule in _OF_THE_WATCH]
    rules = [rule for rule in CATALOGUE if rule.id not in _OF_THE_WATCH]
    engine = Engine(_allowed(run.report.diagnoses), rules, thresholds)
    signals = Signals()
    signals.specs.update(run.specs)
    if run.attachment is not None:
        signals.attach(run.attachment)
        engine.run(signals)
    if run.structure is not None:
        signals.structure = run.structure
        engine.run(signals)
    for group in _in_turn(run):
        for item in group:
            signals.take(item)
        engine.run(signals)
    if run.report.complete:
        signals.ended = True
        engine.run(signals)
    skipped = [entry for entry in run.report.skipped if entry.rule in _OF_THE_WATCH]
    return Report(
        run=run.report.run,
        diagnoses=ordered([*engine.diagnoses, *kept]),
        skipped=(*engine.skipped, *skipped),
        layers=run.report.layers,
        sites=run.report.sites,
        samples=run.report.samples,
        steps=run.report.steps,
        evaluations=run.report.evaluations,
        complete=run.report.complete,
    )


def parse_thresholds(settings: Iterable[str]) -> dict[str, dict[str, float]]:
    """Return thresholds by rule id and name, from texts such as ``BN101.alpha=1e-6``.

    Raises:
        ValueError: a text is none; the message names it and what is accepted.
    """
    known = {f"{rule.id}.{name}": (rule.id, name) for rule in CATALOGUE for name in rule.thresholds}
    found: dict[str, dict[str, float]] = {}
    for setting in settings:
        place, equals, number = setting.partition("=")
        if not equals or place not in known:
            near = difflib.get_close_matches(place, known, 1)
            hint = f"did you mean {near[0]}?" if near else "`bnwatch rules` lists them"
            msg = f"no threshold {setting!r}, which is to be like 'BN101.alpha=1e-6'; {hint}"
            raise ValueError(msg)
        try:
            value = float(number)
        except ValueError:
            msg = f"{setting!r} sets a threshold to no number"
            raise ValueError(msg) from None
        rule_id, name = known[place]
        found.setdefault(rule_id, {})[name] = value
    return found


def _allowed(diagnoses: Iterable[Diagnosis]) -> Allowances:
    return Allowances({f"{d.rule}:{glob.escape(d.subject)}": d.reason for d in diagnoses if d.reason})


def _in_turn(run: RunRecord) -> Iterator[tuple[Any, ...]]:
    """Yield what was seen in the order in which it is seen while training; what is judged together in one tuple."""
    measured: dict[int, list[Any]] = {}
    experiments: tuple[Any, ...] = (*run.cells, *run.entering, *run.compositions)
    for item in experiments:
        measured.setdefault(item.step, []).append(item)
    singles: tuple[tuple[Any, ...], ...] = (run.tables, run.looks, run.evaluations, run.replicas)
    turns: list[tuple[int, int, tuple[Any, ...]]] = []
    for place, items in enumerate(singles):
        turns += [(item.step, place, (item,)) for item in items]
    turns += [(step, len(singles), tuple(items)) for step, items in measured.items()]
    turns += [(item.step, len(singles) + 1, (item,)) for item in run.attributions]
    for _, _, group in sorted(turns, key=lambda turn: turn[:2]):
        yield group
