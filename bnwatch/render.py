"""Diagnoses and reports as terminal text, Markdown, HTML and JSON.

Whatever comes from outside (layer names, messages that hold them, records) is made harmless here and nowhere else:
control characters and what reorders text become visible escapes, HTML and Markdown are escaped, and JSON stays JSON.
"""

from __future__ import annotations

import json
import math
import re
import textwrap
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from bnwatch.diagnosis import Diagnosis, Quantity, Report, Skipped, Table

SCHEMA = 1
"""Version of the JSON; it rises when a field changes its meaning or goes away, not when one is added."""

WIDTH = 100
_LONG_WORD = 120
_LONG_TEXT = 1000
_LONG_SUBJECT = 60
_ROWS = 20
_COLORS = {"error": "1;31", "warning": "1;33", "info": "1;36"}


# --- harmless text -----------------------------------------------------------------------------------------------


def clean(text: str) -> str:
    r"""Return ``text`` on one line with every control, format or unpaired character as a visible escape.

    >>> clean("a\x1b[31m")
    'a\\x1b[31m'
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


def wellformed(text: str) -> str:
    """Return ``text`` as a browser has it: U+FFFD stands where a surrogate has no partner."""
    return re.sub("[\ud800-\udfff]", "\ufffd", text)


def shorten(text: str, limit: int = _LONG_TEXT) -> str:
    """Return `clean` text whose words and whose whole are of bearable length, the middle left out."""

    def cut(word: str, limit: int) -> str:
        return word if len(word) <= limit else f"{word[: limit // 2]}…{word[-(limit // 2) :]}"

    return cut(re.sub(r"\S+", lambda found: cut(found[0], _LONG_WORD), clean(text)), limit)


def markdown_text(text: str) -> str:
    """Return ``text`` so that Markdown shows it as it is; what stands in backticks stays code.

    It is harmless also where Markdown is switched off and HTML is not: TensorBoard's Text tab has such a switch.
    """
    parts = shorten(text).split("`")
    # a backtick without its partner opens nothing
    lone = len(parts) - 1 if len(parts) % 2 == 0 else None
    return "".join(
        _markdown_code(part) if place % 2 and place != lone else "&#96;" * (place == lone) + _markdown_plain(part)
        for place, part in enumerate(parts)
    )


def _markdown_plain(text: str) -> str:
    return re.sub(r"([\\*_\[\]|#!])", r"\\\1", escape(text, quote=False)).replace("~", "&#126;")


def _markdown_code(text: str) -> str:
    """Return a code span; plain text where a span would need HTML that it cannot escape."""
    text = shorten(text)
    if re.search(r"[<>&`]", text):
        return _markdown_plain(text).replace("`", "&#96;")
    return f"`{text}`" if text else ""


# --- numbers -----------------------------------------------------------------------------------------------------


def number(value: float) -> str:
    """Return a number to three digits, whole numbers in full."""
    if not math.isfinite(value):
        return str(float(value))
    if value == round(value) and abs(value) < 1e15:  # noqa: PLR2004
        return f"{int(value):,}"
    return f"{value:,.0f}" if 1e3 <= abs(value) < 1e6 else f"{value:.3g}"  # noqa: PLR2004


def quantity(measured: Quantity) -> str:
    """Return a number with its unit and interval."""
    unit = measured.unit if measured.unit in ("", "%") else f" {measured.unit}"
    text = number(measured.value) + shorten(unit, _LONG_SUBJECT)
    if measured.interval is not None:
        low, high = measured.interval
        text += f" (95% {number(low)} to {number(high)})"
    return text


def count(amount: int, what: str, plural: str | None = None) -> str:
    """Return ``1 layer`` or ``2 layers``."""
    return f"{amount:,} {what if amount == 1 else plural or what + 's'}"


# --- JSON --------------------------------------------------------------------------------------------------------


def json_number(value: float | None) -> float | int | str | None:
    """Return a number that JSON can hold; NaN and the infinities as the strings that protobuf's JSON uses."""
    if value is None or isinstance(value, int):
        return value
    value = float(value)
    if math.isfinite(value):
        return value
    return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"


