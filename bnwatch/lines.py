"""Lines of the user's code: how they are named, and from which of them a layer is called.

A line is named as ``model.py:12``, relative to the working directory where the file lies below it. What has no file,
as in a notebook or at a prompt, has no name.
"""

from __future__ import annotations

import inspect
import os
import re
import sysconfig
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Sequence
    from types import CodeType, FrameType

    Lines = tuple[str | None, ...]

_INSIDE = os.path.join(os.path.dirname(__file__), "")  # noqa: PTH118, PTH120 - compared as text
_INSTALLED = (_INSIDE, *map(sysconfig.get_path, ("purelib", "platlib", "stdlib")), "<frozen ")
_DEEPEST = 16
"""Lines that are kept of one way to a layer."""


@lru_cache(maxsize=1024)
def installed(filename: str) -> bool:
    """Return whether a file is bnwatch's, Python's or of an installed package: none of the user's own."""
    return filename.startswith(_INSTALLED) or re.search(r"[\\/](site|dist)-packages[\\/]", filename) is not None


def named(filename: str, line: int) -> str | None:
    """Return the name of a line; None where there is no such file."""
    try:
        path = os.path.abspath(filename)  # noqa: PTH100 - a Path would fold what symbolic links keep apart
        if not os.path.isfile(path):  # noqa: PTH113 - of a name that holds anything it is False
            return None
        return f"{path.removeprefix(os.path.join(os.getcwd(), ''))}:{line}"  # noqa: PTH109, PTH118 - compared as text
    except OSError:  # the working directory is gone
        return None


def code_of(value: Any) -> CodeType | None:
    """Return the code of a function of a class, None for anything else; decorators that say so are looked through."""
    function = inspect.unwrap(value) if callable(value) else value
    return getattr(function, "__code__", None)


def _among(code: CodeType, codes: Iterable[CodeType | None]) -> bool:
    """Return whether a code is one of these, and no mere equal; what PyTorch compiles cannot be hashed."""
    return any(code is one for one in codes)


@dataclass(frozen=True, slots=True)
class Trail:
    """The user's lines on the way to one call of a layer, the innermost first.

    ``direct`` says that the first of them calls the layer itself, not a container that calls it.
    """

    lines: tuple[str, ...]
    direct: bool


NOWHERE = Trail((), direct=False)


@dataclass(frozen=True, slots=True)
class Callers:
    """How the stack below a layer is read.

    Attributes:
        calls: the code that runs whatever layer is called.
        until: code of the framework or of bnwatch that runs steps: what is farther out says nothing of the model.
        generated: how the files of code begin that the framework writes in place of the user's.
    """

    calls: Collection[CodeType | None]
    until: Collection[CodeType]
    generated: str | None = None

    def trail(self, frame: FrameType | None, kind: type) -> Trail:
        """Return the way to the call of a layer of class ``kind`` that runs in ``frame`` or farther out."""
        own = [code for base in kind.__mro__ for value in vars(base).values() if (code := code_of(value)) is not None]
        found: list[str] = []
        calls, direct = 0, False
        while frame is not None and not _among(frame.f_code, self.until) and len(found) < _DEEPEST:
            code = frame.f_code
            calls += _among(code, self.calls)
            if not (installed(code.co_filename) or (not found and _among(code, own))):
                line = None if self._generates(code.co_filename) else named(code.co_filename, frame.f_lineno)
                if line is None:
                    break
                direct = direct if found else calls <= 1
                found.append(line)
            frame = frame.f_back
        return Trail(tuple(found), direct)

    def _generates(self, filename: str) -> bool:
        return self.generated is not None and os.path.basename(filename).startswith(self.generated)  # noqa: PTH119


def told_apart(trails: Sequence[Trail]) -> Lines:
    """Return for each call site of a layer the line that it is called from, None where none says anything.

    That is the innermost line through which no other call site of the layer is reached: where a block that holds the
    layer is called twice, the two calls of the block. Where there is none, or but one call site, it is the line that
    calls the layer itself.
    """
    found: list[str | None] = []
    for number, trail in enumerate(trails):
        others = {line for other, one in enumerate(trails) if other != number for line in one.lines}
        own = next((line for line in trail.lines if line not in others), None) if len(trails) > 1 else None
        found.append(own or (trail.lines[0] if trail.direct else None))
    return tuple(found)


def merged(known: Lines, found: Lines) -> Lines:
    """Return what holds for two steps: None for a call site that they call from different lines."""
    longer, shared = max(known, found, key=len), min(len(known), len(found))
    return tuple(line if n >= shared or known[n] == found[n] else None for n, line in enumerate(longer))
