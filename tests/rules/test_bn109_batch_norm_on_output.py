import pytest

from bnwatch import testing
from bnwatch.records import Output, Structure
from tests.rules import cases


def regression(*sizes, loss=9736.0, planned=1760, name="mean_squared_error", ended=False, every=100):
    """A regression at whose looks the output had these sizes."""
    output = Output("bn", 4, "linear", name)
    layers = (testing.usage("bn", testing.place(output=True)),)
    signals = testing.signals(
        Structure(layers, steps_per_epoch=planned, epochs=1 if planned else None, output=output),
        *(
            testing.look(every * n, testing.layer_look("dense"), testing.layer_look("bn", scale=size), loss=loss)
            for n, size in enumerate(sizes, start=1)
        ),
    )
    signals.ended = ended
    return lambda: signals


FIRES = {
    "targets of variance 860": regression(1.0, 1.4, 1.8),
    # the root is 30
    "above_far": regression(9.0, 9.9, loss=900.0, planned=1300),
    "the output does not grow": regression(1.0, 1.0),
    "training has ended, and nobody knew when": regression(1.0, 1.4, planned=None, ended=True),
    "Keras's class": regression(1.0, 1.4, name="MeanSquaredError"),
}
INFO = {
    "below_far": regression(9.0, 10.1, loss=900.0, planned=1000),
    # from 2 at .01 a step: 30 - 4 = 26 are missing, reached at step 2,800
    "there is time": regression(1.0, 2.0, loss=900.0, planned=2801),
    "how much time there is, nobody knows": regression(1.0, 1.4, planned=None),
    "one look": regression(1.0),
    "a loss that is no distance": regression(1.0, 1.4, name="mean_absolute_percentage_error"),
    "a loss that is not known": regression(1.0, 1.4, loss=None),
    "a loss that is no number": regression(1.0, 1.4, loss=float("nan")),
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

test_cases = cases.runner("BN109", fires=FIRES, info=INFO, quiet=QUIET, skips=SKIPS)


def test_each_layer_once_with_its_outputs():
    twice = testing.usage("bn", testing.place(output=True), testing.place(index=1, output=True))
    ((finding,), _) = cases.look("BN109", testing.signals(Structure((twice,))))
    assert finding.subject == "bn"
    assert finding.evidence["outputs"].value == 2


def test_the_error_and_the_pace_are_said():
    ((finding,), _) = cases.look("BN109", regression(1.0, 2.0, loss=900.0, planned=2799)())
    assert finding.message.endswith("error 30 with outputs of size 2 on 100 training examples")
    assert finding.evidence["reaches_at"].value == pytest.approx(2800)
    assert "at step 2,800" in finding.notes[0]
    ((still,), _) = cases.look("BN109", regression(1.0, 1.0)())
    assert "does not grow" in still.notes[0]
