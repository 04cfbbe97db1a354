"""How batch normalization is connected, read off the first forward pass that the user's training makes by itself.

A define-by-run network has a graph only while it runs. So the functions of one training step are noted as they come:
which arrays go in and which come out, told apart by identity. Nothing is run for it, nothing is kept alive, and no
device is touched.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import chainer

from bnwatch.chainer.tap import function_of
from bnwatch.records import CallSite, Output, Place, Structure, Usage

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Sequence

    from bnwatch.chainer.layers import Layers
    from bnwatch.chainer.tap import Call
    from bnwatch.records import Layout

CHANGING = "the forward pass differs from step to step: only what was seen in the first one is known"
UNCALLED = "no training step has normalized with batch statistics so far"

CONVOLVING = {
    *("Convolution2DFunction", "ConvolutionND", "Deconvolution2DFunction", "DeconvolutionND"),
    *("LocalConvolution2DFunction",),
}
BIASED = CONVOLVING | {"LinearFunction"}
"""Functions of ``(x, W, b)`` that add ``b`` to each channel."""
SPATIAL = CONVOLVING | {
    *("MaxPooling2D", "AveragePooling2D", "MaxPoolingND", "AveragePoolingND", "MaxPoolingNDWithIndexes"),
    *("Unpooling2D", "UnpoolingND", "Upsampling2D", "SpatialPyramidPooling2D", "ResizeImages"),
    *("ROIAverageAlign2D", "ROIAveragePooling2D", "ROIMaxAlign2D", "ROIMaxPooling2D", "ROIPooling2D"),
    *("LocalResponseNormalization", "Depth2Space", "Space2Depth", "SpatialTransformerSampler"),
}
"""Functions whose channels are axis 1, always."""
ELEMENTWISE = {
    *("ClippedReLU", "ELU", "HardSigmoid", "LeakyReLU", "PReLUFunction", "ReLU", "RReLU", "Sigmoid", "Softplus"),
    *("Swish", "Tanh", "Neg", "Absolute", "Add", "AddConstant", "MultiAdd", "Sub", "SubFromConstant", "Mul"),
    *("MulConstant", "Div", "DivFromConstant", "PowVarConst", "Exp", "Log", "Log1p", "Clip", "Identity", "Maximum"),
    *("Minimum", "Sqrt", "Square", "Erf", "LinearInterpolate", "Cast", "Copy", "Dropout", "Gaussian", "Zoneout"),
}
JOINING = {"Concat", "Hstack", "Vstack", "SplitAxis", "GetItem", "Pad", "Flip", "FlipLR", "FlipUD", "Permutate"}
NORMALIZING = {
    *("BatchNormalization", "FixedBatchNormalization", "BatchRenormalizationFunction", "GroupNormalization"),
    *("DecorrelatedBatchNormalization", "LayerNormalization", "NormalizeL2", "Softmax", "LogSoftmax"),
}
ARRANGING = {"Reshape", "Transpose", "ExpandDims", "Squeeze", "Swapaxes", "Moveaxis", "Rollaxis", "Copy", "Cast"}
"""Functions that only arrange what another one computed."""
LINEAR = BIASED | JOINING | ARRANGING | {"BilinearFunction", "Upsampling2D", "Unpooling2D", "UnpoolingND", "Stack"}
SCORES = ARRANGING | {"Softmax", "LogSoftmax", "Sigmoid", "Dropout"}
"""What may stand between scores and the loss: it makes probabilities out of them, or nothing."""
LOSSES = "chainer.functions.loss."
JUDGING = (LOSSES, "chainer.functions.evaluation.")
"""Where the functions are that compare scores with labels."""
EXPECTING_LOGITS = {"SoftmaxCrossEntropy", "SigmoidCrossEntropy"}
ACTIVATIONS = {
    "Softmax": "softmax",
    "LogSoftmax": "log_softmax",
    "Sigmoid": "sigmoid",
    "HardSigmoid": "hard_sigmoid",
    "Tanh": "tanh",
    "ReLU": "relu",
    "LeakyReLU": "leaky_relu",
    "ClippedReLU": "clipped_relu",
    "ELU": "elu",
    "Softplus": "softplus",
    "Swish": "swish",
    "PReLUFunction": "prelu",
    "RReLU": "rrelu",
    "Exp": "exp",
}
AVERAGING = {"AveragePooling2D", "AveragePoolingND", "Average", "Sum", "Add", "MultiAdd", "MulConstant", "AddConstant"}


@dataclass(eq=False, slots=True)
class Value:
    """An array: its shape, a way to it that does not hold it, and the function that made it, None for others'."""

    shape: tuple[int, ...]
    array: Callable[[], Any]
    maker: Operation | None = None
    readers: list[Operation] = field(default_factory=list)
    channel: int | None = None
    """The axis of its channels; None when unknown."""
    dropout: tuple[str, float] | None = None
    own: bool = False
    """It is a parameter, or made of parameters alone."""


