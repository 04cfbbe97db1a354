"""ChainerMN on two ranks: every rank runs the program ``chainer_ranks.py`` in a process of its own."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

import bnwatch.chainer
from bnwatch.chainer.ranks import Ranks
from bnwatch.sinks.tensorboard.reader import read_runs

from .chainer_models import MLP, L

pytest.importorskip("mpi4py", reason="mpi4py is not installed")

ROOT = Path(__file__).parents[2]
SECONDS = 600
"""After which the ranks are taken to hang: a multiple of what all trainings take on a busy machine."""

# Open MPI starts as root and on as many ranks as wanted only where it is told to; others know none of these
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "OMPI_ALLOW_RUN_AS_ROOT": "1",
    "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
    "OMPI_MCA_rmaps_base_oversubscribe": "1",
    "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe",
}
UNSEEN = "statistics of the other ranks are not seen: "


def mpiexec(*arguments, seconds=SECONDS, **environment):
    """Run the program on two ranks, and return its exit status and what it said."""
    command = shutil.which("mpiexec", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
    if command is None:
        pytest.skip("there is no mpiexec: install an MPI, such as the package openmpi")
    program = (command, "-n", "2", sys.executable, "-m", "tests.adapters.chainer_ranks", *map(str, arguments))
    env = {**os.environ, **ENVIRONMENT, **environment}
    with subprocess.Popen(
        program, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        try:
            out, _ = process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            process.terminate()
            out, _ = process.communicate()
            pytest.fail(f"the ranks hang:\n{out[-5000:]}")
    return process.returncode, out


@pytest.fixture(scope="module")
def ended(tmp_path_factory):
    """Run all trainings, and return the folder and the output."""
    folder = tmp_path_factory.mktemp("ranks")
    status, out = mpiexec(folder)
    assert status == 0, out[-5000:]
    return folder, out


@pytest.fixture
def found(ended):
    """Return what both ranks tell of a training."""
    folder, _ = ended

    def of(name):
        return [json.loads((folder / f"{name}.{rank}.json").read_text(encoding="utf-8")) for rank in (0, 1)]

    return of


HEALTHY = (
    "shuffled",
    "ordered",
    "averaged",
    "synchronized",
    "not_evaluated",
    "by_hand",
    "by_hand_with_optimizer",
    "communicating",
)
FAULTS = [f"{seam}_fails_on_{rank}" for seam in ("start", "step", "evaluation", "comparison") for rank in (0, 1)]
MISUSES = ("no_communicator", "given_to_0", "given_to_1", "every_differs", "end_is_lost", "by_hand_fails_on_1")


@pytest.mark.parametrize("name", [*HEALTHY, *FAULTS, *MISUSES])
def test_every_rank_ends_as_without_the_watch_and_one_writes(found, name):
    first, other = found(name)
    assert first["same"]
    assert other["same"]
    assert (first["left"], other["left"]) == (0, 0)
    assert (first["silent"], other["silent"]) == (False, True)
    assert first["files"] == (0 if name == "start_fails_on_0" else 1)
    assert other["told"] == []


@pytest.mark.parametrize("name", HEALTHY)
def test_each_rank_against_numpy(found, name):
    first, other = found(name)
    assert (first["faults"], other["faults"]) == ([], [])
    seen = first["numpy"]
    assert seen["sites"] == ["predictor/first#0", "predictor/first#0@1"]
    assert seen["counts"] == [True]
    assert seen["samples"] >= 24
    assert seen["error"] < 2e-6


def test_the_record_has_both_ranks_and_how_far_they_are_apart(ended):
    folder, _ = ended
    (run,) = read_runs(folder / "ordered")
    assert run.problems == ()
    layers = ["predictor/first", "predictor/second"]
    assert [str(site) for site in run.tables[-1].sites] == [f"{path}#0{at}" for at in ("", "@1") for path in layers]
    assert [replicas.step for replicas in run.replicas] == [16, 32, 48, 64]
    assert [table.layer for table in run.replicas[-1].layers] == layers
    assert "BN212" in {diagnosis.rule for diagnosis in run.report.diagnoses}


@pytest.mark.parametrize("name", ["ordered", "by_hand", "not_evaluated"])
def test_parts_of_ordered_data_are_told(found, name):
    first, other = found(name)
    assert first["diagnoses"]["BN212"] == "active"
    assert first["severities"]["BN212"] == "warning"
    assert "BN212" in first["told"]
    assert "BN212" not in other["diagnoses"]
    assert other["skipped"]["BN212"] == "rank 0 compares the ranks"


@pytest.mark.parametrize("name", ["shuffled", "averaged", "synchronized", "by_hand_with_optimizer"])
def test_what_cures_it_and_parts_of_shuffled_data_are_quiet(found, name):
    first, _ = found(name)
    assert first["replicas"] == ["predictor/first", "predictor/second"]
    assert "BN212" not in first["diagnoses"]
    assert "BN212" not in first["skipped"]


def test_experiments_run_on_the_first_rank_alone(found):
    for name in ("ordered", "synchronized"):
        first, other = found(name)
        assert first["cells"] == ["batch", "population", "reshuffled", "running"]
        assert first["looks"]
        assert (other["cells"], other["looks"]) == (False, 0)


def test_a_model_that_communicates_in_its_forward_pass_is_not_called_again(found):
    first, _ = found("communicating")
    assert (first["cells"], first["looks"]) == (False, 0)


def test_an_evaluation_is_of_the_examples_of_all_ranks(found):
    first, _ = found("shuffled")
    assert first["evaluations"] == [512] * 4


@pytest.mark.parametrize("name", ["start_fails_on_1", "step_fails_on_1", "evaluation_fails_on_1", "by_hand_fails_on_1"])
def test_a_rank_whose_watch_fails_is_done_without(found, name):
    first, other = found(name)
    assert first["faults"] == []
    assert len(other["faults"]) == 1
    assert other["faults"][0] in first["skipped"]["BN212"]


@pytest.mark.parametrize("seam", ["start", "step", "evaluation", "comparison"])
def test_the_others_go_on_when_the_watch_of_the_first_fails(found, seam):
    first, other = found(f"{seam}_fails_on_0")
    assert len(first["faults"]) == 1
    assert first["told"] == ["BN903"]
    assert other["faults"] == []


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("no_communicator", "pass comm=comm on every rank"),
        ("given_to_0", "rank 1 sent nothing for 2 seconds: pass comm=comm on every rank"),
        ("given_to_1", "pass comm=comm on every rank"),
        ("every_differs", "every is 4 on rank 1 and 3 on rank 0"),
    ],
)
def test_what_is_not_seen_is_said(found, name, reason):
    first, _ = found(name)
    assert first["skipped"]["BN212"] == UNSEEN + reason
    assert first["numpy"]["sites"] == ["predictor/first#0"]
    assert first["faults"] == []


def test_a_program_that_raises_on_one_rank_ends(tmp_path):
    began = time.monotonic()
    status, out = mpiexec(tmp_path, "raising", seconds=120, CHAINERMN_FORCE_ABORT_ON_EXCEPTION="1")
    assert status
    assert "injected" in out
    assert time.monotonic() - began < 55  # nobody waited for the rank


def test_one_rank_is_as_none_and_what_is_no_communicator_is_refused():
    chainermn = pytest.importorskip("chainermn")
    ranks = Ranks(chainermn.create_communicator("naive"))
    assert (ranks.exchanging, ranks.unseen) == (False, None)
    assert bnwatch.chainer.BatchNormWatch(None, comm=chainermn.create_communicator("naive")).watch.compares
    for door in (bnwatch.chainer.BatchNormWatch, lambda *a, **k: bnwatch.chainer.watch(MLP(), *a, **k)):
        with pytest.raises(ValueError, match=r"comm must be a communicator of chainermn\.create_communicator, got 3"):
            door(None, comm=3)


def test_statistics_over_all_ranks_of_a_single_one():
    """The link of ChainerMN: where it stands, what it is in experiments, and what it is again after them."""
    chainermn = pytest.importorskip("chainermn")
    comm = chainermn.create_communicator("naive")
    with pytest.warns(FutureWarning):
        model = chainermn.links.create_mnbn_model(MLP(), comm)
    x, t = np.random.default_rng(0).normal(size=(64, 8)).astype(np.float32), np.arange(64) % 4
    before = {path: link.avg_mean.copy() for path, link in model.namedlinks() if hasattr(link, "avg_mean")}
    cells = bnwatch.chainer.crosscheck(model, train=(x, t), batch_size=32)
    assert sorted(cells.training) == ["batch", "population", "reshuffled", "running"]
    for path, link in model.namedlinks():
        if path in before:
            assert type(link) is chainermn.links.MultiNodeBatchNormalization
            assert "axis" not in vars(link)
            assert link.comm is comm
            np.testing.assert_array_equal(link.avg_mean, before[path])
    repaired = bnwatch.chainer.recalibrate(model, [x[:32], x[32:]])
    assert not isinstance(model.bn1, L.BatchNormalization)
    assert repaired
    h = model.l1(x).array.astype(np.float64)
    np.testing.assert_allclose(model.bn1.avg_mean, h.mean(0), rtol=1e-4, atol=1e-5)
