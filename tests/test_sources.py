"""Where a layer was built, read from classes written to a file: a line is marked `# here`, or none may be named."""

from __future__ import annotations

import importlib
import itertools
import sys
import textwrap

import pytest

from bnwatch.sources import Sources

LIBRARY = """
class Link:
    def children(self):
        return [one for one in vars(self).values() if isinstance(one, Link)]

class BatchNormalization(Link):
    def __init__(self, *args, **kwargs): pass

class Dense(BatchNormalization): pass

class Sequential(Link):
    def __init__(self, *layers): self._layers = [*layers[0]] if layers and isinstance(layers[0], list) else [*layers]
    def children(self): return list(self._layers)
    def add(self, layer): self._layers.append(layer)
    add_link = append = add

class Chain(Link):
    def add_link(self, name, link): setattr(self, name, link)

def make(): return BatchNormalization()
GIVEN = BatchNormalization()
"""

ONE = {
    "an attribute": """
        class Net(Link):
            def __init__(self):
                self.other = BatchNormalization()
                self.bn = BatchNormalization()  # here
    """,
    "over several lines": """
        class Net(Link):
            def __init__(self):
                self.bn = BatchNormalization(  # here
                    axis=1,
                )
    """,
    "not before it is needed": """
        class Net(Link):
            def __init__(self):
                self.bn = None
                self.build()
            def build(self):
                self.bn = BatchNormalization()  # here
    """,
    "with a type": """
        class Net(Link):
            def __init__(self):
                self.bn: BatchNormalization = BatchNormalization()  # here
    """,
    "two at once": """
        class Net(Link):
            def __init__(self):
                (self.first,
                 self.bn) = Dense(), BatchNormalization()  # here
    """,
    "under two names": """
        class Net(Link):
            def __init__(self):
                self.bn = BatchNormalization()  # here
                self.same = self.bn
    """,
    "by a function": """
        class Net(Link):
            def __init__(self):
                self.bn = make()  # here
    """,
    "only if wanted": """
        class Net(Link):
            def __init__(self, wanted=True):
                self.bn = BatchNormalization() if wanted else None  # here
    """,
    "in the base class": """
        class Base(Link):
            def __init__(self):
                self.bn = BatchNormalization()  # here
        class Net(Base):
            def __init__(self):
                super().__init__()
                self.other = Dense()
    """,
    "behind a decorator": """
        import functools
        def decorated(function):
            @functools.wraps(function)
            def wrapped(*args):
                return function(*args)
            return wrapped
        class Net(Link):
            @decorated
            def __init__(self):
                self.bn = BatchNormalization()  # here
    """,
    "by setattr": """
        class Net(Link):
            def __init__(self):
                setattr(self, "bn", BatchNormalization())  # here
    """,
    "by whatever name": """
        class Net(Link):
            def __init__(self):
                for name in ("an", "bn"):
                    setattr(self, name, BatchNormalization())  # here
    """,
    "by an f-string": """
        class Net(Link):
            def __init__(self):
                self.out = Dense()
                for n in "nm":
                    setattr(self, f"b{n}", BatchNormalization())  # here
    """,
    "by add_link": """
        class Net(Chain):
            def __init__(self):
                self.add_link("other", Dense())
                self.add_link("bn", BatchNormalization())  # here
    """,
    "two lines, one of which ran": """
        class Net(Link):
            def __init__(self, large=True):
                if large:
                    self.bn = BatchNormalization(1)
                else:
                    self.bn = BatchNormalization(2)
    """,
    "once more in a subclass": """
        class Base(Link):
            def __init__(self):
                self.bn = BatchNormalization()
        class Net(Base):
            def __init__(self):
                super().__init__()
                self.bn = BatchNormalization()
    """,
    "handed in": """
        class Net(Link):
            def __init__(self, bn=GIVEN):
                self.bn = bn
    """,
    "handed in, or not": """
        class Net(Link):
            def __init__(self, bn=None):
                self.bn = bn
                if bn is None:
                    self.bn = BatchNormalization()
    """,
    "taken from elsewhere": """
        class Net(Link):
            def __init__(self):
                self.bn = {"bn": GIVEN}.get("bn")
    """,
    "of several values": """
        class Net(Link):
            def __init__(self):
                self.bn, self.other = [make() for _ in range(2)]
    """,
    "a helper that takes any name": """
        class Net(Link):
            def __init__(self):
                self.bn = BatchNormalization()
                self.put("other", make())
            def put(self, name, layer):
                setattr(self, name, layer)
    """,
    "from outside": """
        class Base(Link):
            def __init__(self):
                self.out = Dense()
        def Net():
            net = Base()
            net.bn = BatchNormalization()
            return net
    """,
}
"""The layer is the attribute `bn`."""

