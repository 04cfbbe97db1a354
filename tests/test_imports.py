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
    """Return the modules that a fresh interpreter holds after the statement."""
    code = f"import sys; {statement}; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    return set(done.stdout.split())


def test_importing_bnwatch_loads_neither_a_framework_nor_tensorboard():
    assert not loaded("import bnwatch; bnwatch.Watch") & (FRAMEWORKS | {"tensorboard"})


def test_a_report_of_what_was_recorded_needs_neither_the_watch_nor_the_rules():
    modules = loaded("import bnwatch.cli.report, bnwatch.sinks.tensorboard")
    assert "bnwatch.sinks.tensorboard.reader" in modules
    assert not modules & {"bnwatch.watch", "bnwatch.rules", "bnwatch.views"}


def test_what_bnwatch_lacks_is_told_as_of_any_module():
    with pytest.raises(AttributeError, match="module 'bnwatch' has no attribute 'watched'"):
        _ = bnwatch.watched
    assert all(hasattr(bnwatch, name) for name in bnwatch.__all__)


@pytest.mark.parametrize("module", CORE)
def test_no_module_of_the_core_loads_a_framework(module):
    assert not loaded(f"import bnwatch.{module}") & FRAMEWORKS


def test_the_test_sees_what_is_imported():
    assert "sqlite3" in loaded("import sqlite3")
