"""`Backend`: what the watch asks of the Keras it runs on.

Everything in `bnwatch.keras` outside of this package is the same for every backend. What is here as a method with a
body holds for Keras 3; what is abstract differs.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from bnwatch.evidence import ExperimentNotPossibleError, entries
from bnwatch.keras.layers import own_way
from bnwatch.keras.library import library_of

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
    from contextlib import AbstractContextManager

    import numpy as np
    from numpy.typing import NDArray

    from bnwatch.keras.keep import Kept
    from bnwatch.keras.layers import OwnWay, Watched
    from bnwatch.records import Source

    Guard = Callable[[str], AbstractContextManager[None]]
    Calls = dict[tuple[Hashable, int], int]
    """How often each call site was called, by its key and replica."""
    Record = Callable[[Any, Any, Callable[[], Any]], None]
    """Takes the mean and the biased variance of a batch, and a function that returns the elements per channel."""


TOGGLED = (
    "`trainable` was set on a layer after compile(), and watching would make it count already: call compile() again; "
    "this training goes on unwatched"
)
"""Said where a function that is traced anew would train other layers than the one that the model already has."""
ESSENCE = 200
"""Characters of an error message that are passed on."""


@dataclass(frozen=True, slots=True)
class Stored:
    """What waits for a call site, read from the device.

    Attributes:
        key: of the call site, as it was given to `Storage.put`.
        watched: the layer.
        mean: shape ``(channels,)``.
        var: biased, shape ``(channels,)``.
        count: elements per channel.
        calls: how often the call site was called since the storage was made.
        replica: the device, counted from 0, where the framework keeps statistics of each.
        running: mean and variance where the replica keeps its own; None where `Reading` has them.
    """

    key: Hashable
    watched: Watched
    mean: NDArray[np.floating]
    var: NDArray[np.floating]
    count: int
    calls: int
    replica: int = 0
    running: tuple[NDArray[np.floating], NDArray[np.floating]] | None = None


@dataclass(frozen=True, slots=True)
class Reading:
    """Everything that was stored at one moment, in the order of the forward pass, and the running statistics then."""

    stored: tuple[Stored, ...]
    running: Mapping[int, tuple[NDArray[np.floating], NDArray[np.floating]]]
    """Mean and variance by the identity of the `Watched`."""

    def calls(self) -> Calls:
        """Return how often each call site was called, by its key and replica."""
        return {(stored.key, stored.replica): stored.calls for stored in self.stored}


class Storage(Protocol):
    """Where the statistics of a step wait on the device until a sampled step reads them."""

    def put(self, key: Hashable, watched: Watched, mean: Any, var: Any, count: Callable[[], Any]) -> None:
        """Store the statistics of a call and count it; called inside a step, eagerly or while it is traced."""

    def read(self) -> Reading:
        """Return what is stored now: the one transfer to the host."""

    def counted(self) -> Callable[[], Calls]:
        """Note how often each call site was called, waiting for no device; what is returned tells it, and may wait."""

    @property
    def recorded(self) -> bool:
        """Return whether anything was ever stored."""

    @property
    def outgrown(self) -> bool:
        """Return whether a call site was met for which there is no place until the functions are made again."""

    def grow(self) -> None:
        """Make place for every call site that was met."""

    def release(self) -> None:
        """Take everything off the model."""


class Deferred(ABC):
    """How a storage on a device is read: copied there at once, and moved to the host by whoever waits for it."""

    @abstractmethod
    def begun(self) -> Callable[[], Reading]:
        """Copy everything on the device; return what moves it to the host."""

    def read(self) -> Reading:
        """Return what is stored now."""
        return self.begun()()

    def counted(self) -> Callable[[], Calls]:
        """Note how often each call site was called, waiting for no device; what is returned tells it, and may wait."""
        read = self.begun()
        return lambda: read().calls()


class Functions(Protocol):
    """The compiled functions of a model: made anew while it is watched, put back afterwards."""

    def make(self, training: Any, evaluation: Any) -> None:
        """Make functions that contain the tap and pass their batches by the keepers, or None; may be called again."""

    def restore(self) -> None:
        """Put the functions back as they were."""


class Keeper(Protocol):
    """Keeps the batch of a step where it is asked for before that step, as the user's pipeline composed it."""

    kept: Kept

    def want(self, *, wanted: bool) -> None:
        """Ask for the batch of the next step, or no longer."""

    @property
    def wanted(self) -> bool:
        """Return whether the next batch is asked for."""

    def collect(self) -> None:
        """Take the batch that was asked for."""


