from bnwatch import testing
from bnwatch.diagnosis import Severity
from bnwatch.records import Structure
from tests.rules import cases


def used(**facts):
    return testing.signals(Structure((testing.usage("bn", testing.place(**facts)),)))


def behind(layout, axis, rank=4):
    return lambda: used(layout=layout, axis=axis, rank=rank, producer="conv", kind="Conv2D")


FIRES = {
    "rows behind channels_last": behind("channels_last", 1),
    "time steps behind a one-dimensional convolution": behind("channels_last", 1, rank=3),
    "the default behind channels_first": behind("channels_first", 3),
    "one of two call sites": lambda: testing.signals(
        Structure(
            (
                testing.usage(
                    "bn",
                    testing.place(layout="channels_last", axis=3, rank=4),
                    testing.place(index=1, layout="channels_first", axis=3, rank=4),
                ),
            )
        )
    ),
}
QUIET = {
    "the channels": behind("channels_last", 3),
    "channels_first": behind("channels_first", 1),
    "channels_first, one dimension": behind("channels_first", 1, rank=3),
    "vectors": behind("channels_last", 1, rank=2),
    "the last axis of what is not known": lambda: used(axis=3, rank=4),
    "the shape is not known": lambda: used(layout="channels_first"),
    "no layer": lambda: testing.signals(Structure()),
}
SKIPS = {
    "axis 1 of what is not known": (lambda: used(axis=1, rank=4), None),
    "no graph": (lambda: testing.signals(Structure((testing.usage(),), "the model has no graph")), None),
    "nothing known": (testing.signals, None),
}

test_cases = cases.runner("BN102", fires=FIRES, quiet=QUIET, skips=SKIPS)


def test_both_axes_are_named():
    ((finding,), _) = cases.look("BN102", FIRES["rows behind channels_last"]())
    assert finding.severity is None
    assert cases.rule("BN102").severity is Severity.WARNING
    assert finding.message == "`bn` normalizes axis 1 of 4, and the channels of `conv` (Conv2D) are in axis 3"
    assert finding.helps[0] == "for data laid out channels_last build the layer with axis=-1 (the default)"


def test_the_help_for_channels_first_is_axis_1():
    ((finding,), _) = cases.look("BN102", FIRES["the default behind channels_first"]())
    assert finding.helps[0] == "for data laid out channels_first build the layer with axis=1"


def test_a_layer_that_could_not_be_looked_at_does_not_hide_one_that_is_wrong():
    wrong = testing.usage("bn", testing.place(layout="channels_last", axis=1, rank=4))
    findings, skipped = cases.look("BN102", testing.signals(Structure((wrong, testing.usage("hidden")), "no graph")))
    assert [f.subject for f in findings] == ["bn"]
    assert [s.reason for s in skipped] == ["no graph"]
