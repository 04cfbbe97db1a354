"""More than one device, and more than one process, on TensorFlow; each in processes of its own."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.adapters.library import OLDEST

ROOT = Path(__file__).parents[2]
SECONDS = 900
"""After which a process is taken to hang: a multiple of what starting TensorFlow takes on a busy machine."""


def start(*arguments, **environment):
    return subprocess.Popen(
        [sys.executable, "-m", *arguments],
        cwd=ROOT,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "-1", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.skipif(OLDEST, reason="bnwatch refuses older Keras on several replicas, which another test shows")
def test_on_two_devices():
    arguments = ("pytest", "-q", "-p", "no:cacheprovider", "tests/adapters/keras_mirrored.py")
    with start(*arguments) as process:
        try:
            out, _ = process.communicate(timeout=SECONDS)
        finally:
            process.kill()
    assert process.returncode == 0, out


def free_ports(number):
    sockets = [socket.socket() for _ in range(number)]
    try:
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]
    except OSError as error:
        pytest.skip(f"no port on loopback is to be had: {error}")
    finally:
        for one in sockets:
            one.close()


def test_of_two_workers_one_writes_and_both_train_as_unwatched(tmp_path):
    addresses = [f"127.0.0.1:{port}" for port in free_ports(2)]
    workers = []
    try:
        for index in range(2):
            task = {"cluster": {"worker": addresses}, "task": {"type": "worker", "index": index}}
            directory = str(tmp_path / str(index))
            workers.append(start("tests.adapters.keras_workers", directory, TF_CONFIG=json.dumps(task)))
        told = [worker.communicate(timeout=SECONDS) for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
    assert [worker.returncode for worker in workers] == [0, 0], told[0][1] + told[1][1]
    chief, other = (json.loads(out.splitlines()[-1]) for out, _ in told)
    for found in (chief, other):
        assert found["same"]
        assert found["faults"] == []
        assert found["samples"] >= 6
        assert found["sites"] == ["shared#0", "shared#1", "together#0"]
        # a worker sees half of a batch of 16, but where statistics are taken over all workers
        assert found["counts"] == [8, 8, 16]
        assert found["looks"] == 0
        assert "several workers train together" in found["refused"]
        assert found["skipped"]["BN212"] == "statistics of the other workers are not seen"
    assert (chief["files"], other["files"]) == (1, 0)
    assert "2 layers at 3 call sites" in told[0][1]
    assert "bnwatch" not in told[1][1]
    assert other["said"] == []
