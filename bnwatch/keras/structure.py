"""What the graph of a Keras model says about its batch-normalization layers, found without running or changing it."""

from __future__ import annotations

import inspect
import re
from dataclasses import dataclass, field, replace
from math import prod
from typing import TYPE_CHECKING, Any

from bnwatch.keras.layers import normalizing, walk
from bnwatch.keras.library import is_legacy, library_of
from bnwatch.keras.swap import undrawn
from bnwatch.records import CallSite, Output, Place, Structure, Usage

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from bnwatch.records import Layout

    Shape = tuple[int | None, ...]

KERAS = ("keras", "tf_keras")
"""The packages whose layers do what their name says."""

MERGING = {"Add", "Subtract", "Average", "Maximum", "Minimum", "Multiply", "Concatenate"}
DROPPING = {"Dropout", "SpatialDropout1D", "SpatialDropout2D", "SpatialDropout3D", "GaussianDropout"}
ACTIVATIONS = {"Activation", "ReLU", "LeakyReLU", "PReLU", "ELU", "ThresholdedReLU"}
PASSING = ACTIVATIONS | {"Rescaling", "Identity", "Masking", "ActivityRegularization", "GaussianNoise", "AlphaDropout"}
NORMALIZING = {"BatchNormalization", "LayerNormalization", "GroupNormalization", "UnitNormalization", "Softmax"}
FUNCTIONS = {
    *("add", "subtract", "sub", "multiply", "mul", "divide", "truedivide", "true_divide", "truediv", "negative", "neg"),
    *("maximum", "minimum", "abs", "absolute", "square", "sqrt", "exp", "cast", "identity", "concatenate", "concat"),
    *("relu", "relu6", "leakyrelu", "leaky_relu", "elu", "selu", "gelu", "silu", "swish", "sigmoid", "tanh"),
    *("softplus", "hardsigmoid", "hard_sigmoid", "hardsilu", "hard_silu"),
    *("__add__", "__sub__", "__mul__", "__truediv__"),
}
"""Functions of the graph that act on each element, by the last part of their name in lower case."""
LINEAR = {
    *("Dense", "EinsumDense", "Conv1D", "Conv2D", "Conv3D", "Conv1DTranspose", "Conv2DTranspose", "Conv3DTranspose"),
    *("DepthwiseConv1D", "DepthwiseConv2D", "SeparableConv1D", "SeparableConv2D", "Flatten", "Reshape", "Permute"),
    *("ZeroPadding1D", "ZeroPadding2D", "ZeroPadding3D", "Cropping1D", "Cropping2D", "Cropping3D"),
    *("UpSampling1D", "UpSampling2D", "UpSampling3D"),
}
CHANNELS_LAST = {"Dense", "Embedding", "LSTM", "GRU", "SimpleRNN", "Bidirectional", "MultiHeadAttention"}
"""Layers that have no choice: their channels are the last axis."""
REARRANGING = {"Flatten", "Reshape", "Permute"}
SCORES = {"linear", "sigmoid", "softmax"}
"""Activations that make probabilities out of scores, or nothing."""

TOUCHED = ("call", "_called")
"""What calling a layer for a look sets on it, ours and Keras's own."""


@dataclass(eq=False, slots=True)
class Value:
    """A tensor of the graph: its shape, and the call that makes it, None for an input of the model."""

    shape: Shape | None
    maker: Call | None = None
    layout: Layout | None = None
    dropout: tuple[str, float] | None = None
    mask: tuple[str, bool] | None = None
    """The layer that marks padded positions of it, and whether what comes next is told of them."""


@dataclass(eq=False, slots=True)
class Call:
    """One call of a layer or an operation."""

    layer: Any
    inputs: list[Value]
    outputs: list[Value]
    readers: list[Call] = field(default_factory=list)
    """The calls that take in what this one makes."""


class Trace:
    """The calls of one forward pass in order, nested models taken apart."""

    def __init__(self) -> None:
        self.calls: list[Call] = []
        self.outputs: list[Value] = []
        self.hidden: str | None = None

    def call(self, layer: Any, inputs: Sequence[Value], shapes: Sequence[Shape | None]) -> list[Value]:
        """Add a call; return what it makes."""
        made = Call(layer, list(inputs), [])
        made.outputs = [Value(shape, made) for shape in shapes]
        for value in inputs:
            if value.maker is not None:
                value.maker.readers.append(made)
        self.calls.append(made)
        return made.outputs


