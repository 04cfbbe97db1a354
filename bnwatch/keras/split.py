"""`split_shared`: a copy of a model in which every call site has a batch-normalization layer of its own."""

from __future__ import annotations

import copy
import itertools
from collections import Counter
from typing import Any

from bnwatch.keras.layers import walk
from bnwatch.keras.library import library_of
from bnwatch.keras.structure import flat, graph_of, holds_batch_norm, kinds, nodes, operation


def split_shared(model: Any) -> Any:
    """Return a copy of a functional model in which no batch-normalization layer is called at two places.

    The first call site keeps the name of the layer, ``bn``, the others get the next free one: ``bn_2``, ``bn_3``. A
    nested model that holds batch normalization and is called at several places gives way to its layers:
    ``encoder_conv``, still shared, ``encoder_bn`` and ``encoder_bn_2``. Whatever is no batch normalization stays shared
    as it was. Every layer of the copy has the weights of its original, so
    that both models give the same outputs until they are trained. The original is left as it is.

    The copy is not compiled, whatever the original is: its optimizer would need state for the new layers. Making layers
    draws random numbers.

    Args:
        model: a functional model; nested models inside may be sequential.

    Raises:
        ValueError: there is no graph, nothing is shared, or a layer cannot be split; one sentence says which and why.
    """
    keras = library_of(model)
    graph = graph_of(model) if isinstance(model, keras.Model) else None
    if graph is None:
        msg = f"split_shared needs a functional Keras model, and this {type(model).__name__} has no graph to split"
        raise ValueError(msg)
    calls = Counter(id(layer) for layer in _called(graph))
    if not any(calls[id(layer)] > 1 for layer in _called(graph) if holds_batch_norm(layer)):
        msg = f"no batch-normalization layer of {model.name!r} is called at more than one place: nothing to split"
        raise ValueError(msg)
    for layer in _called(graph):
        splits = "BatchNormalization" in kinds(layer) or graph_of(layer) is not None
        if calls[id(layer)] > 1 and holds_batch_norm(layer) and not splits:
            msg = (
                f"{layer.name!r} is called at {calls[id(layer)]} places and has batch normalization in code of its own"
            )
            raise ValueError(msg + ", without a graph to split: give it layers of its own at each call")
    return _Copier(keras, calls).model(model, model.name)


def _called(graph: Any) -> list[Any]:
    """Return the layer of every call of a forward pass, nested models before what they call."""
    called = []
    for node in nodes(graph):
        below = graph_of(operation(node))
        called += [operation(node), *(_called(below) if below is not None else ())]
    return called


class _Names:
    """Names of one model: a layer keeps its own where that is free, else it gets the next free one."""

    def __init__(self, graph: Any) -> None:
        self._kept = {operation(node).name for node in nodes(graph)}
        self._given: set[str] = set()

    def give(self, name: str, *, new: bool) -> str:
        """Return a free name; ``new`` if none of the layers that the model has already bears it."""
        taken = self._given | (self._kept if new else set())
        if name in taken:
            taken |= self._kept
            name = next(f"{name}_{n}" for n in itertools.count(2) if f"{name}_{n}" not in taken)
        self._given.add(name)
        return name


