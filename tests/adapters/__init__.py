"""Tests against the real frameworks."""

import os
from importlib.util import find_spec

from bnwatch.chainer import compat

PLAIN = "BNWATCH_TEST_PLAIN" in os.environ
"""Chainer is to be imported as it is: the tests of an old machine do without help."""

if find_spec("chainer") is not None and not PLAIN:
    compat.install()  # before any test module imports Chainer
