"""Why a network does no better than guessing: what the looks, the losses and the end of the model tell apart.

What is exact comes first, then what is measured, then what is likely: a kind that is likely names the experiment that
decides.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from bnwatch import moments

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from bnwatch.evidence import Cells, Look
    from bnwatch.records import EvaluationRecord, Output
    from bnwatch.signals import Signals

OVERFIT = "train on one batch of 32 examples alone for a few hundred steps"
ROUNDING = 1e-3
"""Below zero by no more than this a mean of losses may come out negative by rounding."""

ONE_BATCH = f"{OVERFIT}: a network that cannot learn it by heart has a learning rate or a wiring fault"


@dataclass(frozen=True, slots=True)
class Kind:
    """Why it guesses: a clause of the message, notes and helps."""

    clause: str
    notes: tuple[str, ...]
    helps: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Case:
    """What is known of a network that guesses.

    Attributes:
        signals: all of it.
        last: the last evaluation.
        look: the latest look through the network; None when there is none.
        limits: of BN302.
        constant: the output is the same for every example, at two looks.
    """

    signals: Signals
    last: EvaluationRecord
    look: Look | None
    limits: Mapping[str, float]
    constant: bool

    @property
    def output(self) -> Output | None:
        """Return how the model ends, where that is known."""
        return self.signals.structure.output if self.signals.structure is not None else None

    @property
    def loss(self) -> float | None:
        """Return the loss on training examples, where one is known."""
        known = (self.last.train_loss, None if self.look is None else self.look.loss)
        return next((loss for loss in known if loss is not None), None)

    @property
    def guessed(self) -> float | None:
        """Return the loss of naming every class with the same probability; None for a loss that is no cross-entropy."""
        classes = self.last.classes or (round(1.0 / self.signals.chance) if self.signals.chance else 0)
        name = letters(self.output.loss if self.output is not None else None)
        if self.output is not None and "crossentropy" not in name:
            return None
        one_of_many = "binary" not in name and "sigmoid" not in name
        return math.log(classes) if classes > 1 and (one_of_many or classes == 2) else None  # noqa: PLR2004

    @property
    def update(self) -> float | None:
        """Return the largest relative change of a layer's parameters in one step."""
        layers = self.look.layers if self.look is not None else ()
        return max((layer.update for layer in layers if layer.update is not None), default=None)


def letters(name: str | None) -> str:
    """Return the letters of a name, lower case: frameworks write one loss in several ways."""
    return "".join(c for c in (name or "").lower() if c.isalpha())


def kind(case: Case) -> Kind:
    """Return why it guesses, as far as it is known."""
    return next((found for one in KINDS if (found := one(case)) is not None), Kind(GUESSING, (), _general()))


def statistics(cells: Cells, alpha: float) -> Kind | None:
    """Return that the network has learned and only its running statistics guess, None where neither is to be seen.

    Dropout or augmentation may leave the training accuracy at chance for long, where that of the cells is not.
    """
    for split, row in cells.rows():
        batch, running = row["batch"], row["running"]
        right = round(batch.accuracy * batch.examples)
        by_chance = moments.binomial_survival(right, batch.examples, batch.majority)
        gained, p = batch.gain_over(running)
        if gained > 0.0 and max(by_chance, p) < alpha:
            return Kind(
                f"with batch statistics it is {batch.accuracy:.1%}, so what guesses is the running statistics",
                (
                    f"the same {batch.examples:,} {split} examples give {running.accuracy:.1%} with running "
                    "statistics: the weights have learned, and the labels belong to their examples",
                ),
                ("see what is said of the running statistics (BN301), and of what makes them so",),
            )
    return None


GUESSING = "that is what guessing gives"


def _general() -> tuple[str, ...]:
    return (
        "check that labels match their examples, and that loss and output layer fit each other "
        "(softmax with from_logits=False, none with from_logits=True)",
        ONE_BATCH,
    )


def _not_a_number(case: Case) -> Kind | None:
    losses = (case.last.train_loss, case.last.loss, None if case.look is None else case.look.loss)
    if not any(loss is not None and not math.isfinite(loss) for loss in losses):
        return None
    return Kind(
        "the loss is NaN or infinity",
        ("a step with such a loss makes every parameter NaN, and a network of NaN names one class",),
        (
            "check inputs and labels for NaN and infinity, and the loss for a logarithm or a quotient of zero",
            "then lower the learning rate, or clip gradients",
        ),
    )


