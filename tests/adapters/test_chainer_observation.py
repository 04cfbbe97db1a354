"""What the watch measured, in the log, the table and the plots of Chainer's own extensions, for who asks for it."""

from __future__ import annotations

import io
import json
from typing import Any

import numpy as np
import pytest

import bnwatch.chainer
from bnwatch import Severity
from bnwatch.chainer import session
from bnwatch.sinks.tensorboard import read_runs

from . import chainer_models as models
from .chainer_models import L, chainer, extensions, state_of

KEYS = ["bnwatch/worst/mean_shift", "bnwatch/worst/log_std_ratio", "bnwatch/accuracy/gap", "bnwatch/diagnoses"]


def trainer_of(out: Any, *, observe: bool = True, every: int = 1, epochs: int = 2, **options: Any) -> tuple[Any, Any]:
    np.random.seed(0)  # noqa: NPY002
    trainer = models.trainer_of(L.Classifier(models.MLP(shared=True)), out, epochs=epochs)
    watch = bnwatch.chainer.BatchNormWatch(out / "runs", every=every, on_diagnosis="log", observe=observe, **options)
    trainer.extend(watch)
    return trainer, watch


def test_the_log_holds_the_averages_of_what_the_record_holds(tmp_path: Any) -> None:
    trainer, watch = trainer_of(tmp_path)
    observed: list[dict[str, Any]] = []
    trainer.extend(
        lambda t: observed.append({k: v for k, v in t.observation.items() if k.startswith("bnwatch/")}),
        name="observed",
        trigger=lambda _: True,
    )
    trainer.run()
    log = json.loads((tmp_path / "log").read_text())
    (run,) = read_runs(tmp_path / "runs")
    for entry, tables, evaluation in zip(log, (run.tables[:8], run.tables[8:]), run.evaluations, strict=True):
        shift = [np.abs(table.column("mean_shift")).max() for table in tables]
        ratio = [np.abs(np.log(table.column("std_ratio"))).max() for table in tables]
        np.testing.assert_allclose(entry[KEYS[0]], np.mean(shift), rtol=1e-6)
        np.testing.assert_allclose(entry[KEYS[1]], np.mean(ratio), rtol=1e-6)
        np.testing.assert_allclose(entry[KEYS[2]], evaluation.train_accuracy - evaluation.accuracy, rtol=1e-12)
    assert [set(values) for values in observed] == [set(KEYS) - ({KEYS[2]} if n % 8 else set()) for n in range(1, 17)]
    assert {type(value) for values in observed for value in values.values()} == {float}
    counts = [values[KEYS[3]] for values in observed]
    warned = [d for d in watch.diagnoses if d.state == "active" and d.severity >= Severity.WARNING]
    assert (counts[0], counts[-1]) == (0.0, len(warned)) == (0.0, 1)
    np.testing.assert_allclose([entry[KEYS[3]] for entry in log], [np.mean(counts[:8]), np.mean(counts[8:])])


def test_only_sampled_iterations_carry_them_and_nothing_is_copied_on_others(tmp_path: Any, monkeypatch: Any) -> None:
    trainer, watch = trainer_of(tmp_path, every=8, epochs=4, experiments=False)
    copied: list[int] = []
    collect = session.collect

    def counted(*arrays: Any) -> Any:
        copied.append(trainer.updater.iteration)
        return collect(*arrays)

    monkeypatch.setattr(session, "collect", counted)
    carried: list[int] = []

    def look(trainer: Any) -> None:
        if any(key in trainer.observation for key in KEYS):
            carried.append(trainer.updater.iteration)

    trainer.extend(look, name="look", trigger=lambda _: True)
    trainer.run()
    sampled = [step for step in range(1, 33) if watch.watch.due(step)]
    assert carried == sampled == copied
    assert len(sampled) < 32


def test_chosen_keys_in_a_table(tmp_path: Any) -> None:
    trainer, _ = trainer_of(tmp_path)
    printed = io.StringIO()
    report = extensions.LogReport(keys=["main/loss", *KEYS], trigger=(1, "epoch"), filename="chosen")
    trainer.extend(report, name="chosen")
    trainer.extend(extensions.PrintReport(["epoch", *KEYS], log_report="chosen", out=printed))
    trainer.run()
    log = json.loads((tmp_path / "chosen").read_text())
    assert set(log[-1]) == {"main/loss", *KEYS, "epoch", "iteration", "elapsed_time"}
    head, *rows = [line.split() for line in printed.getvalue().replace("\x1b[J", "").splitlines()]
    assert head == ["epoch", *KEYS]
    assert rows == [[str(entry["epoch"]), *(f"{entry[key]:g}" for key in KEYS)] for entry in log]


def test_a_plot(tmp_path: Any) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed: PlotReport does nothing without it").use(
        "Agg"
    )
    trainer, _ = trainer_of(tmp_path)
    drawn: list[list[float]] = []
    trainer.extend(
        extensions.PlotReport(
            KEYS[:2],
            "epoch",
            trigger=(1, "epoch"),
            filename="worst.png",
            postprocess=lambda _figure, axes, _summary: drawn.append(
                [line.get_ydata()[-1] for line in axes.get_lines()]
            ),
        )
    )
    trainer.run()
    log = json.loads((tmp_path / "log").read_text())
    np.testing.assert_allclose(drawn[-1], [log[-1][key] for key in KEYS[:2]])
    assert (tmp_path / "worst.png").read_bytes().startswith(b"\x89PNG")


def snapshot_of(trainer: Any) -> dict[str, bytes]:
    state = state_of(trainer)
    return {key: value for key, value in state.items() if not key.endswith(("elapsed_time", "_log"))}


def test_by_default_observation_log_and_snapshot_are_those_of_an_unwatched_run(tmp_path: Any) -> None:
    watched, _ = trainer_of(tmp_path / "a", observe=False)
    np.random.seed(0)  # noqa: NPY002
    plain = models.trainer_of(L.Classifier(models.MLP(shared=True)), tmp_path / "b", epochs=2)
    for trainer in (watched, plain):
        trainer.stop_trigger = chainer.training.triggers.ManualScheduleTrigger(12, "iteration")
    np.random.seed(1)  # noqa: NPY002
    watched.run()
    np.random.seed(1)  # noqa: NPY002
    plain.run()
    assert snapshot_of(watched) == snapshot_of(plain)
    logs = [json.loads((tmp_path / name / "log").read_text()) for name in "ab"]
    assert all(entry.pop("elapsed_time") for log in logs for entry in log)
    assert logs[0] == logs[1]


def test_what_is_trained_is_the_same_with_them(tmp_path: Any) -> None:
    found = []
    for observe in (False, True):
        trainer, _ = trainer_of(tmp_path / str(observe), observe=observe)
        trainer.run()
        optimizer = trainer.updater.get_optimizer("main")
        found.append(state_of(optimizer.target, optimizer))
    assert found[0] == found[1]


def test_observe_is_true_or_false() -> None:
    with pytest.raises(ValueError, match="observe must be True or False, got 'all'"):
        bnwatch.chainer.BatchNormWatch(None, observe="all")
