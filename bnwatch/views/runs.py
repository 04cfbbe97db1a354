"""Every run below some directories."""

from __future__ import annotations

import os
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bnwatch import render
from bnwatch.render import SCHEMA
from bnwatch.rules import CATALOGUE
from bnwatch.sinks.tensorboard.events import SUBDIRECTORY, is_event_file
from bnwatch.views.heat import Heats
from bnwatch.views.run import RunView, UnknownError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

_HINT = (
    "no record of bnwatch is here yet: train with the log directory, for example "
    "`model.fit(..., callbacks=[bnwatch.keras.BatchNormWatch({top!r})])`, and it shows from its first sample on"
)


class MisuseError(Exception):
    """A question cannot be understood; the message is one sentence."""


class RunViews:
    """The runs below one directory or several, each as a `RunView`. New ones are found by `refresh`.

    A run is called as the path from the top to where its watch was told to write; below several tops, or one with a
    name, that name stands in front. All methods may be called from several threads.
    """

    def __init__(self, *tops: Path | tuple[str, Path]) -> None:
        """Read nothing yet: see `refresh`."""
        self._tops = [top if isinstance(top, tuple) else ("" if len(tops) == 1 else str(top), top) for top in tops]
        self._views: dict[str, RunView] = {}
        self._heats = Heats()
        self._refreshing = threading.Lock()

    def refresh(self) -> bool:
        """Find new runs, forget those that are gone, read what was added; return whether anything changed."""
        with self._refreshing:
            before = self._views
            kept = {view.directory: view for view in before.values()}
            views: dict[str, RunView] = {}
            for name, directory in self._named():
                known = kept.get(directory)
                views[name] = (
                    known if known is not None and known.run == name else RunView(directory, name, self._heats)
                )
            changed = views.keys() != before.keys()
            for view in views.values():
                changed |= view.refresh()
            self._views = views
            return changed

    def names(self) -> list[str]:
        """Return the names of the runs that hold anything, sorted."""
        return sorted(name for name, view in self._views.items() if not view.empty)

    def __getitem__(self, run: str) -> RunView:
        """Return the run of that name.

        Raises:
            UnknownError: there is none.
        """
        view = self._views.get(run)
        if view is None:
            msg = f"no run {render.shorten(run)!r}"
            raise UnknownError(msg)
        return view

    def runs(self) -> dict[str, Any]:
        """Return the answer of ``runs``."""
        views = self._views
        found = [views[name].brief() for name in sorted(views) if not views[name].empty]
        problems = [problem for name in sorted(views) for problem in views[name].problems]
        top = str(self._tops[0][1]) if self._tops else "runs"
        return {
            "schema": SCHEMA,
            "runs": found,
            "problems": problems,
            "hint": None if found else _HINT.format(top=render.clean(top)),
        }

    def version(self, run: str | None = None) -> str:
        """Return a text that changes whenever the record of a run does, or of any run."""
        views = self._views
        return "-".join(views[name].version for name in ([run] if run in views else sorted(views)))

    def answer(self, route: str, parameters: Mapping[str, str]) -> dict[str, Any]:
        """Return the answer of a route.

        Raises:
            UnknownError: it is about something that is not there.
            MisuseError: a parameter is missing or makes no sense.
        """
        if route not in ROUTES:
            msg = f"no route {render.shorten(route)!r}: there are {', '.join(ROUTES)}"
            raise UnknownError(msg)
        return ROUTES[route](self, _Asked(route, parameters))

    def _named(self) -> Iterator[tuple[str, Path]]:
        """Yield the directories that hold event files, each with a name of its own."""
        taken: set[str] = set()
        for top_name, top in self._tops:
            for directory in find_records(top):
                parts = [part for part in directory.relative_to(top).parts if part != os.curdir]
                short = parts[:-1] if parts and parts[-1] == SUBDIRECTORY else parts
                prefix = [top_name] if top_name else []
                for some in ([*prefix, *short], [*prefix, *parts], [str(top), *parts]):
                    # a name that is no text, as a file system may hold it, is none in a browser either
                    name = ("/".join(some) or os.curdir).encode("utf-8", "backslashreplace").decode()
                    if name not in taken:
                        taken.add(name)
                        yield name, directory
                        break


class _Asked:
    """The parameters of a question."""

    def __init__(self, route: str, parameters: Mapping[str, str]) -> None:
        self._route, self._parameters = route, parameters

    def text(self, name: str) -> str:
        value = self._parameters.get(name)
        if value is None:
            msg = f"{self._route} needs the parameter {name}"
            raise MisuseError(msg)
        return value

    def step(self) -> int | None:
        value = self._parameters.get("step")
        if value is None or value == "":
            return None
        if not (value.isascii() and value.isdigit() and len(value) < 20):  # noqa: PLR2004
            msg = f"step must be a whole number, got {render.shorten(value, 60)!r}"
            raise MisuseError(msg)
        return int(value)


def rule_answer(rule: str) -> dict[str, Any]:
    """Return the answer of ``rule``: what a rule is about, and its page in Markdown.

    Raises:
        UnknownError: there is no such rule, or its page is not installed.
    """
    found = next((one for one in CATALOGUE if one.id == rule), None)
    if found is None:
        msg = f"no rule {render.shorten(rule, 60)!r}; `bnwatch rules` lists them"
        raise UnknownError(msg)
    try:
        page = found.page()
    except OSError:
        page = found.summary
    return {
        "schema": SCHEMA,
        "rule": found.id,
        "name": found.name,
        "severity": str(found.severity),
        "summary": found.summary,
        "markdown": page,
    }


def find_records(top: Path) -> Iterator[Path]:
    """Yield the directories at ``top`` and below that hold event files of bnwatch, sorted; links are followed once."""
    seen: set[tuple[int, int]] = set()
    for directory, below, names in os.walk(top, followlinks=True):
        try:
            stat = Path(directory).stat()
        except OSError:
            below.clear()
            continue
        if (stat.st_dev, stat.st_ino) in seen:
            below.clear()
            continue
        # a file system without inodes numbers them all 0
        if stat.st_ino:
            seen.add((stat.st_dev, stat.st_ino))
        below.sort()
        if any(map(is_event_file, names)):
            yield Path(directory)


ROUTES: dict[str, Callable[[RunViews, _Asked], dict[str, Any]]] = {
    "runs": lambda views, _: views.runs(),
    "run": lambda views, asked: views[asked.text("run")].overview(),
    "layers": lambda views, asked: views[asked.text("run")].layers(asked.step()),
    "series": lambda views, asked: views[asked.text("run")].series(asked.text("layer")),
    "heatmap": lambda views, asked: views[asked.text("run")].heatmap(asked.text("statistic")),
    "channels": lambda views, asked: views[asked.text("run")].channels(asked.text("layer"), asked.step()),
    "rule": lambda _, asked: rule_answer(asked.text("rule")),
}
"""Everything that can be asked."""
