import dataclasses
import math

import numpy as np
import pytest
from scipy import stats

from bnwatch import moments, testing
from bnwatch.evidence import Cell, Cells
from bnwatch.records import EvaluationRecord, Output, Structure
from tests.rules import cases

RULE = "BN302"
LIMITS = {name: threshold.value for name, threshold in cases.rule(RULE).thresholds.items()}
EXAMPLES = 1000
# The most that a guesser among ten classes reaches with probability alpha or more.
MOST = int(stats.binom.isf(LIMITS["alpha"], EXAMPLES, 0.1))


def evaluations(*accuracies, train=None, classes=10, majority=None, examples=EXAMPLES, train_examples=EXAMPLES):
    return [
        EvaluationRecord(
            10 * n, n - 1, accuracy, examples=examples, train_accuracy=accuracy if train is None else train,
            train_examples=train_examples, classes=classes, majority=majority,
        )
        for n, accuracy in enumerate(accuracies, start=1)
    ]  # fmt: skip


def looks(spread, number=2):
    layers = (
        testing.layer_look("conv"),
        testing.layer_look("dense", spread=spread),
        testing.layer_look("out", spread=spread),
    )
    return [testing.look(n, *layers) for n in range(1, number + 1)]


def at(*items):
    return testing.signals(*items)


def examples_for(margin):
    return next(n for n in range(1, 10**4) if moments.binomial_interval(0.1, n)[1] - 0.1 <= margin)


ENOUGH = examples_for(LIMITS["margin"])
INNOCENT = testing.cells(10, evaluation={"batch": 0.1, "running": 0.1})

GUESSED = math.log(10)


def guessing(
    *,
    loss=None,
    update=None,
    bounds=None,
    spread=0.5,
    entry=None,
    output=None,
    number=2,
    rate=None,
    **last,
):
    """A network at chance in three evaluations, and what is known of it."""
    layers = (
        testing.layer_look("conv", update=update, gradient=0.0),
        testing.layer_look("out", spread=spread, bounds=bounds),
    )
    looks = [testing.look(n, *layers, loss=loss, entry=entry, learning_rate=rate) for n in range(31 - number, 31)]
    structure = [] if output is None else [Structure(output=output)]
    known = [dataclasses.replace(one, **last) for one in evaluations(0.1, 0.1, 0.1)]
    return lambda: at(*known, *looks, *structure, testing.cells(10, evaluation={"batch": 0.1, "running": 0.1}))


def ends(activation="softmax", loss="sparse_categorical_crossentropy", *, units=10, from_logits=False):
    return Output("out", units, activation, loss, from_logits)


# Each kind just where it begins, and just where it does not.
LEAST = math.log(2) * (1 - moments.binomial_interval(0.1, EXAMPLES)[1])
KINDS = {
    "above_bounds": (guessing(bounds=LIMITS["bounds"]), "99.0% of the outputs of `out` are exactly 0 or 1"),
    "below_bounds": (guessing(bounds=LIMITS["bounds"] - 1e-3), "that is what guessing gives"),
    "above_fast": (guessing(update=LIMITS["fast"] + 1e-9), "the parameters of a layer change by 10% of their size"),
    "below_fast": (guessing(update=LIMITS["fast"]), "that is what guessing gives"),
    "above_worse": (guessing(loss=GUESSED * (LIMITS["worse"] + 1e-6)), "the training loss, 6.91, is 3 times that of"),
    "below_worse": (guessing(loss=GUESSED * (LIMITS["worse"] - 1e-6)), "that is what guessing gives"),
    "below_slow": (guessing(update=LIMITS["slow"] / 1.01), "no layer changes its parameters by more than 1e-06"),
    "above_slow": (guessing(update=LIMITS["slow"]), "that is what guessing gives"),
    "below_near": (guessing(loss=1.099 * GUESSED), "the training loss, 2.53, is that of guessing, 2.3"),
    "above_near": (guessing(loss=1.101 * GUESSED), "that is what guessing gives"),
    "the loss is NaN": (guessing(train_loss=math.nan), "the loss is NaN or infinity"),
    "the loss of the look is infinite": (guessing(loss=math.inf), "the loss is NaN or infinity"),
    "softmax over one unit": (
        guessing(output=ends(loss="binary_crossentropy", units=1), loss=0.062, classes=2),
        "`out` is a softmax over one unit, which is 1 for every input",
    ),
    "a loss over one class": (guessing(output=ends("linear", "softmax_cross_entropy", units=1)), "chooses among one"),
    "one unit with a sigmoid": (
        guessing(output=ends("sigmoid", "binary_crossentropy", units=1)),
        "that is what guessing gives",
    ),
    "inputs that do not vary": (guessing(entry=0.0, spread=0.0), "every example enters the network as the same input"),
    "the metric is wrong": (
        guessing(output=ends(), train_loss=LEAST - 1e-4),
        "but a training loss of 0.61 is only possible with 12.0% or more",
    ),
    "a cross-entropy below zero": (
        guessing(output=ends("sigmoid", "binary_crossentropy"), train_loss=-31.4),
        "a training loss of -31.4 is no cross-entropy of labels from 0 to 1",
    ),
    "a cross-entropy just below zero": (
        guessing(output=ends(), train_loss=-1.1e-3),
        "a training loss of -0.0011 is no cross-entropy of labels from 0 to 1",
    ),
    "a cross-entropy of zero, rounded": (
        guessing(output=ends(), train_loss=-0.9e-3),
        "but a training loss of -0.0009 is only possible with 100.0% or more",
    ),
    "another loss, which may be negative": (
        guessing(output=ends(loss="cosine_similarity"), train_loss=-0.9),
        "that is what guessing gives",
    ),
    "a loss of other examples says nothing of the metric": (
        guessing(output=ends(), loss=0.1),
        "that is what guessing gives",
    ),
    "a loss that leaves room for guessing": (guessing(output=ends(), train_loss=LEAST + 1e-3), "that is what guessing"),
    "a small loss of another kind": (
        guessing(output=ends("sigmoid", "binary_crossentropy"), train_loss=0.01),
        "that is what guessing gives",
    ),
    "a small squared error": (guessing(output=ends(loss="mse"), train_loss=0.01), "that is what guessing gives"),
    "scores taken for probabilities": (guessing(output=ends("linear")), "the loss takes them for probabilities"),
    "scores taken for scores": (guessing(output=ends("linear", from_logits=True)), "that is what guessing gives"),
    "the output is constant": (guessing(spread=0.0), "the network gives the same output for every example"),
    "no parameter moves": (guessing(update=0.0), "no parameter of any layer changes"),
    "softmax twice": (guessing(output=ends(from_logits=True)), "softmax is applied twice, by `out` and by the loss"),
    "labels of other examples": (guessing(loss=2.29, update=0.003), "the training loss, 2.29, is that of guessing"),
}


