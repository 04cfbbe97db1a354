import dataclasses

import numpy as np
import pytest

from bnwatch import testing
from bnwatch.records import Attachment, EvaluationRecord, Structure
from tests.rules import cases

RULE = "BN301"
# A z test of two samples of 1,000, .8 right in the first, gives p = .00101 at .742 in the second and .00085 at .741.
CHANCE, LOSS = 0.742, 0.741


def measured(batch, running, *, population=None, examples=10_000, split="evaluation", **more):
    row = {"batch": batch, "running": running, "population": batch if population is None else population}
    return testing.signals(testing.cells(2, **{split: row}, examples=examples, **more))


def paired(lost, examples=500):
    """``lost`` examples are right under batch statistics only, none under running statistics only: p = 2^-lost."""
    return measured(0.9, 0.9 - lost / examples, examples=examples)


def gap(accuracy, *, extra=()):
    record = EvaluationRecord(2, 0, accuracy, examples=1000, train_accuracy=0.8, train_examples=1000)
    return testing.signals(*extra, record)


def shared():
    draws = testing.normal(4, 64), testing.normal(4, 64, mean=1.0)
    return testing.signals(*testing.train(testing.layer(), *draws, steps=16), EvaluationRecord(16, 0, 0.5))


def attributed(*, cost=0.125, step=2, **recovered):
    """The cells of the founding program, and what each layer wins back of its cost, in points."""
    won = {name.replace("__", "#"): points / 100 for name, points in recovered.items()}
    return testing.signals(
        testing.cells(step, evaluation={"batch": 0.98, "running": 0.98 - cost, "population": 0.98}),
        testing.attribution(2, cost=cost, recovered=won),
    )


FIRES = {
    "the founding program": lambda: testing.signals(
        testing.cells(
            2,
            training={"batch": 1.0, "running": 0.88, "population": 0.9},
            evaluation={"batch": 0.98, "running": 0.855, "population": 0.87},
        )
    ),
    "above_cost": lambda: measured(0.9, 0.8899),
    "below_alpha": lambda: paired(10),
    "above_most": lambda: attributed(bn2=6.3, bn1=1.0),
    "below_most": lambda: attributed(bn2=6.2, bn1=6.2),
    "training data alone": lambda: measured(0.9, 0.5, split="training"),
}
QUIET = {
    "below_cost": lambda: measured(0.9, 0.8901),
    "above_alpha": lambda: paired(9),
    "running statistics are better, as with tiny batches": lambda: measured(0.66, 0.857),
    "evaluation inputs that are distributed otherwise": lambda: testing.signals(
        testing.cells(
            2,
            training={"batch": 0.999, "running": 0.998, "population": 1.0},
            evaluation={"batch": 0.987, "running": 0.486, "population": 0.486},
        )
    ),
    "ordinary overfitting": lambda: testing.signals(
        EvaluationRecord(2, 0, 0.567, examples=1000, train_accuracy=1.0, train_examples=1000),
        testing.cells(
            2,
            training={"batch": 1.0, "running": 1.0, "population": 1.0},
            evaluation={"batch": 0.569, "running": 0.567, "population": 0.567},
        ),
    ),
    "all at chance": lambda: measured(0.104, 0.104),
}
SKIPS = {
    "nothing was seen": (testing.signals, None),
    "nothing calls for it": (lambda: gap(0.8), None),
    "above_alpha of the gap": (lambda: gap(CHANCE), None),
    "below_alpha of the gap": (lambda: gap(LOSS), "cells"),
    "sites that differ": (shared, "cells"),
    "augmentation makes training harder": (lambda: gap(0.95), None),
}

test_cases = cases.runner(RULE, fires=FIRES, quiet=QUIET, skips=SKIPS)


@pytest.mark.parametrize(("population", "helps", "restored"), [(0.89, "re-estimate", True), (0.6, "two kinds", False)])
def test_what_a_re_estimate_restores_names_the_cause(population, helps, restored):
    ((finding,), _) = cases.look(RULE, measured(0.9, 0.5, population=population, split="training"))
    assert helps in finding.helps[0]
    assert ("do not restore" in finding.notes[1]) is not restored


def test_all_cells_are_in_the_table():
    ((finding,), _) = cases.look(RULE, FIRES["the founding program"]())
    assert finding.table.rows == (
        ("training data", 100.0, 88.0, 90.0, 1000.0),
        ("evaluation data", 98.0, 85.5, 87.0, 1000.0),
    )
    assert finding.evidence["cost"].value == pytest.approx(0.125)
    low, high = finding.evidence["accuracy"].interval
    assert low < 0.855 < high


def test_what_was_not_measured_says_so():
    ((finding,), _) = cases.look(
        RULE,
        testing.signals(testing.cells(2, evaluation={"batch": 0.9, "running": 0.5}, missing="no training examples")),
    )
    assert finding.table.rows[0][3] == "not measured"
    assert finding.notes[1:] == ("measured on part of the data only: no training examples",)


