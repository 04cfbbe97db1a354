"""Cases of the clinic: their registry, one run of one, and how its outcome is judged."""

from __future__ import annotations

import ast
import hashlib
import importlib
import random
import time
from dataclasses import asdict, dataclass, field
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import numpy as np

from benchmarks.clinic import networks, peers
from bnwatch.diagnosis import Severity

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from bnwatch.diagnosis import Diagnosis

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
FRAMEWORKS = ("keras", "chainer")
HEALTHY_SEEDS = 3
INNOCENT = "innocent"


@dataclass(frozen=True)
class Case:
    """One program and what is to be said of it.

    Attributes:
        name: id of the public case, with a suffix where there are several: ``BN-001/chainer``.
        expects: rules of which the headline must name one; empty for a healthy program, and for an innocent one of
            which nothing particular is expected.
        framework: ``keras`` or ``chainer``.
        innocent: it fails, but not for its batch normalization.
        also: rules that may be told beside the headline.
        seeds: it is run with the seeds from 0 to this.
        fast: it is one of those that the tests run.
        module: where its program stands.
        function: the program.
    """

    name: str
    expects: tuple[str, ...]
    framework: str
    innocent: bool
    also: tuple[str, ...]
    seeds: int
    fast: bool
    module: str
    function: str

    @property
    def kind(self) -> str:
        """Return faulty, healthy or innocent."""
        return INNOCENT if self.innocent else "faulty" if self.expects else "healthy"


def case(
    name: str,
    *,
    expects: str | tuple[str, ...] | None,
    framework: str,
    innocent: bool = False,
    also: tuple[str, ...] = (),
    seeds: int | None = None,
    fast: bool = False,
) -> Callable[[Callable[[Run], None]], Callable[[Run], None]]:
    """Make a program a case. The arguments are literals: cases are listed without importing any framework.

    Args:
        name: id of the public case; several programs of one case have suffixes: ``"BN-001/chainer"``.
        expects: the rule that the headline must name, or several of which each is right; None for a healthy program,
            of which nothing above ``info`` may ever be told; ``"innocent"`` for one that fails for another reason
            than batch normalization.
        framework: ``"keras"`` or ``"chainer"``.
        innocent: as ``expects="innocent"``, where ``expects`` names a rule that is told, such as BN302.
        also: rules that may be told beside the headline.
        seeds: how many seeds; by default three for a healthy program, otherwise one.
        fast: run it among the tests, too: at most 8 seconds.
    """

    def register(program: Callable[[Run], None]) -> Callable[[Run], None]:
        _PROGRAMS[name] = program
        return program

    _described(name, "", "", expects=expects, framework=framework, innocent=innocent, also=also, seeds=seeds, fast=fast)
    return register


_PROGRAMS: dict[str, Callable[[Run], None]] = {}


def _described(
    name: str,
    module: str,
    function: str,
    *,
    expects: str | tuple[str, ...] | None,
    framework: str,
    innocent: bool = False,
    also: tuple[str, ...] = (),
    seeds: int | None = None,
    fast: bool = False,
) -> Case:
    if framework not in FRAMEWORKS:
        msg = f"case {name}: framework must be one of {FRAMEWORKS}, got {framework!r}"
        raise ValueError(msg)
    innocent = innocent or expects == INNOCENT
    rules = () if expects in (None, INNOCENT) else (expects,) if isinstance(expects, str) else tuple(expects)
    seeds = seeds or (1 if innocent or rules else HEALTHY_SEEDS)
    return Case(name, rules, framework, innocent, tuple(also), seeds, fast, module, function)


@cache
def cases() -> Mapping[tuple[str, str], Case]:
    """Return all cases by name and framework, read from ``keras_*.py`` and ``chainer_*.py``: nothing is imported."""
    found: dict[tuple[str, str], Case] = {}
    for path in sorted(HERE.glob("*_*.py")):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            for mark in node.decorator_list if isinstance(node, ast.FunctionDef) else ():
                if isinstance(mark, ast.Call) and isinstance(mark.func, ast.Name) and mark.func.id == "case":
                    (name,) = map(ast.literal_eval, mark.args)
                    options = {keyword.arg: ast.literal_eval(keyword.value) for keyword in mark.keywords}
                    one = _described(name, path.stem, node.name, **options)
                    if found.setdefault((name, one.framework), one) is not one:
                        msg = f"two programs for {one.framework} are called {name}"
                        raise ValueError(msg)
    return found


