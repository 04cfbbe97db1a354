from __future__ import annotations

import subprocess
import sys

import pytest


def run(program: str) -> str:
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_importing_bnwatch_chainer_imports_no_chainer_and_patches_nothing() -> None:
    assert (
        run("""
import sys, numpy, warnings
warnings.simplefilter("ignore")
before = set(vars(numpy)), hasattr(numpy, "sctypes")
import bnwatch, bnwatch.chainer, bnwatch.chainer.compat
after = set(vars(numpy)), hasattr(numpy, "sctypes")
assert [m for m in sys.modules if m.split(".")[0] in ("chainer", "cupy", "numpy.distutils")] == []
assert before == after
assert "watch" in dir(bnwatch.chainer)
print("ok")
""")
        == "ok"
    )


def test_install_says_what_it_did_once_and_chainer_trains() -> None:
    out = run("""
import warnings
warnings.simplefilter("ignore")
from bnwatch.chainer import compat
first, second = compat.install(), compat.install()
assert second == (), second
import numpy as np, chainer, chainer.links as L, chainer.functions as F
assert compat.install() == ()
x = chainer.Variable(np.ones((4, 3), "f"))
F.sum(F.as_strided(L.Linear(3, 2)(x), (2, 2), (2, 1))).backward()
print(",".join(first))
""")
    assert set(out.split(",")) <= {"", "numpy.sctypes", "chainer._environment_check"}


def test_too_late_is_said_in_one_sentence() -> None:
    out = run("""
import sys, types, warnings
warnings.simplefilter("ignore")
sys.modules["chainer"] = types.ModuleType("chainer")
from bnwatch.chainer import compat
try:
    done = compat.install()
    assert done == ()
    print("nothing missing")
except RuntimeError as error:
    print(error)
""")
    assert out == "nothing missing" or out.startswith("call bnwatch.chainer.compat.install() before the first")


def test_an_unknown_name_is_an_attribute_error() -> None:
    import bnwatch.chainer

    with pytest.raises(AttributeError, match="no attribute 'wach'"):
        _ = bnwatch.chainer.wach