def diagnosis_json(diagnosis: Diagnosis) -> dict[str, Any]:
    """Return a diagnosis as JSON objects."""
    return {
        "rule": diagnosis.rule,
        "name": diagnosis.name,
        "severity": str(diagnosis.severity),
        "state": diagnosis.state,
        "subject": diagnosis.subject,
        "first_step": int(diagnosis.step),
        "last_step": int(diagnosis.last_step),
        "epoch": int(diagnosis.epoch),
        "message": diagnosis.message,
        "evidence": {
            name: {
                "value": json_number(measured.value),
                "unit": measured.unit,
                "interval": None if measured.interval is None else [json_number(end) for end in measured.interval],
            }
            for name, measured in diagnosis.evidence.items()
        },
        "table": None if diagnosis.table is None else table_json(diagnosis.table),
        "further": [table_json(table) for table in diagnosis.further],
        "notes": list(diagnosis.notes),
        "helps": list(diagnosis.helps),
        "causes": list(diagnosis.causes),
        "reason": diagnosis.reason,
        "built_at": diagnosis.built_at,
    }


def table_json(table: Table) -> dict[str, Any]:
    """Return a table as JSON objects."""
    return {
        "columns": list(table.columns),
        "rows": [[cell if isinstance(cell, str) else json_number(cell) for cell in row] for row in table.rows],
    }


def report_json(report: Report) -> dict[str, Any]:
    """Return a report as JSON objects, each diagnosis with the keys of its consequences."""
    consequences: dict[str, list[str]] = {}
    for diagnosis in report.diagnoses:
        for cause in diagnosis.causes:
            consequences.setdefault(cause, []).append(diagnosis.key)
    return {
        "schema": SCHEMA,
        "run": report.run,
        "complete": report.complete,
        "layers": report.layers,
        "sites": report.sites,
        "samples": report.samples,
        "steps": report.steps,
        "evaluations": report.evaluations,
        "diagnoses": [
            {**diagnosis_json(diagnosis), "consequences": consequences.get(diagnosis.key, [])}
            for diagnosis in report.diagnoses
        ],
        "skipped": [{"rule": s.rule, "reason": s.reason, "needs": s.needs} for s in report.skipped],
    }


def dumps(data: object, *, indent: int | None = None) -> str:
    """Return JSON text in ASCII.

    Raises:
        ValueError: ``data`` holds a number that is none of JSON's.
    """
    return json.dumps(data, allow_nan=False, indent=indent)


# --- causes and consequences -------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Headline:
    """An active diagnosis and those that follow from it."""

    diagnosis: Diagnosis
    consequences: tuple[_Headline, ...]

    def below(self, depth: int = 1) -> Iterator[tuple[int, Diagnosis]]:
        for consequence in self.consequences:
            yield depth, consequence.diagnosis
            yield from consequence.below(depth + 1)


def _headlines(report: Report) -> list[_Headline]:
    """Return the active diagnoses as trees; each appears once, under the first of its causes that is shown."""
    active = {diagnosis.key: diagnosis for diagnosis in report.diagnoses if diagnosis.state == "active"}
    children: dict[str, list[Diagnosis]] = {}
    roots = []
    for diagnosis in active.values():
        cause = next((cause for cause in diagnosis.causes if cause in active), None)
        if cause is None or _returns(diagnosis.key, cause, active):
            roots.append(diagnosis)
        else:
            children.setdefault(cause, []).append(diagnosis)

    def tree(diagnosis: Diagnosis) -> _Headline:
        return _Headline(diagnosis, tuple(tree(child) for child in children.get(diagnosis.key, ())))

    return [tree(root) for root in roots]


