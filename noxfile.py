"""The test environments behind ``make test``: one session, one virtual environment, one constraints file each."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NoReturn
from xml.etree import ElementTree as ET

import nox
from nox.command import CommandFailed

ROOT = Path(__file__).parent
VENVS = ROOT / ".venv"
WHEELS = VENVS / "wheels"
RESULTS = VENVS / "results"
PYTHON = sys.version_info[:2]

nox.needs_version = ">=2024.4.15"
nox.options.envdir = str(VENVS)
nox.options.default_venv_backend = "virtualenv"
nox.options.reuse_venv = "yes"
nox.options.error_on_missing_interpreters = True
nox.options.sessions = [
    "lint", "unit", "page", "browser", "keras", "keras_jax", "keras_torch", "keras_oldest", "keras2", "tf_keras",
    "chainer", "chainer_mpi", "chainer_old", "chainer_new",
]  # fmt: skip

KERAS_TESTS = sorted(ROOT.glob("tests/adapters/test_keras_*.py"))
UNCHANGED = ROOT / "tests/adapters/test_keras_unchanged.py"
# What is about one backend alone, and what is about Keras 2.
PARTICULAR = {
    name: sorted(ROOT.glob(f"tests/adapters/test_keras_{name}*.py"))
    for name in ("tensorflow", "jax", "torch", "legacy")
}
# Keras 2 runs on TensorFlow alone: what holds for the one holds for the other.
PARTICULAR["legacy"] += [ROOT / f"tests/adapters/test_keras_{name}.py" for name in ("tensorflow", "tensorflow_loop")]
# Its programs are written for TensorFlow.
PARTICULAR["tensorflow"].append(ROOT / "tests/adapters/test_keras_clinic.py")
COMMON_KERAS_TESTS = [path for path in KERAS_TESTS if not any(path in own for own in PARTICULAR.values())]
# What is read off a model or computed from arrays: one backend shows it for all.
OF_NO_BACKEND = {f"test_keras_{name}.py" for name in ("cifar_resnet", "gpu_check", "output", "split", "structure")}
BACKEND_TESTS = [path for path in COMMON_KERAS_TESTS if path.name not in OF_NO_BACKEND]
MPI_TESTS = sorted(ROOT.glob("tests/adapters/test_chainer_mpi.py"))
CHAINER_TESTS = sorted(set(ROOT.glob("tests/adapters/test_chainer_*.py")).difference(MPI_TESTS))
BROWSER_TESTS = ROOT / "tests" / "browser"
CORE_TESTS = ["tests", *(f"--ignore={path}" for path in (*KERAS_TESTS, *CHAINER_TESTS, *MPI_TESTS, BROWSER_TESTS))]
# As tests/browser/conftest.py looks for it.
CHROMIUM = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
# Run beside every framework: what they show is worth something only where a framework is installed.
EVERYWHERE = [ROOT / "tests" / "test_imports.py"]


def found(*versions: tuple[int, int]) -> str | None:
    """Return an interpreter of the first of these versions that this machine has, or its own; None if it has none."""
    return sys.executable if PYTHON in versions else next(filter(None, map(_interpreter, versions)), None)


def _interpreter(version: tuple[int, int]) -> str | None:
    name = "{}.{}".format(*version)
    command = ["py", f"-{name}"] if sys.platform == "win32" else [f"python{name}"]
    try:
        asked = subprocess.run(  # noqa: S603 - nothing in it comes from outside
            [*command, "-c", "import sys; print(sys.executable)"],
            env={**os.environ, "PYENV_VERSION": name},  # pyenv hides the versions that are not switched on
            capture_output=True,
            text=True,
            check=False,
        )
    except OSError:
        return None
    return asked.stdout.strip() or None


def install(session: nox.Session, *, package: bool = True, listed: str = "") -> None:
    """Install what ``constraints/<session>.txt`` lists, and the checkout itself, unless nothing changed since.

    ``constraints/<session>.no-deps.txt``, where there is one, lists what is installed without what it asks for. A
    session that differs from another one by its interpreter alone names that one's list.
    """
    requirements = ROOT / "constraints" / f"{listed or session.name}.txt"
    alone = requirements.with_suffix(".no-deps.txt")
    sources = [requirements, *filter(Path.is_file, [alone]), ROOT / "setup.cfg", ROOT / "pyproject.toml"]
    digest = hashlib.sha256(b"\0".join(source.read_bytes() for source in sources)).hexdigest()
    stamp = Path(session.virtualenv.location) / "installed"
    if stamp.is_file() and stamp.read_text(encoding="utf-8") == digest:
        return
    stamp.unlink(missing_ok=True)
    if alone.is_file():
        # First: what cannot be had here costs no further installation.
        install_alone(session, alone)
    session.install("--find-links", str(WHEELS), "-r", str(requirements))
    if package:
        # Built with the pinned setuptools of the environment, not with whatever is current.
        session.install("--no-deps", "--no-build-isolation", "--editable", str(ROOT))
    stamp.write_text(digest, encoding="utf-8")


def install_alone(session: nox.Session, requirements: Path) -> None:
    """Install without dependencies; packages that have no build for this machine and Python are a skip."""
    command = ("python", "-m", "pip", "install", "--no-deps", "-r", str(requirements))
    said = str(session.run_install(*command, silent=True, success_codes=[0, 1]))
    _, unfound, missing = said.partition("No matching distribution found for ")
    if unfound:
        skip(session, f"pip finds no {missing.split()[0]} for this machine and Python {PYTHON[0]}.{PYTHON[1]}")
    if "ERROR:" in said:
        session.error(said)


def skip(session: nox.Session, reason: str) -> NoReturn:
    """Skip the session, and leave a result that ``tests/summary.py`` counts as one skip."""
    leave_result(session, session.name, skipped=reason)
    session.skip(reason)


def leave_result(session: nox.Session, *cases: str, skipped: str = "") -> None:
    """Leave for ``tests/summary.py`` what passed in a session without pytest, or why it was skipped."""
    suite = ET.Element("testsuite", name=session.name)
    for name in cases:
        case = ET.SubElement(suite, "testcase", classname="noxfile", name=name)
        if skipped:
            ET.SubElement(case, "skipped", type="session", message=skipped)
    RESULTS.mkdir(parents=True, exist_ok=True)
    ET.ElementTree(suite).write(RESULTS / f"{session.name}.xml", encoding="utf-8")


def up_to(session: nox.Session, newest: tuple[int, int], what: str) -> None:
    """Skip the session on a Python newer than ``newest``, the last on which ``what`` installs."""
    if newest < PYTHON:
        skip(session, f"{what} installs up to Python {newest[0]}.{newest[1]}, this is {PYTHON[0]}.{PYTHON[1]}")


def keras_tests(
    session: nox.Session, backend: str, *tests: Path, particular: str | None = None, part: str = ""
) -> None:
    """Run the tests that all Keras environments share, or ``tests``, and those of the backend or of Keras 2."""
    use(session, backend)
    pytest(session, *EVERYWHERE, *(tests or COMMON_KERAS_TESTS), *PARTICULAR[particular or backend], part=part)


def use(session: nox.Session, backend: str) -> None:
    """Have Keras run on this backend, and on one core: sessions run beside each other."""
    session.env.update(
        {
            "KERAS_BACKEND": backend,
            "TF_CPP_MIN_LOG_LEVEL": "3",
            "CUDA_VISIBLE_DEVICES": "-1",
            "JAX_PLATFORMS": "cpu",
            "OMP_NUM_THREADS": "1",
            "TF_NUM_INTRAOP_THREADS": "1",
        }
    )


def pytest(session: nox.Session, *args: str | Path, part: str = "") -> None:
    """Run pytest and leave a machine-readable result for ``tests/summary.py``; ``part`` names a second run's."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    result = RESULTS / f"{session.name}{part}.xml"
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


