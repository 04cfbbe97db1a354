from dataclasses import replace

import pytest

from bnwatch import testing
from bnwatch.diagnosis import Severity, Skipped
from bnwatch.engine import QUIET_LOOKS, Allowances, Engine
from bnwatch.records import Attachment, EvaluationRecord, Structure
from bnwatch.rules import CATALOGUE, Finding, rule


def script(rule_id, *outcomes, causes=(), severity=Severity.WARNING):
    """A rule that gives one outcome a look: a finding, several, a `Skipped`, or None for quiet."""
    pending = iter(outcomes)

    @rule(rule_id, f"name-of-{rule_id.lower()}", severity=severity, causes=causes)
    def scripted(_signals, _limits):
        """Follow the script."""
        outcome = next(pending)
        yield from outcome if isinstance(outcome, list) else [] if outcome is None else [outcome]

    return scripted


def found(subject="bn", **fields):
    return Finding(subject, "it is so", **fields)


def at(step):
    return testing.signals(testing.snapshot(step, epoch=step // 10))


def engine(*rules, allow=None):
    return Engine(Allowances(allow, rules), rules)


def test_a_diagnosis_appears_and_persists_without_being_news():
    run = engine(script("BN801", None, found(), found()))
    assert run.run(at(1)) == []
    (first,) = run.run(at(20))
    assert (first.key, first.state, first.step, first.epoch, first.last_step) == ("BN801 bn", "active", 20, 2, 20)
    assert (first.rule, first.name, first.severity) == ("BN801", "name-of-bn801", Severity.WARNING)
    assert run.run(at(30)) == []
    (held,) = run.diagnoses
    assert (held.step, held.epoch, held.last_step) == (20, 2, 30)


def test_numbers_follow_the_latest_look():
    run = engine(script("BN801", found(helps=("old",)), found(helps=("new",))))
    run.run(at(1))
    run.run(at(2))
    assert run.diagnoses[0].helps == ("new",)


def test_the_line_that_built_the_layer_is_named_where_it_is_known():
    run = engine(script("BN801", [found("bn"), found("unknown"), found("model")]))
    spec = replace(testing.layer("bn"), built_at="model.py:12")
    run.run(testing.signals(Attachment((spec, testing.layer("unknown")))))
    assert {d.subject: d.built_at for d in run.diagnoses} == {"bn": "model.py:12", "unknown": None, "model": None}


def test_one_quiet_look_is_a_fluke_and_two_clear():
    assert QUIET_LOOKS == 2
    run = engine(script("BN801", found(), None, found(), None, None))
    run.run(at(1))
    assert run.run(at(2)) == []
    assert run.run(at(3)) == []
    assert run.run(at(4)) == []
    assert run.diagnoses[0].state == "active"
    (cleared,) = run.run(at(5))
    assert (cleared.state, cleared.last_step) == ("cleared", 3)


def test_what_clears_may_come_back():
    run = engine(script("BN801", found(), None, None, found()))
    for step in (1, 2, 3):
        run.run(at(step))
    (again,) = run.run(at(40))
    assert (again.state, again.step, again.last_step) == ("active", 40, 40)
    assert len(run.diagnoses) == 1


def test_skipped_never_clears():
    skip = Skipped("BN801", "cannot look")
    run = engine(script("BN801", found(), skip, skip, skip, skip))
    for step in range(1, 6):
        run.run(at(step))
    assert run.diagnoses[0].state == "active"
    assert run.skipped == (skip,)


def test_a_skip_between_does_not_count_as_quiet():
    run = engine(script("BN801", found(), None, Skipped("BN801", "cannot look"), None))
    for step in range(1, 4):
        run.run(at(step))
    assert run.diagnoses[0].state == "active"
    run.run(at(4))
    assert run.diagnoses[0].state == "cleared"


def test_skipped_is_forgotten_once_the_rule_can_look():
    run = engine(script("BN801", Skipped("BN801", "cannot look", "cells"), None))
    run.run(at(1))
    assert run.needs("cells")
    assert run.needs("look", "cells")
    assert not run.needs("look")
    run.run(at(2))
    assert run.skipped == ()
    assert not run.needs("cells")


def test_the_skip_that_asks_for_an_experiment_is_the_one_kept():
    asks = Skipped("BN801", "an experiment decides", "look")
    run = engine(script("BN801", [Skipped("BN801", "no data"), asks]))
    run.run(at(1))
    assert run.skipped == (asks,)


def test_subjects_live_apart():
    run = engine(script("BN801", [found("a"), found("b")], found("a"), found("a")))
    run.run(at(1))
    run.run(at(2))
    (cleared,) = run.run(at(3))
    assert cleared.subject == "b"
    assert {d.subject: d.state for d in run.diagnoses} == {"a": "active", "b": "cleared"}


def test_a_severity_upgrade_is_news_and_keeps_its_first_step():
    run = engine(script("BN801", found(severity=Severity.INFO), found(severity=Severity.ERROR), found()))
    run.run(at(1))
    (worse,) = run.run(at(2))
    assert (worse.severity, worse.step) == (Severity.ERROR, 1)
    (better,) = run.run(at(3))
    assert better.severity == Severity.WARNING


@pytest.mark.parametrize("entry", ["BN801", "name-of-bn801", "BN801:encoder/*", "name-of-bn801:encoder/bn_?"])
def test_allowed_by_id_name_and_pattern(entry):
    run = engine(script("BN801", found("encoder/bn_1")), allow={entry: "siamese towers"})
    (diagnosis,) = run.run(at(1))
    assert (diagnosis.state, diagnosis.reason) == ("allowed", "siamese towers")


@pytest.mark.parametrize("entry", ["BN801:decoder/*", "BN801:encoder", "BN801:ENCODER/*", "BN802"])
def test_another_pattern_does_not_allow(entry):
    rules = script("BN801", found("encoder/bn_1")), script("BN802", None)
    allow = Allowances({entry: "because"}, rules)
    (diagnosis,) = Engine(allow, rules).run(at(1))
    assert (diagnosis.state, diagnosis.reason) == ("active", None)
    assert allow.unused == {entry}


def test_a_used_allowance_is_not_unused():
    rules = (script("BN801", found()),)
    allow = Allowances({"BN801": "because"}, rules)
    Engine(allow, rules).run(at(1))
    assert allow.unused == set()


def test_every_pattern_that_matches_is_used():
    rules = (script("BN801", found("encoder/bn")),)
    allow = Allowances({"BN801": "all of them", "BN801:encoder/*": "these"}, rules)
    (diagnosis,) = Engine(allow, rules).run(at(1))
    assert diagnosis.reason == "all of them"
    assert allow.unused == set()


@pytest.mark.parametrize("reason", ["", "   ", None])
def test_an_allowance_needs_a_reason(reason):
    with pytest.raises(ValueError, match="'BN101' needs a reason, a non-empty text such as"):
        Allowances({"BN101": reason})


@pytest.mark.parametrize("entry", ["BN999", "bn101", "", "BN101 :x"])
def test_an_unknown_rule_is_named(entry):
    with pytest.raises(ValueError, match=r"allow: unknown rule .* `bnwatch rules` lists them"):
        Allowances({entry: "because"})


def test_rule_names_of_the_catalogue_are_understood():
    Allowances({name: "because" for r in CATALOGUE for name in (r.id, r.name)})


def test_allowed_diagnoses_clear_too():
    run = engine(script("BN801", found(), None, None), allow={"BN801": "because"})
    for step in (1, 2, 3):
        run.run(at(step))
    assert run.diagnoses[0].state == "cleared"


def test_what_the_last_look_did_not_find_no_longer_holds():
    run = engine(script("BN801", found(), None, Skipped("BN801", "no data"), found()))
    held = []
    for step in (1, 2, 3, 4):
        run.run(at(step))
        held.append((run.diagnoses[0].state, run.holds("BN801 bn")))
    assert held == [("active", True), ("active", False), ("active", False), ("active", True)]


def test_a_consequence_names_its_cause():
    run = engine(
        script("BN801", found("a"), found("a"), None, None), script("BN802", *[found("b")] * 4, causes=("BN801",))
    )
    run.run(at(1))
    first, second = run.diagnoses
    assert (first.key, first.causes) == ("BN801 a", ())
    assert (second.key, second.causes) == ("BN802 b", ("BN801 a",))
    assert run.run(at(2)) == []
    run.run(at(3))
    changed = run.run(at(4))
    assert {(d.key, d.state, d.causes) for d in changed} == {
        ("BN801 a", "cleared", ()),
        ("BN802 b", "active", ()),
    }


def test_a_cause_that_comes_later_is_news_of_the_consequence():
    run = engine(script("BN801", None, found("a")), script("BN802", found("b"), found("b"), causes=("BN801",)))
    run.run(at(1))
    assert [(d.key, d.causes) for d in run.run(at(2))] == [("BN802 b", ("BN801 a",)), ("BN801 a", ())]


def test_info_explains_nothing():
    run = engine(script("BN801", found(severity=Severity.INFO)), script("BN802", found(), causes=("BN801",)))
    run.run(at(1))
    assert all(d.causes == () for d in run.diagnoses)


def test_order_is_active_causes_gravest_first():
    run = engine(
        script("BN801", found("gone"), None, None, severity=Severity.ERROR),
        script("BN802", *[found("mild")] * 3),
        script("BN803", *[found("grave")] * 3, severity=Severity.ERROR),
        script("BN804", *[found("folded")] * 3, causes=("BN803",), severity=Severity.ERROR),
    )
    for step in (1, 2, 3):
        run.run(at(step))
    assert [d.subject for d in run.diagnoses] == ["grave", "mild", "folded", "gone"]


def test_the_whole_catalogue_is_quiet_on_nothing():
    run = Engine()
    assert run.run(testing.signals()) == []
    assert all(s.reason and not s.reason.endswith(".") for s in run.skipped)


SICK = {
    "one poisoned batch": ("BN401", "BN301", "BN302", "BN303"),
    "statistics in float16": ("BN403", "BN402", "BN401", "BN404", "BN301", "BN302"),
    "evaluated in training mode": ("BN103", "BN106", "BN201", "BN304", "BN301", "BN303"),
    "left in evaluation mode": ("BN107", "BN104", "BN203", "BN201", "BN301", "BN303"),
    "never called in training mode": ("BN104", "BN203", "BN211", "BN201", "BN301"),
    "frozen, and not in inference mode": ("BN105", "BN203", "BN106", "BN210", "BN304", "BN301"),
    "updates that never run": ("BN203", "BN211", "BN201", "BN301", "BN302"),
    "weights loaded without statistics": ("BN211", "BN210", "BN201", "BN301"),
    "a frozen backbone loaded without statistics": ("BN211", "BN301", "BN302"),
    "averaged weights": ("BN210", "BN206", "BN202", "BN301", "BN303"),
    "one example a batch": ("BN205", "BN213", "BN204", "BN404", "BN201", "BN301", "BN302"),
    "two examples a micro-batch": ("BN213", "BN204", "BN202", "BN301", "BN303"),
    "one example left over": ("BN206", "BN209", "BN202", "BN301", "BN303"),
    "two sensors, one layer": ("BN101", "BN208", "BN207", "BN202", "BN201", "BN301", "BN303"),
    "real and fake in turn": ("BN208", "BN207", "BN209", "BN201", "BN301", "BN303"),
    "one class a batch": ("BN207", "BN209", "BN201", "BN301", "BN303"),
    "a memory of one batch": ("BN202", "BN108", "BN301", "BN303"),
    "a short training with a long memory": ("BN201", "BN108", "BN301", "BN302", "BN303"),
    "dropout in front": ("BN108", "BN301", "BN303"),
    "shards that are not shuffled": ("BN212", "BN208", "BN207", "BN209", "BN301", "BN303"),
    "a dead bottleneck": ("BN306", "BN404", "BN302"),
    "features that never varied": ("BN404", "BN304", "BN301", "BN303"),
    "inputs scaled down twice": ("BN405", "BN302"),
    "evaluation without preprocessing": ("BN304", "BN301", "BN303"),
}


def firing(*ids):
    """Rules of these ids, each of which finds something."""
    return [script(id_, found(f"of {id_}")) for id_ in ids]


@pytest.mark.parametrize("ids", SICK.values(), ids=SICK)
@pytest.mark.parametrize("backwards", [False, True])
def test_a_sick_program_has_one_headline(ids, backwards):
    run = engine(*firing(*sorted(ids, reverse=backwards)))
    run.run(at(1))
    assert [d.rule for d in run.diagnoses if not d.causes] == [ids[0]]
    assert run.diagnoses[0].rule == ids[0]
    by_key = {d.key: d for d in run.diagnoses}
    for diagnosis in run.diagnoses:
        first = diagnosis
        while first.causes:
            first = by_key[first.causes[0]]
        assert first.rule == ids[0]


def test_independent_faults_come_in_the_order_of_decision():
    """Neither the severity nor the step at which each was found decides."""
    ids = ("BN103", "BN102", "BN101", "BN306", "BN109")
    last, *others = firing(*ids)
    late = script("BN103", None, found("of BN103"))
    grave = script("BN109", *[found("of BN109", severity=Severity.ERROR)] * 2)
    again = [script(rule.id, *[found(f"of {rule.id}")] * 2) for rule in others[:-1]]
    run = engine(grave, *again, late)
    run.run(at(1))
    run.run(at(2))
    assert [d.rule for d in run.diagnoses] == list(ids)
    assert last.id == "BN103"


def test_what_is_worth_knowing_comes_behind_what_is_wrong():
    run = engine(script("BN101", found(severity=Severity.INFO)), *firing("BN304"))
    run.run(at(1))
    assert [d.rule for d in run.diagnoses] == ["BN304", "BN101"]
    assert run.diagnoses[0].causes == ()


def trained(*draws, steps=60, decay=0.9, accuracy=0.5, cells=None, **plan):
    """The signals of a training with the whole catalogue's eyes, after an evaluation."""
    spec = testing.layer(channels=8, decay=decay)
    steps_of = Structure((testing.usage(decay=decay),), steps_per_epoch=plan.get("planned", steps), epochs=1)
    record = EvaluationRecord(steps, 0, accuracy, examples=1000, train_accuracy=0.98, train_examples=1000, classes=10)
    row = cells or {"batch": 0.98, "running": accuracy, "population": 0.98}
    return testing.signals(
        steps_of, *testing.train(spec, *draws, steps=steps), record, testing.cells(steps, training=row, evaluation=row)
    )


REAL = {
    "a short training with a long memory": (
        "BN201", lambda: trained(testing.normal(8, 64, mean=3.0), decay=0.99),
    ),
    "a long training that has begun": (None, lambda: trained(testing.normal(8, 64, mean=3.0), decay=0.99, planned=660)),
    "two sensors, and a short training": (
        "BN101",
        lambda: trained(
            testing.normal(8, 64), testing.normal(8, 64, mean=3.0), decay=0.99,
            cells={"batch": 0.98, "running": 0.5, "population": 0.7},
        ),
    ),
    "two call sites that differ, and a short training": (
        "BN201", lambda: trained(testing.normal(8, 64), testing.normal(8, 64, mean=3.0), decay=0.99),
    ),
    "updates that never run": ("BN203", lambda: trained(testing.normal(8, 64, mean=3.0), decay=1.0)),
    "a memory of one batch": ("BN202", lambda: trained(testing.normal(8, 64), decay=0.01, accuracy=0.94)),
    "healthy": (None, lambda: trained(testing.normal(8, 64), accuracy=0.98)),
}  # fmt: skip


@pytest.mark.parametrize(("headline", "build"), REAL.values(), ids=REAL)
def test_the_catalogue_gives_one_headline(headline, build):
    run = Engine()
    run.run(build())
    grave = [d.rule for d in run.diagnoses if d.severity >= Severity.WARNING and not d.causes]
    assert grave == ([] if headline is None else [headline])
