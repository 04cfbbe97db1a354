"""Which layers are recorded channel by channel, and when: a few of them, at ever fewer samples."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from bnwatch import moments
from bnwatch.records import ChannelStatistics
from bnwatch.signals import chosen_layers, spaced

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from numpy.typing import NDArray

    from bnwatch.records import CallRecord, StepSnapshot
    from bnwatch.signals import SignalTable

FOLLOWED = 3
"""Layers beside the chosen ones that a diagnosis is about."""

CHANNELS = 512
"""Channels of a layer that are kept: half of them the ones farthest off, the others spread evenly."""

NUMBERS = 2048
"""Channels times call sites of all layers together: what one sample may cost, whatever the network."""

SITES = 16
"""Call sites of a layer that are kept: the first ones."""

OCTAVE = 16
"""Samples that are recorded of as many as there were before: 127 of 2,000."""


def due(samples: int) -> bool:
    """Return whether the ``samples``-th sample, counted from 1, is recorded."""
    return spaced(samples, OCTAVE)


class ChannelChoice:
    """Chooses layers and channels, and takes their statistics out of samples. Keeps no array of a sample."""

    def __init__(self) -> None:
        """Begin a run."""
        self._chosen: tuple[str, ...] = ()
        self._followed: tuple[str, ...] = ()
        self._kept: dict[str, tuple[int, NDArray[np.intp]]] = {}

    def take(
        self, snapshot: StepSnapshot, table: SignalTable, samples: int, suspects: Iterable[str]
    ) -> list[ChannelStatistics]:
        """Return what to record of a sample; nothing at most of them.

        Args:
            snapshot: the sample.
            table: what became of it.
            samples: which one it is, counted from 1.
            suspects: paths of layers that a diagnosis is about now, the gravest first. One that was never recorded is
                recorded at once.
        """
        self._chosen = self._chosen or chosen_layers(table, samples)
        followed = dict.fromkeys([*suspects, *self._followed])
        self._followed = tuple(path for path in followed if path not in self._chosen)[:FOLLOWED]
        layers = (*self._chosen, *self._followed)
        wanted: dict[str, list[CallRecord]] = {path: [] for path in layers if due(samples) or path not in self._kept}
        if not wanted:
            return []
        for call in snapshot.calls:
            if call.site.layer in wanted:
                wanted[call.site.layer].append(call)
        anew = samples & (samples - 1) == 0
        with np.errstate(all="ignore"):
            return [
                self._statistics(snapshot, path, calls[:SITES], NUMBERS // len(layers), anew=anew)
                for path, calls in wanted.items()
                if calls
            ]

    @property
    def memory(self) -> dict[str, Any]:
        """Return what it takes to go on, texts and arrays by name."""
        kept = [[path, of, channels] for path, (of, channels) in self._kept.items()]
        return {"chosen": list(self._chosen), "followed": list(self._followed), "kept": kept}

    @classmethod
    def recalled(cls, memory: Mapping[str, Any]) -> ChannelChoice:
        """Return the choice that a `memory` is of; a new one of an empty memory.

        Raises:
            TypeError, ValueError: it is none.
        """
        choice = cls()
        choice._chosen, choice._followed = (tuple(map(str, memory.get(part, ()))) for part in ("chosen", "followed"))
        for path, of, channels in memory.get("kept", ()):
            kept = np.asarray(channels, np.intp)
            if kept.ndim != 1 or (kept < 0).any() or (kept >= of).any():
                msg = f"there are no channels {channels} of {of}"
                raise ValueError(msg)
            choice._kept[str(path)] = int(of), kept
        return choice

    def _statistics(
        self, snapshot: StepSnapshot, path: str, calls: Sequence[CallRecord], numbers: int, *, anew: bool
    ) -> ChannelStatistics:
        of = len(calls[0].batch.mean)
        calls = [call for call in calls if len(call.batch.mean) == of]
        values = np.stack([row for call in calls for row in _rows(call)]).astype(np.float32)
        most = min(CHANNELS, max(numbers // len(calls), 1))
        known, channels = self._kept.get(path, (0, np.arange(0)))
        if known != of or len(channels) > most or (anew and len(channels) < of):
            statistics = ChannelStatistics(
                snapshot.step, snapshot.epoch, path, tuple(call.site for call in calls), (), of, values
            )
            channels = _channels(statistics, calls[0].spec.epsilon, most)
            self._kept[path] = of, channels
        return ChannelStatistics(
            step=snapshot.step,
            epoch=snapshot.epoch,
            layer=path,
            sites=tuple(call.site for call in calls),
            channels=tuple(channels.tolist()),
            of=of,
            values=values[:, channels],
        )


def _rows(call: CallRecord) -> tuple[NDArray[np.floating], ...]:
    """Return the rows of a call site, as a table has them: biased, without epsilon."""
    batch, running = call.batch, call.running
    factor = moments.bessel_factor(batch.count) if running.bessel_corrected else 1.0
    # float16 is widened before it is divided
    stored = np.asarray(running.var, np.result_type(running.var, np.float32))
    return batch.mean, np.sqrt(batch.var), running.mean, np.sqrt(stored / factor)


def _channels(statistics: ChannelStatistics, epsilon: float, most: int) -> NDArray[np.intp]:
    """Return the channels to keep: half of ``most`` are those farthest off, the others are spread evenly."""
    if statistics.of <= most:
        return np.arange(statistics.of)
    apart = statistics.apart(epsilon)
    distance = np.maximum(np.abs(apart["mean_shift"]), np.abs(np.log(apart["std_ratio"]))).max(axis=0)
    worst = np.argsort(-np.nan_to_num(distance, nan=np.inf, posinf=np.inf), kind="stable")[: most // 2]
    rest = np.setdiff1d(np.arange(statistics.of), worst)
    even = rest[np.linspace(0, len(rest) - 1, most - len(worst)).round().astype(np.intp)]
    return np.union1d(worst, even)
