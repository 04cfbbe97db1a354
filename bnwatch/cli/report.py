"""``bnwatch report``: what the rules found in recorded runs."""

from __future__ import annotations

import importlib
import os
import sys
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from bnwatch import render
from bnwatch.cli.terminal import CLEAN, FOUND, MisuseError, cannot, complain, put
from bnwatch.diagnosis import Severity
from bnwatch.order import ordered
from bnwatch.sinks import console

if TYPE_CHECKING:
    import argparse

    from bnwatch.diagnosis import Report
    from bnwatch.sinks.tensorboard import RunRecord


@dataclass(frozen=True, slots=True)
class Shown:
    """What is to be shown.

    Attributes:
        top: the directory as it was given.
        runs: the runs below it, with the reports to be shown.
        color: colours are wanted.
        gone: keys in the baseline that are found no more; None without a baseline.
    """

    top: str
    runs: list[RunRecord]
    color: bool = False
    gone: list[str] | None = None


def report(options: argparse.Namespace) -> int:
    """Show the report, and return whether something fails.

    Raises:
        MisuseError: what was asked cannot be done.
    """
    if options.compare:
        from bnwatch.cli.compare import compare

        return compare(options)
    if options.directory is None:
        msg = "name the directory of a run: bnwatch report DIR; or two of them: bnwatch report --compare A B"
        raise MisuseError(msg)
    if options.format == "html" and options.output is None and console.is_terminal(sys.stdout):
        msg = "--format html is for a browser: add -o report.html"
        raise MisuseError(msg)
    shown = Shown(options.directory, load(options.directory, options), color=_colored(options))
    found = shown.runs
    if options.baseline:
        shown = _known(shown, options.baseline)
    put(_format(options.format, shown), options.output)
    tell_problems(shown.runs)
    if options.write_baseline:
        from bnwatch.cli import baseline

        count = baseline.write(options.write_baseline, [run.report for run in found])
        complain(f"{render.count(count, 'diagnosis', 'diagnoses')} written to {options.write_baseline}", "note")
        return CLEAN
    limit = Severity.parse(options.fail_on)
    fails = any(d.state == "active" and d.severity >= limit for run in shown.runs for d in run.report.diagnoses)
    return FOUND if fails else CLEAN


def load(directory: str, options: argparse.Namespace) -> list[RunRecord]:
    """Return the runs below a directory, with the reports of then or of the rules anew.

    Raises:
        MisuseError: there is nothing to read, or the thresholds are none.
    """
    from bnwatch.sinks.tensorboard import RecordError, read_runs

    try:
        runs = read_runs(directory, samples=options.replay)
    except RecordError as error:
        raise MisuseError(str(error)) from None
    except (OSError, ValueError) as error:
        raise MisuseError(cannot("read", directory, error)) from None
    return [replace(run, report=report) for run, report in zip(runs, _reports(runs, options), strict=True)]


def _reports(runs: list[RunRecord], options: argparse.Namespace) -> list[Report]:
    if not options.replay:
        if options.thresholds:
            msg = "--set changes thresholds of the rules, which run with --replay only"
            raise MisuseError(msg)
        return [replace(run.report, diagnoses=ordered(run.report.diagnoses)) for run in runs]
    from bnwatch.replay import parse_thresholds, replay

    try:
        thresholds = parse_thresholds(options.thresholds)
    except ValueError as error:
        msg = f"--set: {error}"
        raise MisuseError(msg) from None
    return [replay(run, thresholds) for run in runs]


def name_below(top: str, run: RunRecord) -> str:
    """Return what a run is called below the directory that was asked for; ``.`` for that directory itself."""
    if os.path.isfile(top):  # noqa: PTH113 - as text: the name may be none that a path can hold
        return "."
    name = os.path.relpath(run.report.run, top).replace(os.sep, "/")
    # the directory of the event files was given, or a file in it
    return "." if name.startswith("..") else name


def tell_problems(runs: list[RunRecord]) -> None:
    """Say what could not be read."""
    for run in runs:
        for problem in run.problems:
            complain(problem, "warning")


def _known(shown: Shown, path: str) -> Shown:
    from bnwatch.cli import baseline

    known = baseline.read(path)
    runs = [replace(run, report=baseline.apply(run.report, known, path)) for run in shown.runs]
    gone = baseline.gone(known, [run.report for run in shown.runs])
    for key in gone:
        complain(f"{key.replace(' ', ' at ', 1)} is in the baseline and is found no more: take it out", "note")
    return replace(shown, runs=runs, gone=gone)


def _colored(options: argparse.Namespace) -> bool:
    return options.output is None and console.wants_color(sys.stdout)


def _format(name: str, shown: Shown) -> str:
    if name in _FORMATS:
        return _FORMATS[name](shown)
    # the larger ones are imported where they are asked for
    module, function = {"html": ("page", "html"), "sarif": ("sarif", "sarif")}[name]
    return str(getattr(importlib.import_module(f"bnwatch.cli.{module}"), function)(shown))


def _text(shown: Shown) -> str:
    blocks = []
    for run in shown.runs:
        text = render.report_text(run.report, color=shown.color, width=console.width())
        blocks.append(text if len(shown.runs) == 1 else f"== {render.shorten(run.report.run)}\n\n{text}")
    return "\n\n\n".join(blocks)


def _json(shown: Shown) -> str:
    entries = []
    for run in shown.runs:
        entry = render.report_json(run.report)
        del entry["schema"]
        entries.append({**entry, "problems": list(run.problems)})
    gone = {} if shown.gone is None else {"baseline": {"gone": shown.gone}}
    return render.dumps({"schema": render.SCHEMA, "runs": entries, **gone}, indent=2)


def _markdown(shown: Shown) -> str:
    return "\n\n".join(render.report_markdown(run.report) for run in shown.runs)


_FORMATS = {"text": _text, "json": _json, "markdown": _markdown}
