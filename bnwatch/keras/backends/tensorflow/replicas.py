"""Which replicas of a model this process runs, and where."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import tensorflow as tf

from bnwatch.keras.keep import leaves, mapped

if TYPE_CHECKING:
    from collections.abc import Hashable

    from bnwatch.keras.backends.base import Stored


class Replicas:
    """The replicas of one model in this process, counted from 0."""

    def __init__(self, strategy: Any) -> None:
        """Take the distribution strategy of a model; without one there is one replica, wherever TensorFlow runs it."""
        self._strategy = strategy
        in_sync = int(strategy.num_replicas_in_sync)
        self._devices: tuple[str, ...] = strategy.extended.worker_devices if in_sync > 1 else ()
        self.workers = in_sync // len(self._devices) if self._devices else 1

    def here(self) -> int:
        """Return the replica that is running, also while it is traced."""
        context = tf.distribute.get_replica_context()
        if context is None or not self._devices:
            return 0
        # counted over all workers, each of which has as many
        return int(tf.get_static_value(context.replica_id_in_sync_group)) % len(self._devices)

    def parts(self, data: Any) -> dict[int, Any]:
        """Return a batch by the replica that takes it: the whole of it where there is one, or one is running."""
        if not any(isinstance(leaf, tf.distribute.DistributedValues) for leaf in leaves(data)):
            return {self.here(): data}
        return {n: mapped(partial(self._part, n), data) for n in range(len(self._devices))}

    def _part(self, n: int, leaf: Any) -> Any:
        return self._strategy.experimental_local_results(leaf)[n]

    def device(self, replica: int) -> str | None:
        """Return the device of a replica; None leaves it to TensorFlow."""
        return self._devices[replica] if self._devices else None

    def counted_together(self, stored: tuple[Stored, ...]) -> tuple[Stored, ...]:
        """Return what is stored with the elements of all replicas where these take their statistics together.

        Other workers are taken to have as many: asking them would stop them.
        """
        if not self._devices:
            return stored
        counts: dict[Hashable, int] = {}
        for site in stored:
            counts[site.key] = counts.get(site.key, 0) + site.count * self.workers
        return tuple(
            replace(site, count=counts[site.key]) if getattr(site.watched.layer, "synchronized", False) else site
            for site in stored
        )