@dataclass(eq=False, slots=True)
class Operation:
    """One function that ran."""

    kind: str
    module: str
    inputs: list[Value]
    outputs: list[Value] = field(default_factory=list)
    rate: float = 0.0
    axes: tuple[int, ...] | None = None
    """Of a transposition; of batch normalization those that have statistics of their own."""
    call: Call | None = None
    """What the tap saw, where it normalized with batch statistics."""

    @property
    def judges(self) -> bool:
        """Return whether it compares scores with labels."""
        return self.module.startswith(JUDGING)

    @property
    def name(self) -> str:
        """Return the class of Chainer's own function, empty for one that somebody wrote."""
        return self.kind if self.module.startswith("chainer.functions.") else ""


class Trace:
    """Notes the functions of one step, shown to it by the tap."""

    def __init__(self, failed: Callable[[Exception], None], *, drawing: bool = True) -> None:
        """Begin; ``drawing`` says that dropout is to draw random numbers, as the pass is the user's own."""
        self.operations: list[Operation] = []
        self.returned: set[Value] = set()
        self._failed, self._drawing = failed, drawing
        self._values: dict[int, Value] = {}
        self._latest: Operation | None = None

    def function(self, node: Any, inputs: Sequence[Any]) -> None:
        """See a function before it runs, and put an observer around it: a hook is not shown its outputs."""
        config = chainer.config
        recomputed = config._will_recompute  # noqa: SLF001 - inside of F.forget
        if config.in_recomputing or not (config.enable_backprop or recomputed):
            return
        function = function_of(node)
        operation = Operation(type(function).__name__, type(function).__module__, [self.value(x) for x in inputs])
        if operation.name == "Dropout":
            operation.rate = float(function.dropout_ratio)
        elif operation.name == "Transpose" and function.axes is not None:
            operation.axes = tuple(function.axes)
        set_before, own = vars(node).get("forward"), node.forward  # another watch may have put its observer there
        undrawn = operation.name == "Dropout" and not self._drawing

        def forward(arrays: Any) -> Any:
            vars(node).pop("forward", None)
            if set_before is not None:
                node.forward = set_before
            outputs = _passed_on(node, arrays) if undrawn else own(arrays)
            try:
                self._note(operation, outputs)
            except Exception as error:  # noqa: BLE001 - never an exception into the user's forward pass
                self._failed(error)
            return outputs

        node.forward = forward

    def normalized(self, call: Call, function: Any) -> None:
        """See that the function that ran last normalized with batch statistics."""
        if self._latest is not None:
            keys = getattr(function, "key_axis", None)  # batch renormalization has no choice
            self._latest.call = call
            self._latest.axes = tuple(keys or range(1, 1 + len(self._latest.inputs[1].shape)))

    def restart(self) -> None:
        """Forget everything."""
        self.operations, self._values, self._latest = [], {}, None

    def value(self, array: Any) -> Value:
        """Return what is known of an array."""
        known = self._values.get(id(array))
        if known is None or known.array() is not array:  # another one had this identity
            known = self._values[id(array)] = Value(tuple(array.shape), _weakly(array))
        return known

    def _note(self, operation: Operation, outputs: Any) -> None:
        self._latest = operation
        for array in outputs:
            known = self._values.get(id(array))
            if array is None or (known is not None and known.array() is array):  # made inside, or passed through
                continue
            value = self._values[id(array)] = Value(tuple(array.shape), _weakly(array), operation)
            operation.outputs.append(value)
        if operation.outputs or operation.judges:
            self.operations.append(operation)
            for value in operation.inputs:
                value.readers.append(operation)


def _weakly(array: Any) -> Callable[[], Any]:
    try:
        return weakref.ref(array)
    except TypeError:  # iDeep's arrays: held until the step ends
        return lambda: array


def _passed_on(node: Any, arrays: Any) -> Any:
    """Return what dropout gives where nothing is dropped."""
    (x,) = arrays
    node.mask = x * 0 + 1
    return (x.copy(),)


