"""Trains as one of several workers: a program of its own, for ``TF_CONFIG`` says which when TensorFlow starts.

    python -m tests.adapters.keras_workers DIRECTORY

Keras 2 trains in ``fit``. Keras 3 cannot (up to 3.15 at least it takes the mean of the metrics, which are scalars, over
an axis), so there the loop is written by hand. What was seen goes to standard output, as JSON.
"""

from __future__ import annotations

import hashlib
import json
import sys
import warnings
from pathlib import Path

import numpy as np
import tensorflow as tf

from bnwatch.evidence import ExperimentNotPossibleError
from bnwatch.keras import BatchNormWatch, crosscheck, watch
from tests.adapters.keras_models import CLASSES, compiled, data
from tests.adapters.library import LEGACY, keras, layers, set_random_seed

SIZE = 16


def net():
    set_random_seed(1)
    shared = layers.BatchNormalization(momentum=0.9, name="shared")
    inputs = keras.Input((5,))
    x = shared(layers.Dense(5, activation="relu")(shared(inputs)))
    x = layers.BatchNormalization(momentum=0.9, synchronized=True, name="together")(x)
    return compiled(keras.Model(inputs, layers.Dense(CLASSES)(x)))


def fitted(model, _, dataset, watching):
    """Train in two calls of ``fit``: the second goes on with the functions that the first has left."""
    return [
        model.fit(dataset, epochs=2, verbose=0, callbacks=callbacks, validation_data=dataset).history
        for callbacks in ([watching] if watching else [], [])
    ]


def looped(model, strategy, dataset, watching):
    loss_of = keras.losses.SparseCategoricalCrossentropy(from_logits=True, reduction="sum")

    def on_replica(x, y):
        with tf.GradientTape() as tape:
            loss = loss_of(y, model(x, training=True)) / SIZE
        gradients = tape.gradient(loss, model.trainable_variables)
        model.optimizer.apply_gradients(zip(gradients, model.trainable_variables, strict=True))
        return loss

    @tf.function
    def step(x, y):
        return strategy.reduce("SUM", strategy.run(on_replica, (x, y)), axis=None)

    def train():
        losses = []
        for x, y in strategy.experimental_distribute_dataset(dataset):
            losses.append(float(step(x, y)))
            if watching:
                watching.step(loss=losses[-1], examples=SIZE)
        return losses

    if not watching:
        return train() + train()
    with watching:
        losses = train()
    return losses + train()


def run(strategy, watching):
    with strategy.scope():
        model = net()
        if not LEGACY:
            model.optimizer.build(model.trainable_variables)
    x, y = data(96, shape=(5,))
    dataset = tf.data.Dataset.from_tensor_slices((x, y)).batch(SIZE)
    history = (fitted if LEGACY else looped)(model, strategy, dataset, watching and watching(model))
    moved = [*model.variables, *([] if LEGACY else model.optimizer.variables)]
    weights = hashlib.sha256(b"".join(np.asarray(v).tobytes() for v in moved)).hexdigest()
    return weights, history


def refusal(watching):
    """Return why no experiment runs, asked by hand on the model that was watched."""
    try:
        crosscheck(watching.model if LEGACY else watching._backend.model, train=data(32, shape=(5,)))
    except ExperimentNotPossibleError as error:
        return str(error)
    return None


def main():
    strategy = tf.distribute.MultiWorkerMirroredStrategy()
    directory, made = Path(sys.argv[1]), []

    def watching(model):
        made.append(BatchNormWatch(directory, every=1) if LEGACY else watch(model, directory, every=1))
        return made[0]

    plain = run(strategy, None)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        watched = run(strategy, watching)
    report, signals = made[0].report(), made[0].watch.signals
    found = {
        "same": plain == watched,
        "samples": report.samples,
        "sites": [str(site) for site in signals.table.sites],
        "counts": [int(count) for count in signals.table.column("count")],
        "faults": signals.faults,
        "looks": len(signals.looks),
        "refused": refusal(made[0]),
        "skipped": {skipped.rule: skipped.reason for skipped in report.skipped},
        "files": len(list(directory.glob("*"))),
        "said": [str(one.message) for one in said if "BatchNorm" in one.category.__name__],
    }
    sys.stdout.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
