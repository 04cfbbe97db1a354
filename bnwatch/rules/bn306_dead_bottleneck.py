"""BN306: an activation is zero for every example, and nothing gets past it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from bnwatch.diagnosis import Quantity, Severity, Skipped
from bnwatch.rules._base import Finding, Limits, Threshold, innocence, rule

if TYPE_CHECKING:
    from collections.abc import Iterator

    from bnwatch.evidence import LayerLook, Look
    from bnwatch.signals import Signals


@rule(
    "BN306",
    "dead-bottleneck",
    severity=Severity.ERROR,
    zero=Threshold(0.99, "measured", "share of examples with every unit at zero; nets that learn stay below .01"),
    looks=Threshold(2, "measured", "sampled steps in a row; at a single one it may be a passing state"),
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
    steps = {look.step for look in looks[since:]}
    last = looks[-1]
    measured = [layer for layer in last.up_to(dead.path) if layer.gradient is not None]
    if len(steps) < limits["looks"] or not measured:
        yield Skipped("BN306", f"`{dead.path}` was seen dead at {len(steps)} steps; more is to be seen", "gradients")
        return
    gradient = max(layer.gradient or 0.0 for layer in measured)
    if gradient != 0.0:
        return
    feeding = measured[-1].path
    where = f"`{feeding}`" + (f" (behind its activation `{dead.path}`)" if feeding != dead.path else "")
    died, alive = looks[since].step, looks[since - 1].step if since else 0
    when = f"since step {died}" + (f", alive at step {alive}" if since else "")
    yield Finding(
        subject=feeding,
        message=f"all {dead.units} units of {where} are zero for every example {when}: "
        "the network gives one constant output and no gradient flows back",
        evidence={
            "zero_samples": Quantity(
                round(dead.zero_samples * last.examples),
                f"of {last.examples} training examples have every unit at zero",
            ),
            "dead_since": Quantity(died, "first step at which it was seen dead"),
            **({"last_alive": Quantity(alive, "last step at which it was seen alive")} if since else {}),
            "gradient": Quantity(gradient, f"largest absolute gradient of the parameters up to `{feeding}`"),
        },
        notes=(
            (
                "where an activation is zero for every example its gradient is zero: the layers in front of it no "
                "longer learn, and no later step can revive it"
            ),
            f"behind `{feeding}` it takes an offset far below the scale, or an input that is no number: likely steps "
            "far too large; what decides: the same training with a hundredth of the learning rate"
            if feeding in signals.specs
            else "a smaller learning rate only delays it",
            *innocence(signals.cells if signals.cells and signals.cells.step >= died else None),
        ),
        helps=_helps(feeding, normalized=feeding in signals.specs),
    )


def _helps(feeding: str, *, normalized: bool) -> tuple[str, ...]:
    """Return what keeps the units behind a layer alive, which may be batch normalization itself."""
    if normalized:
        return ("a smaller learning rate, or clip gradients", "or use LeakyReLU there")
    return (
        f"put global average pooling in place of Flatten in front of `{feeding}`: fewer inputs, smaller steps",
        f"or put batch normalization between `{feeding}` and its ReLU",
        "or use LeakyReLU there",
    )


def _dead(look: Look, limits: Limits) -> LayerLook | None:
    """Return the first layer that is zero for every example, if the output of the network is constant too.

    What feeds it must vary: behind an input that is constant itself, every layer is.
    """
    if not look.layers or look.layers[-1].spread >= limits["constant"]:
        return None
    feeding = None
    for layer in look.layers:
        if layer.zero_samples >= limits["zero"]:
            return layer if feeding is None or feeding.spread >= limits["constant"] else None
        feeding = layer
    return None


def _find(look: Look, path: str) -> LayerLook | None:
    return next((layer for layer in look.layers if layer.path == path), None)
