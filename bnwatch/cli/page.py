"""``bnwatch report --format html``: one file with the pictures of the TensorBoard tab, for a ticket or a mail.

The page is the one of the tab. What it would ask a server for stands in the file as JSON, by the address it asks. The
file is of bearable size: what matters most comes first, and what is left out is said.
"""

from __future__ import annotations

import base64
import hashlib
from html import escape
from importlib import resources
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import bnwatch
from bnwatch import render
from bnwatch.cli.terminal import MisuseError, complain
from bnwatch.rules import CATALOGUE

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from bnwatch.cli.report import Shown
    from bnwatch.views import RunViews

    Candidate = tuple[str, str, dict[str, str | int]]

BUDGET = 4_500_000
"""Bytes of answers in a file, all runs together."""

_FIRST, _EARLIER = 8, 12
"""Layers whose pictures come first, at least; earlier samples of a kind that are in the file, about."""

_COARSE = 250
"""Points of a line of the other layers, where the first ones have what the tab shows."""

_COARSE_LINES = "lines of other layers"

_MAPS = 3
"""Heatmaps that come before the other layers."""

_UNQUOTED = "!~*'()"

_HEAD = """\
<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{title}</title>
<style>
:root {{ color-scheme: light dark; font: 15px/1.45 system-ui, sans-serif; }}
body {{ margin: 0; }}
main#bnwatch {{ min-height: 0; }}
noscript, footer {{ display: block; max-width: 60rem; padding: 1rem; }}
</style>
</head>
"""


def html(shown: Shown) -> str:
    """Return the file.

    Raises:
        MisuseError: the page is not part of this installation.
    """
    script = _script()
    answers, left_out = selection(shown)
    policy = (
        f"default-src 'none'; script-src 'sha256-{_digest(script)}'; style-src 'unsafe-inline'; img-src data: blob:; "
        "base-uri 'none'; form-action 'none'"
    )
    remarks = [f"Written by bnwatch {bnwatch.__version__} from {render.shorten(shown.top)}.", *left_out]
    for remark in left_out:
        complain(remark, "note")
    plain = "<hr>\n".join(render.report_html(run.report) for run in shown.runs)
    return "".join(
        (
            _HEAD.format(policy=escape(policy), title=escape(f"bnwatch: {render.shorten(shown.top)}")),
            '<body>\n<main id="bnwatch"></main>\n',
            f"<noscript>\n{plain}\n</noscript>\n",
            f"<footer>{escape(' '.join(remarks))}</footer>\n",
            f'<script type="application/json" id="bnwatch-answers">{embedded(answers)}</script>\n',
            f'<script type="module">{script}</script>\n</body>\n</html>',
        )
    )


def embedded(data: object) -> str:
    r"""Return JSON that ends no script element and opens no comment in it: ``<`` becomes ``\u003c``."""
    return render.dumps(data).replace("<", "\\u003c")


def address(route: str, **parameters: str | int) -> str:
    """Return what the page asks for: the parameters by name, percent-encoded as JavaScript's encodeURIComponent."""
    texts = {name: render.wellformed(str(value)) for name, value in sorted(parameters.items())}
    query = "&".join(f"{name}={quote(text, safe=_UNQUOTED)}" for name, text in texts.items())
    return f"{route}?{query}" if query else route


def _script() -> str:
    try:
        bundle = (resources.files("bnwatch.dashboard") / "static" / "index.js").read_text(encoding="utf-8")
    except (OSError, ModuleNotFoundError):
        msg = "the page is not part of this installation; --format markdown or text needs none"
        raise MisuseError(msg) from None
    # a module that stands in the page is asked by nobody: it is told to begin
    bundle += "\nrender();\n"
    return bundle.replace("\r", "").replace("</script", "<\\/script").replace("<!--", "<\\!--")


def _digest(script: str) -> str:
    return base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()


# --- what is in the file ------------------------------------------------------------------------------------------


