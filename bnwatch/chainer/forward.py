"""How the user calls the model: found on the stack while a function runs, and called again the same way.

A link hook would miss ``link.forward(x)`` and every model that overrides ``__call__``, as all did before Chainer 5. The
stack misses none: the outermost frame that runs a method of a watched link has the arguments. Only frames of such
methods are opened, since opening a frame makes it hold what its variables held.
"""

from __future__ import annotations

import dis
import inspect
import itertools
import sys
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import chainer
import numpy as np
from chainer import backend

from bnwatch.chainer.arrays import to_host
from bnwatch.evidence import ExperimentNotPossibleError
from bnwatch.lines import code_of

if TYPE_CHECKING:
    from collections.abc import Sequence
    from types import FrameType

_LINK_CALL = chainer.Link.__call__.__code__


@dataclass(frozen=True, slots=True)
class Kept:
    """A copy of an array on the host, and where it came from."""

    array: Any
    device: Any
    variable: bool

    def again(self) -> Any:
        """Return it as the model was given it."""
        array = self.device.send(self.array)
        return chainer.Variable(array, requires_grad=False) if self.variable else array


@dataclass(frozen=True, slots=True)
class ForwardCall:
    """A method of a link, and arguments to call it with."""

    link: Any
    method: str = "__call__"
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)

    def __call__(self) -> Any:
        """Call it, as the user did."""
        method = self.link if self.method == "__call__" else getattr(self.link, self.method)
        args, kwargs = thaw((self.args, self.kwargs))
        return method(*args, **kwargs)

    def keep(self) -> ForwardCall:
        """Return a call with copies of the arguments."""
        return ForwardCall(self.link, self.method, keep(self.args), keep(self.kwargs))


def keep(value: Any) -> Any:
    """Return a copy of arrays and Variables within tuples, lists and dicts; other values as they are."""
    if isinstance(value, dict):
        return {name: keep(part) for name, part in value.items()}
    if isinstance(value, list | tuple) and type(value) in {list, tuple}:
        return type(value)(keep(part) for part in value)
    array = value.array if isinstance(value, chainer.Variable) else value
    if isinstance(array, chainer.get_array_types()) and array is not None:
        device = backend.get_device_from_array(array)
        return Kept(to_host([array])[0], device, isinstance(value, chainer.Variable))
    return value


def thaw(value: Any) -> Any:
    """Return kept values as they were given."""
    if isinstance(value, Kept):
        return value.again()
    if isinstance(value, dict):
        return {name: thaw(part) for name, part in value.items()}
    if isinstance(value, list | tuple) and type(value) in {list, tuple}:
        return type(value)(thaw(part) for part in value)
    return value


def size_of(value: Any) -> int:
    """Return the bytes of the kept arrays."""
    if isinstance(value, Kept):
        return int(value.array.nbytes)
    if isinstance(value, ForwardCall):
        return size_of(value.args) + size_of(value.kwargs)
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    return sum(map(size_of, parts))


def rearranged(calls: Sequence[ForwardCall], rows: Sequence[int], order: np.ndarray[Any, Any]) -> list[ForwardCall]:
    """Return calls with the same examples in another order, each with as many as before.

    Arrays with a row for each example are taken apart, and lists with a part for each; what else the model is called
    with must be the same in every call.

    Args:
        calls: with kept arguments.
        rows: examples of each.
        order: a permutation: the n-th example of the result is number ``order[n]`` of the calls in turn.

    Raises:
        ExperimentNotPossibleError: the calls cannot be taken apart.
    """
    ends = np.cumsum(rows)
    if len(order) != ends[-1] or any((c.link, c.method) != (calls[0].link, calls[0].method) for c in calls):
        msg = "the batches went to the model in different ways, so that they cannot be taken apart"
        raise ExperimentNotPossibleError(msg)
    parts = [order[end - count : end] for count, end in zip(rows, ends, strict=True)]
    args = _rearranged([call.args for call in calls], rows, parts)
    kwargs = _rearranged([call.kwargs for call in calls], rows, parts)
    return [ForwardCall(calls[0].link, calls[0].method, *own) for own in zip(args, kwargs, strict=True)]