def _returns(key: str, cause: str, active: dict[str, Diagnosis]) -> bool:
    """Return whether the causes of ``cause`` lead back to ``key`` or never end: a record may claim anything."""
    seen: set[str] = set()
    at: str | None = cause
    while at is not None:
        if at == key or at in seen or len(seen) > 50:  # noqa: PLR2004
            return True
        seen.add(at)
        at = next((c for c in active[at].causes if c in active), None)
    return False


# --- terminal text -----------------------------------------------------------------------------------------------


def diagnosis_text(
    diagnosis: Diagnosis,
    *,
    color: bool = False,
    width: int = WIDTH,
    consequences: Iterable[tuple[int, Diagnosis]] = (),
) -> str:
    """Return a diagnosis as a compiler would print it; ``consequences`` are (depth, diagnosis), depth from 1."""
    paint = _Paint(color)
    lines = wrapped(f"{_label(diagnosis)}: ", diagnosis.message, width, "  ")
    label = _label(diagnosis)
    lines[0] = paint(label, _COLORS[str(diagnosis.severity)]) + paint(lines[0][len(label) :], "1")
    lines += wrapped("  --> ", _where(diagnosis), width, "      ")
    for cause in diagnosis.causes:
        lines += wrapped("  cause: ", cause.replace(" ", " at ", 1), width, "         ")
    blocks = [*map(table_text, diagnosis.tables), _pairs(diagnosis.evidence)]
    lines += "\n\n".join("\n".join(f"      {line}" for line in block) for block in blocks if block).splitlines()
    for kind, texts in (("note", diagnosis.notes), ("help", diagnosis.helps)):
        for text in texts:
            lines += wrapped(f"  {kind}: ", text, width, " " * (len(kind) + 4))
    for depth, consequence in consequences:
        lead = "  " * depth + "consequence: "
        text = f"{_label(consequence)}: {consequence.message} ({_where(consequence)})"
        lines += wrapped(lead, text, width, " " * len(lead))
        tables = ("\n".join(f"{' ' * len(lead)}{line}" for line in table_text(table)) for table in consequence.tables)
        lines += "\n\n".join(tables).splitlines()
    if diagnosis.state == "allowed":
        lines += wrapped("  allowed: ", diagnosis.reason or "no reason given", width, "           ")
    more = f"more: bnwatch explain {shorten(diagnosis.rule, _LONG_SUBJECT)}"
    lines.append(f"  allow: {_allowance(diagnosis)}   {more}" if diagnosis.state == "active" else f"  {more}")
    return "\n".join(lines)


def report_text(report: Report, *, color: bool = False, width: int = WIDTH) -> str:
    """Return a report for a terminal: one headline a cause, its consequences below it; one line when all is calm."""
    paint = _Paint(color)
    headlines = _headlines(report)
    blocks = [
        diagnosis_text(headline.diagnosis, color=color, width=width, consequences=headline.below())
        for headline in headlines
    ]
    brief = [_brief(diagnosis) for diagnosis in report.diagnoses if diagnosis.state != "active"]
    if brief:
        blocks.append("\n".join("\n".join(wrapped("", line, width, "  ")) for line in brief))
    if report.skipped:
        blocks.append("\n".join("\n".join(wrapped("", line, width, "  ")) for line in _blind(report.skipped)))
    verdict = count(len(headlines), "diagnosis", "diagnoses") if headlines else "no diagnosis"
    lines = wrapped(f"{verdict}: ", _watched(report), width, "  ")
    lines[0] = paint(verdict, "1") + lines[0][len(verdict) :]
    blocks.append("\n".join(lines))
    return "\n\n".join(blocks)


class _Paint:
    def __init__(self, color: bool) -> None:
        self.color = color

    def __call__(self, text: str, code: str) -> str:
        return f"\x1b[{code}m{text}\x1b[0m" if self.color and text else text


