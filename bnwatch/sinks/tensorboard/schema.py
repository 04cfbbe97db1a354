"""What the record holds, and its JSON in both directions.

Tags (all of plugin ``bnwatch`` unless said otherwise); ``<x>`` is a short digest of what the tag is about, so that a
resumed run goes on under the same tag if, and only if, it means the same:

* ``bnwatch/stats/<layout>``: float32 ``[sites, statistics]`` a sample; names and layer specs in the tag's metadata
* ``bnwatch/sites/<layout>``: float32 ``[sites, site statistics]`` of one shared layer, named in the metadata
* ``bnwatch/channels/<layout>``: float32 ``[sites * 4, channels]`` of one layer; sites and channels in the metadata
* ``bnwatch/progress``: float64 ``[epoch, accuracy, loss, examples]`` a sample, NaN for unknown
* ``bnwatch/idle``: JSON, the layers that a sampled step called in inference mode, where there are any
* ``bnwatch/attachment``, ``structure``, ``evaluation``, ``cells``, ``attribution``, ``composition``, ``entering``,
  ``look``, ``replicas``, ``report``: JSON
* ``bnwatch/diagnosis/<key>``, ``bnwatch/skipped/<rule>``: JSON, each time it changes. One tag a diagnosis, since
  TensorBoard keeps one value a tag and step
* ``bnwatch/resumed``: JSON, the first event of a file that goes on where another one was
* ``bnwatch/accuracy/…``, ``bnwatch/cells/…``, ``bnwatch/worst/…``, ``bnwatch/layer/…``: plain scalars
* ``bnwatch/distribution/<layer>/…``: over channels, of plugin ``histograms``
* ``bnwatch/heatmap``: PNG of plugin ``images``; ``custom_scalars__config__``: a layout of plugin ``custom_scalars``
* ``bnwatch/text/<rule>``, ``bnwatch/text/summary``: Markdown of plugin ``text``
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields, is_dataclass
from hashlib import sha256
from typing import TYPE_CHECKING, Any, get_args

import numpy as np

from bnwatch import moments
from bnwatch.diagnosis import Diagnosis, Quantity, Report, Severity, Skipped, State, Table
from bnwatch.evidence import (
    Attribution,
    Composition,
    Difference,
    Entering,
    LayerLook,
    Look,
    Rows,
    SiteComposition,
    SiteCost,
    SiteShift,
    Split,
    Statistics,
)
from bnwatch.records import (
    CHANNEL_STATISTICS,
    Attachment,
    CallSite,
    ChannelStatistics,
    EvaluationRecord,
    LayerSpec,
    Layout,
    Output,
    Place,
    Structure,
    Usage,
)
from bnwatch.render import SCHEMA, diagnosis_json, json_number
from bnwatch.signals import SITE_STATISTICS, Replicas, SharedSites

if TYPE_CHECKING:
    from collections.abc import Mapping

    from bnwatch.evidence import Cells

PLUGIN = "bnwatch"
STATS = "bnwatch/stats/"
SITES = "bnwatch/sites/"
CHANNELS = "bnwatch/channels/"
PROGRESS = "bnwatch/progress"
IDLE = "bnwatch/idle"
ATTACHMENT = "bnwatch/attachment"
STRUCTURE = "bnwatch/structure"
EVALUATION = "bnwatch/evaluation"
CELLS = "bnwatch/cells"
ATTRIBUTION = "bnwatch/attribution"
ENTERING = "bnwatch/entering"
COMPOSITION = "bnwatch/composition"
LOOK = "bnwatch/look"
REPLICAS = "bnwatch/replicas"
DIAGNOSIS = "bnwatch/diagnosis/"
SKIPPED = "bnwatch/skipped/"
REPORT = "bnwatch/report"
RESUMED = "bnwatch/resumed"
TEXT = "bnwatch/text/"
LAYER = "bnwatch/layer/"
DISTRIBUTION = "bnwatch/distribution/"
HEATMAP = "bnwatch/heatmap"
CHARTS = "custom_scalars__config__"
"""What the Custom Scalars tab looks for."""

NEEDS = ("cells", "attribution", "look", "gradients")

_MANY = 1 << 31


class SchemaError(ValueError):
    """A record does not hold what it should; the message says which field."""


@dataclass(frozen=True, slots=True)
class RecordedCell:
    """A cell as the record keeps it: like `bnwatch.evidence.Cell`, without the single examples.

    Attributes:
        statistics: what it was normalized with.
        accuracy: share of right predictions, in [0, 1].
        examples: how many were measured.
        largest_share: share of the most predicted class.
        majority: share of the most frequent label.
        gains: accuracy gained over the other cells of the row, and the paired one-sided p-value.
        wins: examples that are right here and wrong in the other cells of the row.
    """

    statistics: Statistics
    accuracy: float
    examples: int
    largest_share: float
    majority: float
    gains: Mapping[Statistics, tuple[float, float]] = field(default_factory=dict)
    wins: Mapping[Statistics, int] = field(default_factory=dict)

    @property
    def interval(self) -> tuple[float, float]:
        """Return the 95 % interval of the accuracy (Wilson, 1927)."""
        return moments.binomial_interval(self.accuracy, self.examples)

    def gain_over(self, other: RecordedCell) -> tuple[float, float]:
        """Return accuracy gained over another cell of the row, and the paired one-sided p-value (McNemar)."""
        return self.gains[other.statistics]

    def wins_over(self, other: RecordedCell) -> int:
        """Return how many examples are right here and wrong there."""
        return self.wins[other.statistics]


@dataclass(frozen=True, slots=True)
class RecordedCells(Rows[RecordedCell]):
    """The table of an experiment as the record keeps it: see `bnwatch.evidence.Cells`."""

    step: int
    epoch: int
    classes: int
    training: Mapping[Statistics, RecordedCell]
    evaluation: Mapping[Statistics, RecordedCell]
    missing: str | None = None
    unseen: float | None = None
    seconds: float = 0.0
    swapped: bool | None = None
    moved: tuple[str, ...] = ()


def digest(text: str) -> str:
    """Return a short digest that is safe in a tag."""
    return sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:10]


# --- to JSON -----------------------------------------------------------------------------------------------------


def attachment_json(attachment: Attachment) -> dict[str, Any]:
    """Return an attachment as JSON objects."""
    return {
        "schema": SCHEMA,
        "framework": attachment.framework,
        "layers": [spec_json(spec) for spec in attachment.layers],
        "unsupported": dict(attachment.unsupported),
        "unseen": attachment.unseen,
        "unrestored": list(attachment.unrestored),
        "initial": list(attachment.initial),
    }


def structure_json(structure: Structure) -> dict[str, Any]:
    """Return what is known before the first step as JSON objects."""
    return {"schema": SCHEMA, **_finite(structure)}


def spec_json(spec: LayerSpec) -> dict[str, Any]:
    """Return a layer's specification as JSON objects."""
    return dict(_finite(spec))


