"""Experiments, framework-free: what they return, and how they are run through a laboratory.

An experiment asks a *laboratory* (one in each adapter) for the outputs of the same model on the same examples under
other statistics. Nothing is updated, dropout is off, and everything is restored: `Laboratory` says who promises what.
"""

from __future__ import annotations

from bnwatch.evidence.attribution import Attribution, Difference, SiteCost, attribute
from bnwatch.evidence.cells import Cell, Cells, Rows, crosscheck
from bnwatch.evidence.composition import Composition, SiteComposition, composition
from bnwatch.evidence.entering import Entering, SiteShift, entering
from bnwatch.evidence.laboratory import (
    ENOUGH,
    EXAMPLES,
    LASTING_SHARE,
    LEAST_SECONDS,
    PROBE_BATCH,
    SPLITS,
    Budget,
    Examples,
    ExperimentNotPossibleError,
    Laboratory,
    MeanAndVariance,
    Progress,
    SiteMoments,
    Split,
    Statistics,
    seconds_after,
)
from bnwatch.evidence.looks import (
    NEAR_BOUND,
    SAMPLE,
    LayerLook,
    Localisation,
    Look,
    Parameter,
    Seen,
    Updates,
    bounds_of,
    entries,
    localise,
    look,
    spread_over,
)
from bnwatch.evidence.recalibration import LayerChange, Recalibration, recalibrate
from bnwatch.evidence.targets import class_indices, two_columns

__all__ = [
    "ENOUGH",
    "EXAMPLES",
    "LASTING_SHARE",
    "LEAST_SECONDS",
    "NEAR_BOUND",
    "PROBE_BATCH",
    "SAMPLE",
    "SPLITS",
    "Attribution",
    "Budget",
    "Cell",
    "Cells",
    "Composition",
    "Difference",
    "Entering",
    "Examples",
    "ExperimentNotPossibleError",
    "Laboratory",
    "LayerChange",
    "LayerLook",
    "Localisation",
    "Look",
    "MeanAndVariance",
    "Parameter",
    "Progress",
    "Recalibration",
    "Rows",
    "Seen",
    "SiteComposition",
    "SiteCost",
    "SiteMoments",
    "SiteShift",
    "Split",
    "Statistics",
    "Updates",
    "attribute",
    "bounds_of",
    "class_indices",
    "composition",
    "crosscheck",
    "entering",
    "entries",
    "localise",
    "look",
    "recalibrate",
    "seconds_after",
    "spread_over",
    "two_columns",
]