CONTAINED = {
    "a list": """
        class Net(Link):
            def __init__(self):
                self.bns = [BatchNormalization(n) for n in range(3)]  # here
    """,
    "a list that grows": """
        class Net(Link):
            def __init__(self):
                self.bns = []
                for n in range(3):
                    self.bns.append(BatchNormalization(n))  # here
    """,
    "a dict": """
        class Net(Link):
            def __init__(self):
                self.bns = {}
                for n in range(3):
                    self.bns[n] = BatchNormalization()  # here
    """,
    "written down": """
        class Net(Link):
            def __init__(self):
                self.bns = Sequential([
                    Dense(),
                    BatchNormalization(),
                    BatchNormalization(),  # here
                ])
    """,
    "arguments": """
        class Net(Link):
            def __init__(self):
                self.bns = Sequential(
                    BatchNormalization(),
                    BatchNormalization(),  # here
                    str.lower,
                    lambda x: x,
                )
    """,
    "several on a line": """
        class Net(Link):
            def __init__(self):
                self.bns = Sequential(Dense(), BatchNormalization(), BatchNormalization())  # here
    """,
    "one after the other": """
        class Net(Link):
            def __init__(self):
                self.bns = Sequential()
                self.bns.add(BatchNormalization())
                self.bns.add(Dense())
                self.bns.add(BatchNormalization())  # here
    """,
    "itself": """
        class Net(Sequential):
            def __init__(self):
                super().__init__(
                    BatchNormalization(),
                    BatchNormalization(),  # here
                )
    """,
    "itself, that grows": """
        class Net(Sequential):
            def __init__(self):
                super().__init__()
                for _ in range(2):
                    self.add_link(BatchNormalization())  # here
    """,
    "of what was made before": """
        class Net(Link):
            def __init__(self):
                first = BatchNormalization()
                self.bns = Sequential(first, BatchNormalization())
    """,
    "of what a function makes": """
        class Net(Link):
            def __init__(self):
                self.bns = Sequential(make(), BatchNormalization())
    """,
    "one after the other, if wanted": """
        class Net(Link):
            def __init__(self, wanted=True):
                self.bns = Sequential()
                if wanted:
                    self.bns.add(BatchNormalization())
                    self.bns.add(BatchNormalization())
                else:
                    self.bns.add(BatchNormalization())
    """,
    "from two loops": """
        class Net(Link):
            def __init__(self):
                self.bns = []
                for n in range(2):
                    self.bns.append(BatchNormalization())
                for n in range(2):
                    self.bns.append(BatchNormalization())
    """,
    "nested": """
        class Net(Link):
            def __init__(self):
                self.bns = Sequential(Dense(), Sequential(BatchNormalization(), BatchNormalization()))
    """,
}
"""The layer is the second of its class in the attribute `bns`, or in the object itself."""

numbers = itertools.count()


@pytest.fixture
def module(tmp_path, monkeypatch):
    """Return a function that imports a module from a file of this text."""
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    # what stands in for a framework is an installed package
    library = tmp_path / "site-packages" / f"library{next(numbers)}.py"
    library.parent.mkdir()
    library.write_text(LIBRARY)
    monkeypatch.syspath_prepend(library.parent)

    def write(source, name="net"):
        path = tmp_path / f"{name}{next(numbers)}.py"
        path.write_text(f"from {library.stem} import *\n" + textwrap.dedent(source), encoding="utf-8")
        return path, importlib.import_module(path.stem)

    yield write
    for name in [name for name, one in sys.modules.items() if str(tmp_path) in str(getattr(one, "__file__", ""))]:
        del sys.modules[name]


