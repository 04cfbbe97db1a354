"""Run the clinic: python -m benchmarks.clinic, from the top of the checkout, where Keras or Chainer is installed.

Results stand in build/clinic, one file a case and seed, and are not made again unless the code has changed.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor, as_completed
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.clinic.case import FRAMEWORKS, INNOCENT, ROOT, Case, cases, fingerprint, missing
from benchmarks.clinic.report import kept, markdown, peers_text

if TYPE_CHECKING:
    from collections.abc import Iterable

LIMIT = 600
"""Seconds after which a case has failed."""

GOALS = {"faulty": 0.95, "healthy": 1.0, INNOCENT: 1.0}
SAID = {
    "faulty": "the headline is right in {} of {} faulty runs",
    "healthy": "{} of {} healthy runs stay silent",
    INNOCENT: "{} of {} innocent runs go without blame",
}

# One thread each: cases run side by side, and repeat to the bit.
ENVIRONMENT = {
    "TF_CPP_MIN_LOG_LEVEL": "3",
    "CUDA_VISIBLE_DEVICES": "-1",
    "JAX_PLATFORMS": "cpu",
    "OMP_NUM_THREADS": "1",
    "TF_NUM_INTRAOP_THREADS": "1",
    "TF_NUM_INTEROP_THREADS": "1",
    "PYTHONHASHSEED": "0",
}


def main() -> int:
    """Run the cases asked for, and return 0 where all goals are met."""
    arguments = parsed()
    if arguments.markdown:
        outcomes, old = kept(Path(arguments.out))
        print(markdown(outcomes))
        print(f"{len(outcomes)} runs, {old} of them with other code than this", file=sys.stderr)
        return int(bool(old))
    chosen = [one for one in cases().values() if wanted(one, arguments)]
    if not chosen:
        print("no case has such a name")
        return 1
    for framework in FRAMEWORKS:
        lost = sum(one.framework == framework for one in chosen)
        if lost and missing(framework):
            print(f"{lost} cases skipped: this Python lacks {framework}")
            chosen = [one for one in chosen if one.framework != framework]
    outcomes = run_all(chosen, Path(arguments.out), arguments.jobs, again=arguments.again)
    return summary(outcomes)


def parsed() -> argparse.Namespace:
    """Return the arguments of the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.clinic", description=__doc__)
    parser.add_argument("names", nargs="*", help="cases, or patterns such as 'BN-00*'; all by default")
    parser.add_argument("--framework", choices=FRAMEWORKS, help="only cases of this framework")
    parser.add_argument("--fast", action="store_true", help="only the quick ones, which the tests run")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="cases at once (default: the cores)")
    parser.add_argument("--out", default=str(ROOT / "build" / "clinic"), help="where results stand (build/clinic)")
    parser.add_argument("--markdown", action="store_true", help="run nothing: print the tables of what stands in --out")
    parser.add_argument("--again", action="store_true", help="run also what has been run with this code")
    return parser.parse_args()


def wanted(one: Case, arguments: argparse.Namespace) -> bool:
    """Return whether the command line asks for the case; a name stands for its variants, too."""
    names = arguments.names
    named = not names or any(fnmatchcase(one.name, name) or one.name.split("/")[0] == name for name in names)
    return named and (not arguments.fast or one.fast) and arguments.framework in {None, one.framework}


def run_all(chosen: Iterable[Case], out: Path, jobs: int, *, again: bool) -> list[dict[str, Any]]:
    """Run each case with each of its seeds in a process of its own, and return the outcomes in order."""
    work = [(one, seed) for one in chosen for seed in range(one.seeds)]
    outcomes: dict[tuple[str, str, int], dict[str, Any]] = {}
    with ThreadPoolExecutor(jobs) as pool:
        pending = {
            pool.submit(outcome_of, one, seed, out, again=again): (one.name, one.framework, seed) for one, seed in work
        }
        for number, future in enumerate(as_completed(pending), 1):
            outcome = outcomes[pending[future]] = future.result()
            print(f"[{number}/{len(work)}] {line(outcome)}", flush=True)
    return [outcomes[one.name, one.framework, seed] for one, seed in work]


