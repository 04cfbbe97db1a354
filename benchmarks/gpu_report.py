"""One line a check: PASS with figures, FAIL with what is wrong, SKIP or INCONCLUSIVE with the reason."""

from __future__ import annotations

import contextlib
import io
import sys
import time
import traceback
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable


class Skip(Exception):  # noqa: N818 - no error
    """The check cannot be made here; says why."""


class Inconclusive(Exception):  # noqa: N818 - no error
    """The check was made and decides nothing; says why."""


class Checks:
    """Runs checks one after the other and counts them; a check returns its figures, or raises."""

    def __init__(self, part: str) -> None:
        self._part = part
        self.failed = 0

    def run(self, name: str, check: Callable[..., str], *arguments: object) -> None:
        """Run one check and print its line, at once."""
        print(f"     {self._part}: {name} ...", file=sys.stderr, flush=True)
        begin = time.perf_counter()
        try:
            with contextlib.redirect_stderr(io.StringIO()):  # what the watches say of these small networks
                word, said = "PASS", check(*arguments)
        except Skip as reason:
            word, said = "SKIP", str(reason)
        except Inconclusive as reason:
            word, said = "INCONCLUSIVE", str(reason)
        except Exception as error:  # noqa: BLE001 - a check that breaks has failed, and the next one is run
            word, said = "FAIL", f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
            self.failed += 1
            traceback.print_exc()
        print(f"{word} {self._part}: {name}: {said} ({time.perf_counter() - begin:.1f} s)", flush=True)

    def status(self) -> int:
        """Return the exit status: 0 when nothing failed."""
        return 1 if self.failed else 0