def graph_of(layer: Any) -> Any | None:
    """Return the part of a functional or sequential model that holds its graph; None where there is none."""
    layer = getattr(layer, "_functional", None) or layer
    return layer if isinstance(layer.__dict__.get("_nodes_by_depth"), dict) and layer.inputs else None


def nodes(graph: Any) -> Iterator[Any]:
    """Yield the nodes of a graph in the order of the forward pass, without those that stand for inputs."""
    by_depth = graph._nodes_by_depth  # noqa: SLF001 - there is no other way to the graph
    for depth in sorted(by_depth, reverse=True):
        for node in by_depth[depth]:
            if operation(node) is not None and not node.is_input:
                yield node


def operation(node: Any) -> Any:
    """Return what a node calls: Keras 3 says operation, Keras 2 says layer."""
    return node.operation if hasattr(node, "operation") else node.layer


def node_inputs(node: Any) -> list[Any]:
    """Return the tensors that go into a node."""
    return list(node.input_tensors if hasattr(node, "operation") else node.keras_inputs)


def flat(structure: Any) -> list[Any]:
    """Return the tensors of lists, tuples and dicts, in a fixed order."""
    if isinstance(structure, dict):
        structure = [structure[key] for key in sorted(structure)]
    if isinstance(structure, list | tuple):
        return [leaf for part in structure for leaf in flat(part)]
    return [] if structure is None else [structure]


def trace(model: Any, input_shape: Any = None) -> Trace:
    """Return the calls of one forward pass of a model; ``input_shape`` is needed where it has no graph."""
    traced = Trace()
    graph = graph_of(model)
    if graph is not None:
        traced.outputs = _expand(graph, [Value(_shape(tensor)) for tensor in graph.inputs], traced)
        if traced.hidden is None:
            return traced
        observed = _observe(model, _like(graph.input))
        return traced if observed.hidden is not None else observed
    shape = input_shape if input_shape is not None else _built_with(model)
    if shape is None:
        traced.hidden = "the model has no graph, and the shape of its input is not known"
    elif not all(layer.built for _, layer in walk(model)):
        traced.hidden = "the model has no graph, and is not built yet"
    else:
        return _observe(model, shape)
    return traced


def _like(inputs: Any) -> Any:
    """Return the shapes of tensors in the structure they stand in."""
    if isinstance(inputs, dict):
        return {name: _like(part) for name, part in inputs.items()}
    return [_like(part) for part in inputs] if isinstance(inputs, list | tuple) else tuple(inputs.shape)


def _expand(graph: Any, inputs: Sequence[Value], traced: Trace) -> list[Value]:
    known = {id(tensor): value for tensor, value in zip(graph.inputs, inputs, strict=True)}
    for node in nodes(graph):
        taken = [known[id(tensor)] for tensor in node_inputs(node) if id(tensor) in known]
        made = flat(node.outputs)
        below = graph_of(operation(node))
        if below is not None and len(below.inputs) == len(taken):
            values = _expand(below, taken, traced)
        else:
            _look_inside(operation(node), traced)
            values = traced.call(operation(node), taken, [_shape(tensor) for tensor in made])
        known.update(zip(map(id, made), values, strict=True))
    return [known[id(tensor)] for tensor in flat(graph.outputs)]


def _look_inside(layer: Any, traced: Trace) -> None:
    """Note that a layer without a graph keeps batch normalization inside."""
    if "BatchNormalization" not in kinds(layer) and holds_batch_norm(layer):
        traced.hidden = f"`{layer.name}` calls batch normalization in code of its own, which has no graph"


def holds_batch_norm(layer: Any) -> bool:
    """Return whether a layer is batch normalization or has some inside."""
    within = [below for _, below in walk(layer)] if "Layer" in kinds(layer) else []
    return any("BatchNormalization" in kinds(one) for one in [layer, *within])


def _shape(tensor: Any) -> Shape | None:
    try:
        return tuple(None if size is None else int(size) for size in tensor.shape)
    except (AttributeError, TypeError, ValueError):
        return None


def _built_with(model: Any) -> Any:
    """Return the shape a model was built with, where it was kept and there is but one input."""
    shapes = getattr(model, "_build_shapes_dict", None)
    if isinstance(shapes, dict) and len(shapes) == 1:
        (shape,) = shapes.values()
        if isinstance(shape, list | tuple) and shape and all(size is None or isinstance(size, int) for size in shape):
            return tuple(shape)
    return None


# --- models without a graph ---------------------------------------------------------------------------------------