def _one_unit(case: Case) -> Kind | None:
    """A softmax over one unit is 1 whatever its input; so is the loss over one class whatever its label."""
    output = case.output
    if output is None or output.units != 1:
        return None
    if output.activation == "softmax":
        what = f"`{output.path}` is a softmax over one unit, which is 1 for every input"
    elif "categorical" in letters(output.loss) or "softmax" in letters(output.loss):
        what = f"`{output.path}` has one unit, and the loss chooses among one class"
    else:
        return None
    return Kind(
        what,
        ("a softmax divides by the sum over the units: with one unit it divides each score by itself",),
        (
            "for two classes: one unit with a sigmoid and binary cross-entropy",
            "or two units with softmax and categorical cross-entropy",
        ),
    )


def _same_input(case: Case) -> Kind | None:
    entry = case.look.entry if case.look is not None else None
    if case.look is None or entry is None or entry >= case.limits["constant"]:
        return None
    return Kind(
        "every example enters the network as the same input",
        (f"{case.look.examples:,} training examples differ by less than rounding where they enter",),
        (
            "look at a batch as the model gets it: inputs that are all zero, one example that is repeated, or values "
            "that an integer type or a wrong scale took to one number",
        ),
    )


def _negative(case: Case) -> Kind | None:
    """A cross-entropy of labels from 0 to 1 is never negative."""
    if case.output is None or "crossentropy" not in letters(case.output.loss):
        return None
    for split, loss in (("a training", case.last.train_loss), ("an evaluation", case.last.loss)):
        if loss is not None and loss < -ROUNDING:
            return Kind(
                f"{split} loss of {loss:.3g} is no cross-entropy of labels from 0 to 1, which is never negative",
                (
                    "likely labels outside of 0 to 1, as -1 and 1 for two classes: the loss then falls without end as "
                    "the network grows confident, right or wrong",
                ),
                (
                    "look at the smallest and the largest label, as the loss gets them: two classes are 0 and 1",
                    "where they are right, look for class or sample weights below zero, and for what is subtracted "
                    "from the loss",
                ),
            )
    return None


def _forced(case: Case) -> Kind | None:
    """A small cross-entropy is only possible with a high accuracy: then accuracy is computed wrongly.

    Where the mean of -log p is L, at most a share L / log 2 of the examples has p of 1/2 or less (Markov); for all the
    others the right class is the one with the largest score.
    """
    if case.guessed is None or case.output is None:
        return None
    for split, loss, accuracy, examples in (
        ("a training", case.last.train_loss, case.last.train_accuracy, case.last.train_examples),
        ("an evaluation", case.last.loss, case.last.accuracy, case.last.examples),
    ):
        if loss is None or accuracy is None or not examples:
            continue
        least = 1.0 - max(loss, 0.0) / math.log(2.0)
        if least > moments.binomial_interval(accuracy, examples)[1]:
            return Kind(
                f"but {split} loss of {loss:.3g} is only possible with {least:.1%} or more",
                (
                    "loss and accuracy disagree, and the loss is what is trained: where the mean of -log p is L, the "
                    "right class has p above 1/2 for all but L / log 2 of the examples",
                ),
                (
                    "look at the metric: it must fit the labels (class numbers: sparse categorical accuracy; one-hot: "
                    "categorical accuracy; one unit: binary accuracy)",
                    "compare it with the share of examples whose largest score is that of their label",
                ),
            )
    return None


def _takes_scores_for_probabilities(case: Case) -> Kind | None:
    output = case.output
    if output is None or output.activation != "linear" or output.from_logits is not False:
        return None
    if "crossentropy" not in letters(output.loss):
        return None
    return Kind(
        f"`{output.path}` gives scores of any size, and the loss takes them for probabilities",
        ("the loss cuts them off at 0 and 1: beyond that no gradient is left",),
        ("from_logits=True in the loss, or a softmax (one unit: sigmoid) on the output",),
    )


