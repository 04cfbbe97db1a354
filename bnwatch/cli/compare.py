"""``bnwatch report --compare A B``: what is new, gone and changed, and the accuracies side by side."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from bnwatch import render
from bnwatch.cli.report import load, name_below, tell_problems
from bnwatch.cli.terminal import CLEAN, FOUND, MisuseError, put
from bnwatch.diagnosis import Severity, Table
from bnwatch.sinks import console

if TYPE_CHECKING:
    import argparse

    from bnwatch.diagnosis import Diagnosis, Quantity
    from bnwatch.sinks.tensorboard import RunRecord

_SIDES = ("A", "B")
_UNKNOWN = "-"


@dataclass(frozen=True, slots=True)
class Change:
    """A diagnosis of one run or of both.

    Attributes:
        before: as it is in A, None where it is not there at all.
        after: as it is in B, likewise.
        blind: why its rule could not look in the run where it is not active; None where it could.
    """

    before: Diagnosis | None
    after: Diagnosis | None
    blind: str | None = None

    @property
    def is_new(self) -> bool:
        """Return whether it is active in B only."""
        return _active(self.after) and not _active(self.before)

    @property
    def is_gone(self) -> bool:
        """Return whether it is active in A only."""
        return _active(self.before) and not _active(self.after)

    @property
    def stays(self) -> bool:
        """Return whether it is active in both."""
        return _active(self.before) and _active(self.after)

    @property
    def is_graver(self) -> bool:
        """Return whether it stays and matters more in B."""
        return self.stays and _of(self.after).severity > _of(self.before).severity

    def numbers(self) -> dict[str, tuple[Quantity | None, Quantity | None]]:
        """Return the measured numbers that are not the same in both."""
        if self.before is None or self.after is None:
            return {}
        names = dict.fromkeys([*self.before.evidence, *self.after.evidence])
        pairs = {name: (self.before.evidence.get(name), self.after.evidence.get(name)) for name in names}
        return {name: pair for name, pair in pairs.items() if not _same(*pair)}


@dataclass(frozen=True, slots=True)
class Pair:
    """A run of A and the run of B that it is compared with; None where there is none of that name."""

    name: str
    before: RunRecord | None
    after: RunRecord | None
    changes: tuple[Change, ...]


def compare(options: argparse.Namespace) -> int:
    """Show the comparison, and return whether something new or graver fails.

    Raises:
        MisuseError: what was asked cannot be done.
    """
    for given, what in (
        (options.directory, "DIR"),
        (options.baseline, "--baseline"),
        (options.write_baseline, "--write-baseline"),
    ):
        if given is not None:
            msg = f"--compare A B takes no {what}"
            raise MisuseError(msg)
    if options.format not in _FORMATS:
        msg = f"--compare has the formats {', '.join(_FORMATS)}, not {options.format}"
        raise MisuseError(msg)
    tops = options.compare
    sides = [load(top, options) for top in tops]
    pairs = pair(*({name_below(top, run): run for run in runs} for top, runs in zip(tops, sides, strict=True)))
    color = options.output is None and console.wants_color(sys.stdout)
    put(_FORMATS[options.format](tops, pairs, color), options.output)
    for runs in sides:
        tell_problems(runs)
    limit = Severity.parse(options.fail_on)
    news = [c for p in pairs for c in p.changes if c.is_new or c.is_graver]
    return FOUND if any(_of(change.after).severity >= limit for change in news) else CLEAN


def pair(before: dict[str, RunRecord], after: dict[str, RunRecord]) -> list[Pair]:
    """Return the runs by name; one run on either side is one pair, whatever they are called."""
    if len(before) == len(after) == 1:
        (name, first), (other, second) = *before.items(), *after.items()
        return [Pair(name if name == other else f"{name} and {other}", first, second, _changes(first, second))]
    return [
        Pair(name, before.get(name), after.get(name), _changes(before.get(name), after.get(name)))
        for name in dict.fromkeys([*before, *after])
    ]


def _changes(before: RunRecord | None, after: RunRecord | None) -> tuple[Change, ...]:
    sides = [{d.key: d for d in run.report.diagnoses} if run else {} for run in (before, after)]
    blind = [{s.rule: s.reason for s in run.report.skipped} if run else {} for run in (before, after)]
    changes = []
    for key in dict.fromkeys([*sides[1], *sides[0]]):
        first, second = sides[0].get(key), sides[1].get(key)
        if _active(first) or _active(second):
            other = blind[0] if _active(second) else blind[1]
            rule = _of(first or second).rule
            changes.append(Change(first, second, None if _active(first) and _active(second) else other.get(rule)))
    return tuple(changes)


def _active(diagnosis: Diagnosis | None) -> bool:
    return diagnosis is not None and diagnosis.state == "active"


def _of(diagnosis: Diagnosis | None) -> Diagnosis:
    assert diagnosis is not None  # noqa: S101 - for the reader and for mypy: asked only where it is there
    return diagnosis


def _same(before: Quantity | None, after: Quantity | None) -> bool:
    if before is None or after is None:
        return False
    # as shown: a difference that nobody sees is none
    return render.quantity(before) == render.quantity(after)


# --- what a run has to show ---------------------------------------------------------------------------------------


def _facts(run: RunRecord | None) -> dict[str, float | None]:
    """Return the numbers that stand side by side: accuracies in [0, 1] and counts."""
    if run is None:
        return {}
    known = [e for e in run.evaluations if e.accuracy is not None]
    facts: dict[str, float | None] = {}
    if known:
        last = known[-1]
        facts["training accuracy"], facts["evaluation accuracy"] = last.train_accuracy, last.accuracy
        facts["gap"], facts["best evaluation accuracy"] = last.gap, max(e.accuracy or 0.0 for e in known)
    if run.cells:
        for split, row in run.cells[-1].rows():
            for statistics, cell in row.items():
                facts[f"{split} examples, {_STATISTICS[statistics]}"] = cell.accuracy
    report = run.report
    return facts | {"steps": report.steps, "evaluations": report.evaluations, "layers": report.layers}


_STATISTICS = {
    "batch": "batch statistics",
    "reshuffled": "batch statistics in random batches",
    "running": "running statistics",
    "population": "re-estimated statistics",
}
_COUNTS = ("steps", "evaluations", "layers")


def _table(pair: Pair) -> Table:
    sides = [_facts(pair.before), _facts(pair.after)]
    rows = []
    for name in dict.fromkeys([*sides[0], *sides[1]]):
        values = [side.get(name) for side in sides]
        if any(value is not None for value in values):
            rows.append((name, *(_value(name, value) for value in values), _difference(name, *values)))
    return Table(("", *_SIDES, "B - A"), tuple(rows))


def _value(name: str, value: float | None) -> str:
    if value is None:
        return _UNKNOWN
    return render.number(value) if name in _COUNTS else f"{value:.1%}"


def _difference(name: str, before: float | None, after: float | None) -> str:
    if before is None or after is None or name in _COUNTS:
        return ""
    return f"{100.0 * (after - before):+.1f} points"


# --- text, Markdown, JSON -----------------------------------------------------------------------------------------


def _titled(pair: Pair) -> list[tuple[str, list[str]]]:
    """Return the parts of a comparison: a title and its lines."""
    news = [_line(_of(c.after), _was(c.before, c.blind)) for c in pair.changes if c.is_new]
    gone = [_line(_of(c.before), _now(c.after, c.blind)) for c in pair.changes if c.is_gone]
    stays = [_line(_of(c.after), _other(c)) for c in pair.changes if c.stays]
    titles = f"new in {_SIDES[1]}", f"gone in {_SIDES[1]}", "in both"
    return [(title, lines) for title, lines in zip(titles, (news, gone, stays), strict=True) if lines]


def _line(diagnosis: Diagnosis, remark: str) -> str:
    line = f"{diagnosis.severity}[{diagnosis.rule}] {diagnosis.message} ({diagnosis.subject})"
    return render.shorten(f"{line}; {remark}" if remark else line)


def _was(before: Diagnosis | None, blind: str | None) -> str:
    if before is not None:
        return f"{before.state} in A"
    return f"in A the rule could not look: {blind}" if blind else ""


def _now(after: Diagnosis | None, blind: str | None) -> str:
    if blind:
        return f"but in B the rule could not look: {blind}"
    return f"{after.state} in B" if after is not None else ""


def _other(change: Change) -> str:
    before, after = _of(change.before), _of(change.after)
    parts = [f"{before.severity} in A"] if before.severity != after.severity else []
    for name, pair in change.numbers().items():
        first, second = (_UNKNOWN if side is None else render.quantity(side) for side in pair)
        parts.append(f"{name.replace('_', ' ')} {first} in A, {second} in B")
    return "; ".join(parts) or "same numbers"


def _missing(pair: Pair) -> str:
    for side, run in zip(_SIDES, (pair.before, pair.after), strict=True):
        if run is None:
            return f"there is no such run in {side}"
    return ""


def _verdict(pairs: list[Pair]) -> str:
    changes = [change for p in pairs for change in p.changes]
    new, gone = sum(c.is_new for c in changes), sum(c.is_gone for c in changes)
    graver, both = sum(c.is_graver for c in changes), sum(c.stays for c in changes)
    counted = f"{new:,} new, {gone:,} gone, {both:,} in both"
    return f"{counted}, {graver:,} of them graver" if graver else counted


def _text(tops: list[str], pairs: list[Pair], color: bool) -> str:
    bold = ("\x1b[1m", "\x1b[0m") if color else ("", "")
    blocks = ["\n".join(f"{side}: {render.shorten(top)}" for side, top in zip(_SIDES, tops, strict=True))]
    for p in pairs:
        if len(pairs) > 1:
            blocks.append(f"== {render.shorten(p.name)}")
        if _missing(p):
            blocks.append(_missing(p))
        blocks.append("\n".join(render.table_text(_table(p))))
        for title, lines in _titled(p):
            wrapped = [line for text in lines for line in render.wrapped("  ", text, console.width(), "      ")]
            blocks.append("\n".join([f"{bold[0]}{title}{bold[1]}", *wrapped]))
    return "\n\n".join([*blocks, f"{bold[0]}{_verdict(pairs)}{bold[1]}"])


def _markdown(tops: list[str], pairs: list[Pair], _: bool) -> str:
    blocks = [f"## bnwatch: {_verdict(pairs)}"]
    blocks.append("\n".join(f"- {side}: {render.markdown_text(top)}" for side, top in zip(_SIDES, tops, strict=True)))
    for p in pairs:
        if len(pairs) > 1:
            blocks.append(f"### {render.markdown_text(p.name)}")
        if _missing(p):
            blocks.append(_missing(p))
        blocks.append(render.table_markdown(_table(p)))
        for title, lines in _titled(p):
            blocks.append(f"#### {title}\n\n" + "\n".join(f"- {render.markdown_text(line)}" for line in lines))
    return "\n\n".join(blocks)


def _json(tops: list[str], pairs: list[Pair], _: bool) -> str:
    return render.dumps(
        {"schema": render.SCHEMA, "a": tops[0], "b": tops[1], "runs": [_pair_json(p) for p in pairs]}, indent=2
    )


def _pair_json(pair: Pair) -> dict[str, Any]:
    def one(change: Change, diagnosis: Diagnosis | None, other: Diagnosis | None) -> dict[str, Any]:
        state = None if other is None else other.state
        return {**render.diagnosis_json(_of(diagnosis)), "other_state": state, "could_not_look": change.blind}

    return {
        "run": pair.name,
        "a": _run_json(pair.before),
        "b": _run_json(pair.after),
        "new": [one(c, c.after, c.before) for c in pair.changes if c.is_new],
        "gone": [one(c, c.before, c.after) for c in pair.changes if c.is_gone],
        "both": [_both_json(c) for c in pair.changes if c.stays],
    }


def _run_json(run: RunRecord | None) -> dict[str, Any] | None:
    if run is None:
        return None
    numbers = {name.replace(",", "").replace(" ", "_"): render.json_number(v) for name, v in _facts(run).items()}
    return {"run": run.report.run, "numbers": numbers, "problems": list(run.problems)}


def _both_json(change: Change) -> dict[str, Any]:
    before, after = _of(change.before), _of(change.after)
    first, second = render.diagnosis_json(before), render.diagnosis_json(after)
    return {
        "rule": after.rule,
        "subject": after.subject,
        "message": after.message,
        "severity": [first["severity"], second["severity"]],
        "changed": {name: [first["evidence"].get(name), second["evidence"].get(name)] for name in change.numbers()},
    }


_FORMATS = {"text": _text, "json": _json, "markdown": _markdown}