def _observe(model: Any, shape: Any) -> Trace:
    """Return the calls of a built model on tensors without values, in a scope that keeps nothing."""
    keras, traced = library_of(model), Trace()
    if is_legacy(keras):
        traced.hidden = "part of the model has no graph, and only Keras 3 calls it without a trace"
        return traced
    layers = [layer for _, layer in walk(model)]
    observer = _Observer(traced)
    probe = keras.Operation(name="bnwatch_structure")

    def call(inputs: Any) -> Any:
        observer.begin(inputs)
        outputs = model(inputs, **({"training": True} if getattr(model, "_call_has_training_arg", False) else {}))
        observer.end(outputs)
        return outputs

    probe.call = call
    before = {one: {name: one.__dict__[name] for name in TOUCHED if name in one.__dict__} for one in (model, *layers)}
    try:
        for layer in layers:
            layer.__dict__["call"] = observer.watching(layer)
        with undrawn():
            probe.compute_output_spec(_symbolic(keras, shape))
    except Exception as error:  # noqa: BLE001 - the model's own code, called on tensors that it may not expect
        traced.calls, traced.hidden = [], f"the model could not be called without data: {type(error).__name__}"
    finally:
        for one, own in before.items():
            for name in TOUCHED:
                one.__dict__.pop(name, None)
            one.__dict__.update(own)
    return traced


def _symbolic(keras: Any, shape: Any) -> Any:
    if isinstance(shape, dict):
        return {name: _symbolic(keras, part) for name, part in shape.items()}
    if any(isinstance(part, list | tuple) for part in shape):
        return [_symbolic(keras, part) for part in shape]
    # JAX looks at a graph twice, with other sizes, where one is not known
    return keras.KerasTensor((shape[0] or 2, *shape[1:]), dtype="float32")


class _Observer:
    """Turns calls of layers, seen one after the other, into a trace: tensors are told apart by identity."""

    def __init__(self, traced: Trace) -> None:
        self._traced = traced
        self._values: dict[int, Value] = {}
        self._alive: list[Any] = []

    def begin(self, inputs: Any) -> None:
        self._traced.calls, self._values, self._alive = [], {}, []
        for tensor in flat(inputs):
            self._value(tensor)

    def end(self, outputs: Any) -> None:
        self._traced.outputs = [self._value(tensor) for tensor in flat(outputs)]

    def watching(self, layer: Any) -> Callable[..., Any]:
        own = layer.call

        def call(*args: Any, **kwargs: Any) -> Any:
            outputs = own(*args, **kwargs)
            inputs = [self._value(t) for t in flat([args, kwargs]) if hasattr(t, "shape")]
            made = [tensor for tensor in flat(outputs) if id(tensor) not in self._values]
            if made or "BatchNormalization" in kinds(layer):
                values = self._traced.call(layer, inputs, [_shape(tensor) for tensor in made])
                self._alive += made
                self._values.update(zip(map(id, made), values, strict=True))
            return outputs

        return call

    def _value(self, tensor: Any) -> Value:
        if id(tensor) not in self._values:
            self._alive.append(tensor)  # or another tensor may get its identity
            self._values[id(tensor)] = Value(_shape(tensor))
        return self._values[id(tensor)]


# --- what follows from the calls ----------------------------------------------------------------------------------


def structure(
    model: Any,
    *,
    input_shape: Any = None,
    batch_size: int | None = None,
    steps_per_epoch: int | None = None,
    epochs: int | None = None,
) -> Structure:
    """Return what is known of a model and its training before the first step; the model is left as it is.

    Args:
        model: a Keras model.
        input_shape: shape of its input with the examples as first axis; asked for where the model has no graph.
        batch_size: examples a training step.
        steps_per_epoch: training steps an epoch.
        epochs: planned epochs.
    """
    kind = library_of(model).layers.BatchNormalization
    layers = {id(layer): (path, layer) for path, layer in normalizing(model) if isinstance(layer, kind)}
    traced = Trace()
    if layers:
        try:
            traced = trace(model, input_shape)
        except Exception as error:  # noqa: BLE001 - whatever a graph is made of, the training goes on
            traced.hidden = f"the graph of the model could not be read: {type(error).__name__}"
    paths = {id(layer): path for path, layer in walk(model)} | {key: path for key, (path, _) in layers.items()}
    _spread(traced, paths)
    scores, biases = _scores(traced), _biases(traced)
    places: dict[int, list[Place]] = {key: [] for key in layers}
    for call in traced.calls:
        found = places.get(id(call.layer))
        if found is not None:
            place = _place(call, CallSite(paths[id(call.layer)], len(found)), paths)
            biased = place.axis == place.channel_axis and call.inputs[0].maker in biases
            found.append(replace(place, output=call in scores, bias=biased))
    return Structure(
        layers=tuple(
            Usage(path, type(layer).__name__, float(layer.momentum), bool(layer.trainable), tuple(places[key]))
            for key, (path, layer) in layers.items()
        ),
        hidden=traced.hidden,
        batch_size=batch_size,
        steps_per_epoch=steps_per_epoch,
        epochs=epochs,
        accumulated=int(getattr(getattr(model, "optimizer", None), "gradient_accumulation_steps", None) or 1),
        output=output(model, traced, paths),
    )


