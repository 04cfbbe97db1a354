"""Writes the record of a run as TensorBoard event files."""

from __future__ import annotations

import logging
import math
import re
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import DATA_CLASS_BLOB_SEQUENCE, DATA_CLASS_TENSOR, Summary, SummaryMetadata
from tensorboard.compat.proto.tensor_pb2 import TensorProto
from tensorboard.compat.proto.tensor_shape_pb2 import TensorShapeProto
from tensorboard.compat.proto.types_pb2 import DT_DOUBLE, DT_FLOAT, DT_STRING

from bnwatch import render
from bnwatch.diagnosis import Diagnosis, Report, Skipped
from bnwatch.evidence import Attribution, Cells, Composition, Entering, Look
from bnwatch.records import Attachment, ChannelStatistics, EvaluationRecord, Structure
from bnwatch.signals import GAP, SITE_STATISTICS, STATISTICS, WORST, Replicas, SignalTable, chosen_layers, worst
from bnwatch.sinks.tensorboard import pictures, schema
from bnwatch.sinks.tensorboard.events import SUBDIRECTORY, EventFile, read_events

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Iterable, Iterator, Mapping

    from numpy.typing import NDArray

    from bnwatch.records import CallSite, LayerSpec
    from bnwatch.sinks import Item
    from bnwatch.sinks.tensorboard.events import Mark

_TEXTS = 10
_LAYOUTS = 8
"""Layouts of tables with the same call sites: each costs a description of all layers."""
_NAN = np.float32(np.nan).view(np.uint32)

_PLAIN: dict[type, tuple[str, Callable[[Any], dict[str, Any]]]] = {
    Attachment: (schema.ATTACHMENT, schema.attachment_json),
    Structure: (schema.STRUCTURE, schema.structure_json),
    Attribution: (schema.ATTRIBUTION, schema.attribution_json),
    Composition: (schema.COMPOSITION, schema.composition_json),
    Entering: (schema.ENTERING, schema.entering_json),
    Look: (schema.LOOK, schema.look_json),
    Replicas: (schema.REPLICAS, schema.replicas_json),
}
"""Items that are JSON and nothing else."""

_log = logging.getLogger("bnwatch")


