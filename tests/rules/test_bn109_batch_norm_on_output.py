from bnwatch import testing
from bnwatch.records import Structure
from tests.rules import cases

INFO = {
    "scores": lambda: testing.signals(Structure((testing.usage("bn", testing.place(output=True)),))),
    "one of two sites": lambda: testing.signals(
        Structure((testing.usage("bn", testing.place(), testing.place(index=1, output=True)),))
    ),
}
QUIET = {
    "inside": lambda: testing.signals(Structure((testing.usage("bn", testing.place()),))),
    "never called": lambda: testing.signals(Structure((testing.usage("bn"),))),
}
SKIPS = {"nothing known": (testing.signals, None)}

test_cases = cases.runner("BN109", info=INFO, quiet=QUIET, skips=SKIPS)


def test_each_layer_once_with_its_outputs():
    twice = testing.usage("bn", testing.place(output=True), testing.place(index=1, output=True))
    ((finding,), _) = cases.look("BN109", testing.signals(Structure((twice,))))
    assert finding.subject == "bn"
    assert finding.evidence["outputs"].value == 2
