"""Turns events into what they say. What a record holds is hostile until its types are checked."""

from __future__ import annotations

import itertools
import json
import math
import struct
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from tensorboard.compat.proto.types_pb2 import DT_DOUBLE, DT_FLOAT, DT_STRING

from bnwatch.records import CHANNEL_STATISTICS, ChannelStatistics
from bnwatch.signals import SITE_STATISTICS, STATISTICS, SharedSites, SignalTable
from bnwatch.sinks.tensorboard import schema
from bnwatch.sinks.tensorboard.schema import Fields, SchemaError

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    from bnwatch.diagnosis import Diagnosis, Report, Skipped
    from bnwatch.evidence import Attribution, Composition, Entering, Look
    from bnwatch.records import Attachment, CallSite, EvaluationRecord, LayerSpec, Structure
    from bnwatch.signals import Replicas
    from bnwatch.sinks.tensorboard.schema import RecordedCells

    Measured = RecordedCells | Attribution | Composition | Entering | Look | Replicas
    Seen = Attachment | Structure | SignalTable | ChannelStatistics | EvaluationRecord | Measured
    Entity = Seen | Diagnosis | Skipped | Report

_PROGRESS = struct.Struct("<4d")


@dataclass(frozen=True, slots=True)
class TableLayout:
    """What rows and columns of a table mean.

    Attributes:
        sites: of each row of a sample; none of the table of one layer.
        layer: of which the rows are, in the table of one layer.
        columns: that were written.
        zeros: that were not, since they are zero in every row.
    """

    sites: tuple[CallSite, ...]
    layer: str
    columns: tuple[str, ...]
    zeros: tuple[str, ...] = ()

    @property
    def width(self) -> int:
        """Return how many numbers of a row were written."""
        return len(self.columns)

    def arranged(self, values: NDArray[np.float32], columns: tuple[str, ...]) -> NDArray[np.float32]:
        """Return rows that were written with these columns; NaN where neither they nor ``zeros`` have one."""
        # where nothing was written there may be any number of rows: no memory for a claim
        if values.shape[1:] != (len(self.columns),) or not (values.size or not len(values) or self.sites):
            raise SchemaError(_SHAPE)
        if self.columns == columns:
            return values
        blank, runs = _moves(self.columns, self.zeros, columns)
        arranged = np.empty((len(values), len(columns)), np.float32)
        for place, number in blank:
            arranged[:, place] = number
        for to, start in runs:
            arranged[:, to] = values[:, start]
        return arranged


_SHAPE = "a table is not of the shape its tag describes"


@lru_cache(maxsize=64)
def _moves(
    written: tuple[str, ...], zeros: tuple[str, ...], columns: tuple[str, ...]
) -> tuple[list[tuple[int, float]], list[tuple[slice, slice]]]:
    """Return the columns that were not written, with their number, and where neighbours that were go together."""
    places = {name: n for n, name in enumerate(written)}
    blank = [(n, 0.0 if name in zeros else math.nan) for n, name in enumerate(columns) if name not in places]
    runs: list[tuple[slice, slice]] = []
    for n, name in enumerate(columns):
        start = places.get(name)
        if start is None:
            continue
        if runs and (runs[-1][0].stop, runs[-1][1].stop) == (n, start):
            to, before = runs.pop()
            runs.append((slice(to.start, n + 1), slice(before.start, start + 1)))
        else:
            runs.append((slice(n, n + 1), slice(start, start + 1)))
    return blank, runs


@dataclass(frozen=True, slots=True)
class _Channels:
    """What rows and columns of per-channel statistics mean."""

    layer: str
    sites: tuple[CallSite, ...]
    channels: tuple[int, ...]
    of: int

    @classmethod
    def read(cls, metadata: Fields) -> _Channels:
        channels, of = tuple(metadata.integers("channels")), metadata.integer("of")
        ascending = all(a < b for a, b in itertools.pairwise((-1, *channels, of)))
        if metadata.texts("statistics") != CHANNEL_STATISTICS or not ascending:
            msg = "channels are not what this version of bnwatch knows"
            raise SchemaError(msg)
        sites = tuple(schema.parse_site(site) for site in metadata.items("sites"))
        return cls(metadata.text("layer"), sites, channels, of)

    def statistics(self, step: int, values: NDArray[np.float32]) -> ChannelStatistics:
        """Return the statistics, without their epoch."""
        if values.shape != (len(self.sites) * len(CHANNEL_STATISTICS), len(self.channels)):
            msg = "channels are not of the shape their tag describes"
            raise SchemaError(msg)
        return ChannelStatistics(step, 0, self.layer, self.sites, self.channels, self.of, values)


