from bnwatch import testing
from bnwatch.records import Structure
from tests.rules import cases


def costing(running, *, batch=0.9, population=0.5, examples=10_000):
    """A layer behind a mask, and what its statistics cost."""
    signals = model("embedding")
    row = {"batch": batch, "running": running, "population": population}
    signals.cells = testing.cells(1, training=row, examples=examples)
    return signals


def model(*masks, trainable=True, framework="keras 3", hidden=None):
    """A layer a mask, called once."""
    layers = tuple(
        testing.usage(f"bn{n}", testing.place(f"bn{n}", mask=m), trainable=trainable) for n, m in enumerate(masks)
    )
    signals = testing.signals(Structure(layers, hidden))
    signals.framework = framework
    return signals


FIRES = {
    "above_cost": lambda: costing(0.8899),
    "below_alpha": lambda: costing(0.88, examples=500),
}
INFO = {
    "below_cost": lambda: costing(0.8901),
    "above_alpha": lambda: costing(0.882, examples=500),
    "a re-estimate mends it": lambda: costing(0.5, population=0.9),
    "a mask": lambda: model("embedding"),
    "one of two": lambda: model(None, "embedding"),
    "several": lambda: model("embedding", "embedding", "masking"),
}
QUIET = {
    "no mask": lambda: model(None, None),
    "a layer that was frozen": lambda: model("embedding", trainable=False),
}
SKIPS = {
    "no graph": (testing.signals, None),
    "a hidden graph": (lambda: model(None, hidden="a subclassed model"), None),
    "Chainer": (lambda: model(None, framework="chainer 7.8.1"), None),
}

test_cases = cases.runner("BN214", fires=FIRES, info=INFO, quiet=QUIET, skips=SKIPS)


def test_both_layers_are_named():
    ((finding,), _) = cases.look("BN214", model(None, "embedding"))
    assert finding.subject == "bn1"
    assert finding.message == "positions that `embedding` marks as padding are counted in the statistics of `bn1`"
    ((finding,), _) = cases.look("BN214", model("embedding", "masking"))
    assert finding.subject == "model"


def test_it_says_likely_and_what_decides():
    ((finding,), _) = cases.look("BN214", model("embedding"))
    assert "likely" in finding.notes[0]
    assert finding.notes[1].startswith("what decides: ")
