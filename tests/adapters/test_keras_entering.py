"""What enters each layer in evaluation, and whether it is what enters in training: real trainings, healthy and sick."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.testing import assert_allclose

from bnwatch.evidence import entering
from bnwatch.keras.backends import backend_of
from bnwatch.keras.experiments import Given
from bnwatch.keras.laboratory import KerasLaboratory
from tests.adapters.keras_models import ByHand, compiled, make, quiet_watch, state
from tests.adapters.library import PyDataset, keras, layers, set_random_seed

CLASSES, FEATURES = 4, 12
BLOCK = 8


def mlp(*, wide=32):
    return keras.Sequential(
        [
            keras.Input((FEATURES,)),
            layers.Dense(wide, name="a"),
            layers.BatchNormalization(momentum=0.9, name="first"),
            layers.ReLU(),
            layers.Dense(wide, name="b"),
            layers.BatchNormalization(momentum=0.9, name="second"),
            layers.ReLU(),
            layers.Dense(CLASSES, name="c"),
        ]
    )


def conv():
    return keras.Sequential(
        [
            keras.Input((BLOCK, BLOCK, 3)),
            layers.Conv2D(8, 3, name="a"),
            layers.BatchNormalization(momentum=0.9, name="first"),
            layers.ReLU(),
            layers.Conv2D(8, 3, strides=2, name="b"),
            layers.BatchNormalization(momentum=0.9, name="second"),
            layers.ReLU(),
            layers.GlobalAveragePooling2D(),
            layers.Dense(CLASSES, name="c"),
        ]
    )


def clusters(examples, *, seed, noise=0.6):
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, CLASSES, examples)
    centres = np.random.default_rng(7).normal(size=(CLASSES, FEATURES))
    return (centres[labels] + rng.normal(0.0, noise, (examples, FEATURES))).astype("float32"), labels


def images(examples, *, seed):
    """A bright bar, in one of four places, on noise."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, CLASSES, examples)
    x = rng.normal(0.4, 0.15, (examples, BLOCK, BLOCK, 3))
    for n, label in enumerate(labels):
        x[n, 2 * label : 2 * label + 2, :, label % 3] += 0.6
    return x.astype("float32"), labels


def watched(build, training, validation, *, epochs=6, size=32, seed=1):
    set_random_seed(seed)
    model, watch = compiled(build()), quiet_watch()
    if isinstance(training, tuple):
        model.fit(*training, batch_size=size, validation_data=validation, epochs=epochs, verbose=0, callbacks=[watch])
    else:
        model.fit(training, validation_data=validation, epochs=epochs, verbose=0, callbacks=[watch])
    assert watch.watch.signals.faults == []
    return watch


def rules(watch):
    """Return the rules that say something of accuracy by themselves: how layers are connected is not in question."""
    told = [d for d in watch.diagnoses if d.state == "active" and not d.causes]
    return {d.rule for d in told if d.rule.startswith(("BN2", "BN3", "BN9"))}


def test_what_enters_is_what_numpy_computes():
    (x, y), (xv, yv) = clusters(256, seed=0), clusters(256, seed=1, noise=1.5)
    model = make(mlp)
    model.fit(x, y, epochs=1, verbose=0)
    shelves = {"training": Given((x, y), "training", 32), "evaluation": Given((xv, yv), "evaluation", 32)}
    lab = KerasLaboratory(backend_of(model), shelves)
    before = state(model)
    found = entering(lab)
    assert state(model) == before
    assert (found.training, found.evaluation) == (256, 256)
    by = ByHand(model)
    inputs = {"first": [by.dense("a", part.astype("float64")) for part in (x, xv)]}
    inputs["second"] = [by.dense("b", np.maximum(by.frozen("first", z), 0)) for z in inputs["first"]]
    for site, (name, (known, new)) in zip(found.sites, inputs.items(), strict=True):
        shift = np.sqrt(np.mean((new.mean(0) - known.mean(0)) ** 2 / (known.var(0) + 1e-3)))
        assert site.subject == name
        assert_allclose(site.mean_shift, shift, rtol=1e-4)
        assert_allclose(site.std_ratio, np.exp(np.mean(np.log(new.std(0) / known.std(0)))), rtol=1e-4)


@pytest.mark.parametrize(
    ("build", "draw", "factor"), [(conv, images, 16), (conv, images, 255), (mlp, clusters, 1 / 255)]
)
def test_inputs_of_another_scale_are_told_at_the_first_layer(build, draw, factor):
    x, y = draw(600, seed=1)
    watch = watched(build, draw(1200, seed=0), (x * np.float32(factor), y))
    assert rules(watch) == {"BN304"}
    (found,) = (d for d in watch.diagnoses if d.rule == "BN304")
    assert str(found.severity) == "warning"
    assert "from `first` on" in found.message
    assert found.evidence["ratio"].value == pytest.approx(factor, rel=0.1)
    assert "0 to 16" in found.notes[1] if factor == 16 else "0 to 255 and 0 to 1" in found.notes[1]


class Augmented(PyDataset):
    """Each epoch other crops of padded images, mirrored, darker than they are."""

    def __init__(self, x, y):
        super().__init__()
        self.x, self.y, self.rng = x, y, np.random.default_rng(5)

    def __len__(self):
        return len(self.y) // 32

    def __getitem__(self, number):
        rows = slice(32 * number, 32 * (number + 1))
        x = np.pad(self.x[rows], [(0, 0), (0, 0), (2, 2), (0, 0)])
        left = int(self.rng.integers(0, 5))
        x = x[:, :, left : left + BLOCK, :]
        gain = self.rng.uniform(0.5, 1.0, (len(x), 1, 1, 1))
        noise = self.rng.normal(0.0, 0.05, x.shape)
        return (gain * x[:, :, :: int(self.rng.choice([-1, 1]))] + noise).astype("float32"), self.y[rows]


def test_augmentation_is_no_shift_that_matters():
    watch = watched(conv, Augmented(*images(1200, seed=0)), images(600, seed=1))
    # the crop is that of a batch, which is told in passing
    assert rules(watch) <= {"BN207"}
    assert all(str(d.severity) == "info" for d in watch.diagnoses)
    # they do differ, and the test sees it: what is silent is the rule
    assert min(site.p_value for site in watch.watch.signals.entering.sites) < 1e-3


def test_what_was_learned_by_heart_is_no_shift():
    """Labels that are noise: perfect in training, chance in evaluation."""
    (x, _), (xv, _) = clusters(256, seed=0), clusters(256, seed=1)
    y, yv = np.random.default_rng(3).integers(0, CLASSES, (2, 256))
    watch = watched(lambda: mlp(wide=128), (x, y), (xv, yv), epochs=30)
    row = watch.watch.signals.cells
    assert row.training["running"].accuracy > 0.8
    assert row.evaluation["running"].accuracy < 0.4
    assert rules(watch) == {"BN305"}


@pytest.mark.parametrize("examples", [600, 40])
def test_equal_inputs_are_silent_also_when_they_are_few(examples):
    watch = watched(conv, images(1200, seed=0), images(examples, seed=1), epochs=3)
    assert rules(watch) == set()
    sites = watch.watch.signals.entering.sites
    assert [site.subject for site in sites] == ["first", "second"]
    assert all(0.8 < site.std_ratio < 1.25 for site in sites)
