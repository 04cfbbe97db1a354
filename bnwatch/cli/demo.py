"""``bnwatch demo``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

from bnwatch.cli.terminal import CLEAN, MisuseError

if TYPE_CHECKING:
    import argparse

_NEEDS = {"chainer": "Chainer", "sklearn": "scikit-learn"}


def demo(options: argparse.Namespace) -> int:
    """Train the sick network and its repaired twin.

    Raises:
        MisuseError: the demo, or what it needs, is not installed.
    """
    try:
        from bnwatch.examples import demo
    except ImportError as error:
        raise _misses(error) from error
    try:
        return int(cast("Any", demo).main(options.log_dir) or CLEAN)
    except ImportError as error:
        raise _misses(error) from error


def _misses(error: ImportError) -> Exception:
    package = (error.name or "").partition(".")[0]
    if package in _NEEDS:
        msg = f'the demo needs {_NEEDS[package]}: pip install "bnwatch[chainer,examples]"'
        return MisuseError(msg)
    if (error.name or "").startswith("bnwatch.examples"):
        return MisuseError("the demo is not part of this installation: run it with `make demo` in a checkout")
    return error
