"""Lines of the user's code: their names, and from which of them something is called."""

from __future__ import annotations

import importlib
import sys
import sysconfig
import textwrap
from pathlib import Path

import pytest

from bnwatch import lines
from bnwatch.lines import NOWHERE, Callers, Trail, merged, named, told_apart


def trail(*names, direct=True):
    return Trail(names, direct)


@pytest.mark.parametrize(
    ("trails", "expected"),
    [
        ([trail("a:1")], ("a:1",)),
        ([trail("a:1", "b:2")], ("a:1",)),
        ([trail("a:1", direct=False)], (None,)),
        ([trail("a:1"), trail("a:2")], ("a:1", "a:2")),
        # a block that is called twice
        ([trail("a:1", "b:2"), trail("a:1", "b:3")], ("b:2", "b:3")),
        ([trail("b:2", direct=False), trail("b:3", direct=False)], ("b:2", "b:3")),
        # two of its calls, one of them twice
        ([trail("a:1", "b:2"), trail("a:1", "b:3"), trail("a:4", "b:3")], ("b:2", "a:1", "a:4")),
        # a loop, and a graph that calls a layer twice
        ([trail("a:1", "b:2")] * 2, ("a:1", "a:1")),
        ([trail("b:2", direct=False)] * 2, (None, None)),
        ([NOWHERE, trail("a:1")], (None, "a:1")),
        ([], ()),
    ],
)
def test_call_sites_are_told_apart_by_the_innermost_line_that_does(trails, expected):
    assert told_apart(trails) == expected


@pytest.mark.parametrize(
    ("known", "found", "expected"),
    [
        ((), ("a:1", None), ("a:1", None)),
        (("a:1", "a:2"), ("a:1", "a:2"), ("a:1", "a:2")),
        (("a:1", "a:2"), ("a:3",), (None, "a:2")),
        (("a:1",), ("a:1", "a:2"), ("a:1", "a:2")),
        ((None,), ("a:1",), (None,)),
    ],
)
def test_a_call_site_that_moves_has_no_line(known, found, expected):
    assert merged(known, found) == expected
    assert merged(expected, found) == expected


def test_a_line_is_named_from_where_the_program_runs(tmp_path, monkeypatch):
    (tmp_path / "nets").mkdir()
    for name in ("nets/net.py", "o:d d\n\x1b\u202e.py"):
        (tmp_path / name).write_text("")
    monkeypatch.chdir(tmp_path)
    assert named(str(tmp_path / "nets" / "net.py"), 7) == str(Path("nets/net.py")) + ":7"
    assert named("nets/net.py", 7) == str(Path("nets/net.py")) + ":7"
    assert named(str(tmp_path / "o:d d\n\x1b\u202e.py"), 7) == "o:d d\n\x1b\u202e.py:7"
    monkeypatch.chdir(tmp_path / "nets")
    assert named(str(tmp_path / "o:d d\n\x1b\u202e.py"), 7) == f"{tmp_path}/o:d d\n\x1b\u202e.py:7"


@pytest.mark.parametrize("filename", ["<stdin>", "<ipython-input-1-abc>", "gone.py", "", "\0", "\ud800.py", "/"])
def test_what_is_no_file_has_no_name(filename):
    assert named(filename, 1) is None


def test_a_directory_that_is_gone_names_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tmp_path.rmdir()
    assert named(__file__, 1) is None


@pytest.mark.parametrize(
    ("filename", "expected"),
    [
        (lines.__file__, True),
        (importlib.__file__, True),
        (sysconfig.get_path("purelib") + "/keras/src/layers/layer.py", True),
        ("/usr/lib/python3/dist-packages/chainer/link.py", True),
        ("<frozen importlib._bootstrap>", True),
        (__file__, False),
        ("<stdin>", False),
        ("/home/me/site-packages.py", False),
    ],
)
def test_what_is_installed_is_none_of_the_users_own(filename, expected):
    assert lines.installed(filename) is expected


