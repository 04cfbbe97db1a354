"""Data of the clinic's programs: scikit-learn's digits, and what is made of them."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

TRAINING = 1400


class Data(NamedTuple):
    """Training and validation data: float32 inputs, int32 classes."""

    x: NDArray[np.float32]
    y: NDArray[np.int32]
    xv: NDArray[np.float32]
    yv: NDArray[np.int32]


@cache
def _all_digits() -> tuple[NDArray[np.float32], NDArray[np.int32]]:
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        msg = "the clinic trains on scikit-learn's digits: python -m pip install scikit-learn"
        raise SystemExit(msg) from None
    x, y = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(x))
    return x[order].astype(np.float32), y[order].astype(np.int32)


def digits(*, flat: bool = False, raw: bool = False, channels_first: bool = False) -> Data:
    """Return the digits, 1400 to train and 397 to validate: images (N, 8, 8, 1) in [0, 1], ten classes.

    Args:
        flat: vectors (N, 64) in place of images.
        raw: pixels as they come, in [0, 16].
        channels_first: images (N, 1, 8, 8).
    """
    x, y = _all_digits()
    x = x.copy() if raw else x / np.float32(16.0)
    x = x if flat else x.reshape(-1, 1, 8, 8) if channels_first else x.reshape(-1, 8, 8, 1)
    return Data(x[:TRAINING], y[:TRAINING].copy(), x[TRAINING:], y[TRAINING:].copy())


def table(name: str, *, validation: float = 0.3) -> Data:
    """Return another data set of scikit-learn, standardised: ``"wine"``, ``"iris"`` or ``"breast_cancer"``."""
    from sklearn import datasets

    loader: Callable[..., tuple[NDArray[np.float64], NDArray[np.int64]]] = getattr(datasets, f"load_{name}")
    x, y = loader(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(x))
    cut = round(len(x) * (1.0 - validation))
    x = (x[order] - x[order][:cut].mean(0)) / x[order][:cut].std(0)
    x, y = x.astype(np.float32), y[order].astype(np.int32)
    return Data(x[:cut], y[:cut], x[cut:], y[cut:])
