"""What can be chosen for a table or a heatmap, and which value of it is the farthest from healthy."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from bnwatch.signals import STATISTICS

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    from bnwatch.views.concern import Concern

    Float32 = NDArray[np.float32]

MATTERS = "matters"


class Statistic(NamedTuple):
    """A statistic for people.

    Attributes:
        title: a few words.
        unit: of its numbers; empty for plain ones.
        help: a sentence.
        distance: how far values of shape ``(..., sites, statistics)`` are from healthy; not defined where unknown.
    """

    title: str
    unit: str
    help: str
    distance: Callable[[Float32], Float32]


def column(values: Float32, name: str) -> Float32:
    """Return one statistic of ``values``, shape ``(..., sites, statistics)``."""
    chosen: Float32 = values[..., STATISTICS.index(name)]
    return chosen


def _size(name: str) -> Callable[[Float32], Float32]:
    return lambda values: np.abs(column(values, name))


def _fewest(name: str) -> Callable[[Float32], Float32]:
    return lambda values: -column(values, name)


def _apart(values: Float32) -> Float32:
    shift: Float32 = np.abs(column(values, "batch_mean") - column(values, "running_mean")) / column(
        values, "running_std"
    )
    return shift


def _ratio(name: str) -> Callable[[Float32], Float32]:
    return lambda values: np.abs(np.log(column(values, name) / column(values, "running_std")))


def _log(values: Float32) -> Float32:
    return np.abs(np.log(column(values, "std_ratio")))


CHOICES: dict[str, Statistic] = {
    MATTERS: Statistic(
        "how much it matters",
        "limits",
        "how far the worst number of the call site is off, in units of the limit of the rule about it: from 1 on it is "
        "a rule's business",
        _size("mean_shift"),
    ),
    "mean_shift": Statistic(
        "mean shift",
        "running std",
        "how far batch means are from running means, root mean square over channels; healthy: near 0",
        _size("mean_shift"),
    ),
    "std_ratio": Statistic(
        "std ratio",
        "",
        "batch over running standard deviation, geometric mean over channels; healthy: near 1",
        _log,
    ),
    "batch_mean": Statistic("batch mean", "", "mean of the batch, averaged over channels", _apart),
    "running_mean": Statistic("running mean", "", "running mean, averaged over channels", _apart),
    "batch_std": Statistic("batch std", "", "root of the batch variance averaged over channels", _ratio("batch_std")),
    "running_std": Statistic(
        "running std", "", "root of the running variance averaged over channels", _ratio("batch_std")
    ),
    "count": Statistic("elements", "a channel", "elements of the batch in each channel", _fewest("count")),
    "effective_samples": Statistic(
        "effective samples",
        "a batch",
        "independent samples that a batch is worth, from how much its mean varies",
        _fewest("effective_samples"),
    ),
    "updates": Statistic(
        "updates", "", "updates of the running statistics since their initial values", _fewest("updates")
    ),
    "non_finite": Statistic("not finite", "channels", "channels with NaN or infinity", _size("non_finite")),
    "zero_variance": Statistic("constant", "channels", "channels constant over the batch", _size("zero_variance")),
    "unexplained": Statistic(
        "moved otherwise",
        "running std",
        "what the running mean moved beyond the call of the sampled step",
        _size("unexplained"),
    ),
    "recovered_std": Statistic(
        "recovered std",
        "",
        "standard deviation of the batches since the last sample, solved from the running variance",
        _ratio("recovered_std"),
    ),
}
"""By name: `MATTERS`, and the columns of `STATISTICS` but for the flags, which are no quantity."""

_MEASURED = {"mean_shift", "std_ratio", "batch_mean", "running_mean", "batch_std", "running_std"}
"""Of these NaN says that something is not finite, of the others that the number is not known."""


def unknown_is_null(name: str) -> bool:
    """Return whether NaN of a statistic means that it is not known."""
    return name not in _MEASURED


def judged(name: str, values: Float32, concern: Concern) -> tuple[Float32, Float32]:
    """Return a statistic and its distance from healthy, each of shape ``(..., sites)``; NaN is farthest or unknown."""
    if name == MATTERS:
        matters = concern.matters(values)
        return matters, matters
    chosen = column(values, name)
    with np.errstate(all="ignore"):
        distance = CHOICES[name].distance(values)
    distance[np.isnan(distance)] = 0.0
    distance[np.isnan(chosen)] = -np.inf if unknown_is_null(name) else np.inf
    return chosen, distance
