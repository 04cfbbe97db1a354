"""What `bnwatch watch` draws, from the same answers as the pictures of the TensorBoard tab."""

from __future__ import annotations

import math
import time
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from rich.console import Group
from rich.padding import Padding
from rich.text import Text

from bnwatch import render

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from rich.console import RenderableType

    from bnwatch.views import RunViews

_STYLES = {"error": "bold red", "warning": "bold yellow", "info": "bold cyan", None: "green"}
_GRAVITY = {"error": -3, "warning": -2, "info": -1}
_BLOCKS = "▁▂▃▄▅▆▇█"
_ASCII = "_.-=+*%#"
_MOST = 4.0
_LAYERS = 8
_RUNS = 8
_QUIET = 60.0


def screen(views: RunViews, width: int, *, height: int | None, plain: bool) -> RenderableType:
    """Return the picture of all runs: a line each where there are several, and one of them at length.

    Args:
        views: the runs, refreshed.
        width: columns of the terminal.
        height: rows to keep to; None for as many as it takes.
        plain: draw with ASCII only.
    """
    answer = views.runs()
    runs = answer["runs"]
    if not runs:
        return Text(_cut(answer["hint"] or "waiting for the first sample of a training; Ctrl-C ends", width * 3))
    ages = {run["run"]: _age(views, run["run"]) for run in runs}
    # a run that goes on is looked at, of several the one that wrote last; of those that ended the gravest
    ordered = sorted(
        runs,
        key=lambda run: (
            run["complete"],
            _GRAVITY.get(run["severity"], 0) if run["complete"] else ages[run["run"]],
            run["run"],
        ),
    )
    parts: list[RenderableType] = []
    several = min(len(runs), _RUNS + 1) if len(runs) > 1 else 0
    if several:
        parts += [*_several(views, ordered, width), Text()]
    rows = None if height is None else max(height - several - 1, 8)
    # a pipe has room for all of them
    for run in ordered[: 1 if height is not None else _RUNS]:
        view = views[run["run"]]
        named = {**run, "run": title(views, run["run"])}
        age, overview, layers = ages[run["run"]], view.overview(), view.layers()
        picture = _run(named, overview, layers, age=age, width=width, height=rows, plain=plain)
        parts += [picture, Text()]
    del parts[-1]
    parts += [Text(_cut(problem, width), style="yellow") for problem in answer["problems"][:2]]
    return Group(*parts)


def title(views: RunViews, run: str) -> str:
    """Return what to call a run: the one at the top is called as its directory."""
    directory = views[run].directory.resolve()
    return render.shorten(
        run if run != "." else directory.parent.name if directory.name == "bnwatch" else directory.name
    )


def share(value: object) -> str:
    """Return an accuracy as text; a dash where it is not known."""
    number = _number(value)
    return "-" if number is None else f"{number:.1%}"


def sparkline(values: Sequence[float | None], width: int, *, plain: bool = False) -> str:
    """Return values in [0, 1] as a line of bars, the last ``width`` of them; a space where one is not known."""
    bars = _ASCII if plain else _BLOCKS
    shown = list(values)[-width:]
    return "".join(
        " " if value is None or not math.isfinite(value) else bars[round(min(max(value, 0.0), 1.0) * (len(bars) - 1))]
        for value in shown
    )


def _age(views: RunViews, run: str) -> float:
    """Return the seconds since the record of a run grew."""
    newest = 0.0
    with suppress(OSError):
        newest = max((path.stat().st_mtime for path in views[run].directory.iterdir()), default=0.0)
    return max(time.time() - newest, 0.0)