def _label(diagnosis: Diagnosis) -> str:
    state = "" if diagnosis.state == "active" else f", {diagnosis.state}"
    return f"{diagnosis.severity}[{shorten(diagnosis.rule, _LONG_SUBJECT)}]{state}"


def _where(diagnosis: Diagnosis) -> str:
    first, last = diagnosis.step, diagnosis.last_step
    steps = f"step {first:,}" if first == last else f"steps {first:,} to {last:,}"
    epoch = f"epoch {diagnosis.epoch + 1:,}"
    built = f", built at {shorten(diagnosis.built_at, _LONG_WORD)}" if diagnosis.built_at else ""
    return f"{shorten(diagnosis.subject, _LONG_WORD)}{built}, {steps}, {epoch if first == last else 'since ' + epoch}"


def _brief(diagnosis: Diagnosis) -> str:
    why = f": {diagnosis.reason}" if diagnosis.state == "allowed" and diagnosis.reason else ""
    return shorten(f"{_label(diagnosis)}: {diagnosis.message} ({_where(diagnosis)}){why}")


def _blind(skipped: Sequence[Skipped]) -> list[str]:
    """Return one line a reason, however many rules it holds for."""
    rules: dict[str, list[str]] = {}
    for entry in skipped:
        rules.setdefault(entry.reason, []).append(entry.rule)
    return [shorten(f"could not look: {', '.join(ids)}: {reason}") for reason, ids in rules.items()]


def _watched(report: Report) -> str:
    text = (
        f"{count(report.layers, 'layer')} at {count(report.sites, 'call site')}, "
        f"{count(report.samples, 'sample')} in {count(report.steps, 'step')}, {count(report.evaluations, 'evaluation')}"
    )
    return text if report.complete else f"{text}; no closing report: the run goes on or was cut off"


def _allowance(diagnosis: Diagnosis) -> str:
    subject = diagnosis.subject
    # what the subject is called must match itself as a pattern
    subject = re.sub(r"([*?\[])", r"[\1]", subject[:_LONG_SUBJECT]) + "*" * (len(subject) > _LONG_SUBJECT)
    key = diagnosis.rule if subject == "model" else f"{diagnosis.rule}:{subject}"
    return f'{{{clean(json.dumps(key, ensure_ascii=False))}: "why"}}'


def wrapped(lead: str, text: str, width: int, indent: str) -> list[str]:
    """Return harmless text in lines of at most ``width``, the first after ``lead``, the others after ``indent``."""
    return textwrap.wrap(
        shorten(text),
        max(width, 40),
        initial_indent=lead,
        subsequent_indent=indent,
        break_long_words=False,
        break_on_hyphens=False,
    ) or [lead.rstrip()]


def table_text(table: Table) -> list[str]:
    """Return a table as aligned lines; a column of numbers is right-aligned."""
    rows = _rows(table)
    cells = [[shorten(cell, _LONG_SUBJECT) for cell in row] for row in ([*table.columns], *rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=False)]
    right = [bool(table.rows) and not any(isinstance(row[n], str) for row in table.rows) for n in range(len(widths))]
    lines = [
        "  ".join(
            cell.rjust(width) if numeric else cell.ljust(width)
            for cell, width, numeric in zip(row, widths, right, strict=False)
        ).rstrip()
        for row in cells
    ]
    return lines + ([f"and {len(table.rows) - _ROWS:,} more"] if len(table.rows) > _ROWS else [])


def _rows(table: Table) -> list[tuple[str, ...]]:
    """Return the first rows as text."""
    return list(zip(*(_column(cells) for cells in zip(*table.rows[:_ROWS], strict=False)), strict=False))


