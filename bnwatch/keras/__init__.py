"""bnwatch for Keras: a callback for `fit`, a watch for loops written by hand, experiments by hand."""

from __future__ import annotations

from bnwatch.keras.callback import BatchNormWatch
from bnwatch.keras.experiments import attribute, crosscheck, localise, recalibrate
from bnwatch.keras.loop import watch

__all__ = ["BatchNormWatch", "attribute", "crosscheck", "localise", "recalibrate", "watch"]
