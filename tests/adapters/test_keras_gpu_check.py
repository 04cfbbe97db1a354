"""The script for a machine with a GPU: here its own logic, on the CPU."""

from __future__ import annotations

import pytest

from tests.adapters.gpu_check import run, words
from tests.adapters.library import LEGACY, OLDEST

NEED_A_GPU = {"steps without a sample", "overhead"}


@pytest.mark.slow
@pytest.mark.skipif(LEGACY or OLDEST, reason="the script is written for the newest Keras 3")
def test_every_check_that_needs_no_gpu_passes():
    status, lines = run("keras")
    assert status == 0, lines
    found = words(lines)
    assert {name for name, word in found.items() if word == "SKIP"} == NEED_A_GPU
    assert {name for name, word in found.items() if word == "PASS"} == {
        "environment",
        "statistics",
        "unchanged",
        "experiments and repair",
    }