def _place(call: Call, site: CallSite, paths: dict[int, str]) -> Place:
    source = call.inputs[0] if call.inputs else Value(None)
    place = Place(site=site, layout=source.layout)
    if source.dropout is not None:
        place = replace(place, dropout=source.dropout[0], rate=source.dropout[1])
    if source.mask is not None and not (source.mask[1] and _heeds_mask(call.layer)):
        place = replace(place, mask=source.mask[0])
    if source.maker is not None:
        maker = source.maker.layer
        place = replace(place, producer=paths.get(id(maker), maker.name), kind=type(maker).__name__)
    if source.shape is not None:
        rank, axis = len(source.shape), flat(call.layer.axis)[0]
        axis = axis + rank if axis < 0 else axis
        sizes = [size for n, size in enumerate(source.shape) if n not in (0, axis)]
        elements = None if None in sizes else prod(size for size in sizes if size is not None)
        place = replace(place, rank=rank, axis=axis, elements=elements)
    return place


def kinds(layer: Any) -> set[str]:
    """Return the names of the Keras classes a layer is of, also through classes that users derive from them."""
    return {base.__name__ for base in type(layer).__mro__ if base.__module__.partition(".")[0] in KERAS}


def _kind(layer: Any) -> str:
    """Return the class name of a layer of Keras itself, empty for one that somebody wrote."""
    return type(layer).__name__ if type(layer).__module__.partition(".")[0] in KERAS else ""


def _function(layer: Any) -> str:
    """Return the name of an elementwise function in the graph, empty for anything else."""
    name = str(getattr(layer, "symbol", "")) or (_kind(layer) if ".ops" in type(layer).__module__ else "")
    name = name.rpartition(".")[2].lower()
    return name if name in FUNCTIONS else ""


def _spread(traced: Trace, paths: dict[int, str]) -> None:
    """Let data layout, dropout and masks pass along the graph."""
    for call in traced.calls:
        kind, of = _kind(call.layer), kinds(call.layer)
        through = kind in MERGING | PASSING | DROPPING or bool(_function(call.layer))
        layouts = {value.layout for value in call.inputs}
        dropouts = [value.dropout for value in call.inputs if value.dropout is not None]
        for value in call.outputs:
            value.mask = _mask(call, value, kind, paths)
            vectors = value.shape is not None and len(value.shape) == 2  # noqa: PLR2004 - examples and channels
            if vectors or of & CHANNELS_LAST:
                value.layout = "channels_last"
            elif getattr(call.layer, "data_format", None) in ("channels_first", "channels_last") and of:
                value.layout = call.layer.data_format
            elif (through or of & NORMALIZING) and len(layouts) == 1:
                (value.layout,) = layouts
            if kind in DROPPING and call.layer.rate:
                value.dropout = paths.get(id(call.layer), call.layer.name), float(call.layer.rate)
            elif (through or kind in LINEAR) and dropouts:
                value.dropout = max(dropouts, key=lambda dropout: dropout[1])


def _mask(call: Call, value: Value, kind: str, paths: dict[int, str]) -> tuple[str, bool] | None:
    """Return what marks padded positions of an output; None where there are none, or no axis of them any more."""
    if kind == "Masking" or (kind == "Embedding" and call.layer.mask_zero):
        return paths.get(id(call.layer), call.layer.name), True
    masks = [one.mask for one in call.inputs if one.mask is not None]
    positions = value.shape is not None and len(value.shape) > 2  # noqa: PLR2004 - examples, positions, channels
    if not masks or not positions or kind in REARRANGING:
        return None
    told = bool(getattr(call.layer, "supports_masking", False))
    return masks[0][0], told and all(known for _, known in masks)


