"""Watch a hand-written training loop."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

import chainer

from bnwatch.chainer.changes import After
from bnwatch.chainer.ranks import Ranks
from bnwatch.chainer.session import Session
from bnwatch.watch import Verdict, Watch

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Hashable
    from types import TracebackType

    from bnwatch.watch import OnDiagnosis


class _LoopClock:
    """A forward pass that is not to be differentiated belongs to no update.

    The first update of a ChainerMN optimizer only shares the parameters, and ends no step. What tells the passes before
    it from those after it is that every update looks anew at which parameters there are.
    """

    def __init__(self, optimizer: Any, seen: Callable[[], None]) -> None:
        self._optimizer, self._seen = optimizer, seen

    def now(self, *, trained: bool) -> Hashable | None:
        self._seen()
        return id(getattr(self._optimizer, "target_params", None)) if trained else None


class watch(Verdict):  # noqa: N801 - reads as a function: `with bnwatch.chainer.watch(...) as watch`
    """Watch the batch normalization of ``model`` during a hand-written loop.

        with bnwatch.chainer.watch(model, "runs/a") as watch:
            for x, t in batches:
                ...forward, backward, update...
                watch.step(accuracy=accuracy, loss=loss)
            with chainer.using_config("train", False), chainer.no_backprop_mode():
                ...
            watch.evaluation(accuracy=accuracy, examples=10000)

    Which forward passes are training and which are evaluation: a call that was differentiated (or made in `F.forget`)
    is training. Calls with batch statistics that nothing differentiated between the last step and `evaluation` are the
    evaluation's, made in training mode.

    A step is an iteration of the loop. Each training call of a link within it is a call site, be it made for another
    input, for another optimizer or for the next part of an accumulated gradient.

    Args:
        model: the link that is trained, or several by name: ``{"gen": generator, "dis": discriminator}``; the names
            are put before the paths of their links.
        log_dir: directory for TensorBoard event files; None writes none.
        optimizer: with it, a step ends by itself after ``optimizer.update()``, and `step` only adds values. Of several,
            give the one whose update ends the iteration.
        every: sampling interval in training steps; the first steps are sampled densely.
        probe: ``(x, y)``: examples for the experiments where none can be had without asking.
        allow: diagnoses that are known and accepted: ``{"BN101:encoder/*": "why"}``.
        on_diagnosis: ``"warn"``, ``"raise"``, ``"log"`` or a callable.
        experiments: ``"auto"`` or False.
        comm: the communicator of ChainerMN, given on every rank: rank 0 then sees the statistics of all.

    Raises:
        ValueError: an argument is not what is accepted.
    """

    def __init__(
        self,
        model: Any,
        log_dir: str | os.PathLike[str] | None,
        *,
        optimizer: Any = None,
        every: int = 50,
        probe: tuple[Any, Any] | None = None,
        allow: Mapping[str, str] | None = None,
        on_diagnosis: OnDiagnosis = "warn",
        experiments: Literal["auto"] | bool = "auto",
        comm: Any = None,
    ) -> None:
        self._models = _models(model)
        if optimizer is not None and getattr(optimizer, "target", None) is None:
            msg = "optimizer must be set up: call optimizer.setup(model) before"
            raise ValueError(msg)
        self.watch = Watch(
            log_dir, every=every, probe=probe, allow=allow, on_diagnosis=on_diagnosis, experiments=experiments
        )
        self._ranks = Ranks(comm, every)
        links = [link for one in self._models.values() for link in one.links()]
        self._ranks.notice([*([] if optimizer is None else [optimizer]), *links])
        if self._ranks.rank:
            self.watch.silence()
        self._optimizer, self._after = optimizer, After(self._updated)
        self._session: Session | None = None

    def __enter__(self) -> watch:  # noqa: PYI034 - typing.Self needs Python 3.11
        """Begin to watch."""
        with self.watch.guard("starting"):
            clock = _LoopClock(self._optimizer, self._listen)
            self._session = session = Session(self.watch, self._models, clock, ranks=self._ranks)
            session.differentiates = True
            session.start()
            self._listen()
        self._ranks.retire(self.watch)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        """Conclude: the last experiment unless the loop was cut off, and the summary."""
        session, self._session = self._session, None
        try:
            with self.watch.guard("ending the training"):
                self._after.leave(self._optimizer)
            with self.watch.guard("ending the training"):
                if session is not None:
                    session.finish(complete=error is None and self.watch.enabled)
            with self.watch.guard("leaving the other ranks"):
                self._ranks.leave(0, None, wait=error is None)
        finally:
            self.watch.close()

    def step(self, *, accuracy: Any = None, loss: Any = None) -> None:
        """End a training step, after the update; with an ``optimizer``, add the values of the step that has ended.

        Accuracy and loss are numbers, arrays or Variables; on a device they are read on sampled steps only.
        """
        session = self._active()
        if session is None:
            return
        with self.watch.guard("ending a step"):
            session.accuracy.add(accuracy)
            session.loss.add(loss)
            if self._optimizer is None:
                self._end_step(session)
        self._ranks.retire(self.watch)

    def evaluation(self, *, accuracy: Any = None, loss: Any = None, examples: int = 0) -> None:
        """Record an evaluation, after its last forward pass; the epoch ends with it."""
        session = self._active()
        if session is None:
            return
        with self.watch.guard("recording an evaluation"):
            evaluating = session.tap.evaluating
            calls = [call for call, differentiated in session.tap.take() if not differentiated]
            session.end_evaluation(calls, evaluating, accuracy=accuracy, loss=loss, examples=examples)
            session.epoch += 1
        self._ranks.retire(self.watch)

    def _active(self) -> Session | None:
        if self._session is None and self.watch.enabled:
            msg = "use it as `with bnwatch.chainer.watch(model, log_dir) as watch:` around the training loop"
            raise RuntimeError(msg)
        if not self.watch.enabled and self._session is not None:
            self._session.tap.leave()
            self._ranks.retire(self.watch)
        return self._session if self.watch.enabled else None

    def _listen(self) -> None:
        """Hear of updates; once more after `optimizer.setup`, which drops every hook."""
        self._after.listen(self._optimizer)

    def _updated(self, optimizer: Any) -> None:
        session = self._session
        if session is None or not self.watch.enabled:
            self._ranks.retire(self.watch)
            return
        with self.watch.guard("ending a step"):
            target = optimizer.target
            session.accuracy.add(getattr(target, "accuracy", None))
            session.loss.add(getattr(target, "loss", None))
            self._end_step(session)
        self._ranks.retire(self.watch)

    @staticmethod
    def _end_step(session: Session) -> None:
        inferred = [layer for layer, _ in session.tap.inferred]
        taken = session.tap.take()
        calls = [call for call, differentiated in taken if differentiated]
        if not calls:
            calls = [call for call, _ in taken if call.when is not None]
        calls = [call for call in calls if call.when == calls[-1].when]
        session.end_step(calls, session.step + 1, session.epoch, inferred)
        session.updated(session.step)


def _models(model: Any) -> dict[str, Any]:
    """Return the models by name, one model without a name.

    Raises:
        ValueError: it is no link, and no links by name.
    """
    if isinstance(model, chainer.Link):
        return {"": model}
    accepted = "model must be a chainer.Link or a dict of them by name, got"
    if not isinstance(model, Mapping) or not model:
        msg = f"{accepted} {'an empty one' if isinstance(model, Mapping) else type(model).__name__}"
        raise ValueError(msg)
    for name, link in model.items():
        if not isinstance(name, str) or not name or not isinstance(link, chainer.Link):
            msg = f"{accepted} {type(link).__name__} by the name {name!r}"
            raise ValueError(msg)
    return dict(model)
