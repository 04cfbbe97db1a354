"""One case with one seed in a process of its own: python -m benchmarks.clinic.worker NAME FRAMEWORK SEED FILE."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from benchmarks.clinic.case import cases, run


def main() -> None:
    """Run the case, and write its outcome."""
    name, framework, seed, out = sys.argv[1:]
    outcome = run(cases()[name, framework], int(seed), peers=True)
    Path(out).write_text(json.dumps(outcome, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
