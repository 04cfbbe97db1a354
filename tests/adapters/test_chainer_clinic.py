"""The quick programs of the clinic: the headline names the cause, and healthy ones hear nothing."""

from __future__ import annotations

import chainer
import pytest

from benchmarks.clinic.case import cases, run

FAST = [one for one in cases().values() if one.fast and one.framework == "chainer"]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:A batch with no more than one sample:UserWarning")
@pytest.mark.parametrize("one", FAST, ids=lambda one: one.name)
def test_a_program_is_told_what_is_wrong_with_it(one):
    outcome = run(one, 0, peers=True)
    said = [(entry["rule"], entry["severity"], entry["state"], entry["message"]) for entry in outcome["diagnoses"]]
    assert outcome["right"], said
    assert one.innocent or not outcome["false_alarms"], said
    assert not {"none", "failed"} & outcome["peers"].keys()
    assert chainer.config.train
