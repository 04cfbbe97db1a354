"""Validation inputs that are distributed otherwise than training inputs."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from benchmarks.clinic.case import case
from benchmarks.clinic.chainer_nets import CNN, MLP, by_hand, train
from benchmarks.clinic.data import Data, digits

if TYPE_CHECKING:
    from benchmarks.clinic.case import Run


@case("BN-085/chainer", expects="BN304", framework="chainer", fast=True)
def validation_not_scaled(run: Run) -> None:
    """Training pixels are divided by 16, validation pixels are not; https://github.com/mlpack/examples/pull/213."""
    data = digits(channels_first=True)
    train(run, CNN(), Data(data.x, data.y, 16 * data.xv, data.yv), epochs=4)


@case("BN-088/chainer", expects="BN304", framework="chainer")
def validation_scaled_twice(run: Run) -> None:
    """Validation pixels are divided by 16 twice, in a loop by hand.

    https://github.com/GoogleCloudPlatform/asl-ml-immersion/pull/424
    """
    data = digits(flat=True)
    by_hand(run, MLP(64, 64), Data(data.x, data.y, data.xv / 16, data.yv), epochs=8)


@case("BN-092/chainer", expects="BN304", framework="chainer")
def another_camera(run: Run) -> None:
    """Validation images are faint and bright; https://github.com/dvl-tum/GHOST/issues/4."""
    data = digits(channels_first=True)
    train(run, CNN(), Data(data.x, data.y, np.clip(0.4 * data.xv + 0.55, 0, 1), data.yv), epochs=6)


@case("BN-092/chainer-hand", expects="BN304", framework="chainer")
def another_camera_by_hand(run: Run) -> None:
    """Validation images are faint and bright, a dense net by hand; https://github.com/dvl-tum/GHOST/issues/4."""
    data = digits(flat=True)
    by_hand(run, MLP(128, 64), Data(data.x, data.y, np.clip(0.4 * data.xv + 0.55, 0, 1), data.yv), epochs=8)
