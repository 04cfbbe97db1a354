"""BN104: a layer that is to be trained never normalizes with batch statistics."""

from __future__ import annotations

from typing import TYPE_CHECKING

from bnwatch.diagnosis import Quantity, Severity, Skipped
from bnwatch.rules._base import Finding, Limits, Threshold, fitting, named, rule

if TYPE_CHECKING:
    from collections.abc import Iterator

    from bnwatch.signals import Signals

HOW = {
    "bnwatch.chainer": (
        "Chainer: train inside `with chainer.using_config('train', True):`, and look for a `chainer.config.train = "
        "False` that is never set back",
    ),
    "bnwatch.keras": (
        "Keras: call the model with `model(x, training=True)` in the training step: without it a loop of your own "
        "runs in inference mode",
        "and hand `training` on inside `call`: `self.bn(x, training=training)`, never `training=False`",
    ),
}

TRAINED_SO = (
    "so no gap between training and evaluation is to be expected, and re-estimated statistics make it worse: the "
    "weights were trained against the initial values"
)
LEFT_BEHIND = (
    "their scale and offset were trained before: where they were loaded or copied, as a pretrained backbone is, "
    "inference mode is right and their statistics were left behind (BN211): restore these instead"
)


@rule(
    "BN104",
    "inference-mode-training",
    severity=Severity.WARNING,
    samples=Threshold(8, "convention", "sampled steps in a row; a network may wait for its turn (five in WGAN)"),
)
def inference_mode_training(signals: Signals, limits: Limits) -> Iterator[Finding | Skipped]:
    """A layer runs in inference mode in every training step, and its running statistics are the initial values."""
    if not signals.tables:
        yield Skipped("BN104", "no training step was seen")
        return
    last = list(signals.tables)[-int(limits["samples"]) :]
    idle = set[str]().union(*(table.idle for table in last)) - signals.normalized.keys()
    moved = {path for evaluation in signals.evaluations for path in evaluation.moved}
    initial = set(signals.attachment.initial if signals.attachment else ()) & idle - moved
    if initial and len(last) < limits["samples"]:
        yield Skipped("BN104", f"{len(last)} of {limits['samples']:.0f} samples seen")
        return
    inert = [path for path in signals.specs if path in initial and all(path in table.idle for table in last)]
    if not inert:
        return
    trained = [path for path in inert if signals.specs[path].trainable]
    found = trained or inert
    yield Finding(
        subject=found[0] if len(found) == 1 else "model",
        severity=None if trained else Severity.INFO,
        message=f"training runs {named(found)} in inference mode: "
        + ("their" if len(found) > 1 else "its")
        + " running statistics are still exactly the initial values"
        + ("" if trained else ", and frozen"),
        evidence={
            "layers": Quantity(len(found), f"of {len(signals.specs)} never used batch statistics"),
            "samples": Quantity(signals.samples, "sampled steps, none of them in training mode"),
        },
        notes=(
            "these layers do not normalize: in training as in evaluation they subtract the initial mean and divide by "
            "the initial spread, which are constants",
            LEFT_BEHIND
            if signals.attachment is not None and set(found) & set(signals.attachment.unrestored)
            else TRAINED_SO,
        ),
        helps=fitting(HOW, signals),
    )
