"""Small made-up runs for the tests of sinks, rendering and the command line."""

from __future__ import annotations

import math

import numpy as np

from bnwatch.diagnosis import Diagnosis, Quantity, Report, Severity, Skipped, Table
from bnwatch.evidence import (
    Attribution,
    Cell,
    Cells,
    Composition,
    Difference,
    Entering,
    LayerLook,
    Look,
    SiteComposition,
    SiteCost,
    SiteShift,
)
from bnwatch.records import CHANNEL_STATISTICS, Attachment, CallSite, ChannelStatistics, EvaluationRecord, LayerSpec
from bnwatch.signals import SITE_STATISTICS, STATISTICS, Replicas, SharedSites, SignalTable

HOSTILE = 'x"\x1b[31m\u202e<img src=x onerror=alert(1)>`|*\n../../etc\x00\ud800'
"""A layer name that tries everything: terminal, bidi, HTML, Markdown, paths, unpaired surrogates."""


def attachment(*paths: str) -> Attachment:
    specs = [
        LayerSpec(
            path,
            "BatchNormalization",
            16,
            1e-3,
            0.9,
            bessel_corrected=True,
            axis=(0,),
            built_at="model.py:12",
            called_at=("model.py:31", None, "model.py:31", "/else where/net.py:5"),
        )
        for path in paths or ("encoder/bn_1", "encoder/bn_2", "bn")
    ]
    return Attachment(
        tuple(specs), {"ln": "no running statistics"}, "chainer 7.8.1", unrestored=("bn",), initial=("bn",)
    )


def table(
    step: int, *paths: str, sites: int = 1, seed: int = 0, epoch: int | None = None, accuracy: float | None = 0.5
) -> SignalTable:
    rng = np.random.default_rng((seed, step))
    paths = paths or ("encoder/bn_1", "encoder/bn_2", "bn")
    rows = tuple(CallSite(path, index) for path in paths for index in range(sites))
    values = rng.lognormal(size=(len(rows), len(STATISTICS))).astype(np.float32)
    values[:, STATISTICS.index("updates")] = np.nan
    shared = tuple(
        SharedSites(path, rng.normal(size=(sites, len(SITE_STATISTICS))).astype(np.float32))
        for path in paths
        if sites > 1
    )
    epoch = step // 100 if epoch is None else epoch
    return SignalTable(
        step, epoch, rows, values, shared, accuracy=accuracy, loss=2.3, examples=64 * step, idle=(HOSTILE, "bn")
    )