@pytest.mark.parametrize(
    ("loss", "clause"),
    [
        (-2.0, "an evaluation loss of -2 is no cross-entropy"),
        (0.0, "but an evaluation loss of 0 is only possible with"),
    ],
)
def test_an_evaluation_loss_that_cannot_be(loss, clause):
    fed = guessing(output=ends(loss="BinaryCrossentropy"), classes=2)()
    fed.evaluations[-1] = dataclasses.replace(fed.evaluations[-1], loss=loss)
    ((finding,), _) = cases.look(RULE, fed)
    assert clause in finding.message


def rare(*, constant=False, training=0.9, evaluation=0.9, accuracy=0.86, step=10):
    """Two classes, of which the frequent one makes up a share of each split; 20 % of either class come out wrong."""

    def cell(share):
        labels = (np.arange(EXAMPLES) < share * EXAMPLES).astype(np.int64)
        wrong = np.arange(EXAMPLES) % 5 == 0
        return Cell(np.ones_like(labels) if constant else np.where(wrong, 1 - labels, labels), labels)

    rows = [{"batch": cell(share), "running": cell(share)} for share in (training, evaluation)]
    return lambda: at(*evaluations(*[accuracy] * 3, train=0.8, classes=2), Cells(step, 0, 2, *rows))


def learned(batch, *, split="evaluation", running=0.05, step=10):
    return testing.cells(step, **{split: {"batch": batch, "running": running}}, examples=EXAMPLES)


FIRES = {
    "what batch statistics give is chance": lambda: at(*evaluations(0.1, 0.1, 0.1), learned(MOST / EXAMPLES)),
    "running statistics are hardly worse": lambda: at(*evaluations(0.1, 0.1, 0.1), learned(0.135, running=0.13)),
    "learned before it was at chance": lambda: at(*evaluations(0.1, 0.1, 0.1), learned(0.4, step=9)),
    "rare classes, of which one is always named": rare(constant=True),
    "rare classes, and what was learned is forgotten since": rare(step=9),
    **{name: build for name, (build, _) in KINDS.items()},
    "above_patience": lambda: at(*evaluations(0.1, 0.1, 0.1)),
    "below_constant": lambda: at(*evaluations(0.1), *looks(LIMITS["constant"] / 1.01)),
    "above_alpha": lambda: at(*evaluations(*[MOST / EXAMPLES] * 3)),
    "below_margin": lambda: at(*evaluations(*[0.1] * 3, examples=ENOUGH, train_examples=ENOUGH)),
    "training examples tell where the others are few": lambda: at(*evaluations(*[0.1] * 3, examples=10)),
    "a constant predictor of the most frequent class": lambda: at(*evaluations(*[0.6] * 3, classes=2, majority=0.6)),
    "training accuracy not known": lambda: at(
        *(EvaluationRecord(n, 0, 0.1, examples=1000, classes=10) for n in (1, 2, 3))
    ),
    "few examples, and the output is constant": lambda: at(
        *evaluations(0.1, examples=10, train_examples=10), *looks(0.0)
    ),
}


