"""Watch batch-normalization layers while a network trains."""

from __future__ import annotations

from bnwatch.diagnosis import BatchNormError, BatchNormWarning, Diagnosis, Severity
from bnwatch.watch import Watch

__version__ = "0.1.0"

__all__ = ["BatchNormError", "BatchNormWarning", "Diagnosis", "Severity", "Watch", "__version__"]
