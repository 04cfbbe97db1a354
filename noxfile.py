"""The test environments behind ``make test``: one session, one virtual environment, one constraints file each."""

from __future__ import annotations

import hashlib
import shutil
import sys
from pathlib import Path

import nox

ROOT = Path(__file__).parent
VENVS = ROOT / ".venv"
WHEELS = VENVS / "wheels"
RESULTS = VENVS / "results"

nox.needs_version = ">=2024.4.15"
nox.options.envdir = str(VENVS)
nox.options.default_venv_backend = "virtualenv"
nox.options.reuse_venv = "yes"
nox.options.error_on_missing_interpreters = True
nox.options.sessions = ["lint", "unit", "keras", "chainer"]

KERAS_TESTS = sorted(ROOT.glob("tests/adapters/test_keras_*.py"))
CHAINER_TESTS = sorted(ROOT.glob("tests/adapters/test_chainer_*.py"))
CORE_TESTS = ["tests", *(f"--ignore={path}" for path in (*KERAS_TESTS, *CHAINER_TESTS))]
# Run beside every framework: what they show is worth something only where a framework is installed.
EVERYWHERE = [ROOT / "tests" / "test_imports.py"]


def install(session: nox.Session, *, package: bool = True) -> None:
    """Install what ``constraints/<session>.txt`` lists, and the checkout itself, unless nothing changed since."""
    requirements = ROOT / "constraints" / f"{session.name}.txt"
    sources = [requirements, ROOT / "setup.cfg", ROOT / "pyproject.toml"]
    digest = hashlib.sha256(b"\0".join(source.read_bytes() for source in sources)).hexdigest()
    stamp = Path(session.virtualenv.location) / "installed"
    if stamp.is_file() and stamp.read_text(encoding="utf-8") == digest:
        return
    stamp.unlink(missing_ok=True)
    session.install("--find-links", str(WHEELS), "-r", str(requirements))
    if package:
        # Built with the pinned setuptools of the environment, not with whatever is current.
        session.install("--no-deps", "--no-build-isolation", "--editable", str(ROOT))
    stamp.write_text(digest, encoding="utf-8")


def pytest(session: nox.Session, *args: str | Path) -> None:
    """Run pytest and leave a machine-readable result for ``tests/summary.py``."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    result = RESULTS / f"{session.name}.xml"
    result.unlink(missing_ok=True)
    chosen = session.posargs or [str(arg) for arg in args]
    session.run("python", "-m", "pytest", f"--junitxml={result}", "-o", f"junit_suite_name={session.name}", *chosen)


@nox.session
def lint(session: nox.Session) -> None:
    """Check style, types and the layers of the package."""
    install(session)
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")
    session.run("mypy")
    session.run("lint-imports")


@nox.session
def unit(session: nox.Session) -> None:
    """Test the core where no framework is installed."""
    install(session)
    pytest(session, *CORE_TESTS)


@nox.session
def lowest(session: nox.Session) -> None:
    """Test the core on the oldest NumPy and TensorBoard it accepts; they install up to Python 3.12."""
    install(session)
    pytest(session, *CORE_TESTS)


@nox.session
def coverage(session: nox.Session) -> None:
    """Measure how much of the core the unit tests reach."""
    install(session)
    session.run("coverage", "run", "-m", "pytest", "-q", *CORE_TESTS)
    session.run("coverage", "report")


@nox.session
def keras(session: nox.Session) -> None:
    """Test the Keras adapter on TensorFlow."""
    install(session)
    session.env.update({"KERAS_BACKEND": "tensorflow", "TF_CPP_MIN_LOG_LEVEL": "3", "CUDA_VISIBLE_DEVICES": "-1"})
    pytest(session, *EVERYWHERE, *KERAS_TESTS)


@nox.session
def chainer_wheel(session: nox.Session) -> None:
    """Build Chainer's wheel once: its source distribution does not build with a current setuptools."""
    if any(WHEELS.glob("chainer-7.8.1-*.whl")):
        return
    install(session, package=False)
    session.run_install(
        "python", "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", WHEELS, "chainer==7.8.1"
    )


@nox.session(requires=["chainer_wheel"])
def chainer(session: nox.Session) -> None:
    """Test the Chainer adapter on current NumPy."""
    install(session)
    pytest(session, *EVERYWHERE, *CHAINER_TESTS)


@nox.session(requires=["chainer_wheel"])
def demo(session: nox.Session) -> None:
    """Set up what ``make demo`` runs in."""
    install(session)


@nox.session(venv_backend="none")
def bench(session: nox.Session) -> None:
    """Run every ``benchmarks/bench_*.py`` where the framework it names is installed, or where only the core is."""
    for script in sorted(ROOT.glob("benchmarks/bench_*.py")):
        home = next((name for name in ("keras", "chainer") if name in script.stem.split("_")), "unit")
        session.run(interpreter(home), str(script), *session.posargs, external=True)


def interpreter(environment: str) -> str:
    """Return the Python of another session's environment, which must have been set up."""
    return str(VENVS / environment / Path(sys.executable).relative_to(sys.prefix))


@nox.session(venv_backend="none")
def constraints(session: nox.Session) -> None:
    """Resolve ``constraints/*.in`` anew for Python 3.10 to 3.13; needs uv."""
    if not shutil.which("uv"):
        session.error("uv is not installed: python -m pip install uv")
    build = ROOT / "constraints" / "chainer_wheel.in"
    for source in sorted(ROOT.glob("constraints/*.in")):
        session.run(
            *(
                "uv",
                "pip",
                "compile",
                "--quiet",
                "--universal",
                "--python-version",
                "3.10",
                "--no-header",
                "--no-annotate",
            ),
            *("--upgrade", "--build-constraints", str(build), "-o", str(source.with_suffix(".txt")), str(source)),
            external=True,
        )
