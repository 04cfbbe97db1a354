from bnwatch.signals import Signals
from tests.rules import cases

FIRES = {"a fault": lambda: Signals(faults=["ValueError while ending a step (signals.py:1): a bug"])}
QUIET = {"none": Signals}

test_cases = cases.runner("BN903", fires=FIRES, quiet=QUIET)


def test_the_first_fault_is_the_one_told():
    ((finding,), _) = cases.look("BN903", Signals(faults=["the first", "its echo"]))
    assert finding.message == "bnwatch switched itself off: the first"
