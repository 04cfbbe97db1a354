"""Looks through the network: which layers still vary from example to example."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, TypeAlias

import numpy as np

from bnwatch.evidence.laboratory import EXAMPLES, ExperimentNotPossibleError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from numpy.typing import NDArray

    from bnwatch.evidence.laboratory import Examples, Laboratory, Progress, Split

NEAR_BOUND = 1e-6
"""Distance from the bound of an activation within which its derivative is nothing in float32."""

CONSTANT = 1e-6
"""Relative spread of an output over examples that float32 rounding can give."""

SAMPLE = 1024
"""Entries of a parameter that are kept to see how far it moves: a root mean square over them is good to 2 %."""

Parameter: TypeAlias = "tuple[NDArray[np.floating], int]"
"""At most `SAMPLE` entries of a parameter, evenly spread, and how many it has."""


@dataclass(frozen=True, slots=True)
class LayerLook:
    """What one layer gives on one batch.

    Attributes:
        path: the layer.
        kind: its class name, with the activation where it has one: ``Dense relu``.
        units: outputs per example.
        zero_samples: share of examples for which every unit is exactly zero.
        dead_units: share of units that are exactly zero for every example.
        spread: root mean square over units of the standard deviation across examples, divided by the root mean square
            of the output; 0 when the output is the same for every example.
        gradient: largest absolute gradient of the loss with respect to the layer's own parameters; None when it has
            none or they were not asked for.
        scale: root mean square of the output.
        bounds: share of outputs at a bound of their activation, within 1e-6: 0 or 1 of a sigmoid or softmax, -1 or 1
            of a tanh; None for another activation.
        update: root mean square of what the layer's own parameters changed in one training step, relative to that of
            the parameters: the mean over the steps since the look before; None when it has none, or at the first look.
    """

    path: str
    kind: str
    units: int
    zero_samples: float
    dead_units: float
    spread: float
    gradient: float | None = None
    scale: float = 1.0
    bounds: float | None = None
    update: float | None = None

    @classmethod
    def of(cls, path: str, kind: str, output: NDArray[np.floating], gradient: float | None = None) -> LayerLook:
        """Return the look of an output of shape ``(n, ...)``, n >= 2."""
        flat = np.asarray(output, dtype=np.float64).reshape(len(output), -1)
        zero = flat == 0.0
        return cls(
            path=path,
            kind=kind,
            units=flat.shape[1],
            zero_samples=float(zero.all(axis=1).mean()),
            dead_units=float(zero.all(axis=0).mean()),
            spread=spread_over(flat),
            gradient=gradient,
            scale=float(np.sqrt(np.mean(np.square(flat)))),
            bounds=_at_bounds(kind, flat),
        )


BOUNDS = {"sigmoid": (0.0, 1.0), "softmax": (0.0, 1.0), "tanh": (-1.0, 1.0)}


def bounds_of(kind: str) -> tuple[float, float] | None:
    """Return the bounds of the activation that a kind names, ``Dense tanh``; None where it has none."""
    return BOUNDS.get(kind.lower().split()[-1])


def _at_bounds(kind: str, output: NDArray[np.float64]) -> float | None:
    """Return the share of outputs at a bound of the activation that the kind names, None where it has none."""
    bounds = bounds_of(kind)
    if bounds is None:
        return None
    return float(np.mean((output - bounds[0] <= NEAR_BOUND) | (bounds[1] - output <= NEAR_BOUND)))


def spread_over(output: NDArray[np.floating]) -> float:
    """Return the relative spread over examples of an array of shape ``(n, ...)``, as `LayerLook.spread`."""
    flat = np.asarray(output, dtype=np.float64).reshape(len(output), -1)
    scale = float(np.sqrt(np.mean(np.square(flat))))
    # differences from the first example: equal ones give exactly 0
    return float(np.sqrt(np.mean(np.var(flat - flat[:1], axis=0)))) / scale if scale > 0.0 else 0.0


def entries(size: int, limit: int = SAMPLE) -> NDArray[np.intp]:
    """Return the numbers of at most ``limit`` entries, evenly spread over ``size``."""
    return np.linspace(0, size - 1, min(size, limit)).astype(np.intp)


class Updates:
    """How far parameters move from one look to the next."""

    def __init__(self) -> None:
        """Begin before the first look."""
        self._step: int | None = None
        self._known: dict[str, list[Parameter]] = {}
        self._found: dict[str, float] = {}

    def since(self, step: int, parameters: Mapping[str, Sequence[Parameter]]) -> Mapping[str, float]:
        """Return `LayerLook.update` by path, and keep the parameters for the next look; the first returns none.

        Args:
            step: training steps finished; a second look after the same step returns what the first did.
            parameters: those of each layer's own, by its path.
        """
        if step != self._step:
            known, steps = self._known, step - (self._step or 0)
            pairs = {path: (known[path], now) for path, now in parameters.items() if path in known}
            self._found = {path: _change(*pair) / steps for path, pair in pairs.items() if _comparable(*pair)}
            self._step, self._known = step, {path: list(now) for path, now in parameters.items()}
        return self._found


def _comparable(before: Sequence[Parameter], now: Sequence[Parameter]) -> bool:
    return bool(now) and [len(sample) for sample, _ in before] == [len(sample) for sample, _ in now]


def _change(before: Sequence[Parameter], now: Sequence[Parameter]) -> float:
    """Return the root mean square of the change relative to that of the parameters; infinite from zero on."""
    with np.errstate(all="ignore"):
        pairs = [
            (a.astype(np.float64), b.astype(np.float64), size) for (a, _), (b, size) in zip(before, now, strict=True)
        ]
        moved = sum(size * float(np.mean(np.square(b - a))) for a, b, size in pairs)
        held = sum(size * float(np.mean(np.square(a))) for a, _, size in pairs)
    if moved == 0.0:
        return 0.0
    return float(np.sqrt(moved / held)) if held > 0.0 else float("inf")


@dataclass(frozen=True, slots=True)
class Seen:
    """What a laboratory sees in one look at a batch under batch statistics.

    Attributes:
        layers: in execution order.
        entry: relative spread over examples of what enters the network, as `LayerLook.spread`; None when unknown.
        loss: of the batch; None when unknown.
        learning_rate: of the optimizer now, schedules included; None when unknown.
    """

    layers: tuple[LayerLook, ...]
    entry: float | None = None
    loss: float | None = None
    learning_rate: float | None = None


@dataclass(frozen=True, slots=True)
class Look:
    """One look through the network, layer by layer in execution order, on ``examples`` training examples.

    Attributes:
        step: training steps finished.
        epoch: epoch of that step, from 0.
        examples: how many were looked at.
        layers: in execution order.
        entry: relative spread over examples of what enters the network, as `LayerLook.spread`; None when unknown.
        loss: of these examples under batch statistics; None when unknown.
        learning_rate: of the optimizer; None when unknown.
    """

    step: int
    epoch: int
    examples: int
    layers: tuple[LayerLook, ...]
    entry: float | None = None
    loss: float | None = None
    learning_rate: float | None = None

    def up_to(self, path: str) -> tuple[LayerLook, ...]:
        """Return the layers up to and including the one of that path."""
        for number, layer in enumerate(self.layers, start=1):
            if layer.path == path:
                return self.layers[:number]
        return self.layers

    def first_constant(self, spread: float) -> LayerLook | None:
        """Return the first layer from which on no output varies by more than ``spread`` over examples."""
        found = None
        for layer in reversed(self.layers):
            if layer.spread >= spread:
                break
            found = layer
        return found


def look(lab: Laboratory, *, step: int, epoch: int, gradients: bool) -> Look:
    """Look through the network on the first kept training batch; with gradients on the latest, for a second opinion.

    Raises:
        ExperimentNotPossibleError: no training batch of two examples or more was kept.
    """
    batch = lab.examples("training", EXAMPLES if gradients else 1)[-1]
    if len(batch.labels) < 2:  # noqa: PLR2004 - variation needs two
        msg = "the kept training batch holds one example: whether outputs vary across examples cannot be seen"
        raise ExperimentNotPossibleError(msg)
    seen = lab.look(batch, gradients=gradients, step=step)
    return Look(step, epoch, len(batch.labels), seen.layers, seen.entry, seen.loss, seen.learning_rate)


@dataclass(frozen=True, slots=True)
class Localisation:
    """Where the output stops varying from example to example.

    Attributes:
        look: the look at every layer, over all examples.
        first: the first layer from which on no output varies; None when the last one still does.
    """

    look: Look
    first: LayerLook | None

    def __str__(self) -> str:
        """Return the result in a sentence."""
        if self.first is None:
            return f"the output varies across {self.look.examples:,} examples"
        first = self.first
        zero = f": {first.dead_units:.0%} of its units are zero for every one" if first.dead_units else ""
        return f"from `{first.path}` ({first.kind}) on, nothing varies across {self.look.examples:,} examples{zero}"


def localise(
    lab: Laboratory,
    split: Split = "training",
    *,
    examples: int = EXAMPLES,
    step: int = 0,
    epoch: int = 0,
    progress: Progress | None = None,
) -> Localisation:
    """Find the first layer from which on the output does not vary across examples, under batch statistics.

    Each batch is looked at for itself. A layer varies where it varies in any of them; a unit counts as dead up to the
    share that is dead in every batch.

    Raises:
        ExperimentNotPossibleError: there are no examples, or they come one a batch.
    """
    batches = [batch for batch in lab.examples(split, examples) if len(batch.labels) > 1]
    if not batches:
        msg = "batches hold one example each: whether outputs vary across examples cannot be seen"
        raise ExperimentNotPossibleError(msg)
    looks = []
    for done, batch in enumerate(batches, start=1):
        looks.append((batch, lab.look(batch, gradients=False).layers))
        if progress is not None:
            progress(f"{split} data, layer by layer", done, len(batches))
    layers = tuple(_merged(looks))
    found = Look(step, epoch, sum(len(batch.labels) for batch in batches), layers)
    return Localisation(found, found.first_constant(CONSTANT))


def _merged(looks: Iterable[tuple[Examples, tuple[LayerLook, ...]]]) -> list[LayerLook]:
    """Return one look a layer, over the examples of all batches."""
    merged: dict[str, LayerLook] = {}
    seen: dict[str, int] = {}
    for batch, layers in looks:
        for layer in layers:
            known, before, now = merged.get(layer.path, layer), seen.get(layer.path, 0), len(batch.labels)
            merged[layer.path] = replace(
                known,
                zero_samples=(known.zero_samples * before + layer.zero_samples * now) / (before + now),
                dead_units=min(known.dead_units, layer.dead_units),
                spread=max(known.spread, layer.spread),
            )
            seen[layer.path] = before + now
    return list(merged.values())
