"""What a look keeps from one to the next."""

import numpy as np
import pytest

from bnwatch import evidence, testing
from bnwatch.evidence import Updates, entries


def test_entries_are_spread_evenly_and_bounded():
    assert entries(5).tolist() == [0, 1, 2, 3, 4]
    picked = entries(10_000)
    assert (len(picked), picked[0], picked[-1]) == (1024, 0, 9999)
    assert set(np.diff(picked)) <= {9, 10}
    assert entries(0).size == 0


def test_the_update_is_the_change_a_step_relative_to_the_parameters():
    updates = Updates()
    before = [(np.full(4, 2.0), 4), (np.zeros(2), 12)]
    assert updates.since(10, {"dense": before}) == {}
    now = [(np.full(4, 2.0), 4), (np.full(2, 0.5), 12)]
    expected = np.sqrt(12 * 0.25 / (4 * 4.0)) / 5
    assert updates.since(15, {"dense": now, "new": now}) == {"dense": pytest.approx(expected)}
    # the second look after one step, for the gradients, tells the same
    assert updates.since(15, {"dense": now}) == {"dense": pytest.approx(expected)}
    assert updates.since(16, {"dense": now, "new": before}) == {"dense": 0.0, "new": pytest.approx(_back())}


def _back():
    """Return the relative change of ``new`` in the step back: its second parameter goes to zero."""
    return np.sqrt(12 * 0.25 / (4 * 4.0 + 12 * 0.25))


def test_parameters_that_leave_zero_move_without_bound_and_those_that_stay_do_not_move():
    updates = Updates()
    updates.since(1, {"a": [(np.zeros(3), 3)], "b": [(np.zeros(3), 3)], "none": []})
    assert updates.since(2, {"a": [(np.ones(3), 3)], "b": [(np.zeros(3), 3)], "none": []}) == {"a": np.inf, "b": 0.0}


def test_a_look_carries_what_the_laboratory_saw():
    lab = testing.FakeLaboratory.separable()
    first = evidence.look(lab, step=1, epoch=0, gradients=False)
    lab.weights = lab.weights * 1.5
    second = evidence.look(lab, step=6, epoch=0, gradients=True)
    assert [layer.update for layer in first.layers] == [None, None, None]
    assert [layer.update for layer in second.layers] == [None, None, pytest.approx(0.1)]
    inputs = lab.data["training"][0].inputs
    expected = np.sqrt(inputs.var(axis=0).mean()) / np.sqrt(np.square(inputs).mean())
    assert first.entry == pytest.approx(expected)
