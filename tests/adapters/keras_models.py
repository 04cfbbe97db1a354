"""Small Keras models, data and comparisons that the Keras tests share."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from bnwatch.keras import BatchNormWatch
from tests.adapters.library import PyDataset, keras, layers, set_random_seed, to_numpy, variables_of

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
    set_random_seed(seed)
    return compiled(build(), **arguments)


def quiet_watch(log_dir=None, **arguments):
    """Return a watch that warns nobody: pytest turns warnings into errors."""
    return BatchNormWatch(log_dir, **{"on_diagnosis": "log", **arguments})


def state(model):
    """Return every number that training could have moved."""
    return [to_numpy(v).tobytes() for v in variables_of(model)]


def attributes(model):
    """Return what hangs on a model and its layers: names, and which object it is."""
    found = {}
    for layer in model._flatten_layers():
        skip = {"_losses", "_loss_ids", "built", "history"}
        # Keras 3.4 notes on JAX, whenever it trains, where each variable lies
        own = {name: value for name, value in layer.__dict__.items() if not name.endswith("_variable_shardings")}
        found[layer.name] = {name: id(value) for name, value in own.items() if name not in skip}
    return found


def hooks(model):
    """Return the names of what the watch has hung on a model and its layers."""
    return {
        name
        for layer in model._flatten_layers()
        for name, value in layer.__dict__.items()
        for part in (value if isinstance(value, list) else [value])
        if str(getattr(part, "__module__", "")).startswith("bnwatch")
    }


class Batches(PyDataset):
    """Batches by their number, which neither Keras nor the watch could draw from a generator twice."""

    def __init__(self, x, y, size):
        super().__init__()
        self.x, self.y, self.size = x, y, size

    def __len__(self):
        return (len(self.y) + self.size - 1) // self.size

    def __getitem__(self, number):
        rows = slice(self.size * number, self.size * (number + 1))
        if isinstance(self.x, dict):
            return {name: part[rows] for name, part in self.x.items()}, self.y[rows]
        return self.x[rows], self.y[rows]


class ByHand:
    """A forward pass in training, in NumPy and float64: every call of a batch norm leaves its moments in `calls`.

    Args:
        model: the model whose weights, as they are now, the layers below have, by the name of the layer.
    """

    def __init__(self, model):
        self.weights = {
            layer.name: [w.astype("float64") for w in layer.get_weights()] for layer in model._flatten_layers()
        }
        self.calls = []

    def dense(self, name, x):
        kernel, bias = self.weights[name]
        return x @ kernel + bias

    def conv(self, name, x, *, same=False):
        kernel, bias = self.weights[name]
        rows, columns = kernel.shape[:2]
        if same:
            x = np.pad(x, [(0, 0), (rows // 2,) * 2, (columns // 2,) * 2, (0, 0)])
        windows = np.lib.stride_tricks.sliding_window_view(x, (rows, columns), axis=(1, 2))
        return np.einsum("nhwcij,ijco->nhwo", windows, kernel) + bias

    def norm(self, name, x, *, site=None, mask=None, epsilon=1e-3):
        """Normalize over all axes but the last, and note the mean, the biased variance and over how many elements."""
        gamma, beta, *_ = self.weights[name]
        rows = x.reshape(-1, x.shape[-1]) if mask is None else x[mask]
        mean, var = rows.mean(0), rows.var(0)
        self.calls.append((site or name, mean, var, len(rows)))
        return (x - mean) / np.sqrt(var + epsilon) * gamma + beta

    def frozen(self, name, x, *, epsilon=1e-3):
        gamma, beta, mean, var = self.weights[name]
        return (x - mean) / np.sqrt(var + epsilon) * gamma + beta

    def sites(self):
        """Return ``(site, mean, variance, elements)`` of every call, the k-th call of a layer being its site k."""
        seen = {}
        for name, *rest in self.calls:
            seen[name] = seen.get(name, -1) + 1
            yield (f"{name}#{seen[name]}", *rest)


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
    swapped: list = field(default_factory=list)
    moved: list = field(default_factory=list)
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

    def experiment(self, lab, *, step, epoch, seconds, final=False, swapped=None, moved=None):
        self.labs.append(lab)
        self.swapped.append(swapped and swapped())
        self.moved.append(moved and moved())
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