def _column(cells: Sequence[str | float]) -> list[str]:
    """Return cells as text, the numbers to the same few decimals where they are of about the same size."""
    sizes = [abs(cell) for cell in cells if not isinstance(cell, str) and cell]
    fractions = any(size != round(size) for size in sizes if math.isfinite(size))
    if not fractions or not 1e-3 < min(sizes) <= max(sizes) < min(1e3, 1e3 * min(sizes)):  # noqa: PLR2004
        return [cell if isinstance(cell, str) else number(cell) for cell in cells]
    decimals = 2 - math.floor(math.log10(max(sizes)))
    return [cell if isinstance(cell, str) else f"{cell:.{decimals}f}" for cell in cells]


def _pairs(evidence: Mapping[str, Quantity]) -> list[str]:
    pairs = [(_spoken(name), quantity(measured)) for name, measured in evidence.items()]
    width = max((len(name) for name, _ in pairs), default=0)
    return [f"{name.ljust(width)}  {value}" for name, value in pairs]


def _spoken(name: str) -> str:
    return shorten(name.replace("_", " "), _LONG_SUBJECT)


# --- Markdown ----------------------------------------------------------------------------------------------------


def diagnosis_markdown(
    diagnosis: Diagnosis, *, consequences: Iterable[tuple[int, Diagnosis]] = (), level: int = 3
) -> str:
    """Return a diagnosis as Markdown under a heading of ``level``."""
    rule = markdown_text(diagnosis.rule)
    state = "" if diagnosis.state == "active" else f" ({diagnosis.state})"
    blocks = [
        f"{'#' * level} {diagnosis.severity} {rule} {markdown_text(diagnosis.name)}{state}",
        f"{markdown_text(diagnosis.message)}",
        f"at {_markdown_where(diagnosis)}",
    ]
    blocks += map(table_markdown, diagnosis.tables)
    if diagnosis.evidence:
        pairs = [[_spoken(name), quantity(measured)] for name, measured in diagnosis.evidence.items()]
        blocks.append(_markdown_table(("measured", "value"), pairs))
    items = [f"- note: {markdown_text(note)}" for note in diagnosis.notes]
    items += [f"- **help: {markdown_text(text)}**" for text in diagnosis.helps]
    items += [
        f"{'    ' * (depth - 1)}- consequence: {c.severity} {markdown_text(c.rule)}: {markdown_text(c.message)} "
        f"({_markdown_where(c)})"
        for depth, c in consequences
    ]
    if diagnosis.state == "allowed":
        items.append(f"- allowed: {markdown_text(diagnosis.reason or 'no reason given')}")
    items.append(f"- more: {_markdown_code('bnwatch explain ' + diagnosis.rule)}")
    return "\n\n".join([*blocks, "\n".join(items)])


def report_markdown(report: Report, *, level: int = 2) -> str:
    """Return a report as Markdown under a heading of ``level``."""
    headlines = _headlines(report)
    blocks = [f"{'#' * level} bnwatch: {_markdown_code(report.run)}"]
    blocks.append(("" if headlines else "no diagnosis: ") + _watched(report))
    blocks += [
        diagnosis_markdown(headline.diagnosis, consequences=headline.below(), level=level + 1) for headline in headlines
    ]
    items = [f"- {markdown_text(_brief(d))}" for d in report.diagnoses if d.state != "active"]
    items += [f"- {markdown_text(line)}" for line in _blind(report.skipped)]
    if items:
        blocks.append("\n".join(items))
    return "\n\n".join(blocks)


def table_markdown(table: Table) -> str:
    """Return a table in Markdown, its first rows where there are many."""
    return _markdown_table(table.columns, _rows(table))


def _markdown_where(diagnosis: Diagnosis) -> str:
    subject = shorten(diagnosis.subject, _LONG_WORD)
    return f"{_markdown_code(subject)}{markdown_text(_where(diagnosis)[len(subject) :])}"


def _markdown_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    def line(cells: Iterable[str]) -> str:
        return f"| {' | '.join(markdown_text(cell) for cell in cells)} |"

    return "\n".join([line(columns), f"|{' --- |' * len(columns)}", *map(line, rows)])


# --- HTML --------------------------------------------------------------------------------------------------------

