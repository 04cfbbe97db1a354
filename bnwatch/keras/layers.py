"""Find the batch-normalization layers of a Keras model, name them, and describe them."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from bnwatch.keras.library import library_of
from bnwatch.records import LayerSpec
from bnwatch.sources import Sources

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from bnwatch.keras.backends.base import Backend
    from bnwatch.lines import Lines


OwnWay = Literal["updating", "batch"]


@dataclass(eq=False, slots=True)
class Watched:
    """A batch-normalization layer under watch.

    Attributes:
        layer: the Keras layer, built or not yet.
        path: its unique name inside the model.
        backend: of the model.
        updates: updates of the running statistics before the tap counted; None when that is not known.
        built_at: the line that built the layer, as `bnwatch.sources` finds it.
        called_at: the line that each call site is called from.
        shown: whether the call that ran last has shown its batch statistics.
        probed: whether it is for bnwatch to take the batch statistics, of what enters a layer that shows none.
    """

    layer: Any
    path: str
    backend: Backend
    updates: int | None = None
    built_at: str | None = None
    called_at: Lines = ()
    shown: bool = False
    probed: bool = False

    @property
    def built(self) -> bool:
        """Return whether the layer knows its channels."""
        # Keras 2 makes the attribute together with the variable
        return getattr(self.layer, "moving_mean", None) is not None

    def spec(self) -> LayerSpec:
        """Return the description of the layer, which must be built."""
        layer = self.layer
        initial = initial_statistics(layer)
        return LayerSpec(
            path=self.path,
            kind=type(layer).__name__,
            channels=int(layer.moving_mean.shape[0]),
            epsilon=float(layer.epsilon),
            decay=float(layer.momentum),
            bessel_corrected=self.backend.bessel_corrected(layer),
            trainable=bool(layer.trainable),
            axis=_axes(layer.axis),
            initial=initial or (0.0, 1.0),
            built_at=self.built_at,
            called_at=self.called_at if any(self.called_at) else (),
        )

    def statistics(self) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
        """Return the running mean and variance as they are now."""
        mean, var = self.backend.values([self.layer.moving_mean, self.layer.moving_variance])
        return mean, var

    def as_stored(self, statistics: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        """Return running statistics that travelled in float32 in half precision where the layer keeps them so."""
        dtype = self.layer.moving_mean.dtype
        return statistics.astype(np.float16) if getattr(dtype, "name", str(dtype)) == "float16" else statistics

    def pristine(self) -> bool:
        """Return whether the running statistics are exactly those the layer starts from."""
        if not self.built:
            return True
        initial = initial_statistics(self.layer)
        if initial is None:
            return False
        return all(bool(np.all(now == start)) for now, start in zip(self.statistics(), initial, strict=True))

    def unrestored(self) -> bool:
        """Return whether the running statistics are exactly initial although scale or offset were trained.

        These are trained where they vary over channels and did not when they were made.
        """
        layer = self.layer
        pairs = ("gamma", "gamma_initializer"), ("beta", "beta_initializer")
        own = [getattr(layer, name, None) for name, initial in pairs if _constant(getattr(layer, initial)) is not None]
        values = self.backend.values([variable for variable in own if variable is not None])
        return self.built and any(bool(np.ptp(found)) for found in values) and self.pristine()


def initial_statistics(layer: Any) -> tuple[float, float] | None:
    """Return the mean and variance the running statistics start from; None when they are no constants."""
    mean, var = _constant(layer.moving_mean_initializer), _constant(layer.moving_variance_initializer)
    return None if mean is None or var is None else (mean, var)


def _constant(initializer: Any) -> float | None:
    kind = type(initializer).__name__
    value = {"Zeros": 0.0, "Ones": 1.0, "Constant": getattr(initializer, "value", None)}.get(kind)
    return float(value) if isinstance(value, int | float) else None


def own_way(kind: type, library: type) -> OwnWay | None:
    """Return how a subclass normalizes whose ``call`` shows no batch statistics, as far as its names say.

    ``updating``: it assigns the running statistics itself. ``batch``: it knows neither running statistics nor the call
    of the class above, so it normalizes with batch statistics in every mode. None: it may well do what that one does.
    """
    code = getattr(inspect.unwrap(kind.call), "__code__", None)  # type: ignore[attr-defined]
    if kind.call is library.call or code is None:  # type: ignore[attr-defined]
        return None
    names = {*code.co_names, *code.co_freevars}
    if names & {"moving_mean", "moving_variance"}:
        return "updating" if names & {"assign", "assign_add", "assign_sub", "add_update"} else None
    return None if names & {"super", "__class__", "call"} else "batch"


def _axes(axis: Any) -> tuple[int, ...]:
    """Return the channel axes; Keras 2 keeps a list."""
    return tuple(map(int, axis)) if isinstance(axis, tuple | list) else (int(axis),)


def find_layers(backend: Backend) -> tuple[list[Watched], dict[str, str]]:
    """Return the batch-normalization layers in network order, and those that cannot be watched with the reason.

    The order is that of execution in functional and sequential models, and that of definition in subclassed ones.
    """
    watched, unsupported, names = [], dict[str, str](), set[str]()
    for path, layer in walk(backend.model):
        unsupported |= {_unique(f"{path}/{name}", names): why for name, why in backend.concealed(layer).items()}
        if not _normalizes(layer):
            continue
        name = _unique(path, names)
        reason = backend.why_not_layer(layer)
        if reason is None:
            watched.append(Watched(layer, name, backend))
        else:
            unsupported[name] = reason
    return watched, unsupported


def normalizing(model: Any) -> Iterator[tuple[str, Any]]:
    """Yield every layer that looks like batch normalization, with its unique name, in that order."""
    names = set[str]()
    for path, layer in walk(model):
        if _normalizes(layer):
            yield _unique(path, names), layer


def locate(root: Any, layers: Sequence[Watched]) -> None:
    """Find where layers below ``root`` were built."""
    sources, wanted = Sources(children, _attributes), {id(watched.layer): watched for watched in layers}
    for _, layer, parents in _descend(root):
        watched = wanted.get(id(layer))
        if watched is not None:
            watched.built_at = sources.built_at(layer, parents)


def _attributes(layer: Any) -> dict[str, Any]:
    """Return the attributes of a layer; on PyTorch it is a module, which keeps those that are modules apart."""
    return {**vars(layer), **vars(layer).get("_modules", {})}


def walk(root: Any) -> Iterator[tuple[str, Any]]:
    """Yield every layer below ``root`` once, with the path of its first place; a container comes before its content."""
    yield from ((path, layer) for path, layer, _ in _descend(root))


def _descend(root: Any) -> Iterator[tuple[str, Any, list[Any]]]:
    """Yield what `walk` does, with what holds the layer there, the innermost first."""
    seen = {id(root)}
    stack = [("", root, iter(children(root)))]
    while stack:
        prefix, _, below = stack[-1]
        layer = next(below, None)
        if layer is None:
            stack.pop()
        elif id(layer) not in seen:
            seen.add(id(layer))
            path = f"{prefix}{layer.name}"
            yield path, layer, [parent for _, parent, _ in reversed(stack)]
            stack.append((f"{path}/", layer, iter(children(layer))))


def children(layer: Any) -> list[Any]:
    """Return the layers directly below a layer, in execution order where there is a graph to know it from."""
    graph = getattr(layer, "_nodes_by_depth", None)
    nodes = [node for depth in sorted(graph, reverse=True) for node in graph[depth]] if isinstance(graph, dict) else []
    # Keras 2 calls it `layer`
    ordered = [getattr(node, "operation", None) or getattr(node, "layer", None) for node in nodes]
    kind = library_of(layer).layers.Layer
    inside: Any = getattr(layer, "_layers", None)
    if inside is None:  # Keras 2
        inside = layer._flatten_layers(recursive=False, include_self=False)  # noqa: SLF001
    return [found for found in [*ordered, *inside] if isinstance(found, kind)]


def _unique(path: str, taken: set[str]) -> str:
    name, n = path, 1
    while name in taken:
        n += 1
        name = f"{path}({n})"
    taken.add(name)
    return name


def _normalizes(layer: Any) -> bool:
    kind = type(layer).__name__
    is_one = isinstance(layer, library_of(layer).layers.BatchNormalization)
    return is_one or "BatchNorm" in kind or "BatchRenorm" in kind
