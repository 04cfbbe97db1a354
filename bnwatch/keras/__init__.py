"""bnwatch for Keras 3 on TensorFlow: a callback for `fit`, a watch for loops written by hand, experiments by hand."""

from __future__ import annotations

from typing import Any

import keras as _keras

from bnwatch.keras.callback import BatchNormWatch
from bnwatch.keras.check import check
from bnwatch.keras.split import split_shared

if _keras.backend.backend() == "tensorflow":
    from bnwatch.keras.experiments import crosscheck
    from bnwatch.keras.loop import watch
else:

    def _unsupported(*_: Any, **__: Any) -> Any:
        msg = f"bnwatch.keras needs the TensorFlow backend of Keras for this, not {_keras.backend.backend()}"
        raise NotImplementedError(msg)

    crosscheck = watch = _unsupported

__all__ = ["BatchNormWatch", "check", "crosscheck", "split_shared", "watch"]
