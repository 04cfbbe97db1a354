"""Small Keras models, data and comparisons that the Keras tests share."""

from __future__ import annotations

from dataclasses import dataclass, field

import keras
import numpy as np

from bnwatch.keras import BatchNormWatch

layers = keras.layers
CLASSES = 4


def data(examples=320, *, seed=0, shape=(8, 8, 3)):
    rng = np.random.default_rng(seed)
    x = rng.normal(1.0, 2.0, size=(examples, *shape)).astype("float32")
    y = (x.reshape(examples, -1)[:, :2] > 1.0) @ np.array([2, 1])
    return x, y


def convolutional(*, dropout=0.2, momentum=0.9):
    """Return a net with a batch norm of its own and one that is used twice, in places of other size."""
    inputs = keras.Input((8, 8, 3), name="image")
    shared = layers.BatchNormalization(momentum=momentum, name="shared")
    x = layers.Conv2D(6, 3, padding="same", name="conv_1")(inputs)
    x = layers.BatchNormalization(momentum=momentum, name="own")(x)
    x = layers.ReLU(name="relu_1")(x)
    x = shared(x)
    x = layers.Dropout(dropout, name="dropout")(x)
    x = layers.Conv2D(6, 3, name="conv_2")(x)
    x = shared(x)
    x = layers.GlobalAveragePooling2D(name="pool")(x)
    return keras.Model(inputs, layers.Dense(CLASSES, name="scores")(x))


def compiled(model, **arguments):
    model.compile(
        optimizer=keras.optimizers.Adam(0.01),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
        **arguments,
    )
    return model


def make(build=convolutional, *, seed=1, **arguments):
    keras.utils.set_random_seed(seed)
    return compiled(build(), **arguments)


def quiet_watch(log_dir=None, **arguments):
    """Return a watch that warns nobody: pytest turns warnings into errors."""
    return BatchNormWatch(log_dir, **{"on_diagnosis": "log", **arguments})


def state(model):
    """Return every number that training could have moved."""
    variables = [*model.variables, *model.optimizer.variables]
    return [v.numpy().tobytes() for v in variables]


def attributes(model):
    """Return what hangs on a model and its layers: names, and which object it is."""
    found = {}
    for layer in model._flatten_layers():
        skip = {"_losses", "_loss_ids", "built", "history"}
        found[layer.name] = {name: id(value) for name, value in layer.__dict__.items() if name not in skip}
    return found


@dataclass
class FakeWatch:
    """Stands for `bnwatch.Watch` where a test needs to see what arrives and nothing more."""

    every: int = 1
    probe: object = None
    experiments: bool = True
    enabled: bool = True
    wants_look: bool = False
    opened: list = field(default_factory=list)
    snapshots: list = field(default_factory=list)
    evaluations: list = field(default_factory=list)
    labs: list = field(default_factory=list)
    faults: list = field(default_factory=list)
    structure: object = None
    closed: int = 0
    on_experiment: object = None

    def open(self, attachment):
        self.opened.append(attachment)

    def structured(self, structure):
        self.structure = structure

    def due(self, step):
        return self.enabled and step % self.every == 0

    def observe(self, snapshot):
        self.snapshots.append(snapshot)

    def evaluated(self, record):
        self.evaluations.append(record)

    def look(self, lab, *, step, epoch):
        self.labs.append(lab)

    def experiment(self, lab, *, step, epoch, seconds, final=False):
        self.labs.append(lab)
        if self.on_experiment:
            self.on_experiment(lab, final)

    def guard(self, doing):
        return _Guard(self, doing)

    def close(self):
        self.closed += 1


class _Guard:
    def __init__(self, watch, doing):
        self.watch, self.doing = watch, doing

    def __enter__(self):
        return self

    def __exit__(self, kind, error, tb):
        if kind is not None and issubclass(kind, Exception):
            self.watch.faults.append((self.doing, error, tb))
            self.watch.enabled = False
            return True
        return False


def faked(**arguments):
    """Return a callback and the fake watch inside it."""
    callback = quiet_watch()
    callback.watch = FakeWatch(**arguments)
    return callback, callback.watch
