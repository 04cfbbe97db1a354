"""Pure numerics of batch-normalization statistics: moments, moving averages, noise floors.

Notation follows Ioffe and Szegedy (2015, arXiv:1502.03167): a layer normalizes a channel with the mean and the biased
variance of ``m`` elements. ``decay`` is always the weight of the *old* value in a moving average.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Vector = NDArray[np.float64]


CONVERGED = 1e-14
"""Relative change at which a continued fraction in float64 is as good as it gets."""


ROUNDING = 1e-12
"""Variance, in squared means, below which a channel counts as constant: what float32 makes of one stays under it."""


@dataclass(frozen=True, slots=True)
class Moments:
    """Mean and biased variance, each of shape ``(channels,)``, of ``count`` elements per channel."""

    mean: Vector
    var: Vector
    count: int


def pool(a: Moments, b: Moments) -> Moments:
    """Merge the moments of two disjoint samples.

    Uses the pairwise update of Chan, Golub and LeVeque (1979, eq. 2.1), which does not cancel when the mean is large
    against the standard deviation.
    """
    count = a.count + b.count
    delta = b.mean - a.mean
    mean = a.mean + delta * (b.count / count)
    squares = a.var * a.count + b.var * b.count + np.square(delta) * (a.count * b.count / count)
    return Moments(mean, squares / count, count)


def bessel_factor(count: float) -> float:
    """Return ``count / (count - 1)``, what turns a biased variance into an unbiased one; 1 for a single element.

    A single element has no unbiased variance; frameworks store its biased one, so nothing is to be taken out.
    """
    return count / (count - 1.0) if count > 1 else 1.0


def effective_batches(decay: float) -> float:
    """Return how many batches an average with ``decay`` is worth: (1 + d) / (1 - d), Kish's effective sample size.

    Raises:
        ValueError: ``decay`` lies outside [0, 1).
    """
    if not 0.0 <= decay < 1.0:
        msg = f"decay must lie in [0, 1), got {decay!r}"
        raise ValueError(msg)
    return (1.0 + decay) / (1.0 - decay)


def average_noise(decay: NDArray[np.floating]) -> Vector:
    """Return the variance of a moving average in units of that of the values it averages, which are independent.

    With decay a it is sum over k of ((1 - a) a^k)^2 = (1 - a) / (1 + a), the inverse of `effective_batches`; less
    while the initial value still weighs something. Zero from a decay of 1 on, where nothing is taken in.
    """
    a = np.clip(decay, 0.0, 1.0)
    noise: Vector = (1.0 - a) / (1.0 + a)
    return noise


def initial_weight(decay: float, updates: float) -> float:
    """Return ``decay ** updates``: the share of the initial value left in a moving average after so many updates."""
    return float(decay**updates)


def updates_until(decay: float, weight: float) -> int:
    """Return after how many updates the initial value weighs less than ``weight``; 0 when it never held any."""
    if decay <= 0.0:
        return 1
    if decay >= 1.0:
        msg = f"decay must lie below 1, got {decay!r}: a moving average with decay 1 never forgets"
        raise ValueError(msg)
    return math.floor(math.log(weight) / math.log(decay)) + 1


def shift_noise(decay: float, effective_samples: float) -> float:
    """Return the standard deviation, in units of the channel's own, of (batch mean - running mean) in a healthy layer.

    Under a moving average with decay ``a`` and ``m`` effective samples a batch, Var = (1 / m) * 2 / (1 + a): the
    batch's own variance plus that of the average, (1 - a) / (1 + a) of it.
    """
    return math.sqrt(2.0 / ((1.0 + decay) * effective_samples))


def regularized_beta(x: float, a: float, b: float) -> float:
    """Return the regularized incomplete beta function I_x(a, b), by Lentz's continued fraction (DLMF 8.17.22)."""
    if not (0.0 <= x <= 1.0 and a > 0.0 and b > 0.0):
        msg = f"need 0 <= x <= 1 and a, b > 0, got x={x!r}, a={a!r}, b={b!r}"
        raise ValueError(msg)
    if x in (0.0, 1.0):
        return x
    if x > (a + 1.0) / (a + b + 2.0):
        return 1.0 - regularized_beta(1.0 - x, b, a)
    log_front = (
        math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b) + a * math.log(x) + b * math.log1p(-x) - math.log(a)
    )
    tiny = 1e-300
    c, d = 1.0, 1.0 / max(1.0 - (a + b) * x / (a + 1.0), tiny)
    value = d
    for m in range(1, 10_000):
        even = m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m))
        odd = -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1))
        for term in (even, odd):
            d = 1.0 + term * d
            c = 1.0 + term / c
            d = 1.0 / (d if abs(d) > tiny else tiny)
            c = c if abs(c) > tiny else tiny
            value *= c * d
        if abs(c * d - 1.0) < CONVERGED:
            break
    return math.exp(log_front) * value


def f_survival(f: float, between: float, within: float) -> float:
    """Return P(F > f) for an F distribution with ``between`` and ``within`` degrees of freedom (DLMF 8.17)."""
    if f <= 0.0:
        return 1.0
    if math.isinf(f):
        return 0.0
    return regularized_beta(within / (within + between * f), within / 2.0, between / 2.0)


def binomial_survival(successes: int, trials: int, chance: float) -> float:
    """Return P(X >= successes) for a binomial X, exactly (DLMF 8.17.5)."""
    if successes <= 0:
        return 1.0
    return regularized_beta(chance, successes, trials - successes + 1)


