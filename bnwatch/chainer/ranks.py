"""The ranks of a ChainerMN training: the others send what they see to rank 0, and nobody waits for good.

A collective would need every rank at the same place: one whose watch failed, or was given no communicator, would stop
the training of all. So a rank sends from point to point and goes on, and rank 0 receives with a limit of time. On a
step that is not sampled nothing is sent.
"""

from __future__ import annotations

import itertools
import time
from collections import deque
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from bnwatch.evidence import MeanAndVariance
    from bnwatch.records import CallRecord
    from bnwatch.signals import Held
    from bnwatch.watch import Watch

    Running = Mapping[str, MeanAndVariance]

SECONDS = 60.0
"""After which a rank is taken to send nothing more: far above what ranks are apart that share every gradient."""

UNTAKEN = 8
"""Messages on their way from which on rank 0 is taken to receive nothing: bounds memory."""

TAG = 25_198
"""Of the first watch of a program; each has its own, as ranks run the same program."""

_TAGS = 1000
_numbers = itertools.count()


class _Message(NamedTuple):
    """What a rank sends: a sample, what it evaluates with, or that it sends no more, and why."""

    kind: str
    step: int
    every: int
    content: Any


class Ranks:
    """The ranks that train together, of which this is one; without a communicator, this one alone.

    Attributes:
        rank: number of this rank.
        size: how many there are.
        exchanging: this rank has somebody to send to, or to receive from.
        unseen: why the statistics of other ranks are not seen; None where they are, or where there are none.
    """

    def __init__(self, comm: Any = None, every: int = 1) -> None:
        """Take part in an exchange over a communicator.

        Raises:
            ValueError: ``comm`` is no communicator.
        """
        if comm is not None and not all(hasattr(comm, name) for name in ("rank", "size", "mpi_comm")):
            msg = f"comm must be a communicator of chainermn.create_communicator, got {comm!r}"
            raise ValueError(msg)
        self.rank, self.size = (0, 1) if comm is None else (int(comm.rank), int(comm.size))
        self.exchanging = self.size > 1
        self.unseen = "rank 0 compares the ranks" if self.rank else None
        self._every = every
        self._mpi: Any = getattr(comm, "mpi_comm", None)
        self._tag = TAG + next(_numbers) % _TAGS if self.exchanging else 0
        self._present = set(range(1, self.size)) if self.rank == 0 else set()
        self._pending: deque[Any] = deque()
        self._held: dict[int, dict[int, Running]] = {}
        self._ended: set[int] = set()
        self._compared = self._left = False

    def notice(self, owners: Iterable[Any]) -> None:
        """Find out without a communicator whether others train along: a multi-node optimizer or link has one."""
        comm = None if self._mpi is not None else _communicator_of(owners)
        if comm is not None and comm.size > 1:
            self.rank, self.size = int(comm.rank), int(comm.size)
            self.unseen = _unseen("pass comm=comm on every rank")

    def gather(self, step: int, calls: tuple[CallRecord, ...]) -> tuple[CallRecord, ...]:
        """Return the calls of a sampled step: on rank 0 those of all ranks, elsewhere what was given and is sent."""
        if not self.exchanging:
            return calls
        if self.rank:
            self._send("sample", step, calls)
            return calls
        gathered, end = [*calls], time.monotonic() + SECONDS
        for rank in sorted(self._present):
            message = self._receive(rank, "sample", step, end)
            if message is not None:
                gathered += [replace(call, site=replace(call.site, replica=rank)) for call in message.content]
        return tuple(gathered)

    def evaluated(self, step: int, running: Running) -> None:
        """Say what this rank evaluates with after ``step``."""
        if self.rank:
            self._send("held", step, running)
        else:
            self._held.setdefault(step, {})[0] = running

    def held(self) -> Iterator[tuple[int, Held]]:
        """Yield, on rank 0 after it received, the steps after which all ranks evaluated, and what each held."""
        for step in sorted(self._held):
            held = self._held.pop(step)
            if len(held) == self.size:
                self._compared = True
                yield step, {path: [held[rank][path] for rank in range(self.size)] for path in held[0]}

    def leave(self, step: int, running: Running | None, reason: str | None = None, *, wait: bool = True) -> None:
        """End: send what this rank holds at the end, and why if it is early; or receive that from the others.

        A second call only waits until what was sent is received. Without ``wait``, or with a reason, nobody is waited
        for: training was cut off, or goes on.
        """
        if not self.exchanging:
            return
        first, self._left = not self._left, True
        end = time.monotonic() + SECONDS
        if self.rank:
            taken = self._untaken() < UNTAKEN
            if first:
                self._send("end", step, (running, reason))
            while taken and wait and reason is None and self._untaken() and time.monotonic() < end:
                time.sleep(_NAP)
        elif first and wait:
            ends = [(rank, self._receive(rank, "end", step, end)) for rank in set(range(1, self.size)) - self._ended]
            found = {rank: message.content[0] for rank, message in ends if message is not None}
            if not self._compared:  # nobody but this rank evaluated
                self._held[step] = {rank: held for rank, held in {0: running, **found}.items() if held is not None}

    def retire(self, watch: Watch) -> None:
        """Tell rank 0 that the watch on this rank has failed, so that it waits for nothing more."""
        if self.rank and not watch.enabled:
            with watch.guard("leaving the other ranks"):
                self.leave(0, None, next(iter(watch.signals.faults[-1:]), "its training is not watched"))

    def _send(self, kind: str, step: int, content: Any) -> None:
        if self._untaken() < UNTAKEN or kind == "end":
            message = tuple(_Message(kind, step, self._every, content))
            # synchronous: it is done when it was received, so that what piles up at rank 0 is known here
            self._pending.append(self._mpi.issend(message, dest=0, tag=self._tag))

    def _untaken(self) -> int:
        while self._pending and self._pending[0].test()[0]:
            self._pending.popleft()
        return len(self._pending)

    def _receive(self, rank: int, kind: str, step: int, end: float) -> _Message | None:
        """Return the message of that kind and step, and keep what comes before it; None if there is to be none."""
        while not self._mpi.iprobe(source=rank, tag=self._tag):
            if time.monotonic() > end:
                self._ended.add(rank)
                self._lose(rank, f"rank {rank} sent nothing for {SECONDS:g} seconds: pass comm=comm on every rank")
                return None
            time.sleep(_NAP)
        message = _Message(*self._mpi.recv(source=rank, tag=self._tag))
        if message.kind == "end":
            self._ended.add(rank)
            if kind == "end" and message.content[1] is None:
                return message
            self._lose(rank, f"the watch on rank {rank} ended: {message.content[1] or 'it was closed'}")
            return None
        if message.kind == "held":
            self._held.setdefault(message.step, {})[rank] = message.content
        elif kind == "sample" and message.every != self._every:
            self._lose(rank, f"every is {message.every} on rank {rank} and {self._every} on rank 0")
            return None
        elif (message.kind, message.step) == (kind, step):
            return message
        return self._receive(rank, kind, step, end)

    def _lose(self, rank: int, reason: str) -> None:
        self._present.discard(rank)
        self.unseen = self.unseen or _unseen(reason)


_NAP = 2e-4


def _unseen(reason: str) -> str:
    return f"statistics of the other ranks are not seen: {reason}"


def _communicator_of(owners: Iterable[Any]) -> Any:
    for owner in owners:
        for name in ("communicator", "comm"):
            found = vars(owner).get(name)
            if hasattr(found, "mpi_comm"):
                return found
    return None
