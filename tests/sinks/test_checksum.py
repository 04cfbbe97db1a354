"""CRC32C, against the published values and TensorBoard's own."""

from __future__ import annotations

import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tensorboard.compat.tensorflow_stub import pywrap_tensorflow

from bnwatch.sinks.tensorboard import checksum
from bnwatch.sinks.tensorboard.checksum import crc32c, crc32c_numpy, masked


@pytest.mark.parametrize("crc", [crc32c, crc32c_numpy])
@pytest.mark.parametrize(
    ("data", "value"),
    # RFC 3720, B.4
    [
        (b"", 0),
        (bytes(32), 0x8A9136AA),
        (b"\xff" * 32, 0x62A8AB43),
        (bytes(range(32)), 0x46DD794E),
        (bytes(range(31, -1, -1)), 0x113FDB5C),
        (b"123456789", 0xE3069283),
    ],
)
def test_published_values(crc, data, value):
    assert crc(data) == value


@settings(deadline=None)
@given(st.binary(max_size=300))
def test_checksums_are_tensorboards(data):
    assert crc32c_numpy(data) == pywrap_tensorflow.crc32c(data)
    assert masked(data) == pywrap_tensorflow.masked_crc32c(data)


@pytest.mark.parametrize("beyond", range(-5, 6))
@pytest.mark.parametrize("blocks", [1, 2])
def test_blocks_join(blocks, beyond):
    data = bytes(n * n % 251 for n in range(blocks * checksum._BLOCK + beyond))
    assert crc32c_numpy(data) == pywrap_tensorflow.crc32c(data)


def test_numpy_stands_in(monkeypatch):
    monkeypatch.setitem(sys.modules, "google_crc32c", None)
    assert checksum._fastest() is crc32c_numpy
