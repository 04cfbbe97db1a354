import pytest

from bnwatch import testing
from bnwatch.records import Attachment, EvaluationRecord
from tests.rules import cases

RULE = "BN105"
LIMITS = {name: threshold.value for name, threshold in cases.rule(RULE).thresholds.items()}
SAMPLES = int(LIMITS["samples"])


def trained(samples=SAMPLES, *specs, moving=True, still=(), extra=(), by="keras 3"):
    """Layers in training mode, with running statistics that move or stay, then an evaluation."""
    specs = specs or (testing.layer(trainable=False),)
    return testing.signals(
        Attachment(tuple(specs), framework=by),
        *(
            testing.snapshot(
                n, *(testing.call(s, mean=n / 10, running_mean=n / 100 if moving else 0.5, var=2.0) for s in specs)
            )
            for n in range(1, samples + 1)
        ),
        *extra,
        EvaluationRecord(samples, 0, 0.5, still=still),
    )


def single(*counts):
    """A layer of one element a channel, but for the samples that say otherwise; neither scale nor offset moved."""
    calls = [testing.call(PLAIN, mean=n, running_mean=n / 9, count=count) for n, count in enumerate(counts)]
    return testing.signals(
        Attachment((PLAIN,), framework="keras 3"),
        *(testing.snapshot(n, call) for n, call in enumerate(calls, 1)),
        EvaluationRecord(len(counts), 0, 0.5, still=("head",)),
    )


def dead(share):
    return testing.look(2, testing.layer_look("dense", zero=0.0), testing.layer_look("relu", zero=share))


PLAIN, FROZEN = testing.layer("head"), testing.layer("base", trainable=False)

FIRES = {
    "above_samples": trained,
    "statistics that stay": lambda: trained(moving=False),
    "a frozen backbone before a head that trains": lambda: trained(9, FROZEN, PLAIN),
    "left out of the gradient": lambda: trained(9, testing.layer("base"), PLAIN, still=("base",)),
    "one element a channel only in the last batch of an epoch": lambda: single(8, 8, 8, 1),
    "below_dead": lambda: trained(9, PLAIN, still=("head",), extra=[dead(LIMITS["dead"] - 0.01)]),
}
QUIET = {
    "all layers train": lambda: trained(9, PLAIN),
    "a frozen layer in inference mode": lambda: testing.signals(
        Attachment((FROZEN,)), *(testing.snapshot(n, idle=("base",)) for n in range(1, 9))
    ),
    "above_dead": lambda: trained(9, PLAIN, still=("head",), extra=[dead(LIMITS["dead"])]),
    "one element a channel, so no gradient passes": lambda: single(1, 1, 1, 1),
    "it stood still once": lambda: testing.signals(
        *(testing.snapshot(n, testing.call(PLAIN, mean=n, running_mean=n / 9)) for n in range(1, 9)),
        EvaluationRecord(4, 0, still=("head",)),
        EvaluationRecord(8, 1),
    ),
}
SKIPS = {
    "no training": (lambda: testing.signals(Attachment((FROZEN,))), None),
    "below_samples": (lambda: trained(SAMPLES - 1), None),
}

test_cases = cases.runner(RULE, fires=FIRES, quiet=QUIET, skips=SKIPS)


@pytest.mark.parametrize(
    ("moving", "message", "note"),
    [(True, "its running statistics move on", "follow the new data"), (False, "statistics stay", "kept statistics")],
)
def test_it_says_what_becomes_of_the_statistics(moving, message, note):
    ((finding,), _) = cases.look(RULE, trained(moving=moving))
    assert message in finding.message
    assert note in finding.notes[0]


def test_several_layers_are_one_finding_and_those_that_train_are_not_named():
    others = [testing.layer(f"base{n}", trainable=False) for n in range(5)]
    ((finding,), _) = cases.look(RULE, trained(9, *others, PLAIN))
    assert finding.subject == "model"
    assert finding.message.startswith("`base0`, `base1`, `base2` and 2 more are frozen and still normalize with")
    assert finding.evidence["layers"].value == 5
    assert finding.evidence["untrainable"].value == 5


def test_how_far_the_kept_statistics_are_off_is_measured():
    """Batch mean .3, running mean .5 and variance 1 (+ epsilon) in the last of three steps."""
    ((finding,), _) = cases.look(RULE, trained(moving=False))
    assert finding.evidence["mean_shift"].value == pytest.approx(0.2 / (1 + 1e-3) ** 0.5, rel=1e-5)


@pytest.mark.parametrize(("framework", "said"), [("keras 3", "training=False"), ("chainer 7", "disable_update()")])
def test_the_helps_are_those_of_the_framework(framework, said):
    ((finding,), _) = cases.look(RULE, trained(by=framework))
    assert said in finding.helps[0]
