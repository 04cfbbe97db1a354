"""Calling the user's model without a trace: what experiments run inside."""

from __future__ import annotations

import itertools
import random
import sys
import warnings
from collections import deque
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import chainer
import numpy as np
from chainer import backend
from chainer import reporter as reporting
from chainer.backends import cuda

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator, Sequence

    Forward = Callable[..., Any]


@contextmanager
def undisturbed(models: Sequence[Any]) -> Iterator[None]:
    """Take back all that a forward pass leaves behind, also when it raises.

    Attributes of links (a classifier's ``y``, a recurrent state) and what lists, dictionaries, arrays and random
    generators among them hold; parameters that get their shape in it; persistent arrays in place; the state of
    Python's, NumPy's and CuPy's random generators, reported values, configuration. Hooks of the user see nothing of it.
    Objects of other classes that a link holds are not looked into, nor are arrays above 16 MiB.
    """
    links = [link for model in models for link in model.links()]
    with ExitStack() as stack:
        stack.enter_context(_random_state())
        stack.enter_context(_without(_device_generators()))  # whose state cannot be read: a draw makes new ones
        stack.enter_context(_links(links))
        stack.enter_context(_of_this_rank([link for link in links if _is_multi_node(link)]))
        stack.enter_context(_without(chainer.get_function_hooks()))
        stack.enter_context(_without(chainer._get_link_hooks()))  # noqa: SLF001 - there is no public name
        stack.enter_context(_silent_reports())
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        stack.enter_context(_configuration())
        for name, value in _CONFIG.items():
            stack.enter_context(chainer.using_config(name, value))
        yield


_CONFIG = {"train": False, "use_static_graph": False, "in_recomputing": False, "_will_recompute": False}


@contextmanager
def _configuration() -> Iterator[None]:
    levels = vars(chainer.config._local), vars(chainer.global_config)  # noqa: SLF001 - of this thread
    saved = [dict(level) for level in levels]
    try:
        yield
    finally:
        for level, values in zip(levels, saved, strict=True):
            level.clear()
            level.update(values)


@contextmanager
def _random_state() -> Iterator[None]:
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002 - the generator that Chainer draws from
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)  # noqa: NPY002


def _device_generators() -> dict[int, Any]:
    """Return CuPy's random generators by the number of their device."""
    if not cuda.available:
        return {}
    generators: dict[int, Any] = cuda.cupy.random.get_random_state.__globals__["_random_states"]
    return generators


@contextmanager
def _links(links: Sequence[Any]) -> Iterator[None]:
    snapshot = _Snapshot()
    for link in links:
        snapshot.take(vars(link))
        for name in link._persistent:  # noqa: SLF001
            snapshot.keep_array(vars(link).get(name))
    try:
        yield
    finally:
        snapshot.restore()


class _Snapshot:
    """What objects hold, to be put back into the very same objects."""

    def __init__(self) -> None:
        self._undo: list[Callable[[], None]] = []
        self._taken: dict[int, Any] = {}

    def restore(self) -> None:
        """Put everything back."""
        for undo in self._undo:
            undo()

    def keep_array(self, array: Any) -> None:
        """Remember the values of an array, to be restored in place: a function hook knows a layer by its array."""
        if isinstance(array, chainer.get_array_types()) and array is not None and self._new(array):
            values = array.copy()
            self._undo.append(lambda: backend.copyto(array, values))

    def take(self, value: Any) -> None:
        """Remember what a container holds, and what these hold; parameters, generators and small arrays, too."""
        if isinstance(value, chainer.Parameter):
            self._parameter(value)
        elif isinstance(value, chainer.get_array_types()) and value is not None:
            fixed = isinstance(value, np.ndarray) and not value.flags.writeable
            if not fixed and value.size * value.dtype.itemsize <= _STATE_BYTES:
                self.keep_array(value)
        elif isinstance(value, _MUTABLE):
            if self._new(value):
                self._mutable(value)
        elif isinstance(value, tuple):
            for part in value:
                self.take(part)

    def _new(self, value: Any) -> bool:
        new = id(value) not in self._taken
        self._taken[id(value)] = value
        return new

    def _parameter(self, parameter: Any) -> None:
        """Remember the arrays of a parameter: one without a shape is given one by its first forward pass."""
        if self._new(parameter):
            self._mutable(parameter._data)  # noqa: SLF001 - the list that its array lies in
            for one in (parameter, parameter.node):
                own = dict(vars(one))
                self._undo.append(partial(_refill, vars(one), own))

    def _mutable(self, value: Any) -> None:
        if isinstance(value, random.Random):
            python = value.getstate()
            self._undo.append(lambda: value.setstate(python))
        elif isinstance(value, np.random.RandomState):
            legacy = value.get_state()
            self._undo.append(lambda: value.set_state(legacy))
        elif isinstance(value, np.random.Generator):
            state = value.bit_generator.state
            self._undo.append(lambda: setattr(value.bit_generator, "state", state))
        else:
            held: Any = dict(value) if isinstance(value, dict) else list(value)
            self._undo.append(partial(_refill, value, held))
            if len(held) <= _STATE_PARTS:
                for part in held.values() if isinstance(held, dict) else held:
                    self.take(part)


