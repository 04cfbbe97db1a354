"""What the standard tabs show of all layers: a heatmap as PNG, distributions over channels, a layout of charts."""

from __future__ import annotations

import re
import struct
import zlib
from typing import TYPE_CHECKING

import numpy as np
from tensorboard.plugins.custom_scalar.layout_pb2 import Category, Chart, Layout, MultilineChartContent

from bnwatch.signals import WINDOW, spaced

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from numpy.typing import NDArray

    from bnwatch.records import CallSite
    from bnwatch.signals import SignalTable

COLUMNS = 256
"""Columns of a heatmap, at most: when they are full, each two become one."""

ROWS = 1024
"""Rows of a heatmap, at most: of more call sites, neighbours share one."""

BUCKETS = 30
"""Buckets of a distribution, as many as TensorBoard's own summaries have."""

LOWEST = 1 / 32
"""Distance at which colours begin; each of the next 14 stands for one that is larger by the root of 2."""

DESCRIPTION = (
    "How far the batch statistics of each layer are from its running ones: the larger of the shift of the mean, in "
    "running standard deviations, and of the logarithm of the ratio of the standard deviations. Rows are call sites "
    "in the order of the forward pass, the first on top; columns are samples, from the first to the latest. White: "
    "below 0.03; orange: about 0.3; dark red: from 4 on; blue: a number is not finite."
)

_LEVELS = 15
_ANCHORS = (0, 5, 10, 14), ((255, 255, 255), (253, 210, 110), (214, 72, 38), (70, 0, 20))
_NOT_FINITE = 0, 110, 255


class Heatmap:
    """How far every call site was off at every sample, as a picture of bounded size."""

    def __init__(self) -> None:
        """Start empty."""
        self._sites: tuple[CallSite, ...] = ()
        self._columns: list[NDArray[np.floating]] = []
        self._span, self._open, self._changed = 1, 0, False

    def add(self, table: SignalTable) -> None:
        """Add a sample. With other call sites the picture begins anew."""
        if not table.sites:
            return
        if table.sites != self._sites:
            self._sites = table.sites
            self._columns, self._span, self._open = [], 1, 0
        distance: NDArray[np.floating] = table.distance()
        if self._open:
            distance = np.maximum(distance, self._columns.pop())
        self._columns.append(distance)
        self._open = (self._open + 1) % self._span
        if len(self._columns) == COLUMNS and not self._open:
            self._columns = [np.maximum(*pair) for pair in zip(self._columns[::2], self._columns[1::2], strict=True)]
            self._span *= 2
        self._changed = True

    def image(self) -> tuple[int, int, bytes] | None:
        """Return width, height and the picture as PNG; None where nothing was added since the last one."""
        if not self._changed:
            return None
        self._changed = False
        values = np.stack(self._columns, axis=1)
        values = np.maximum.reduceat(values, np.arange(0, len(values), -(-len(values) // ROWS)))
        with np.errstate(all="ignore"):
            level = np.clip(np.floor(2.0 * np.log2(values / LOWEST)) + 1.0, 0, _LEVELS - 1)
        pixels = np.where(np.isfinite(values), level, _LEVELS).astype(np.uint8)
        tall, wide = (min(16, max(1, size // many)) for size, many in zip((512, 1024), pixels.shape, strict=True))
        pixels = pixels.repeat(tall, axis=0).repeat(wide, axis=1)
        return pixels.shape[1], pixels.shape[0], png(pixels, _palette())


def due(samples: int) -> bool:
    """Return whether a heatmap is drawn after as many samples: twice while their number doubles."""
    return samples >= WINDOW and spaced(samples, 2)


def _palette() -> NDArray[np.uint8]:
    places, colors = _ANCHORS
    ramp = [np.interp(np.arange(_LEVELS), places, part) for part in zip(*colors, strict=True)]
    return np.vstack([np.stack(ramp, axis=1).round(), _NOT_FINITE]).astype(np.uint8)


def png(pixels: NDArray[np.uint8], palette: NDArray[np.uint8]) -> bytes:
    """Return a picture of up to 16 colours as PNG (ISO/IEC 15948), without one of the libraries for it.

    Args:
        pixels: places in the palette, shape ``(height, width)``.
        palette: red, green and blue, shape ``(colours, 3)``.
    """
    height, width = pixels.shape
    even = np.pad(pixels, ((0, 0), (0, width % 2)))
    lines = np.zeros((height, 1 + even.shape[1] // 2), np.uint8)  # each begins with its filter: none
    lines[:, 1:] = even[:, ::2] << 4 | even[:, 1::2]
    header = struct.pack(">IIBBBBB", width, height, 4, 3, 0, 0, 0)
    parts = (b"IHDR", header), (b"PLTE", palette.tobytes()), (b"IDAT", zlib.compress(lines.tobytes())), (b"IEND", b"")
    chunks = (
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data)) for name, data in parts
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def histogram(values: NDArray[np.floating]) -> NDArray[np.float64]:
    """Return left edge, right edge and count of each bucket of the finite values, shape ``(BUCKETS, 3)``."""
    finite = values[np.isfinite(values)].astype(np.float64)
    if not finite.size:
        return np.zeros((BUCKETS, 3))
    edges = np.linspace(finite.min(), finite.max(), BUCKETS + 1)
    # not of np.histogram, which raises where values are too close for buckets; TensorBoard then wants them in the last
    place = np.searchsorted(edges[1:-1], finite, side="right")
    return np.stack([edges[:-1], edges[1:], np.bincount(place, minlength=BUCKETS)], axis=1)


def layout(charts: Mapping[str, Iterable[str]]) -> bytes:
    """Return the message that the Custom Scalars tab reads, with the tags of each chart by its title."""
    found = [
        # the tab takes what it is given for regular expressions
        Chart(title=title, multiline=MultilineChartContent(tag=[f"^{re.escape(tag)}$" for tag in tags]))
        for title, tags in charts.items()
    ]
    message: bytes = Layout(category=[Category(title="BN Watch", chart=found)]).SerializeToString()
    return message