class Backend(ABC):
    """What the watch asks of the Keras that a model belongs to, bound to one model."""

    name: ClassVar[str]

    def __init__(self, model: Any) -> None:
        """Bind to a model; nothing is touched."""
        self.model = model
        self.library = library_of(model)

    @property
    def framework(self) -> str:
        """Return what the record says of the framework: ``keras 3.15.1 (jax)``."""
        return f"keras {self.library.__version__} ({self.name})"

    @property
    def ops(self) -> Any:
        """Return the array operations, under the names of ``keras.ops``."""
        return self.library.ops

    @property
    def speaks(self) -> bool:
        """Return whether this process reports: of several that train the same model together, one does."""
        return True

    # what cannot be watched

    def why_no_experiments(self) -> str | None:
        """Return in a sentence why no experiment may run on this model; None when they may."""
        return None

    def why_unseen(self) -> str | None:
        """Return why the statistics of other replicas are not seen; None where they are, or where there are none."""
        return None

    def why_not(self) -> str | None:
        """Return in a sentence why training of this model cannot be watched; None when it can."""
        return None

    def why_not_layer(self, layer: Any) -> str | None:
        """Return why a layer that normalizes cannot be watched; None when it can."""
        if not isinstance(layer, self.library.layers.BatchNormalization):
            return f"{type(layer).__name__} is no {self.library.__name__}.layers.BatchNormalization"
        if not hasattr(layer, "_moments"):
            return f"{type(layer).__name__} of keras {self.library.__version__} does not show its batch statistics"
        return None

    def own_way(self, layer: Any) -> OwnWay | None:
        """Return how a layer normalizes that has a call of its own; None where it shows it, or where nobody knows."""
        return own_way(type(layer), self.library.layers.BatchNormalization)

    def concealed(self, layer: Any) -> dict[str, str]:  # noqa: ARG002 - Keras sees the layers of most backends
        """Return by name what normalizes inside a layer where Keras does not see it, and why it cannot be watched."""
        return {}

    # the tap

    def hooks(self, watched: Watched, record: Record) -> dict[str, Callable[..., Any]]:
        """Return methods to put on a layer, by name, that call ``record`` for every call in training mode."""
        moments = watched.layer._moments  # noqa: SLF001 - the one place where every batch statistic passes

        def hooked(inputs: Any, mask: Any, *args: Any, **kwargs: Any) -> Any:
            mean, var = moments(inputs, mask, *args, **kwargs)
            channels = int(watched.layer.moving_mean.shape[0])
            record(mean, var, lambda: self.elements_per_channel(inputs, mask, channels))
            return mean, var

        return {"_moments": hooked}

    def unseen_by_compilers(self, note: Callable[[Any], None]) -> Callable[[Any], None]:
        """Return a function that takes a note of a call as it is made or traced, and is no part of what is compiled."""
        return note

    def calls_last(self) -> Hashable:
        """Return the traced function for which a note of a call holds, or None where it holds for one step."""
        return self.lane()

    @abstractmethod
    def differentiates(self, inputs: Any) -> bool:
        """Return whether gradients are taken of what is called now: whether it is a training step.

        Args:
            inputs: a nest of what the layer is called with.
        """

    def source(self, layer: Any) -> Source:  # noqa: ARG002 - Keras 2 looks at the layer
        """Return how the batch statistics of a layer are had."""
        return "measured"

    def bessel_corrected(self, layer: Any) -> bool:  # noqa: ARG002 - Keras 2 looks at the layer
        """Return whether the running variance of a layer is kept with m/(m-1)."""
        return False

    @abstractmethod
    def storage(self, guard: Guard) -> Storage:
        """Return an empty storage."""

    @abstractmethod
    def elements_per_channel(self, inputs: Any, mask: Any, channels: int) -> Any:
        """Return over how many elements a channel's statistics are taken; masked elements do not count."""

    def lane(self) -> Hashable:
        """Return which traced function of a hand-written loop this is, or None outside of any."""
        return None

    @property
    def symbolic(self) -> bool:
        """Return whether a call only asks for shapes, as it does where a layer is built by calling it."""
        return False

    def known_everywhere(self, name: str) -> Any:
        """Return what Keras 3 keeps for everybody under a name; None where it has none."""
        return self.library.src.backend.common.global_state.get_global_attribute(name)

    # training

    @abstractmethod
    def functions(self) -> Functions:
        """Return the functions of the model."""

    @abstractmethod
    def keeper(self, guard: Guard) -> Keeper:
        """Return a keeper that has nothing."""

    @property
    def steps_per_execution(self) -> int:
        """Return how many steps one call of the train function takes."""
        return int(self.model.steps_per_execution)

    def metrics(self) -> Mapping[str, Any]:
        """Return the running means of the metrics; reads from the device."""
        found: Mapping[str, Any] = self.model.get_metrics_result()
        return found

    def examples_behind(self) -> int:
        """Return over how many examples the loss was averaged since the metrics were reset; 0 when unknown."""
        count = getattr(getattr(self.model, "_loss_tracker", None), "count", None)
        return 0 if count is None else int(self.values([count])[0])

    @property
    def evaluation_batches(self) -> int:
        """Return how many batches the evaluation that begins has; 0 when unknown."""
        return getattr(getattr(self.model, "_eval_epoch_iterator", None), "num_batches", None) or 0

    @property
    def evaluation_labels(self) -> Any | None:
        """Return the labels of the evaluation data where they are at hand as an array."""
        adapter = getattr(getattr(self.model, "_eval_epoch_iterator", None), "data_adapter", None)
        arrays = getattr(adapter, "_inputs", None)
        if not isinstance(arrays, tuple | list) or len(arrays) < 2 or arrays[1] is None:  # noqa: PLR2004 - (x, y)
            return None
        return getattr(arrays[1], "array", arrays[1])

    # state

    def hold(self, state: Any) -> None:  # noqa: B027 - elsewhere variables hold their values themselves
        """Take the values of the model's variables where a hand-written loop keeps them itself; None lets go of them.

        Args:
            state: of ``trainable_variables`` and of ``non_trainable_variables``, in this order; more is not looked at.
        """

    @property
    def unseen(self) -> str:
        """Return what to do where a hand-written loop shows nothing in its first step."""
        return (
            "enter watch() before the training function is called for the first time, and call the model with "
            "training=True"
        )

    @abstractmethod
    def values(self, variables: Sequence[Any]) -> list[NDArray[Any]]:
        """Return what variables of the model hold now, also in the middle of an epoch."""

    def samples(self, variables: Sequence[Any], limit: int) -> list[NDArray[Any]]:
        """Return at most ``limit`` entries of each variable, evenly spread, as they are now; no more is moved."""
        return [value.reshape(-1)[entries(value.size, limit)] for value in self.values(variables)]

    def assign(self, variable: Any, value: NDArray[Any]) -> None:
        """Give a variable of the model another value, on every replica, between epochs."""
        variable.assign(value)

    @contextmanager
    def preserving(self, variables: Sequence[Any]) -> Iterator[None]:
        """Return a context after which variables hold what they held before, on every replica."""
        before = self.values(variables)
        try:
            yield
        finally:
            for variable, value in zip(variables, before, strict=True):
                self.assign(variable, value)

    # experiments

    @abstractmethod
    def tensors(self, data: Any) -> Any:
        """Return the same nest with tensors for arrays."""

    def to_numpy(self, tensor: Any) -> NDArray[Any]:
        """Return a tensor as an array."""
        array: NDArray[Any] = self.ops.convert_to_numpy(tensor)
        return array

    @abstractmethod
    def quiet(self, body: Callable[..., Any], known: Sequence[Watched]) -> Callable[..., Any]:
        """Return ``body`` as a function that is compiled where the backend compiles, and leaves no trace.

        After each call every variable of the model, every metric and all random state hold what they held before.
        Gradients are off, but inside of `differentiated`. The body takes and returns nests of tensors.

        Args:
            body: calls the model.
            known: layers whose running statistics the body does not move, whatever they are called with.

        Raises:
            ExperimentNotPossibleError: by the function, when the model cannot be run like this.
        """

    @abstractmethod
    def differentiated(self, compute: Callable[[], tuple[Any, Any]], weights: Sequence[Any]) -> tuple[Any, list[Any]]:
        """Return what ``compute`` returns beside a loss, and the gradients of the loss; inside of a quiet body.

        Args:
            compute: returns the loss, a scalar, and a nest of tensors.
            weights: variables of the model; the gradient of one that the loss does not depend on is zero.
        """

    def loss(self, inputs: Any, targets: Any, predicted: Any) -> Any:
        """Return the loss of a batch, as the model computes it."""
        return self.model.compute_loss(inputs, targets, predicted, None, training=False)

    def scaled(self, loss: Any) -> Any:
        """Return a loss as the optimizer scales it: a half-precision gradient that underflows would look like zero."""
        optimizer: Any = getattr(self.model, "optimizer", None)
        return optimizer.scale_loss(loss) if hasattr(optimizer, "scale_loss") else loss

    def place(self) -> Any:
        """Return where in a traced function this is, to ask `visible` later."""
        return None

    def visible(self, output: Any, place: Any) -> bool:  # noqa: ARG002 - TensorFlow looks at the place
        """Return whether a layer's output is a tensor that exists at ``place``: what is inside a loop does not."""
        return hasattr(output, "shape") and hasattr(output, "dtype")

    def batch_moments(self, layer: Any, inputs: Any, mask: Any) -> tuple[Any, Any, Any]:
        """Return mean, biased variance and elements per channel of what enters a layer, past the hooks of a tap."""
        wide = self.ops.cast(inputs, "float64" if "float64" in str(inputs.dtype) else "float32")
        mean, var = type(layer)._moments(layer, wide, mask)  # noqa: SLF001 - the layer's own way to its moments
        return mean, var, self.elements_per_channel(inputs, mask, int(mean.shape[0]))


