"""Examples for the experiments, kept while the user trains and evaluates: nobody is asked for them.

Training batches are kept on sampled steps only, each in its own composition; evaluation batches of a hand-written loop
the first time they come by. An example is a call of the model as the user made it, and its labels from the function
that compared them with the scores.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from bnwatch.chainer.arrays import to_host
from bnwatch.chainer.forward import Stack, read_call, size_of
from bnwatch.chainer.tap import SCORED, is_training
from bnwatch.evidence import Examples, ExperimentNotPossibleError, class_indices

if TYPE_CHECKING:
    from collections.abc import Sequence
    from types import FrameType

    from bnwatch.chainer.forward import ForwardCall

ENOUGH = 2000
"""Examples a split that are worth keeping."""

COMPOSED = 32
"""Training batches that are worth keeping whatever they hold: how they are composed shows in their number."""

_BATCHES = 64
_BYTES = 128 * 2**20


@dataclass(slots=True)
class _Pass:
    """One forward pass on its way."""

    frame: FrameType
    call: ForwardCall | None
    training: bool
    layers: list[int] = field(default_factory=list)
    labels: dict[type, Any] = field(default_factory=dict)

    def finish(self, origin: str) -> Examples | str:
        """Return what it was called with, or why that is of no use."""
        if self.call is None:
            return "the forward method assigns to its arguments before it computes: pass probe=(inputs, labels)"
        labels = next((self.labels[kind] for kind in SCORED if kind in self.labels), None)
        if labels is None:
            return (
                "no labels were seen: no F.softmax_cross_entropy, F.sigmoid_cross_entropy or F.accuracy was computed; "
                "pass probe=(inputs, labels)"
            )
        try:
            return Examples(self.call, class_indices(labels), origin)
        except ExperimentNotPossibleError as error:
            return str(error)


class KeptExamples:
    """Keeps whole batches, bounded in number and in bytes; while none are wanted it costs nothing.

    Attributes:
        wanted: another batch would be kept.
        reason: why there are none.
    """

    def __init__(self, least: int = 1) -> None:
        """Begin to keep ``least`` batches, if there is room for them, and as many more as make up `ENOUGH` examples."""
        self._batches: deque[Examples] = deque()
        self._least, self._renewed = least, 0
        self.wanted = False
        self.reason = ""

    def renew(self) -> None:
        """Take in as many examples again, each batch in place of the oldest."""
        self.wanted, self._renewed = True, 0

    def add(self, batch: Examples | str) -> None:
        """Keep a batch, or the reason why there is none."""
        if isinstance(batch, str):
            self.reason = batch
            return
        self._batches.append(batch)
        self._renewed += 1
        while len(self._batches) > 1 and self._too_much():
            self._batches.popleft()
        self.wanted = self._renewed <= len(self._batches) and not self._enough(len(self._batches) - self._renewed)

    def settle(self, last: int, examples: int) -> None:
        """Keep the ``last`` batches that were added, of these as many as hold ``examples``, and take in no more."""
        while len(self._batches) > last:
            self._batches.popleft()
        while examples and sum(len(batch.labels) for batch in list(self._batches)[1:]) >= examples:
            self._batches.popleft()
        self.wanted = False

    def _too_much(self) -> bool:
        return self._enough(1) or sum(size_of(batch.inputs) for batch in self._batches) > _BYTES

    def _enough(self, first: int) -> bool:
        """Return whether the batches from the ``first`` on are all that is worth keeping."""
        batches = list(self._batches)[first:]
        examples = sum(len(batch.labels) for batch in batches)
        return len(batches) >= _BATCHES or (len(batches) >= self._least and examples >= ENOUGH)

    def newest(self, limit: int) -> Sequence[Examples]:
        """Return whole batches of at most ``limit`` examples, one at least, in the order they came; none if none."""
        chosen: list[Examples] = []
        for batch in reversed(self._batches):
            if chosen and sum(len(b.labels) for b in chosen) + len(batch.labels) > limit:
                break
            chosen.append(batch)
        return chosen[::-1]


class ForwardPasses:
    """Follows the forward passes of the watched models, where examples are wanted.

    Attributes:
        training: batches of sampled steps.
        evaluation: batches of evaluations.
        sampled: the statistics of this step are wanted.
        eager: look for evaluation passes at every function. Else they are found at their first batch normalization,
            which costs nothing in between, and too late only for a method that assigned to its arguments by then.
    """

    def __init__(self, models: Sequence[Any], *, eager: bool) -> None:
        self.eager = eager
        self.training, self.evaluation = KeptExamples(COMPOSED), KeptExamples()
        self.sampled = False
        self._stack = Stack(list(models))
        self._current: _Pass | None = None
        self._done: list[_Pass] = []
        self._inferred = 0

    @property
    def wanted(self) -> bool:
        """Return whether functions are to be shown to `function`."""
        return (self.sampled and self.training.wanted) or (self.eager and self.evaluation.wanted)

    def function(self, _node: Any, _inputs: tuple[Any, ...]) -> None:
        """See a function before it runs: perhaps the first of a pass."""
        if self.sampled and self.training.wanted and is_training():
            self._open(training=True)
        elif self.eager:
            self.evaluating()

    def evaluating(self) -> None:
        """See a function of an evaluation: perhaps the first of a pass."""
        if self.evaluation.wanted and not is_training():
            self._open(training=False)

    def _open(self, *, training: bool) -> None:
        frame = self._stack.outermost()
        if frame is None or (self._current is not None and frame is self._current.frame):
            return
        self._close()
        call = read_call(frame)
        self._current = _Pass(frame, call and call.keep(), training)

    def normalized(self, layer: int) -> None:
        """See a batch normalization with batch statistics."""
        if self._current is not None and self._current.training == is_training():
            self._current.layers.append(layer)

    def scored(self, kind: type, _scores: Any, labels: Any) -> None:
        """See labels: the first after a pass, and in its mode, are those of the pass."""
        if self._current is not None and self._current.training == is_training() and kind not in self._current.labels:
            self._current.labels[kind] = to_host([labels])[0]

    def end_step(self, layers: Sequence[int]) -> None:
        """End a training step that normalized in these layers."""
        self._close()
        if self._inferred:
            self._inferred = 0
            self.evaluation.renew()  # a step that runs in inference mode is not an evaluation
        passes = [p for p in self._done if p.training]
        self._done = []
        if passes:
            whole = [p for p in passes if p.layers == list(layers)]
            self.training.add(whole[0].finish("training") if whole else _PIECEMEAL)

    def end_evaluation(self, examples: int = 0) -> None:
        """End an evaluation of so many examples; only of a hand-written loop, where nobody else has them.

        Those of one evaluation are enough: the next one has the same, and an example must not count twice.
        """
        self._close()
        self._done = []
        if self._inferred:
            self.evaluation.settle(self._inferred, examples)
            self._inferred = 0

    def _close(self) -> None:
        done, self._current = self._current, None
        if done is None:
            return
        if done.training:
            self._done.append(done)
        else:
            self.eager |= done.call is None
            found = done.finish("evaluation")
            self._inferred += isinstance(found, Examples)
            self.evaluation.add(found)


_PIECEMEAL = (
    "the forward pass of a training step is not one call of the model or of one of its links: "
    "pass probe=(inputs, labels)"
)