# Colours and fonts are those of the page around it, light or dark; only the labels bring their own, which are
# readable on either. Styles stand at the elements, since notebooks and mail programs drop style sheets.
_BADGE = {"error": "#b3261e", "warning": "#8a5300", "info": "#1b5e8a"}
_LINE = "1px solid rgba(128,128,128,.45)"
_CELL = "padding:.1em .8em .1em 0;text-align:left;border:0;background:none;font-variant-numeric:tabular-nums"


def diagnosis_html(diagnosis: Diagnosis, *, consequences: Iterable[tuple[int, Diagnosis]] = ()) -> str:
    """Return a diagnosis as an HTML element without script or style sheet, for light and dark pages."""
    badge = f"background:{_BADGE[str(diagnosis.severity)]};color:#fff;padding:.1em .5em;border-radius:.3em"
    blocks = [
        f'<div style="font-weight:600"><span style="{badge}">{_html(_label(diagnosis))}</span> '
        f"{_html_text(diagnosis.message)}</div>",
        f'<div style="opacity:.8">{_html(_where(diagnosis))}</div>',
        *(_html_table([table.columns, *_rows(table)]) for table in diagnosis.tables),
    ]
    if diagnosis.evidence:
        pairs = [(_spoken(name), quantity(measured)) for name, measured in diagnosis.evidence.items()]
        blocks.append(_html_table(pairs, heads=0))
    items = [("note", note) for note in diagnosis.notes] + [("help", text) for text in diagnosis.helps]
    items += [("consequence", f"{_label(c)}: {c.message} ({_where(c)})") for _, c in consequences]
    items += [("allowed", diagnosis.reason or "no reason given")] * (diagnosis.state == "allowed")
    items.append(("more", f"`bnwatch explain {diagnosis.rule}`"))
    lines = "".join(f"<div><b>{kind}:</b> {_html_text(text)}</div>" for kind, text in items)
    style = f"border-left:3px solid {_BADGE[str(diagnosis.severity)]};padding:.2em 0 .2em .8em;margin:.8em 0"
    return f'<div style="{style}">{"".join(blocks)}{lines}</div>'


def report_html(report: Report) -> str:
    """Return a report as an HTML element without script or style sheet, for light and dark pages."""
    headlines = _headlines(report)
    verdict = count(len(headlines), "diagnosis", "diagnoses") if headlines else "no diagnosis"
    blocks = [f"<div><b>bnwatch: {verdict}</b> in {_html_text(f'`{report.run}`')}: {_html(_watched(report))}</div>"]
    blocks += [diagnosis_html(h.diagnosis, consequences=h.below()) for h in headlines]
    brief = [_brief(d) for d in report.diagnoses if d.state != "active"] + _blind(report.skipped)
    blocks += [f'<div style="opacity:.8">{_html_text(line)}</div>' for line in brief]
    return f'<div style="line-height:1.45;overflow-x:auto">{"".join(blocks)}</div>'


def _html(text: str) -> str:
    return escape(shorten(text))


def _html_text(text: str) -> str:
    """Return escaped text in which what stands in backticks is code."""
    parts = shorten(text).split("`")
    if len(parts) % 2 == 0:
        return escape(shorten(text))
    return "".join(f"<code>{escape(part)}</code>" if n % 2 else escape(part) for n, part in enumerate(parts))


def _html_table(rows: Sequence[Sequence[str]], heads: int = 1) -> str:
    lines = []
    for place, row in enumerate(rows):
        tag, style = ("th", f"{_CELL};border-bottom:{_LINE}") if place < heads else ("td", _CELL)
        cells = "".join(f'<{tag} style="{style}">{escape(shorten(cell, _LONG_SUBJECT))}</{tag}>' for cell in row)
        lines.append(f'<tr style="background:none">{cells}</tr>')
    return f'<table style="border-collapse:collapse;margin:.4em 0;font:inherit;color:inherit">{"".join(lines)}</table>'