class TensorBoardSink:
    """Writes to ``log_dir/bnwatch``; `bnwatch.sinks.tensorboard.schema` says what.

    Each item is on disk when `write` returns. A disk that fills up costs the items that find no room, and one line of
    logging; it never raises once the sink is open.

    Raises:
        OSError: the directory cannot be created or written.
    """

    def __init__(self, log_dir: str | os.PathLike[str]) -> None:
        """Create the directory and the first file."""
        self.directory = Path(log_dir) / SUBDIRECTORY
        try:
            self._file = EventFile(self.directory)
        except (OSError, ValueError) as error:
            kind = type(error) if isinstance(error, OSError) else OSError
            reason = getattr(error, "strerror", None) or str(error)
            msg = f"cannot write the record to {str(self.directory)!r}: {reason}"
            raise kind(msg) from None
        self._step: int | None = None
        self._generation = self._file.generation
        self._described: set[str] = set()
        self._waiting: list[Attachment | Structure | Skipped] = []
        self._specs: dict[str, LayerSpec] = {}
        self._sites: tuple[CallSite, ...] | None = None
        self._layouts: dict[bytes, tuple[str, str, list[int]]] = {}
        self._shared: dict[str, tuple[str, str]] = {}
        self._samples = 0
        self._chosen: dict[str, str] = {}
        self._rows: dict[str, NDArray[np.bool_]] = {}
        self._heatmap = pictures.Heatmap()
        self._texts: dict[str, tuple[int, list[str]]] = {}
        self._closed = False

    def write(self, item: Item, /) -> None:
        """Append an item."""
        if self._closed:
            return
        if isinstance(item, Attachment):
            self._specs.update({spec.path: spec for spec in item.layers})
            self._sites = None
        if isinstance(item, (Attachment, Structure, Skipped)):
            # without a step there is nothing yet to tell a reader where this file takes up the run
            if self._step is None:
                self._waiting.append(item)
            else:
                self._write(item, self._step)
            return
        step = item.last_step if isinstance(item, Diagnosis) else item.step
        self._start(step)
        self._write(item, step)

    def mark(self) -> Mark:
        """Return how far the record reaches."""
        return self._file.mark()

    @property
    def chosen(self) -> tuple[int, dict[str, str]]:
        """Return the samples written, and the layers that have scalars with their part of a tag."""
        return self._samples, dict(self._chosen)

    def take_up(
        self,
        mark: Mark,
        step: int,
        specs: Mapping[str, LayerSpec],
        chosen: tuple[int, dict[str, str]],
        tables: Iterable[SignalTable] = (),
    ) -> None:
        """Go on in a file of its own from where the record was at ``mark``, after ``step`` steps and these samples.

        A reader forgets what earlier files hold from that step on, so what they held of it by then is written again.

        Raises:
            OSError: the file of the mark cannot be read, or none can be opened.
            CorruptRecordError: what it holds up to the mark is damaged.
        """
        if self._step is not None:
            self._file.close()
            self._file = EventFile(self.directory)
            self._generation = self._file.generation
            self._described.clear()
        self._specs, self._sites = dict(specs), None
        self._samples, self._chosen = chosen
        self._heatmap = pictures.Heatmap()
        for table in tables:
            self._heatmap.add(table)
        self._waiting.clear()
        self._step = step
        described: dict[str, Any] = {}
        again = [Event(step=step, summary=Summary(value=[self._json(schema.RESUMED, {"schema": render.SCHEMA})]))]
        for event in read_events(self.directory / mark.name, mark.size):
            values = event.summary.value
            described.update({value.tag: value.metadata for value in values if value.HasField("metadata")})
            if event.step == step and values and values[0].tag != schema.RESUMED:
                again.append(event)
        for event in again:
            for value in event.summary.value:
                if value.tag in self._described:
                    value.ClearField("metadata")
                elif value.tag in described:
                    value.metadata.CopyFrom(described[value.tag])
            event.wall_time = time.time()
            self._append(event)

    def close(self, report: Report, /) -> None:
        """Append the report and close; a second call does nothing."""
        if self._closed:
            return
        self._start(report.steps)
        self._write(report, report.steps)
        self._closed = True
        self._file.close()

    @property
    def lost(self) -> int:
        """Return how many items found no room on the disk."""
        return self._file.lost

    def _start(self, step: int) -> None:
        if self._step is None:
            self._step = step
            for waiting in self._waiting:
                self._write(waiting, step)
            self._waiting.clear()

    def _write(self, item: Item | Report, step: int) -> None:
        self._file.settle()
        if self._generation != self._file.generation:
            self._generation = self._file.generation
            self._described.clear()
        self._step = max(step, self._step or 0)
        self._append(Event(wall_time=time.time(), step=self._step, summary=Summary(value=self._values(item))))

    def _append(self, event: Any) -> None:
        described = {value.tag for value in event.summary.value if value.HasField("metadata")}
        before = self._file.lost
        if self._file.write(event):
            self._described |= described
        elif not before:
            _log.warning("bnwatch: no room for the record in %s; what does not fit is lost", self._file.directory)

    def _values(self, item: Item | Report) -> Iterator[Any]:
        if isinstance(item, SignalTable):
            yield from self._sample(item)
        elif isinstance(item, ChannelStatistics):
            content = render.dumps(schema.channels_json(item))
            yield self._tensor(schema.CHANNELS + schema.digest(content), item.values, DT_FLOAT, content)
            yield from self._distributions(item)
        elif isinstance(item, EvaluationRecord):
            yield self._json(schema.EVALUATION, schema.evaluation_json(item))
            yield from _evaluation_scalars(item)
        elif isinstance(item, Cells):
            yield self._json(schema.CELLS, schema.cells_json(item))
            for split, row in item.rows():
                for statistics, cell in row.items():
                    yield _scalar(f"{schema.CELLS}/{split}/{statistics}", cell.accuracy)
        elif isinstance(item, Diagnosis):
            tag = schema.DIAGNOSIS + safe(item.rule) + "/" + schema.digest(item.subject)
            yield self._json(tag, schema.stored_diagnosis_json(item))
            yield from self._diagnosis_text(item)
        elif isinstance(item, Skipped):
            yield self._json(schema.SKIPPED + safe(item.rule), schema.skipped_json(item))
        elif isinstance(item, Report):
            yield self._json(schema.REPORT, render.report_json(item))
            yield self._text("summary", render.report_markdown(item))
            yield from self._image()
        else:
            tag, to_json = _PLAIN[type(item)]
            yield self._json(tag, to_json(item))

    def _sample(self, table: SignalTable) -> Iterator[Any]:
        tag, content, columns = self._layout(table)
        yield self._tensor(tag, table.values[:, columns], DT_FLOAT, content)
        unknown = math.nan
        progress = [
            table.epoch,
            unknown if table.accuracy is None else table.accuracy,
            unknown if table.loss is None else table.loss,
            table.examples,
        ]
        yield self._tensor(schema.PROGRESS, np.array(progress, np.float64), DT_DOUBLE, '{"schema": 1}')
        if table.idle:
            yield self._json(schema.IDLE, schema.idle_json(table.idle))
        for shared in table.shared:
            tag, content = self._shared_layout(shared.layer)
            yield self._tensor(tag, shared.values, DT_FLOAT, content)
        if table.accuracy is not None:
            yield _scalar("bnwatch/accuracy/train", table.accuracy)
        yield from self._worst(table)

    def _layout(self, table: SignalTable) -> tuple[str, str, list[int]]:
        """Return the tag of tables like this one, its metadata, and the columns to write: not those of NaN or 0 alone.

        To the bit, so that what a reader puts back is what was there.
        """
        if table.sites != self._sites:
            self._sites, self._layouts = table.sites, {}
            self._rows = {path: np.array([site.layer == path for site in table.sites]) for path in self._chosen}
        bits = np.ascontiguousarray(table.values, np.float32).view(np.uint32)
        blank = ((bits == 0).all(axis=0), (bits == _NAN).all(axis=0))
        if not len(bits) or len(self._layouts) >= _LAYOUTS:
            blank = (np.zeros_like(blank[0]), np.zeros_like(blank[1]))
        key = b"".join(part.tobytes() for part in blank)
        if key not in self._layouts:
            zero, unknown = (part.tolist() for part in blank)
            columns = [n for n in range(len(STATISTICS)) if not (zero[n] or unknown[n])]
            layers = list(dict.fromkeys(site.layer for site in table.sites))
            content = render.dumps(
                {
                    "schema": render.SCHEMA,
                    "statistics": [STATISTICS[n] for n in columns],
                    "zeros": [name for name, blank in zip(STATISTICS, zero, strict=True) if blank],
                    "sites": [schema.site_json(site) for site in table.sites],
                    "layers": [schema.spec_json(self._specs[path]) for path in layers if path in self._specs],
                }
            )
            self._layouts[key] = schema.STATS + schema.digest(content), content, columns
        return self._layouts[key]

    def _shared_layout(self, layer: str) -> tuple[str, str]:
        if layer not in self._shared:
            content = render.dumps({"schema": render.SCHEMA, "layer": layer, "statistics": list(SITE_STATISTICS)})
            self._shared[layer] = schema.SITES + schema.digest(content), content
        return self._shared[layer]

    def _worst(self, table: SignalTable) -> Iterator[Any]:
        """Yield how far the worst layer is off, and the same of a few layers that stay the same through the run."""
        self._samples += 1
        if not table.sites:
            return
        distances = table.distances()
        if not self._chosen:
            self._choose(chosen_layers(table, self._samples), table.sites)
        for name, value in worst(distances).items():
            yield _scalar(WORST + name, value)
        for path, layer in self._chosen.items():
            for name, value in worst(distances, self._rows[path]).items():
                yield _scalar(f"{schema.LAYER}{layer}/{name}", value)
        # also in the file of a resumed run: TensorBoard may not have read the one before
        if self._chosen and schema.CHARTS not in self._described:
            yield self._charts()
        self._heatmap.add(table)
        if pictures.due(self._samples):
            yield from self._image()

    def _choose(self, layers: tuple[str, ...], sites: tuple[CallSite, ...]) -> None:
        self._chosen = {path: safe_path(path) for path in layers}
        self._rows = {path: np.array([site.layer == path for site in sites]) for path in self._chosen}

    def _charts(self) -> Any:
        apart = ("mean_shift", "log_std_ratio")
        charts = {
            "accuracy": ["bnwatch/accuracy/train", "bnwatch/accuracy/evaluation"],
            "farthest off of all layers": [WORST + name for name in apart],
            **{layer: [f"{schema.LAYER}{layer}/{name}" for name in apart] for layer in self._chosen.values()},
        }
        tensor = TensorProto(dtype=DT_STRING, string_val=[pictures.layout(charts)], tensor_shape=_shape(()))
        return self._value(schema.CHARTS, tensor, "custom_scalars", b"")

    def _image(self) -> Iterator[Any]:
        image = self._heatmap.image()
        if image is None:
            return
        parts = [str(image[0]).encode(), str(image[1]).encode(), image[2]]
        tensor = TensorProto(dtype=DT_STRING, string_val=parts, tensor_shape=_shape((len(parts),)))
        value = self._value(schema.HEATMAP, tensor, "images", b"")
        if value.HasField("metadata"):
            value.metadata.data_class = DATA_CLASS_BLOB_SEQUENCE
            value.metadata.summary_description = pictures.DESCRIPTION
        yield value

    def _distributions(self, item: ChannelStatistics) -> Iterator[Any]:
        spec = self._specs.get(item.layer)
        apart = item.apart(0.0 if spec is None else spec.epsilon)
        with np.errstate(all="ignore"):
            found = {"mean_shift": apart["mean_shift"], "log_std_ratio": np.log(apart["std_ratio"])}
        for name, values in found.items():
            buckets = pictures.histogram(values)
            tensor = TensorProto(
                dtype=DT_DOUBLE, tensor_content=buckets.astype("<f8").tobytes(), tensor_shape=_shape(buckets.shape)
            )
            yield self._value(f"{schema.DISTRIBUTION}{safe_path(item.layer)}/{name}", tensor, "histograms", b"")

    def _diagnosis_text(self, diagnosis: Diagnosis) -> Iterator[Any]:
        # TensorBoard shows one text a tag and step, so those of one step share it; past a few, the report has the rest
        step, texts = self._texts.get(diagnosis.rule, (-1, []))
        if step != self._step:
            texts = []
        self._texts[diagnosis.rule] = self._step or 0, texts
        if len(texts) > _TEXTS:
            return
        full = len(texts) == _TEXTS
        texts.append("and more, see `bnwatch report`" if full else render.diagnosis_markdown(diagnosis))
        yield self._text(safe(diagnosis.rule), "\n\n".join(texts))

    def _text(self, name: str, markdown: str) -> Any:
        data = markdown.encode("utf-8", "backslashreplace")
        tensor = TensorProto(dtype=DT_STRING, string_val=[data], tensor_shape=_shape(()))
        return self._value(schema.TEXT + name, tensor, "text", b"")

    def _json(self, tag: str, data: dict[str, Any]) -> Any:
        tensor = TensorProto(dtype=DT_STRING, string_val=[render.dumps(data).encode()], tensor_shape=_shape(()))
        return self._value(tag, tensor, schema.PLUGIN, b'{"schema": 1}')

    def _tensor(self, tag: str, values: NDArray[Any], dtype: int, content: str) -> Any:
        data = np.ascontiguousarray(values, dtype="<f4" if dtype == DT_FLOAT else "<f8").tobytes()
        tensor = TensorProto(dtype=dtype, tensor_content=data, tensor_shape=_shape(values.shape))
        return self._value(tag, tensor, schema.PLUGIN, content.encode())

    def _value(self, tag: str, tensor: Any, plugin: str, content: bytes) -> Any:
        """Return a value, described where it is the first of its tag in this file."""
        if tag in self._described:
            return Summary.Value(tag=tag, tensor=tensor)
        data = SummaryMetadata.PluginData(plugin_name=plugin, content=content)
        return Summary.Value(
            tag=tag, tensor=tensor, metadata=SummaryMetadata(plugin_data=data, data_class=DATA_CLASS_TENSOR)
        )


def safe(name: str) -> str:
    """Return a name as a part of a tag: a few plain characters, told apart by a digest where that changed it."""
    plain = re.sub(r"[^A-Za-z0-9_.-]+", "-", name).strip("-.")[:60]
    return plain if plain == name else f"{plain}-{schema.digest(name)[:6]}".lstrip("-")


def safe_path(path: str) -> str:
    """Return a layer's path as part of a tag."""
    return "/".join(map(safe, path.split("/"))) if len(path) < 100 else safe(path)  # noqa: PLR2004


def _evaluation_scalars(evaluation: EvaluationRecord) -> Iterator[Any]:
    if evaluation.accuracy is not None:
        yield _scalar("bnwatch/accuracy/evaluation", evaluation.accuracy)
    if evaluation.gap is not None:
        yield _scalar(GAP, evaluation.gap)


def _scalar(tag: str, value: float) -> Any:
    return Summary.Value(tag=tag, simple_value=value)


def _shape(shape: tuple[int, ...]) -> Any:
    return TensorShapeProto(dim=[TensorShapeProto.Dim(size=size) for size in shape])
