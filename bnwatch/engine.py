"""Runs the rules: what appears, persists and clears; what is allowed; which diagnosis is a consequence of which."""

from __future__ import annotations

import dataclasses
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

from bnwatch.diagnosis import Diagnosis, Report, Severity, Skipped
from bnwatch.order import ordered
from bnwatch.rules import BEFORE_TRAINING, CATALOGUE
from bnwatch.signals import Signals

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from bnwatch.records import Structure
    from bnwatch.rules import Finding, Rule

QUIET_LOOKS = 2
"""How often in a row a rule must look and find nothing before its diagnosis is cleared: one look may be a fluke."""


class Allowances:
    """The user's ``allow``: ``{"BN101": "why"}`` or ``{"BN101:encoder/*": "why"}``.

    Raises:
        ValueError: an unknown rule, or no reason; the message names the entry and what is accepted.
    """

    def __init__(self, allow: Mapping[str, str] | None, rules: Sequence[Rule] = CATALOGUE) -> None:
        ids = {name: r.id for r in rules for name in (r.id, r.name)}
        self._patterns: list[tuple[str, str, str, str]] = []
        self.unused: set[str] = set()
        for entry, reason in (allow or {}).items():
            name, _, subject = entry.partition(":")
            if name not in ids:
                msg = f"allow: unknown rule {name!r} in {entry!r}; `bnwatch rules` lists them, for example 'BN101'"
                raise ValueError(msg)
            if not str(reason or "").strip():
                msg = f"allow: {entry!r} needs a reason, a non-empty text such as 'siamese towers, same data'"
                raise ValueError(msg)
            self._patterns.append((ids[name], subject or "*", reason, entry))
            self.unused.add(entry)

    @property
    def used(self) -> set[str]:
        """Return the entries that matched a finding."""
        return {entry for *_, entry in self._patterns} - self.unused

    def reason(self, rule: str, subject: str) -> str | None:
        """Return why a finding is allowed, None where it is not; the first entry that matches gives the reason."""
        matching = [
            (reason, entry)
            for id_, pattern, reason, entry in self._patterns
            if id_ == rule and fnmatchcase(subject, pattern)
        ]
        self.unused.difference_update(entry for _, entry in matching)
        return matching[0][0] if matching else None


