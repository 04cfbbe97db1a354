"""`watch`: for training loops written by hand."""

from __future__ import annotations

import time
import warnings
from typing import TYPE_CHECKING, Any

from bnwatch.diagnosis import BatchNormWarning
from bnwatch.evidence import PROBE_BATCH, seconds_after
from bnwatch.keras.backends import backend_of
from bnwatch.keras.changes import Changes
from bnwatch.keras.experiments import Given, probes
from bnwatch.keras.keep import Kept, array_of
from bnwatch.keras.laboratory import KerasLaboratory
from bnwatch.keras.session import DISPLACED, FINAL_SECONDS, attachment, located
from bnwatch.keras.structure import structure
from bnwatch.keras.tap import Tap, heal
from bnwatch.records import EvaluationRecord, StepSnapshot, Structure
from bnwatch.watch import Verdict, Watch

if TYPE_CHECKING:
    from collections.abc import Mapping
    from os import PathLike
    from types import TracebackType

    from bnwatch.evidence import Split
    from bnwatch.keras.laboratory import Shelf
    from bnwatch.records import Attachment


class LoopWatch(Verdict):
    """Watches a training loop written by hand; made by `watch`."""

    def __init__(self, model: Any, watch: Watch) -> None:
        """Prepare; nothing is touched before the context is entered."""
        self.watch = watch
        self._backend = backend_of(model)
        self._tap: Tap | None = None
        self._changes: Changes | None = None
        self._normalized: set[str] = set()
        self._structure: Structure | None = None
        self._attachment: Attachment | None = None
        self._opened = self._told = False
        self._step, self._epoch = 0, 0
        self._began = self._epoch_began = time.perf_counter()
        self._accuracy = _Mean()
        self._kept = Kept()
        self._shelves: dict[Split, Shelf] = {"training": self._kept}
        if watch.probe is not None:
            self._shelves = probes(watch.probe)
        self._lab = KerasLaboratory(self._backend, self._shelves)

    def __enter__(self) -> LoopWatch:  # noqa: PYI034 - Self needs Python 3.11
        """Attach to the model."""
        with self.watch.guard("attaching to the model"):
            heal(self._backend)
            if not self._backend.speaks:
                self.watch.silence()
            # before the tap, which here records whoever calls the model
            self._structure = structure(self._backend.model)
            tap = Tap(self._backend, self.watch.guard, lanes=True)
            tap.attach()
            self._tap, self._changes = tap, Changes(tap)
            self._open_if_built()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        """Look once more unless the loop raised, detach and conclude."""
        try:
            if kind is None and self._attached() is not None:
                with self.watch.guard("looking once more"):
                    self._open_if_built()
                    seconds = seconds_after(time.perf_counter() - self._began, FINAL_SECONDS)
                    self._experiment(seconds, final=True)
        finally:
            tap, self._tap = self._tap, None
            with self.watch.guard("detaching from the model"):
                self._backend.hold(None)
                if tap is not None:
                    tap.unhook()
                self._lab.release()
            self.watch.close()

    def step(
        self,
        *,
        accuracy: Any = None,
        loss: Any = None,
        examples: int = 1,
        batch: tuple[Any, Any] | None = None,
        state: Any = None,
    ) -> None:
        """End a training step: every training-mode call of the model since the last one belongs to it.

        Numbers may be tensors; they are read at sampled steps only.

        Args:
            accuracy: accuracy of the step's batch, in [0, 1].
            loss: loss of the step's batch.
            examples: examples behind them.
            batch: the step's ``(x, y)``; a few are kept for the experiments.
            state: where the loop is pure (on JAX), what it keeps outside of the model after the step: a tuple of lists,
                the values of ``model.trainable_variables``, those of ``model.non_trainable_variables``, and whatever
                else.
        """
        tap = self._attached()
        if tap is None:
            return
        with self.watch.guard("ending a step"):
            self._step += 1
            self._backend.hold(state)
            self._accuracy.add(accuracy, examples)
            if self.watch.due(self._step):
                self._sample(tap, loss, batch)
            tap.next_step()
            if self.watch.due(self._step + 1):
                tap.mark()

    def evaluation(
        self, *, accuracy: Any = None, loss: Any = None, examples: int = 0, classes: int = 0, data: Any = None
    ) -> None:
        """Record an evaluation; the mean training accuracy since the last one goes with it.

        Args:
            accuracy: evaluation accuracy, in [0, 1].
            loss: evaluation loss.
            examples: evaluation examples.
            classes: number of classes.
            data: evaluation data for the experiments: ``(x, y)``, or an iterable of such batches that can be repeated.
        """
        tap = self._attached()
        if tap is None:
            return
        with self.watch.guard("recording an evaluation"):
            # what the evaluation called belongs to no step
            tap.evaluation_ends()
            if self.watch.due(self._step + 1):
                tap.mark()
            self._open_if_built()
            if data is not None and self.watch.probe is None:
                self._shelves["evaluation"] = Given(data, "evaluation", PROBE_BATCH)
            train, seen = self._accuracy.take()
            self.watch.evaluated(
                EvaluationRecord(
                    step=self._step,
                    epoch=self._epoch,
                    accuracy=_float(accuracy),
                    loss=_float(loss),
                    examples=examples,
                    train_accuracy=train,
                    train_examples=seen,
                    classes=classes,
                    batch_statistics=tuple(tap.evaluated),
                    still=() if self._changes is None else self._changes.still(self._normalized),
                )
            )
            self._experiment(seconds_after(time.perf_counter() - self._epoch_began), final=False)
            self._epoch, self._epoch_began = self._epoch + 1, time.perf_counter()

    def _attached(self) -> Tap | None:
        """Return the tap, None where nothing is watched any more."""
        if self._tap is None or not self.watch.enabled:
            return None
        if not self._tap.attached:
            self.watch.refuse(DISPLACED)
            return None
        return self._tap

    def _sample(self, tap: Tap, loss: Any, batch: tuple[Any, Any] | None) -> None:
        self._open_if_built()
        if self._changes is not None:
            self._changes.made()
        calls = tap.records()
        if (renewed := located(self._attachment, tap)) is not None:
            self._attachment = renewed
            self.watch.open(renewed)
        idle = tap.idle(calls)
        self._normalized.update(call.site.layer for call in calls)
        if not calls and not idle and tap.layers and self._step == 1:
            _say(
                "bnwatch saw no training-mode call of a batch-normalization layer in the first step: "
                f"{self._backend.unseen}"
            )
        if tap.storage.outgrown and not self._told:
            self._told = True
            _say(
                "a layer is called more often in a step of this loop than there are places for its statistics: bnwatch "
                "does not see its later calls"
            )
        if batch is not None:
            self._kept.add(tuple(batch))
        mean, seen = self._accuracy.now()
        self.watch.observe(StepSnapshot(self._step, self._epoch, calls, mean, _float(loss), seen, idle))
        if self.watch.wants_look:
            self.watch.look(self._lab, step=self._step, epoch=self._epoch)

    def _experiment(self, seconds: float, *, final: bool) -> None:
        self.watch.experiment(self._lab, step=self._step, epoch=self._epoch, seconds=seconds, final=final)

    def _open_if_built(self) -> None:
        if self._tap is not None and self._changes is not None and self._tap.built and not self._opened:
            self._opened = True
            self._changes.begin()
            self._attachment = attachment(self._tap)
            self.watch.open(self._attachment)
            if self._structure is not None:
                self.watch.structured(self._structure)


