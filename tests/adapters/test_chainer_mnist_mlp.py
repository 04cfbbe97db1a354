import subprocess
import sys

import numpy as np
import pytest

from bnwatch.examples import chainer_mnist_mlp, data, demo

IMPORTS = "import sys; import bnwatch.chainer; from bnwatch.chainer import compat; sys.exit('chainer' in sys.modules)"


def test_compat_can_be_had_before_chainer_is_imported():
    assert subprocess.run([sys.executable, "-c", IMPORTS], check=False).returncode == 0


def test_the_embedded_digits_are_the_same_every_time_and_split_in_two():
    first, second = (data.load("digits", (28, 28), {}, shifts=2) for _ in range(2))
    assert len(first.x_train) == 9 * 1438
    assert len(first.x_test) == 359
    assert first.x_train.max() == 255
    for one, other in zip(first, second, strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("trainer", [[], ["--trainer"]])
@pytest.mark.parametrize("bn", ["shared", "separate"])
def test_the_program_trains(bn, trainer, tmp_path):
    small = ["--epochs", "2", "--batch", "100", "--limit", "300", "--log-dir", str(tmp_path)]
    assert chainer_mnist_mlp.main(["--no-watch", "--bn", bn, *trainer, *small]) == 0


def test_the_hand_written_loop_shows_each_epoch(tmp_path, capsys):
    assert chainer_mnist_mlp.main(["--no-watch", "--epochs", "2", "--limit", "300", "--log-dir", str(tmp_path)]) == 0
    assert [line.split(":")[0] for line in capsys.readouterr().out.splitlines()] == ["epoch  1", "epoch  2"]


def test_sharing_costs_evaluation_accuracy_and_the_repair_does_not(tmp_path, capsys):
    def last(bn):
        chainer_mnist_mlp.main(["--no-watch", "--bn", bn, *demo.TRAINING, "--log-dir", str(tmp_path)])
        return float(capsys.readouterr().out.split()[-1])

    assert last("shared") < 0.8
    assert last("separate") > 0.95


def test_data_that_cannot_be_used_is_misuse(capsys):
    with pytest.raises(SystemExit) as caught:
        chainer_mnist_mlp.main(["--data", "nothing.npz"])
    assert caught.value.code == 2
    assert "there is no file nothing.npz" in capsys.readouterr().err


def test_the_demo_ends_with_the_lines_that_show_both_runs(tmp_path, capsys, monkeypatch):
    runs = []
    monkeypatch.setattr(chainer_mnist_mlp, "main", lambda arguments: runs.append(arguments) or 0)
    assert demo.main(str(tmp_path)) == 0
    assert [run[run.index("--bn") + 1] for run in runs] == ["shared", "separate"]
    tensorboard, report = capsys.readouterr().out.splitlines()[-2:]
    assert tensorboard.endswith(f"tensorboard --logdir {tmp_path}")
    assert report.endswith(f"bnwatch report {tmp_path} --format html -o demo.html")


def test_the_demo_says_what_it_lacks(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(demo, "find_spec", lambda name: None if name == "sklearn" else name)
    assert demo.main(str(tmp_path)) == 2
    assert "needs scikit-learn" in capsys.readouterr().err