def _same_output(case: Case) -> Kind | None:
    if not case.constant or case.look is None:
        return None
    first = case.look.first_constant(case.limits["constant"])
    if first is None:
        return None
    dead = f": {first.dead_units:.0%} of its units are zero for every one" if first.dead_units else ""
    return Kind(
        "the network gives the same output for every example",
        (f"`{first.path}` is the first layer whose output does not vary over examples{dead}",),
        ("look at that layer and at what feeds it", ONE_BATCH),
    )


def _saturated(case: Case) -> Kind | None:
    layer = case.look.layers[-1] if case.look is not None and case.look.layers else None
    if case.look is None or layer is None or layer.bounds is None or layer.bounds < case.limits["bounds"]:
        return None
    gradients = [one.gradient for one in case.look.layers if one.gradient is not None]
    left = f"; the largest gradient of any parameter is {max(gradients):.2g}" if gradients else ""
    return Kind(
        f"{layer.bounds:.1%} of the outputs of `{layer.path}` are exactly 0 or 1",
        (f"a saturated output has no gradient, right or wrong: no later step moves it{left}",),
        (
            _smaller(case),
            "let the loss take scores in place of probabilities (from_logits=True and no activation): its gradient "
            "does not vanish",
        ),
    )


def _too_fast(case: Case) -> Kind | None:
    update, loss, guessed = case.update, case.loss, case.guessed
    if update is not None and update > case.limits["fast"]:
        what = f"the parameters of a layer change by {update:.0%} of their size each step"
    elif loss is not None and guessed is not None and loss > case.limits["worse"] * guessed:
        what = f"the training loss, {loss:.3g}, is {loss / guessed:.0f} times that of guessing"
    else:
        return None
    return Kind(
        what,
        ("likely a learning rate far too high; what decides: the same training with a hundredth of it",),
        (_smaller(case), "scale the inputs to mean 0 and variance 1: large inputs make large steps"),
    )


def _too_slow(case: Case) -> Kind | None:
    update = case.update
    if update is None or update >= case.limits["slow"]:
        return None
    if update == 0.0:
        return Kind(
            "no parameter of any layer changes",
            ("steps are counted and parameters stay what they are, to the bit",),
            (
                "check that the optimizer is given the parameters of this model and its step is taken",
                "check that layers are trainable and the learning rate is not zero",
            ),
        )
    rate = case.look.learning_rate if case.look is not None else None
    return Kind(
        f"no layer changes its parameters by more than {update:.1g} of their size each step",
        ("likely a learning rate far too low; what decides: the same training with a hundred times as much",),
        (f"a larger learning rate{'' if rate is None else f' (it is {rate:g})'}: 1e-3 is a good start for Adam",),
    )


def _twice(case: Case) -> Kind | None:
    output = case.output
    if output is None or output.activation not in {"softmax", "sigmoid"} or output.from_logits is not True:
        return None
    return Kind(
        f"{output.activation} is applied twice, by `{output.path}` and by the loss",
        ("likely why: scores of 0 to 1 leave the loss little room; what decides: leave one of the two out",),
        ("from_logits=False in the loss, or an output without activation",),
    )


def _labels(case: Case) -> Kind | None:
    loss, guessed = case.loss, case.guessed
    if case.look is None or loss is None or guessed is None or abs(loss / guessed - 1.0) > case.limits["near"]:
        return None
    moving = "" if case.update is None else f", the parameters move by {case.update:.1g} of their size a step"
    return Kind(
        f"the training loss, {loss:.3g}, is that of guessing, {guessed:.3g}",
        (
            f"the output varies from example to example{moving}: likely labels that do not belong to their examples; "
            f"what decides: {OVERFIT}. One that is learned by heart is no fault of the network",
        ),
        (
            "look at a few examples with their labels, as the model gets them: shuffled apart, shifted by one, or of "
            "another encoding",
            "check the same for what augments or batches the data",
            ONE_BATCH,
        ),
    )


def _smaller(case: Case) -> str:
    rate = case.look.learning_rate if case.look is not None else None
    return f"a learning rate of {rate / 100:.1g} (it is {rate:g})" if rate else "a hundredth of the learning rate"


KINDS: tuple[Callable[[Case], Kind | None], ...] = (
    _not_a_number,
    _one_unit,
    _same_input,
    _negative,
    _forced,
    _takes_scores_for_probabilities,
    _same_output,
    _saturated,
    _too_fast,
    _too_slow,
    _twice,
    _labels,
)
