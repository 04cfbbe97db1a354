"""What changes outside of the training steps: statistics that moved, parameters that were swapped or never moved.

Everything is told by comparing bytes: the running statistics, and a few entries of each parameter. They are read where
an evaluation is expected to follow a step, and at evaluations; on the other steps nothing is.
"""

from __future__ import annotations

import itertools
import math
import operator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import chainer
import numpy as np
from chainer import backend
from chainer.training import triggers
from chainer.training.extensions import Evaluator

from bnwatch.chainer.arrays import to_host

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping

    from bnwatch.chainer.layers import Layers

ENTRIES = 256
"""Entries of a parameter that are compared: another set of weights differs in nearly all of them."""


@dataclass(frozen=True, slots=True)
class State:
    """The models after a step.

    Attributes:
        step: training steps finished.
        parameters: bytes of some entries of each parameter, by the path of its link and its name.
        statistics: bytes of the running statistics by the path of the layer.
    """

    step: int
    parameters: Mapping[tuple[str, str], bytes]
    statistics: Mapping[str, bytes]

    def has_parameters_of(self, other: State) -> bool:
        """Return whether all parameters that both know are the same."""
        return all(other.parameters.get(key, value) == value for key, value in self.parameters.items())

    def moved_since(self, other: State) -> set[str]:
        """Return the layers whose running statistics are others."""
        return {path for path, value in self.statistics.items() if other.statistics.get(path, value) != value}


@dataclass(frozen=True, slots=True)
class Outcome:
    """What `Changes` knows of an evaluation, see `EvaluationRecord`; ``moved`` is None when it is not known."""

    moved: set[str] | None
    still: tuple[str, ...]
    swapped: bool | None


class Changes:
    """Compares the models with what the last training step left.

    What a step leaves is read at its end, by the optimizer or by the loop. A program that goes on to change the
    parameters after that, as one that clips them does, would be taken for one that swaps them. So the first training
    pass after a step at which the state was read must find it; where one does not, nothing is said of swapping.
    """

    def __init__(self, layers: Layers) -> None:
        self._layers = layers
        self._began: State | None = None
        self._left: State | None = None
        self._evaluated: State | None = None
        self._swapped_in: tuple[int, dict[tuple[str, str], Any]] = (-1, {})
        self._settled = True
        self._sure = False
        self._evaluations = [0]
        self._trained: set[int] = set()

    def begin(self, step: int) -> None:
        """Remember what the parameters are before the first step that is watched."""
        self._began = self.read(step)
        self._evaluations = [step]

    def due(self, step: int) -> bool:
        """Return whether to read what this step leaves: the first one, and where evaluations follow at intervals."""
        first, last = self._evaluations[0], self._evaluations[-1]
        return step == (2 * last - first if last > first else first + 1)

    def trained(self, layers: Iterable[int]) -> None:
        """Note that a training step normalized in these layers."""
        self._trained.update(layers)

    def left(self, step: int) -> None:
        """Read what a training step left."""
        self._left, self._evaluated, self._sure = self.read(step), None, True
        self._swapped_in = -1, {}

    def called(self, *, training: bool) -> None:
        """See a call of a layer, the first after `left`: in the pass of the next step, or in an evaluation."""
        left = self._left
        if left is None or not self._settled:
            return
        now = self.read(left.step)
        if training:
            self._settled = now.has_parameters_of(left)
        else:
            self._evaluated = now
            if not now.has_parameters_of(left):  # it may be taken out again before anything is measured
                self._swapped_in = left.step, {key: array.copy() for key, array in _state(self._layers)}

    def evaluated(self, step: int) -> Outcome:
        """Return what an evaluation after that many steps found, and what it left."""
        now, left, evaluated = self.read(step), self._left, self._evaluated
        known = left if left is not None and left.step == step else None
        if self._evaluations[-1] != step:
            self._evaluations = [self._evaluations[-1], step]
        # without, what is found now is all that a later look after the same step can be compared with
        self._left, self._evaluated = known or now, None
        self._sure &= known is not None
        still = self._still(now)
        swapped = None if known is None else self._swapped(known, now, evaluated or now)
        moved = None if known is None else now.moved_since(known)
        if moved is not None and known is not None and evaluated is not None and swapped:
            moved |= evaluated.moved_since(known)  # statistics that were put in with the weights, and taken out again
        return Outcome(
            moved=moved,
            still=tuple(layer.path for layer in self._layers.watched if layer.path in still),
            swapped=swapped,
        )

    @contextmanager
    def as_evaluated(self, step: int) -> Iterator[None]:
        """Put weights and statistics that were swapped in to be evaluated after a step back in, until the context ends.

        A program may have taken them out again before anything could be measured.
        """
        of, given = self._swapped_in
        now = {
            key: array
            for key, array in _state(self._layers)
            if of == step and key in given and given[key].shape == array.shape
        }
        held = {key: array.copy() for key, array in now.items()}
        try:
            for key, array in now.items():
                backend.copyto(array, given[key])
            yield
        finally:
            for key, array in held.items():
                backend.copyto(now[key], array)

    def swapped(self, step: int) -> bool | None:
        """Return whether parameters are others now than the last training step left; None when that is not known."""
        left = self._left
        return self._swapped(left, self.read(step)) if left is not None and left.step == step else None

    def _swapped(self, left: State, *found: State) -> bool | None:
        if not self._settled:
            return None
        return not all(one.has_parameters_of(left) for one in found) or (False if self._sure else None)

    def _still(self, now: State) -> set[str]:
        began = self._began
        if began is None:
            return set()
        moved = {key for key, value in now.parameters.items() if began.parameters.get(key, value) != value}
        return {
            layer.path
            for index, layer in enumerate(self._layers.watched)
            if index in self._trained
            and (own := {key for key in began.parameters if key[0] == layer.path})
            and not own & moved
            and moved
        }

    def read(self, step: int) -> State:
        """Return the state now, with one copy a device."""
        parameters = dict(_parameters(self._layers))
        layers = [layer for layer in self._layers.watched if layer.link.avg_mean is not None]
        host = to_host(
            [*parameters.values(), *(array for one in layers for array in (one.link.avg_mean, one.link.avg_var))]
        )
        values = iter([array.tobytes() for array in host])
        return State(
            step,
            {key: next(values) for key in parameters},
            {layer.path: next(values) + next(values) for layer in layers},
        )


