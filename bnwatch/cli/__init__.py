"""The command line: ``bnwatch report | watch | rules | explain | demo``.

Exit status 0: clean; 1: found; 2: misuse, or nothing to read.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from typing import TYPE_CHECKING

import bnwatch
from bnwatch.cli.terminal import CLEAN, MISUSE, MisuseError, complain
from bnwatch.diagnosis import Severity

if TYPE_CHECKING:
    from collections.abc import Sequence

_INTERRUPTED, _PIPE_CLOSED = 130, 141
FORMATS = ("text", "json", "markdown", "html", "sarif")

_REPORT = """\
Print what the rules found in the runs recorded below DIR: each diagnosis with
its numbers, why it is so and what to do. It reads nothing but the record, so it
works while a training runs, and on another machine.
"""

_REPORT_EXAMPLES = """\
what is wrong, in the terminal
  bnwatch report runs/a
one file with every picture, to attach to a ticket
  bnwatch report runs/a --format html -o report.html
what the change from a to b brought
  bnwatch report --compare runs/a runs/b
let only what is new fail
  bnwatch report runs/a --write-baseline known.json
  bnwatch report runs/b --baseline known.json
annotations for a code host
  bnwatch report runs/a --format sarif -o bnwatch.sarif
the rules anew, with another threshold
  bnwatch report runs/a --replay --set BN101.alpha=1e-6

Exit status: 0 clean, 1 found (see --fail-on), 2 misuse or nothing to read.
"""

_WATCH = """\
Follow a training that runs, in the terminal: its progress, the worst layers,
and the diagnoses as they come; one line each where the output is no terminal.
DIR may still be missing. It ends when every run below DIR has ended, or with
Ctrl-C. It needs rich: pip install 'bnwatch[terminal]'
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return its exit status."""
    options = _parser().parse_args(arguments)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            # a terminal that cannot show a character of a layer name still shows the rest
            stream.reconfigure(errors="backslashreplace")
    module, name = options.run
    try:
        run = getattr(importlib.import_module(f"bnwatch.cli.{module}"), name)
        status = int(run(options) or CLEAN)
        sys.stdout.flush()
    except MisuseError as error:
        complain(str(error))
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

    report = commands.add_parser(
        "report",
        help="diagnoses of the runs recorded below a directory",
        description=_REPORT,
        epilog=_REPORT_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    _report_arguments(report)
    report.set_defaults(run=("report", "report"))

    watch = commands.add_parser(
        "watch",
        help="follow a running training in the terminal",
        description=_WATCH,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    watch.add_argument("directory", metavar="DIR", help="directory of a run or of several")
    watch.add_argument("--once", action="store_true", help="show how it stands and end: for pipes and scripts")
    watch.set_defaults(run=("follow", "watch"))

    rules = commands.add_parser("rules", help="every rule, with its thresholds")
    rules.set_defaults(run=("catalogue", "rules"))

    explain = commands.add_parser("explain", help="the page of a rule")
    explain.add_argument("rule", metavar="ID", help="id or name, such as BN101 or shared-batch-norm")
    explain.set_defaults(run=("catalogue", "explain"))

    demo = commands.add_parser("demo", help="train a sick network and its repaired twin, and watch both")
    demo.add_argument("--log-dir", metavar="DIR", help="where to write TensorBoard files")
    demo.set_defaults(run=("demo", "demo"))
    return parser


def _report_arguments(report: argparse.ArgumentParser) -> None:
    report.add_argument(
        "directory", metavar="DIR", nargs="?", help="directory of a run or of several, or an event file"
    )
    report.add_argument("--compare", nargs=2, metavar=("A", "B"), help="in place of DIR: what is other in B than in A")
    shown = report.add_argument_group("what is shown, and where")
    shown.add_argument("--format", choices=FORMATS, default="text", help="default: text")
    shown.add_argument("-o", "--output", metavar="FILE", help="write to FILE, not to the terminal")
    judged = report.add_argument_group("what fails")
    judged.add_argument(
        "--fail-on",
        choices=[str(severity) for severity in Severity],
        default="warning",
        help="exit with 1 on an active diagnosis of this severity or a graver one (default: warning); "
        "with --compare on what is new or graver in B",
    )
    judged.add_argument("--baseline", metavar="FILE", help="what FILE lists is known: it is shown, and does not fail")
    judged.add_argument(
        "--write-baseline", metavar="FILE", help="list in FILE what is active now; exit with 0, as it is known then"
    )
    anew = report.add_argument_group("the rules anew")
    anew.add_argument("--replay", action="store_true", help="run the rules of today on what was recorded")
    anew.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="RULE.NAME=NUMBER",
        dest="thresholds",
        help="with --replay: another threshold, such as BN101.alpha=1e-6",
    )
