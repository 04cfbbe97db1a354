"""The same examples in another order, and the batches that are kept to be put in one."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import bnwatch.chainer
from bnwatch.chainer import examples as keeping
from bnwatch.chainer.experiments import ChainerLaboratory
from bnwatch.chainer.forward import ForwardCall
from bnwatch.chainer.layers import Layers
from bnwatch.evidence import Examples, ExperimentNotPossibleError

from . import chainer_models as models
from .chainer_models import F, L, chainer

ROWS = (32, 32, 32, 5)


def laboratory(model: Any) -> ChainerLaboratory:
    return ChainerLaboratory(Layers({"": model}), lambda _split, _limit: ())


def batches_of(model: Any, *arguments: Any, **named: Any) -> list[Examples]:
    """Return batches whose calls have a part of each array, and the other arguments as they are."""
    ends = np.cumsum(ROWS)
    t = models.data(ends[-1])[1]

    def part(value: Any, rows: slice) -> Any:
        return value[rows] if isinstance(value, np.ndarray | list | chainer.Variable) else value

    found = []
    for rows in map(slice, [0, *ends[:-1]], ends):
        args = tuple(part(value, rows) for value in arguments)
        kwargs = {name: part(value, rows) for name, value in named.items()}
        found.append(
            Examples(ForwardCall(model, "__call__", args, kwargs).keep(), t[rows].astype(np.int64), "training")
        )
    return found


@pytest.mark.parametrize("wrapped", [False, True])
def test_scores_are_those_of_numpy_on_the_reordered_examples(wrapped: bool) -> None:
    x, t = models.data(sum(ROWS))
    model = models.MLP()
    target = L.Classifier(model) if wrapped else model
    order = np.random.default_rng(1).permutation(len(x))
    given = (chainer.Variable(x), t) if wrapped else (x,)
    lab, batches = laboratory(target), batches_of(target, *given)
    found = lab.reshuffled(batches, order)
    assert [len(batch.labels) for batch in found] == list(ROWS)
    assert {batch.origin for batch in found} == {"training"}
    start = 0
    for batch in found:
        rows = order[start : start + len(batch.labels)]
        start += len(batch.labels)
        np.testing.assert_array_equal(batch.labels, t[rows])
        hidden = x[rows].astype(np.float64) @ model.l1.W.array.T.astype(np.float64) + model.l1.b.array
        (entered, *_) = lab.inputs(batch)
        np.testing.assert_allclose(entered.moments.mean, hidden.mean(axis=0), atol=1e-5)
        np.testing.assert_allclose(entered.moments.var, hidden.var(axis=0), rtol=1e-4)
        again = batch.inputs.args[0].again()
        assert isinstance(again, chainer.Variable) is wrapped
        np.testing.assert_array_equal(getattr(again, "array", again), x[rows])


def test_the_original_order_gives_the_original_outputs_to_the_bit() -> None:
    model = models.MLP()
    lab, batches = laboratory(model), batches_of(model, models.data(sum(ROWS))[0])
    for one, other in zip(batches, lab.reshuffled(batches, np.arange(sum(ROWS))), strict=True):
        assert lab.outputs(one, "batch").tobytes() == lab.outputs(other, "batch").tobytes()


class Many(models.MLP):
    """Called with more than an array of inputs."""

    def forward(self, xs: Any, *, pair: Any = (), scale: float = 1.0, names: Any = None) -> Any:
        del names
        return super().forward(scale * F.stack([chainer.as_variable(x) for x in xs])) + sum(
            part.mean() for part in pair
        )


def test_lists_with_a_part_an_example_keywords_and_plain_values() -> None:
    x, _ = models.data(sum(ROWS))
    model, order = Many(), np.random.default_rng(2).permutation(len(x))
    batches = batches_of(model, list(x), scale=0.5)
    found = laboratory(model).reshuffled(batches, order)
    assert [call.inputs.kwargs for call in found] == [{"scale": 0.5}] * len(ROWS)
    np.testing.assert_array_equal(np.stack([one.array for b in found for one in b.inputs.args[0]]), x[order])


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ((np.ones((6, 3), np.float32),), {}),  # rows that are not the examples
        ((object(),), {}),
        ((), {"names": {"a"}}),
    ],
)
def test_what_cannot_be_taken_apart_is_refused(arguments: Any, named: Any) -> None:
    model = Many()
    call = ForwardCall(model, "__call__", arguments, named).keep()
    labels = models.data(32)[1].astype(np.int64)
    batches = [Examples(call, labels, "training")] * 2
    with pytest.raises(ExperimentNotPossibleError, match="cannot be taken apart"):
        laboratory(model).reshuffled(batches, np.arange(64))


def test_examples_of_two_shapes_and_calls_of_two_links_are_refused() -> None:
    model, (x, t) = models.MLP(), models.data(64)
    labels = t[:32].astype(np.int64)
    one = Examples(ForwardCall(model, "__call__", (x[:32],)).keep(), labels, "training")
    wider = Examples(ForwardCall(model, "__call__", (np.tile(x[32:], 2),)).keep(), labels, "training")
    other = Examples(ForwardCall(model.l1, "__call__", (x[32:],)).keep(), labels, "training")
    for second in (wider, other):
        with pytest.raises(ExperimentNotPossibleError, match="cannot be taken apart"):
            laboratory(model).reshuffled([one, second], np.arange(64))


@pytest.mark.parametrize(("size", "batches"), [(4, 64), (16, 64), (64, 32), (500, 32)])
def test_enough_batches_are_kept_to_see_how_they_are_composed(size: int, batches: int) -> None:
    kept = keeping.KeptExamples(keeping.COMPOSED)
    for number in range(3):
        kept.renew()
        added = 0
        while kept.wanted:
            kept.add(Examples(ForwardCall(None), np.full(size, number), "training"))
            added += 1
        assert added == len(kept._batches) == batches
        assert {int(batch.labels[0]) for batch in kept._batches} == {number}
    assert len(kept.newest(1_000_000)) == batches


def test_they_are_bounded_in_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keeping, "_BYTES", 5000)
    kept = keeping.KeptExamples(keeping.COMPOSED)
    for number in range(3):
        kept.renew()
        added = 0
        while kept.wanted:
            call = ForwardCall(None, args=(np.zeros(250, np.float32),)).keep()
            kept.add(Examples(call, np.full(2, number), "training"))
            added += 1
        assert len(kept._batches) == 5
        assert added <= 6
        assert {int(batch.labels[0]) for batch in kept._batches} == {number}


def test_a_training_keeps_the_newest_batches_as_the_iterator_composed_them() -> None:
    x, t = models.data(2048)
    model = models.MLP()
    optimizer = chainer.optimizers.Adam().setup(model)
    with bnwatch.chainer.watch(model, None, every=1, on_diagnosis="log") as watch:
        for start in range(0, 2048, 32):
            loss = F.softmax_cross_entropy(model(x[start : start + 32]), t[start : start + 32])
            model.cleargrads()
            loss.backward()
            optimizer.update()
            watch.step()
        kept = watch._session.lab.examples("training", 1_000_000)
    assert len(kept) >= 63
    for number, batch in enumerate(kept):
        np.testing.assert_array_equal(batch.inputs.args[0].array, x[32 * number : 32 * number + 32])
