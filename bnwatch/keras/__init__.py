"""bnwatch for Keras: a callback for `fit`, a watch for loops written by hand, experiments by hand."""

from __future__ import annotations

from bnwatch.keras.callback import BatchNormWatch
from bnwatch.keras.check import check
from bnwatch.keras.experiments import attribute, crosscheck, localise, recalibrate
from bnwatch.keras.loop import watch
from bnwatch.keras.split import split_shared

__all__ = [
    "BatchNormWatch",
    "attribute",
    "check",
    "crosscheck",
    "localise",
    "recalibrate",
    "split_shared",
    "watch",
]
