"""What TensorBoard loads at its start. It imports this without a ``try``: nothing here may raise."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from tensorboard.plugins.base_plugin import TBLoader

if TYPE_CHECKING:
    from tensorboard.plugins.base_plugin import TBContext

_log = logging.getLogger("bnwatch")


class BNWatchLoader(TBLoader):
    """Makes the plugin, or none where that fails: TensorBoard goes on without the tab."""

    def load(self, context: TBContext) -> Any:
        """Return the plugin."""
        try:
            from bnwatch.dashboard.plugin import BNWatchPlugin

            plugin = BNWatchPlugin(context)
            plugin.read_ahead()
        except Exception:  # noqa: BLE001  # whatever it is, TensorBoard is to start
            _log.warning("bnwatch: the tab BN Watch could not be loaded", exc_info=True)
            return None
        return plugin