def _rearranged(values: Sequence[Any], rows: Sequence[int], parts: Sequence[np.ndarray[Any, Any]]) -> list[Any]:
    """Return one argument of all calls, or a part of it, for the examples of each call."""
    first, kinds = values[0], {type(value) for value in values}
    if len(kinds) == 1 and isinstance(first, Kept):
        arrays = [value.array for value in values]
        alike = len({(array.shape[1:], array.dtype) for array in arrays}) == 1
        if alike and all(array.ndim and len(array) == count for array, count in zip(arrays, rows, strict=True)):
            together = np.concatenate(arrays)
            return [replace(value, array=together[part]) for value, part in zip(values, parts, strict=True)]
    elif kinds == {list} and all(len(value) == count for value, count in zip(values, rows, strict=True)):
        each = list(itertools.chain.from_iterable(values))
        return [[each[number] for number in part] for part in parts]
    elif kinds == {dict} and len({tuple(value) for value in values}) == 1:
        columns = [_rearranged([value[name] for value in values], rows, parts) for name in first]
        return [dict(zip(first, own, strict=True)) for own in zip(*columns, strict=True)] if columns else list(values)
    elif len(kinds) == 1 and isinstance(first, list | tuple) and len({len(value) for value in values}) == 1:
        columns = [_rearranged(column, rows, parts) for column in zip(*values, strict=True)]
        return [type(first)(own) for own in zip(*columns, strict=True)] if columns else list(values)
    elif kinds <= {bool, int, float, str, type(None)} and all(value == first for value in values):
        return list(values)
    msg = "the model is called with something else than arrays of one row an example, which cannot be taken apart"
    raise ExperimentNotPossibleError(msg)


class Stack:
    """Finds the outermost call of a model on the stack."""

    def __init__(self, models: list[Any]) -> None:
        links = [link for model in models for link in model.links()]
        self._links = {id(link) for link in links}
        classes = {cls for link in links for cls in type(link).__mro__}
        self._codes = {code for cls in classes for value in vars(cls).values() if (code := code_of(value)) is not None}

    def outermost(self) -> FrameType | None:
        """Return the outermost frame that runs a method of a watched link; None outside of any."""
        found: FrameType | None = None
        frame: FrameType | None = sys._getframe(1)  # noqa: SLF001
        while frame is not None:
            code = frame.f_code
            if code in self._codes and code.co_argcount and id(frame.f_locals.get(code.co_varnames[0])) in self._links:
                found = frame
            frame = frame.f_back
        return found


def read_call(frame: FrameType) -> ForwardCall | None:
    """Return the call that a frame runs; None if its arguments were assigned to since."""
    code = frame.f_code
    info = inspect.getargvalues(frame)
    positional = list(code.co_varnames[1 : code.co_argcount])
    keyword = list(code.co_varnames[code.co_argcount : code.co_argcount + code.co_kwonlyargcount])
    names = {*positional, *keyword, *(name for name in (info.varargs, info.keywords) if name)}
    if code is not _LINK_CALL and _assigned(frame, names):
        return None
    values = info.locals
    args = [values[name] for name in positional] + list(values[info.varargs] if info.varargs else ())
    kwargs = {name: values[name] for name in keyword} | (values[info.keywords] if info.keywords else {})
    return ForwardCall(values[code.co_varnames[0]], code.co_name, tuple(args), kwargs)


def _assigned(frame: FrameType, names: set[str]) -> bool:
    """Return whether a frame may have assigned to one of the names on its way to where it is."""
    for instruction in dis.get_instructions(frame.f_code):
        if instruction.offset >= frame.f_lasti:
            return False
        if instruction.opname.startswith(("STORE_FAST", "STORE_DEREF", "DELETE_FAST")):
            value = instruction.argval
            if names & set(value if isinstance(value, tuple) else (value,)):
                return True
    return False


def model_call(model: Any, inputs: Any, labels: np.ndarray[Any, Any]) -> ForwardCall:
    """Return the call for inputs that the user gave; a model that asks for labels too is given them."""
    device = model.device
    args = tuple(inputs) if isinstance(inputs, tuple) else (inputs,)
    if isinstance(model, chainer.links.Classifier):
        model = model.predictor
    forward = getattr(model, "forward", model.__call__)
    try:
        inspect.signature(forward).bind(*args)
    except TypeError:
        args = (*args, labels)
    return ForwardCall(model, "__call__", tuple(Kept(np.asarray(a), device, variable=False) for a in args))
