import pytest

from bnwatch import moments, testing
from bnwatch.records import EvaluationRecord, Structure
from tests.rules import cases

RULE = "BN201"
LIMITS = {name: threshold.value for name, threshold in cases.rule(RULE).thresholds.items()}
# Two samples of 1,000, .8 right in the first: a z test gives p = .00101 at .742 in the second and .00085 at .741.
CHANCE, LOSS = 0.742, 0.741


def evaluation(accuracy=LOSS, step=2):
    return EvaluationRecord(step, 0, accuracy, examples=1000, train_accuracy=0.8, train_examples=1000)


def settling(updates=20, *, decay=0.9, shift=1.0, ratio=1.0, accuracy=LOSS, trainable=True, steps=2, extra=()):
    """A layer after ``updates``, its batch mean ``shift`` running standard deviations away, then an evaluation."""
    spec = testing.layer(decay=decay, epsilon=0.0, trainable=trainable)
    return testing.signals(
        Structure(steps_per_epoch=steps, epochs=1),
        testing.snapshot(1, testing.call(spec, running_mean=0.5, updates=updates)),
        testing.snapshot(2, testing.call(spec, mean=shift, var=ratio**2, updates=updates)),
        evaluation(accuracy),
        *extra,
    )


def learning(**fields):
    spec = testing.layer(channels=8, decay=0.99)
    return testing.signals(
        Structure(steps_per_epoch=fields["steps"], epochs=1),
        *testing.train(spec, testing.normal(8, 64, mean=3.0), every=10, **fields),
        evaluation(step=fields["steps"]),
    )


# 299 steps of 332 leave less than a tenth of the training, 299 of 333 leave more.
SHORT, LONG = 332, 333


def begun(*, steps=100, planned=None, evaluations=1, ended=False, updates=None):
    """A training at decay .99, settled at step 299, whose evaluations suffer."""
    spec = testing.layer(decay=0.99, epsilon=0.0)
    plan = [] if planned is None else [Structure(steps_per_epoch=planned, epochs=1)]
    last = testing.call(spec, mean=1.0, running_mean=0.1, updates=steps if updates is None else updates)
    signals = testing.signals(
        *plan,
        testing.snapshot(steps - 1, testing.call(spec, updates=1)),
        testing.snapshot(steps, last),
        *(evaluation(step=steps) for _ in range(evaluations)),
    )
    signals.ended = ended
    return signals


def regressed(loss, train_loss=1.0, *, accuracy=None, planned=SHORT):
    """The same training, of which no accuracy is known."""
    signals = begun(planned=planned)
    signals.evaluations[-1] = EvaluationRecord(100, 0, accuracy, loss, train_loss=train_loss)
    return signals


