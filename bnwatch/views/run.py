"""One run as JSON for pictures."""

from __future__ import annotations

import threading
from bisect import bisect_left
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from bnwatch import render
from bnwatch.order import ordered
from bnwatch.records import CHANNEL_STATISTICS
from bnwatch.render import SCHEMA, json_number
from bnwatch.signals import STATISTICS, Signals
from bnwatch.sinks.tensorboard import schema
from bnwatch.sinks.tensorboard.file import GoneError
from bnwatch.sinks.tensorboard.follow import Follower, alike, read_rows
from bnwatch.views.concern import Concern, why
from bnwatch.views.heat import Heat, Heats
from bnwatch.views.statistics import CHOICES, MATTERS, column, unknown_is_null
from bnwatch.views.thin import numbers, numbers_or_none, thin

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from bnwatch.diagnosis import Diagnosis, Report
    from bnwatch.records import CallSite, ChannelStatistics
    from bnwatch.signals import SignalTable
    from bnwatch.sinks.tensorboard import RecordedCells, RunRecord
    from bnwatch.sinks.tensorboard.file import Sample

T = TypeVar("T")

POINTS = 1000
"""Points of a line at most."""

STEPS = 2000
"""Steps that can be chosen among at most."""

_NO_CHANNELS = (
    "the record holds no single channels of this layer: they are written of a few layers, those farthest off and those "
    "that a diagnosis is about"
)

_CELLS = 32
_SLICE = 0.5
"""Seconds that a request folds a heatmap for: what is left is left to the next one."""

_SERIES = ("batch_mean", "running_mean", "batch_std", "running_std", "mean_shift", "std_ratio")


class UnknownError(Exception):
    """Something was asked for that is not there; the message is one sentence."""


