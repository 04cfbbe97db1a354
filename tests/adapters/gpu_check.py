"""Runs `benchmarks/gpu_check.py`, on the CPU, where the framework under test is installed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]


def run(framework: str, sabotage: Path | None = None) -> tuple[int, list[str]]:
    """Return the exit status and the lines; ``sabotage`` is a folder with a ``sitecustomize.py``."""
    path = os.pathsep.join(str(folder) for folder in (sabotage, ROOT) if folder is not None)
    command = [sys.executable, "benchmarks/gpu_check.py", "--cpu", "--only", framework]
    environment = {**os.environ, "PYTHONPATH": path, "COLUMNS": "80"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600, check=False)
    return done.returncode, done.stdout.splitlines()


def words(lines: list[str]) -> dict[str, Any]:
    """Return the first word of each check's line by the name of the check."""
    return {line.split(": ")[1]: line.split()[0] for line in lines[:-1]}