def trainable_toggled(model: Any) -> bool:
    """Return whether ``trainable`` was set on a layer since ``compile``; functions traced earlier do not know of it."""
    compiled: Any = getattr(model, "_compiled_trainable_state", None)
    if compiled is not None:
        return any(layer.trainable != trainable for layer, trainable in compiled.items())
    # Keras 3.4 takes no note, but its optimizer keeps the variables that it was built for
    optimizer: Any = getattr(model, "optimizer", None)
    built_for: Any = getattr(getattr(optimizer, "inner_optimizer", optimizer), "_trainable_variables", None)
    return bool(built_for) and {id(v) for v in built_for} != {id(v) for v in model.trainable_variables}


@contextmanager
def refused() -> Iterator[None]:
    """Return a context that turns whatever a user's model raises in an experiment into a finding.

    Raises:
        ExperimentNotPossibleError: the model cannot be run like this.
    """
    try:
        yield
    except Exception as error:  # a user's model may do anything: that it cannot be tried is a finding, no failure
        msg = f"the model could not be run for an experiment ({type(error).__name__}: {_essence(str(error))})"
        raise ExperimentNotPossibleError(msg) from error


def _essence(message: str) -> str:
    """Return on one line what went wrong in a user's layer; Keras and autograph tell where it was around that."""
    told = " ".join(message.split()).partition("Arguments received")[0].strip()
    return told if len(told) <= ESSENCE else f"...{told[-ESSENCE:]}"