class RunView:
    """The record of one run, followed while it grows.

    Memory holds what is not samples, a few numbers of every sample, and the heatmaps asked for last. All methods may be
    called from several threads.

    Attributes:
        run: its name for people.
        directory: where its event files lie.
    """

    def __init__(self, directory: Path, run: str, heats: Heats | None = None) -> None:
        """Read nothing yet: see `refresh`. Runs may share their ``heats``."""
        self.run = run
        self.directory = directory
        self._follower = Follower(directory)
        self._now = _Snapshot(self._follower)
        self._heats = Heats() if heats is None else heats
        self._reading = threading.Lock()
        self._folding = threading.Lock()

    def refresh(self) -> bool:
        """Read what was added; return whether anything was."""
        with self._reading:
            if not self._follower.refresh():
                return False
            self._now = _Snapshot(self._follower)
            return True

    @property
    def version(self) -> str:
        """Return a text that changes whenever the record does."""
        return self._now.version

    @property
    def problems(self) -> tuple[str, ...]:
        """Return what could not be read, one sentence each."""
        return self._now.record.problems

    @property
    def empty(self) -> bool:
        """Return whether nothing was understood of the record so far."""
        return not self._now.samples and not self._now.told

    def brief(self, diagnoses: Sequence[Diagnosis] | None = None) -> dict[str, Any]:
        """Return the entry of the answer ``runs``, with these diagnoses in place of those of the record."""
        now = self._now
        report = now.record.report
        told = now.diagnoses if diagnoses is None else diagnoses
        active = [diagnosis for diagnosis in told if diagnosis.state == "active"]
        last = now.samples[-1].epoch if now.samples else 0
        return {
            "run": self.run,
            "framework": now.record.attachment.framework if now.record.attachment is not None else "",
            "complete": report.complete,
            "steps": report.steps,
            "epochs": 1 + max([last, *(evaluation.epoch for evaluation in now.record.evaluations)]),
            "samples": report.samples,
            "layers": report.layers,
            "sites": report.sites,
            "evaluations": report.evaluations,
            "severity": str(max(diagnosis.severity for diagnosis in active)) if active else None,
            "headline": active[0].message if active else None,
            "version": now.version,
        }

    def overview(self, report: Report | None = None) -> dict[str, Any]:
        """Return the answer of ``run``: all that is known but for the samples' numbers.

        ``report`` stands in place of that of the record, as one of a replay.
        """
        now, record = self._now, self._now.record
        report = replace(record.report, diagnoses=now.diagnoses) if report is None else report
        idle = set(now.samples[-1].idle) if now.samples else set()
        subjects: dict[str, list[str]] = {}
        for diagnosis in report.diagnoses:
            if diagnosis.state == "active":
                subjects.setdefault(diagnosis.subject, []).append(diagnosis.key)
        sites: dict[str, int] = {}
        for site in now.sites:
            sites[site.layer] = sites.get(site.layer, 0) + 1
        return {
            "schema": SCHEMA,
            "run": self.run,
            "version": now.version,
            "report": render.report_json(report),
            "problems": list(record.problems),
            "progress": now.progress(),
            "evaluations": [
                {**schema.evaluation_json(evaluation), "gap": json_number(evaluation.gap)}
                for evaluation in record.evaluations
            ],
            "chance": json_number(now.chance()),
            "cells": [_cells(cells) for cells in record.cells[-_CELLS:]],
            "attribution": schema.attribution_json(record.attributions[-1]) if record.attributions else None,
            "layers": [
                {
                    "layer": layer,
                    "spec": schema.spec_json(record.specs[layer]) if layer in record.specs else None,
                    "sites": sites.get(layer, 0),
                    "idle": layer in idle,
                    "diagnoses": subjects.get(layer, []),
                }
                for layer in now.layers
            ],
            "statistics": [
                {"name": name, "title": one.title, "unit": one.unit, "help": one.help} for name, one in CHOICES.items()
            ],
            "samples": {
                "count": len(now.samples),
                "first": now.samples[0].step if now.samples else None,
                "last": now.samples[-1].step if now.samples else None,
            },
            "channels": now.channel_steps(),
        }

    def layers(self, step: int | None = None) -> dict[str, Any]:
        """Return the answer of ``layers``: every call site at the sample nearest to a step, the latest without one."""
        return self._read(lambda now: self._layers(now, step))

    def _layers(self, now: _Snapshot, step: int | None) -> dict[str, Any]:
        table = now.nearest(step).table() if now.samples else None
        chosen = thin(len(now.samples), STEPS)
        return {
            "schema": SCHEMA,
            "step": None if table is None else table.step,
            "epoch": None if table is None else table.epoch,
            "statistics": list(CHOICES),
            "rows": [] if table is None else now.rows(table),
            "steps": now.steps[chosen].tolist(),
        }

    def series(self, layer: str, points: int = POINTS) -> dict[str, Any]:
        """Return the answer of ``series``: the statistics of one layer over all steps, at ``points`` of them at most.

        Raises:
            UnknownError: there is no such layer.
        """
        return self._read(lambda now: self._series(now, layer, points))

    def _series(self, now: _Snapshot, layer: str, points: int) -> dict[str, Any]:
        layer = now.layer(layer)
        sites = [site for site in now.sites if site.layer == layer]
        values, noise = now.of_sites(sites)
        shown = thin(len(now.samples), points, *_extremes(values))
        values, noise = values[shown], noise[shown]
        away = np.isnan(column(values, "count"))
        return {
            "schema": SCHEMA,
            "layer": layer,
            "steps": now.steps[shown].tolist(),
            "sites": [
                {
                    "index": site.index,
                    "replica": site.replica,
                    **{name: numbers(column(values, name)[:, n], unknown=away[:, n]) for name in _SERIES},
                    "mean_noise": numbers_or_none(noise[:, n]),
                    "updates": numbers_or_none(column(values, "updates")[:, n]),
                }
                for n, site in enumerate(sites)
            ],
            "evaluations": [evaluation.step for evaluation in now.record.evaluations],
            "samples": len(now.samples),
        }

    def heatmap(self, statistic: str) -> dict[str, Any]:
        """Return the answer of ``heatmap``; ``complete`` is the share of the samples that is in it so far.

        Raises:
            UnknownError: there is no such statistic.
        """
        if statistic not in CHOICES:
            msg = f"no statistic {render.shorten(statistic)!r}: there are {', '.join(CHOICES)}"
            raise UnknownError(msg)
        return self._read(lambda now: self._heatmap(now, statistic))

    def _heatmap(self, now: _Snapshot, statistic: str) -> dict[str, Any]:
        with self._folding:
            heat = self._heats.take(self.directory, statistic)
            if heat is None or not heat.follows(now.samples) or heat.sites != now.sites:
                heat = Heat(statistic, now.sites)
            complete = heat.fold(now.samples, now.concern, _SLICE)
            self._heats.put(self.directory, statistic, heat)
            steps, values, known = heat.columns_so_far(now.samples)
            listed = numbers(values, 4, unknown=~known)
            low, high = _limits(statistic, values)
        return {
            "schema": SCHEMA,
            "statistic": statistic,
            "steps": steps,
            "layers": now.layers,
            "sites": [[site.layer, site.index, site.replica] for site in now.sites],
            "values": listed,
            "low": low,
            "high": high,
            "reduced": "largest",
            "complete": complete,
        }

    def channels(self, layer: str, step: int | None = None) -> dict[str, Any]:
        """Return the answer of ``channels``: the single channels of a layer, of the record nearest to a step.

        Raises:
            UnknownError: there is no such layer.
        """
        now = self._now
        layer = now.layer(layer)
        spec = now.record.specs.get(layer)
        found = [one for one in now.record.channels if one.layer == layer]
        chosen = _nearest(found, [one.step for one in found], step) if found else None
        return {
            "schema": SCHEMA,
            "layer": layer,
            "step": None if chosen is None else chosen.step,
            "steps": [one.step for one in found],
            "channels": [] if chosen is None else list(chosen.channels),
            "of": chosen.of if chosen is not None else spec.channels if spec is not None else 0,
            "sites": [] if chosen is None else _channel_sites(chosen, 0.0 if spec is None else spec.epsilon),
            "missing": None if found else _NO_CHANNELS,
        }

    def _read(self, answer: Callable[[_Snapshot], T]) -> T:
        """Return an answer for which samples are read: anew where a file vanishes meanwhile."""
        for _ in range(3):
            try:
                return answer(self._now)
            except GoneError:
                self.refresh()
        msg = f"the record of {self.run!r} changes faster than it can be read; try again"
        raise UnknownError(msg)