def _heeds_mask(layer: Any) -> bool:
    """Return whether batch normalization leaves out masked positions; the fused kernel of Keras 2 does not."""
    return "mask" in inspect.signature(layer.call).parameters and not getattr(layer, "fused", False)


def output(model: Any, traced: Trace, paths: dict[int, str]) -> Output | None:
    """Return how a model with one output ends, and what its loss expects; None where that is not known."""
    if len(traced.outputs) != 1 or traced.outputs[0].maker is None:
        return None
    (end,), activation = traced.outputs, None
    call, units = end.maker, end.shape[-1] if end.shape else None
    while call is not None:
        found = _output_activation(call.layer)
        activation = activation if activation not in {None, "linear"} else found
        before = call.inputs[0].maker if call.inputs else None
        if not _shapes_scores(call.layer) or before is None or activation is None:
            break
        call = before
    name, from_logits = loss_of(model)
    assert call is not None  # noqa: S101 - for the type checker: the last value has a maker
    return Output(paths.get(id(call.layer), call.layer.name), units, activation, name, from_logits)


def _shapes_scores(layer: Any) -> bool:
    """Return whether a layer makes no scores but passes them on, through an activation at most."""
    return _kind(layer) in PASSING | DROPPING | REARRANGING | {"Softmax"} or _output_function(layer) is not None


def _output_activation(layer: Any) -> str | None:
    """Return the activation with which a layer ends; None where its code is not Keras's own."""
    function = _output_function(layer)
    if function is not None:
        return function
    if not _kind(layer) or _kind(layer) in {"Lambda", "TFOpLambda", "SlicingOpLambda"}:
        return None
    own = {"ReLU", "LeakyReLU", "PReLU", "ELU", "Softmax"}
    return _kind(layer).lower() if _kind(layer) in own else _activation(layer)


def _output_function(layer: Any) -> str | None:
    """Return the activation that a function in the graph applies; None where it is another, or a layer."""
    name = str(getattr(layer, "symbol", "")) or (_kind(layer) if ".ops" in type(layer).__module__ else "")
    name = name.rpartition(".")[2].lower()
    return name if name in {"softmax", "sigmoid", "tanh", "relu", "log_softmax", "logsoftmax"} else None


def loss_of(model: Any) -> tuple[str | None, bool | None]:
    """Return the name of a model's loss, None for one of the user's own, and whether it takes logits."""
    loss: Any = getattr(model, "loss", None)
    if isinstance(loss, dict):
        loss = list(loss.values())
    if isinstance(loss, list | tuple):
        loss = loss[0] if len(loss) == 1 else None
    if isinstance(loss, str):
        loss = library_of(model).losses.get(loss)
    if loss is None:
        return None, None
    function = hasattr(loss, "__name__")
    made_by = (loss if function else type(loss)).__module__
    if made_by.partition(".")[0] not in KERAS:
        return None, None
    name = loss.__name__ if function else re.sub(r"(?<=[a-z])(?=[A-Z])", "_", type(loss).__name__).lower()
    from_logits = getattr(loss, "from_logits", getattr(loss, "_fn_kwargs", {}).get("from_logits"))
    if from_logits is None and "crossentropy" in name:
        from_logits = False  # what Keras takes it to be where nobody says
    return name, None if from_logits is None else bool(from_logits)


def _scores(traced: Trace) -> set[Call]:
    """Return the calls whose results are outputs of the model, or become so through a sigmoid or softmax."""
    found: set[Call] = set()
    todo = list(traced.outputs)
    while todo:
        call = todo.pop().maker
        if call is None or call in found:
            continue
        found.add(call)
        kind = _kind(call.layer)
        if kind in {"Dropout", "Softmax"} or (kind == "Activation" and _activation(call.layer) in SCORES):
            todo += call.inputs
    return found


def _biases(traced: Trace) -> set[Call]:
    """Return the calls of layers whose bias nothing sees but trainable batch normalization with an offset."""
    seen = {
        call.layer
        for call in traced.calls
        if not set(call.outputs).isdisjoint(traced.outputs)
        or not all(
            _kind(reader.layer) == "BatchNormalization" and reader.layer.center and reader.layer.trainable
            for reader in call.readers
        )
    }
    return {call for call in traced.calls if call.layer not in seen and _adds_bias(call.layer)}


def _adds_bias(layer: Any) -> bool:
    return _kind(layer) in LINEAR and bool(getattr(layer, "use_bias", False)) and _activation(layer) == "linear"


def _activation(layer: Any) -> str:
    return str(getattr(getattr(layer, "activation", None), "__name__", "linear"))