def watch(
    model: Any,
    log_dir: str | PathLike[str] | None,
    *,
    every: int = 50,
    probe: tuple[Any, Any] | None = None,
    allow: Mapping[str, str] | None = None,
    on_diagnosis: Any = "warn",
    experiments: Any = "auto",
) -> LoopWatch:
    """Watch a training loop written by hand, compiled or not.

    Enter it before the training function is called for the first time: a function that is compiled is not looked at
    again. Call ``step`` at the end of each training step, and ``evaluation`` after each evaluation::

        with bnwatch.keras.watch(model, "runs/a") as watch:
            for x, y in batches:
                loss, accuracy = train_step(x, y)
                watch.step(accuracy=accuracy, loss=loss, examples=len(x), batch=(x, y))
            watch.evaluation(accuracy=evaluate(), examples=10000)

    A pure loop on JAX keeps the variables of the model itself. The statistics travel in
    ``model.non_trainable_variables``, so enter the watch, with a built model, before the variables are collected, and
    give ``step`` the state that comes out::

        with bnwatch.keras.watch(model, "runs/a") as watch:
            trainable = [v.value for v in model.trainable_variables]
            non_trainable = [v.value for v in model.non_trainable_variables]
            state = trainable, non_trainable, [v.value for v in optimizer.variables]
            for x, y in batches:
                loss, state = train_step(state, x, y)
                watch.step(loss=loss, examples=len(x), batch=(x, y), state=state)

    A call site is the k-th training-mode call of a layer within one step. Calls in different functions, or in the same
    function called with another signature, are told apart; a compiled function that is called twice within one step
    shows its last call only.

    Args:
        model: the Keras model; built, or built by the first step.
        log_dir: directory for TensorBoard event files; None writes none.
        every: sampling interval in training steps; the first steps are sampled densely.
        probe: ``(x, y)`` for the experiments.
        allow: what is known and accepted: ``{"BN101:encoder/*": "why"}``.
        on_diagnosis: ``"warn"``, ``"raise"``, ``"log"``, or a callable that gets each diagnosis.
        experiments: ``"auto"`` runs those that a diagnosis needs, and once at the end; False runs none.

    Raises:
        ValueError: an argument is not what is accepted; one sentence says which and what is.
    """
    return LoopWatch(
        model,
        Watch(log_dir, every=every, probe=probe, allow=allow, on_diagnosis=on_diagnosis, experiments=experiments),
    )


class _Mean:
    """A mean over examples whose values are read from the device only when it is asked for."""

    def __init__(self) -> None:
        self._pending: list[tuple[Any, int]] = []
        self._sum, self._examples = 0.0, 0

    def add(self, value: Any, examples: int) -> None:
        if value is not None:
            self._pending.append((value, examples))

    def now(self) -> tuple[float | None, int]:
        for value, examples in self._pending:
            self._sum += float(array_of(value)) * examples
            self._examples += examples
        self._pending = []
        return (self._sum / self._examples if self._examples else None), self._examples

    def take(self) -> tuple[float | None, int]:
        result = self.now()
        self._sum, self._examples = 0.0, 0
        return result


def _float(value: Any) -> float | None:
    return None if value is None else float(array_of(value))


def _say(sentence: str) -> None:
    warnings.warn(sentence, BatchNormWarning, stacklevel=4)


__all__ = ["LoopWatch", "watch"]
