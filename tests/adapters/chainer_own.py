"""Chainer's own tests, run by the session ``chainer_own`` with and without the tap around each of them.

As a pytest plugin it lets Chainer be imported and, if ``BNWATCH_TEST_TAP`` is 1, enters a tap around every test that
takes every batch normalization for one of a watched link on a sampled step, and looks at all that it can look at. A
fault in there fails the test. As a program it compares the two results:
``python -m tests.adapters.chainer_own WITHOUT.xml WITH.xml``.
"""

from __future__ import annotations

import os
import re
import sys
from collections import Counter
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree as ET

import pytest

from tests.summary import outcome

if TYPE_CHECKING:
    from collections.abc import Iterator

_looked: Counter[str] = Counter()
_ADDRESS = re.compile(r" at 0x[0-9a-f]+")  # differs in each run


class _AnyLayers:
    """Every running mean is one of a watched link."""

    def find(self, _running_mean: Any) -> tuple[int, int]:
        return 0, 0

    def at(self, _index: int, _replica: int) -> Any:
        return SimpleNamespace(updates=0)

    def normalized_elsewhere(self, _running_mean: Any) -> None:
        """See one without running statistics."""


class _Clock:
    def now(self, *, trained: bool) -> int | None:
        return 0 if trained else None


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    """Run a test with the tap."""
    if os.environ.get("BNWATCH_TEST_TAP") != "1":
        return (yield)

    from bnwatch.chainer.examples import ForwardPasses
    from bnwatch.chainer.session import _batch_statistics
    from bnwatch.chainer.structure import Trace
    from bnwatch.chainer.tap import Tap

    faults: list[Exception] = []
    passes = ForwardPasses([], eager=True)
    passes.training.renew()
    passes.evaluation.renew()
    passes.sampled = True
    tap = Tap(_AnyLayers(), _Clock(), passes, faults.append)
    tap.sampled, tap.trace = True, Trace(faults.append)
    tap.watch_backward(wanted=True)
    tap.watch_functions(wanted=True)
    tap.enter()
    try:
        done = yield
        for call, _ in tap.take():
            statistics = _batch_statistics(call, call.mean.ravel(), call.scale.ravel())
            assert statistics.mean.shape == statistics.var.shape
            _looked["calls"] += 1
        return done
    finally:
        tap.leave()
        _looked["tests"] += 1
        if faults:
            raise faults[0]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say how much the tap saw."""
    if _looked:
        terminalreporter.write_line(
            f"tap: around {_looked['tests']} tests, {_looked['calls']} batch normalizations read"
        )


def outcomes(path: str) -> dict[str, str]:
    """Return the outcome of each test of a result, in the order of the run where a name is used twice."""
    found: dict[str, str] = {}
    count: Counter[str] = Counter()
    for case in ET.parse(path).getroot().iter("testcase"):  # noqa: S314 - written by pytest
        name = _ADDRESS.sub("", f"{case.get('classname')}::{case.get('name')}")
        found[f"{name}#{count[name]}"] = outcome(case)[0]
        count[name] += 1
    return found


def main(arguments: list[str]) -> int:
    """Compare two results, and return 1 if a test passed without the tap and did not pass with it."""
    without, with_tap = map(outcomes, arguments)
    lost = [name for name, how in without.items() if how == "passed" and with_tap.get(name) != "passed"]
    for name in lost:
        print(f"passes without the tap only: {name}")
    for how, results in (("without", without), ("with", with_tap)):
        count = Counter(results.values())
        print(f"{how} the tap:", ", ".join(f"{count[name]} {name}" for name in ("passed", "failed", "skipped")))
    return 1 if lost or "passed" not in without.values() else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
