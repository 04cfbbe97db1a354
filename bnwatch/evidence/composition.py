"""Composition: whether training batches are random parts of the training data."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class SiteComposition:
    """How far apart the batches are in what enters one call site, under running statistics.

    Attributes:
        layer: the layer's path.
        index: the call site; None for a layer that is called once a pass.
        dispersion: spread between batch means, relative to that of the same examples put into batches at random: the
            ratio of the sums over channels of the variances, each in units of the channel. About 1 for random batches.
        p_value: that the batches are random parts of these examples.
        clusters: share of the spread between batch means that two groups of batches account for.
        smaller: share of the batches that are in the smaller of the two groups.
        tail: largest batch variance over the median one, averaged over channels before.
    """

    layer: str
    index: int | None
    dispersion: float
    p_value: float
    clusters: float
    smaller: float
    tail: float

    @property
    def subject(self) -> str:
        """Return the layer's path, or the name of the call site: ``bn#0``."""
        return self.layer if self.index is None else f"{self.layer}#{self.index}"


@dataclass(frozen=True, slots=True)
class Composition:
    """How kept training batches are composed, against the same examples in random batches.

    Attributes:
        step: training steps finished.
        epoch: epoch of that step, from 0.
        batches: how many were measured.
        examples: how many they hold.
        smallest: examples of the smallest batch.
        median: examples of the median batch.
        purity: share of the most frequent class within a batch, averaged over batches; None without labels.
        expected: the same of random batches.
        sites: the call sites in the order of the forward pass.
        seconds: how long it took, without the first batch.
    """

    step: int
    epoch: int
    batches: int
    examples: int
    smallest: int
    median: int
    purity: float | None
    expected: float | None
    sites: tuple[SiteComposition, ...]
    seconds: float = 0.0