@dataclass(frozen=True)
class _Snapshot:
    """What was known after one refresh; nothing in it changes any more."""

    version: str
    record: RunRecord
    samples: tuple[Sample, ...]

    def __init__(self, follower: Follower) -> None:
        object.__setattr__(self, "version", follower.version)
        object.__setattr__(self, "record", follower.record)
        object.__setattr__(self, "samples", follower.samples)
        object.__setattr__(self, "_concerns", {})

    @cached_property
    def steps(self) -> NDArray[np.int64]:
        return np.array([sample.step for sample in self.samples], np.int64)

    @cached_property
    def told(self) -> bool:
        """Return whether there is anything but samples."""
        record = self.record
        return bool(
            record.attachment or record.report.diagnoses or record.report.skipped or record.evaluations
            or record.report.complete or record.structure or record.looks or record.problems
        )  # fmt: skip

    @cached_property
    def diagnoses(self) -> Any:
        return ordered(self.record.report.diagnoses)

    @cached_property
    def layers(self) -> list[str]:
        """Return the layers in network order: that of the calls, with those never called behind their predecessor."""
        called = dict.fromkeys(site.layer for layout in self._layouts for site in layout)
        order = list(called)
        attached = self.record.attachment.layers if self.record.attachment is not None else ()
        before: str | None = None
        for spec in attached:
            if spec.path not in called:
                called[spec.path] = None
                order.insert(0 if before is None else order.index(before) + 1, spec.path)
            before = spec.path
        return order

    @cached_property
    def sites(self) -> list[CallSite]:
        """Return every call site of the run, in network order."""
        place = {layer: number for number, layer in enumerate(self.layers)}
        every = dict.fromkeys(site for layout in self._layouts for site in layout)
        return sorted(every, key=lambda site: (place[site.layer], site.replica, site.index))

    @cached_property
    def _layouts(self) -> list[tuple[CallSite, ...]]:
        """Return the call sites of the samples, each once, those of the latest first."""
        found = {id(sample.layout): sample.sites for sample in self.samples}
        return list(found.values())[::-1]

    @cached_property
    def _known(self) -> dict[str, str]:
        return {render.wellformed(layer): layer for layer in self.layers}

    def layer(self, name: str) -> str:
        """Return the layer of that name as the record has it: a browser replaces unpaired surrogates."""
        found = self._known.get(render.wellformed(name))
        if found is None:
            msg = f"no layer {render.shorten(name)!r} in this run"
            raise UnknownError(msg)
        return found

    def nearest(self, step: int | None) -> Sample:
        return _nearest(self.samples, self.steps, step)

    def channel_steps(self) -> dict[str, list[int]]:
        """Return by layer at which steps its single channels are at hand."""
        found: dict[str, list[int]] = {}
        for one in self.record.channels:
            found.setdefault(one.layer, []).append(one.step)
        return found

    def concern(self, sample: Sample) -> Concern:
        """Return what judges samples of these call sites."""
        concerns: dict[int, Concern] = self._concerns  # type: ignore[attr-defined]
        if id(sample.layout) not in concerns:
            concerns[id(sample.layout)] = Concern(sample.sites, self.record.specs)
        return concerns[id(sample.layout)]

    def rows(self, table: SignalTable) -> list[dict[str, Any]]:
        """Return a row a call site, in network order."""
        worst = Concern(table.sites, self.record.specs).worst(table.values, table.shared)
        columns = {
            name: worst.matters if name == MATTERS else table.column(name).astype(np.float64) for name in CHOICES
        }
        listed = zip(
            *((numbers_or_none if unknown_is_null(name) else numbers)(values) for name, values in columns.items()),
            strict=True,
        )
        place = {site: number for number, site in enumerate(self.sites)}
        matters, terms, measured = numbers(worst.matters, 4), worst.term.tolist(), worst.measured.tolist()
        rows = [
            (
                place.get(site, 0),
                {
                    "layer": site.layer,
                    "index": site.index,
                    "replica": site.replica,
                    "matters": matters[n],
                    "why": why(terms[n], measured[n]),
                    "values": list(values),
                },
            )
            for n, (site, values) in enumerate(zip(table.sites, listed, strict=True))
        ]
        return [row for _, row in sorted(rows, key=lambda pair: pair[0])]

    def of_sites(self, sites: Sequence[CallSite]) -> tuple[NDArray[np.float32], NDArray[np.float64]]:
        """Return ``(samples, sites, statistics)`` and the noise bands, ``(samples, sites)``; NaN where not called."""
        values = np.full((len(self.samples), len(sites), len(STATISTICS)), np.nan, np.float32)
        noise = np.full(values.shape[:2], np.nan)
        for part in alike(self.samples):
            some = self.samples[part]
            rows = {site: row for row, site in enumerate(some[0].sites)}
            here = [(n, rows[site]) for n, site in enumerate(sites) if site in rows]
            if not here:
                continue
            first, stop = min(row for _, row in here), max(row for _, row in here) + 1
            apart = stop - first > _TOGETHER * len(here)
            stretches = [(row, row + 1) for _, row in here] if apart else [(first, stop)]
            concern = self.concern(some[0])
            for begin, end in stretches:
                read = read_rows(some, begin, end)
                bands = concern.noise(read, slice(begin, end))
                for n, row in here:
                    if begin <= row < end:
                        values[part, n] = read[:, row - begin]
                        noise[part, n] = bands[:, row - begin]
        return values, noise

    def progress(self) -> dict[str, Any]:
        """Return what is known of the training, sample by sample."""
        known = np.array(
            [(np.nan if s.accuracy is None else s.accuracy, np.nan if s.loss is None else s.loss) for s in self.samples]
        ).reshape(-1, 2)
        shown = thin(len(known), POINTS, known[:, 0], known[:, 1])
        return {
            "steps": self.steps[shown].tolist(),
            "epoch": [self.samples[n].epoch for n in shown],
            "accuracy": numbers_or_none(known[shown, 0]),
            "loss": numbers_or_none(known[shown, 1]),
        }

    def chance(self) -> float | None:
        """Return the accuracy of always naming the most frequent class, None while it is not known."""
        signals = Signals()
        for items in (self.record.cells[-1:], self.record.evaluations, self.record.looks):
            for item in items:
                signals.take(item)
        return signals.chance


