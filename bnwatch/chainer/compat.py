"""Lets Chainer 7.8.1, the last release, be imported where NumPy 2 or Python 3.12 took away what it asks for.

    import bnwatch.chainer.compat

    bnwatch.chainer.compat.install()
    import chainer

Two things are added, each only where it is missing, and nothing else is touched:

- ``numpy.sctypes``, gone in NumPy 2.0, which ``F.as_strided`` reads;
- an empty ``chainer._environment_check``, in place of one that needs ``numpy.distutils`` and ``pkg_resources`` (gone in
  Python 3.12, setuptools 74 and 82) only to warn of old CuPy wheels and of Accelerate on macOS.

What is left as it is: ``F.resize_images`` and its gradient ask for ``numpy.float``, gone in NumPy 1.24, and
``chainer.testing``, which the tests of Chainer and of its users import, for ``pkg_resources`` (setuptools before 82).
"""

from __future__ import annotations

import sys
import warnings
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType

_CHECK = "chainer._environment_check"


def install() -> tuple[str, ...]:
    """Add what Chainer misses here, and return what was added: nothing where nothing is missing, or the second time.

    Raises:
        RuntimeError: an import of Chainer was already tried, and something is missing: it comes too late.
    """
    missing = _missing()
    if missing and _tried():
        msg = (
            f"call bnwatch.chainer.compat.install() before the first `import chainer`, in a new Python: "
            f"{', '.join(missing)} is missing"
        )
        raise RuntimeError(msg)
    for name in missing:
        _ADD[name]()
    return missing


def require() -> None:
    """See to it that Chainer can be imported, before an import that fails half-way leaves it in pieces.

    Raises:
        ImportError: Chainer is installed and something is missing that `install` would add.
    """
    if "chainer" in sys.modules or find_spec("chainer") is None:
        return
    missing = _missing()
    if missing:
        msg = f"Chainer misses {', '.join(missing)} here: call bnwatch.chainer.compat.install() before"
        raise ImportError(msg)


def _tried() -> bool:
    """Return whether Chainer was imported, or an import failed: one leaves its submodules, and cannot be repeated."""
    return any(name.partition(".")[0] == "chainer" for name in sys.modules if name != _CHECK)


def _missing() -> tuple[str, ...]:
    import numpy as np

    missing = []
    if not hasattr(np, "sctypes") and int(np.__version__.split(".")[0]) >= 2:  # noqa: PLR2004
        missing.append("numpy.sctypes")
    if _CHECK not in sys.modules and not _check_imports():
        missing.append(_CHECK)
    return tuple(missing)


def _check_imports() -> bool:
    try:
        with warnings.catch_warnings():  # an old one, of what Chainer imports anyway, is nothing missing
            warnings.simplefilter("ignore")
            import_module("numpy.distutils.system_info")
            import_module("pkg_resources")
    except Exception:  # noqa: BLE001 - setuptools breaks them in many ways: any of them means that it cannot be had
        return False
    return True


def _add_sctypes() -> None:
    import numpy as np

    np.sctypes = {  # type: ignore[attr-defined,unused-ignore]  # noqa: NPY201
        "int": [np.int8, np.int16, np.int32, np.int64],
        "uint": [np.uint8, np.uint16, np.uint32, np.uint64],
        "float": [np.float16, np.float32, np.float64],
        "complex": [np.complex64, np.complex128],
        "others": [bool, object, bytes, str, np.void],
    }


def _add_check() -> None:
    module = ModuleType(_CHECK, "Empty: bnwatch.chainer.compat put it here.")
    module.check = lambda: None  # type: ignore[attr-defined]
    sys.modules[_CHECK] = module


_ADD = {"numpy.sctypes": _add_sctypes, _CHECK: _add_check}