def _several(views: RunViews, runs: Sequence[Mapping[str, Any]], width: int) -> list[Text]:
    shown = runs[:_RUNS]
    names = [_cut(title(views, run["run"]), max(width // 3, 12)) for run in shown]
    longest = max(map(len, names))
    lines = []
    for run, name in zip(shown, names, strict=True):
        line = Text(
            f"{name.ljust(longest)}  {'ended' if run['complete'] else 'runs '}  ", no_wrap=True, overflow="ellipsis"
        )
        line.append(render.shorten(run["headline"] or "no diagnosis"), style=_STYLES.get(run["severity"], ""))
        lines.append(line)
    if len(runs) > _RUNS:
        lines.append(Text(f"and {len(runs) - _RUNS:,} more", style="dim"))
    return lines


def _run(
    run: Mapping[str, Any],
    overview: Mapping[str, Any],
    layers: Mapping[str, Any],
    *,
    age: float,
    width: int,
    height: int | None,
    plain: bool,
) -> Group:
    active = [d for d in overview["report"]["diagnoses"] if d["state"] == "active"]
    parts: list[RenderableType] = [_head(run, age, width)]
    parts += _accuracies(overview, width, plain=plain)
    shown = _LAYERS if height is None else min(max(height // 3, 3), _LAYERS)
    if layers["rows"]:
        parts += [Text(), _worst(layers["rows"], shown, width, plain=plain)]
    parts.append(Text())
    if not active:
        parts.append(Text("no diagnosis so far" if not run["complete"] else "no diagnosis", style="green"))
    room = None if height is None else height - len(parts) - min(len(layers["rows"]), shown) - 2
    parts += _diagnoses(active, width, room)
    parts += [Text(_cut(problem, width * 2), style="yellow") for problem in overview["problems"][:2]]
    return Group(*parts)


def _head(run: Mapping[str, Any], age: float, width: int) -> Text:
    name = _cut(run["run"], max(width // 2, 20))
    text = Text(name, style="bold")
    state = "ended" if run["complete"] else "runs"
    parts = [run["framework"], f"step {run['steps']:,}", f"epoch {run['epochs']:,}" if run["epochs"] else "", state]
    if not run["complete"] and age > _QUIET:
        parts.append(f"nothing new for {_spoken(age)}: slow, stopped, or cut off")
    text.append("  " + ", ".join(_cut(part, 60) for part in parts if part), style="not bold")
    return text


def _accuracies(overview: Mapping[str, Any], width: int, *, plain: bool) -> list[RenderableType]:
    evaluations = overview["evaluations"]
    lines = {
        "training": [_number(value) for value in overview["progress"]["accuracy"]],
        "evaluation": [_number(e["accuracy"]) for e in evaluations],
    }
    drawn: list[RenderableType] = []
    room = max(min(width - 26, 60), 8)
    for name, values in lines.items():
        known = [value for value in values if value is not None]
        if known:
            line = sparkline(_thinned(values, room), room, plain=plain)
            drawn.append(Text(f"{name:<11} {share(known[-1]):>6}  {line}", no_wrap=True, overflow="crop"))
    if evaluations and (gap := _number(evaluations[-1]["gap"])) is not None:
        drawn.append(Text(f"{'gap':<11} {100.0 * gap:>5.1f} points at step {evaluations[-1]['step']:,}"))
    return drawn or [Text("no accuracy reported so far", style="dim")]


def _thinned(values: Sequence[float | None], room: int) -> list[float | None]:
    """Return at most ``room`` values over the whole of the training, the last one among them."""
    if len(values) <= room:
        return list(values)
    return [values[round(place * (len(values) - 1) / (room - 1))] for place in range(room)]


def _worst(rows: Iterable[Mapping[str, Any]], shown: int, width: int, *, plain: bool) -> Group:
    """Return the call sites that are farthest off, with bars; a full bar is four times what matters."""
    worst = sorted(rows, key=lambda row: -(_number(row["matters"]) or 0.0))
    sites: dict[str, int] = {}
    for row in worst:
        sites[row["layer"]] = sites.get(row["layer"], 0) + 1
    names = []
    for row in worst[:shown]:
        several = f"#{row['index']}" + (f"@{row['replica']}" if row["replica"] else "")
        names.append(_cut(row["layer"] + several * (sites[row["layer"]] > 1), max(width // 3, 10)))
    longest = max(map(len, names))
    length = 10 if width >= 40 else 4  # noqa: PLR2004
    lines = []
    for name, row in zip(names, worst, strict=False):
        matters = _number(row["matters"]) or 0.0
        full = round(min(matters / _MOST, 1.0) * length)
        style = "red" if matters >= 1.0 else "yellow" if matters >= 0.5 else "green"  # noqa: PLR2004
        line = Text(f"{name.ljust(longest)}  ", no_wrap=True, overflow="ellipsis")
        line.append(("#" if plain else "█") * full + ("." if plain else "░") * (length - full), style=style)
        line.append(f"  {render.shorten(row['why'] or '')}")
        lines.append(line)
    return Group(*lines)


def _diagnoses(active: Sequence[Mapping[str, Any]], width: int, room: int | None) -> list[RenderableType]:
    """Return the diagnoses, of each rule the first with its first help, as many as fit; one always."""
    parts: list[RenderableType] = []
    used = 0
    helped: set[str] = set()
    for place, diagnosis in enumerate(active):
        text = Text(
            f"{diagnosis['severity']}[{_cut(diagnosis['rule'], 20)}]", style=_STYLES.get(diagnosis["severity"], "")
        )
        text.append(f" {render.shorten(diagnosis['message'], 400)}", style="default")
        # of a rule that fires at many layers the help is the same
        first = diagnosis["helps"][: diagnosis["rule"] not in helped]
        helped.add(diagnosis["rule"])
        helps = [Text(f"help: {render.shorten(help_, 400)}", style="dim") for help_ in first]
        # words that do not fit move on, so that lines are not full
        used += sum(1 + len(part) * 9 // (8 * width) for part in (text, *helps))
        if place and room is not None and used > room:
            left = render.count(len(active) - place, "more diagnosis", "more diagnoses")
            return [*parts, Text(f"and {left}: bnwatch report shows them", style="dim")]
        parts += [text, *(Padding(text, (0, 0, 0, 2)) for text in helps)]
    return parts


def _cut(text: str, limit: int) -> str:
    return render.shorten(text, max(limit, 8))


def _number(value: object) -> float | None:
    """Return a number of an answer; None where it is not known."""
    if value is None or isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    number = float(value)
    return None if math.isnan(number) else number


def _spoken(seconds: float) -> str:
    minutes = int(seconds // 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60:,} h"  # noqa: PLR2004
