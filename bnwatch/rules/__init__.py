"""The catalogue: every rule, in id order, listed by hand."""

from __future__ import annotations

from bnwatch.rules._base import Finding, Rule, Threshold, rule
from bnwatch.rules.bn101_shared_batch_norm import shared_batch_norm
from bnwatch.rules.bn103_training_mode_evaluation import training_mode_evaluation
from bnwatch.rules.bn201_unsettled_running_statistics import unsettled_running_statistics
from bnwatch.rules.bn203_never_updated_statistics import never_updated_statistics
from bnwatch.rules.bn205_single_sample_batch import single_sample_batch
from bnwatch.rules.bn301_evaluation_gap_from_batch_norm import evaluation_gap_from_batch_norm
from bnwatch.rules.bn302_chance_level_accuracy import chance_level_accuracy
from bnwatch.rules.bn304_evaluation_input_shift import evaluation_input_shift
from bnwatch.rules.bn306_dead_bottleneck import dead_bottleneck
from bnwatch.rules.bn401_non_finite_statistics import non_finite_statistics
from bnwatch.rules.bn901_unused_allowance import unused_allowance
from bnwatch.rules.bn902_nothing_watched import nothing_watched
from bnwatch.rules.bn903_watch_disabled import watch_disabled
from bnwatch.rules.bn904_experiment_not_possible import experiment_not_possible

CATALOGUE = (
    shared_batch_norm,
    training_mode_evaluation,
    unsettled_running_statistics,
    never_updated_statistics,
    single_sample_batch,
    evaluation_gap_from_batch_norm,
    chance_level_accuracy,
    evaluation_input_shift,
    dead_bottleneck,
    non_finite_statistics,
    unused_allowance,
    nothing_watched,
    watch_disabled,
    experiment_not_possible,
)

__all__ = ["CATALOGUE", "Finding", "Rule", "Threshold", "rule"]
