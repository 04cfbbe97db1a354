"""What ``bnwatch demo`` runs: a broken Chainer program, then its repaired twin, on images that need no download."""

from __future__ import annotations

import sys
from importlib.util import find_spec
from pathlib import Path

TRAINING = ["--batch", "200", "--epochs", "5"]
PARTS = {
    "shared": "1. Two layers share one BatchNormalization link. Training looks perfect, evaluation does not.",
    "separate": "2. The same program with a link for each layer. No warning is the right thing to say.",
}


def main(log_dir: str) -> int:
    """Train both programs, logging below ``log_dir``, and return the exit status."""
    missing = [name for name, module in (("Chainer", "chainer"), ("scikit-learn", "sklearn")) if not find_spec(module)]
    if missing:
        print(f"the demo needs {' and '.join(missing)}, which the extras chainer and examples install", file=sys.stderr)
        return 2
    from bnwatch.examples import chainer_mnist_mlp

    for bn, title in PARTS.items():
        print(f"\n{title}\n", flush=True)
        run = str(Path(log_dir) / bn)
        status: int = chainer_mnist_mlp.main(["--bn", bn, *TRAINING, "--log-dir", run])
        if status:
            return status
    print("\nBoth runs, side by side, in TensorBoard (the tab BN Watch) or in one file for a browser:")
    print(f"{command('tensorboard')} --logdir {log_dir}")
    print(f"{command('bnwatch')} report {log_dir} --format html -o demo.html")
    return 0


def command(name: str) -> str:
    """Return the command of that name in the environment this runs in, as short as it can be typed."""
    path = Path(sys.executable).with_name(name)
    if not path.is_file():
        return name
    try:
        return str(path.relative_to(Path.cwd()))
    except ValueError:
        return str(path)
