"""Rules are pure: what is recorded gives the diagnoses of the training once more."""

import glob

import pytest

from bnwatch import testing
from bnwatch.cli import main
from bnwatch.records import Attachment, EvaluationRecord, Structure
from bnwatch.replay import parse_thresholds, replay
from bnwatch.sinks.tensorboard import read_runs
from bnwatch.watch import Watch


def told(report):
    return [(d.key, d.severity, d.state, d.causes, d.message, d.step, d.notes, d.helps) for d in report.diagnoses]


def trained(log_dir, *, sites, evaluations=3, allow=None):
    """Return the watch of a simulated training with experiments."""
    spec = testing.layer("bn", 8, decay=0.99)
    lab = testing.FakeLaboratory.separable()
    watch = Watch(log_dir, on_diagnosis=lambda _: None, allow=allow)
    watch.open(Attachment((spec,), framework="keras 3.15.1 (tensorflow)"))
    watch.structured(Structure((testing.usage("bn", decay=0.99),), steps_per_epoch=10, epochs=evaluations))
    for snapshot in testing.train(spec, *sites, steps=10 * evaluations):
        watch.observe(snapshot)
        if snapshot.step % 10 == 0:
            watch.look(lab, step=snapshot.step, epoch=snapshot.step // 10 - 1)
            record = EvaluationRecord(
                snapshot.step, snapshot.step // 10 - 1, 0.5, None, 400, 0.9, None, 320, classes=4, majority=0.25
            )  # fmt: skip
            watch.evaluated(record)
            watch.experiment(lab, step=snapshot.step, epoch=snapshot.step // 10 - 1, seconds=None)
    watch.close()
    return watch


SITES = {
    "one": (testing.normal(8, 32),),
    "two that differ": (testing.normal(8, 32), testing.normal(8, 32, mean=3.0)),
    "two that agree": (testing.normal(8, 32), testing.normal(8, 32)),
}


@pytest.mark.parametrize("sites", SITES.values(), ids=SITES)
def test_a_record_replays_to_the_diagnoses_of_the_training(tmp_path, sites):
    watch = trained(tmp_path, sites=sites)
    assert any(d.rule == "BN301" for d in watch.diagnoses)
    (run,) = read_runs(tmp_path)
    again = replay(run)
    assert told(again) == told(watch.report())
    assert {s.rule: s.reason for s in again.skipped} == {s.rule: s.reason for s in watch.skipped}


def test_what_was_allowed_stays_allowed(tmp_path):
    subject = "bn"
    watch = trained(tmp_path, sites=SITES["two that differ"], allow={f"BN101:{glob.escape(subject)}": "known"})
    (run,) = read_runs(tmp_path)
    found = {d.key: (d.state, d.reason) for d in replay(run).diagnoses}
    assert found["BN101 bn"] == ("allowed", "known")
    assert told(replay(run)) == told(watch.report())


def test_other_thresholds_give_other_diagnoses(tmp_path):
    trained(tmp_path, sites=SITES["two that differ"])
    (run,) = read_runs(tmp_path)
    assert "BN101 bn" in {d.key for d in replay(run).diagnoses if d.severity > 1}
    loose = replay(run, {"BN101": {"shift": 100.0}})
    assert "BN101 bn" not in {d.key for d in loose.diagnoses if d.severity > 1}


@pytest.mark.parametrize(
    ("setting", "complaint"),
    [
        ("BN101.alpha", "no threshold 'BN101.alpha'"),
        ("BN101.alfa=1", "did you mean BN101.alpha"),
        ("nonsense=1", "`bnwatch rules` lists them"),
        ("BN101.alpha=much", "sets a threshold to no number"),
    ],
)
def test_a_threshold_that_is_none_gets_one_sentence(setting, complaint):
    with pytest.raises(ValueError, match=complaint):
        parse_thresholds([setting])


def test_on_the_command_line(tmp_path, capsys):
    trained(tmp_path, sites=SITES["two that differ"])
    assert main(["report", str(tmp_path)]) == 1
    then = capsys.readouterr().out
    assert main(["report", str(tmp_path), "--replay"]) == 1
    assert capsys.readouterr().out == then
    main(["report", str(tmp_path), "--replay", "--set", "BN101.shift=100"])
    assert "warning[BN101]" in then
    assert "warning[BN101]" not in capsys.readouterr().out
    assert main(["report", str(tmp_path), "--set", "BN101.shift=100"]) == 2
    assert "--replay" in capsys.readouterr().err
    assert main(["report", str(tmp_path), "--replay", "--set", "BN101.shift=x"]) == 2
    assert "--set: 'BN101.shift=x' sets a threshold to no number" in capsys.readouterr().err