def sources():
    return Sources(lambda link: link.children())


def marked(path):
    """Return the line that is marked, as it is to be named."""
    lines = path.read_text(encoding="utf-8").splitlines()
    return next((f"{path.name}:{n}" for n, line in enumerate(lines, 1) if "# here" in line), None)


@pytest.mark.parametrize("case", ONE)
def test_the_line_of_an_attribute(case, module):
    path, found = module(ONE[case])
    net = found.Net()
    assert sources().built_at(net.bn, [net]) == marked(path)


@pytest.mark.parametrize("case", CONTAINED)
def test_the_line_of_what_a_container_holds(case, module):
    path, found = module(CONTAINED[case])
    net = found.Net()
    parents = [net]
    held = getattr(net, "bns", net)
    while isinstance(held, found.Sequential) and held is not net:
        parents.insert(0, held)
        held = next((one for one in held._layers if isinstance(one, found.Sequential)), held._layers)
    content = held.children() if held is net else list(held.values()) if isinstance(held, dict) else held
    layer = [one for one in content if type(one) is found.BatchNormalization][1]
    assert sources().built_at(layer, parents) == marked(path)


def test_the_owner_is_the_innermost_class_of_the_user(module):
    path, found = module("""
        class Block(Link):
            def __init__(self):
                self.bn = BatchNormalization()  # here
        class Net(Link):
            def __init__(self):
                self.bn = Dense()
                self.blocks = Sequential(Block(), Block())
    """)
    net = found.Net()
    known = sources()
    for block in net.blocks.children():
        assert known.built_at(block.bn, [block, net.blocks, net]) == marked(path)


def test_what_no_class_of_the_user_keeps_has_no_line(module):
    _, found = module("def build(): return Sequential(BatchNormalization())")
    net = found.build()
    assert sources().built_at(net.children()[0], [net]) is None


def test_a_file_that_changed_since_it_was_imported_says_nothing(module):
    path, found = module(ONE["an attribute"])
    net = found.Net()
    text = path.read_text()
    path.write_text(text.replace("        self.other", "\n        self.other"))
    assert sources().built_at(net.bn, [net]) is None
    path.write_text("\n" + text)
    assert sources().built_at(net.bn, [net]) is None
    path.write_text("class Net(:\0")
    assert sources().built_at(net.bn, [net]) is None
    path.unlink()
    assert sources().built_at(net.bn, [net]) is None
    path.write_text(text)
    assert sources().built_at(net.bn, [net]) == marked(path)


def test_code_without_a_file_has_no_line(module):
    _, found = module("pass")
    space = dict(vars(found))
    exec(textwrap.dedent(ONE["an attribute"]), space)  # noqa: S102 - code that has no file of its own
    net = space["Net"]()
    assert sources().built_at(net.bn, [net]) is None


def test_an_object_that_answers_badly_is_let_be(module):
    _, found = module("""
        class Net(Link):
            __slots__ = ("bn",)
            def __init__(self): self.bn = BatchNormalization()
    """)
    net = found.Net()
    assert Sources(lambda _: 1 / 0, lambda _: 1 / 0).built_at(net.bn, [net]) is None


def test_an_odd_name_survives(module):
    path, found = module(ONE["an attribute"], name="né t")
    net = found.Net()
    assert sources().built_at(net.bn, [net]) == f"{path.name}:6"


def test_each_file_is_read_once(module, monkeypatch):
    path, found = module(CONTAINED["a list"])
    net, known, read = found.Net(), sources(), []
    own = type(path).read_bytes
    monkeypatch.setattr(type(path), "read_bytes", lambda self: read.append(self) or own(self))
    assert {known.built_at(one, [net]) for one in net.bns} == {marked(path)}
    assert read == [path]