_TOGETHER = 64
"""Rows of others that are read along rather than asking the file twice."""


def _nearest(items: Sequence[T], steps: Sequence[int] | NDArray[np.int64], step: int | None) -> T:
    """Return the item nearest to a step, the later one of two; the last one where no step is given."""
    if step is None:
        return items[-1]
    after = min(bisect_left(steps, step), len(items) - 1)
    before = max(after - 1, 0)
    return items[before] if step - int(steps[before]) < int(steps[after]) - step else items[after]


def _channel_sites(channels: ChannelStatistics, epsilon: float) -> list[dict[str, Any]]:
    """Return the statistics of the channels by call site."""
    columns = {**{name: channels[name] for name in CHANNEL_STATISTICS}, **channels.apart(epsilon)}
    return [
        {"index": site.index, "replica": site.replica, **{name: numbers(rows[n]) for name, rows in columns.items()}}
        for n, site in enumerate(channels.sites)
    ]


def _extremes(values: NDArray[np.float32]) -> list[NDArray[np.float64]]:
    """Return what a thinned line keeps the extremes of: shift and spread of the call site that is worst, by sample."""
    away = np.isnan(column(values, "count"))
    found = []
    with np.errstate(all="ignore"):
        for distance in (np.abs(column(values, "mean_shift")), np.abs(np.log(column(values, "std_ratio")))):
            # what is not finite is the farthest of all; a call site that was not called is not there
            wide = np.where(away, -np.inf, np.nan_to_num(distance.astype(np.float64), nan=np.inf, posinf=np.inf))
            found.append(wide.max(axis=1, initial=-np.inf))
    return found


def _limits(statistic: str, values: NDArray[np.float32]) -> tuple[float, float]:
    """Return limits of colour: they leave out the outermost hundredth, and begin where healthy values are."""
    finite = values[np.isfinite(values)].astype(np.float64)
    if not finite.size:
        return 0.0, 1.0
    low, high = (float(end) for end in np.percentile(finite, (1.0, 99.0)))
    if statistic in (MATTERS, "mean_shift", "non_finite", "zero_variance", "unexplained"):
        low, high = 0.0, max(high, 1.0 if statistic == MATTERS else 0.0)
    elif statistic == "std_ratio":
        ratio = max(high, 1.0 / low if low > 0.0 else 1.0, 1.1)
        low, high = 1.0 / ratio, ratio
    if not high > low:
        high = low + 1.0
    return float(f"{low:.4g}"), float(f"{high:.4g}")


def _cells(cells: RecordedCells) -> dict[str, Any]:
    """Return cells as JSON objects, each accuracy with its interval."""
    found = schema.cells_json(cells)  # type: ignore[arg-type]  # it asks for nothing that the recorded ones lack
    for split, row in cells.rows():
        for statistics, cell in row.items():
            found["rows"][split][statistics]["interval"] = list(cell.interval)
    return found
