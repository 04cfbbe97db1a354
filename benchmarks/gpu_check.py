"""Does the watch do on a GPU what it does on the CPU? One command, for a machine that has one.

    pip install -e .[chainer,cuda]
    python benchmarks/gpu_check.py

Prints one line a check, on standard output: PASS with figures, FAIL, INCONCLUSIVE (two trainings without the watch
already differ, so nothing can be said of a third) or SKIP with the reason. The exit status is 0 if nothing failed and
something passed. A framework that is not installed is a SKIP, and so is a Keras backend that sees no GPU. Each
framework and backend runs in a process of its own; ``KERAS_BACKEND`` chooses one backend. ``--cpu`` runs the same
checks on the CPU, as far as they make sense there: it tests the script.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

HERE = Path(__file__).parent
BACKENDS = ("tensorflow", "jax", "torch")
ENVIRONMENT = {
    "PYTHONPATH": os.pathsep.join(filter(None, [str(HERE.parent), os.environ.get("PYTHONPATH")])),
    "PYTHONWARNINGS": "ignore",
    "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"),
    "TF_CPP_MIN_LOG_LEVEL": "3",
    "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
    "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} --xla_gpu_deterministic_ops=true",
    "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
}
OFF = {"CUDA_VISIBLE_DEVICES": "-1", "JAX_PLATFORMS": "cpu"}


def main() -> int:
    """Run the parts and return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cpu", action="store_true", help="run on the CPU what can be run there")
    parser.add_argument("--only", choices=("chainer", "keras"), help="check one framework")
    options = parser.parse_args()
    words: list[str] = []
    try:
        if options.only != "keras":
            words += part("chainer", "chainer", {}, cpu=options.cpu)
        if options.only != "chainer":
            backends = [name for name in BACKENDS if os.environ.get("KERAS_BACKEND", name) == name]
            for backend in backends:
                words += part("keras", backend, {"KERAS_BACKEND": backend}, cpu=options.cpu)
    except KeyboardInterrupt:
        print(f"interrupted after {len(words)} checks", flush=True)
        return 130
    counts = {word: words.count(word) for word in ("PASS", "FAIL", "INCONCLUSIVE", "SKIP")}
    print(", ".join(f"{count} {word}" for word, count in counts.items()), flush=True)
    return 0 if counts["PASS"] and not counts["FAIL"] else 1


def part(framework: str, package: str, environment: dict[str, str], *, cpu: bool) -> list[str]:
    """Run the checks of one framework in a process of its own, show its lines and return the first word of each."""
    for needed in dict.fromkeys((framework, package)):
        if find_spec(needed) is None:
            print(f"SKIP {package}: {needed} is not installed", flush=True)
            return ["SKIP"]
    command = [sys.executable, str(HERE / f"gpu_{framework}.py"), *(["--cpu"] if cpu else [])]
    environment = {**os.environ, **ENVIRONMENT, **environment, **(OFF if cpu else {})}
    words: list[str] = []
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:  # noqa: S603
        for line in process.stdout or ():
            print(line, end="", flush=True)
            words.append(line.split(" ", 1)[0])
    if process.returncode and "FAIL" not in words:
        print(f"FAIL {package}: the checks ended with status {process.returncode}", flush=True)
        words.append("FAIL")
    return words


if __name__ == "__main__":
    sys.exit(main())
