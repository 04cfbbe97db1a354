"""`BatchNormWatch`: the Keras callback."""

from __future__ import annotations

import sys
import warnings
from typing import TYPE_CHECKING, Any

from bnwatch.diagnosis import BatchNormWarning
from bnwatch.keras.backends import backend_of
from bnwatch.keras.backends.base import TOGGLED
from bnwatch.keras.library import installed
from bnwatch.keras.session import DISPLACED, Session
from bnwatch.watch import Verdict, Watch

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from os import PathLike

    from bnwatch.keras.tap import Statistics


class BatchNormWatch(Verdict, installed().callbacks.Callback):  # type: ignore[misc]
    """Watches the batch-normalization layers of a model while it trains in ``fit``.

    Give it to ``fit(callbacks=[...])``. It changes nothing: weights, metrics, history and saved files are, to the bit,
    those of a training without it. Afterwards `diagnoses`, `skipped` and `report` say what was found. Given to
    ``evaluate(callbacks=[...])`` it looks at a model that was trained elsewhere, or, the same object, goes on.

    Args:
        log_dir: directory for TensorBoard event files; None writes none.
        every: sampling interval in training steps; the first steps are sampled densely.
        probe: ``(x, y)`` for the experiments, in place of batches kept from the training and the validation.
        allow: what is known and accepted: ``{"BN101:encoder/*": "why"}``.
        on_diagnosis: ``"warn"``, ``"raise"``, ``"log"``, or a callable that gets each diagnosis.
        experiments: ``"auto"`` runs those that a diagnosis needs, and once when training ends; False runs none.

    Raises:
        ValueError: an argument is not what is accepted; one sentence says which and what is.
    """

    async_safe = True
    """Keras may go on while metrics of a batch are still computed: nothing here hooks the end of a batch."""

    def __init__(
        self,
        log_dir: str | PathLike[str] | None,
        *,
        every: int = 50,
        probe: tuple[Any, Any] | None = None,
        allow: Mapping[str, str] | None = None,
        on_diagnosis: Any = "warn",
        experiments: Any = "auto",
    ) -> None:
        super().__init__()
        # what Keras 2 asks for, also where Keras 3 made the class: logs may stay tensors, and every worker trains
        self._supports_tf_logs, self._chief_worker_only = True, False
        self.watch = Watch(
            log_dir, every=every, probe=probe, allow=allow, on_diagnosis=on_diagnosis, experiments=experiments
        )
        self._session: Session | None = None
        self._earlier: Session | None = None
        self._alone = False
        self._steps = 0
        self._known: Statistics = {}

    # What Keras calls.

    def set_model(self, model: Any) -> None:
        """Note the model: Keras 3 on JAX would move its whole state to hand it out."""
        super().set_model(model)
        self._trained = model

    def _implements_train_batch_hooks(self) -> bool:
        """Say so to Keras 2."""
        return True

    def _implements_test_batch_hooks(self) -> bool:
        return True

    def _implements_predict_batch_hooks(self) -> bool:
        return False

    def on_train_begin(self, logs: dict[str, Any] | None = None) -> None:  # noqa: ARG002 - Keras's signature
        """Attach."""
        self._enter(alone=False)

    def _enter(self, *, alone: bool) -> None:
        self._leave()
        self._alone = alone
        if not self.watch.enabled:
            return
        with self.watch.guard("attaching to the model"):
            try:
                backend = backend_of(self._trained)
                reason = backend.why_not()
            except NotImplementedError as error:
                reason = str(error)
            if reason is None or (alone and reason == TOGGLED):
                if not backend.speaks:
                    self.watch.silence()
                earlier, plan = (self._earlier, None) if alone else (None, self.params)
                if earlier is not None and earlier.backend.model is not backend.model:
                    earlier = None
                self._session = Session(
                    backend, self.watch, steps=self._steps, known=self._known, plan=plan, earlier=earlier
                )
            else:
                _say(reason)

    def on_epoch_begin(self, epoch: int, logs: dict[str, Any] | None = None) -> None:  # noqa: ARG002
        """Note where in the run the epoch begins."""
        steps = (self.params or {}).get("steps")
        self._forward("beginning an epoch", lambda session: session.epoch_begin(epoch, steps))

    def on_train_batch_begin(self, batch: int, logs: dict[str, Any] | None = None) -> None:  # noqa: ARG002
        """Take the sample of the step that just finished, if it is due."""
        self._forward("sampling a step", lambda session: session.batch_begin(batch))

    def on_test_begin(self, logs: dict[str, Any] | None = None) -> None:  # noqa: ARG002 - Keras's signature
        """Take the last sample of the epoch before validation resets the metrics; attach where there is no training."""
        if self._session is None or self._alone:
            self._enter(alone=True)
        steps = (self.params or {}).get("steps") if self._alone else None
        self._forward("sampling a step", lambda session: session.test_begin(steps))

    def on_test_batch_begin(self, batch: int, logs: dict[str, Any] | None = None) -> None:  # noqa: ARG002
        """Keep a few validation batches."""
        self._forward("keeping a validation batch", lambda session: session.test_batch_begin(batch))

    def on_test_end(self, logs: dict[str, Any] | None = None) -> None:
        """Take the last validation batch that was kept; where there is no training, detach and conclude."""
        if not self._alone:
            self._forward("keeping a validation batch", lambda session: session.test_end())
            return
        try:
            self._forward("looking at the evaluation", lambda session: session.evaluation_alone(dict(logs or {})))
        finally:
            self._leave()
            self.watch.close()

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """Take the evaluation and run experiments that a diagnosis waits for."""
        self._forward("ending an epoch", lambda session: session.epoch_end(epoch, dict(logs or {})))

    def on_train_end(self, logs: dict[str, Any] | None = None) -> None:  # noqa: ARG002 - Keras's signature
        """Look once more, detach and conclude: when all other callbacks are through, for these may change weights."""
        if not _comes_last(self):
            self.train_ended()

    def train_ended(self) -> None:
        """Look once more, detach and conclude."""
        try:
            self._forward("looking once more", lambda session: session.train_end())
        finally:
            self._leave()
            self.watch.close()

    def _forward(self, doing: str, call: Callable[[Session], None]) -> None:
        session = self._session
        if session is None or not self.watch.enabled:
            return
        if not session.tap.attached:
            self.watch.refuse(DISPLACED)
            return
        with self.watch.guard(doing):
            call(session)

    def _leave(self) -> None:
        session, self._session = self._session, None
        if session is None:
            return
        self._steps, self._earlier = max(self._steps, session.steps), session
        with self.watch.guard("detaching from the model"):
            self._known = session.detach()