class Engine:
    """Holds the state of every diagnosis of one run."""

    def __init__(
        self,
        allow: Allowances | None = None,
        rules: Iterable[Rule] = CATALOGUE,
        thresholds: Mapping[str, Mapping[str, float]] | None = None,
    ) -> None:
        """Begin a run without diagnoses; ``thresholds`` differ from those of the catalogue, by rule id and name."""
        self._allow = allow or Allowances(None)
        self._thresholds = thresholds or {}
        self._rules = tuple(rules)
        self._diagnoses: dict[str, Diagnosis] = {}
        self._quiet: dict[str, int] = {}
        self._skipped: dict[str, Skipped] = {}

    @property
    def diagnoses(self) -> tuple[Diagnosis, ...]:
        """Return every diagnosis in its last state: active first, causes before consequences, in order of decision."""
        return ordered(self._diagnoses.values())

    @property
    def skipped(self) -> tuple[Skipped, ...]:
        """Return the rules that could not look the last time."""
        return tuple(self._skipped.values())

    @property
    def quiet(self) -> dict[str, int]:
        """Return how often in a row nothing was found where a diagnosis still stands, by its key."""
        return dict(self._quiet)

    @property
    def appeared(self) -> tuple[Diagnosis, ...]:
        """Return every diagnosis in its last state, in the order they appeared."""
        return tuple(self._diagnoses.values())

    def recall(self, diagnoses: Iterable[Diagnosis], skipped: Iterable[Skipped], quiet: Mapping[str, int]) -> None:
        """Go on from `appeared`, `skipped` and `quiet`."""
        self._diagnoses = {diagnosis.key: diagnosis for diagnosis in diagnoses}
        self._skipped = {entry.rule: entry for entry in skipped}
        self._quiet = dict(quiet)

    def needs(self, *experiments: str) -> bool:
        """Return whether a rule waits for one of these experiments."""
        return any(s.needs in experiments for s in self._skipped.values())

    def holds(self, key: str) -> bool:
        """Return whether the last look that its rule took still found this diagnosis, cleared or not."""
        return not self._quiet.get(key)

    def run(self, signals: Signals, only: str | None = None) -> list[Diagnosis]:
        """Run every rule, or ``only`` one; return the diagnoses that appeared, changed or cleared."""
        before = dict(self._diagnoses)
        for rule in self._rules:
            if only not in (None, rule.id):
                continue
            outcomes = rule.check(signals, self._thresholds.get(rule.id))
            skipped = [outcome for outcome in outcomes if isinstance(outcome, Skipped)]
            self._skipped.pop(rule.id, None)
            if skipped:
                self._skipped[rule.id] = next((s for s in skipped if s.needs), skipped[0])
            found = {self._hold(rule, o, signals) for o in outcomes if not isinstance(o, Skipped)}
            if not skipped:
                self._clear(rule, found)
        self._fold()
        return [d for key, d in self._diagnoses.items() if _changed(before.get(key), d)]

    def _hold(self, rule: Rule, finding: Finding, signals: Signals) -> str:
        step, epoch = signals.step, signals.epoch
        key = f"{rule.id} {finding.subject}"
        known = self._diagnoses.get(key)
        reason = self._allow.reason(rule.id, finding.subject)
        again = known is not None and known.state != "cleared"
        spec = signals.specs.get(finding.subject)
        self._quiet.pop(key, None)
        self._diagnoses[key] = Diagnosis(
            rule=rule.id,
            name=rule.name,
            severity=finding.severity or rule.severity,
            subject=finding.subject,
            message=finding.message,
            step=known.step if known and again else step,
            epoch=known.epoch if known and again else epoch,
            last_step=step,
            evidence=finding.evidence,
            table=finding.table,
            further=finding.further,
            notes=finding.notes,
            helps=finding.helps,
            state="active" if reason is None else "allowed",
            reason=reason,
            built_at=None if spec is None else spec.built_at,
        )
        return key

    def _clear(self, rule: Rule, found: set[str]) -> None:
        for key, diagnosis in self._diagnoses.items():
            if diagnosis.rule != rule.id or key in found or diagnosis.state == "cleared":
                continue
            self._quiet[key] = self._quiet.get(key, 0) + 1
            if self._quiet[key] >= QUIET_LOOKS:
                self._diagnoses[key] = dataclasses.replace(diagnosis, state="cleared")

    def _fold(self) -> None:
        """Name the causes of each active diagnosis: active ones of a rule that explains it, of warning or above."""
        active: dict[str, list[Diagnosis]] = {}
        for diagnosis in self._diagnoses.values():
            if diagnosis.state != "cleared":
                active.setdefault(diagnosis.rule, []).append(diagnosis)
        for rule in self._rules:
            causes = tuple(c.key for id_ in rule.causes for c in active.get(id_, ()) if c.severity >= Severity.WARNING)
            for diagnosis in active.get(rule.id, ()):
                if diagnosis.causes != causes:
                    self._diagnoses[diagnosis.key] = dataclasses.replace(diagnosis, causes=causes)


def _changed(before: Diagnosis | None, now: Diagnosis) -> bool:
    """Return whether a reader would want to be told: numbers that merely moved on are no news."""
    if before is None:
        return True
    return (before.state, before.severity, before.causes, before.step) != (
        now.state, now.severity, now.causes, now.step,
    )  # fmt: skip


def check(structure: Structure, *, run: str, framework: str) -> Report:
    """Return what is known of a model before the first step.

    Args:
        structure: how its layers are connected, and the plan of the training.
        run: a name for the report.
        framework: ``keras`` or ``chainer``, and the version.

    Raises:
        ValueError: a number of the plan is not positive.
    """
    for name in ("batch_size", "steps_per_epoch", "epochs"):
        value = getattr(structure, name)
        if value is not None and value < 1:
            msg = f"{name} must be at least 1, got {value!r}"
            raise ValueError(msg)
    engine = Engine(rules=BEFORE_TRAINING)
    engine.run(Signals(structure=structure, framework=framework))
    return Report(
        run=run,
        diagnoses=engine.diagnoses,
        skipped=engine.skipped,
        layers=len(structure.layers),
        sites=sum(1 for _ in structure.places()),
    )