def evaluation_json(evaluation: EvaluationRecord) -> dict[str, Any]:
    """Return an evaluation as JSON objects."""
    return {"schema": SCHEMA, **_finite(evaluation)}


def look_json(look: Look) -> dict[str, Any]:
    """Return a look as JSON objects."""
    return {"schema": SCHEMA, **_finite(look)}


def cells_json(cells: Cells) -> dict[str, Any]:
    """Return the cells as JSON objects, without the single examples."""
    return {
        "schema": SCHEMA,
        "step": cells.step,
        "epoch": cells.epoch,
        "classes": cells.classes,
        "missing": cells.missing,
        "unseen": None if cells.unseen is None else json_number(cells.unseen),
        "seconds": json_number(cells.seconds),
        "swapped": cells.swapped,
        "moved": list(cells.moved),
        "rows": {
            split: {
                statistics: {
                    "accuracy": json_number(cell.accuracy),
                    "examples": cell.examples,
                    "largest_share": json_number(cell.largest_share),
                    "majority": json_number(cell.majority),
                    "gains": {
                        other: [json_number(part) for part in cell.gain_over(row[other])]
                        for other in row
                        if other != statistics
                    },
                    "wins": {other: cell.wins_over(row[other]) for other in row if other != statistics},
                }
                for statistics, cell in row.items()
            }
            for split, row in cells.rows()
        },
    }


def attribution_json(attribution: Attribution) -> dict[str, Any]:
    """Return an attribution as JSON objects."""
    return {"schema": SCHEMA, **_finite(attribution)}


def composition_json(composition: Composition) -> dict[str, Any]:
    """Return how batches are composed as JSON objects."""
    return {"schema": SCHEMA, **_finite(composition)}


