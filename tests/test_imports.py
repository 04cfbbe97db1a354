"""Importing the core loads no framework; run also where the frameworks are installed, or it would show nothing."""

import subprocess
import sys
from pathlib import Path

import pytest

import bnwatch

FRAMEWORKS = {"keras", "tensorflow", "jax", "torch", "chainer", "cupy"}
FOLDER = Path(bnwatch.__file__).parent
CORE = sorted({path.stem for path in FOLDER.iterdir() if not path.name.startswith("_")} - {"keras", "chainer", "py"})


def loaded(statement: str) -> set[str]:
    """Return the top-level modules that a fresh interpreter holds after the statement."""
    code = f"import sys; {statement}; print(*(name.partition('.')[0] for name in sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    return set(done.stdout.split())


def test_importing_bnwatch_loads_neither_a_framework_nor_tensorboard():
    assert not loaded("import bnwatch") & (FRAMEWORKS | {"tensorboard"})


@pytest.mark.parametrize("module", CORE)
def test_no_module_of_the_core_loads_a_framework(module):
    assert not loaded(f"import bnwatch.{module}") & FRAMEWORKS


def test_the_test_sees_what_is_imported():
    assert "sqlite3" in loaded("import sqlite3")