def binomial_interval(share: float, trials: int, z: float = 1.96) -> tuple[float, float]:
    """Return Wilson's score interval (1927) for a share observed in ``trials`` examples; 95 % by default."""
    if trials <= 0:
        return 0.0, 1.0
    z2 = z * z / trials
    centre = (share + z2 / 2.0) / (1.0 + z2)
    half = z / (1.0 + z2) * math.sqrt(share * (1.0 - share) / trials + z2 / (4.0 * trials))
    return max(0.0, centre - half), min(1.0, centre + half)


def mcnemar(only_first: int, only_second: int) -> float:
    """Return the exact one-sided p-value that the first of two paired classifiers is better (McNemar, 1947).

    Args:
        only_first: examples that only the first classifier gets right.
        only_second: examples that only the second gets right.
    """
    return binomial_survival(only_first, only_first + only_second, 0.5)


def paired_interval(both: int, only_first: int, only_second: int, neither: int, z: float = 1.96) -> tuple[float, float]:
    """Return the interval of the difference of two shares of the same examples; 95 % by default.

    Newcombe (1998, Statistics in Medicine 17:2635-2650, method 10): Wilson's intervals of the two shares, put together
    with the correlation of the pairs, which is corrected for continuity where it is positive.

    Args:
        both: examples that both classifiers get right.
        only_first: examples that only the first gets right.
        only_second: examples that only the second gets right.
        neither: examples that none gets right.
        z: standard deviations of a normal distribution to either side.

    Raises:
        ValueError: there are no examples.
    """
    n = both + only_first + only_second + neither
    if n <= 0:
        msg = "a difference needs at least one example"
        raise ValueError(msg)
    first, second = both + only_first, both + only_second
    product = float(both * neither - only_first * only_second)
    if product > 0:
        product = max(product - n / 2.0, 0.0)
    scale = math.sqrt(float(first) * (n - first) * second * (n - second))
    phi = product / scale if scale else 0.0
    (low1, high1), (low2, high2) = (binomial_interval(k / n, n, z) for k in (first, second))
    below1, above1, below2, above2 = first / n - low1, high1 - first / n, second / n - low2, high2 - second / n
    down = math.sqrt(max(below1**2 - 2.0 * phi * below1 * above2 + above2**2, 0.0))
    up = math.sqrt(max(above1**2 - 2.0 * phi * above1 * below2 + below2**2, 0.0))
    difference = (only_first - only_second) / n
    return max(-1.0, difference - down), min(1.0, difference + up)


def site_variances(
    deviation_sum: NDArray[np.float64], square_sum: NDArray[np.float64], steps: int
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return the between-site and within-site mean squares of a two-way analysis of variance, per channel.

    Steps are the blocks, call sites the treatment (Fisher 1925, ch. VII). The spread over steps is the yardstick, so
    the number of elements a batch *really* holds need not be known: neighbouring pixels are correlated.

    Args:
        deviation_sum: over steps, of each site's value minus the mean over sites at that step; shape
            ``(sites, channels)``, at least two sites.
        square_sum: over steps and sites, of the squares of these deviations; shape ``(channels,)``.
        steps: how many steps were summed, at least two.

    Returns:
        Two arrays of shape ``(channels,)``. Where sites see the same data both estimate the same variance; the first
        grows by ``steps`` times the variance between sites.
    """
    sites = len(deviation_sum)
    explained = np.square(deviation_sum).sum(axis=0) / steps
    between = explained / (sites - 1)
    within = np.maximum(square_sum - explained, 0.0) / ((steps - 1) * (sites - 1))
    return between, within


def between_and_within(values: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return the variances of `site_variances` from values of shape ``(steps, sites, channels)``."""
    deviation = values - values.mean(axis=1, keepdims=True)
    return site_variances(deviation.sum(axis=0), np.square(deviation).sum(axis=(0, 1)), len(values))


def sites_apart(mean: NDArray[np.float64], var: NDArray[np.float64]) -> tuple[float, float, float]:
    """Return how far call sites are apart, from their batch moments at the same steps.

    Args:
        mean: batch means, shape ``(steps, sites, channels)``, two steps and two sites at least.
        var: batch variances with epsilon added, likewise.

    Returns:
        The standard deviation between site means, in standard deviations of the activations, and that between the log
        standard deviations, each with the noise taken out and as root mean square over channels; then the larger of
        the two F ratios, to be held against `same_sites_p`.
    """
    steps = len(mean)
    # in units of each channel, or the widest would decide alone
    values = mean / np.sqrt(var[-1].mean(axis=0)), 0.5 * np.log(var)
    apart, ratios = [], []
    for value in values:
        between, within = between_and_within(value)
        apart.append(float(np.sqrt(np.mean(np.maximum(between - within, 0.0) / steps))))
        with np.errstate(divide="ignore", invalid="ignore"):
            ratios.append(between.sum() / within.sum())
    return apart[0], apart[1], float(np.fmax(*ratios))


def same_sites_p(ratio: float, sites: int, steps: int) -> float:
    """Return the p-value that all call sites see the same data.

    ``ratio`` is that of the two mean squares of `site_variances`, each summed over channels. Channels are correlated,
    therefore it is held against the F distribution of a single channel: exact when all channels move together,
    conservative otherwise. NaN (no variance at all) counts as no difference.
    """
    return 1.0 if math.isnan(ratio) else f_survival(ratio, sites - 1, (steps - 1) * (sites - 1))


@lru_cache(maxsize=256)
def same_sites_limit(alpha: float, sites: int, steps: int) -> float:
    """Return the ratio beyond which `same_sites_p` falls below ``alpha``, by bisection."""
    low, high = 0.0, 1.0
    while same_sites_p(high, sites, steps) > alpha:
        high *= 2.0
    while high - low > 1e-9 * high:
        middle = (low + high) / 2.0
        low, high = (middle, high) if same_sites_p(middle, sites, steps) > alpha else (low, middle)
    return high
