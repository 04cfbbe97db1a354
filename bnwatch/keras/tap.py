"""The hooks on a model: what normalizes with batch statistics, where, in training and in evaluation."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal

import tensorflow as tf

from bnwatch.keras.layers import find_layers
from bnwatch.keras.slots import Reader, Slot, call_records, elements_per_channel

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from contextlib import AbstractContextManager

    import numpy as np

    from bnwatch.keras.layers import Watched
    from bnwatch.records import CallRecord

Scope = Literal["training", "evaluation"]
Statistics = dict[str, tuple["np.ndarray[Any, Any]", "np.ndarray[Any, Any]", int]]


class Tap:
    """Records the batch statistics of every call site while steps run.

    A call site is the k-th recorded call of a layer within one step. In ``fit`` a step is one run of ``train_step``; in
    a hand-written loop (``lanes=True``) every function that TensorFlow traces gets sites of its own, and calls outside
    of any function are counted since the last step.
    """

    def __init__(
        self, model: Any, guard: Callable[[str], AbstractContextManager[None]], *, lanes: bool = False
    ) -> None:
        """Look for layers; nothing is touched before ``attach``.

        Args:
            model: the Keras model.
            guard: context that swallows an internal failure, for code that runs inside the user's step.
            lanes: sites are kept apart by the function they are traced in.
        """
        self.model = model
        self.layers, self.unsupported = find_layers(model)
        self.evaluated: dict[str, None] = {}
        self.release: Callable[[], object] = self.detach
        self._guard = guard
        self._lanes = lanes
        self._slots: dict[tuple[int, int, int], Slot] = {}
        self._reader: Reader | None = None
        self._before: dict[int, int] = {}
        self._scope: Scope | None = "training" if lanes else None
        self._calls: dict[tuple[int, int], int] = {}
        self._graphs: list[Any] = []

    # hooks

    def attach(self, known: Statistics | None = None) -> None:
        """Hook the layers and the steps of the model.

        Args:
            known: running statistics and updates at the end of an earlier watch, to go on counting where nothing moved.
        """
        for watched in self.layers:
            watched.updates = _updates_so_far(watched, known or {})
            watched.layer.__dict__["_moments"] = self._hooked(watched)
        if not self._lanes:
            self._wrap("train_step", "training")
            self._wrap("test_step", "evaluation")

    def detach(self) -> Statistics:
        """Take every hook off again; return the running statistics and the updates counted so far."""
        for name in ("train_step", "test_step"):
            if getattr(self.model.__dict__.get(name), "bnwatch_tap", None) is self:
                del self.model.__dict__[name]
        for watched in self.layers:
            if getattr(watched.layer.__dict__.get("_moments"), "bnwatch_tap", None) is self:
                del watched.layer.__dict__["_moments"]
        return self._statistics()

    def _wrap(self, name: str, scope: Scope) -> None:
        step = getattr(self.model, name)

        def wrapped(*args: Any, **kwargs: Any) -> Any:
            with self._inside(scope):
                return step(*args, **kwargs)

        wrapped.bnwatch_tap = self  # type: ignore[attr-defined]
        self.model.__dict__[name] = wrapped

    def _hooked(self, watched: Watched) -> Callable[..., Any]:
        moments = watched.layer._moments  # noqa: SLF001 - the one place where every batch statistic passes

        def hooked(inputs: Any, mask: Any, *args: Any, **kwargs: Any) -> Any:
            mean, var = moments(inputs, mask, *args, **kwargs)
            with self._guard("recording batch statistics"):
                self._record(watched, mean, var, inputs, mask)
            return mean, var

        hooked.bnwatch_tap = self  # type: ignore[attr-defined]
        return hooked

    @contextmanager
    def _inside(self, scope: Scope) -> Iterator[None]:
        outer, calls = self._scope, self._calls
        self._scope, self._calls = scope, {}
        try:
            yield
        finally:
            self._scope, self._calls = outer, calls

    # recording: while a step is traced, or eagerly

    def _record(self, watched: Watched, mean: Any, var: Any, inputs: Any, mask: Any) -> None:
        if self._scope == "evaluation":
            self.evaluated[watched.path] = None
        if self._scope != "training":
            return
        lane = self._lane()
        k = self._calls.get((lane, id(watched)), 0)
        self._calls[lane, id(watched)] = k + 1
        channels = int(watched.layer.moving_mean.shape[0])
        slot = self._slots.get((lane, id(watched), k))
        if slot is None:
            slot = self._slots[lane, id(watched), k] = Slot(watched, channels)
            self._reader = None
        slot.assign(mean, var, elements_per_channel(inputs, mask, channels))

    def _lane(self) -> int:
        """Return which traced function this is: 0 outside of any."""
        if not self._lanes or tf.executing_eagerly():
            return 0
        graph = tf.compat.v1.get_default_graph()
        while isinstance(getattr(graph, "outer_graph", None), type(graph)):
            graph = graph.outer_graph
        if not any(graph is known for known in self._graphs):
            self._graphs.append(graph)
        return 1 + next(n for n, known in enumerate(self._graphs) if known is graph)

    # reading: on the host, at sampled steps only

    @property
    def built(self) -> bool:
        """Return whether every layer knows its channels."""
        return all(watched.built for watched in self.layers)

    @property
    def recorded(self) -> bool:
        """Return whether any call of any layer was recorded."""
        return bool(self._slots)

    def next_step(self) -> None:
        """Begin a new step of a hand-written loop."""
        self._calls = {key: calls for key, calls in self._calls.items() if key[0] != 0}

    def mark(self) -> None:
        """Take what was called so far as old: ``records`` returns what was called since."""
        if self._slots:
            self._before = self._read().calls()

    def records(self) -> tuple[CallRecord, ...]:
        """Return the calls since the last ``records`` or ``mark``, in the order of the forward pass."""
        if not self._slots:
            return ()
        reading = self._read()
        records = call_records(reading, self._before)
        self._before = reading.calls()
        return records

    def _read(self) -> Any:
        if self._reader is None:
            self._reader = Reader(list(self._slots.values()))
        return self._reader.read()

    def _statistics(self) -> Statistics:
        counted: dict[int, int] = {}
        for slot in self._slots.values():
            counted[id(slot.watched)] = counted.get(id(slot.watched), 0) + int(slot.calls.numpy())
        return {
            watched.path: (*watched.statistics(), watched.updates + counted.get(id(watched), 0))
            for watched in self.layers
            if watched.built and watched.updates is not None
        }


def heal(model: Any) -> None:
    """Detach the tap that a training which raised has left on the model."""
    hooks = [model.__dict__.get("train_step"), *(w.layer.__dict__.get("_moments") for w in find_layers(model)[0])]
    for tap in {id(tap): tap for hook in hooks if (tap := getattr(hook, "bnwatch_tap", None)) is not None}.values():
        tap.release()


def _updates_so_far(watched: Watched, known: Statistics) -> int | None:
    if watched.pristine():
        return 0
    mean, var, updates = known.get(watched.path, (None, None, 0))
    if mean is None or var is None:
        return None
    now = watched.statistics()
    return updates if (now[0] == mean).all() and (now[1] == var).all() else None
