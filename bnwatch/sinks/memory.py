"""Keeps everything: for tests and notebooks."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from bnwatch.diagnosis import Report
    from bnwatch.sinks import Item

T = TypeVar("T")


class MemorySink:
    """Keeps items in the order they came; it grows without bound.

    Attributes:
        items: what was written.
        report: what was known at the end; None before.
    """

    def __init__(self) -> None:
        """Start empty."""
        self.items: list[Item] = []
        self.report: Report | None = None

    def write(self, item: Item, /) -> None:
        """Keep an item."""
        self.items.append(item)

    def close(self, report: Report, /) -> None:
        """Keep the first report."""
        if self.report is None:
            self.report = report

    def of(self, kind: type[T]) -> list[T]:
        """Return the items of one type."""
        return [item for item in self.items if isinstance(item, kind)]
