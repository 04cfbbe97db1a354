"""Watch batch-normalization layers while a network trains."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from bnwatch.diagnosis import BatchNormError, BatchNormWarning, Diagnosis, Severity

if TYPE_CHECKING:
    from bnwatch.watch import Watch

__version__ = "0.1.0"

__all__ = ["BatchNormError", "BatchNormWarning", "Diagnosis", "Severity", "Watch", "__version__"]


def __getattr__(name: str) -> Any:
    """Return `Watch`, imported where it is asked for: the command line starts in half the time without."""
    if name == "Watch":
        from bnwatch.watch import Watch

        return Watch
    msg = f"module {__name__!r} has no attribute {name!r}"
    raise AttributeError(msg)