QUIET = {
    "rare classes, weighted: right less often than the frequent one, and no guess": rare(),
    "the frequent class is frequent in the training alone": rare(constant=True, evaluation=0.6),
    "below_alpha": lambda: at(*evaluations(*[(MOST + 1) / EXAMPLES] * 3)),
    "training accuracy is above chance": lambda: at(*evaluations(0.1, 0.1, 0.1, train=0.4)),
    "it got away in the end": lambda: at(*evaluations(0.1, 0.1, 0.1, 0.4)),
    "a fair coin that is right by skill": lambda: at(*evaluations(0.6, 0.6, 0.6, classes=2)),
}
SKIPS = {
    "no evaluation": (at, None),
    "no accuracy": (lambda: at(EvaluationRecord(1, 0, None, classes=10)), None),
    "classes not known": (lambda: at(*evaluations(0.1, 0.1, 0.1, classes=0)), "cells"),
    "below_patience": (lambda: at(*evaluations(0.1, 0.1)), "look"),
    "above_constant": (lambda: at(*evaluations(0.1), *looks(LIMITS["constant"] * 1.01)), "look"),
    "one look may be a passing state": (lambda: at(*evaluations(0.1), *looks(0.0, number=1)), "look"),
    "above_margin": (lambda: at(*evaluations(*[0.1] * 3, examples=ENOUGH - 1, train_examples=ENOUGH - 1)), None),
}

INFO = {
    "the running statistics alone guess": lambda: at(*evaluations(0.1, 0.1, 0.1), learned((MOST + 1) / EXAMPLES)),
    "seen on training data alone": lambda: at(*evaluations(0.1, 0.1, 0.1), learned(0.4, split="training")),
}

test_cases = cases.runner(RULE, fires=FIRES, info=INFO, quiet=QUIET, skips=SKIPS)


def test_the_boundary_is_where_the_test_puts_it():
    assert stats.binom.sf(MOST - 1, EXAMPLES, 0.1) > LIMITS["alpha"] > stats.binom.sf(MOST, EXAMPLES, 0.1)


def test_the_first_constant_layer_is_named():
    ((finding,), _) = cases.look(RULE, at(*evaluations(0.1), *looks(0.0), INNOCENT))
    assert "`dense` is the first layer" in finding.notes[1]
    assert "same output for every example" in finding.message


def test_it_asks_for_the_cells_and_then_speaks_of_them():
    findings, skipped = cases.look(RULE, at(*evaluations(0.1, 0.1, 0.1)))
    assert len(findings) == 1
    assert [s.needs for s in skipped] == ["cells"]
    ((finding,), skipped) = cases.look(RULE, at(*evaluations(0.1, 0.1, 0.1), INNOCENT))
    assert skipped == []
    assert "innocent" in finding.notes[-1]


def test_running_statistics_that_are_to_blame_are_not_called_innocent():
    guilty = testing.cells(10, evaluation={"batch": 0.4, "running": 0.1})
    ((finding,), _) = cases.look(RULE, at(*evaluations(0.1, 0.1, 0.1), guilty))
    assert not any("innocent" in note for note in finding.notes)
    assert "with batch statistics it is 40.0%" in finding.message
    assert not any("likely" in note for note in finding.notes)
    assert "BN301" in cases.rule(RULE).causes


def test_the_accuracies_and_their_chance_are_in_the_evidence():
    ((finding,), _) = cases.look(RULE, at(*evaluations(0.1, 0.1, 0.1), INNOCENT))
    assert finding.evidence["chance"].value == pytest.approx(0.1)
    assert finding.evidence["evaluations"].value == 3
    assert finding.evidence["evaluation_accuracy"].interval == pytest.approx(moments.binomial_interval(0.1, 1000))
    assert finding.evidence["training_accuracy"].value == 0.1


@pytest.mark.parametrize(("build", "clause"), KINDS.values(), ids=KINDS)
def test_the_message_says_which_kind_it_is(build, clause):
    ((finding,), _) = cases.look(RULE, build())
    assert clause in finding.message


@pytest.mark.parametrize("name", ["above_fast", "below_slow", "softmax twice", "labels of other examples"])
def test_what_is_likely_names_the_experiment_that_decides(name):
    ((finding,), _) = cases.look(RULE, KINDS[name][0]())
    (note,) = (note for note in finding.notes if "likely" in note)
    assert "what decides: " in note


@pytest.mark.parametrize("classes", [2, 10])
def test_a_cross_entropy_bounds_the_accuracy(classes):
    """The bound that tells a wrong metric, against random predictions."""
    rng = np.random.default_rng(classes)
    for sharpness in (0.3, 1.0, 5.0):
        labels = rng.integers(classes, size=500)
        scores = rng.normal(size=(500, classes)) + sharpness * np.eye(classes)[labels] * rng.uniform(0, 4, (500, 1))
        p = np.exp(scores) / np.exp(scores).sum(axis=1, keepdims=True)
        loss = -np.log(p[np.arange(500), labels]).mean()
        assert (p.argmax(axis=1) == labels).mean() >= 1 - loss / math.log(2)


def test_the_learning_rate_is_named_where_it_is_known():
    ((finding,), _) = cases.look(RULE, guessing(update=0.4, rate=10.0)())
    assert finding.helps[0] == "a learning rate of 0.1 (it is 10)"