def sample_of(array: Any, limit: int) -> Any:
    """Return at most ``limit`` entries of an array, evenly spread, where it is."""
    on_host = backend.get_device_from_array(array).xp is np  # iDeep's arrays have no slices
    return (np.asarray(array) if on_host else array).ravel()[:: math.ceil(array.size / limit)]


def _state(layers: Layers) -> Iterator[tuple[tuple[str, str], Any]]:
    """Yield every parameter and the running statistics, where they are."""
    yield from _arrays(layers)
    for layer in layers.watched:
        if layer.link.avg_mean is not None:
            yield (layer.path, "avg_mean"), layer.link.avg_mean
            yield (layer.path, "avg_var"), layer.link.avg_var


def _parameters(layers: Layers) -> Iterator[tuple[tuple[str, str], Any]]:
    """Yield some entries of every parameter."""
    return ((key, sample_of(array, ENTRIES)) for key, array in _arrays(layers))


def _arrays(layers: Layers) -> Iterator[tuple[tuple[str, str], Any]]:
    seen = set()
    for path, link in layers.named():
        if isinstance(link.device, chainer.backend.ChainerxDevice):
            continue
        for name in sorted(link._params):  # noqa: SLF001 - the public names are those of children, too
            array = vars(link)[name].array
            if array is not None and array.size and id(array) not in seen:
                seen.add(id(array))
                yield (path, name), array


class After:
    """An optimizer's hook that is called after its update; an optimizer of one's own that knows none is not heard of.

    What is copied or pickled together with it gets a hook in its place that does nothing and needs no bnwatch.
    """

    def __init__(self, updated: Callable[[Any], None]) -> None:
        self._updated = updated

    def __call__(self, optimizer: Any) -> None:
        """Pass on that the optimizer has updated."""
        self._updated(optimizer)

    def __reduce__(self) -> tuple[Any, ...]:
        """Return a hook that does nothing."""
        return operator.attrgetter, ("target",)

    def listen(self, optimizer: Any) -> None:
        """Hear of the updates; to be called now and then, as `optimizer.setup` drops every hook."""
        before, after = _hooks(optimizer)
        if before is None or after is None or self._name(optimizer) is not None:
            return
        known = {*before, *after}
        free = next(name for name in map("bnwatch-{}".format, itertools.count()) if name not in known)
        optimizer.add_hook(self, name=free, timing="post")

    def leave(self, optimizer: Any) -> None:
        """Hear no more of them."""
        name = self._name(optimizer)
        if name is not None:
            optimizer.remove_hook(name)

    def _name(self, optimizer: Any) -> str | None:
        return next((name for name, hook in (_hooks(optimizer)[1] or {}).items() if hook is self), None)


def _hooks(optimizer: Any) -> tuple[Mapping[str, Any] | None, Mapping[str, Any] | None]:
    """Return the hooks before and after an update by name, None where there are none to be had."""
    hookable = getattr(optimizer, "_hookable", None)  # there is no public name
    return getattr(hookable, "_pre_update_hooks", None), getattr(hookable, "_post_update_hooks", None)


def evaluation_follows(trainer: Any, step: int) -> bool:
    """Return whether an evaluator of a Trainer, or its end, follows the update of this step, which is on its way.

    Triggers of one's own are not asked, as asking may change them.
    """
    entries = trainer._extensions.values()  # noqa: SLF001 - the public method hides triggers
    stop = trainer.stop_trigger
    asked = [entry.trigger for entry in entries if isinstance(entry.extension, Evaluator)]
    return any(_fires(trigger, trainer.updater, step) for trigger in [*asked, getattr(stop, "_max_trigger", stop)])


def _fires(trigger: Any, updater: Any, step: int) -> bool:
    if not isinstance(trigger, triggers.IntervalTrigger):
        return False
    if trigger.unit == "iteration":
        return bool(step % trigger.period == 0)
    before, now = getattr(updater, "previous_epoch_detail", None), getattr(updater, "epoch_detail", None)
    return before is not None and now is not None and bool(before // trigger.period != now // trigger.period)
