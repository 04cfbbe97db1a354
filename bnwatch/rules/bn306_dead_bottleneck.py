"""BN306: an activation is zero for every example, and nothing gets past it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from bnwatch.diagnosis import Quantity, Severity, Skipped
from bnwatch.rules._base import Finding, Limits, Threshold, rule

if TYPE_CHECKING:
    from collections.abc import Iterator

    from bnwatch.evidence import LayerLook, Look
    from bnwatch.signals import Signals


@rule(
    "BN306",
    "dead-bottleneck",
    severity=Severity.ERROR,
    zero=Threshold(0.99, "measured", "share of examples with every unit at zero; nets that learn stay below .01"),
    looks=Threshold(2, "measured", "looks in a row; a single one may be a passing state"),
    constant=Threshold(1e-6, "derived", "relative spread of the output over examples that float32 rounding can give"),
)
def dead_bottleneck(signals: Signals, limits: Limits) -> Iterator[Finding | Skipped]:
    """Every unit of an activation is zero for every example, so the output is a constant and no gradient flows."""
    looks = list(signals.looks)
    if not looks:
        yield Skipped("BN306", "no look through the network was taken", needs=None)
        return
    dead = _dead(looks[-1], limits)
    if dead is None:
        return
    since = len(looks) - 1
    while since > 0 and (_find(looks[since - 1], dead.path) or dead).zero_samples >= limits["zero"]:
        since -= 1
    held = len(looks) - since
    gradient = _gradient(looks[-1], dead.path)
    if held < limits["looks"] or gradient is None:
        yield Skipped("BN306", f"`{dead.path}` was found dead in {held} looks; gradients are to be seen", "gradients")
        return
    if gradient != 0.0:
        return
    died = looks[since].step
    alive = looks[since - 1].step if since else 0
    when = f"since step {died}" + (f" (alive at step {alive})" if alive else "")
    yield Finding(
        subject=dead.path,
        message=f"all {dead.units} units of `{dead.path}` are zero for every example {when}: "
        "the output of the network is a constant and no gradient flows back",
        evidence={
            "zero_samples": Quantity(dead.zero_samples, f"of {looks[-1].examples} training examples all zero"),
            "dead_since": Quantity(died, "training step"),
            "last_alive": Quantity(alive, "training step"),
            "gradient": Quantity(gradient, f"largest absolute gradient at and before `{dead.path}`"),
        },
        notes=(
            "an activation that is zero for every example has gradient zero: the layers in front of it no longer "
            "learn, and no later step can revive it",
            *_innocence(signals),
        ),
        helps=(
            "put global average pooling in place of Flatten in front of it: fewer inputs, a smaller step",
            f"or put batch normalization between `{dead.path}` and its ReLU",
            "or use LeakyReLU there",
            "a smaller learning rate only delays it",
        ),
    )


def _dead(look: Look, limits: Limits) -> LayerLook | None:
    """Return the first layer that is zero for every example, if the output of the network is constant too."""
    if not look.layers or look.layers[-1].spread >= limits["constant"]:
        return None
    return next((layer for layer in look.layers if layer.zero_samples >= limits["zero"]), None)


def _find(look: Look, path: str) -> LayerLook | None:
    return next((layer for layer in look.layers if layer.path == path), None)


def _gradient(look: Look, path: str) -> float | None:
    """Return the largest gradient of the layers up to and including the dead one; None where it was not measured."""
    seen: float | None = None
    for layer in look.layers:
        if layer.gradient is not None:
            seen = max(seen or 0.0, layer.gradient)
        if layer.path == path:
            break
    return seen


def _innocence(signals: Signals) -> tuple[str, ...]:
    cells = signals.cells
    if cells is None or not cells.training:
        return ()
    batch, running = cells.training["batch"], cells.training["running"]
    return (
        f"the running statistics are innocent: {batch.examples:,} training examples give {batch.accuracy:.1%} with "
        f"batch statistics and {running.accuracy:.1%} with running statistics",
    )
