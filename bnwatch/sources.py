"""Where a layer was built, as the source of the class that keeps it says: nothing is run for it, nothing is patched.

A layer sits at an attribute of a model or a block of the user's. Where one line alone of that class can have put it
there, and that line calls something to make it, the line is named. Everything else has none: two lines of which either
may have run, a layer that was handed in, a class without a file, a file that changed since it was imported, a model put
together by functions.
"""

from __future__ import annotations

import ast
import re
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from types import FunctionType
from typing import TYPE_CHECKING, Any

from bnwatch.lines import code_of, installed, named

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
    from types import CodeType

    Function = ast.FunctionDef | ast.AsyncFunctionDef

_ADDING = {"append", "extend", "insert", "add", "add_link"}
"""Methods that put something into a list, a ``Sequential`` or a ``ChainList``."""
_FETCHING = {"get", "getattr", "next", "pop"}
"""Calls that return what was there before."""
_LOOPS = (ast.For, ast.AsyncFor, ast.While, ast.ListComp, ast.GeneratorExp, ast.DictComp, ast.SetComp)
_BRANCHES = (ast.If, ast.IfExp, ast.Try, ast.Match, ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)
_ITSELF = re.compile("")
"""Stands for the name of what is put into the object itself, which is a container."""


class _NotKnownError(Exception):
    """No line can be named."""


@dataclass(frozen=True, slots=True)
class _Put:
    """A place in the source that gives an attribute of ``self`` something.

    Attributes:
        name: matches the attribute in full; `_ITSELF` where ``self`` is the container.
        value: what it is given; None where that is no expression.
        line: where.
        method: file and first line of the method it stands in.
        itself: what the method calls its object.
        element: it is put into what the attribute holds.
        loop: it may run more often than once.
        branch: it may not run.
    """

    name: re.Pattern[str]
    value: ast.expr | None
    line: int
    method: tuple[str, int]
    itself: str
    element: bool
    loop: bool
    branch: bool

    @property
    def filename(self) -> str:
        """Return the file it stands in."""
        return self.method[0]


@dataclass(slots=True)
class Sources:
    """Reads the sources of the user's classes, each file once; to be kept for one look only.

    Attributes:
        below: returns what is directly below a layer, in order.
        attributes: returns the attributes of an object.
    """

    below: Callable[[Any], Iterable[Any]]
    attributes: Callable[[Any], Mapping[str, Any]] = vars
    _files: dict[str, dict[tuple[int, str], Function]] = field(default_factory=dict)
    _classes: dict[type, list[_Put] | None] = field(default_factory=dict)

    def built_at(self, layer: Any, parents: Sequence[Any]) -> str | None:
        """Return the line that built a layer, None where that is not known.

        Args:
            layer: the layer.
            parents: what it is below of, the innermost first.
        """
        try:
            for depth, parent in enumerate(parents):
                puts = self._puts(type(parent))
                if puts is not None:
                    found = self._found(puts, layer, parent, parents[:depth])
                    return None if found is None else named(*found)
        except Exception:  # noqa: BLE001 - a file may hold anything, and an attribute of the user's answer anything
            return None
        return None

    def _found(self, puts: list[_Put], layer: Any, owner: Any, between: Sequence[Any]) -> tuple[str, int] | None:
        """Return file and line; ``between`` are the containers from the layer to its owner."""
        own = self.attributes(owner)
        if not between:
            names = [name for name, value in own.items() if value is layer]
            if any(put.name.fullmatch(name) for put in puts for name in names):
                return _assigned(puts, names)
            names = [name for name, value in own.items() if any(one is layer for one in _content(value))]
            content = [one for name in names for one in _content(own[name])]
            if any(put.name.fullmatch(name) for put in puts for name in names):
                return _contained(puts, names, layer, content)
            return _contained([put for put in puts if put.name is _ITSELF], [""], layer, self.below(owner))
        if len(between) == 1:
            names = [name for name, value in own.items() if value is between[0]]
            return _contained(puts, names, layer, self.below(between[0]))
        return None

    def _puts(self, kind: type) -> list[_Put] | None:
        """Return what the user's classes among the bases of a class put where; None where none is the user's.

        Raises:
            _NotKnownError: a source cannot be read.
        """
        if kind not in self._classes:
            codes = [
                code
                for base in kind.__mro__
                for value in vars(base).values()
                if isinstance(value, FunctionType) and (code := code_of(value)) is not None
            ]
            own = [code for code in codes if not installed(code.co_filename) and code.co_name != "<lambda>"]
            self._classes[kind] = [put for code in own for put in self._read(code)] if own else None
        return self._classes[kind]

    def _read(self, code: CodeType) -> Iterator[_Put]:
        filename = code.co_filename
        if filename not in self._files:
            self._files[filename] = _functions(filename)
        function = self._files[filename].get((code.co_firstlineno, code.co_name))
        if function is None:
            msg = "the file is not the one that was imported"
            raise _NotKnownError(msg)
        arguments = [*function.args.posonlyargs, *function.args.args]
        if arguments:
            found = _Reader((filename, code.co_firstlineno), arguments[0].arg)
            for statement in function.body:
                found.read(statement)
            compiled = set(_lines(code))
            if any(put.line not in compiled for put in found.puts):
                msg = "the file is not the one that was imported"
                raise _NotKnownError(msg)
            yield from found.puts


