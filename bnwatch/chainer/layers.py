"""The batch-normalization links of a model, found again by the identity of their running mean."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import chainer
import numpy as np
from chainer import links as L  # noqa: N812 - the name that all Chainer code uses

from bnwatch.chainer.arrays import to_host
from bnwatch.records import LayerSpec
from bnwatch.sources import Sources

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from bnwatch.lines import Lines


@dataclass(slots=True)
class Layer:
    """A watched link.

    Attributes:
        path: unique name in the model.
        link: the link.
        initial: mean and variance that the running statistics started from; None when they had moved before.
        updates: how often the running statistics were updated since the watch was attached.
        inferred: it was seen to normalize with its running statistics.
        replicas: the same link in the copies of the model that are trained beside it, by their number, from 1.
        built_at: the line that built the link, as `bnwatch.sources` finds it.
        called_at: the line that each call site is called from.
    """

    path: str
    link: Any
    initial: tuple[float, float] | None
    updates: int = 0
    inferred: bool = False
    replicas: dict[int, Layer] = field(default_factory=dict)
    built_at: str | None = None
    called_at: Lines = ()

    @property
    def known_updates(self) -> int | None:
        """Return the updates since the initial values; None when unknown, and for statistics made by finetuning."""
        return self.updates if self.initial is not None and not getattr(self.link, "N", 0) else None

    def spec(self) -> LayerSpec:
        """Return the layer as it is built now."""
        link = self.link
        return LayerSpec(
            path=self.path,
            kind=type(link).__name__,
            channels=0 if link.avg_mean is None else int(link.avg_mean.size),
            epsilon=float(link.eps),
            decay=float(link.decay),
            bessel_corrected=True,
            trainable=_trainable(link),
            axis=axes_of(link),
            initial=self.initial or (0.0, 1.0),
            built_at=self.built_at,
            called_at=self.called_at if any(self.called_at) else (),
        )


@dataclass(slots=True)
class Layers:
    """Every batch-normalization link of the watched models, each once.

    Attributes:
        models: the models by name; the name is a prefix of the paths, none for ``""``.
        copies: replicas of a model, by its name, that are trained beside it.
        watched: the links that are watched, in the order of their definition.
        unsupported: links that normalize by running statistics in another way, with the reason.
        sharing: links that share the running statistics of a watched one, with its path.
    """

    models: Mapping[str, Any]
    copies: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    watched: list[Layer] = field(default_factory=list)
    unsupported: dict[str, str] = field(default_factory=dict)
    sharing: dict[str, str] = field(default_factory=dict)
    _by_array: dict[int, tuple[int, int]] = field(default_factory=dict)
    _foreign: dict[int, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Find the links."""
        self._scan()
        places = {layer.path: layer for layer in self.watched}
        for name, copies in self.copies.items():
            for number, model in enumerate(copies, start=1):
                for path, link in _named(name, model):
                    if path in places and places[path].link is not link:
                        places[path].replicas[number] = Layer(path, link, places[path].initial)

    def _scan(self) -> None:
        places = {layer.path: place for place, layer in enumerate(self.watched)}
        seen = {id(link) for link in self.links}
        for path, link in self.named():
            if id(link) in seen:
                continue
            seen.add(id(link))
            if "avg_mean" in getattr(link, "_persistent", ()):
                reason = _refusal(link)
                if reason is None:
                    self._watch(path, link, places.get(path))
                else:
                    self.unsupported[path] = reason

    def _watch(self, path: str, link: Any, place: int | None) -> None:
        """Watch a link: a new one, or in ``place`` of one that was there before."""
        array = link.avg_mean
        origin = next((layer.path for layer in self.watched if layer.link.avg_mean is array is not None), None)
        if origin is not None and origin != path:
            self.sharing[path] = origin
            return
        self.sharing.pop(path, None)
        layer = Layer(path, link, _initial(link))
        if place is None:
            self.watched.append(layer)
        else:
            layer.called_at = self.watched[place].called_at
            self.watched[place] = layer

    def locate(self) -> None:
        """Find where the watched links were built."""
        sources, parents = Sources(lambda link: link.children()), dict[int, list[Any]]()
        for model in self.models.values():
            _descend(model, [], parents)
        for layer in self.watched:
            layer.built_at = sources.built_at(layer.link, parents.get(id(layer.link), []))

    def named(self) -> Iterator[tuple[str, Any]]:
        """Yield every link of every model with its path."""
        for name, model in self.models.items():
            yield from _named(name, model)

    def at(self, index: int, replica: int = 0) -> Layer:
        """Return a layer, or that of a replica, as `find` tells them."""
        return self.watched[index].replicas[replica] if replica else self.watched[index]

    def unseen(self) -> dict[str, str]:
        """Return the links of other classes than Chainer's that were not seen to normalize, with the reason."""
        reason = "F.batch_normalization was not called with its avg_mean as running_mean"
        return {
            layer.path: f"{type(layer.link).__name__}: {reason}"
            for layer in self.watched
            if not (layer.updates or layer.inferred) and not isinstance(layer.link, L.BatchNormalization)
        }

    def unrestored(self) -> tuple[str, ...]:
        """Return the layers whose running statistics are initial now, while their scale or offset are trained."""
        return tuple(
            layer.path
            for layer in self.watched
            if _initial(layer.link) is not None
            and any(_is_trained(getattr(layer.link, name, None)) for name in ("gamma", "beta"))
        )

    def normalized_elsewhere(self, running_mean: Any) -> None:
        """See a batch normalization by no link of these models: worth a word where there is nothing else."""
        if not self.watched:
            self.unsupported["F.batch_normalization"] = (
                "called without running statistics: evaluation normalizes with batch statistics, too"
                if running_mean is None
                else "called with running statistics that no link keeps as persistent avg_mean and avg_var"
            )

    @property
    def links(self) -> list[Any]:
        """Return the watched links."""
        return [layer.link for layer in self.watched]

    @property
    def updates_made(self) -> int:
        """Return how often parameters of the models were updated, all together."""
        rules = (parameter.update_rule for model in self.models.values() for parameter in model.params())
        return sum(rule.t for rule in rules if rule is not None)

    def refresh(self) -> None:
        """Look for links again, and forget which arrays are of other models: changes are seen at a sampled step."""
        self._scan()
        self._foreign.clear()
        if len(self._by_array) > 4 * sum(1 + len(layer.replicas) for layer in self.watched):
            self._by_array.clear()

    def find(self, running_mean: Any) -> tuple[int, int] | None:
        """Return the layer's index and the replica that this array is the running mean of; None for another model's."""
        key = id(running_mean)
        place = self._by_array.get(key)
        if place is not None and self.at(*place).link.avg_mean is running_mean:
            return place
        if key in self._foreign:
            return None
        for number, layer in enumerate(self.watched):  # to_gpu, a lazy initialization or loading made a new array
            for replica, one in ((0, layer), *layer.replicas.items()):
                if one.link.avg_mean is running_mean:
                    self._by_array[key] = number, replica
                    return number, replica
        self._foreign[key] = running_mean  # held, so that nothing else can take its identity
        return None