def test_older_cells_go_on_to_hold_while_new_ones_are_asked_for():
    fed = gap(LOSS, extra=[dataclasses.replace(testing.cells(1, evaluation={"batch": 0.9, "running": 0.5}))])
    findings, skipped = cases.look(RULE, fed)
    assert len(findings) == 1
    assert [s.needs for s in skipped] == ["cells"]


def test_pairing_counts_not_the_accuracies_alone():
    """Forty examples won and thirty lost are no significant difference, though ten points apart are."""
    cells = testing.cells(2, evaluation={"batch": 0.9, "running": 0.9}, examples=500)
    running, batch = cells.evaluation["running"], cells.evaluation["batch"]
    wrong = np.where(np.arange(500) < 40, (running.labels + 1) % 10, running.predicted)
    cells.evaluation["running"] = dataclasses.replace(running, predicted=wrong)
    other = np.where((np.arange(500) >= 100) & (np.arange(500) < 130), (batch.labels + 1) % 10, batch.predicted)
    cells.evaluation["batch"] = dataclasses.replace(batch, predicted=other)
    assert cells.evaluation["batch"].accuracy - cells.evaluation["running"].accuracy == pytest.approx(0.02)
    assert cases.look(RULE, testing.signals(cells)) == ([], [])


def test_above_most_of_the_loss_a_layer_is_named_and_below_it_none_is():
    ((above,), skipped) = cases.look(RULE, FIRES["above_most"]())
    ((below,), _) = cases.look(RULE, FIRES["below_most"]())
    assert skipped == []
    assert above.message.startswith("running statistics cost 12.5 points of evaluation accuracy, most of it at `bn2`: ")
    assert (
        "batch statistics at `bn2` alone, running statistics everywhere else, win back 6.3 of 12.5" in above.notes[-1]
    )
    assert "most of it" not in below.message
    assert below.notes[-1].startswith("no layer explains it alone: batch statistics at `bn2` win back the most, 6.2 of")
    assert below.notes[-1].endswith(" of 12.5 points on 1,000 examples")


def test_a_call_site_is_named_where_it_explains_as_much():
    ((finding,), _) = cases.look(RULE, attributed(bn__1=12.5, bn=12.0, other=1.0))
    assert "most of it at `bn#1`" in finding.message


def test_the_ranking_is_short_and_says_how_sure_it_is():
    ((finding,), _) = cases.look(RULE, attributed(**{f"bn{n}": 10.0 - n for n in range(8)}))
    (ranking,) = finding.further
    assert ranking.columns[:3] == ("accuracy points at", "batch statistics there win back", "95% interval")
    assert [row[:2] for row in ranking.rows] == [(f"bn{n}", 10.0 - n) for n in range(5)]
    assert ranking.rows[0][2] == "8.1 to 11.9"  # 100 of 1,000 examples, all of them one way


def test_layers_there_was_no_time_for_are_named():
    cells = testing.cells(2, evaluation={"batch": 0.98, "running": 0.85})
    few = testing.attribution(2, cost=0.13, recovered={"a": 0.01}, unmeasured=("b", "c#0"))
    ((finding,), _) = cases.look(RULE, testing.signals(cells, few))
    assert finding.notes[-1] == "2 of 3 layers and call sites were not measured for lack of time: `b`, `c#0`"
    many = testing.attribution(2, cost=0.13, recovered={"a": 0.01}, unmeasured=tuple("bcdefgh"))
    ((finding,), _) = cases.look(RULE, testing.signals(cells, many))
    assert finding.notes[-1].endswith("for lack of time: `b`, `c`, `d`, `e`, `f` and others")


def test_cells_that_show_a_cost_ask_for_its_attribution():
    findings, skipped = cases.look(RULE, measured(0.9, 0.5))
    assert findings[0].further == ()
    assert [s.needs for s in skipped] == ["attribution"]
    assert cases.look(RULE, measured(0.9, 0.9)) == ([], [])


def test_the_attribution_of_other_cells_does_not_count():
    findings, skipped = cases.look(RULE, attributed(bn2=12.0, step=3))
    assert findings[0].further == ()
    assert [s.needs for s in skipped] == ["attribution"]


@pytest.mark.parametrize("framework", ["keras 3.15.1 (torch)", "chainer 7.8.1", "recorded by hand"])
def test_the_repair_is_named_as_the_user_calls_it(framework):
    known = measured(0.9, 0.5, population=0.89, split="training")
    known.attach(Attachment((), framework=framework))
    ((finding,), _) = cases.look(RULE, known)
    module = framework.partition(" ")[0]
    assert (f"`bnwatch.{module}.recalibrate(model, batches)`" in finding.helps[0]) is (module != "recorded")


def settling(step, *, planned=None, population=0.9, measured_at=None, ended=False):
    """A training at decay .99 whose running statistics cost accuracy, by cells of ``measured_at``."""
    spec, at = testing.layer(decay=0.99), step if measured_at is None else measured_at
    signals = testing.signals(
        Structure(steps_per_epoch=planned or 1, epochs=1),
        testing.snapshot(step - 1, testing.call(spec, updates=1)),
        testing.snapshot(step, testing.call(spec, mean=1.0, running_mean=0.1, updates=step)),
        EvaluationRecord(step, 0, 0.5, examples=1000, train_accuracy=0.9, train_examples=1000),
        testing.cells(at, training={"batch": 0.9, "running": 0.5, "population": population}),
    )
    signals.ended = ended
    return signals


