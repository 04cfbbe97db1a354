"""Trainings on several ranks, run by ``test_chainer_mpi.py``: ``mpiexec -n 2 python -m tests.adapters.chainer_ranks``.

Every rank runs every training and writes what it found to ``FOLDER/NAME.RANK.json``, each as it ends, so that one that
hangs is known by what is missing.
"""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path
from unittest import mock

import chainermn
import numpy as np
from chainer.training import extensions
from chainermn.extensions import AllreducePersistent

import bnwatch.chainer
from bnwatch.chainer import ranks
from bnwatch.chainer.layers import Layers
from bnwatch.chainer.session import Session
from bnwatch.watch import Watch

from .chainer_models import CLASSES, FEATURES, F, L, chainer, data, state_of, training

BATCH, EPOCHS = 16, 4
PLAIN = {}
"""How each training ends without the watch."""


class Net(chainer.Chain):
    """A net whose first normalization sees the data as they are; it keeps the batches that it was trained with."""

    def __init__(self):
        super().__init__()
        with self.init_scope():
            self.first = L.BatchNormalization(FEATURES)
            self.l1 = L.Linear(FEATURES, 16, nobias=True)
            self.second = L.BatchNormalization(16)
            self.l2 = L.Linear(16, CLASSES)
        self.batches = []

    def forward(self, x):
        if chainer.config.train:
            self.batches.append(np.array(x))
        return self.l2(F.dropout(F.relu(self.second(self.l1(self.first(x)))), 0.2))


class Communicating(Net):
    """The same with a function of ChainerMN in its forward pass."""

    comm = None

    def forward(self, x):
        h = super().forward(x)
        together = chainermn.functions.allgather(self.comm, h)
        return h + 0.0 * sum(together)


def examples(comm, *, ordered):
    """Return the part of this rank; ordered data are divided so that each rank has its own end of one feature."""
    x, t = data(512)
    if ordered:
        order = np.argsort(x[:, 0])
        x, t = x[order], t[order]
    both = chainer.datasets.TupleDataset(x, t) if comm.rank == 0 else None
    return chainermn.scatter_dataset(both, comm, shuffle=not ordered, seed=0)


def build(comm, *, net=Net, synchronized=False):
    np.random.seed(5)  # noqa: NPY002
    model = net()
    if synchronized:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = chainermn.links.create_mnbn_model(model, comm)
    classifier = L.Classifier(model)
    optimizer = chainermn.create_multi_node_optimizer(chainer.optimizers.Adam(), comm).setup(classifier)
    np.random.seed(7 + comm.rank)  # noqa: NPY002
    return classifier, optimizer


def by_trainer(comm, watch, *, ordered=False, averaged=False, evaluated=True, **building):
    classifier, optimizer = build(comm, **building)
    part = examples(comm, ordered=ordered)
    updater = training.StandardUpdater(chainer.iterators.SerialIterator(part, BATCH), optimizer)
    trainer = training.Trainer(updater, (EPOCHS, "epoch"), out=sys.argv[1])
    if evaluated:
        iterator = chainer.iterators.SerialIterator(part, 64, repeat=False, shuffle=False)
        evaluator = extensions.Evaluator(iterator, classifier)
        trainer.extend(chainermn.create_multi_node_evaluator(evaluator, comm))
    if averaged:
        trainer.extend(AllreducePersistent(classifier, comm))
    if watch is not None:
        trainer.extend(watch)
    trainer.run()
    return classifier, state_of(classifier, optimizer.actual_optimizer)


def by_hand(comm, watch, *, ordered=False, optimizer_given=False):
    classifier, optimizer = build(comm)
    part = examples(comm, ordered=ordered)
    iterator = chainer.iterators.SerialIterator(part, BATCH)
    watching = watch and watch(classifier, optimizer if optimizer_given else None)

    def epochs():
        while iterator.epoch < EPOCHS:
            x, t = chainer.dataset.concat_examples(iterator.next())
            optimizer.update(classifier, x, t)
            if watching and not optimizer_given:
                watching.step(accuracy=classifier.accuracy, loss=classifier.loss)
            if iterator.is_new_epoch:
                x, t = chainer.dataset.concat_examples(part)
                with chainer.using_config("train", False), chainer.no_backprop_mode():
                    classifier(x, t)
                if watching:
                    watching.evaluation(accuracy=classifier.accuracy, examples=len(x))

    if watching:
        with watching:
            epochs()
        watch.last = watching
    else:
        epochs()
    return classifier, state_of(classifier, optimizer.actual_optimizer)


class Recorded:
    """What a watch of the block observed and compared; what was told and written."""

    def __enter__(self):
        self.steps, self._observe = [], Watch.observe
        Watch.observe = lambda watch, snapshot: (self.steps.append(snapshot), self._observe(watch, snapshot))[1]
        return self

    def __exit__(self, *_):
        Watch.observe = self._observe


