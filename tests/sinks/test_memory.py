"""The sink that keeps everything."""

from __future__ import annotations

from bnwatch.diagnosis import Diagnosis
from bnwatch.sinks.memory import MemorySink
from tests import samples


def test_items_are_kept_in_order_and_by_type():
    sink = MemorySink()
    items = [samples.attachment(), samples.table(1), samples.diagnosis()]
    for item in items:
        sink.write(item)
    sink.close(samples.report())
    sink.close(samples.report(run="another"))
    assert sink.items == items
    assert sink.of(Diagnosis) == [items[2]]
    assert sink.report == samples.report()
