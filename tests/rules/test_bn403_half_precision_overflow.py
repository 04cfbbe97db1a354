import dataclasses

import numpy as np
import pytest

from bnwatch import testing
from bnwatch.diagnosis import Severity
from bnwatch.records import Attachment
from tests.rules import cases

LIMIT = cases.rule("BN403").thresholds["share"].value * float(np.finfo(np.float16).max)


def half(*stages, dtype=np.float16):
    """One sample for each pair of a batch and a running variance; the running one is kept in ``dtype``."""
    snapshots = []
    for step, (batch, running) in enumerate(stages, start=1):
        call = testing.call(testing.layer(), var=batch)
        with np.errstate(over="ignore"):
            kept = np.full(4, running).astype(dtype)
        held = dataclasses.replace(call.running, mean=np.zeros(4, dtype), var=kept)
        snapshots.append(testing.snapshot(step, dataclasses.replace(call, running=held)))
    return lambda: testing.signals(*snapshots)


FIRES = {
    "activations of size 2,000": half((4e6, 4e6)),
    "above_share": half((1.0, LIMIT * 1.01)),
    "above_share of the batch": half((LIMIT * 1.01, 1.0)),
    "NaN after a variance near the limit": half((6e4, 6e4), (np.nan, np.nan)),
}
QUIET = {
    "below_share": half((LIMIT * 0.99, LIMIT * 0.99)),
    "NaN that comes from elsewhere": half((1.0, 1.0), (np.nan, np.nan)),
    "mixed precision": half((4e6, 4e6), dtype=np.float32),
    "small numbers in half precision": half((1.0, 1.0)),
    "nothing watched": testing.signals,
}

test_cases = cases.runner("BN403", fires=FIRES, quiet=QUIET)


def test_infinity_is_an_error_and_a_large_variance_a_warning():
    gone, _ = cases.look("BN403", half((4e6, 4e6))())
    near, _ = cases.look("BN403", half((4e4, 4e4))())
    assert cases.severities("BN403", gone) == {Severity.ERROR}
    assert cases.severities("BN403", near) == {Severity.WARNING}
    assert "is infinity there" in gone[0].message
    assert "near 65,504" in near[0].message
    assert near[0].evidence["variance"].value == pytest.approx(4e4, rel=1e-3)


@pytest.mark.parametrize(("framework", "helps"), [("chainer 7", 1), ("keras 3", 1), ("recorded by hand", 2)])
def test_the_policy_of_the_framework_is_named(framework, helps):
    signals = half((4e6, 4e6))()
    signals.attach(Attachment((testing.layer(),), framework=framework))
    ((finding,), _) = cases.look("BN403", signals)
    assert len(finding.helps) == helps + 1
    assert finding.helps[0].lower().startswith(framework.partition(" ")[0]) or helps > 1
