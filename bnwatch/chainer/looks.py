"""A look through a network that exists only while it runs: every function's output, in the order of execution."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import chainer
import numpy as np
from chainer import functions as F  # noqa: N812 - the name that all Chainer code uses
from chainer.functions.activation.sigmoid import Sigmoid

from bnwatch.chainer.arrays import array_of, to_float, to_host
from bnwatch.chainer.changes import sample_of
from bnwatch.chainer.forward import ForwardCall, Kept
from bnwatch.chainer.tap import SCORED, function_type
from bnwatch.evidence import LayerLook, Seen, spread_over
from bnwatch.evidence.looks import SAMPLE

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from bnwatch.evidence import Examples, Parameter, Updates

_MOST_VALUES = 4_000_000
_ARRANGING = frozenset({"Reshape", "Transpose", "Cast", "ExpandDims", "Squeeze", "Swapaxes", "Copy", "Identity"})
"""Functions that only arrange what another one computed."""


@dataclass(frozen=True, slots=True)
class _Seen:
    """One output: of the ``call``-th call of a link, or of a function that followed it."""

    link: Any
    path: str
    call: int
    function: str
    look: LayerLook


class _Observer:
    """What the two hooks share: which links are on their way, and every output so far."""

    def __init__(self, paths: Mapping[int, str], examples: int) -> None:
        self.seen: list[_Seen] = []
        self.last: type | None = None
        self._paths, self._examples = paths, examples
        self._open: list[Any] = []
        self._calls: Counter[str] = Counter()
        self._behind = ("", 0)

    def enter(self, link: Any) -> None:
        self._open.append(link)

    def leave(self, link: Any, output: Any) -> None:
        self._open.pop()
        path = self._paths.get(id(link), "")
        if path and _is_leaf(link) and not any(map(_is_leaf, self._open)):
            self._behind = path, self._calls[path]
            self._calls[path] += 1
            self._look(link, "", type(link).__name__, array_of(output))

    def function(self, kind: type, output: Any) -> None:
        if kind in SCORED:
            return
        self.last = kind
        if kind.__name__ not in _ARRANGING and not any(map(_is_leaf, self._open)):
            self._look(None, kind.__name__, kind.__name__, output)

    def _look(self, link: Any, function: str, kind: str, output: Any) -> None:
        if not isinstance(output, chainer.get_array_types()) or output is None:
            return
        if output.ndim < 2 or len(output) != self._examples or output.dtype.kind != "f":  # noqa: PLR2004
            return
        rows = max(2, min(len(output), _MOST_VALUES * len(output) // max(1, output.size)))
        look = LayerLook.of("", kind, to_host([output[:rows]])[0])
        self.seen.append(_Seen(link, *self._behind, function, look))

    def looks(self, gradients: Mapping[int, float], updates: Mapping[str, float]) -> tuple[LayerLook, ...]:
        """Return the looks, each under a name of its own that is the same at the next look."""
        named: Counter[str] = Counter()
        looks = []
        for seen in self.seen:
            site = f"{seen.path}#{seen.call}" if self._calls[seen.path] > 1 else seen.path
            name = " -> ".join(part for part in (site, seen.function) if part)
            named[name] += 1
            path = name if named[name] == 1 else f"{name} ({named[name]})"
            update = None if seen.link is None else updates.get(seen.path)
            looks.append(replace(seen.look, path=path, gradient=gradients.get(id(seen.link)), update=update))
        return tuple(looks)

    @property
    def links(self) -> dict[str, Any]:
        """Return the links that were called, each once, by their path."""
        return {seen.path: seen.link for seen in self.seen if seen.link is not None}


class _LinkHook(chainer.LinkHook):
    name = "bnwatch-look"

    def __init__(self, observer: _Observer) -> None:
        self._observer = observer

    def forward_preprocess(self, args: Any) -> None:
        self._observer.enter(args.link)

    def forward_postprocess(self, args: Any) -> None:
        self._observer.leave(args.link, args.out)


class _FunctionHook(chainer.FunctionHook):
    name = "bnwatch-look"

    def __init__(self, observer: _Observer) -> None:
        self._observer = observer

    def forward_preprocess(self, node: Any, _inputs: Any) -> None:
        """Put an observer around the function: a hook is not shown its outputs."""
        forward = node.forward

        def observed(inputs: Any) -> Any:
            del node.forward
            outputs = forward(inputs)
            self._observer.function(function_type(node), outputs[0])
            return outputs

        node.forward = observed


def look_through(
    paths: Mapping[int, str], batch: Examples, updates: Updates, *, gradients: bool, step: int | None = None
) -> Seen:
    """Run one batch and look at every output that has a row for each example.

    Args:
        paths: of the links, by their identity.
        batch: the batch.
        updates: remembers the parameters of the look before.
        gradients: whether to differentiate the loss.
        step: training steps finished; None leaves ``updates`` alone.
    """
    observer = _Observer(paths, len(batch.labels))
    with chainer.using_config("enable_backprop", gradients):
        with _LinkHook(observer), _FunctionHook(observer):
            returned = batch.inputs()
        probabilities = observer.last is Sigmoid
        loss = _loss(returned, batch, probabilities=probabilities)
        measured = _gradients(observer, loss) if gradients and loss is not None else {}
    moved = {} if step is None else updates.since(step, _parameters(observer))
    return Seen(
        layers=observer.looks(measured, moved),
        entry=_entry(batch),
        loss=None if loss is None or probabilities else to_float(loss),
        learning_rate=_learning_rate(observer.links.values()),
    )


def _entry(batch: Examples) -> float | None:
    """Return the relative spread over examples of the first array that the model is called with."""
    call = batch.inputs
    given = [*call.args, *call.kwargs.values()] if isinstance(call, ForwardCall) else []
    for value in given:
        if isinstance(value, Kept) and value.array.ndim and len(value.array) == len(batch.labels):
            rows = max(2, min(len(value.array), _MOST_VALUES * len(value.array) // max(1, value.array.size)))
            return spread_over(value.array[:rows])
    return None


def _learning_rate(links: Iterable[Any]) -> float | None:
    """Return the rate of the first parameter that is trained: ``lr``, or ``alpha`` of the optimizers like Adam."""
    for link in links:
        for parameter in link.params(include_uninit=False):
            rule = parameter.update_rule
            if rule is not None and rule.enabled:
                values = rule.hyperparam.get_dict()
                rate = values.get("lr", values.get("alpha"))
                return None if rate is None else float(rate)
    return None


def _parameters(observer: _Observer) -> dict[str, list[Parameter]]:
    """Return a few entries of each link's own parameters, by its path."""
    own = [
        (path, parameter.array)
        for path, link in observer.links.items()
        for parameter in link.params(include_uninit=False)
        if parameter.array.size
    ]
    found: dict[str, list[Parameter]] = {}
    for (path, array), values in zip(own, to_host([sample_of(array, SAMPLE) for _, array in own]), strict=True):
        found.setdefault(path, []).append((values, int(array.size)))
    return found