def outcome_of(one: Case, seed: int, out: Path, *, again: bool) -> dict[str, Any]:
    """Return the outcome of one run, from its file where the code is still the same."""
    path = out / one.framework / f"{one.name.replace('/', '_')}-{seed}.json"
    code = fingerprint(one)
    if path.is_file() and not again:
        kept: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if kept.get("code") == code:
            return kept
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_suffix(".part")
    fresh.unlink(missing_ok=True)
    command = [sys.executable, "-m", "benchmarks.clinic.worker", one.name, one.framework, str(seed), str(fresh)]
    began = time.perf_counter()
    try:
        done = subprocess.run(  # noqa: S603 - a program of this checkout
            command, cwd=ROOT, env={**ENVIRONMENT, **os.environ}, capture_output=True, text=True, check=False,
            timeout=LIMIT,
        )  # fmt: skip
        said = done.stderr.strip().splitlines()
    except subprocess.TimeoutExpired:
        said = [f"it ran for more than {LIMIT} seconds"]
    if fresh.is_file():
        outcome = json.loads(fresh.read_text(encoding="utf-8"))
        fresh.unlink()
    else:
        outcome = {
            "case": one.name, "framework": one.framework, "kind": one.kind, "expected": list(one.expects),
            "seed": seed, "right": False, "failed": said[-1] if said else "it said nothing", "log": said[-30:],
            "seconds": round(time.perf_counter() - began, 2),
        }  # fmt: skip
    outcome["code"] = code
    path.write_text(json.dumps(outcome, indent=1), encoding="utf-8")
    return outcome  # type: ignore[no-any-return]


def line(outcome: dict[str, Any]) -> str:
    """Return an outcome in a line."""
    expected = " or ".join(outcome["expected"]) or "nothing"
    expected = f"{expected}, innocent" if outcome["kind"] == INNOCENT else expected
    begin = f"{outcome['case']:<22} {outcome['seed']} {'ok   ' if outcome['right'] else 'WRONG'} {expected:<15}"
    if "failed" in outcome:
        return f"{begin} FAILED {outcome['failed']}"
    said = outcome["headline"] or "silent"
    said += " (info)" if outcome["severity"] == "info" else ""
    rank = f"rank {outcome['rank']}" if outcome["rank"] else ""
    others = [*outcome["false_alarms"]]
    if outcome["kind"] != "faulty":
        others = outcome["blamed"]
    return f"{begin} {said:<12} {rank:<7} {outcome['seconds']:>5.1f} s  {', '.join(others)}".rstrip()


def summary(outcomes: list[dict[str, Any]]) -> int:
    """Print all outcomes and the totals, and return 0 where all goals are met."""
    print(f"\n{'case':<22} s       expected        said         rank    seconds  false alarms")
    for outcome in outcomes:
        print(line(outcome))
    failed = [outcome for outcome in outcomes if "failed" in outcome]
    if failed:
        print(f"\n{len(failed)} failed")
    for outcome in failed:
        print("\n".join([f"{outcome['case']} seed {outcome['seed']}:", *(f"    {row}" for row in outcome["log"])]))
    print()
    total, right = (Counter(o["kind"] for o in some) for some in (outcomes, [o for o in outcomes if o["right"]]))
    for kind, words in SAID.items():
        if total[kind]:
            print(words.format(right[kind], total[kind]))
    told = sum(o["right"] and o["kind"] == "faulty" and o["severity"] != "info" for o in outcomes)
    print(f"{told} of the right headlines are warnings or errors, the others are worth knowing")
    alarms = sum(len(outcome.get("false_alarms", ())) for outcome in outcomes if outcome["kind"] == "faulty")
    print(f"{alarms} false alarms beside the headlines")
    print(f"\n{peers_text(outcomes)}")
    return int(any(right[kind] < goal * total[kind] for kind, goal in GOALS.items()))


if __name__ == "__main__":
    sys.exit(main())
