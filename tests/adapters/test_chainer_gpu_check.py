"""The script for a machine with a GPU: here its own logic, on the CPU."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from .gpu_check import run, words

if TYPE_CHECKING:
    from pathlib import Path

NEED_A_GPU = {"cuDNN, statistics", "steps without a sample", "one copy a sample", "memory", "overhead"}

SABOTAGE = """
import sys
if any("gpu_chainer" in argument for argument in sys.orig_argv):
    from bnwatch.chainer import compat
    compat.install()
    {0}
"""
WRONG = """
    from bnwatch.chainer import session
    right = session._batch_statistics
    session._batch_statistics = lambda call, mean, scale: right(call, mean + 1e-4, scale)
"""
MEDDLING = """
    from bnwatch.chainer.session import Session
    right = Session.end_step
    def end_step(self, *arguments):
        right(self, *arguments)
        if self.layers.links[0].avg_mean is not None:
            self.layers.links[0].avg_mean += 1e-6
    Session.end_step = end_step
"""


@pytest.mark.slow
def test_every_check_that_needs_no_gpu_passes() -> None:
    status, lines = run("chainer")
    found = words(lines)
    assert status == 0, lines
    assert {name for name, word in found.items() if word == "SKIP"} == NEED_A_GPU
    assert {word for name, word in found.items() if name not in NEED_A_GPU} == {"PASS"}
    assert lines[-1] == f"{len(found) - 5} PASS, 0 FAIL, 0 INCONCLUSIVE, 5 SKIP"
    assert len(found) >= 20


@pytest.mark.slow
@pytest.mark.parametrize(
    ("sabotage", "failing"),
    [
        (WRONG, {"MLP, statistics", "CNN, statistics", "mixed16, statistics"}),
        (MEDDLING, {"MLP, unchanged", "CNN, unchanged", "Trainer, Evaluator, snapshot"}),
    ],
)
def test_what_is_wrong_fails(sabotage: str, failing: set[str], tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(SABOTAGE.format(sabotage), encoding="utf-8")
    status, lines = run("chainer", tmp_path)
    found = words(lines)
    assert status == 1
    assert failing <= {name for name, word in found.items() if word == "FAIL"}
    assert found["MLP trains as on the host"] == "PASS"
