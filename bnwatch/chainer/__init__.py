"""Watch batch normalization in Chainer: an extension for the Trainer and a context manager for a hand-written loop.

Importing this package imports no Chainer and patches nothing; where Chainer needs help to be imported at all, call
`bnwatch.chainer.compat.install()` before the first ``import chainer``.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from bnwatch.chainer import compat

if TYPE_CHECKING:
    from bnwatch.chainer.checking import check
    from bnwatch.chainer.experiments import attribute, crosscheck, localise, recalibrate
    from bnwatch.chainer.extension import BatchNormWatch
    from bnwatch.chainer.loop import watch

__all__ = ["BatchNormWatch", "attribute", "check", "crosscheck", "localise", "recalibrate", "watch"]

_HOMES = {
    "BatchNormWatch": "extension",
    "attribute": "experiments",
    "check": "checking",
    "crosscheck": "experiments",
    "localise": "experiments",
    "recalibrate": "experiments",
    "watch": "loop",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        msg = f"module {__name__!r} has no attribute {name!r}"
        raise AttributeError(msg)
    compat.require()
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
