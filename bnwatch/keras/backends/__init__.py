"""What differs between the backends of Keras, one module or package each, behind `Backend`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from bnwatch.keras.library import LEGACY, backend_name

if TYPE_CHECKING:
    from bnwatch.keras.backends.base import Backend


def backend_of(model: Any) -> Backend:
    """Return the backend of the Keras that a model belongs to, bound to that model.

    Raises:
        NotImplementedError: bnwatch does not know that backend; one sentence says so.
    """
    name = backend_name(model)
    if name == "tensorflow":
        from bnwatch.keras.backends.tensorflow import TensorFlowBackend

        return TensorFlowBackend(model)
    if name == "jax":
        from bnwatch.keras.backends.jax import JaxBackend

        return JaxBackend(model)
    if name == "torch":
        from bnwatch.keras.backends.torch import TorchBackend

        return TorchBackend(model)
    if name == LEGACY:
        from bnwatch.keras.backends.legacy import LegacyBackend

        return LegacyBackend(model)
    msg = f"bnwatch does not watch Keras on {name}; this training goes on unwatched"
    raise NotImplementedError(msg)
