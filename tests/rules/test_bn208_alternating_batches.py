from bnwatch import testing
from tests.rules import cases

RULE = "BN208"
GAN = {"batch": 0.96, "running": 0.5, "population": 0.52, "reshuffled": 0.55}
FINE = {"batch": 0.95, "running": 0.95, "population": 0.95, "reshuffled": 0.95}


def at(**numbers):
    return testing.site_composition(**{"dispersion": 20.0, "p": 1e-9, "clusters": 0.95, "smaller": 0.5, **numbers})


def run(*sites, row=GAN, examples=1000, batches=32, purity=(1.0, 0.6)):
    return testing.signals(
        testing.cells(2, training=row, examples=examples),
        testing.composition(2, *(sites or (at(),)), batches=batches, purity=purity),
    )


def cost(batch, reshuffled, examples=10_000):
    return run(row={"batch": batch, "running": batch, "reshuffled": reshuffled}, examples=examples)


FIRES = {
    "real and fake in turn": run,
    "beyond chance in eight batches": lambda: run(at(dispersion=1e9, clusters=0.977), batches=8),
    "beyond chance in 32 batches": lambda: run(at(dispersion=1e9, clusters=0.864)),
    "beyond .85 in many": lambda: run(at(dispersion=1e9, clusters=0.851), batches=128),
    "one batch in four is fake": lambda: run(at(smaller=0.25)),
    "no better than guessing on batches of one class": lambda: run(row=dict.fromkeys(GAN, 0.12)),
    "above_pure and guessing": lambda: run(row=dict.fromkeys(GAN, 0.12), purity=(0.91, 0.6)),
    "above_dispersion": lambda: run(at(dispersion=2.01, clusters=0.5)),
    "above_cost": lambda: cost(0.9, 0.8899),
    "below_alpha of the cost": lambda: cost(0.9, 0.88, 500),
    "below_alpha of the F test": lambda: run(at(p=0.00049), at(layer="b", p=0.5)),
}
INFO = {
    "a mild difference that costs nothing": lambda: run(row=FINE),
    "below_pure and guessing": lambda: run(row=dict.fromkeys(GAN, 0.12), purity=(0.89, 0.55)),
    "below_cost": lambda: cost(0.9, 0.8901),
    "above_alpha of the cost": lambda: cost(0.9, 0.882, 500),
}
QUIET = {
    "below_dispersion": lambda: run(at(dispersion=1.99)),
    "above_alpha of the F test": lambda: run(at(p=0.00051), at(layer="b", p=0.5)),
    "an outlier among batches": lambda: run(at(smaller=0.1)),
    "ten classes": lambda: run(at(clusters=0.3)),
    "sequences with offsets of their own: half a normal distribution is no group": lambda: run(at(clusters=0.66)),
    "by chance in eight batches": lambda: run(at(dispersion=1e9, clusters=0.975), batches=8),
    "by chance in 32 batches": lambda: run(at(dispersion=1e9, clusters=0.862)),
    "half of an even spread, in many": lambda: run(at(dispersion=1e9, clusters=0.849), batches=128),
    "seven batches": lambda: run(batches=7),
    "random batches": lambda: run(testing.site_composition()),
    "nothing was measured": testing.signals,
}

test_cases = cases.runner(RULE, fires=FIRES, info=INFO, quiet=QUIET)


def test_the_message_counts_the_batches_of_either():
    ((finding,), _) = cases.look(RULE, run(at(smaller=0.25)))
    assert finding.message == (
        "training batches come from two populations: 100% of the spread between batches at `bn` is that of two groups, "
        "of 24 and 8 batches, which costs 46.0 points of training accuracy"
    )


def test_it_never_fires_together_with_bn207():
    for case in (*FIRES.values(), *INFO.values()):
        assert cases.look("BN207", case())[0] == []