def _named(name: str, model: Any) -> Iterator[tuple[str, Any]]:
    for path, link in model.namedlinks():
        yield f"{name}{path}".strip("/") or type(link).__name__, link


def _descend(link: Any, above: list[Any], parents: dict[int, list[Any]]) -> None:
    """Enter for every link what holds it at its first place, the innermost first."""
    if id(link) not in parents:
        parents[id(link)] = above
        for child in link.children():
            _descend(child, [link, *above], parents)


def axes_of(link: Any) -> tuple[int, ...] | None:
    """Return the axes that a link averages over; None for its default, axis 0 and all behind the channels."""
    axis = getattr(link, "axis", None)
    return (axis,) if isinstance(axis, int) else axis and tuple(axis)


def _refusal(link: Any) -> str | None:
    """Return why the batch normalization of a link cannot be watched; None when it can."""
    name = type(link).__name__
    if isinstance(link.device, chainer.backend.ChainerxDevice):
        return f"{name} is on a device of ChainerX, which shows function hooks nothing"
    if "avg_var" not in link._persistent:  # noqa: SLF001 - there is no public name
        return f"{name} keeps no running variance (avg_var), and its batch statistics to itself"
    missing = [needed for needed in ("decay", "eps") if not isinstance(getattr(link, needed, None), int | float)]
    return f"{name} has no number `{missing[0]}`" if missing else None


def _initial(link: Any) -> tuple[float, float] | None:
    """Return the values that running statistics hold which were never updated; None for others.

    Initial values are the same in all channels. One channel alone says nothing by that: it counts only at 0 and 1.
    """
    if link.avg_mean is None:
        first = _constant(getattr(link, "_initial_avg_mean", None), 0.0)
        second = _constant(getattr(link, "_initial_avg_var", None), 1.0)
        return None if first is None or second is None else (first, second)
    mean, var = (array.ravel() for array in to_host([link.avg_mean, link.avg_var]))
    if getattr(link, "N", 0) or not mean.size or (mean != mean[0]).any() or (var != var[0]).any():
        return None
    values = float(mean[0]), float(var[0])
    return values if mean.size > 1 or values == (0.0, 1.0) else None


def _is_trained(parameter: Any) -> bool:
    """Return whether a parameter that began the same in all channels is not so now."""
    array = getattr(parameter, "array", None)
    if array is None or _constant(getattr(parameter, "initializer", None), 0.0) is None:
        return False
    (values,) = to_host([array])
    return bool((values != values.flat[0]).any())


def _constant(initializer: Any, default: float) -> float | None:
    """Return the value that an initializer gives all channels; None when it gives them different ones."""
    value = default if initializer is None else getattr(initializer, "fill_value", initializer)
    return None if callable(value) or np.ndim(value) else float(value)


def _trainable(link: Any) -> bool:
    rules = [parameter.update_rule for parameter in link.params(include_uninit=True)]
    return not rules or any(rule is None or rule.enabled for rule in rules)


def framework() -> str:
    """Return the framework's name and version for the record."""
    return f"chainer {chainer.__version__}"