class Owners:
    """Tells whose parameter an array is."""

    def __init__(self, layers: Layers) -> None:
        """Find the parameters that have an array by now."""
        self._owners: dict[int, tuple[str, Any, Any]] = {}
        for path, link in layers.named():
            for name in sorted(link._params):  # noqa: SLF001 - the public names are those of children, too
                array = vars(link)[name].array
                if array is not None:
                    self._owners.setdefault(id(array), (path, link, array))

    def find(self, value: Value) -> tuple[str, Any] | None:
        """Return path and link of the parameter; None for an array that is none."""
        array = value.array() if value.maker is None else None
        path, link, found = self._owners.get(id(array), ("", None, None))
        return (path, link) if array is not None and found is array else None

    def of(self, operation: Operation) -> tuple[str, Any] | None:
        """Return path and link whose parameters a function computes with; None without."""
        return next(filter(None, map(self.find, operation.inputs)), None)

    def name(self, operation: Operation) -> tuple[str, str]:
        """Return what made a value: path and class of a link, or a function, behind the link that came before it."""
        owner = self.of(operation)
        if owner is not None:
            return owner[0], type(owner[1]).__name__
        before = operation.inputs[0].maker if operation.inputs else None
        while before is not None:
            owner = self.of(before)
            if owner is not None:
                return f"{owner[0]} -> {operation.kind}", operation.kind
            before = before.inputs[0].maker if before.inputs else None
        return operation.kind, operation.kind


def structure(
    layers: Layers,
    trace: Trace,
    calls: Iterable[Call],
    *,
    rows: int | None,
    batch_size: int | None = None,
    steps_per_epoch: int | None = None,
    epochs: int | None = None,
    accumulated: int = 1,
) -> Structure:
    """Return what one pass says of the watched links.

    Args:
        layers: the watched links.
        trace: what was noted of the pass.
        calls: those of the step, in order.
        rows: examples of the pass.
        batch_size: examples a training step.
        steps_per_epoch: training steps an epoch.
        epochs: planned epochs.
        accumulated: passes, each with its own gradients, for one update of the parameters.
    """
    owners = Owners(layers)
    _spread(trace, owners)
    biased = _biased(trace, layers, owners)
    operations = {id(operation.call): operation for operation in trace.operations if operation.call is not None}
    places: dict[int, list[Place]] = {}
    for call in calls:
        found = places.setdefault(call.layer, [])
        site = CallSite(layers.watched[call.layer].path, len(found))
        operation = operations.get(id(call))
        if operation is None:
            found.append(Place(site))
        else:
            place = _place(operation, site, owners, rows)
            output = _makes_scores(operation, trace.returned)
            found.append(replace(place, bias=_arranged(operation.inputs[0]) in biased, output=output))
    usages = []
    for index in dict.fromkeys([*places, *range(len(layers.watched))]):
        spec = layers.watched[index].spec()
        usages.append(Usage(spec.path, spec.kind, spec.decay, spec.trainable, tuple(places.get(index, ()))))
    return Structure(
        tuple(usages),
        batch_size=batch_size,
        steps_per_epoch=steps_per_epoch,
        epochs=epochs,
        accumulated=accumulated,
        output=_output(trace, owners),
    )


def _place(operation: Operation, site: CallSite, owners: Owners, rows: int | None) -> Place:
    source, maker = operation.inputs[0], _arranged(operation.inputs[0])
    keys = operation.axes or ()
    producer, kind = (None, None) if maker is None else owners.name(maker)
    dropout, rate = source.dropout or (None, 0.0)
    elements = operation.call.elements if operation.call is not None else 0
    return Place(
        site=site,
        rank=len(source.shape),
        axis=keys[0] if len(keys) == 1 else None,
        elements=elements // rows if rows and elements % rows == 0 else None,
        producer=producer,
        kind=kind,
        layout=_layout(source),
        dropout=dropout,
        rate=rate,
    )


def _arranged(value: Value) -> Operation | None:
    """Return the function that computed a value, before others arranged it anew; None for what came from outside."""
    maker = value.maker
    while maker is not None and maker.name in ARRANGING:
        maker = maker.inputs[0].maker
    return maker


def _spread(trace: Trace, owners: Owners) -> None:
    """Let the axis of the channels and dropout pass along the functions."""
    for operation in trace.operations:
        for value in operation.inputs:
            value.own = value.own or owners.find(value) is not None
        data = [value for value in operation.inputs if not value.own]
        dropouts = [value.dropout for value in data if value.dropout is not None]
        for value in operation.outputs:
            value.own = bool(operation.inputs) and not data
            value.channel = _channel(operation, len(value.shape), value, data)
            if operation.name == "Dropout" and operation.rate:
                value.dropout = owners.name(operation)[0], operation.rate
            elif operation.name in LINEAR | ELEMENTWISE and dropouts:
                value.dropout = max(dropouts, key=lambda dropout: dropout[1])


