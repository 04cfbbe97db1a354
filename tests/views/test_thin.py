"""Thinning and numbers against brute force."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from bnwatch.render import json_number
from bnwatch.views.thin import numbers, numbers_or_none, thin

FLOATS = st.floats(width=32) | st.sampled_from([math.nan, math.inf, -math.inf])


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 3), st.integers(8, 60), st.integers(0, 400), st.data())
def test_thinning_keeps_the_extremes_of_every_bucket(criteria, limit, count, data):
    lines = [data.draw(arrays.arrays(np.float32, count, elements=FLOATS)) for _ in range(criteria)]
    kept = thin(count, limit, *lines).tolist()
    assert len(kept) <= limit
    assert kept == sorted(set(kept))
    if count:
        assert {kept[0], kept[-1]} == {0, count - 1}
    if count <= limit:
        assert kept == list(range(count))
        return
    buckets = max((limit - 2) // max(2 * criteria, 1), 1)
    for number in range(buckets):
        bucket = range(number * count // buckets, (number + 1) * count // buckets)
        for line in lines:
            known = [line[n] for n in bucket if not math.isnan(line[n])]
            shown = [line[n] for n in kept if n in bucket and not math.isnan(line[n])]
            if known:
                assert (min(shown), max(shown)) == (min(known), max(known))


@settings(max_examples=100, deadline=None)
@given(arrays.arrays(np.float64, st.tuples(st.integers(0, 4), st.integers(0, 4)), elements=st.floats(width=64)))
def test_numbers_are_those_of_json_to_six_digits(values):
    listed = json.loads(json.dumps(numbers(values), allow_nan=False))
    assert np.shape(listed) == values.shape or values.size == 0
    for mine, value in zip([cell for row in listed for cell in row], values.ravel().tolist(), strict=True):
        if math.isfinite(value):
            assert mine == pytest.approx(value, rel=1e-5, abs=1e-280)
        else:
            assert mine == json_number(value)


def test_what_is_not_known_is_null():
    assert numbers_or_none(np.array([[1.0, np.nan], [np.inf, -2.5]])) == [[1.0, None], ["Infinity", -2.5]]
    assert numbers(np.array([np.nan, 0.1], np.float32)) == ["NaN", 0.1]
    assert numbers(np.array([1.0, 2.0]), unknown=np.array([True, False])) == [None, 2.0]
