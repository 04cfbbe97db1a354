"""Tests against the real frameworks."""

from importlib.util import find_spec

from bnwatch.chainer import compat

if find_spec("chainer") is not None:
    compat.install()  # before any test module imports Chainer
