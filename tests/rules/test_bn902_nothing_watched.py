from bnwatch import testing
from bnwatch.records import Attachment, Structure
from tests.rules import cases

FIRES = {
    "no batch normalization": lambda: testing.signals(Attachment(())),
    "only what cannot be watched": lambda: testing.signals(Attachment((), {"norm": "keeps eigenvalues only"})),
}
QUIET = {
    "a layer": lambda: testing.signals(Attachment((testing.layer(),))),
    "not attached yet": testing.signals,
    "layers that are built at the first step": lambda: testing.signals(
        Attachment(()), testing.snapshot(1, testing.call(testing.layer()))
    ),
}
INFO = {
    "one that cannot be watched beside one that can": lambda: testing.signals(
        Attachment((testing.layer(),), {"norm": "keeps eigenvalues only"})
    ),
}

test_cases = cases.runner("BN902", fires=FIRES, info=INFO, quiet=QUIET)


def test_what_cannot_be_watched_is_named_with_its_reason():
    ((finding,), _) = cases.look("BN902", FIRES["only what cannot be watched"]())
    assert finding.notes[0] == "`norm`: keeps eigenvalues only"
    assert finding.evidence["unsupported"].value == 1


def test_what_cannot_be_watched_is_named_beside_what_can():
    ((finding,), _) = cases.look("BN902", INFO["one that cannot be watched beside one that can"]())
    assert (finding.subject, finding.notes) == ("model", ("`norm`: keeps eigenvalues only",))


def test_a_graph_without_batch_normalization():
    findings, _ = cases.look("BN902", testing.signals(Structure()))
    assert [f.subject for f in findings] == ["model"]
    assert cases.look("BN902", testing.signals(Structure((testing.usage(),)))) == ([], [])