class _Copier:
    """Copies layers: batch normalization at every call, all else once."""

    def __init__(self, keras: Any, calls: Counter[int]) -> None:
        self._keras = keras
        self._calls = calls
        self._copies: dict[int, Any] = {}

    def model(self, model: Any, name: str) -> Any:
        """Return a copy of a model that has a graph."""
        graph = graph_of(model)
        inputs, outputs = _ends(graph)
        known = {id(tensor): _input_like(tensor) for tensor in flat(inputs)}
        self._run(graph, known, _Names(graph))
        return self._made(model, _filled(inputs, known), _filled(outputs, known), name)

    def _run(
        self, graph: Any, known: dict[int, Any], names: _Names, prefix: str = "", training: bool | None = None
    ) -> None:
        """Call the copies of the layers of a graph on what is ``known``, and add what they make."""
        for node in nodes(graph):
            layer, below = operation(node), graph_of(operation(node))
            args, kwargs = (_filled(part, known) for part in _arguments(node))
            if training is not None and kwargs.get("training") is None and _takes_training(layer):
                kwargs["training"] = training
            if below is not None and self._calls[id(layer)] > 1 and holds_batch_norm(layer):
                # two models that share layers cannot be saved, so the layers take the place of the model
                known.update(zip(map(id, flat(_ends(below)[0])), flat([args, kwargs]), strict=False))
                self._run(below, known, names, f"{prefix}{layer.name}_", kwargs.get("training"))
                outputs = _filled(_ends(below)[1], known)
            else:
                fresh = id(layer) not in self._copies
                outputs = (copied := self._copy(layer, names, prefix))(*args, **kwargs)
                if fresh and below is None and isinstance(layer, self._keras.layers.Layer):
                    _take_over(layer, copied)  # only now it is built
            known.update(zip(map(id, flat(node.outputs)), flat(outputs), strict=True))

    def _copy(self, layer: Any, names: _Names, prefix: str) -> Any:
        if not isinstance(layer, self._keras.layers.Layer):
            return _operation_like(layer)
        if id(layer) not in self._copies:
            name = names.give(prefix + layer.name, new=bool(prefix))
            copied = _layer_like(layer, name) if graph_of(layer) is None else self.model(layer, name)
            if "BatchNormalization" in kinds(layer):
                return copied
            self._copies[id(layer)] = copied
        return self._copies[id(layer)]

    def _made(self, model: Any, inputs: Any, outputs: Any, name: str) -> Any:
        kind = type(model)
        own = kind.__module__.partition(".")[0] != self._keras.__name__
        try:
            made = (kind if own else self._keras.Model)(inputs, outputs, name=name)
        except (TypeError, ValueError) as error:
            msg = f"{kind.__name__} {model.name!r} cannot be made from inputs and outputs, so not be split: {error}"
            raise ValueError(msg) from error
        if not model.trainable:
            made.trainable = False
        return made


def _ends(graph: Any) -> tuple[Any, Any]:
    """Return the inputs and outputs of a graph in the structure they were given in."""
    if hasattr(graph, "_inputs_struct"):
        return graph._inputs_struct, graph._outputs_struct  # noqa: SLF001 - Keras 3
    return graph._nested_inputs, graph._nested_outputs  # noqa: SLF001 - Keras 2


def _arguments(node: Any) -> tuple[Any, Any]:
    """Return what a node is called with: Keras 3, Keras 2."""
    if hasattr(node, "arguments"):
        return node.arguments.args, node.arguments.kwargs
    return node.call_args, node.call_kwargs


def _filled(structure: Any, known: dict[int, Any]) -> Any:
    """Return a structure with tensors of the original replaced by those of the copy."""
    if isinstance(structure, dict):
        return {key: _filled(part, known) for key, part in structure.items()}
    if isinstance(structure, list | tuple):
        parts = [_filled(part, known) for part in structure]
        return parts if isinstance(structure, list) else tuple(parts)
    return known.get(id(structure), structure)


def _takes_training(layer: Any) -> bool:
    return bool(getattr(layer, "_call_has_training_arg", getattr(layer, "_expects_training_arg", False)))


def _input_like(tensor: Any) -> Any:
    layer = tensor._keras_history[0]  # noqa: SLF001 - the only way from a tensor to the layer behind it
    return type(layer).from_config(layer.get_config()).output


def _operation_like(function: Any) -> Any:
    """Return a copy of a function of the graph, which has no state but where it is called."""
    copied = copy.copy(function)
    copied._inbound_nodes, copied._outbound_nodes = [], []  # noqa: SLF001 - calls of the original are not those of this
    return copied


def _layer_like(layer: Any, name: str) -> Any:
    try:
        return type(layer).from_config({**layer.get_config(), "name": name})
    except Exception as error:
        msg = f"{type(layer).__name__} {layer.name!r} cannot be copied: its get_config() does not describe it: {error}"
        raise ValueError(msg) from error


def _take_over(layer: Any, copied: Any) -> None:
    """Give a copy the weights and states of its original, and what is frozen of it."""
    copied.trainable = layer.trainable
    # a container comes before its content, which it would overrule
    for (_, one), (_, other) in zip(walk(layer), walk(copied), strict=True):
        other.trainable = one.trainable
    if len(layer.variables) != len(copied.variables):
        msg = f"{type(layer).__name__} {layer.name!r} cannot be copied: its get_config() does not describe its weights"
        raise ValueError(msg)
    for variable, value in zip(copied.variables, layer.variables, strict=True):
        variable.assign(value.numpy())  # a copy: JAX may give the memory of an array away
    if hasattr(copied, "finalize_state"):
        copied.finalize_state()  # of preprocessing layers, which keep what they adapted to a second time
