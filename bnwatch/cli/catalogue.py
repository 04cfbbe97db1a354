"""``bnwatch rules`` and ``bnwatch explain``."""

from __future__ import annotations

import difflib
from typing import TYPE_CHECKING

from bnwatch import render
from bnwatch.cli.terminal import MisuseError, say
from bnwatch.rules import CATALOGUE

if TYPE_CHECKING:
    import argparse

    from bnwatch.rules import Rule


def rules(_: argparse.Namespace) -> None:
    """Print every rule with its thresholds."""
    widths = [max(len(column) for column in columns) for columns in zip(*map(_columns, CATALOGUE), strict=True)]
    for rule in CATALOGUE:
        cells = [text.ljust(width) for text, width in zip(_columns(rule), widths, strict=True)]
        say("  ".join([*cells, rule.summary]).rstrip())
        for name, threshold in rule.thresholds.items():
            say(f"       {name} = {threshold.value:g} ({threshold.kind}): {threshold.why}")


def _columns(rule: Rule) -> tuple[str, str, str]:
    return rule.id, str(rule.severity), rule.name


def explain(options: argparse.Namespace) -> None:
    """Print the page of a rule.

    Raises:
        MisuseError: there is no such rule, or its page is not installed.
    """
    wanted = options.rule.strip()
    # the page is looked up by the id in the catalogue, never by what was typed
    rule = next((r for r in CATALOGUE if wanted.upper() == r.id or wanted.lower() == r.name), None)
    if rule is None:
        known = [name for r in CATALOGUE for name in (r.id, r.name)]
        near = difflib.get_close_matches(wanted.upper(), known, 1) or difflib.get_close_matches(wanted, known, 1)
        hint = f"did you mean {near[0]}?" if near else "`bnwatch rules` lists them"
        msg = f"no rule {render.shorten(wanted)!r}; {hint}"
        raise MisuseError(msg)
    try:
        page = rule.page()
    except OSError:
        msg = f"the page of {rule.id} is not part of this installation; its summary: {rule.summary}"
        raise MisuseError(msg) from None
    say(page.rstrip("\n"))
