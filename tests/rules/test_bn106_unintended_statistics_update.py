import dataclasses

import numpy as np
import pytest

from bnwatch import testing
from bnwatch.records import Attachment, EvaluationRecord, Structure
from bnwatch.signals import WINDOW
from tests.rules import cases

RULE = "BN106"
LIMITS = {name: threshold.value for name, threshold in cases.rule(RULE).thresholds.items()}
# Two passes that differ in n examples: McNemar gives p = 2^-n, which is .0156 for 6 and .0078 for 7.
HARM = {"running": 0.5, "batch": 0.9, "population": 0.9}


def evaluated(*moved, step=9, measured=None, **fields):
    record = EvaluationRecord(step, 0, 0.5, moved=moved, **fields)
    specs = Attachment((testing.layer(), testing.layer("b")), framework="keras 3")
    return testing.signals(specs, record, *([] if measured is None else [measured]))


def cells(lost, examples=500, step=9, population=None):
    """Running statistics lose ``lost`` examples that batch statistics and re-estimated ones get right."""
    row = {"batch": 0.9, "running": 0.9 - lost / examples}
    return testing.cells(step, evaluation={**row, "population": population or 0.9}, examples=examples)


def since(*moved, lost=20, swapped=False, step=9, **fields):
    """Cells whose running statistics are not what the last evaluation, after step 9, left."""
    return evaluated(measured=dataclasses.replace(cells(lost, step=step), moved=moved, swapped=swapped), **fields)


def stepped(beyond, pairs=int(LIMITS["samples"]), *, explained=0, gaps=1, mean=1.0, unseen=None):
    """Steps after each of which the running mean lies ``beyond`` what the call explains; then some that explain it."""
    spec, running = testing.layer(decay=0.9, epsilon=0.0), 0.0
    snapshots = []
    for n in range(pairs + explained + 1):
        running = 0.9 * running + 0.1 * mean * n + (beyond if n <= pairs else 0.0)
        snapshots.append(testing.snapshot(1 + n * gaps, testing.call(spec, mean=mean * n, running_mean=running)))
    return testing.signals(Attachment((spec,), unseen=unseen), *snapshots)


def passes(calls, places, layers=("bn",), apart=0.0, by="keras 3"):
    """A model whose graph calls each layer ``places`` times, and a step that does so ``calls[layer]`` times."""
    specs = [testing.layer(path, decay=1.0) for path in layers]
    graph = Structure(tuple(testing.usage(p, *(testing.place(p, k) for k in range(places))) for p in layers))
    rng = np.random.default_rng(1)
    return testing.signals(
        Attachment(tuple(specs), framework=by),
        graph,
        *(
            testing.snapshot(
                n,
                *(
                    testing.call(s, site=k, mean=apart * k + rng.normal(0, 0.1, 4))
                    for s in specs
                    for k in range(calls[s.path])
                ),
            )
            for n in range(1, 9)
        ),
    )


