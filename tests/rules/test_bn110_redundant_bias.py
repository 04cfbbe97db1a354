from bnwatch import testing
from bnwatch.records import Structure
from tests.rules import cases


def biased(*producers):
    return lambda: testing.signals(
        Structure(tuple(testing.usage(f"bn_{p}", testing.place(f"bn_{p}", bias=True, producer=p)) for p in producers))
    )


def then(*snapshots):
    """What a training of this bias does in its steps."""
    structure = Structure((testing.usage("bn", testing.place("bn", bias=True, producer="conv")),))
    return lambda: testing.signals(structure, *snapshots)


INERT = testing.snapshot(1, idle=("bn",))

INFO = {
    "one": biased("conv"),
    "many": biased("a", "b", "c", "d", "e"),
    "left in evaluation mode later": then(testing.snapshot(1, testing.call(testing.layer("bn"))), INERT),
}
QUIET = {
    "a layer that subtracts no batch mean": then(INERT),
    "no bias": lambda: testing.signals(Structure((testing.usage("bn", testing.place(producer="conv")),))),
    "no layer": lambda: testing.signals(Structure()),
}
SKIPS = {"nothing known": (testing.signals, None)}

test_cases = cases.runner("BN110", info=INFO, quiet=QUIET, skips=SKIPS)


def test_one_line_names_the_first_and_counts_the_rest():
    ((finding,), _) = cases.look("BN110", INFO["many"]())
    assert finding.subject == "model"
    assert finding.message == (
        "5 layers have a bias that batch normalization takes out again: `a`, `b`, `c` and 2 more"
    )


def test_a_layer_with_two_call_sites_is_one_layer():
    ((finding,), _) = cases.look("BN110", biased("conv", "conv")())
    assert finding.message == "1 layer has a bias that batch normalization takes out again: `conv`"
    assert finding.evidence["layers"].value == 1
