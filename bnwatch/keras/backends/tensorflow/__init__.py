"""Keras 3 on TensorFlow."""

from __future__ import annotations

import math
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import tensorflow as tf
from tensorflow.python.pywrap_tfe import TFE_Py_TapeSetIsEmpty

from bnwatch.evidence import entries
from bnwatch.keras.backends.base import TOGGLED, Backend
from bnwatch.keras.backends.tensorflow.functions import TensorFlowFunctions, retracing_changes_training
from bnwatch.keras.backends.tensorflow.keeper import TensorFlowKeeper
from bnwatch.keras.backends.tensorflow.quiet import Quiet, preserved
from bnwatch.keras.backends.tensorflow.replicas import Replicas
from bnwatch.keras.backends.tensorflow.slots import Slots, copies, elements_per_channel, raw
from bnwatch.keras.keep import mapped

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence

    from numpy.typing import NDArray

    from bnwatch.keras.backends.base import Functions, Guard, Keeper, Storage
    from bnwatch.keras.layers import Watched

REPLICAS_SINCE = (3, 15)
"""Older ones compile the step of a replica by itself, which must not be touched (seen in 3.4: training raises)."""


class TensorFlowBackend(Backend):
    """Statistics wait in variables that Keras does not know of; functions are traced anew to contain the tap."""

    name = "tensorflow"

    def __init__(self, model: Any) -> None:
        """Bind to a model; nothing is touched."""
        super().__init__(model)
        self._graphs: list[Any] = []
        self._replicas = Replicas(model.distribute_strategy)

    @property
    def speaks(self) -> bool:
        """Return whether this is the chief of the workers, who all watch: a step they trace differently stops them."""
        resolver = self.model.distribute_strategy.cluster_resolver
        if self._replicas.workers == 1 or resolver is None:
            return True
        return resolver.task_type == "chief" or (resolver.task_type, resolver.task_id) == ("worker", 0)

    def why_not(self) -> str | None:
        """Return in a sentence why training of this model cannot be watched; None when it can."""
        strategy = self.model.distribute_strategy
        if strategy.num_replicas_in_sync > 1 and not isinstance(strategy, tf.distribute.MirroredStrategy):
            return f"bnwatch does not watch training under {type(strategy).__name__}; this training goes on unwatched"
        version: Any = tuple(int(number) for number in self.library.__version__.split(".")[:2])
        if strategy.num_replicas_in_sync > 1 and version < REPLICAS_SINCE:
            since = ".".join(map(str, REPLICAS_SINCE))
            return (
                f"bnwatch watches several replicas in fit() from Keras {since} on, and this is "
                f"{self.library.__version__}; this training goes on unwatched"
            )
        if retracing_changes_training(self.model):
            return TOGGLED
        return None

    def why_no_experiments(self) -> str | None:
        """Return why no experiment may run on this model; None when they may."""
        if self._replicas.workers == 1:
            return None
        return "experiments do not run while several workers train together: one that is late would hold up the others"

    def why_unseen(self) -> str | None:
        """Return why the statistics of other replicas are not seen; None where they are, or where there are none."""
        return None if self._replicas.workers == 1 else "statistics of the other workers are not seen"

    # the tap

    def storage(self, guard: Guard) -> Storage:  # noqa: ARG002 - nothing here runs unguarded
        """Return an empty storage."""
        return Slots(self._replicas)

    def elements_per_channel(self, inputs: Any, mask: Any, channels: int) -> Any:
        """Return over how many elements a channel's statistics are taken; masked elements do not count."""
        return elements_per_channel(inputs, mask, channels)

    def unseen_by_compilers(self, note: Callable[[Any], None]) -> Callable[[Any], None]:
        """Return a function that takes a note of a call; autograph leaves it alone."""
        unconverted: Callable[[Any], None] = tf.autograph.experimental.do_not_convert(note)
        return unconverted

    def differentiates(self, inputs: Any) -> bool:  # noqa: ARG002 - a tape says it
        """Return whether a gradient tape is open."""
        return not TFE_Py_TapeSetIsEmpty()

    def lane(self) -> Hashable:
        """Return which traced function of a hand-written loop this is, or None outside of any."""
        if tf.executing_eagerly():
            return None
        graph = tf.compat.v1.get_default_graph()
        while isinstance(getattr(graph, "outer_graph", None), type(graph)):
            graph = graph.outer_graph
        if not any(graph is known for known in self._graphs):
            self._graphs.append(graph)
        return next(n for n, known in enumerate(self._graphs) if known is graph)

    @property
    def symbolic(self) -> bool:
        """Return whether a call only asks for shapes, as it does where a layer is built by calling it."""
        return not tf.executing_eagerly() and self.known_everywhere("symbolic_scope") is not None

    # training

    def functions(self) -> Functions:
        """Return the functions of the model."""
        return TensorFlowFunctions(self.model)

    def keeper(self, guard: Guard) -> Keeper:
        """Return a keeper that has nothing."""
        return TensorFlowKeeper(guard, self._replicas)

    def metrics(self) -> Mapping[str, Any]:
        """Return the running means of the metrics; none where reading them would wait for other workers."""
        return {} if self._replicas.workers > 1 else super().metrics()

    def examples_behind(self) -> int:
        """Return over how many examples the loss was averaged since the metrics were reset; 0 when unknown."""
        count = getattr(getattr(self.model, "_loss_tracker", None), "count", None)
        return 0 if count is None else self._replicas.workers * int(sum(copy.numpy() for copy in copies(count)))

    # state

    def values(self, variables: Sequence[Any]) -> list[NDArray[Any]]:
        """Return what variables hold now, on the first replica."""
        return [copies(variable)[0].numpy() for variable in variables]

    def samples(self, variables: Sequence[Any], limit: int) -> list[NDArray[Any]]:
        """Return at most ``limit`` entries of each variable, on the first replica."""
        first = [copies(variable)[0] for variable in variables]
        picked = [entries(math.prod(variable.shape), limit) for variable in first]
        flat = [tf.reshape(variable, (-1,)) for variable in first]
        return [tf.gather(values, places).numpy() for values, places in zip(flat, picked, strict=True)]

    def assign(self, variable: Any, value: NDArray[Any]) -> None:
        """Give a variable of the model another value, on every replica."""
        for copy in copies(variable):
            copy.assign(value)

    @contextmanager
    def preserving(self, variables: Sequence[Any]) -> Iterator[None]:
        """Return a context after which variables hold what they held before, on every replica."""
        with preserved([copy for variable in variables for copy in copies(variable)]):
            yield

    # experiments

    def tensors(self, data: Any) -> Any:
        """Return the same nest with tensors for arrays."""
        return mapped(self._tensor, data)

    def _tensor(self, leaf: Any) -> Any:
        tensor, wanted = tf.convert_to_tensor(leaf), self.library.backend.floatx()
        return tf.cast(tensor, wanted) if tensor.dtype.is_floating and tensor.dtype != wanted else tensor

    def quiet(self, body: Callable[..., Any], known: Sequence[Watched]) -> Callable[..., Any]:
        """Return ``body`` compiled, and without a trace in the model."""
        return Quiet(body, self._state, known)

    def _state(self) -> list[Any]:
        """Return the variables of the model that inference could move."""
        loss = getattr(self.model, "_compile_loss", None)
        metrics = [*getattr(self.model, "metrics", ()), *getattr(loss, "metrics", ())]
        found = [*self.model.non_trainable_variables, *(v for metric in metrics for v in metric.variables)]
        return list({id(v): v for v in found}.values())

    def differentiated(self, compute: Callable[[], tuple[Any, Any]], weights: Sequence[Any]) -> tuple[Any, list[Any]]:
        """Return what ``compute`` returns beside a loss, and the gradients of the loss."""
        with tf.GradientTape() as tape:
            loss, found = compute()
        zero = tf.UnconnectedGradients.ZERO
        gradients = tape.gradient(loss, [raw(weight) for weight in weights], unconnected_gradients=zero)
        return found, [tf.convert_to_tensor(gradient) for gradient in gradients]

    def place(self) -> Any:
        """Return the graph that is being traced."""
        return tf.compat.v1.get_default_graph()

    def visible(self, output: Any, place: Any) -> bool:
        """Return whether a layer's output is a tensor of that graph."""
        return isinstance(output, tf.Tensor) and output.graph is place and output.shape.rank is not None
