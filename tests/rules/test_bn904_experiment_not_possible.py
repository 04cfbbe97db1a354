from bnwatch.signals import Signals
from tests.rules import cases

INFO = {"refused": lambda: Signals(refused="no training examples were kept")}
QUIET = {"none": Signals}

test_cases = cases.runner("BN904", info=INFO, quiet=QUIET)


def test_the_reason_is_told():
    ((finding,), _) = cases.look("BN904", INFO["refused"]())
    assert finding.message.endswith(": no training examples were kept")