def _channel(operation: Operation, rank: int, value: Value, data: Sequence[Value]) -> int | None:
    """Return the axis of the channels of what a function made; None when it is not known."""
    name = operation.name
    alike = {one.channel for one in data if len(one.shape) == rank}
    if name == "LinearFunction" or (name in SPATIAL and rank > 2):  # noqa: PLR2004 - examples and channels alone
        return 1
    if name == "EmbedIDFunction":
        return rank - 1
    if name == "Transpose" and operation.axes is not None and data and data[0].channel is not None:
        return [axis % rank for axis in operation.axes].index(data[0].channel)
    if name in ELEMENTWISE | JOINING | NORMALIZING and len(alike) == 1 and alike != {None}:
        return alike.pop()
    if rank == 2:  # noqa: PLR2004
        return 1
    return _reshaped(data[0], value) if name == "Reshape" and data else None


def _reshaped(before: Value, after: Value) -> int | None:
    """Return the axis of the channels behind a reshape that left it as long as it was."""
    if before.channel == 1 and before.shape[:2] == after.shape[:2]:
        return 1
    last = before.channel == len(before.shape) - 1 and before.shape[-1] == after.shape[-1]
    return len(after.shape) - 1 if last else None


def _layout(value: Value) -> Layout | None:
    last = len(value.shape) - 1
    if value.channel == last:
        return "channels_last"
    return "channels_first" if value.channel == 1 else None


def _biased(trace: Trace, layers: Layers, owners: Owners) -> set[Operation]:
    """Return the functions whose bias nothing sees but trainable batch normalization with an offset."""
    by_bias: dict[int, list[Operation]] = {}
    for operation in trace.operations:
        if operation.name in BIASED and len(operation.inputs) > 2 and owners.find(operation.inputs[2]):  # noqa: PLR2004
            by_bias.setdefault(id(operation.inputs[2]), []).append(operation)

    def taken_out(value: Value) -> bool:
        return bool(value.readers) and value not in trace.returned and all(reads(value, one) for one in value.readers)

    def reads(value: Value, reader: Operation) -> bool:
        if reader.name in ARRANGING:
            return all(map(taken_out, reader.outputs))
        if reader.call is None or reader.axes != (value.channel,):
            return False
        spec = layers.watched[reader.call.layer].spec()
        return spec.trainable and owners.find(reader.inputs[2]) is not None

    return {
        operation
        for group in by_bias.values()
        if all(taken_out(value) for one in group for value in one.outputs)
        for operation in group
    }


def _makes_scores(operation: Operation, returned: Collection[Value]) -> bool:
    """Return whether nothing but a loss or an accuracy reads the result, directly or through a sigmoid or softmax."""
    if any(value in returned for value in operation.outputs):
        return True
    readers = [reader for value in operation.outputs for reader in value.readers]
    return bool(readers) and all(
        reader.judges or (reader.name in SCORES and _makes_scores(reader, returned)) for reader in readers
    )


def _output(trace: Trace, owners: Owners) -> Output | None:
    """Return how the model ends; None where that is not known, or where it ends in several ways."""
    calls = [number for number, operation in enumerate(trace.operations) if operation.call is not None]
    judges = [operation for operation in trace.operations[calls[0] if calls else 0 :] if operation.judges]
    losses = [operation for operation in judges if operation.module.startswith(LOSSES)]
    if judges:
        found = {_judged(operation, owners) for operation in losses or judges}
    else:
        found = {_ending(value, owners) for value in trace.returned}
    return found.pop() if len(found) == 1 else None


def _judged(judge: Operation, owners: Owners) -> Output | None:
    """Return how scores are made that a loss or an accuracy compares with labels."""
    scores = next((value for value in judge.inputs if value.maker is not None), None)
    output = None if scores is None else _ending(scores, owners)
    if output is None or not judge.module.startswith(LOSSES):
        return output
    return replace(output, loss=judge.module.rpartition(".")[2], from_logits=judge.kind in EXPECTING_LOGITS)


def _ending(scores: Value, owners: Owners) -> Output | None:
    maker = _arranged(scores)
    if maker is None:
        return None
    activation = ACTIVATIONS.get(maker.name)
    if activation is None:
        activation = "linear" if maker.name in LINEAR | AVERAGING or maker.call is not None else None
    elif owners.of(maker) is None:
        maker = _arranged(maker.inputs[0])
    if maker is None:
        return None
    units = scores.shape[1] if len(scores.shape) > 1 else 1
    return Output(owners.name(maker)[0], units, activation)
