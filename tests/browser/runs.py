"""Records of each kind of run, made from numbers alone: no framework trains here."""

from __future__ import annotations

import numpy as np

import bnwatch
from bnwatch.records import Attachment, EvaluationRecord
from bnwatch.testing import attribution, call, cells, layer, layer_look, look, snapshot

HOSTILE = (
    "<script>window.hacked = 1</script>",
    '\'"><img src=x onerror="window.hacked = 1">',
    "long/" + "x" * 10_000,
    "turned\u202eround\x1b[31m",
    "a|b`c`&lt;#p.bnwatch.layer=z",
)


class Training:
    """A simulated training: running averages over the statistics of random batches, a layer a name."""

    def __init__(self, directory, names, *, decay=0.9, channels=8, framework="keras 3.15.1 (tensorflow)", every=50):
        self.watch = bnwatch.Watch(directory, on_diagnosis=lambda _: None, experiments=False, every=every)
        self.specs = [layer(name, channels, decay=decay) for name in names]
        self.watch.open(Attachment(tuple(self.specs), framework=framework))
        self.random = np.random.default_rng(5)
        self.running = {name: (np.zeros(channels), np.ones(channels)) for name in names}
        self.step = 0

    def train(self, steps, *, sites=None, mean=0.0, std=1.0, accuracy=0.95, epoch=0):
        """Train on; ``sites`` holds the means at the call sites of layers that have several."""
        for _ in range(steps):
            self.step += 1
            calls = []
            for spec in self.specs:
                for index, own in enumerate((sites or {}).get(spec.path, (mean,))):
                    batch = self.random.normal(own, std, (64, spec.channels))
                    m, v = batch.mean(axis=0), batch.var(axis=0)
                    running = self.running[spec.path]
                    self.running[spec.path] = tuple(
                        spec.decay * old + (1 - spec.decay) * new for old, new in zip(running, (m, v), strict=True)
                    )
                    calls.append((spec, m, v, index))
            if not self.watch.due(self.step):
                continue
            made = (
                call(
                    spec, mean=m, var=v, site=index, count=64,
                    running_mean=self.running[spec.path][0], running_var=self.running[spec.path][1], updates=self.step,
                )
                for spec, m, v, index in calls
            )  # fmt: skip
            self.watch.observe(
                snapshot(self.step, *made, epoch=epoch, accuracy=accuracy, loss=1 - accuracy, examples=64 * self.step)
            )

    def evaluate(self, accuracy, train_accuracy, epoch=0):
        self.watch.evaluated(
            EvaluationRecord(
                self.step, epoch, accuracy, 1 - accuracy, 10_000,
                train_accuracy=train_accuracy, train_examples=50_000, classes=10, majority=0.1,
            )
        )  # fmt: skip

    def measured(self, *items):
        """Take the results of experiments, as if they had been run."""
        for item in items:
            self.watch.signals.take(item)
            self.watch._write(item)
        self.watch._judge()


def shared(directory):
    training = Training(directory, ("l1", "encoder/bn", "head/bn"))
    for epoch in range(5):
        accuracy = 0.8 + 0.04 * epoch
        training.train(60, sites={"encoder/bn": (-1.0, 1.2)}, accuracy=accuracy, epoch=epoch)
        training.evaluate(accuracy - 0.17, accuracy, epoch)
    row = {"batch": 0.95, "running": 0.79, "population": 0.81}
    training.measured(
        cells(300, training={**row, "batch": 0.96}, evaluation=row),
        attribution(300, cost=0.16, recovered={"encoder/bn": 0.15, "head/bn": 0.01, "l1": -0.01}),
    )
    training.watch.close()


def cold_start(directory):
    training = Training(directory, [f"block{n}/bn" for n in range(6)], decay=0.99)
    for epoch in range(3):
        training.train(20, mean=3.0, std=0.3, accuracy=0.5 + 0.1 * epoch, epoch=epoch)
        training.evaluate(0.12 + 0.1 * epoch, 0.5 + 0.1 * epoch, epoch)
    row = {"batch": 0.7, "running": 0.32, "population": 0.7}
    training.measured(cells(60, training=row, evaluation=row))
    training.watch.close()


def stuck(directory):
    training = Training(directory, [f"block{n}/bn" for n in range(4)])
    for epoch in range(4):
        training.train(50, accuracy=0.1, epoch=epoch)
        layers = (
            layer_look("flatten", spread=1.0, kind="Flatten"),
            layer_look("dense", zero=1.0, spread=0.0, gradient=0.0),
        )
        training.measured(look(training.step, *layers, epoch=epoch))
        training.evaluate(0.1, 0.1, epoch)
    training.watch.close()


def healthy(directory):
    training = Training(directory, [f"stage{n // 4}/block{n % 4}/bn" for n in range(12)])
    for epoch in range(4):
        accuracy = 0.9 + 0.02 * epoch
        training.train(100, accuracy=accuracy, epoch=epoch)
        training.evaluate(accuracy - 0.003, accuracy, epoch)
    row = {"batch": 0.955, "running": 0.957, "population": 0.957}
    training.measured(cells(400, training=row, evaluation=row))
    training.watch.close()


def hostile(directory):
    training = Training(directory, HOSTILE)
    for _ in range(3):
        training.train(60, sites={HOSTILE[0]: (-1.0, 1.0), HOSTILE[1]: (-1.0, 1.0)})
        training.evaluate(0.7, 0.95)
    training.measured(attribution(180, cost=0.2, recovered={HOSTILE[0]: 0.1, HOSTILE[2]: 0.05}))
    training.watch.close()


def deep(directory, layers=1000):
    training = Training(directory, [f"stage{n // 100}/block_{n:03}/bn" for n in range(layers)], channels=2, every=5)
    training.train(20)
    training.watch.close()


KINDS = {"shared": shared, "cold": cold_start, "stuck": stuck, "healthy": healthy}
