"""How often a model calls its layers, as far as that is known before it runs."""

from __future__ import annotations

from collections import Counter
from typing import Any

from bnwatch.keras.layers import walk


def call_sites(model: Any) -> Counter[int]:
    """Return how many calls of each layer the graph of a model contains, by the identity of the layer.

    A graph inside a graph counts as often as it is called. Where there is no graph, each layer is taken to be called
    once.
    """
    graph = getattr(getattr(model, "_functional", None) or model, "_nodes_by_depth", None)
    if not isinstance(graph, dict):
        return Counter({id(layer): 1 for _, layer in walk(model)})
    found = Counter[int]()
    for operation in [node.operation for nodes in graph.values() for node in nodes]:
        found[id(operation)] += 1
        if hasattr(operation, "_flatten_layers"):
            found.update(call_sites(operation))
    return found
