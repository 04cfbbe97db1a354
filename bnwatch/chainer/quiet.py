"""Calling the user's model without a trace: what experiments run inside."""

from __future__ import annotations

import itertools
import random
import warnings
from contextlib import ExitStack, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, Literal

import chainer
import numpy as np
from chainer import backend
from chainer import reporter as reporting
from chainer.backends import cuda

from bnwatch.chainer.layers import is_multi_node

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator, Sequence

    Forward = Callable[..., Any]


@contextmanager
def undisturbed(models: Sequence[Any]) -> Iterator[None]:
    """Take back all that a forward pass leaves behind, also when it raises.

    Attributes of links (a classifier's ``y``, a recurrent state), persistent arrays in place, the state of Python's,
    NumPy's and CuPy's random generators, reported values, configuration. Hooks of the user see nothing of it.
    """
    links = [link for model in models for link in model.links()]
    with ExitStack() as stack:
        stack.enter_context(_random_state())
        stack.enter_context(_without(_device_generators()))  # whose state cannot be read: a draw makes new ones
        stack.enter_context(_links(links))
        stack.enter_context(_of_this_rank([link for link in links if is_multi_node(link)]))
        stack.enter_context(_without(chainer.get_function_hooks()))
        stack.enter_context(_without(chainer._get_link_hooks()))  # noqa: SLF001 - there is no public name
        stack.enter_context(_silent_reports())
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        for name, value in _CONFIG.items():
            stack.enter_context(chainer.using_config(name, value))
        yield


_CONFIG = {"train": False, "use_static_graph": False, "in_recomputing": False, "_will_recompute": False}


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
    attributes = [(link, dict(vars(link))) for link in links]
    arrays = [
        (array, array.copy())
        for link in links
        for name in link._persistent  # noqa: SLF001
        if isinstance(array := vars(link).get(name), chainer.get_array_types()) and array is not None
    ]
    try:
        yield
    finally:
        for link, values in attributes:
            vars(link).clear()
            vars(link).update(values)
        for array, copy in arrays:  # in place: a function hook knows a layer by its array
            backend.copyto(array, copy)


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