def small(steps, *, std=0.01):
    """Data of a variance far below the initial one; .9^29 is .047, and at a variance of 1e-4 .9^116 is 4.9e-6."""
    spec = testing.layer(channels=8, decay=0.9, epsilon=0.0)
    seen = testing.train(spec, testing.normal(8, 64, std=std), steps=steps, every=steps // 2)
    signals = testing.signals(*seen, evaluation(step=steps))
    signals.ended = True
    return signals


FIRES = {
    "most of a small variance is the initial one": lambda: small(60),
    "early in a training": lambda: learning(steps=100),
    # .9^28 = .0523 and .9^29 = .0471
    "above_weight": lambda: settling(28),
    "above_shift": lambda: settling(shift=LIMITS["shift"] * 1.01),
    "above_shift of the spread": lambda: settling(shift=0.0, ratio=1 + LIMITS["shift"] * 1.01),
    "below_alpha": lambda: settling(accuracy=LOSS),
    "below_alpha in the cells": lambda: settling(
        accuracy=0.8, extra=[testing.cells(2, evaluation={"batch": 0.8, "running": 0.78}, examples=500)]
    ),
    "above_loss": lambda: regressed(2.01),
    "below_rest": lambda: begun(planned=SHORT),
    "above_patience": lambda: begun(evaluations=10),
    "the training ends so": lambda: begun(planned=LONG, ended=True),
    "the training ends so, and nobody knew when": lambda: begun(ended=True),
    "training cells where there are no others": lambda: settling(
        accuracy=0.8, extra=[testing.cells(2, training={"batch": 0.9, "running": 0.5})]
    ),
}
INFO = {
    "below_loss": lambda: regressed(1.99),
    "a loss that is worse while there is time": lambda: regressed(9.0, planned=LONG),
    "accuracy speaks before the loss": lambda: regressed(9.0, accuracy=0.5),
    "losses below zero, as of densities": lambda: regressed(9.0, -3.0),
    "a training loss that is not known": lambda: regressed(9.0, None),
    "a loss that is no number": lambda: regressed(float("nan")),
    "above_rest": lambda: begun(planned=LONG),
    "below_patience": lambda: begun(evaluations=9),
    "the plan is that of a training before": lambda: begun(planned=50),
    "two updates a step": lambda: begun(planned=200, updates=200),
    "above_alpha": lambda: settling(accuracy=CHANCE),
    "above_alpha in the cells": lambda: settling(
        extra=[testing.cells(2, evaluation={"batch": 0.8, "running": 0.782}, examples=500)]
    ),
    "augmentation makes training harder than evaluation": lambda: settling(accuracy=0.95),
    "no accuracy": lambda: settling(accuracy=None),
}
QUIET = {
    "little of a small variance is the initial one": lambda: small(120),
    "little of a variance of one": lambda: small(60, std=1.0),
    "below_weight": lambda: settling(29),
    "below_shift": lambda: settling(shift=LIMITS["shift"] / 1.01),
    "below_shift of the spread": lambda: settling(shift=0.0, ratio=1 + LIMITS["shift"] / 1.01),
    "late in a training": lambda: learning(steps=320),
    "initial values that happen to fit": lambda: settling(1, shift=0.0),
    "a decay of zero, as in PointNet": lambda: settling(1, decay=0.0),
    "statistics that do not move are BN203's": lambda: testing.signals(
        *(testing.snapshot(n, testing.call(testing.layer(), mean=n, updates=n)) for n in (1, 2, 3)), evaluation()
    ),
    "a decay of one takes nothing in": lambda: settling(50, decay=1.0),
    "nothing watched": lambda: testing.signals(evaluation()),
}
SKIPS = {
    "no evaluation": (lambda: testing.signals(testing.snapshot(1)), None),
    "updates not known": (lambda: settling(None), None),
}

test_cases = cases.runner(RULE, fires=FIRES, info=INFO, quiet=QUIET, skips=SKIPS)


def test_it_says_when_it_will_be_settled():
    ((finding,), _) = cases.look(RULE, settling(20))
    assert finding.evidence["settled_after"].value == 29
    assert "12.2%" in finding.message
    assert [text.split(" ")[0] for text in finding.helps] == ["re-estimate", "or"]


@pytest.mark.parametrize(("variance", "weight"), [(1.0, 0.05), (0.25, 0.05), (0.2, 0.04), (0.01, 0.002)])
def test_of_a_variance_four_times_as_much_may_be_left_as_of_a_mean(variance, weight):
    spec = testing.layer(decay=0.99, epsilon=0.0)
    held = 0.99**100 + (1 - 0.99**100) * variance
    last = testing.call(spec, mean=1.0, var=variance, running_mean=0.1, running_var=held, updates=100)
    first = testing.call(spec, updates=1)
    fed = testing.signals(testing.snapshot(1, first), testing.snapshot(100, last), evaluation(step=100))
    ((finding,), _) = cases.look(RULE, fed)
    assert finding.evidence["settled_after"].value == moments.updates_until(0.99, weight)


WAIT = "first trust evaluation after update 299"
SHORTER = "use a shorter memory: decay 0.9 (Keras: momentum=0.9) settles in 29 updates"


@pytest.mark.parametrize(
    ("fields", "helps"),
    [
        ({"planned": 660}, [WAIT, f"or {SHORTER}"]),
        ({}, [WAIT, f"or {SHORTER}"]),
        ({"planned": 299}, [WAIT, f"or {SHORTER}"]),
        ({"planned": 298}, [SHORTER, "or re-estimate", f"or train longer: {WAIT}"]),
        ({"planned": 660, "ended": True}, [SHORTER, "or re-estimate", f"or train longer: {WAIT}"]),
    ],
)
def test_waiting_comes_first_only_where_it_helps(fields, helps):
    ((finding,), _) = cases.look(RULE, begun(**fields))
    assert len(finding.helps) == len(helps)
    assert all(found.startswith(wanted) for found, wanted in zip(finding.helps, helps, strict=True))


@pytest.mark.parametrize(
    ("sampled", "evaluated", "calls", "reported"),
    [
        (25, 28, 1, "28"),
        (25, 29, 1, None),
        (40, 28, 1, "28"),
        (40, 29, 1, None),
        (10, 14, 2, "28"),
        (10, 15, 2, None),
    ],
)
def test_what_counts_are_the_updates_at_the_evaluation_not_at_the_sample(sampled, evaluated, calls, reported):
    spec = testing.layer(epsilon=0.0)
    snapshots = [
        testing.snapshot(
            step,
            *(testing.call(spec, site=k, mean=2.0, running_mean=step / 99, updates=step * calls) for k in range(calls)),
        )
        for step in (1, sampled)
    ]
    findings, _ = cases.look(RULE, testing.signals(*snapshots, evaluation(step=evaluated)))
    assert [finding.evidence["updates"].value for finding in findings] == ([float(reported)] if reported else [])
    assert all(f"0.9^{reported}" in finding.notes[0] for finding in findings)


def test_cells_of_an_earlier_evaluation_do_not_count():
    old = testing.cells(1, evaluation={"batch": 0.9, "running": 0.2})
    findings, _ = cases.look(RULE, settling(accuracy=0.8, extra=[old]))
    assert {str(s) for s in cases.severities(RULE, findings)} == {"info"}


@pytest.mark.parametrize(
    ("fields", "outlook"),
    [
        ({"planned": 660}, "this clears by itself as training goes on, at step 299 of 660 planned"),
        ({}, "this clears by itself as training goes on, at step 299"),
        ({"planned": 176}, "training is to end at step 176, and this would clear at step 299"),
        ({"planned": 660, "ended": True}, "training has ended, so this is what is evaluated from now on"),
    ],
)
def test_it_says_whether_and_when_it_clears(fields, outlook):
    ((finding,), _) = cases.look(RULE, begun(**fields))
    assert finding.notes == (f"0.99^100 = 0.366; {outlook}",)


def test_a_loss_makes_it_likely_and_names_the_experiment():
    ((finding,), _) = cases.look(RULE, regressed(9.0))
    assert "likely that is why the evaluation loss is 9 and the training loss 1; what decides: " in finding.notes[1]
