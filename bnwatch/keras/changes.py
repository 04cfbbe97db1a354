"""What an evaluation uses against what the last training step left: parameters and running statistics, to the bit."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Collection

    from bnwatch.keras.layers import Watched
    from bnwatch.keras.tap import Tap

SAMPLE = 256
"""Entries of a parameter that are compared: parameters that are averaged or loaded differ nearly everywhere."""


class Changes:
    """Notes the state of a model where training steps end, and around evaluations; a step itself costs nothing.

    Attributes:
        moved: layers whose running statistics the last evaluation moved.
        swapped: whether the last evaluation used other parameters than training left; None when unknown.
    """

    def __init__(self, tap: Tap, before: Changes | None = None) -> None:
        """Begin; nothing is read.

        Args:
            tap: on the model.
            before: what an earlier watch of the same training has noted.
        """
        self._tap, self._backend = tap, tap.backend
        self.moved: tuple[str, ...] = ()
        self.swapped: bool | None = None
        self._first: dict[str, tuple[Any, bytes]] = {}
        self._first_trained: list[tuple[Any, bytes]] = []
        self._left: tuple[int | None, list[tuple[Any, bytes]]] | None = None
        if before is not None:
            self._left = before._left  # noqa: SLF001 - of the same class
        self._running: dict[str, bytes] = {}

    def begin(self) -> None:
        """Note the parameters of the model, which is built, as the watch finds them."""
        self._first, self._first_trained = self._scales(), self._trained()

    def made(self) -> None:
        """Note the parameters that were made since, as they are now: a head may be built by the first step."""
        known = {id(variable) for variable, _ in self._first_trained}
        if any(id(variable) not in known for variable in self._backend.model.trainable_variables):
            self._first_trained += [pair for pair in self._trained() if id(pair[0]) not in known]

    def step(self) -> None:
        """Begin a training step."""
        self._left = None

    def stepped(self) -> None:
        """Note what the last training step left, unless that is noted already."""
        if self._left is None:
            self._left = self._iterations(), self._trained()
            self._running = self._statistics()

    def evaluating(self) -> None:
        """Note what an evaluation uses, when it has begun."""
        self.moved, self.swapped = (), self.now_swapped()
        self._running = self._running or self._statistics()

    def evaluated(self) -> None:
        """Note what an evaluation moved, when it has ended."""
        after = self._statistics()
        self.moved, self._running = self._moved_to(after), after

    def now_swapped(self) -> bool | None:
        """Return whether the parameters are others than the last training step left; None when unknown."""
        if self._left is None:
            return None
        if self._trained_since():
            return None
        return _differ(self._left[1], self._trained())

    def now_moved(self) -> tuple[str, ...]:
        """Return the layers whose running statistics are not what the last training step or evaluation left."""
        if self._left is None or not self._running:
            return ()
        return () if self._trained_since() else self._moved_to(self._statistics())

    def _moved_to(self, after: dict[str, bytes]) -> tuple[str, ...]:
        return tuple(path for path, found in after.items() if self._running.get(path, found) != found)

    def still(self, normalized: Collection[str]) -> tuple[str, ...]:
        """Return the layers whose scale and offset are what they were, though other parameters are not.

        Args:
            normalized: paths of layers that normalized with batch statistics in training.
        """
        now = self._scales()
        found = {
            path: layer
            for path, (layer, values) in self._first.items()
            if path in normalized and values == now.get(path, (layer, b""))[1]
        }
        own = {id(v) for layer in found.values() for v in _scale(layer)}
        others = [pair for pair in self._first_trained if id(pair[0]) not in own]
        return tuple(found) if found and _differ(others, self._trained()) else ()

    def _trained_since(self) -> bool:
        """Return whether somebody else has trained the model further."""
        iterations = None if self._left is None else self._left[0]
        return iterations is not None and (self._iterations() or 0) > iterations

    def _iterations(self) -> int | None:
        optimizer: Any = getattr(self._backend.model, "optimizer", None)
        # the variable: what is made public may be computed from it, where gradients are accumulated
        iterations = getattr(getattr(optimizer, "inner_optimizer", optimizer), "_iterations", None)
        return None if iterations is None else int(self._backend.values([iterations])[0])

    def _trained(self) -> list[tuple[Any, bytes]]:
        variables = list(self._backend.model.trainable_variables)
        samples = self._backend.samples(variables, SAMPLE)
        return [(variable, sample.tobytes()) for variable, sample in zip(variables, samples, strict=True)]

    def _built(self) -> list[Watched]:
        return [watched for watched in self._tap.layers if watched.built]

    def _statistics(self) -> dict[str, bytes]:
        built = self._built()
        found = self._backend.values([v for w in built for v in (w.layer.moving_mean, w.layer.moving_variance)])
        pairs = zip(built, found[::2], found[1::2], strict=True)
        return {watched.path: mean.tobytes() + var.tobytes() for watched, mean, var in pairs}

    def _scales(self) -> dict[str, tuple[Any, bytes]]:
        """Return layer, scale and offset by path, of layers that have one."""
        built = [watched for watched in self._built() if _scale(watched.layer)]
        return {
            watched.path: (watched.layer, b"".join(v.tobytes() for v in self._backend.values(_scale(watched.layer))))
            for watched in built
        }


def _scale(layer: Any) -> list[Any]:
    return [v for v in (getattr(layer, "gamma", None), getattr(layer, "beta", None)) if v is not None]


def _differ(before: list[tuple[Any, bytes]], after: list[tuple[Any, bytes]]) -> bool | None:
    """Return whether a variable that is in both has other values; None where there is none."""
    known = {id(variable): sample for variable, sample in before}
    pairs = [(known[id(variable)], sample) for variable, sample in after if id(variable) in known]
    return any(old != new for old, new in pairs) if pairs else None