def channels(step: int = 100, layer: str = "bn", *, sites: int = 2, of: int = 6) -> ChannelStatistics:
    values = np.random.default_rng(step).lognormal(size=(sites * len(CHANNEL_STATISTICS), (of + 1) // 2))
    values[0, 0], values[-1, -1] = np.nan, np.inf
    rows = tuple(CallSite(layer, index) for index in range(sites))
    return ChannelStatistics(step, step // 100, layer, rows, tuple(range(0, of, 2)), of, values.astype(np.float32))


def evaluation(step: int = 100) -> EvaluationRecord:
    return EvaluationRecord(
        step, 0, accuracy=0.25, loss=float("nan"), examples=1000, train_accuracy=0.75, train_examples=5000, classes=10,
        moved=("bn",), still=(HOSTILE,), swapped=True,
    )  # fmt: skip


def cells(step: int = 100) -> Cells:
    labels = np.arange(100) % 10
    wrong = (labels + 1) % 10
    good = Cell(np.where(np.arange(100) < 97, labels, wrong), labels)
    bad = Cell(np.where(np.arange(100) < 85, labels, 0), labels)
    return Cells(
        step=step,
        epoch=0,
        classes=10,
        training={"running": bad, "batch": good, "population": bad},
        evaluation={"running": bad, "batch": good},
        missing="the evaluation data ran out",
        seconds=0.25,
        moved=("bn", HOSTILE),
    )


def attribution(step: int = 100) -> Attribution:
    much, little = Difference(0.12, (0.1, 0.14), 1e-30), Difference(-0.01, (-0.02, 0.0), 1.0)
    costs = SiteCost("bn", 1, float("inf"), much, little), SiteCost("bn", None, 0.5, much, much)
    return Attribution(step, 0, "evaluation", 100, 0.85, 0.97, much, costs, ("encoder/bn_1",), 1.5)


def entering(step: int = 100) -> Entering:
    sites = SiteShift("bn", None, 0.5, 255.0, 1e-9, 0.25, 0.75, 3), SiteShift(HOSTILE, 1, math.inf, 0.5, None)
    return Entering(step, 0, 256, 200, sites, "what enters a layer is not finite", 0.125)


def composition(step: int = 100) -> Composition:
    sites = (
        SiteComposition("bn", None, 5.5, 1e-9, 0.9, 0.5, 3.0),
        SiteComposition(HOSTILE, 1, math.inf, 1.0, 0.0, 0.1, 1.0),
    )
    return Composition(step, 0, 20, 640, 1, 32, 0.75, 0.2, sites, 0.5)


def replicas(step: int = 100) -> Replicas:
    values = np.arange(2 * len(SITE_STATISTICS), dtype=np.float32).reshape(2, -1) / 3
    values[0, 2], values[1, 3] = np.inf, np.nan
    return Replicas(step, 0, (SharedSites("bn", values), SharedSites(HOSTILE, values[:1])))


def look(step: int = 100) -> Look:
    layers = (
        LayerLook("conv", "Conv2D", 32, 0.0, 0.1, 0.9, 1e-3),
        LayerLook("dense", "Dense relu", 32, 1.0, 1.0, 0.0, None, scale=0.0),
        LayerLook("softmax", "Softmax", 10, 0.0, 0.0, 0.1, None, scale=0.25, bounds=0.5, update=1e-3),
    )
    return Look(step, 0, 64, layers, entry=0.5, loss=2.25, learning_rate=0.125)


def diagnosis(subject: str = "encoder/bn_2", rule: str = "BN101", **changes: object) -> Diagnosis:
    fields: dict[str, object] = {
        "rule": rule,
        "name": "shared-batch-norm",
        "severity": Severity.WARNING,
        "subject": subject,
        "message": f"`{subject}` normalizes 2 call sites with one set of running statistics",
        "step": 400,
        "epoch": 1,
        "last_step": 400,
        "evidence": {
            "apart": Quantity(2.41, "std", (2.2, 2.6)),
            "samples": Quantity(40),
            "evaluation accuracy": Quantity(85.5, "%"),
        },
        "table": Table(("call site", "batch mean", "batch std"), (("bn_2#0", -0.92, 0.41), ("bn_2#1", 1.0, 0.38))),
        "notes": ("running variance averages the two spreads and leaves out the distance between their means",),
        "helps": ("give each call site its own layer and share only the convolution",),
    }
    return Diagnosis(**{**fields, **changes})  # type: ignore[arg-type]


def report(**changes: object) -> Report:
    """One cause with a consequence, one that cleared, one that is allowed, one rule that could not look."""
    fields: dict[str, object] = {
        "run": "runs/a",
        "diagnoses": (
            diagnosis(),
            diagnosis(
                "model",
                "BN301",
                name="evaluation-gap-from-batch-norm",
                severity=Severity.ERROR,
                message="running statistics cost 12 points of accuracy",
                causes=("BN101 encoder/bn_2",),
                step=500,
                last_step=620,
            ),
            diagnosis("encoder/bn_1", "BN201", message="moving averages are unsettled", state="cleared", last_step=450),
            diagnosis("bn", state="allowed", reason="siamese towers, same data"),
        ),
        "skipped": (
            Skipped("BN302", "the number of classes is not known"),
            Skipped("BN306", "no look", "look"),
            Skipped("BN301", "the number of classes is not known"),
        ),
        "layers": 3,
        "sites": 4,
        "samples": 40,
        "steps": 620,
        "evaluations": 2,
    }
    return Report(**{**fields, **changes})  # type: ignore[arg-type]
