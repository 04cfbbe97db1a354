"""Keras 3 on PyTorch: everything runs eagerly, so the tap sees every call and keeps references to what it computed."""

from __future__ import annotations

from contextlib import ExitStack, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.nn.parallel import DistributedDataParallel

from bnwatch.evidence import entries
from bnwatch.keras.backends.base import Backend, Reading, Stored, refused
from bnwatch.keras.keep import HostKeeper, leaves, mapped

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Iterator, Sequence

    from numpy.typing import NDArray

    from bnwatch.keras.backends.base import Calls, Functions, Guard, Keeper, Record, Storage
    from bnwatch.keras.layers import Watched


class TorchBackend(Backend):
    """Statistics wait as references to the tensors of the layer: no kernel is launched for them."""

    name = "torch"

    def __init__(self, model: Any) -> None:
        """Bind to a model, also to one that is wrapped to train in several processes; nothing is touched."""
        super().__init__(model.module if isinstance(model, DistributedDataParallel) else model)
        self._slots = Slots()
        self._guard: Guard = lambda _: nullcontext()

    @property
    def speaks(self) -> bool:
        """Return whether this process has rank 0, where several train together."""
        distributed = torch.distributed
        return not (distributed.is_available() and distributed.is_initialized()) or distributed.get_rank() == 0

    def concealed(self, layer: Any) -> dict[str, str]:
        """Return the batch normalization of PyTorch inside a layer that wraps a module."""
        module = getattr(layer, "module", None)
        if not isinstance(module, torch.nn.Module):
            return {}
        reason = "torch.nn.{} normalizes inside of PyTorch, where Keras does not show its batch statistics"
        return {
            name or type(inner).__name__: reason.format(type(inner).__name__)
            for name, inner in module.named_modules()
            if "BatchNorm" in type(inner).__name__
        }

    # the tap

    def hooks(self, watched: Watched, record: Record) -> dict[str, Callable[..., Any]]:
        """Return methods to put on a layer, by name, that call ``record`` for every call in training mode."""

        # torch.compile leaves it alone: what is noted on the host is no part of a compiled step
        @torch.compiler.disable  # type: ignore[untyped-decorator,unused-ignore]
        def recorded(mean: Any, var: Any, count: Callable[[], Any]) -> None:
            with self._guard("recording batch statistics"):
                if recomputing():
                    self._slots.again(watched)
                elif not self._symbolic(mean):
                    record(mean, var, count)

        return super().hooks(watched, recorded)

    def unseen_by_compilers(self, note: Callable[[Any], None]) -> Callable[[Any], None]:
        """Return a function that takes a note of a call; none where that would be a hole in what is compiled."""

        def noted(inputs: Any) -> None:
            if not torch.compiler.is_compiling():
                tensors = [leaf for leaf in leaves(inputs) if isinstance(leaf, torch.Tensor)]
                if not any(map(self._symbolic, tensors)):
                    note(inputs)

        return noted

    def differentiates(self, inputs: Any) -> bool:  # noqa: ARG002 - PyTorch knows
        """Return whether gradients are on."""
        return bool(torch.is_grad_enabled())

    def _symbolic(self, mean: Any) -> bool:
        """Return whether a call only asks for shapes, on the ``meta`` device or where that would not do."""
        return bool(mean.is_meta) or self.known_everywhere("symbolic_scope") is not None

    def storage(self, guard: Guard) -> Storage:
        """Return an empty storage."""
        self._slots, self._guard = Slots(), guard
        return self._slots

    def elements_per_channel(self, inputs: Any, mask: Any, channels: int) -> Any:
        """Return over how many elements a channel's statistics are taken; masked elements do not count."""
        if mask is None:
            return inputs.numel() // channels
        kept = torch.as_tensor(mask, device=inputs.device).bool().unsqueeze(-1).expand(inputs.shape)
        return torch.count_nonzero(kept) // channels

    # training

    def functions(self) -> Functions:
        """Return the functions of the model."""
        return TorchFunctions(self.model)

    def keeper(self, guard: Guard) -> Keeper:
        """Return a keeper that has nothing."""
        return HostKeeper(guard, copied)

    # state

    def values(self, variables: Sequence[Any]) -> list[NDArray[Any]]:
        """Return what variables hold now."""
        return on_host([raw(variable) for variable in variables])

    def samples(self, variables: Sequence[Any], limit: int) -> list[NDArray[Any]]:
        """Return at most ``limit`` entries of each variable."""
        flat = [raw(variable).detach().reshape(-1) for variable in variables]
        picked = [torch.from_numpy(entries(tensor.numel(), limit)).to(tensor.device) for tensor in flat]
        return on_host([tensor[places] for tensor, places in zip(flat, picked, strict=True)])

    # experiments

    def tensors(self, data: Any) -> Any:
        """Return the same nest with tensors, on the device that Keras uses, for arrays."""
        return mapped(self._tensor, data)

    def _tensor(self, leaf: Any) -> Any:
        tensor = self.ops.convert_to_tensor(leaf)
        return self.ops.cast(tensor, self.library.backend.floatx()) if tensor.is_floating_point() else tensor

    def quiet(self, body: Callable[..., Any], known: Sequence[Watched]) -> Callable[..., Any]:
        """Return ``body`` as an eager function without a trace in the model."""
        still = {id(v) for watched in known for v in watched.layer.non_trainable_variables}

        def run(*arguments: Any) -> Any:
            with refused(), self._preserved(still), torch.no_grad():
                return body(*arguments)

        return run

    @contextmanager
    def _preserved(self, still: set[int]) -> Iterator[None]:
        """Return a context in evaluation mode, after which state, modes and random state are what they were.

        Args:
            still: identities of variables that are known not to be moved.
        """
        model = self.model
        modules = list(model.modules())
        modes = [module.training for module in modules]
        tensors = [raw(variable) for variable in self._state() if id(variable) not in still] + list(model.buffers())
        devices = {tensor.device for tensor in [*model.parameters(), *tensors]} - {torch.device("cpu")}
        before = [tensor.detach().clone() for tensor in tensors]
        with ExitStack() as stack:
            stack.enter_context(torch.random.fork_rng(devices=[]))
            for device in devices:
                stack.enter_context(torch.random.fork_rng(devices=[device], device_type=device.type))
            try:
                model.eval()
                yield
            finally:
                for module, mode in zip(modules, modes, strict=True):
                    module.training = mode
                with torch.no_grad():
                    for tensor, value in zip(tensors, before, strict=True):
                        tensor.copy_(value)

    def _state(self) -> list[Any]:
        """Return the variables that inference could move."""
        model = self.model
        loss = getattr(model, "_compile_loss", None)
        metrics = [*getattr(model, "metrics", ()), *getattr(loss, "metrics", ())]
        found = [*model.non_trainable_variables, *(v for metric in metrics for v in metric.variables)]
        # layers that are given no seed share a generator; asking Keras for it would make one
        shared = self.known_everywhere("global_seed_generator")
        return list({id(v): v for v in [*found, *([] if shared is None else [shared.state])]}.values())

    def differentiated(self, compute: Callable[[], tuple[Any, Any]], weights: Sequence[Any]) -> tuple[Any, list[Any]]:
        """Return what ``compute`` returns beside a loss, and the gradients of the loss; ``.grad`` is not touched."""
        tensors = [raw(weight) for weight in weights]
        with torch.enable_grad():
            loss, found = compute()
            connected = loss.requires_grad and tensors
            gradients = torch.autograd.grad(loss, tensors, allow_unused=True) if connected else [None] * len(tensors)
        zero = torch.zeros_like
        return found, [
            zero(t) if gradient is None else gradient for t, gradient in zip(tensors, gradients, strict=True)
        ]


