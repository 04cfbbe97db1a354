from __future__ import annotations

import subprocess
import sys

import pytest

from tests.adapters import PLAIN

# What Chainer's own import brings, so that only the difference that compat makes is left.
ALREADY = """
import sys, warnings
warnings.simplefilter("ignore")
import numpy
try:
    import numpy.distutils.system_info, pkg_resources
except Exception:
    pass
"""

TRAIN = """
import numpy as np, chainer, chainer.links as L, chainer.functions as F
x = chainer.Variable(np.ones((4, 3), "f"))
F.sum(F.as_strided(L.Linear(3, 2)(x), (2, 2), (2, 1))).backward()
"""


def completed(program: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, timeout=120)


def run(program: str) -> str:
    done = completed(program)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.fixture(scope="module")
def missing() -> tuple[str, ...]:
    """What compat adds here, in the order in which it says so."""
    return tuple(run(f"{ALREADY}from bnwatch.chainer import compat; print(*compat.install())").split())


@pytest.mark.parametrize("statement", ["import bnwatch", "import bnwatch.chainer", "import bnwatch.chainer.compat"])
def test_an_import_alone_imports_no_chainer_and_patches_nothing(statement: str) -> None:
    assert (
        run(f"""
import sys, numpy
before = dict(vars(numpy))
{statement}
after = dict(vars(numpy))
assert [m for m in sys.modules if m.split(".")[0] in ("chainer", "cupy", "pkg_resources")] == []
assert [m for m in sys.modules if m.startswith("numpy.distutils")] == []
assert before.keys() == after.keys()
assert all(before[name] is after[name] for name in before)
print("ok")
""")
        == "ok"
    )


def test_the_front_door_is_listed_before_chainer_is_imported() -> None:
    assert run("import bnwatch.chainer; print('watch' in dir(bnwatch.chainer))") == "True"


def test_install_adds_what_it_says_and_nothing_else(missing: tuple[str, ...]) -> None:
    out = run(f"""{ALREADY}
import bnwatch.chainer.compat
attributes, modules = dict(vars(numpy)), dict(sys.modules)
path, hooks, filters = list(sys.path), list(sys.meta_path), list(warnings.filters)
bnwatch.chainer.compat.install()
assert all(vars(numpy)[name] is value for name, value in attributes.items())
assert all(sys.modules[name] is value for name, value in modules.items())
assert (path, hooks, filters) == (sys.path, sys.meta_path, warnings.filters)
added = [f"numpy.{{name}}" for name in vars(numpy) if name not in attributes]
print(*sorted(added + [name for name in sys.modules if name not in modules]))
""")
    assert out.split() == sorted(missing)


def test_help_is_given_exactly_where_chainer_does_not_import_without_it(missing: tuple[str, ...]) -> None:
    done = completed("import chainer")
    assert (done.returncode == 0) == (missing == ()), done.stderr
    assert not (PLAIN and missing), "a machine without help was wanted"


def test_only_two_things_can_be_missing(missing: tuple[str, ...]) -> None:
    assert set(missing) <= {"numpy.sctypes", "chainer._environment_check"}


def test_a_second_install_does_nothing_and_chainer_trains() -> None:
    assert run(f"""{ALREADY}
from bnwatch.chainer import compat
compat.install()
assert compat.install() == ()
{TRAIN}
assert compat.install() == ()
print("ok")
""").endswith("ok")


def test_too_late_is_said_in_one_sentence(missing: tuple[str, ...]) -> None:
    """Also after an import that failed: what it leaves behind cannot be imported again."""
    out = run(f"""{ALREADY}
try:
    import chainer
except Exception:
    assert "chainer" not in sys.modules
from bnwatch.chainer import compat
try:
    print("added", compat.install())
except RuntimeError as error:
    print(error)
""")
    if missing:
        assert out == (
            "call bnwatch.chainer.compat.install() before the first `import chainer`, in a new Python: "
            f"{', '.join(missing)} is missing"
        )
    else:
        assert out == "added ()"


def test_the_front_door_says_in_one_sentence_that_help_is_needed(missing: tuple[str, ...]) -> None:
    done = completed("from bnwatch.chainer import BatchNormWatch")
    if missing:
        assert done.stderr.splitlines()[-1] == (
            f"ImportError: Chainer misses {', '.join(missing)} here: call bnwatch.chainer.compat.install() before"
        )
    else:
        assert done.returncode == 0, done.stderr


def test_the_front_door_spoils_nothing_when_it_says_so() -> None:
    assert run(f"""{ALREADY}
from bnwatch.chainer import compat
try:
    from bnwatch.chainer import watch
except ImportError:
    compat.install()
from bnwatch.chainer import watch
{TRAIN}
print(watch.__name__)
""").endswith("watch")


def test_a_program_without_chainer_is_told_so_and_nothing_of_compat() -> None:
    done = completed("import sys; sys.modules['chainer'] = None; from bnwatch.chainer import watch")
    assert done.stderr.splitlines()[-1].startswith("ModuleNotFoundError: ")
    assert "compat" not in done.stderr.splitlines()[-1]


def test_an_unknown_name_is_an_attribute_error() -> None:
    import bnwatch.chainer

    with pytest.raises(AttributeError, match="no attribute 'wach'"):
        _ = bnwatch.chainer.wach