def missing(framework: str) -> bool:
    """Return whether this Python lacks the framework."""
    return find_spec(framework) is None


def fingerprint(one: Case) -> str:
    """Return a hash of the code that the outcome of a case depends on."""
    others = tuple(ROOT / "bnwatch" / name for name in FRAMEWORKS if name != one.framework)
    sources = [path for path in sorted(ROOT.glob("bnwatch/**/*.py")) if not any(o in path.parents for o in others)]
    shared = "case", "data", "peers", "networks", f"{one.framework}_nets", f"{one.framework}_parts"
    sources += [HERE / f"{name}.py" for name in (*shared, one.module)]
    digest = hashlib.sha256()
    for path in filter(Path.is_file, sources):
        digest.update(path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


@dataclass
class Subject:
    """A trained model and its data, for the detectors of the field.

    Attributes:
        framework: ``keras`` or ``chainer``.
        model: the trained model.
        train: training inputs and targets.
        evaluation: evaluation inputs and targets, or None.
        history: what ``fit`` returned, by metric, a number an epoch; empty where there was none.
        epochs: the weights at the ends of epochs; None where they were not kept.
        learning_rate: at the end; None where the model does not say it and it is unknown.
    """

    framework: str
    model: Any
    train: tuple[Any, Any]
    evaluation: tuple[Any, Any] | None
    history: Mapping[str, list[float]] = field(default_factory=dict)
    epochs: networks.Epochs | None = None
    learning_rate: float | None = None


class Run:
    """One run of a case: what its program uses to be watched.

    Args:
        one: the case.
        seed: of NumPy, ``random`` and the framework.
        log_dir: where the watch writes.
    """

    def __init__(self, one: Case, seed: int, log_dir: str) -> None:
        self.case, self.seed, self.log_dir = one, seed, log_dir
        self.told: list[Diagnosis] = []
        self.watches: list[Any] = []
        self.measured: dict[str, float] = {}
        self.subjects: list[Subject] = []
        self.epochs: networks.Epochs | None = None

    def hear(self, diagnosis: Diagnosis) -> None:
        """Take a diagnosis that is told."""
        self.told.append(diagnosis)

    def watch(self, **options: Any) -> dict[str, Any]:
        """Return the arguments of the front door: ``log_dir`` and ``on_diagnosis``, and the given ones."""
        log_dir = f"{self.log_dir}/{len(self.watches)}"
        return {"log_dir": log_dir, "on_diagnosis": self.hear, **options}

    def callback(self, **options: Any) -> Any:
        """Return the watch for Keras's ``fit``."""
        from bnwatch.keras import BatchNormWatch

        self.watches.append(BatchNormWatch(**self.watch(**options)))
        return self.watches[-1]

    def fit(self, model: Any, *args: Any, callbacks: Iterable[Any] = (), **options: Any) -> Any:
        """Train a Keras model in ``fit`` with the watch as the last callback, silently; return the history."""
        options = {"verbose": 0, **options}
        self.epochs = networks.Epochs()
        kept = networks.keras_epochs(self.epochs)
        history = model.fit(*args, callbacks=[*callbacks, kept, self.callback()], **options)
        metrics = {name: [float(value) for value in values] for name, values in history.history.items()}
        self.measure(**{name: values[-1] for name, values in metrics.items()})
        x, y = (*args, options.get("x"), options.get("y"))[:2]
        if y is not None:
            self.subject(model, train=(x, y), evaluation=options.get("validation_data"), history=metrics)
        return history

    def loop(self, model: Any, **options: Any) -> Any:
        """Return the watch of a loop written by hand: ``with run.loop(model) as watch``."""
        front = importlib.import_module(f"bnwatch.{self.case.framework}")
        self.watches.append(front.watch(model, **self.watch(**options)))
        return self.watches[-1]

    def extend(self, trainer: Any, **options: Any) -> Any:
        """Extend a Chainer Trainer by the watch, and return it."""
        from bnwatch.chainer import BatchNormWatch

        self.watches.append(BatchNormWatch(**self.watch(**options)))
        trainer.extend(self.watches[-1])
        self.epochs = networks.Epochs()
        networks.chainer_epochs(self.epochs, trainer)
        return self.watches[-1]

    def measure(self, **numbers: float) -> None:
        """Note numbers that show the fault, or that the program learns: ``run.measure(val_accuracy=0.53)``."""
        self.measured.update({name: float(number) for name, number in numbers.items()})

    def subject(
        self,
        model: Any,
        *,
        train: tuple[Any, Any],
        evaluation: tuple[Any, Any] | None = None,
        history: Mapping[str, list[float]] | None = None,
        learning_rate: float | None = None,
    ) -> None:
        """Hand the trained model and its data to the detectors of the field; ``fit`` does by itself."""
        known = self.epochs, learning_rate
        self.subjects.append(Subject(self.case.framework, model, train, evaluation, history or {}, *known))


def run(one: Case, seed: int, *, peers: bool = False) -> dict[str, Any]:
    """Run a case in this process, and return its outcome, ready for JSON; with what the field's detectors find."""
    if one.framework == "chainer":
        from bnwatch.chainer import compat

        compat.install()
    importlib.import_module(f"benchmarks.clinic.{one.module}")
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002 - frameworks draw from the global generator
    if one.framework == "keras":
        import keras

        keras.utils.set_random_seed(seed)
    with TemporaryDirectory() as log_dir:
        this = Run(one, seed, log_dir)
        began = time.perf_counter()
        _PROGRAMS[one.name](this)
        seconds = time.perf_counter() - began
        diagnoses = [diagnosis for watch in this.watches for diagnosis in watch.diagnoses]
        skipped = [entry for watch in this.watches for entry in watch.skipped]
    outcome = judge(one, diagnoses, this.told)
    return {
        "case": one.name,
        "framework": one.framework,
        "kind": one.kind,
        "expected": list(one.expects),
        "seed": seed,
        **outcome,
        "measured": this.measured,
        "diagnoses": [_plain(diagnosis) for diagnosis in diagnoses],
        "told": [_plain(diagnosis) for diagnosis in this.told],
        "skipped": [asdict(entry) for entry in skipped],
        "seconds": round(seconds, 2),
        "peers": _peers(this.subjects) if peers else {},
    }


def judge(one: Case, diagnoses: Iterable[Diagnosis], told: Iterable[Diagnosis]) -> dict[str, Any]:
    """Judge what was said of a case.

    Returns:
        ``headline``, the rule of the first active diagnosis; its ``severity`` and ``message``; the ``rank`` of the
        expected rule among the active diagnoses, from 1; the ``false_alarms``, which are other active warnings and
        errors that no other diagnosis is the cause of; and whether all is ``right``.
    """
    active = [diagnosis for diagnosis in diagnoses if diagnosis.state == "active"]
    grave = [diagnosis for diagnosis in active if diagnosis.severity >= Severity.WARNING]
    headline = active[0] if active else None
    heard = [*grave, *(diagnosis for diagnosis in told if diagnosis.severity >= Severity.WARNING)]
    right = {
        "faulty": headline is not None and headline.rule in one.expects,
        "healthy": not heard,
        INNOCENT: not any(diagnosis.rule.startswith(("BN1", "BN2")) for diagnosis in heard),
    }
    accepted = {*one.expects, *one.also}
    return {
        "right": right[one.kind],
        "headline": headline and headline.rule,
        "severity": headline and headline.severity.name.lower(),
        "message": headline and headline.message,
        "rank": next((n for n, diagnosis in enumerate(active, 1) if diagnosis.rule in one.expects), None),
        "false_alarms": sorted({d.key for d in grave if d.rule not in accepted and not d.causes}),
        "blamed": sorted({diagnosis.key for diagnosis in heard}),
    }


def _plain(diagnosis: Diagnosis) -> dict[str, Any]:
    plain = {name: getattr(diagnosis, name) for name in ("rule", "subject", "state", "causes", "message", "step")}
    evidence = {name: float(quantity.value) for name, quantity in diagnosis.evidence.items()}
    return {**plain, "severity": diagnosis.severity.name.lower(), "evidence": evidence}


def _peers(subjects: list[Subject]) -> dict[str, Any]:
    """Return what the detectors of the field find in the last trained model, by detector."""
    if not subjects:
        return {}
    try:
        return dict(peers.findings(subjects[-1]))
    except Exception as error:  # noqa: BLE001 - a detector that stops at a network says nothing of what bnwatch said
        return {"failed": f"{type(error).__name__}: {error}"}
