"""Experiments called by hand, and the examples they are made on."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import numpy as np

from bnwatch import evidence
from bnwatch.evidence import Examples, ExperimentNotPossibleError
from bnwatch.keras.backends import backend_of
from bnwatch.keras.keep import batch_of, leaves, mapped, size
from bnwatch.keras.laboratory import KerasLaboratory
from bnwatch.sinks.console import ProgressLine

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Mapping, Sequence

    from bnwatch.evidence import Attribution, Cells, Localisation, Recalibration, Split
    from bnwatch.keras.laboratory import Shelf


class Given:
    """Examples that the user gave: ``(x, y)``, or an iterable of such batches; nothing is read before it is asked for.

    Args:
        data: the examples.
        origin: what to call them.
        batch_size: examples a batch where arrays are given.
        labelled: whether a batch needs class labels; without, ``x`` alone will do.
    """

    def __init__(self, data: Any, origin: str, batch_size: int, *, labelled: bool = True) -> None:
        """Take the examples."""
        self._data, self._origin, self._batch_size = data, origin, batch_size
        self._batch: Callable[[Any, str], Examples] = batch_of if labelled else _unlabelled

    def batches(self, split: Split, limit: int) -> Sequence[Examples]:
        """Return whole batches of at most ``limit`` examples, one at least.

        Raises:
            ExperimentNotPossibleError: there are none, or their targets are no classes.
        """
        chosen: list[Examples] = []
        for data in self.composed():
            if chosen and size(data) + sum(len(batch.labels) for batch in chosen) > limit:
                break
            chosen.append(self._batch(data, self._origin))
        if not chosen:
            msg = f"there are no {split} examples"
            raise ExperimentNotPossibleError(msg)
        return chosen

    def composed(self) -> Iterable[Any]:
        """Return the batches as they are given, or cut from the arrays."""
        arrays = (self._data,) if hasattr(self._data, "shape") else self._data
        if not isinstance(arrays, tuple) or not all(hasattr(leaf, "shape") for leaf in leaves(arrays)):
            return arrays  # batches already
        starts = range(0, size(arrays), self._batch_size)
        return (_cut(arrays, slice(start, start + self._batch_size)) for start in starts)


def _cut(arrays: Any, rows: slice) -> Any:
    return mapped(lambda leaf: leaf[rows], arrays)


def _unlabelled(data: Any, origin: str) -> Examples:
    inputs = data[0] if isinstance(data, tuple | list) else data
    return Examples(inputs, np.zeros(size(inputs), np.int64), origin)


def probes(probe: tuple[Any, Any]) -> dict[Split, Shelf]:
    """Return the user's ``probe`` in place of both splits."""
    given = Given(tuple(probe), "probe", evidence.PROBE_BATCH)
    return {"training": given, "evaluation": given}


def crosscheck(model: Any, *, train: Any = None, eval: Any = None, batch_size: int = 32) -> Cells:  # noqa: A002
    """Measure the accuracy on the same examples with batch, running and re-estimated statistics.

    Nothing is changed: not the weights, not the running statistics, not any random state.

    Args:
        model: a built Keras model that classifies.
        train: training data as ``(x, y)``, or an iterable of such batches composed as in training.
        eval: evaluation data, likewise.
        batch_size: examples a batch where arrays are given; use that of the training.

    Raises:
        ExperimentNotPossibleError: there are no data, or they are no classification.
    """
    given = {"training": train, "evaluation": eval}
    shelves = {split: Given(data, split, batch_size) for split, data in given.items() if data is not None}
    return evidence.crosscheck(_laboratory(model, shelves))


def attribute(model: Any, data: Any, *, batch_size: int = 32) -> Attribution:
    """Measure which layer or call site costs how much accuracy, by swapping statistics one place at a time.

    Nothing is changed. One pass over the data for all running and all batch statistics, and two for each layer.

    Args:
        model: a built Keras model that classifies.
        data: ``(x, y)``, or an iterable of such batches.
        batch_size: examples a batch where arrays are given; use that of the training.

    Returns:
        The layers and call sites, the one that costs most first, each with the accuracy that batch statistics there
        win back and its 95 % interval.

    Raises:
        ExperimentNotPossibleError: there are no data, or they are no classification.
    """
    return evidence.attribute(_laboratory(model, {"evaluation": Given(data, "given", batch_size)}), "evaluation")


def localise(model: Any, data: Any, *, batch_size: int = 32) -> Localisation:
    """Find the first layer from which on the output is the same for every example, under batch statistics.

    Nothing is changed.

    Args:
        model: a built Keras model.
        data: ``(x, y)`` or ``x``, or an iterable of such batches; targets are not looked at.
        batch_size: examples a batch where arrays are given.

    Raises:
        ExperimentNotPossibleError: there are no data, or one example a batch.
    """
    return evidence.localise(_laboratory(model, {"training": Given(data, "given", batch_size, labelled=False)}))


def recalibrate(
    model: Any, batches: Any, layers: Collection[str] | None = None, *, exact: bool = False, batch_size: int = 32
) -> Recalibration:
    """Set running statistics to the mean and variance over training batches, with the weights as they are.

    As in PreciseBN (Wu and Johnson 2021, arXiv:2105.07576).

    Args:
        model: a built Keras model; its running statistics are changed, nothing else is.
        batches: training data: ``(x, y)`` or ``x``, or an iterable of such batches, as large and as composed as those
            of the training; targets are not looked at.
        layers: paths of layers, or patterns such as ``encoder/*``; all layers if None.
        exact: measure layer by layer, each behind layers that normalize with their new running statistics, as they
            will in evaluation: one pass over the batches a layer. Else one pass in which every layer normalizes with
            batch statistics.
        batch_size: examples a batch where arrays are given; use that of the training.

    Returns:
        How far each layer moved.

    Raises:
        ValueError: there are no batches; a name fits no layer; a layer is called at several places that see different
            data, so that no one mean and variance fits. Nothing is changed then.
        ExperimentNotPossibleError: the model cannot be called on a batch. Nothing is changed then.
    """
    given = Given(batches, "training", batch_size, labelled=False)
    chosen = [_unlabelled(data, "training") for data in given.composed()]
    return evidence.recalibrate(_laboratory(model, {}), chosen, layers, exact=exact, progress=ProgressLine())


def _laboratory(model: Any, shelves: Mapping[str, Given]) -> KerasLaboratory:
    return KerasLaboratory(backend_of(model), cast("dict[Split, Shelf]", dict(shelves)))