class _Last(installed().callbacks.Callback):  # type: ignore[misc]
    """Stands at the end of the callbacks for those that have a predecessor's place, when training ends."""

    def __init__(self, callbacks: list[Any]) -> None:
        super().__init__()
        self._callbacks = callbacks
        self.waiting: list[BatchNormWatch] = []

    def on_train_end(self, logs: dict[str, Any] | None = None) -> None:  # noqa: ARG002 - Keras's signature
        self._callbacks.remove(self)
        for callback in self.waiting:
            callback.train_ended()


def _comes_last(callback: BatchNormWatch) -> bool:
    """Arrange that a callback is called again when all others are through; return whether that was possible.

    Keras runs over a list of which a callback knows nothing; that of the caller can be seen. Somebody else's list may
    be run over in another order, or be a copy.
    """
    caller: Any = sys._getframe(2).f_locals.get("self")  # noqa: SLF001 - see above
    if not any(kind.__name__ == "CallbackList" for kind in type(caller).__mro__):
        return False
    callbacks = caller.callbacks
    if callbacks[-1] is callback:
        return False
    if not isinstance(callbacks[-1], _Last):
        callbacks.append(_Last(callbacks))
    callbacks[-1].waiting.append(callback)
    return True


def _say(reason: str) -> None:
    warnings.warn(reason, BatchNormWarning, stacklevel=3)
