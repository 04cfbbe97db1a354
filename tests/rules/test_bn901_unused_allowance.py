import dataclasses

from bnwatch.signals import Signals
from tests.rules import cases

INFO = {"one entry": lambda: Signals(unused_allowances=("BN101:encoder/*",))}
QUIET = {"none": Signals}

test_cases = cases.runner("BN901", info=INFO, quiet=QUIET)


def test_each_entry_is_a_subject():
    fed = dataclasses.replace(Signals(), unused_allowances=("BN101", "BN205:x"))
    assert [f.subject for f in cases.look("BN901", fed)[0]] == ["BN101", "BN205:x"]
