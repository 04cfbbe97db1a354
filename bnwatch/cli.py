"""The command line: ``bnwatch report | rules | explain | demo``.

Exit status 0: clean; 1: found; 2: misuse, or nothing to read.
"""

from __future__ import annotations

import argparse
import difflib
import os
import sys
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TextIO, cast

import bnwatch
from bnwatch import render
from bnwatch.diagnosis import Severity
from bnwatch.engine import ordered
from bnwatch.replay import parse_thresholds, replay
from bnwatch.rules import CATALOGUE
from bnwatch.sinks import console

if TYPE_CHECKING:
    from collections.abc import Sequence

    from bnwatch.diagnosis import Report
    from bnwatch.rules import Rule
    from bnwatch.sinks.tensorboard import RunRecord

CLEAN, FOUND, MISUSE = 0, 1, 2
_INTERRUPTED, _PIPE_CLOSED = 130, 141
_DEMO_NEEDS = {"chainer": "Chainer", "sklearn": "scikit-learn"}


class _MisuseError(Exception):
    """What was asked cannot be done; the message is one sentence."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return its exit status."""
    options = _parser().parse_args(arguments)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            # a terminal that cannot show a character of a layer name still shows the rest
            stream.reconfigure(errors="backslashreplace")
    try:
        status = int(options.run(options) or CLEAN)
        sys.stdout.flush()
    except _MisuseError as error:
        _complain(str(error))
        return MISUSE
    except KeyboardInterrupt:
        return _INTERRUPTED
    except BrokenPipeError:
        # the interpreter flushes once more on exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return _PIPE_CLOSED
    return status


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="bnwatch",
        description="Say what is wrong with the batch-normalization layers of a training.",
        epilog="Exit status: 0 clean, 1 found, 2 misuse.",
    )
    parser.add_argument("--version", action="version", version=f"bnwatch {bnwatch.__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    report = commands.add_parser("report", help="diagnoses of the runs recorded below a directory")
    report.add_argument("directory", metavar="DIR", help="directory of a run or of several, or an event file")
    report.add_argument("--format", choices=("text", "json", "markdown"), default="text", help="default: text")
    report.add_argument(
        "--fail-on",
        choices=[str(severity) for severity in Severity],
        default="warning",
        help="exit with 1 on an active diagnosis of this severity or a graver one (default: warning)",
    )
    report.add_argument("--replay", action="store_true", help="run the rules anew on what was recorded")
    report.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="RULE.NAME=NUMBER",
        dest="thresholds",
        help="with --replay: another threshold, such as BN101.alpha=1e-6",
    )
    report.set_defaults(run=_report)

    rules = commands.add_parser("rules", help="every rule, with its thresholds")
    rules.set_defaults(run=_rules)

    explain = commands.add_parser("explain", help="the page of a rule")
    explain.add_argument("rule", metavar="ID", help="id or name, such as BN101 or shared-batch-norm")
    explain.set_defaults(run=_explain)

    demo = commands.add_parser("demo", help="train a sick network and its repaired twin, and watch both")
    demo.add_argument("--log-dir", metavar="DIR", help="where to write TensorBoard files")
    demo.set_defaults(run=_demo)
    return parser


def _report(options: argparse.Namespace) -> int:
    from bnwatch.sinks.tensorboard import RecordError, read_runs

    try:
        runs = read_runs(options.directory, samples=options.replay)
    except RecordError as error:
        raise _MisuseError(str(error)) from None
    except OSError as error:
        msg = f"cannot read {options.directory!r}: {error.strerror or type(error).__name__}"
        raise _MisuseError(msg) from None
    runs = [replace(run, report=report) for run, report in zip(runs, _reports(runs, options), strict=True)]
    _SHOW[options.format](runs)
    for run in runs:
        for problem in run.problems:
            _complain(problem, "warning")
    limit = Severity.parse(options.fail_on)
    found = any(d.state == "active" and d.severity >= limit for run in runs for d in run.report.diagnoses)
    return FOUND if found else CLEAN


