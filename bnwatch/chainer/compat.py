"""Lets Chainer 7.8.1, the last release, be imported where NumPy 2 or Python 3.12 took away what it asks for.

    import bnwatch.chainer.compat

    bnwatch.chainer.compat.install()
    import chainer

Two things are added, each only where it is missing, and nothing else is touched:

- ``numpy.sctypes``, gone in NumPy 2.0, which ``F.as_strided`` reads;
- an empty ``chainer._environment_check``, in place of one that needs ``numpy.distutils`` and ``pkg_resources`` (gone in
  Python 3.12, setuptools 74 and 82) only to warn of old CuPy wheels and of Accelerate on macOS.
"""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType

_CHECK = "chainer._environment_check"


def install() -> tuple[str, ...]:
    """Add what Chainer misses here, and return what was added: nothing where nothing is missing, or the second time.

    Raises:
        RuntimeError: an import of Chainer was already tried, and something is missing: it comes too late.
    """
    missing = _missing()
    if missing and "chainer" in sys.modules:
        msg = (
            f"call bnwatch.chainer.compat.install() before the first `import chainer`: {', '.join(missing)} is missing"
        )
        raise RuntimeError(msg)
    for name in missing:
        _ADD[name]()
    return missing


def _missing() -> tuple[str, ...]:
    import numpy as np

    missing = []
    if not hasattr(np, "sctypes") and int(np.__version__.split(".")[0]) >= 2:  # noqa: PLR2004
        missing.append("numpy.sctypes")
    if _CHECK not in sys.modules and not _check_imports():
        missing.append(_CHECK)
    return tuple(missing)


def _check_imports() -> bool:
    if sys.version_info >= (3, 12):
        return False
    try:
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