@nox.session(venv_backend="none")
def page(session: nox.Session) -> None:
    """Check the types of the page, and that what is shipped is what ``frontend/`` makes; needs Node."""
    frontend = ROOT / "frontend"
    if not shutil.which("node") or not shutil.which("npm"):
        skip(session, "there is no Node with npm on this machine")
    session.chdir(frontend)
    lock = (frontend / "package-lock.json").read_text(encoding="utf-8")
    stamp = frontend / "node_modules" / "installed"
    if not stamp.is_file() or stamp.read_text(encoding="utf-8") != lock:
        session.run("npm", "ci", "--silent", external=True)
        stamp.write_text(lock, encoding="utf-8")
    session.run("npm", "run", "--silent", "types", external=True)
    session.run("npm", "run", "--silent", "check", external=True)
    leave_result(session, "types", "current")


@nox.session
def browser(session: nox.Session) -> None:
    """Look at the page in TensorBoard and in a report, with the browser of this machine."""
    if not any(map(shutil.which, CHROMIUM)):
        skip(session, f"there is none of {', '.join(CHROMIUM)} on this machine")
    install(session)
    pytest(session, BROWSER_TESTS)


@nox.session
def coverage(session: nox.Session) -> None:
    """Measure how much of the core the unit tests reach."""
    install(session)
    session.run("coverage", "run", "-m", "pytest", "-q", *CORE_TESTS)
    session.run("coverage", "report")