LIBRARY = """
import sys

class Layer:
    def __init__(self, *inside): self.inside = inside
    def __call__(self, x, callers): return self.call(x, callers)
    def call(self, x, callers): return [one(x, callers) for one in self.inside]

class Norm(Layer):
    def call(self, x, callers): return callers.trail(sys._getframe(), type(self))

def fit(model, callers): return model(0, callers)
"""
PROGRAM = """
from installed import Layer, Norm, fit

class Own(Norm):
    def call(self, x, callers):
        return super().call(x, callers)

def helper(layer, callers):
    return layer(0, callers)

class Net(Layer):
    def call(self, x, callers):
        first = self.inside[0](x, callers)
        return (first,
                helper(self.inside[0], callers))

def deep(net, callers, depth):
    return deep(net, callers, depth - 1) if depth else net(0, callers)
"""


@pytest.fixture
def program(tmp_path, monkeypatch):
    """Return a program on a framework in which any layer is called by one method."""
    (tmp_path / "site-packages").mkdir()
    (tmp_path / "site-packages" / "installed.py").write_text(LIBRARY)
    (tmp_path / "program.py").write_text(PROGRAM)
    monkeypatch.chdir(tmp_path)
    for directory in (tmp_path, tmp_path / "site-packages"):
        monkeypatch.syspath_prepend(directory)
    yield importlib.import_module("program")
    for name in ("program", "installed"):
        del sys.modules[name]


def callers(program, *until, generated=None):
    return Callers({program.Layer.__call__.__code__}, {one.__code__ for one in until}, generated)


@pytest.mark.parametrize("kind", ["Norm", "Own"])
def test_the_way_to_a_layer(program, kind):
    """Methods of the layer itself, the user's too, are not where it is called from."""
    net = program.Net(getattr(program, kind)())
    first, second = program.fit(net, callers(program, program.fit))
    assert first == Trail(("program.py:13",), direct=True)
    assert second == Trail(("program.py:9", "program.py:15"), direct=True)
    assert told_apart([first, second]) == ("program.py:13", "program.py:9")


def test_what_a_container_calls_is_not_called_by_the_line_that_calls_the_container(program):
    ((found,),) = program.helper(program.Layer(program.Layer(program.Norm())), callers(program, program.fit))
    assert (found.lines[0], found.direct) == ("program.py:9", False)


def test_nothing_beyond_the_steps_of_the_framework_counts(program):
    (found,) = program.fit(program.Layer(program.Norm()), callers(program, program.fit))
    assert found == NOWHERE
    (found,) = program.fit(program.Layer(program.Norm()), callers(program))
    assert found.lines[0].startswith(str(Path(__file__)).removeprefix(str(Path.cwd()) + "/"))


def test_the_way_ends_at_code_that_has_no_file_or_was_generated(program, tmp_path):
    space = dict(vars(program))
    exec("def call(layer, callers): return layer(0, callers)", space)  # noqa: S102 - code that has no file of its own
    assert space["call"](program.Norm(), callers(program)) == NOWHERE
    assert program.helper(program.Norm(), callers(program, generated="prog")) == NOWHERE
    written = tmp_path / "net.py"
    written.write_text(
        textwrap.dedent("""
        def call(helper, layer, callers):
            return helper(layer, callers)
    """)
    )
    exec(compile(written.read_text(), str(written), "exec"), space)  # noqa: S102 - code that has no file of its own
    found = space["call"](program.helper, program.Norm(), callers(program, generated="net"))
    assert found == Trail(("program.py:9",), direct=True)


def test_a_way_is_kept_only_so_far(program):
    found, _ = program.deep(program.Net(program.Norm()), callers(program), 100)
    assert len(found.lines) == 16
    assert found.lines[:3] == ("program.py:13", "program.py:18", "program.py:18")