def _functions(filename: str) -> dict[tuple[int, str], Function]:
    """Return the functions of a file by the first line of their code, and their name."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # those of the user's syntax were issued when it was imported
        tree = ast.parse(Path(filename).read_bytes())
    return {
        (min([node.lineno, *(one.lineno for one in node.decorator_list)]), node.name): node
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    }


def _lines(code: CodeType) -> Iterator[int | None]:
    yield from (line for _, _, line in code.co_lines())
    for constant in code.co_consts:
        if isinstance(constant, type(code)):
            yield from _lines(constant)


class _Reader:
    """Collects what one method puts into attributes of its first argument."""

    def __init__(self, method: tuple[str, int], itself: str) -> None:
        self.puts: list[_Put] = []
        self._method, self._self = method, itself
        self._loop = self._branch = False

    def read(self, node: ast.AST) -> None:
        """Look at a node and everything below it."""
        before = self._loop, self._branch
        self._loop |= isinstance(node, _LOOPS)
        self._branch |= isinstance(node, _BRANCHES)
        if isinstance(node, ast.Assign):
            for target in node.targets:
                self._assign(target, node.value)
        elif isinstance(node, ast.AnnAssign) and node.value is not None:
            self._assign(node.target, node.value)
        elif isinstance(node, ast.AugAssign):
            self._put(self._attribute(node.target), node.value, node.target, element=True)
        elif isinstance(node, ast.For | ast.AsyncFor):
            self._assign(node.target, None)
        elif isinstance(node, ast.withitem) and node.optional_vars is not None:
            self._assign(node.optional_vars, None)
        elif isinstance(node, ast.Call):
            self._call(node)
        for child in ast.iter_child_nodes(node):
            self.read(child)
        self._loop, self._branch = before

    def _assign(self, target: ast.expr, value: ast.expr | None) -> None:
        if isinstance(target, ast.Tuple | ast.List):
            parts = value.elts if isinstance(value, ast.Tuple | ast.List) else ()
            plain = len(parts) == len(target.elts) and not any(isinstance(part, ast.Starred) for part in target.elts)
            for number, part in enumerate(target.elts):
                self._assign(part, parts[number] if plain else None)
        elif isinstance(target, ast.Starred):
            self._assign(target.value, None)
        elif isinstance(target, ast.Subscript):
            self._put(self._attribute(target.value), value, target, element=True)
        else:
            self._put(self._attribute(target), value, target)

    def _call(self, node: ast.Call) -> None:
        called, given = node.func, node.args
        if isinstance(called, ast.Name) and called.id == "setattr" and len(given) == 3:  # noqa: PLR2004
            if self._is_self(given[0]):
                self._put(_pattern(given[1]), given[2], node)
        elif not isinstance(called, ast.Attribute) or not given:
            return
        elif called.attr == "__init__" and isinstance(called.value, ast.Call):  # super().__init__(...)
            for part in given:
                self._put(_ITSELF, part, node, element=True)
        elif called.attr in _ADDING and self._is_self(called.value):
            if called.attr == "add_link" and len(given) > 1:
                self._put(_pattern(given[0]), given[1], node)
            else:
                self._put(_ITSELF, given[-1], node, element=True)
        elif called.attr in _ADDING:
            self._put(self._attribute(called.value), given[-1], node, element=True)

    def _put(
        self, name: re.Pattern[str] | None, value: ast.expr | None, node: ast.expr, *, element: bool = False
    ) -> None:
        if name is not None:
            where = node.lineno, self._method, self._self
            self.puts.append(_Put(name, value, *where, element=element, loop=self._loop, branch=self._branch))

    def _attribute(self, node: ast.expr) -> re.Pattern[str] | None:
        if not isinstance(node, ast.Attribute) or not self._is_self(node.value):
            return None
        return re.compile(re.escape(node.attr))

    def _is_self(self, node: ast.expr) -> bool:
        return isinstance(node, ast.Name) and node.id == self._self


def _pattern(name: ast.expr) -> re.Pattern[str]:
    """Return what matches the names that an expression may give: any, but for a literal and an f-string."""
    parts = name.values if isinstance(name, ast.JoinedStr) else [name]
    literal = [part.value if isinstance(part, ast.Constant) else None for part in parts]
    return re.compile("".join(re.escape(part) if isinstance(part, str) else ".*" for part in literal), re.DOTALL)


def _assigned(puts: list[_Put], names: list[str]) -> tuple[str, int] | None:
    """Return the one line that gives an attribute of these names what it calls something for; None without."""
    found = {
        (put.filename, put.line): put.value
        for put in puts
        if not put.element
        and any(put.name.fullmatch(name) for name in names)
        and not _is_none(put.value)
        and not (isinstance(put.value, ast.Attribute) and put.value.attr in names)
    }
    if len(found) != 1 or not _makes(*found.values()):
        return None
    return next(iter(found))


def _is_none(value: ast.expr | None) -> bool:
    return isinstance(value, ast.Constant) and value.value is None


def _makes(value: ast.expr | None) -> bool:
    """Return whether an expression calls something for its value, whatever branch it takes."""
    if isinstance(value, ast.IfExp):
        parts = [part for part in (value.body, value.orelse) if not _is_none(part)]
        return bool(parts) and all(map(_makes, parts))
    return isinstance(value, ast.Call) and _last_name(value.func) not in _FETCHING


def _contained(puts: list[_Put], names: list[str], layer: Any, content: Iterable[Any]) -> tuple[str, int] | None:
    """Return the line that calls the class of a layer to put one into a container of these names.

    Either all of its kind come from one line, or the container is written down in order, once for each.
    """
    puts = [put for put in puts if any(put.name.fullmatch(name) for name in names)]
    kind = type(layer).__name__
    makers = [(put, call, loop) for put in puts for call, loop in _makers(put, kind)]
    alike = list({id(one): one for one in content if type(one) is type(layer)}.values())
    places = {(put.filename, call.lineno) for put, call, _ in makers}
    often = any(put.loop or loop for put, _, loop in makers)
    if len(places) == 1 and (often or len(alike) == len(makers)):
        return next(iter(places))
    straight = not often and not any(put.branch for put in puts) and len({put.method for put in puts}) == 1
    if straight and len(alike) == len(makers):
        put, call, _ = makers[next(n for n, one in enumerate(alike) if one is layer)]
        return put.filename, call.lineno
    return None


def _makers(put: _Put, kind: str) -> Iterator[tuple[ast.Call, bool]]:
    """Yield the calls of a class, in order, by which something is put into a container; whether each is in a loop.

    Raises:
        _NotKnownError: something else is put into it, which may be of this class.
    """
    for part, loop in _parts(put.value, element=put.element):
        name = _last_name(part.func) if isinstance(part, ast.Call) else ""
        of_class = name.lstrip("_")[:1].isupper()
        if isinstance(part, ast.Call) and name == kind:
            yield part, loop
        elif not (of_class or isinstance(part, ast.Constant | ast.Lambda) or _of_module(part, put.itself)):
            msg = f"line {put.line} puts in what was made elsewhere"
            raise _NotKnownError(msg)


def _parts(value: ast.expr | None, *, element: bool, loop: bool = False) -> Iterator[tuple[ast.expr | None, bool]]:
    """Yield what a container is made of, and whether it is so more often than once."""
    if isinstance(value, ast.List | ast.Tuple | ast.Set):
        for part in value.elts:
            yield from _parts(part, element=True, loop=loop)
    elif isinstance(value, ast.Dict):
        for part in value.values:
            yield from _parts(part, element=True, loop=loop)
    elif isinstance(value, ast.ListComp | ast.SetComp | ast.GeneratorExp):
        yield from _parts(value.elt, element=True, loop=True)
    elif isinstance(value, ast.DictComp):
        yield from _parts(value.value, element=True, loop=True)
    elif isinstance(value, ast.Starred):
        yield from _parts(value.value, element=element, loop=loop)
    elif isinstance(value, ast.Call) and not element:  # of the container's class
        for part in (*value.args, *(keyword.value for keyword in value.keywords if keyword.arg in {"layers", None})):
            yield from _parts(part, element=True, loop=loop)
    else:
        yield value, loop


def _last_name(node: ast.expr) -> str:
    return node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""


def _of_module(node: ast.expr | None, itself: str) -> bool:
    """Return whether an expression is something like ``F.relu``, and no attribute of the object itself."""
    return isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id != itself


def _content(value: Any) -> list[Any]:
    """Return what a list, a tuple or a dict holds."""
    if isinstance(value, dict):
        return list(value.values())
    return list(value) if isinstance(value, list | tuple) else []