_MUTABLE = (dict, set, list, deque, bytearray, random.Random, np.random.RandomState, np.random.Generator)

_STATE_BYTES = 2**24
"""An array of more than this is taken for data that a link holds, not for state that a forward pass changes."""

_STATE_PARTS = 10_000
"""So is what a longer container holds; the container itself is restored."""


def _refill(value: Any, held: Any) -> None:
    if isinstance(value, set):  # element by element: one that is built anew may come in another order
        for added in value.difference(held):
            value.remove(added)
        value.update(held)
        return
    value.clear()
    (value.update if isinstance(value, dict) else value.extend)(held)


def _is_multi_node(link: Any) -> bool:
    """Return whether a link is ChainerMN's batch normalization over all ranks; ChainerMN is not imported for that."""
    chainermn = sys.modules.get("chainermn")
    return chainermn is not None and isinstance(link, chainermn.links.MultiNodeBatchNormalization)


@contextmanager
def _of_this_rank(links: Sequence[Any]) -> Iterator[None]:
    """Turn normalization over all ranks into that of this rank alone: the others do not take part."""
    classes = [type(link) for link in links]
    try:
        for link in links:
            vars(link)["axis"] = None
            object.__setattr__(link, "__class__", chainer.links.BatchNormalization)
        yield
    finally:
        for link, own in zip(links, classes, strict=True):
            object.__setattr__(link, "__class__", own)


@contextmanager
def _without(entries: dict[Any, Any]) -> Iterator[None]:
    saved = dict(entries)
    entries.clear()
    try:
        yield
    finally:
        entries.clear()
        entries.update(saved)


@contextmanager
def _silent_reports() -> Iterator[None]:
    reporters = reporting._get_reporters()  # noqa: SLF001 - the public function fails where there is none
    saved = list(reporters)
    reporters.clear()
    try:
        yield
    finally:
        reporters[:] = saved


@contextmanager
def replaced(links: Sequence[Any], wrap: Callable[[Any, Forward], Forward]) -> Iterator[None]:
    """Let ``wrap(link, forward)`` take the place of each link's forward pass; call it inside `undisturbed`."""
    saved = [(link, type(link), vars(link).get("forward")) for link in links]
    try:
        for link, own, _ in saved:
            if hasattr(link, "forward"):
                vars(link)["forward"] = wrap(link, link.forward)
            else:  # written before Chainer 5: a call is looked up in the class
                link.__class__ = type(own.__name__, (own,), {"__call__": staticmethod(wrap(link, link.__call__))})
        yield
    finally:
        for link, own, forward in saved:
            link.__class__ = own
            vars(link).pop("forward", None)
            if forward is not None:
                vars(link)["forward"] = forward


@contextmanager
def batch_statistics(links: Sequence[Any], *, estimate: bool = False) -> Iterator[None]:
    """Let batch normalization, and nothing else, run in training mode; call it inside `undisturbed`.

    Running statistics stay as they are, by Chainer's own switch for recomputation, or with a decay of 1 where a link
    does not know it. With ``estimate`` they become the plain average over the calls made inside, by the decays of
    Chainer's finetuning, until `undisturbed` takes them back.
    """
    with replaced(links, lambda link, forward: _training(link, forward, estimate=estimate)):
        yield


@contextmanager
def statistics_of(
    links: Sequence[Any], statistics: Literal["batch", "running"], other: Collection[tuple[int, int]] = ()
) -> Iterator[None]:
    """Let batch normalization use these statistics, and the other kind at some calls; call it inside `undisturbed`.

    ``other`` holds the position of a link in ``links`` and the number of its call, both from 0.
    """
    places = {id(link): place for place, link in enumerate(links)}

    def chosen(link: Any, forward: Forward) -> Forward:
        kinds = {True: _training(link, forward), False: _evaluating(forward)}
        calls, place = itertools.count(), places[id(link)]

        def chosen_forward(*args: Any, **kwargs: Any) -> Any:
            by_batch = (statistics == "batch") is not ((place, next(calls)) in other)
            return kinds[by_batch](*args, **kwargs)

        return chosen_forward

    # as evaluation calls it: nothing to change
    with nullcontext() if statistics == "running" and not other else replaced(links, chosen):
        yield


def _training(link: Any, forward: Forward, *, estimate: bool = False) -> Forward:
    if not estimate and isinstance(link, chainer.links.BatchRenormalization):  # what it reads when it recomputes
        link._prev_avg_mean, link._prev_avg_var = link.avg_mean, link.avg_var  # noqa: SLF001

    calls = itertools.count(1)

    def training_forward(*args: Any, **kwargs: Any) -> Any:
        own, link.decay = link.decay, 1.0 - 1.0 / next(calls) if estimate else 1.0
        kwargs.pop("finetune", None)  # by a count of its own
        try:
            with chainer.using_config("train", True), chainer.using_config("in_recomputing", not estimate):
                return forward(*args, **kwargs)
        finally:
            link.decay = own

    return training_forward


def _evaluating(forward: Forward) -> Forward:
    def evaluating_forward(*args: Any, **kwargs: Any) -> Any:
        with chainer.using_config("train", False):
            return forward(*args, **kwargs)

    return evaluating_forward