def _gradients(observer: _Observer, loss: Any) -> dict[int, float]:
    """Return the largest absolute gradient of each link's own parameters, by the identity of the link."""
    links = observer.links.values()
    own = [(id(link), parameter) for link in links for parameter in link.params(include_uninit=False)]
    if not own:
        return {}
    found = chainer.grad([loss], [parameter for _, parameter in own])
    given = [(link, g) for (link, _), g in zip(own, found, strict=True) if g is not None and g.array.size]
    largest: dict[int, float] = {}
    for (link, _), value in zip(given, to_host([_largest(gradient) for _, gradient in given]), strict=True):
        largest[link] = float(np.maximum(largest.get(link, 0.0), value))
    return largest


def _largest(gradient: chainer.Variable) -> Any:
    with chainer.using_device(gradient.device):
        return abs(gradient.array).max()


def _loss(returned: Any, batch: Examples, *, probabilities: bool) -> Any:
    """Return the loss to differentiate: the model's own where it returns one, else the cross-entropy of its scores."""
    if not isinstance(returned, chainer.Variable) or returned.dtype.kind != "f":
        return None
    if returned.ndim == 0 or len(returned) != len(batch.labels):
        return returned if returned.size == 1 else None
    labels = returned.xp.asarray(batch.labels.astype(np.int32))
    loss: Callable[[Any, Any], Any]
    if returned.size > len(batch.labels):
        loss = F.softmax_cross_entropy
    else:
        loss, returned = F.sigmoid_cross_entropy, returned.reshape(-1)
    return F.sum(returned) if probabilities else loss(returned, labels)


def _is_leaf(link: Any) -> bool:
    return next(link.children(), None) is None