@pytest.mark.parametrize(
    ("severity", "fields"),
    [
        ("info", {"planned": 660}),
        ("info", {}),
        ("warning", {"planned": 176}),
        ("warning", {"planned": 660, "ended": True}),
        # two populations are not one that is still to settle
        ("warning", {"planned": 660, "population": 0.6}),
    ],
)
def test_what_settles_by_itself_is_no_warning(severity, fields):
    findings, _ = cases.look(RULE, settling(100, **fields))
    assert {str(s) for s in cases.severities(RULE, findings)} == {severity}


def test_a_lag_behind_the_weights_is_a_warning_when_training_ends():
    for ended, severity in ((False, "info"), (True, "warning")):
        findings, _ = cases.look(RULE, settling(400, planned=660, ended=ended))
        assert {str(s) for s in cases.severities(RULE, findings)} == {severity}


@pytest.mark.parametrize(("measured_at", "severity"), [(100, "info"), (2000, "warning")])
def test_cells_of_unsettled_statistics_say_nothing_of_settled_ones(measured_at, severity):
    findings, _ = cases.look(RULE, settling(2010, planned=2010, measured_at=measured_at))
    assert {str(s) for s in cases.severities(RULE, findings)} == {severity}


@pytest.mark.parametrize(
    ("site", "excluded"),
    [
        (testing.site_composition(dispersion=1.2, p=0.3), True),
        (testing.site_composition(dispersion=9.0, p=1e-9), False),
        (None, False),
    ],
    ids=["random batches", "batches of one class", "not measured"],
)
def test_what_the_composition_of_the_batches_excludes_is_not_looked_for(site, excluded):
    fed = measured(0.9, 0.5, population=0.6, split="training")
    fed.composition = None if site is None else testing.composition(2, site)
    ((finding,), _) = cases.look(RULE, fed)
    assert ("one class each" not in finding.helps[0]) is excluded
    assert any("it is not how batches are composed" in note for note in finding.notes) is excluded


def test_where_layers_and_batches_are_of_one_kind_outliers_are_left():
    spec = testing.layer()
    fed = testing.signals(
        testing.snapshot(1, testing.call(spec)),
        testing.cells(2, training={"batch": 0.9, "running": 0.5, "population": 0.6}),
        testing.composition(2, testing.site_composition()),
    )
    ((finding,), _) = cases.look(RULE, fed)
    assert "few examples that are far out of range" in finding.helps[0]


@pytest.mark.parametrize(("places", "other"), [(1, True), (2, False)], ids=["another pass", "one pass"])
def test_other_data_that_a_step_passes_through_the_model_besides(places, other):
    spec = testing.layer()
    fed = testing.signals(
        Attachment((spec,), framework="keras 3.15.1 (jax)"),
        *testing.train(spec, testing.normal(4, 64), testing.normal(4, 64, mean=1.0), steps=16),
        Structure((testing.usage("bn", *(testing.place(index=n) for n in range(places))),)),
        testing.cells(16, training={"batch": 0.9, "running": 0.5, "population": 0.9}),
    )
    ((finding,), _) = cases.look(RULE, fed)
    assert any("training steps call `bn` on other data besides" in note for note in finding.notes) is other
    assert any("out of date" in note for note in finding.notes) is not other
    assert ("make the other passes of a training step with `training=False`" in finding.helps[0]) is other


@pytest.mark.parametrize("rule_id", ["BN301", "BN304", "BN305"])
@pytest.mark.parametrize(
    ("accuracy", "refused", "reason"),
    [
        (0.8, None, "no experiment was run: nothing called for one"),
        (None, None, "no experiment was run: it takes an evaluation accuracy to call for one, and none was seen"),
        (None, "targets are no classes", "the experiment could not be run, which is BN904"),
    ],
)
def test_why_no_experiment_was_run(rule_id, accuracy, refused, reason):
    fed = testing.signals(EvaluationRecord(2, 0, accuracy, examples=1000))
    fed.refused = refused
    findings, skipped = cases.look(rule_id, fed)
    assert (findings, [(s.reason, s.needs) for s in skipped]) == ([], [(reason, None)])


@pytest.mark.parametrize(("population", "told"), [(0.9, True), (0.6, False)])
def test_statistics_that_moved_when_nothing_was_trained_are_not_called_out_of_date(population, told):
    fed = measured(0.9, 0.5, population=population, split="training")
    fed.cells = dataclasses.replace(fed.cells, moved=("bn",))
    ((finding,), _) = cases.look(RULE, fed)
    assert any("the running ones of `bn` moved when no step was trained" in note for note in finding.notes) is told
    assert not any("out of date" in note for note in finding.notes)
