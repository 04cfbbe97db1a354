"""BN212: replicas keep running statistics of their own, and they differ."""

from __future__ import annotations

from typing import TYPE_CHECKING

from bnwatch.diagnosis import Quantity, Severity, Skipped, Table
from bnwatch.rules._base import Finding, Limits, Threshold, named, rule

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from bnwatch.signals import SharedSites, Signals

LONGEST = 6
"""Rows of the table."""


@rule(
    "BN212",
    "unsynchronized-replicas",
    severity=Severity.WARNING,
    samples=Threshold(4, "convention", "sampled steps from which the spread over steps is estimated"),
    alpha=Threshold(1e-4, "convention", "false alarms per layer and look"),
    shift=Threshold(0.1, "convention", "standard deviations by which evaluation depends on which replica it uses"),
)
def unsynchronized_replicas(signals: Signals, limits: Limits) -> Iterator[Finding | Skipped]:
    """Replicas evaluate with running statistics that differ beyond what averages of the same data do."""
    if signals.attachment is not None and signals.attachment.unseen is not None:
        yield Skipped("BN212", signals.attachment.unseen)
        return
    replicas = signals.replicas
    if replicas is None:
        if signals.replicated > 1:
            yield Skipped("BN212", "what the replicas hold at an evaluation is not known yet")
        return
    known = [layer for layer in replicas.layers if layer["steps"] >= limits["samples"]]
    if len(known) < len(replicas.layers):
        yield Skipped("BN212", f"{limits['samples']:.0f} samples are needed to compare replicas")
    differ = [layer for layer in known if layer.differ(limits["alpha"]) and _apart(layer) > limits["shift"]]
    if differ:
        yield _finding(sorted(differ, key=_apart, reverse=True), len(known), signals.adapter)


def _apart(layer: SharedSites) -> float:
    return max(layer["between_shift"], layer["between_scale"])


def _finding(differ: Sequence[SharedSites], layers: int, adapter: str | None) -> Finding:
    worst = differ[0]
    return Finding(
        subject="model",
        message=f"{len(worst.values)} replicas hold running statistics up to {_apart(worst):.2g} standard deviations "
        f"apart, and see different data: {named(layer.layer for layer in differ)}",
        evidence={
            "between_shift": Quantity(worst["between_shift"], "standard deviations between running means, worst layer"),
            "between_scale": Quantity(worst["between_scale"], "log standard deviations between running spreads there"),
            "p_value": Quantity(worst.p_value, "that all replicas see the same data there"),
            "replicas": Quantity(len(worst.values), "compared"),
            "layers": Quantity(len(differ), f"of {layers} that differ"),
        },
        table=_table(differ),
        notes=(
            (
                "each replica normalizes training with its own part of the batch and keeps running statistics of that "
                "part alone: those that are evaluated with or saved describe one part of the data"
            ),
            *_KEPT.get(adapter or "", ()),
        ),
        helps=(
            "give every replica a random part of the data: shuffle before they are divided, not after",
            *_HELPS.get(adapter or "", ("normalize with statistics of all replicas",)),
        ),
    )


_KEPT = {
    "bnwatch.chainer": (
        (
            "ChainerMN averages gradients, not running statistics: a file that rank 0 saves has those of rank 0; a "
            "ParallelUpdater saves those of its main model"
        ),
    ),
    "bnwatch.keras": ("a saved model has the average over the replicas, or the values of the first",),
}

_HELPS = {
    "bnwatch.chainer": (
        "ChainerMN: chainermn.scatter_dataset(dataset, comm, shuffle=True)",
        "ChainerMN: normalize over all ranks, with chainermn.links.create_mnbn_model(model, comm)",
        (
            "ChainerMN: average running statistics before evaluation and saving, with "
            "trainer.extend(chainermn.extensions.AllreducePersistent(model, comm)); an average of variances leaves "
            "out how far the means are apart"
        ),
    ),
    "bnwatch.keras": ("normalize over all replicas: BatchNormalization(synchronized=True)",),
}


def _table(differ: Sequence[SharedSites]) -> Table:
    return Table(
        ("layer", "means apart, in std", "log spreads apart", "p of the same data", "running mean of each replica"),
        tuple(
            (
                layer.layer,
                round(layer["between_shift"], 3),
                round(layer["between_scale"], 3),
                f"{layer.p_value:.1g}",
                f"channel {layer['channel']:.0f}: " + ", ".join(f"{row['running_mean']:.3g}" for row in layer.rows()),
            )
            for layer in differ[:LONGEST]
        ),
    )