def _reports(runs: list[RunRecord], options: argparse.Namespace) -> list[Report]:
    """Return the reports of the runs, of then or of the rules anew."""
    if not options.replay:
        if options.thresholds:
            msg = "--set changes thresholds of the rules, which run with --replay only"
            raise _MisuseError(msg)
        return [replace(run.report, diagnoses=ordered(run.report.diagnoses)) for run in runs]
    try:
        thresholds = parse_thresholds(options.thresholds)
    except ValueError as error:
        msg = f"--set: {error}"
        raise _MisuseError(msg) from None
    return [replay(run, thresholds) for run in runs]


def _show_text(runs: list[RunRecord]) -> None:
    color, width = console.wants_color(sys.stdout), console.width()
    blocks = []
    for run in runs:
        text = render.report_text(run.report, color=color, width=width)
        blocks.append(text if len(runs) == 1 else f"== {render.shorten(run.report.run)}\n\n{text}")
    _say("\n\n\n".join(blocks))


def _show_json(runs: list[RunRecord]) -> None:
    entries = []
    for run in runs:
        entry = render.report_json(run.report)
        del entry["schema"]
        entries.append({**entry, "problems": list(run.problems)})
    _say(render.dumps({"schema": render.SCHEMA, "runs": entries}, indent=2))


def _show_markdown(runs: list[RunRecord]) -> None:
    _say("\n\n".join(render.report_markdown(run.report) for run in runs))


_SHOW = {"text": _show_text, "json": _show_json, "markdown": _show_markdown}


def _rules(_: argparse.Namespace) -> None:
    widths = [max(len(column) for column in columns) for columns in zip(*map(_columns, CATALOGUE), strict=True)]
    for rule in CATALOGUE:
        cells = [text.ljust(width) for text, width in zip(_columns(rule), widths, strict=True)]
        _say("  ".join([*cells, rule.summary]).rstrip())
        for name, threshold in rule.thresholds.items():
            _say(f"       {name} = {threshold.value:g} ({threshold.kind}): {threshold.why}")


def _columns(rule: Rule) -> tuple[str, str, str]:
    return rule.id, str(rule.severity), rule.name


def _explain(options: argparse.Namespace) -> None:
    wanted = options.rule.strip()
    # the page is looked up by the id in the catalogue, never by what was typed
    rule = next((r for r in CATALOGUE if wanted.upper() == r.id or wanted.lower() == r.name), None)
    if rule is None:
        known = [name for r in CATALOGUE for name in (r.id, r.name)]
        near = difflib.get_close_matches(wanted.upper(), known, 1) or difflib.get_close_matches(wanted, known, 1)
        hint = f"did you mean {near[0]}?" if near else "`bnwatch rules` lists them"
        msg = f"no rule {render.shorten(wanted)!r}; {hint}"
        raise _MisuseError(msg)
    try:
        page = rule.page()
    except OSError:
        msg = f"the page of {rule.id} is not part of this installation; its summary: {rule.summary}"
        raise _MisuseError(msg) from None
    _say(page.rstrip("\n"))


def _demo(options: argparse.Namespace) -> int:
    try:
        from bnwatch.examples import demo
    except ImportError as error:
        raise _demo_misses(error) from error
    try:
        return int(cast("Any", demo).main(options.log_dir) or CLEAN)
    except ImportError as error:
        raise _demo_misses(error) from error


def _demo_misses(error: ImportError) -> Exception:
    package = (error.name or "").partition(".")[0]
    if package in _DEMO_NEEDS:
        msg = f'the demo needs {_DEMO_NEEDS[package]}: pip install "bnwatch[chainer,examples]"'
        return _MisuseError(msg)
    if (error.name or "").startswith("bnwatch.examples"):
        return _MisuseError("the demo is not part of this installation: run it with `make demo` in a checkout")
    return error


def _say(text: str) -> None:
    sys.stdout.write(text + "\n")


def _complain(text: str, kind: str = "error") -> None:
    stream: TextIO = sys.stderr
    stream.write(f"bnwatch: {kind}: {render.clean(text)}\n")


if __name__ == "__main__":
    sys.exit(main())
