"""What ranks send each other, over an MPI that is made of queues: no rank waits for good, nothing piles up."""

from __future__ import annotations

from collections import defaultdict, deque
from types import SimpleNamespace

import numpy as np
import pytest

from bnwatch import testing
from bnwatch.chainer import ranks
from bnwatch.chainer.ranks import UNTAKEN, Ranks
from bnwatch.watch import Watch


class Queue:
    """A message on its way, as MPI sends it synchronously: done when it is taken."""

    def __init__(self, message):
        self.message, self.taken = message, False

    def test(self):
        return self.taken, None


class Network:
    """Carries messages between communicators of this process."""

    def __init__(self, size):
        self.queues, self.size = defaultdict(deque), size

    def communicator(self, rank):
        def issend(message, dest, tag):
            assert dest == 0
            self.queues[rank, tag].append(Queue(message))
            return self.queues[rank, tag][-1]

        def recv(source, tag):
            queue = self.queues[source, tag].popleft()
            queue.taken = True
            return queue.message

        mpi = SimpleNamespace(issend=issend, recv=recv, iprobe=lambda source, tag: bool(self.queues[source, tag]))
        return SimpleNamespace(rank=rank, size=self.size, mpi_comm=mpi)


@pytest.fixture
def network(monkeypatch):
    monkeypatch.setattr(ranks, "SECONDS", 0.05)

    def make(size=2, every=(2, 2, 2)):
        net, made = Network(size), []
        for rank in range(size):
            monkeypatch.setattr(ranks, "_numbers", iter([0]))  # each rank is a program of its own
            made.append(Ranks(net.communicator(rank), every[rank]))
        return made

    return make


def calls(mean):
    return (testing.call(testing.layer(), mean=mean),)


def running(mean):
    return {"bn": (np.full(4, mean), np.ones(4))}


def test_a_sample_has_the_calls_of_every_rank(network):
    first, *others = network(3)
    for rank, other in enumerate(others, 1):
        own = calls(rank)
        assert other.gather(4, own) is own
    gathered = first.gather(4, calls(0))
    assert [str(call.site) for call in gathered] == ["bn#0", "bn#0@1", "bn#0@2"]
    assert [call.batch.mean[0] for call in gathered] == [0.0, 1.0, 2.0]
    assert first.unseen is None


def test_what_all_hold_at_an_evaluation_is_matched_by_its_step(network):
    first, other = network()
    for step, evaluates in ((4, (first, other)), (6, (first,)), (8, (other,)), (10, (first, other))):
        for one in evaluates:
            one.evaluated(step, running(step + one.rank))
    other.gather(11, calls(1))
    first.gather(11, calls(0))
    held = dict(first.held())
    assert list(held) == [4, 10]
    assert [mean[0] for mean, _ in held[10]["bn"]] == [10.0, 11.0]
    assert list(first.held()) == []


def test_the_end_counts_only_where_nobody_else_evaluated(network):
    for evaluated in (False, True):
        first, other = network()
        if evaluated:
            for one in (first, other):
                one.evaluated(4, running(0))
        other.gather(5, calls(1))
        first.gather(5, calls(0))
        assert [step for step, _ in first.held()] == [4] * evaluated
        other.leave(8, running(1), wait=False)
        first.leave(8, running(0))
        assert [step for step, _ in first.held()] == [8] * (not evaluated)


def test_a_rank_that_sends_nothing_is_waited_for_once(network):
    first, *others = network(3)
    others[1].gather(2, calls(2))
    assert len(first.gather(2, calls(0))) == 2
    assert first.unseen == (
        "statistics of the other ranks are not seen: rank 1 sent nothing for 0.05 seconds: pass comm=comm on every rank"
    )
    others[0].gather(4, calls(1))
    others[1].gather(4, calls(2))
    assert [call.site.replica for call in first.gather(4, calls(0))] == [0, 2]


def test_no_more_is_sent_than_somebody_takes(network):
    first, other = network()
    for step in range(100):
        other.gather(step, calls(1))
    assert len(other._pending) == UNTAKEN
    other.leave(100, None, wait=True)  # waits for nobody
    first.leave(100, None)
    assert other._untaken() == 0


def test_a_watch_that_fails_is_told_once(network):
    first, other = network()
    watch = Watch(None)
    watch.silence()
    other.retire(watch)
    assert not other._pending
    with watch.guard("testing"):
        raise RuntimeError("injected")  # noqa: EM101
    other.retire(watch)
    other.retire(watch)
    assert len(other._pending) == 1
    assert len(first.gather(2, calls(0))) == 1
    assert "the watch on rank 1 ended: RuntimeError while testing" in first.unseen


def test_another_interval_is_told(network):
    first, other = network(every=(2, 3))
    other.gather(1, calls(1))
    first.gather(1, calls(0))
    assert first.unseen.endswith("every is 3 on rank 1 and 2 on rank 0")


def test_a_training_that_was_cut_off_waits_for_nobody(network, monkeypatch):
    monkeypatch.setattr(ranks, "SECONDS", 1e9)
    first, other = network()
    first.leave(3, running(0), wait=False)
    other.leave(3, running(1), wait=False)
    assert list(first.held()) == []


def test_a_communicator_that_was_not_given_is_noticed():
    owner = SimpleNamespace(communicator=Network(2).communicator(1))
    one = Ranks()
    one.notice([SimpleNamespace(), owner])
    assert (one.rank, one.exchanging) == (1, False)
    assert one.unseen == "statistics of the other ranks are not seen: pass comm=comm on every rank"
    alone = Ranks()
    alone.notice([SimpleNamespace(comm=Network(1).communicator(0)), SimpleNamespace(comm="no communicator")])
    assert (alone.rank, alone.unseen) == (0, None)