@nox.session
def keras(session: nox.Session) -> None:
    """Test the Keras adapter on the newest Keras and TensorFlow."""
    install(session)
    keras_tests(session, "tensorflow")


@nox.session
def keras_jax(session: nox.Session) -> None:
    """Test the Keras adapter on the newest Keras and JAX, where TensorFlow is not installed."""
    install(session)
    # Compiling is most of the time. Whether a watch changes a bit is asked of what users run, of the rest only what it
    # computes.
    use(session, "jax")
    pytest(session, UNCHANGED, part="+optimized")
    session.env["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"
    keras_tests(session, "jax", *(path for path in BACKEND_TESTS if path != UNCHANGED))


@nox.session
def keras_torch(session: nox.Session) -> None:
    """Test the Keras adapter on the newest Keras and PyTorch built for the CPU, where TensorFlow is not installed.

    On Linux the package index serves a build for CUDA of several gigabytes, so there the CPU build, which has a version
    of its own, must be found by pip's configuration.
    """
    install(session)
    keras_tests(session, "torch", *BACKEND_TESTS)


# What depends on the inside of Keras: what is captured, and what is left behind.
INSIDE_TESTS = [ROOT / "tests/adapters/test_keras_conformance.py", UNCHANGED]


@nox.session
def keras_oldest(session: nox.Session) -> None:
    """Test the Keras adapter on the oldest Keras 3 it accepts, on TensorFlow and then on JAX; a part of the tests."""
    up_to(session, (3, 12), "TensorFlow 2.16")
    install(session)
    keras_tests(session, "tensorflow", *INSIDE_TESTS)
    session.env["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"
    keras_tests(session, "jax", *INSIDE_TESTS, part="+jax")


@nox.session
def keras2(session: nox.Session) -> None:
    """Test the Keras adapter on Keras 2, as TensorFlow 2.15 brings it."""
    up_to(session, (3, 11), "TensorFlow 2.15, the last with Keras 2,")
    install(session)
    keras_tests(session, "tensorflow", particular="legacy")


@nox.session
def tf_keras(session: nox.Session) -> None:
    """Test the Keras adapter on Keras 2, as tf-keras brings it to the newest TensorFlow; a part of the tests."""
    install(session)
    session.env["BNWATCH_TEST_KERAS"] = "tf_keras"
    keras_tests(session, "tensorflow", *INSIDE_TESTS, particular="legacy")


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
def chainer_mpi(session: nox.Session) -> None:
    """Test the Chainer adapter under ChainerMN, on two ranks of an MPI that is installed beside it."""
    install(session)
    pytest(session, *MPI_TESTS)


# What depends on the versions of Python and NumPy: what is computed, what is imported, what is left behind.
MACHINE_NAMES = [
    *("compat", "conformance", "experiments", "faults", "links", "mnist_mlp", "statistics", "trainer", "unchanged"),
]
MACHINE_TESTS = [ROOT / f"tests/adapters/test_chainer_{name}.py" for name in MACHINE_NAMES]
OWN_TESTS = [
    f"chainer_tests/{folder}"
    for folder in ("links_tests/normalization_tests", "functions_tests/normalization_tests", "training_tests")
]
# Chainer's own options make errors of warnings, which newer NumPy gives: they say nothing of the tap.
OWN_OPTIONS = [
    *("-c", os.devnull, "--rootdir", ".", "-p", "tests.adapters.chainer_own", "-p", "no:cacheprovider"),
    *("-q", "--tb=line", "-W", "ignore", "-m", "not (gpu or multi_gpu or cudnn or chainerx or ideep)"),
]
OLD, NEW = found((3, 10)), found((3, 13), (3, 12))


@nox.session(python=OLD or False, requires=["chainer_wheel"])
def chainer_old(session: nox.Session) -> None:
    """Test the Chainer adapter on Python 3.10 and NumPy 1.23, where Chainer needs and is given no help; a part."""
    if OLD is None:
        skip(session, "there is no Python 3.10 on this machine")
    install(session)
    session.env["BNWATCH_TEST_PLAIN"] = "1"
    pytest(session, *EVERYWHERE, *MACHINE_TESTS)


@nox.session(python=NEW or False, requires=["chainer_wheel"])
def chainer_new(session: nox.Session) -> None:
    """Test the Chainer adapter on Python 3.12 or newer and the newest NumPy; a part of the tests."""
    if NEW is None:
        skip(session, "there is no Python 3.12 or 3.13 on this machine")
    install(session, listed="chainer")
    pytest(session, *EVERYWHERE, *MACHINE_TESTS)


@nox.session(requires=["chainer_wheel"])
def chainer_own(session: nox.Session) -> None:
    """Run Chainer's own tests of normalization and training with and without the tap: what passes must go on passing.

    They come from a checkout of Chainer 7.8.1 that CHAINER_SOURCE names, or else from its repository.
    """
    source = Path(os.environ.get("CHAINER_SOURCE", VENVS / "chainer-7.8.1")).absolute()
    if "CHAINER_SOURCE" not in os.environ and not source.is_dir() and shutil.which("git"):
        clone = ("git", "clone", "--quiet", "--depth=1", "--branch=v7.8.1", "https://github.com/chainer/chainer")
        session.run(*clone, str(source), external=True, success_codes=[0, 128], env={"GIT_TERMINAL_PROMPT": "0"})
    if not (source / "tests" / "chainer_tests").is_dir():
        skip(session, "CHAINER_SOURCE names no checkout of Chainer 7.8.1, and its repository cannot be had")
    install(session)
    # Where the tests are: one folder above, the sources would be imported in place of the package.
    session.chdir(source / "tests")
    session.env.update({"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "-1"})
    command = ("python", "-m", "pytest", *OWN_OPTIONS, *(session.posargs or OWN_TESTS))
    results = [Path(session.create_tmp()) / f"{how}.xml" for how in ("without", "with")]
    for result, tap in zip(results, ("0", "1"), strict=True):
        result.unlink(missing_ok=True)
        session.run(*command, f"--junitxml={result}", env={"BNWATCH_TEST_TAP": tap}, success_codes=[0, 1])
    session.run("python", "-m", "tests.adapters.chainer_own", *map(str, results))


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


@nox.session(venv_backend="none")
def clinic(session: nox.Session) -> None:
    """Run the clinic's programs where Keras is installed, and where Chainer is."""
    failed = []
    for home in ("keras", "chainer"):
        command = ("-m", "benchmarks.clinic", "--framework", home, *session.posargs)
        try:
            session.run(interpreter(home), *command, env={"KERAS_BACKEND": "tensorflow"}, external=True)
        except CommandFailed:
            failed.append(home)
    if failed:
        session.error(f"goals missed: {' and '.join(failed)}")


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