def against_numpy(comm, steps, batches, *, decay=0.9, synchronized=False, averaged=False, behind=0):
    """Return the largest relative errors of batch and running statistics of the first layer, over all ranks."""
    mine = [np.asarray(batch, np.float64) for batch in batches]
    parts = comm.gather_obj(mine)
    if comm.rank:
        return None
    worst, sites, counts = 0.0, set(), set()
    held = [(np.zeros(FEATURES), np.ones(FEATURES))] * len(parts)
    epoch = 512 // len(parts) // BATCH
    history = []
    for number in range(len(mine)):
        for rank in range(len(parts)):
            batch = np.concatenate([p[number] for p in parts]) if synchronized else parts[rank][number]
            size = len(parts[rank][number])
            mean, var = held[rank]
            held[rank] = (
                decay * mean + (1 - decay) * batch.mean(0),
                decay * var + (1 - decay) * batch.var(0) * size / (size - 1),
            )
            history.append((batch.mean(0), batch.var(0), *held[rank], len(batch)))
        if averaged and number % epoch == epoch - 1:
            held = [tuple(np.mean(held, axis=0))] * len(parts)
            history[-len(parts) :] = [(*one[:2], *held[0], one[4]) for one in history[-len(parts) :]]
    for snapshot in steps:
        for call in snapshot.calls:
            if call.site.layer.endswith("first"):
                sites.add(str(call.site))
                expected = history[(snapshot.step - 1 + behind) * len(parts) + call.site.replica]
                found = call.batch.mean, call.batch.var, call.running.mean, call.running.var
                errors = (np.abs(f - e).max() / np.abs(e).max() for f, e in zip(found, expected, strict=False))
                worst = max(worst, *errors)
                counts.add(call.batch.count == expected[-1])
    return {"error": float(worst), "sites": sorted(sites), "counts": sorted(counts), "samples": len(steps)}


def broken(*_, **__):
    msg = "injected"
    raise RuntimeError(msg)


def watched(comm, name, train=by_trainer, *, given=True, fault=None, every=3, patience=None, experiments=False, **how):
    """Train without and with the watch, and return what can be told of it."""
    key = (train, *sorted(how.items()))
    if key not in PLAIN:
        _, PLAIN[key] = train(comm, None, **how)
    plain = PLAIN[key]
    directory = Path(sys.argv[1]) / name
    told = []
    options = {
        "every": every,
        "on_diagnosis": told.append,
        "experiments": experiments,
        **({"comm": comm} if given else {}),
    }

    def loop(model, optimizer):
        return bnwatch.chainer.watch(model, directory, optimizer=optimizer, **options)

    watch = bnwatch.chainer.BatchNormWatch(directory, **options) if train is by_trainer else loop
    patches = [mock.patch.object(*fault)] if fault else []
    patches += [mock.patch.object(ranks, "SECONDS", patience)] if patience else []
    with Recorded() as record:
        for patch in patches:
            patch.start()
        model, state = train(comm, watch, **how)
        for patch in patches:
            patch.stop()
    verdict = watch if train is by_trainer else watch.last
    signals = verdict.watch.signals
    comm.mpi_comm.barrier()
    return {
        "same": plain == state,
        "silent": verdict.watch.log_dir is None,
        "files": len(list(directory.rglob("*.bnwatch"))),
        "told": [d.rule for d in told],
        "diagnoses": {d.rule: d.state for d in verdict.diagnoses},
        "severities": {d.rule: str(d.severity) for d in verdict.diagnoses},
        "skipped": {s.rule: s.reason for s in verdict.skipped},
        "faults": signals.faults,
        "replicas": [table.layer for table in signals.replicas.layers] if signals.replicas else None,
        "cells": signals.cells is not None and sorted(signals.cells.training),
        "evaluations": [e.examples for e in signals.evaluations],
        "looks": len(signals.looks),
        "left": len(chainer.get_function_hooks()),
        "numpy": against_numpy(
            comm,
            record.steps,
            model.predictor.batches,
            synchronized=how.get("synchronized", False),
            averaged=how.get("averaged", False),
            behind=int(how.get("optimizer_given", False)),  # the first update of a multi-node optimizer is none
        ),
    }  # fmt: skip


def trainings(comm):
    """Yield each training by its name."""
    first = comm.rank == 0
    yield "shuffled", {}
    yield "ordered", {"ordered": True, "experiments": True}
    yield "averaged", {"ordered": True, "averaged": True}
    yield "synchronized", {"ordered": True, "synchronized": True, "experiments": True}
    yield "not_evaluated", {"ordered": True, "evaluated": False}
    yield "by_hand", {"train": by_hand, "ordered": True}
    yield "by_hand_with_optimizer", {"train": by_hand, "optimizer_given": True}
    yield "no_communicator", {"ordered": True, "given": False}
    yield "communicating", {"net": Communicating, "experiments": True}
    for rank in (0, 1):
        for seam, fault in (
            ("start", (Layers, "__post_init__", broken)),
            ("step", (Session, "_records", broken)),
            ("evaluation", (Session, "end_evaluation", broken)),
            ("comparison", (Session, "_compare", broken)),
        ):
            yield f"{seam}_fails_on_{rank}", {"fault": fault if comm.rank == rank else None}
    yield "by_hand_fails_on_1", {"train": by_hand, "fault": None if first else (Session, "_records", broken)}
    yield "given_to_0", {"given": first, "patience": 2.0}
    yield "given_to_1", {"given": not first, "patience": 2.0}
    yield "end_is_lost", {"patience": 2.0, "fault": None if first else (ranks.Ranks, "leave", broken)}
    yield "every_differs", {"every": 3 if first else 4}


def raising(comm):
    """Train with a program that raises on one rank, in the middle: how that ends is for ChainerMN to say."""

    class Raising(Net):
        def forward(self, x):
            if comm.rank == 1 and len(self.batches) == 20:
                broken()
            return super().forward(x)

    by_trainer(comm, bnwatch.chainer.BatchNormWatch(None, every=2, comm=comm), net=Raising)


def main():
    comm = chainermn.create_communicator("naive")
    Communicating.comm = comm
    wanted = sys.argv[2:]
    if wanted == ["raising"]:
        raising(comm)
    for name, how in trainings(comm):
        if not wanted or name in wanted:
            found = watched(comm, name, **how)
            Path(sys.argv[1], f"{name}.{comm.rank}.json").write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    main()