def recomputing() -> bool:
    """Return whether a backward pass runs: what calls a layer there is a checkpoint that computes its block again.

    PyTorch's own checkpoints ask the same.
    """
    return bool(torch._C._current_graph_task_id() != -1)  # noqa: SLF001


def raw(variable: Any) -> Any:
    """Return the tensor behind a variable of Keras."""
    return variable.value


def on_host(tensors: Sequence[Any]) -> list[NDArray[Any]]:
    """Return tensors as arrays: one concatenation and one copy for each device and data type."""
    groups: dict[tuple[Any, Any], list[int]] = {}
    for n, tensor in enumerate(tensors):
        groups.setdefault((tensor.device, tensor.dtype), []).append(n)
    # every device is set to work before the first is waited for
    flat = [torch.cat([tensors[n].detach().reshape(-1) for n in members]) for members in groups.values()]
    found: dict[int, NDArray[Any]] = {}
    for members, joined in zip(groups.values(), flat, strict=True):
        wide = joined.float() if joined.dtype == torch.bfloat16 else joined
        sizes = [tensors[n].numel() for n in members]
        parts = np.split(wide.cpu().numpy(), np.cumsum(sizes)[:-1])
        found.update((n, part.reshape(tensors[n].shape)) for n, part in zip(members, parts, strict=True))
    return [found[n] for n in range(len(tensors))]