def idle_json(layers: tuple[str, ...]) -> dict[str, Any]:
    """Return the layers that a step called in inference mode as JSON objects."""
    return {"schema": SCHEMA, "layers": list(layers)}


def entering_json(entering: Entering) -> dict[str, Any]:
    """Return what enters each layer as JSON objects."""
    return {"schema": SCHEMA, **_finite(entering)}


def replicas_json(replicas: Replicas) -> dict[str, Any]:
    """Return how far apart the replicas are as JSON objects, a row of numbers a replica."""
    return {
        "schema": SCHEMA,
        "step": replicas.step,
        "epoch": replicas.epoch,
        "statistics": list(SITE_STATISTICS),
        "layers": [
            {"layer": one.layer, "values": [list(map(json_number, row)) for row in one.values.tolist()]}
            for one in replicas.layers
        ],
    }


def site_json(site: CallSite) -> list[str | int]:
    """Return a call site as ``[layer, index, replica]``."""
    return [site.layer, int(site.index), int(site.replica)]


def channels_json(channels: ChannelStatistics) -> dict[str, Any]:
    """Return what the rows and columns of per-channel statistics mean as JSON objects."""
    return {
        "schema": SCHEMA,
        "layer": channels.layer,
        "sites": [site_json(site) for site in channels.sites],
        "channels": [int(number) for number in channels.channels],
        "of": int(channels.of),
        "statistics": list(CHANNEL_STATISTICS),
    }


def skipped_json(skipped: Skipped) -> dict[str, Any]:
    """Return a skipped rule as JSON objects."""
    return {"schema": SCHEMA, **_finite(skipped)}


def stored_diagnosis_json(diagnosis: Diagnosis) -> dict[str, Any]:
    """Return a diagnosis as JSON objects with the schema's version."""
    return {"schema": SCHEMA, **diagnosis_json(diagnosis)}