class Decoder:
    """Turns the events of one file into entities."""

    def __init__(self, specs: dict[str, LayerSpec]) -> None:
        """Learn ``specs`` from what is read."""
        self._specs = specs
        self._described: tuple[list[Any], list[Any]] = [], []
        self._sites: tuple[CallSite, ...] = ()
        self._channels: dict[str, _Channels] = {}
        self.layouts: dict[str, TableLayout] = {}
        self._parsers: dict[str, Callable[[object], Entity]] = {
            schema.ATTACHMENT: schema.parse_attachment,
            schema.STRUCTURE: schema.parse_structure,
            schema.EVALUATION: schema.parse_evaluation,
            schema.CELLS: schema.parse_cells,
            schema.ATTRIBUTION: schema.parse_attribution,
            schema.COMPOSITION: schema.parse_composition,
            schema.ENTERING: schema.parse_entering,
            schema.LOOK: schema.parse_look,
            schema.REPLICAS: schema.parse_replicas,
            schema.REPORT: schema.parse_report,
        }

    def event(self, event: Any) -> list[Entity]:
        """Return what an event holds, the sample last.

        Raises:
            ValueError, RecursionError: it is not what its tags say.
        """
        entities: list[Entity] = []
        table: tuple[TableLayout, NDArray[np.float32]] | None = None
        progress = Progress(0, None, None, 0)
        shared = []
        idle: tuple[str, ...] = ()
        for value in event.summary.value:
            if not value.HasField("tensor"):
                continue
            tag = value.tag
            if tag.startswith(schema.STATS):
                table = self._table(tag, value)
            elif tag.startswith(schema.SITES):
                layout = self._layout(tag, value)
                shared.append(SharedSites(layout.layer, layout.arranged(_floats(value.tensor), SITE_STATISTICS)))
            elif tag.startswith(schema.CHANNELS):
                step = max(int(event.step), 0)
                entities.append(self._channels_of(tag, value).statistics(step, _floats(value.tensor)))
            elif tag == schema.PROGRESS:
                progress = parse_progress(value.tensor.tensor_content, value.tensor.dtype)
            elif tag == schema.IDLE:
                idle = schema.parse_idle(json.loads(_text(value.tensor)))
            elif (parse := self._parser(tag)) is not None:
                entities.append(parse(json.loads(_text(value.tensor))))
        if table is not None:
            entities.append(
                SignalTable(
                    step=max(int(event.step), 0),
                    sites=table[0].sites,
                    values=table[1],
                    shared=tuple(shared),
                    idle=idle,
                    **progress._asdict(),
                )
            )
        return entities

    def _table(self, tag: str, value: Any) -> tuple[TableLayout, NDArray[np.float32]]:
        layout, values = self._layout(tag, value), _floats(value.tensor)
        if values.shape != (len(layout.sites), len(layout.columns)):
            raise SchemaError(_SHAPE)
        return layout, layout.arranged(values, STATISTICS)

    def _parser(self, tag: str) -> Callable[[object], Entity] | None:
        if tag.startswith(schema.DIAGNOSIS):
            return schema.parse_diagnosis
        if tag.startswith(schema.SKIPPED):
            return schema.parse_skipped
        return self._parsers.get(tag)

    def _layout(self, tag: str, value: Any) -> TableLayout:
        if tag not in self.layouts:
            layout = _description(value)
            columns, zeros = layout.texts("statistics"), layout.maybe_texts("zeros")
            if tag.startswith(schema.STATS):
                described = layout.items("sites"), layout.items("layers")
                # layouts that differ in their columns repeat what is the same
                if described != self._described:
                    sites = tuple(map(schema.parse_site, described[0]))
                    specs = list(map(schema.parse_spec, described[1]))
                    self._specs.update({spec.path: spec for spec in specs})
                    self._described, self._sites = described, sites
                self.layouts[tag] = TableLayout(self._sites, "", columns, zeros)
            else:
                self.layouts[tag] = TableLayout((), layout.text("layer"), columns, zeros)
        return self.layouts[tag]

    def _channels_of(self, tag: str, value: Any) -> _Channels:
        if tag not in self._channels:
            self._channels[tag] = _Channels.read(_description(value))
        return self._channels[tag]


def _description(value: Any) -> Fields:
    if not value.HasField("metadata"):
        msg = "a table comes without its description"
        raise SchemaError(msg)
    metadata = Fields(json.loads(value.metadata.plugin_data.content), "description of a table")
    metadata.version()
    return metadata


def _floats(tensor: Any) -> NDArray[np.float32]:
    shape = [dim.size for dim in tensor.tensor_shape.dim]
    if tensor.dtype != DT_FLOAT or len(shape) != 2 or min(shape) < 0:  # noqa: PLR2004
        msg = "a table is no matrix of float32"
        raise SchemaError(msg)
    content = tensor.tensor_content  # each look at it is a copy
    if 4 * shape[0] * shape[1] != len(content):
        msg = "a table is not as large as it says"
        raise SchemaError(msg)
    values: NDArray[np.float32] = np.frombuffer(content, "<f4").reshape(shape)
    return values


class Progress(NamedTuple):
    """What is known of the training at a sample; the fields are those of `SignalTable`."""

    epoch: int
    accuracy: float | None
    loss: float | None
    examples: int


def parse_progress(content: bytes, dtype: int = DT_DOUBLE) -> Progress:
    """Return what is known of the training."""
    if dtype != DT_DOUBLE or len(content) != _PROGRESS.size:
        msg = "progress is no four numbers of float64"
        raise SchemaError(msg)
    epoch, accuracy, loss, examples = _PROGRESS.unpack(content)
    if not (0 <= epoch < 1 << 53 and 0 <= examples < 1 << 53):
        msg = "progress is out of range"
        raise SchemaError(msg)
    unknown = math.isnan
    return Progress(int(epoch), None if unknown(accuracy) else accuracy, None if unknown(loss) else loss, int(examples))


def _text(tensor: Any) -> bytes:
    """Return the text that a tensor is."""
    if tensor.dtype != DT_STRING or len(tensor.string_val) != 1:
        msg = "an entry is no text"
        raise SchemaError(msg)
    return bytes(tensor.string_val[0])