def copied(batch: Any) -> Any | None:
    """Return a copy of a batch, or None if some of it is no array."""
    if not all(isinstance(leaf, torch.Tensor | np.ndarray) for leaf in leaves(batch)):
        return None
    return mapped(lambda leaf: leaf.clone() if isinstance(leaf, torch.Tensor) else leaf.copy(), batch)


class Slot:
    """The last batch statistics of one call site."""

    def __init__(self, watched: Watched) -> None:
        """Begin without any."""
        self.watched = watched
        self.mean: Any = None
        self.var: Any = None
        self.count: Any = 0
        self.calls = 0


class Slots:
    """The slots of a model; calls are counted on the host, for the step itself runs there."""

    outgrown = False

    def __init__(self) -> None:
        """Begin with none."""
        self._slots: dict[Hashable, Slot] = {}
        self._latest: dict[int, Slot] = {}

    def put(self, key: Hashable, watched: Watched, mean: Any, var: Any, count: Callable[[], Any]) -> None:
        """Store the statistics of a call and count it."""
        slot = self._slots.get(key)
        if slot is None:
            slot = self._slots[key] = Slot(watched)
        slot.mean, slot.var, slot.count = mean.detach(), var.detach(), count()
        slot.calls += 1
        self._latest[id(watched)] = slot

    def again(self, watched: Watched) -> None:
        """Count a call that was computed again for its gradients: it moves the running statistics once more."""
        slot = self._latest.get(id(watched))
        if slot is not None:
            slot.calls += 1

    def read(self) -> Reading:
        """Return what is stored now."""
        slots = list(self._slots.values())
        layers = list({id(slot.watched): slot.watched for slot in slots}.values())
        statistics = [raw(v) for watched in layers for v in (watched.layer.moving_mean, watched.layer.moving_variance)]
        counts = [slot.count for slot in slots if isinstance(slot.count, torch.Tensor)]
        arrays = iter(on_host([*(t for slot in slots for t in (slot.mean, slot.var)), *statistics, *counts]))
        moments = [(next(arrays).reshape(-1), next(arrays).reshape(-1)) for _ in slots]
        running = {id(watched): (next(arrays), next(arrays)) for watched in layers}
        stored = tuple(
            Stored(
                key,
                slot.watched,
                *found,
                int(next(arrays)) if isinstance(slot.count, torch.Tensor) else slot.count,
                slot.calls,
            )
            for (key, slot), found in zip(self._slots.items(), moments, strict=True)
        )
        return Reading(stored, running)

    def counted(self) -> Callable[[], Calls]:
        """Note how often each call site was called, which the host knows."""
        calls = {(key, 0): slot.calls for key, slot in self._slots.items()}
        return lambda: calls

    @property
    def recorded(self) -> bool:
        """Return whether anything was ever stored."""
        return bool(self._slots)

    def grow(self) -> None:
        """Nothing is to be made ahead."""

    def release(self) -> None:
        """Nothing hangs on the model."""


class TorchFunctions:
    """Passes the batches of a model by the keepers; its steps find the tap by themselves, for they run eagerly."""

    def __init__(self, model: Any) -> None:
        """Remember the functions as they are."""
        self._model = model
        self._saved = {name: getattr(model, name) for name in ("train_function", "test_function")}
        self._made: dict[str, Any] = {}

    def make(self, training: HostKeeper | None, evaluation: HostKeeper | None) -> None:
        """Put the keepers before the functions."""
        for (name, saved), keeper in zip(self._saved.items(), (training, evaluation), strict=True):
            if keeper is None or name in self._made:
                continue
            if saved is None:
                getattr(self._model, f"make_{name}")()
            self._made[name] = _passing(getattr(self._model, name), keeper)
            setattr(self._model, name, self._made[name])

    def restore(self) -> None:
        """Put the functions back, but those that somebody else made meanwhile."""
        for name, made in self._made.items():
            if getattr(self._model, name) is made:
                setattr(self._model, name, self._saved[name])


def _passing(function: Any, keeper: HostKeeper) -> Callable[[Any], Any]:
    """Return a function of the batches of a step that passes them by a keeper."""

    def passing(batches: Any) -> Any:
        keeper.note(batches[0])
        return function(batches)

    return passing
