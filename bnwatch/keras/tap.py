"""The hooks on a model: what normalizes with batch statistics, where, in training and in evaluation."""

from __future__ import annotations

import inspect
import sys
import threading
from contextlib import contextmanager, suppress
from functools import wraps
from types import MethodType
from typing import TYPE_CHECKING, Any, Literal

from bnwatch.keras.layers import find_layers, locate
from bnwatch.lines import NOWHERE, Callers, code_of, merged, told_apart
from bnwatch.records import BatchStatistics, CallRecord, CallSite, RunningStatistics

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Iterator, Sequence
    from types import CodeType

    import numpy as np

    from bnwatch.keras.backends.base import Backend, Calls, Guard, Reading, Stored
    from bnwatch.keras.layers import OwnWay, Watched
    from bnwatch.lines import Trail
    from bnwatch.records import Source

Scope = Literal["training", "evaluation"]
Statistics = dict[str, tuple["np.ndarray[Any, Any]", "np.ndarray[Any, Any]", int]]


_GENERATED = "__autograph_generated_file"
"""How the names of the files begin that AutoGraph writes in place of the user's."""
_BESIDE = "beside"
"""Lane of calls outside of any function and of any gradient."""


class Tap:
    """Records the batch statistics of every call site while steps run.

    A call site is the k-th recorded call of a layer within one step. In ``fit`` a step is one run of ``train_step``; in
    a hand-written loop (``lanes=True``) every function that is traced gets sites of its own, and calls outside of any
    function are counted since the last step.
    """

    def __init__(self, backend: Backend, guard: Guard, *, lanes: bool = False) -> None:
        """Look for layers; nothing is touched before ``attach``.

        Args:
            backend: of the model.
            guard: context that swallows an internal failure, for code that runs inside the user's step.
            lanes: sites are kept apart by the function they are traced in.
        """
        self.backend, self.model = backend, backend.model
        self.layers, self.unsupported = find_layers(backend)
        self.evaluated: dict[str, None] = {}
        self.release: Callable[[], object] = self.detach
        self.storage = backend.storage(guard)
        self._guard = guard
        self._lanes = lanes
        self._before: Callable[[], Calls] = dict
        # replicas of a model run in threads of their own
        self._here = threading.local()
        self._eager: dict[tuple[Hashable, int], int] = {}
        # layers that were called, in whatever mode: in the last step, or by the function that a step is
        self._called: dict[Hashable, set[int]] = {}
        self._recorded: set[int] = set()
        # layers whose statistics go where nobody looks: those of a pure loop that keeps its state to itself
        self._unread: set[int] = set()
        self._ever: set[int] = set()
        # calls of a hand-written loop of which no gradient is taken, since the last step; those with batch statistics
        self._beside: dict[str, int] = {}
        self._beside_batch: dict[str, int] = {}
        self._evaluates: set[str] = set()
        self.attached = False
        # whether the lines that call sites are called from are other ones than `records` found before
        self.relocated = False
        self._steps: set[CodeType] = set()
        calls = [getattr(backend.library.layers.Layer, name, None) for name in ("__call__", "stateless_call")]
        self._callers = Callers({code_of(call) for call in calls}, self._steps, _GENERATED)
        self._trails: dict[Hashable, Trail] = {}
        self._located: set[Hashable] = set()
        # what the user has hung on the model or a layer, where a hook hangs now
        self._theirs: dict[tuple[int, str], Any] = {}

    # hooks

    def attach(self, known: Statistics | None = None, before_evaluation: Callable[[], None] | None = None) -> None:
        """Hook the layers and the steps of the model.

        Args:
            known: running statistics and updates at the end of an earlier watch, to go on counting where nothing moved.
            before_evaluation: called before anything else where the model is evaluated, whatever callbacks there are.
        """
        self.attached = True
        self._hook(self.layers, known or {})
        if not self._lanes:
            self._wrap("train_step", "training")
            self._wrap("test_step", "evaluation")
        if before_evaluation is not None:
            self._announce(before_evaluation)

    def found_more(self) -> bool:
        """Look for layers that were made since, and hook them; return whether there are some."""
        layers, self.unsupported = find_layers(self.backend)
        known = {id(watched.layer): watched for watched in self.layers}
        new = [watched for watched in layers if id(watched.layer) not in known]
        self.layers = [known.get(id(watched.layer), watched) for watched in layers]
        self._hook(new, {})
        return bool(new)

    def detach(self) -> Statistics:
        """Take every hook off again; return the running statistics and the updates counted so far."""
        try:
            return self._statistics()
        finally:
            self.unhook()

    def unhook(self) -> None:
        """Take every hook off again; nothing is read, so this works whatever the variables hold."""
        self.attached = False
        for name in ("train_step", "test_step", "evaluate"):
            self._unhook(self.model, name)
        for watched in self.layers:
            for name in list(watched.layer.__dict__):
                self._unhook(watched.layer, name)
        self.storage.release()

    def _hook(self, layers: list[Watched], known: Statistics) -> None:
        locate(self.model, layers)
        for watched in layers:
            watched.updates = self._updates_so_far(watched, known)
            record = self._recording(watched)
            hooks, call = self.backend.hooks(watched, record), self._calling(watched)
            if (way := self.backend.own_way(watched.layer)) is not None:
                hooks = {name: _showing(watched, hook) for name, hook in hooks.items()}
                call = self._calling(watched, self._probe(watched, way, record))
            for name, hook in {**hooks, "call": call}.items():
                self._hang(watched.layer, name, hook)

    def _hang(self, owner: Any, name: str, hook: Any) -> None:
        if name in owner.__dict__:
            self._theirs[id(owner), name] = owner.__dict__[name]
        getattr(hook, "__func__", hook).bnwatch_tap = self
        owner.__dict__[name] = hook

    def _unhook(self, owner: Any, name: str) -> None:
        if getattr(owner.__dict__.get(name), "bnwatch_tap", None) is not self:
            return
        del owner.__dict__[name]
        if (id(owner), name) in self._theirs:
            owner.__dict__[name] = self._theirs.pop((id(owner), name))

    def _wrap(self, name: str, scope: Scope) -> None:
        step = getattr(self.model, name)

        def wrapped(*args: Any, **kwargs: Any) -> Any:
            with self._inside(scope):
                return step(*args, **kwargs)

        self._steps.add(wrapped.__code__)
        self._hang(self.model, name, wrapped)

    def _announce(self, before_evaluation: Callable[[], None]) -> None:
        own = self.model.evaluate

        @wraps(own)
        def evaluate(*args: Any, **kwargs: Any) -> Any:
            with self._guard("beginning an evaluation"):
                before_evaluation()
            return own(*args, **kwargs)

        self._hang(self.model, "evaluate", evaluate)

    @contextmanager
    def _inside(self, scope: Scope) -> Iterator[None]:
        here = self._here.__dict__
        before = dict(here)
        here.update(scope=scope, calls={}, called=set())
        try:
            yield
        finally:
            if scope == "training":
                # of the step that ran or was traced last
                self._called, self._recorded = {None: here["called"]}, {layer for _, layer in here["calls"]}
            here.clear()
            here.update(before)

    # recording: while a step is traced, or eagerly

    def _probe(
        self, watched: Watched, way: OwnWay, record: Callable[[Any, Any, Callable[[], Any]], None]
    ) -> Callable[[Any], None]:
        """Return what takes the batch statistics of a call that has shown none: those of what enters the layer."""
        signature = inspect.signature(watched.layer.call)

        def probe(given: tuple[tuple[Any, ...], dict[str, Any]]) -> None:
            with self._guard("taking the statistics of what enters a layer"):
                arguments = signature.bind(*given[0], **given[1]).arguments
                # whether one that is frozen takes batch statistics all the same, nobody knows
                if watched.shown or not (
                    way == "batch" or (watched.layer.trainable and arguments.get("training") is True)
                ):
                    return
                watched.probed = True
                inputs = next(iter(arguments.values()))
                mean, var, count = self.backend.batch_moments(watched.layer, inputs, arguments.get("mask"))
                record(mean, var, lambda: count)

        return self.backend.unseen_by_compilers(probe)

    def _calling(self, watched: Watched, after: Callable[[Any], None] | None = None) -> Callable[..., Any]:
        """Return the layer's own call, which is noted: one that leaves no statistics was in inference mode."""
        own = watched.layer.call

        def note(inputs: Any) -> None:
            with self._guard("noting a call"):
                if not self._lanes:
                    if getattr(self._here, "scope", None) == "training":
                        self._here.called.add(id(watched))
                elif self.backend.differentiates(inputs):
                    self._here.beside = False
                    self._called.setdefault(self.backend.calls_last(), set()).add(id(watched))
                else:
                    self._here.beside = True
                    self._beside[watched.path] = self._beside.get(watched.path, 0) + 1

        noted = self.backend.unseen_by_compilers(note)

        @wraps(getattr(own, "__func__", own))
        def call(_: Any, *args: Any, **kwargs: Any) -> Any:
            noted((args, kwargs))
            if after is None:
                return own(*args, **kwargs)
            watched.shown = False
            result = own(*args, **kwargs)
            after((args, kwargs))
            return result

        call.bnwatch_own = own  # type: ignore[attr-defined]
        # a method, as its own was: Keras 2 looks at the signature when it saves
        return MethodType(call, watched.layer)

    def _recording(self, watched: Watched) -> Callable[[Any, Any, Callable[[], Any]], None]:
        def record(mean: Any, var: Any, count: Callable[[], Any]) -> None:
            with self._guard("recording batch statistics"):
                self._record(watched, mean, var, count)

        return record

    def _record(self, watched: Watched, mean: Any, var: Any, count: Callable[[], Any]) -> None:
        scope = getattr(self._here, "scope", "training" if self._lanes else None)
        if scope == "evaluation":
            self.evaluated[watched.path] = None
        if scope != "training" or self.backend.symbolic:
            return
        lane = self.backend.lane() if self._lanes else None
        if getattr(self._here, "beside", False):
            self._beside_batch[watched.path] = self._beside_batch.get(watched.path, 0) + 1
            if lane is None:
                # an evaluation may make any number of such calls: one place for all
                self.storage.put((_BESIDE, id(watched), 0), watched, mean, var, count)
                return
        calls = self._eager if self._lanes else self._here.calls
        k = calls.get((lane, id(watched)), 0)
        calls[lane, id(watched)] = k + 1
        key = lane, id(watched), k
        if key not in self._trails:
            self._trails[key] = self._callers.trail(sys._getframe(1), type(watched.layer))  # noqa: SLF001
        self.storage.put(key, watched, mean, var, count)

    # reading: on the host, at sampled steps only

    @property
    def built(self) -> bool:
        """Return whether every layer knows its channels."""
        return all(watched.built for watched in self.layers)

    def next_step(self) -> None:
        """Begin a new step of a hand-written loop."""
        self._eager = {key: calls for key, calls in self._eager.items() if key[0] is not None}
        self._called.pop(None, None)
        self._note_evaluation()
        self._beside, self._beside_batch = {}, {}

    def evaluation_ends(self) -> None:
        """Take what was called since the last step of a hand-written loop as an evaluation.

        It normalized with batch statistics where it called a layer in training mode and nobody ever calls that layer in
        inference mode beside the steps: what re-estimates statistics is followed by such calls.
        """
        self._note_evaluation()
        self.evaluated.update(dict.fromkeys(self._beside_batch))
        self.evaluated = {path: None for path in self.evaluated if path not in self._evaluates}
        self.next_step()

    def _note_evaluation(self) -> None:
        self._evaluates |= {path for path, calls in self._beside.items() if calls > self._beside_batch.get(path, 0)}

    def idle(self, calls: Sequence[CallRecord]) -> tuple[str, ...]:
        """Return the layers that a step called and that did not normalize with batch statistics, in network order.

        Args:
            calls: what ``records`` returned for the step. In ``fit`` the trace of the step says it all, and in a
                hand-written loop what is called in a function that takes gradients counts as called in every step.
        """
        called = set[int]().union(*self._called.values())
        recorded = {call.site.layer for call in calls}
        return tuple(
            watched.path
            for watched in self.layers
            if id(watched) in called - self._recorded - self._unread
            and watched.path not in recorded
            # one of the user's own may normalize and update in its own way, unseen
            and (id(watched) in self._ever or watched.updates != 0 or watched.pristine())
        )

    def mark(self) -> None:
        """Take what was called so far as old: ``records`` returns what was called since."""
        if self.storage.recorded:
            self._before = self.storage.counted()

    def records(self) -> tuple[CallRecord, ...]:
        """Return the calls since the last ``records`` or ``mark``, in the order of the forward pass."""
        if not self.storage.recorded:
            return ()
        reading = self.storage.read()
        records = tuple(self._records(reading, self._before()))
        self._before = reading.calls
        return records

    def _records(self, reading: Reading, before: Calls) -> Iterator[CallRecord]:
        total = _total(reading)
        self._unread = {layer for layer, updates in total.items() if not updates}
        self._ever |= total.keys() - self._unread
        self._locate([s for s in reading.stored if not s.replica and s.calls != before.get((s.key, s.replica), 0)])
        specs = {id(watched): watched.spec() for watched in {s.watched for s in reading.stored}}
        index = dict[tuple[int, int], int]()
        for stored in reading.stored:
            watched, spec = stored.watched, specs[id(stored.watched)]
            if stored.calls == before.get((stored.key, stored.replica), 0):
                continue
            k = index.setdefault((id(watched), stored.replica), 0)
            index[id(watched), stored.replica] += 1
            mean, var = map(watched.as_stored, stored.running or reading.running[id(watched)])
            updates = None if watched.updates is None else watched.updates + total[id(watched)]
            yield CallRecord(
                spec=spec,
                site=CallSite(watched.path, k, stored.replica),
                batch=BatchStatistics(stored.mean, stored.var, stored.count, self._source(watched)),
                running=RunningStatistics(mean, var, spec.decay, updates, spec.bessel_corrected),
            )

    def _locate(self, stored: Sequence[Stored]) -> None:
        """Say of the layers that were called in a step from which lines, where it called some for the first time."""
        keys = {one.key for one in stored}
        if keys <= self._located:
            return
        self._located |= keys
        trails: dict[Watched, list[Trail]] = {}
        for one in stored:
            trails.setdefault(one.watched, []).append(self._trails.get(one.key, NOWHERE))
        for watched, found in trails.items():
            lines = merged(watched.called_at, told_apart(found))
            self.relocated |= lines != watched.called_at
            watched.called_at = lines

    def _source(self, watched: Watched) -> Source:
        return "probed" if watched.probed else self.backend.source(watched.layer)

    def _statistics(self) -> Statistics:
        counted = _total(self.storage.read()) if self.storage.recorded else {}
        return {
            watched.path: (*watched.statistics(), watched.updates + counted.get(id(watched), 0))
            for watched in self.layers
            if watched.built and watched.updates is not None
        }

    def _updates_so_far(self, watched: Watched, known: Statistics) -> int | None:
        if watched.pristine():
            return 0
        mean, var, updates = known.get(watched.path, (None, None, 0))
        if mean is None or var is None:
            return None
        now = watched.statistics()
        return updates if (now[0] == mean).all() and (now[1] == var).all() else None


def _showing(watched: Watched, hook: Callable[..., Any]) -> Callable[..., Any]:
    """Return a hook that notes that the layer shows its batch statistics."""

    def showing(*args: Any, **kwargs: Any) -> Any:
        watched.shown = True
        return hook(*args, **kwargs)

    return showing


def _total(reading: Reading) -> dict[int, int]:
    """Return how often the running statistics of each layer were updated: every replica does so at once."""
    total: dict[int, int] = {}
    for stored in reading.stored:
        if not stored.replica:
            total[id(stored.watched)] = total.get(id(stored.watched), 0) + stored.calls
    return total


def heal(backend: Backend) -> None:
    """Detach the tap that a training which raised has left on the model."""
    owners = [backend.model, *(watched.layer for watched in find_layers(backend)[0])]
    hooks = [value for owner in owners for value in owner.__dict__.values() if callable(value)]
    for tap in {id(tap): tap for hook in hooks if (tap := getattr(hook, "bnwatch_tap", None)) is not None}.values():
        # the hooks go in any case; what the variables of a step that failed were, may not be known any more
        with suppress(Exception):
            tap.release()
