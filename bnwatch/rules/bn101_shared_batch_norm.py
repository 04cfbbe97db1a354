"""BN101: one layer normalizes activations from several places."""

from __future__ import annotations

from typing import TYPE_CHECKING

from bnwatch.diagnosis import Quantity, Severity, Skipped, Table
from bnwatch.rules._base import (
    FEW,
    OTHER_PASSES,
    SAME,
    SHIFT,
    Finding,
    Limits,
    Threshold,
    additional,
    blind,
    differ,
    fitting,
    harmless,
    innocence,
    passes,
    rule,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

    from bnwatch.records import LayerSpec
    from bnwatch.signals import SharedSites, Signals


@rule(
    "BN101",
    "shared-batch-norm",
    severity=Severity.WARNING,
    samples=Threshold(4, "convention", "sampled steps from which the spread over steps is estimated"),
    alpha=Threshold(SAME, "convention", "false alarms per layer and look"),
    shift=Threshold(SHIFT, "convention", "standard deviations by which evaluation would move the normalized output"),
    few=Threshold(FEW, "derived", "elements a call: the variance of fewer has a tail that no F test allows for"),
)
def shared_batch_norm(signals: Signals, limits: Limits) -> Iterator[Finding | Skipped]:
    """One layer normalizes two call sites or more whose statistics differ."""
    if signals.attachment is None and signals.table is None:
        yield from _before_training(signals)
    repeated = passes(signals) > 1
    besides = additional(signals)
    for spec, sites, apart in signals.shared():
        if apart is None or len(signals.tables) < limits["samples"]:
            yield Skipped("BN101", f"{spec.path}: {limits['samples']:.0f} samples are needed to compare its call sites")
            continue
        shift = max(apart["between_shift"], apart["between_scale"])
        apart_enough = shift > limits["shift"] and differ(signals, apart, limits["alpha"], limits["few"])
        if repeated and not apart_enough:  # which is BN213
            continue
        evidence = {
            "call_sites": Quantity(len(sites), "a training step"),
            "between_shift": Quantity(apart["between_shift"], "standard deviations between site means"),
            "between_scale": Quantity(apart["between_scale"], "log standard deviations between site spreads"),
            "p_value": Quantity(apart.p_value, "that all sites see the same data"),
        }
        if apart_enough:
            beyond = spec.path in besides
            innocent = harmless(signals) or (harmless(signals, "population") and not beyond)
            yield Finding(
                subject=spec.path,
                severity=Severity.INFO if innocent else None,
                message=f"`{spec.path}` normalizes {len(sites)} call sites with one set of running statistics, "
                "and the sites see different data",
                evidence=evidence,
                table=_table(spec, apart),
                notes=(
                    (
                        f"training normalizes each call of `{spec.path}` with the statistics of that call; evaluation "
                        "normalizes all of them with one mixture, which fits none"
                    ),
                    *_innocence(signals, beyond=beyond),
                ),
                helps=(*(fitting(OTHER_PASSES, signals) if beyond else ()), *_helps(signals, graph=not beyond)),
            )
        else:
            yield Finding(
                subject=spec.path,
                severity=Severity.INFO,
                message=f"`{spec.path}` normalizes {len(sites)} call sites, whose statistics are alike as of now",
                evidence=evidence,
                notes=("sharing is harmless as long as all call sites see the same distribution",),
            )


def _innocence(signals: Signals, *, beyond: bool) -> tuple[str, ...]:
    """Return what the cells say of a mixture of sites that differ, if anything; ``beyond`` those that they reach."""
    if harmless(signals):
        return innocence(signals.cells)
    if not harmless(signals, "population"):
        return ()
    if beyond:
        return (
            "a forward pass of the model makes fewer calls of it, and statistics re-estimated with these alone cost no "
            "accuracy: what spoils the running statistics are the other calls of a training step",
        )
    return (
        "statistics re-estimated over all call sites cost no accuracy, so the mixture does no harm: what costs "
        "accuracy is how old the running statistics are",
    )


def _before_training(signals: Signals) -> Iterator[Finding | Skipped]:
    """Yield what the graph alone says; where it is silent and nothing is to be trained, that it could not look."""
    if signals.structure is None:
        return
    yield from blind("BN101", signals)
    for layer in signals.structure.layers:
        if len(layer.places) > 1:
            yield Finding(
                subject=layer.path,
                severity=Severity.INFO,
                message=f"`{layer.path}` is shared by {len(layer.places)} call sites; whether they differ shows in "
                "training",
                evidence={"call_sites": Quantity(len(layer.places), "in the graph")},
                table=Table(
                    ("call site", "fed by"),
                    tuple((str(place.site), place.producer or "not known") for place in layer.places),
                ),
                notes=("evaluation normalizes all of them with one set of running statistics",),
                helps=_helps(signals),
            )


def _helps(signals: Signals, *, graph: bool = True) -> tuple[str, ...]:
    """Return how each call site gets running statistics of its own, in the framework at hand.

    ``graph`` says that the sites are places of the model's own graph.
    """
    if signals.adapter == "bnwatch.chainer":
        return (
            "build one L.BatchNormalization link for each place, with `link.copy(mode='init')` for example (they may "
            "share gamma and beta, but not avg_mean and avg_var)",
        )
    return (
        "give each call site its own BatchNormalization layer (they may share gamma and beta, but not running "
        "statistics)",
        *(
            ("`bnwatch.keras.split_shared(model)` does so in a copy of a functional model",)
            if graph and signals.adapter == "bnwatch.keras"
            else ()
        ),
    )


def _table(spec: LayerSpec, apart: SharedSites) -> Table:
    channel = int(apart["channel"])
    lines = dict(enumerate(spec.called_at))
    return Table(
        (
            *("call site", f"batch mean (channel {channel})", "batch std", "running mean", "apart"),
            *(("called from",) if lines else ()),
        ),
        tuple(
            (
                f"{spec.path}#{index}",
                site["batch_mean"],
                site["batch_std"],
                site["running_mean"],
                f"{abs(site['batch_mean'] - site['running_mean']) / site['running_std']:.1f} std",
                *((lines.get(index) or "not known",) if lines else ()),
            )
            for index, site in enumerate(apart.rows())
        ),
    )