FIRES = {
    "an evaluation that moved them, and it costs": lambda: evaluated("bn", measured=testing.cells(9, evaluation=HARM)),
    "above_cost": lambda: evaluated("bn", measured=cells(21, 2000)),
    "below_alpha": lambda: evaluated("bn", measured=cells(7)),
    "passes after the evaluation that cost": lambda: since("bn"),
    "passes after training steps that no evaluation followed": lambda: since("bn", step=12),
}
INFO = {
    "an evaluation that moved them": lambda: evaluated("bn"),
    "below_cost": lambda: evaluated("bn", measured=cells(19, 2000)),
    "above_alpha": lambda: evaluated("bn", measured=cells(6)),
    "it costs, and a re-estimate does not restore it": lambda: evaluated("bn", measured=cells(20, population=0.865)),
    "passes after the evaluation that cost nothing": lambda: since("bn", lost=0),
    "cells of an earlier evaluation": lambda: evaluated("bn", measured=cells(20, step=4)),
    "several calls on like data, where the graph is not known": lambda: _hidden(
        passes({"bn": 2, "head": 1}, 1, ("bn", "head"))
    ),
    "above_unexplained": lambda: stepped(LIMITS["unexplained"] * 1.05),
    "above_samples": lambda: stepped(0.5),
    "more calls than the graph has, and a cost that they do not explain": lambda: _costly(
        passes({"bn": 2, "head": 1}, 1, ("bn", "head"))
    ),
    "more calls of one layer than the graph has": lambda: passes({"bn": 2, "head": 1}, 1, ("bn", "head")),
}
QUIET = {
    "nothing moved": evaluated,
    "the evaluation used batch statistics, which is BN103": lambda: evaluated("bn", batch_statistics=("bn",)),
    "weights and statistics of a checkpoint": lambda: evaluated("bn", swapped=True),
    "weights and statistics that came back when training ended": lambda: since("bn", swapped=True),
    "passes after an earlier evaluation": lambda: since("bn", step=4),
    "below_unexplained": lambda: stepped(LIMITS["unexplained"] * 0.95),
    "below_samples": lambda: stepped(0.5, int(LIMITS["samples"]) - 1),
    "a few movements among many explained steps": lambda: stepped(0.5, explained=4),
    "steps in between that were not sampled": lambda: stepped(0.5, gaps=2),
    "other replicas take part, unseen": lambda: stepped(0.5, unseen="they are not seen"),
    "statistics that do not move at all, which is BN203": lambda: testing.signals(
        *(testing.snapshot(n, testing.call(testing.layer(), mean=n)) for n in range(1, 9))
    ),
    "every step explained": lambda: stepped(0.0, 9),
    "rounding at a mean of 3,000 standard deviations": lambda: stepped(0.0, WINDOW, mean=3e3),
    "a call for each place of the graph": lambda: passes({"bn": 2}, 2),
    "as many passes of the whole model, which is BN213": lambda: passes({"bn": 2, "head": 2}, 1, ("bn", "head")),
    "several calls of a step of Chainer's, each of which is trained": lambda: passes(
        {"bn": 2, "head": 1}, 1, ("bn", "head"), by="chainer 7.8.1"
    ),
    "calls that see other data, which is BN101": lambda: _hidden(
        passes({"bn": 2, "head": 1}, 1, ("bn", "head"), apart=1.0)
    ),
}
SKIPS = {"nothing was seen": (testing.signals, None)}


def _costly(signals):
    signals.cells = testing.cells(9, evaluation=HARM)
    return signals


def _hidden(signals):
    signals.structure = dataclasses.replace(signals.structure, hidden="a subclassed model")
    return signals


test_cases = cases.runner(RULE, fires=FIRES, info=INFO, quiet=QUIET, skips=SKIPS)


def test_what_was_measured_is_said():
    ((finding,), _) = cases.look(RULE, FIRES["an evaluation that moved them, and it costs"]())
    assert finding.notes == (
        "the same 1,000 evaluation examples give 50.0% with the running statistics and 90.0% with re-estimated ones",
    )
    ((finding,), _) = cases.look(RULE, INFO["above_samples"]())
    assert finding.evidence["unexplained"].value == pytest.approx(0.5, rel=1e-5)
    assert finding.evidence["steps"].value == LIMITS["samples"]


def test_extra_passes_are_counted_against_the_graph():
    ((finding,), _) = cases.look(RULE, INFO["more calls of one layer than the graph has"]())
    assert finding.subject == "bn"
    assert finding.message.endswith("updated by 2 training-mode calls a step, one forward pass makes fewer")


def test_only_layers_that_evaluated_with_running_statistics_are_named():
    ((finding,), _) = cases.look(RULE, evaluated("bn", "b", batch_statistics=("bn",)))
    assert finding.subject == "b"
    assert finding.helps[0].startswith("Keras: ")


@pytest.mark.parametrize(("step", "when"), [(9, "after the evaluation at step 9"), (12, "after training step 12")])
def test_when_they_moved(step, when):
    ((finding,), _) = cases.look(RULE, since("bn", "b", step=step))
    assert finding.message == f"running statistics of `bn`, `b` moved {when}"