def _finite(value: Any) -> Any:
    """Return JSON objects, the numbers that JSON lacks as strings; of a dataclass an object of its fields."""
    if is_dataclass(value):
        return {field.name: _finite(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, dict):
        return {key: _finite(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(part) for part in value]
    if isinstance(value, np.generic):
        value = value.item()
    if value is None or isinstance(value, (bool, str)):
        return value
    return json_number(value)


# --- from JSON: hostile until its types are checked ---------------------------------------------------------------


class Fields:
    """A JSON object of unknown origin, read field by field with its type."""

    def __init__(self, data: object, what: str) -> None:
        """Check that it is an object."""
        if not isinstance(data, dict):
            msg = f"{what} is no object"
            raise SchemaError(msg)
        self._data = data
        self._what = what

    def _get(self, name: str, kinds: tuple[type, ...], kind: str) -> Any:
        value = self._data.get(name)
        if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
            msg = f"{name} of {self._what} is no {kind}"
            raise SchemaError(msg)
        return value

    def text(self, name: str) -> str:
        """Return a string."""
        return str(self._get(name, (str,), "text"))

    def maybe_text(self, name: str) -> str | None:
        """Return a string or None."""
        return self.text(name) if self.has(name) else None

    def flag(self, name: str) -> bool:
        """Return a truth value."""
        return bool(self._get(name, (bool,), "truth value"))

    def integer(self, name: str) -> int:
        """Return a whole number that a step or a count can be."""
        value = int(self._get(name, (int,), "whole number"))
        if not 0 <= value < 1 << 62:
            msg = f"{name} of {self._what} is out of range"
            raise SchemaError(msg)
        return value

    def number(self, name: str) -> float:
        """Return a number, also one of those that JSON writes as text."""
        return _number(self._data.get(name), f"{name} of {self._what}")

    def maybe_integer(self, name: str) -> int | None:
        """Return a whole number or None."""
        return self.integer(name) if self.has(name) else None

    def maybe_number(self, name: str) -> float | None:
        """Return a number or None."""
        return self.number(name) if self.has(name) else None

    def items(self, name: str) -> list[Any]:
        """Return a list."""
        return list(self._get(name, (list,), "list"))

    def maybe_items(self, name: str) -> list[Any]:
        """Return a list; an empty one where there is none."""
        return self.items(name) if self.has(name) else []

    def texts(self, name: str) -> tuple[str, ...]:
        """Return a list of strings."""
        items = self.items(name)
        if not all(isinstance(item, str) for item in items):
            msg = f"{name} of {self._what} is no list of texts"
            raise SchemaError(msg)
        return tuple(items)

    def maybe_texts(self, name: str) -> tuple[str, ...]:
        """Return a list of strings; an empty one where there is none."""
        return self.texts(name) if self.has(name) else ()

    def fields(self, name: str) -> Fields:
        """Return an object."""
        return Fields(self._data.get(name), f"{name} of {self._what}")

    def has(self, name: str) -> bool:
        """Return whether a field is there and not null."""
        return self._data.get(name) is not None

    def pairs(self, name: str) -> dict[str, Any]:
        """Return an object as a dict."""
        return dict(self._get(name, (dict,), "object"))

    def integers(self, name: str) -> list[int]:
        """Return a list of whole numbers."""
        items = self.items(name)
        if not all(type(item) is int and abs(item) < _MANY for item in items):
            msg = f"{name} of {self._what} is no list of whole numbers"
            raise SchemaError(msg)
        return items

    def share(self, name: str) -> float:
        """Return a number in [0, 1]."""
        value = self.number(name)
        if not 0.0 <= value <= 1.0:
            msg = f"{name} of {self._what} is no share"
            raise SchemaError(msg)
        return value

    def choice(self, name: str, among: tuple[str, ...]) -> str:
        """Return one of some texts."""
        value = self.text(name)
        if value not in among:
            msg = f"{name} of {self._what} is none of {', '.join(among)}"
            raise SchemaError(msg)
        return value

    def version(self) -> None:
        """Check that this version of bnwatch can read it."""
        if self.integer("schema") > SCHEMA:
            msg = f"{self._what} was written by a newer bnwatch"
            raise SchemaError(msg)


def _number(value: object, what: str) -> float:
    if isinstance(value, str) and value in ("NaN", "Infinity", "-Infinity"):
        return float(value)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        msg = f"{what} is no number"
        raise SchemaError(msg)
    try:
        return float(value)
    except OverflowError:
        msg = f"{what} is out of range"
        raise SchemaError(msg) from None


def _pair(value: object, what: str) -> tuple[float, float]:
    if not isinstance(value, list) or len(value) != 2:  # noqa: PLR2004
        msg = f"{what} is no pair of numbers"
        raise SchemaError(msg)
    return _number(value[0], what), _number(value[1], what)


def parse_spec(data: object) -> LayerSpec:
    """Return the specification of a layer."""
    layer = Fields(data, "layer")
    return LayerSpec(
        path=layer.text("path"),
        kind=layer.text("kind"),
        channels=layer.integer("channels"),
        epsilon=layer.number("epsilon"),
        decay=layer.number("decay"),
        bessel_corrected=layer.flag("bessel_corrected"),
        trainable=layer.flag("trainable"),
        axis=tuple(layer.integers("axis")) if layer.has("axis") else None,
        initial=_pair(layer.items("initial"), "initial of layer"),
        built_at=layer.maybe_text("built_at"),
        called_at=_parse_lines(layer.maybe_items("called_at")),
    )


def _parse_lines(items: list[object]) -> tuple[str | None, ...]:
    if not all(item is None or isinstance(item, str) for item in items):
        msg = "called_at of layer is no list of texts"
        raise SchemaError(msg)
    return tuple(None if item is None else str(item) for item in items)


def parse_site(data: object) -> CallSite:
    """Return a call site from ``[layer, index, replica]``."""
    if not isinstance(data, list) or len(data) != 3 or not isinstance(data[0], str):  # noqa: PLR2004
        msg = "a call site is no [layer, index, replica]"
        raise SchemaError(msg)
    index, replica = Fields({"numbers": data[1:]}, "call site").integers("numbers")
    return CallSite(data[0], index, replica)


def parse_attachment(data: object) -> Attachment:
    """Return an attachment."""
    attachment = Fields(data, "attachment")
    attachment.version()
    unsupported = attachment.pairs("unsupported")
    if not all(isinstance(reason, str) for reason in unsupported.values()):
        msg = "unsupported of attachment holds no texts"
        raise SchemaError(msg)
    return Attachment(
        layers=tuple(parse_spec(layer) for layer in attachment.items("layers")),
        unsupported=unsupported,
        framework=attachment.text("framework"),
        unseen=attachment.maybe_text("unseen"),
        unrestored=attachment.maybe_texts("unrestored"),
        initial=attachment.maybe_texts("initial"),
    )


def parse_structure(data: object) -> Structure:
    """Return what was known before the first step."""
    structure = Fields(data, "structure")
    structure.version()
    return Structure(
        layers=tuple(_parse_usage(Fields(layer, "layer of structure")) for layer in structure.items("layers")),
        hidden=structure.maybe_text("hidden"),
        batch_size=structure.maybe_integer("batch_size"),
        steps_per_epoch=structure.maybe_integer("steps_per_epoch"),
        epochs=structure.maybe_integer("epochs"),
        accumulated=structure.maybe_integer("accumulated") or 1,
        output=_parse_output(structure.fields("output")) if structure.has("output") else None,
    )


def _parse_output(output: Fields) -> Output:
    return Output(
        path=output.text("path"),
        units=output.maybe_integer("units"),
        activation=output.maybe_text("activation"),
        loss=output.maybe_text("loss"),
        from_logits=output.flag("from_logits") if output.has("from_logits") else None,
    )


def _parse_usage(layer: Fields) -> Usage:
    return Usage(
        path=layer.text("path"),
        kind=layer.text("kind"),
        decay=layer.number("decay"),
        trainable=layer.flag("trainable"),
        places=tuple(_parse_place(Fields(place, "place")) for place in layer.items("places")),
    )


def _parse_place(place: Fields) -> Place:
    site = place.fields("site")
    return Place(
        site=CallSite(site.text("layer"), site.integer("index"), site.integer("replica")),
        rank=place.maybe_integer("rank"),
        axis=place.maybe_integer("axis"),
        elements=place.maybe_integer("elements"),
        producer=place.maybe_text("producer"),
        kind=place.maybe_text("kind"),
        layout=place.choice("layout", get_args(Layout)) if place.has("layout") else None,  # type: ignore[arg-type]
        bias=place.flag("bias"),
        dropout=place.maybe_text("dropout"),
        rate=place.share("rate"),
        output=place.flag("output"),
        mask=place.maybe_text("mask"),
    )


def parse_evaluation(data: object) -> EvaluationRecord:
    """Return an evaluation."""
    evaluation = Fields(data, "evaluation")
    evaluation.version()
    return EvaluationRecord(
        step=evaluation.integer("step"),
        epoch=evaluation.integer("epoch"),
        accuracy=evaluation.maybe_number("accuracy"),
        loss=evaluation.maybe_number("loss"),
        examples=evaluation.integer("examples"),
        train_accuracy=evaluation.maybe_number("train_accuracy"),
        train_loss=evaluation.maybe_number("train_loss"),
        train_examples=evaluation.integer("train_examples"),
        classes=evaluation.integer("classes"),
        majority=evaluation.maybe_number("majority"),
        batch_statistics=evaluation.texts("batch_statistics"),
        moved=evaluation.maybe_texts("moved"),
        still=evaluation.maybe_texts("still"),
        swapped=evaluation.flag("swapped") if evaluation.has("swapped") else None,
    )


def parse_look(data: object) -> Look:
    """Return a look."""
    look = Fields(data, "look")
    look.version()
    layers = []
    for entry in look.items("layers"):
        layer = Fields(entry, "layer of look")
        layers.append(
            LayerLook(
                path=layer.text("path"),
                kind=layer.text("kind"),
                units=layer.integer("units"),
                zero_samples=layer.number("zero_samples"),
                dead_units=layer.number("dead_units"),
                spread=layer.number("spread"),
                gradient=layer.maybe_number("gradient"),
                scale=layer.number("scale") if layer.has("scale") else 1.0,
                bounds=layer.maybe_number("bounds"),
                update=layer.maybe_number("update"),
            )
        )
    return Look(
        step=look.integer("step"),
        epoch=look.integer("epoch"),
        examples=look.integer("examples"),
        layers=tuple(layers),
        entry=look.maybe_number("entry"),
        loss=look.maybe_number("loss"),
        learning_rate=look.maybe_number("learning_rate"),
    )


def parse_cells(data: object) -> RecordedCells:
    """Return the cells of an experiment."""
    cells = Fields(data, "cells")
    cells.version()
    rows = cells.pairs("rows")
    if not set(rows) <= set(get_args(Split)):
        msg = "rows of cells are none of training, evaluation"
        raise SchemaError(msg)
    return RecordedCells(
        step=cells.integer("step"),
        epoch=cells.integer("epoch"),
        classes=cells.integer("classes"),
        training=_parse_row(rows.get("training", {})),
        evaluation=_parse_row(rows.get("evaluation", {})),
        missing=cells.maybe_text("missing"),
        unseen=cells.maybe_number("unseen"),
        seconds=cells.number("seconds"),
        swapped=cells.flag("swapped") if cells.has("swapped") else None,
        moved=cells.maybe_texts("moved"),
    )


def _parse_row(data: object) -> dict[Statistics, RecordedCell]:
    row = Fields(data, "row of cells")
    known: tuple[Statistics, ...] = get_args(Statistics)
    cells: dict[Statistics, RecordedCell] = {}
    for statistics in known:
        if not row.has(statistics):
            continue
        cell = row.fields(statistics)
        gains, wins = cell.pairs("gains"), cell.fields("wins")
        cells[statistics] = RecordedCell(
            statistics=statistics,
            accuracy=cell.share("accuracy"),
            examples=cell.integer("examples"),
            largest_share=cell.share("largest_share"),
            majority=cell.share("majority"),
            gains={other: _pair(gains[other], "gains of cell") for other in known if other in gains},
            wins={other: wins.integer(other) for other in known if wins.has(other)},
        )
    return cells


def parse_attribution(data: object) -> Attribution:
    """Return an attribution."""
    found = Fields(data, "attribution")
    found.version()
    costs = []
    for entry in found.items("costs"):
        cost = Fields(entry, "cost of attribution")
        costs.append(
            SiteCost(
                layer=cost.text("layer"),
                index=cost.integer("index") if cost.has("index") else None,
                distance=cost.number("distance"),
                recovered=_parse_difference(cost.fields("recovered")),
                lost=_parse_difference(cost.fields("lost")),
            )
        )
    return Attribution(
        step=found.integer("step"),
        epoch=found.integer("epoch"),
        split=found.choice("split", get_args(Split)),  # type: ignore[arg-type]
        examples=found.integer("examples"),
        running=found.share("running"),
        batch=found.share("batch"),
        cost=_parse_difference(found.fields("cost")),
        costs=tuple(costs),
        unmeasured=found.texts("unmeasured"),
        seconds=found.number("seconds"),
    )


def _parse_difference(difference: Fields) -> Difference:
    interval = _pair(difference.items("interval"), "interval of a difference")
    return Difference(difference.number("gained"), interval, difference.number("p_value"))


def parse_entering(data: object) -> Entering:
    """Return what enters each layer."""
    found = Fields(data, "entering")
    found.version()
    sites = []
    for entry in found.items("sites"):
        site = Fields(entry, "site of entering")
        sites.append(
            SiteShift(
                layer=site.text("layer"),
                index=site.integer("index") if site.has("index") else None,
                mean_shift=site.number("mean_shift"),
                std_ratio=site.number("std_ratio"),
                p_value=site.maybe_number("p_value"),
                held_shift=site.maybe_number("held_shift"),
                held_ratio=site.maybe_number("held_ratio"),
                awakened=site.integer("awakened") if site.has("awakened") else 0,
            )
        )
    return Entering(
        step=found.integer("step"),
        epoch=found.integer("epoch"),
        training=found.integer("training"),
        evaluation=found.integer("evaluation"),
        sites=tuple(sites),
        untold=found.maybe_text("untold"),
        seconds=found.number("seconds"),
    )


def parse_composition(data: object) -> Composition:
    """Return how batches are composed."""
    found = Fields(data, "composition")
    found.version()
    sites = []
    for entry in found.items("sites"):
        site = Fields(entry, "site of composition")
        sites.append(
            SiteComposition(
                layer=site.text("layer"),
                index=site.integer("index") if site.has("index") else None,
                dispersion=site.number("dispersion"),
                p_value=site.number("p_value"),
                clusters=site.number("clusters"),
                smaller=site.number("smaller"),
                tail=site.number("tail"),
            )
        )
    return Composition(
        step=found.integer("step"),
        epoch=found.integer("epoch"),
        batches=found.integer("batches"),
        examples=found.integer("examples"),
        smallest=found.integer("smallest"),
        median=found.integer("median"),
        purity=found.maybe_number("purity"),
        expected=found.maybe_number("expected"),
        sites=tuple(sites),
        seconds=found.number("seconds"),
    )


def parse_idle(data: object) -> tuple[str, ...]:
    """Return the layers that a step called in inference mode."""
    idle = Fields(data, "idle")
    idle.version()
    return idle.texts("layers")


def parse_replicas(data: object) -> Replicas:
    """Return how far apart the replicas are; a statistic that an older version did not have is NaN."""
    found = Fields(data, "replicas")
    found.version()
    names = found.texts("statistics")
    layers = []
    for entry in found.items("layers"):
        layer = Fields(entry, "layer of replicas")
        values = np.full((len(rows := layer.items("values")), len(SITE_STATISTICS)), np.nan, np.float32)
        for number, row in enumerate(rows):
            if not isinstance(row, list) or len(row) != len(names):
                msg = "values of a layer of replicas are not what its statistics say"
                raise SchemaError(msg)
            for name, value in zip(names, row, strict=True):
                if name in SITE_STATISTICS:
                    with np.errstate(over="ignore"):
                        values[number, SITE_STATISTICS.index(name)] = _number(value, f"{name} of replicas")
        layers.append(SharedSites(layer.text("layer"), values))
    return Replicas(found.integer("step"), found.integer("epoch"), tuple(layers))


def parse_skipped(data: object) -> Skipped:
    """Return a rule that could not look."""
    skipped = Fields(data, "skipped")
    return Skipped(
        rule=skipped.text("rule"),
        reason=skipped.text("reason"),
        needs=skipped.choice("needs", NEEDS) if skipped.has("needs") else None,  # type: ignore[arg-type]
    )


def parse_diagnosis(data: object) -> Diagnosis:
    """Return a diagnosis."""
    diagnosis = Fields(data, "diagnosis")
    evidence = {}
    for name, entry in diagnosis.pairs("evidence").items():
        measured = Fields(entry, "evidence of diagnosis")
        interval = _pair(measured.items("interval"), "interval of evidence") if measured.has("interval") else None
        evidence[name] = Quantity(measured.number("value"), measured.text("unit"), interval)
    return Diagnosis(
        rule=diagnosis.text("rule"),
        name=diagnosis.text("name"),
        severity=Severity.parse(diagnosis.choice("severity", tuple(map(str, Severity)))),
        subject=diagnosis.text("subject"),
        message=diagnosis.text("message"),
        step=diagnosis.integer("first_step"),
        epoch=diagnosis.integer("epoch"),
        last_step=diagnosis.integer("last_step"),
        evidence=evidence,
        table=_parse_table(diagnosis.fields("table")) if diagnosis.has("table") else None,
        further=tuple(_parse_table(Fields(table, "table of diagnosis")) for table in diagnosis.maybe_items("further")),
        notes=diagnosis.texts("notes"),
        helps=diagnosis.texts("helps"),
        state=diagnosis.choice("state", get_args(State)),  # type: ignore[arg-type]
        causes=diagnosis.texts("causes"),
        reason=diagnosis.maybe_text("reason"),
        built_at=diagnosis.maybe_text("built_at"),
    )


def _parse_table(table: Fields) -> Table:
    columns = table.texts("columns")
    rows: list[tuple[str | float, ...]] = []
    for row in table.items("rows"):
        if not isinstance(row, list) or len(row) != len(columns):
            msg = "a row of a table is as long as its columns"
            raise SchemaError(msg)
        rows.append(tuple(_cell(cell) for cell in row))
    return Table(columns, tuple(rows))


def _cell(cell: object) -> str | float:
    # "NaN" could be either; as text it reads the same
    return cell if isinstance(cell, str) else _number(cell, "cell of table")


def parse_report(data: object) -> Report:
    """Return a report."""
    report = Fields(data, "report")
    report.version()
    return Report(
        run=report.text("run"),
        diagnoses=tuple(parse_diagnosis(entry) for entry in report.items("diagnoses")),
        skipped=tuple(parse_skipped(entry) for entry in report.items("skipped")),
        layers=report.integer("layers"),
        sites=report.integer("sites"),
        samples=report.integer("samples"),
        steps=report.integer("steps"),
        evaluations=report.integer("evaluations"),
        complete=report.flag("complete"),
    )
