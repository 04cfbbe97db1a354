"""Which Keras a model belongs to: Keras 3, or the Keras 2 of TensorFlow 2.15 and of the package tf-keras.

Several may be installed side by side, so it is the model that says.
"""

from __future__ import annotations

import importlib
from importlib.util import find_spec
from typing import Any

LEGACY = "keras 2"
"""Name of Keras 2 as a backend: it runs on TensorFlow, in a way of its own."""


def installed() -> Any:
    """Return the module that a callback is made of: ``keras``, or ``tf_keras`` where that is the only one."""
    return importlib.import_module("keras" if find_spec("keras") is not None else "tf_keras")


def library_of(model: Any) -> Any:
    """Return the module, ``keras`` or ``tf_keras``, that a model or layer is made of."""
    roots = [kind.__module__.partition(".")[0] for kind in type(model).__mro__]
    return importlib.import_module("tf_keras" if "tf_keras" in roots else "keras")


def backend_name(model: Any) -> str:
    """Return ``tensorflow``, ``jax``, ``torch``, or `LEGACY`."""
    library = library_of(model)
    return LEGACY if is_legacy(library) else str(library.backend.backend())


def is_legacy(library: Any) -> bool:
    """Return whether a Keras module is Keras 2."""
    return str(library.__version__).startswith("2.")
