"""The quick programs of the clinic: the headline names the cause, and healthy ones hear nothing."""

from __future__ import annotations

import pytest

from benchmarks.clinic.case import cases, run
from tests.adapters.library import OLDEST, keras

if OLDEST:
    pytest.skip("the clinic's programs are written for the newest Keras 3", allow_module_level=True)

FAST = [one for one in cases().values() if one.fast and one.framework == "keras"]


@pytest.mark.slow
@pytest.mark.parametrize("one", FAST, ids=lambda one: one.name)
def test_a_program_is_told_what_is_wrong_with_it(one):
    keras.backend.clear_session()
    outcome = run(one, 0)
    said = [(entry["rule"], entry["severity"], entry["state"], entry["message"]) for entry in outcome["diagnoses"]]
    assert outcome["right"], said
    assert one.innocent or not outcome["false_alarms"], said
