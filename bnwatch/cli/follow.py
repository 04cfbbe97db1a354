"""``bnwatch watch``: a running training in the terminal."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bnwatch import render
from bnwatch.cli.terminal import CLEAN, MisuseError, complain

if TYPE_CHECKING:
    import argparse

    from rich.console import Console

    from bnwatch.views import RunViews

PAUSE = 1.0
"""Seconds between two looks at the record."""

_REDRAW = 15.0
"""Seconds after which the picture is drawn anew where nothing was added."""


def watch(options: argparse.Namespace) -> int:
    """Show how the runs stand until they have ended, or once.

    Raises:
        MisuseError: rich is missing, or with ``--once`` there is nothing to show.
    """
    try:
        from rich.console import Console
    except ImportError:
        msg = 'bnwatch watch draws with rich: pip install "bnwatch[terminal]"; `bnwatch report` works without it'
        raise MisuseError(msg) from None
    from bnwatch.views import RunViews

    # what comes from a record is shown as it is: no markup, no emoji, no links
    console = Console(markup=False, emoji=False, highlight=False, soft_wrap=False)
    views = RunViews(Path(options.directory))
    try:
        views.refresh()
        if options.once:
            return _once(console, views, options.directory)
        if not _runs(views):
            complain(f"waiting for a record in {options.directory!r}; Ctrl-C ends", "note")
        (_draw if console.is_terminal and not console.is_dumb_terminal else _tell)(console, views)
    except KeyboardInterrupt:
        # how one leaves it
        return CLEAN
    console.print(f"ended; more: bnwatch report {render.clean(options.directory)}", soft_wrap=True)
    return CLEAN


def _runs(views: RunViews) -> list[dict[str, Any]]:
    runs: list[dict[str, Any]] = views.runs()["runs"]
    return runs


def _ended(views: RunViews) -> bool:
    runs = _runs(views)
    return bool(runs) and all(run["complete"] for run in runs)


def _once(console: Console, views: RunViews, directory: str) -> int:
    from bnwatch.cli import screen

    if not _runs(views):
        msg = f"no bnwatch record in {directory!r} or below"
        raise MisuseError(msg)
    console.print(screen.screen(views, console.width, height=None, plain=_plain(console)))
    return CLEAN


def _draw(console: Console, views: RunViews) -> None:
    """Draw over what was drawn before, until every run has ended."""
    from rich.live import Live

    from bnwatch.cli import screen

    def picture() -> Any:
        return screen.screen(views, console.width, height=console.height, plain=_plain(console))

    with Live(picture(), console=console, auto_refresh=False) as live:
        size, drawn = console.size, time.monotonic()
        while not _ended(views):
            time.sleep(PAUSE)
            # the time since the last sample is drawn, too, but not every second: the training needs the processor
            if views.refresh() or console.size != size or time.monotonic() - drawn > _REDRAW:
                size, drawn = console.size, time.monotonic()
                live.update(picture(), refresh=True)


def _tell(console: Console, views: RunViews) -> None:
    """Print a line for each evaluation and each diagnosis, until every run has ended."""
    from bnwatch.cli.screen import title

    told: dict[str, set[str]] = {}
    grew = True
    while True:
        for run in _runs(views) if grew else ():
            known = told.setdefault(run["run"], set())
            for line in _news(run, views[run["run"]].overview()):
                if line not in known:
                    known.add(line)
                    console.print(f"{title(views, run['run'])}: {line}", soft_wrap=True)
        sys.stdout.flush()
        if _ended(views):
            return
        time.sleep(PAUSE)
        grew = views.refresh()


def _news(run: dict[str, Any], overview: dict[str, Any]) -> list[str]:
    from bnwatch.cli.screen import share

    lines = [
        f"step {e['step']:,}, epoch {e['epoch'] + 1:,}: accuracy {share(e['train_accuracy'])} in training, "
        f"{share(e['accuracy'])} in evaluation"
        for e in overview["evaluations"]
    ]
    lines += [
        render.shorten(
            f"{d['severity']}[{d['rule']}]{'' if d['state'] == 'active' else ', ' + d['state']}: {d['message']}"
        )
        for d in overview["report"]["diagnoses"]
    ]
    return [*lines, *(["ended"] if run["complete"] else [])]


def _plain(console: Console) -> bool:
    """Return whether only ASCII can be drawn."""
    return not (console.encoding or "").lower().startswith("utf")