def selection(shown: Shown, budget: int = BUDGET) -> tuple[dict[str, Any], list[str]]:
    """Return the answers by address, and what was left out in sentences.

    In turn for every run: the table of layers, the pictures of the layers that diagnoses are about and that matter
    most, the first heatmaps, tables of earlier samples, the other layers with fewer points, the other heatmaps, and
    channels at earlier samples.
    """
    from bnwatch.views import RunViews

    top = Path(shown.top)
    views = RunViews(top.parent if top.is_file() else top)
    views.refresh()
    reports = {run.directory.resolve(): run.report for run in shown.runs}
    names = [name for name in views.names() if views[name].directory.resolve() in reports]
    # which may be those of a replay, or against a baseline
    judged = {name: reports[views[name].directory.resolve()] for name in names}
    briefs = [views[name].brief(report.diagnoses) for name, report in judged.items()]
    answers: dict[str, Any] = {"runs": {**views.runs(), "runs": briefs}}
    overviews = {}
    for name, report in judged.items():
        overviews[name] = answers[address("run", run=name)] = views[name].overview(report)
    found = {d["rule"] for overview in overviews.values() for d in overview["report"]["diagnoses"]}
    for rule in sorted(found & {rule.id for rule in CATALOGUE}):
        answers[address("rule", rule=rule)] = views.answer("rule", {"rule": rule})
    left = budget - sum(map(_size, answers.values()))
    missing: dict[str, int] = {}
    full: set[tuple[str, str | int]] = set()
    queues = [_candidates(views, name, overviews[name]) for name in names]
    for what, route, parameters in (one for turn in zip_longest(*queues) for one in turn if one is not None):
        # of a kind all are of about the same size: where one was too large, the others need not be computed
        kind = what, parameters["run"]
        answer = None if kind in full else _answer(views, what, route, parameters)
        if answer is None or (size := _size(answer)) > left:
            full.add(kind)
            missing[what] = missing.get(what, 0) + 1
            continue
        answers[address(route, **parameters)] = answer
        left -= size
    _offer_what_is_there(answers, overviews)
    if not missing:
        return answers, []
    listed = ", ".join(f"{what} ({count:,})" for what, count in missing.items())
    return answers, [f"To stay small this file leaves out: {listed}. TensorBoard shows everything."]


def _offer_what_is_there(answers: dict[str, Any], overviews: Mapping[str, Any]) -> None:
    """Let the sliders of the page stop at those samples only whose answers are in the file."""
    for name, overview in overviews.items():
        asked: list[tuple[str, dict[str, str]]] = [("layers", {"run": name})]
        asked += [("channels", {"run": name, "layer": layer["layer"]}) for layer in overview["layers"]]
        for route, parameters in asked:
            latest = answers.get(address(route, **parameters))
            if latest is not None:
                *earlier, last = latest["steps"] or [None]
                there = [step for step in earlier if address(route, **parameters, step=step) in answers]
                latest["steps"] = [*there, *([] if last is None else [last])]


def _candidates(views: RunViews, name: str, overview: Mapping[str, Any]) -> Iterator[Candidate]:
    """Yield what can be in the file, the most wanted first: what it is, and what the page asks for."""
    table = views[name].layers()
    yield "tables of layers", "layers", {"run": name}
    matters: dict[str, float] = {}
    for row in table["rows"]:
        matters[row["layer"]] = max(matters.get(row["layer"], 0.0), float(row["matters"]))
    accused = {layer["layer"]: bool(layer["diagnoses"]) for layer in overview["layers"]}
    # a diagnosis counts for more than any number
    layers = sorted(accused, key=lambda layer: (not accused[layer], -matters.get(layer, 0.0)))
    first = max(sum(accused.values()), _FIRST)
    for layer in layers[:first]:
        yield from _pictures(name, layer, "lines of layers")
    maps = [{"run": name, "statistic": statistic["name"]} for statistic in overview["statistics"]]
    for parameters in maps[:_MAPS]:
        yield "heatmaps", "heatmap", parameters
    for step in _some(table["steps"]):
        yield "tables of earlier samples", "layers", {"run": name, "step": step}
    for layer in layers[first:]:
        yield from _pictures(name, layer, _COARSE_LINES)
    for parameters in maps[_MAPS:]:
        yield "heatmaps", "heatmap", parameters
    for layer in layers[:first]:
        for step in _some(overview["channels"].get(layer, [])):
            yield "channels at earlier samples", "channels", {"run": name, "layer": layer, "step": step}


def _some(steps: Sequence[int]) -> Sequence[int]:
    """Return about so many steps as are wanted, all but the last."""
    return steps[: -1 : max(len(steps) // _EARLIER, 1)]


def _pictures(name: str, layer: str, lines: str) -> Iterator[Candidate]:
    yield lines, "series", {"run": name, "layer": layer}
    yield "channels of layers", "channels", {"run": name, "layer": layer}


def _answer(views: RunViews, what: str, route: str, parameters: Mapping[str, str | int]) -> dict[str, Any]:
    if what == _COARSE_LINES:
        return views[str(parameters["run"])].series(str(parameters["layer"]), _COARSE)
    asked = {name: str(value) for name, value in parameters.items()}
    # a heatmap goes on where the answer before had no more time
    while (answer := views.answer(route, asked)).get("complete", 1.0) < 1.0:
        pass
    return answer


def _size(answer: object) -> int:
    return len(embedded(answer))
