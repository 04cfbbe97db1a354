"""What the commands share: exit status, one sentence for a misuse, and where output goes."""

from __future__ import annotations

import sys
from pathlib import Path

from bnwatch import render

CLEAN, FOUND, MISUSE = 0, 1, 2


class MisuseError(Exception):
    """What was asked cannot be done; the message is one sentence."""


def say(text: str) -> None:
    """Print what was asked for."""
    sys.stdout.write(text + "\n")


def complain(text: str, kind: str = "error") -> None:
    """Print one line about the command itself, apart from what was asked for."""
    sys.stderr.write(f"bnwatch: {kind}: {render.clean(text)}\n")


def put(text: str, path: str | None) -> None:
    """Write what was asked for into a file, or print it where none is named.

    Raises:
        MisuseError: the file cannot be written.
    """
    if path is None:
        say(text)
        return
    try:
        # what UTF-8 cannot hold of a layer name is no reason to lose the rest
        Path(path).write_text(text + "\n", encoding="utf-8", errors="backslashreplace", newline="\n")
    except (OSError, ValueError) as error:
        raise MisuseError(cannot("write", path, error)) from None


def cannot(what: str, path: str, error: Exception) -> str:
    """Return the sentence for a file that cannot be read or written."""
    return f"cannot {what} {path!r}: {getattr(error, 'strerror', None) or error}"
