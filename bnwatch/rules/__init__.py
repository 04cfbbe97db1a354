"""The catalogue: every rule, in id order, listed by hand."""

from __future__ import annotations

from bnwatch.rules._base import Finding, Rule, Threshold, rule
from bnwatch.rules._order import ORDER, rank
from bnwatch.rules.bn101_shared_batch_norm import shared_batch_norm
from bnwatch.rules.bn102_wrong_channel_axis import wrong_channel_axis
from bnwatch.rules.bn103_training_mode_evaluation import training_mode_evaluation
from bnwatch.rules.bn108_dropout_before_batch_norm import dropout_before_batch_norm
from bnwatch.rules.bn109_batch_norm_on_output import batch_norm_on_output
from bnwatch.rules.bn110_redundant_bias import redundant_bias
from bnwatch.rules.bn201_unsettled_running_statistics import unsettled_running_statistics
from bnwatch.rules.bn202_decay_out_of_range import decay_out_of_range
from bnwatch.rules.bn203_never_updated_statistics import never_updated_statistics
from bnwatch.rules.bn205_single_sample_batch import single_sample_batch
from bnwatch.rules.bn212_unsynchronized_replicas import unsynchronized_replicas
from bnwatch.rules.bn301_evaluation_gap_from_batch_norm import evaluation_gap_from_batch_norm
from bnwatch.rules.bn302_chance_level_accuracy import chance_level_accuracy
from bnwatch.rules.bn304_evaluation_input_shift import evaluation_input_shift
from bnwatch.rules.bn306_dead_bottleneck import dead_bottleneck
from bnwatch.rules.bn401_non_finite_statistics import non_finite_statistics
from bnwatch.rules.bn402_negative_running_variance import negative_running_variance
from bnwatch.rules.bn403_half_precision_overflow import half_precision_overflow
from bnwatch.rules.bn404_constant_channel import constant_channel
from bnwatch.rules.bn405_epsilon_dominates import epsilon_dominates
from bnwatch.rules.bn901_unused_allowance import unused_allowance
from bnwatch.rules.bn902_nothing_watched import nothing_watched
from bnwatch.rules.bn903_watch_disabled import watch_disabled
from bnwatch.rules.bn904_experiment_not_possible import experiment_not_possible

CATALOGUE = (
    shared_batch_norm,
    wrong_channel_axis,
    training_mode_evaluation,
    dropout_before_batch_norm,
    batch_norm_on_output,
    redundant_bias,
    unsettled_running_statistics,
    decay_out_of_range,
    never_updated_statistics,
    single_sample_batch,
    unsynchronized_replicas,
    evaluation_gap_from_batch_norm,
    chance_level_accuracy,
    evaluation_input_shift,
    dead_bottleneck,
    non_finite_statistics,
    negative_running_variance,
    half_precision_overflow,
    constant_channel,
    epsilon_dominates,
    unused_allowance,
    nothing_watched,
    watch_disabled,
    experiment_not_possible,
)

BEFORE_TRAINING = (
    shared_batch_norm,
    wrong_channel_axis,
    dropout_before_batch_norm,
    batch_norm_on_output,
    redundant_bias,
    decay_out_of_range,
    single_sample_batch,
    nothing_watched,
)
"""The rules that have something to say before the first step."""

__all__ = ["BEFORE_TRAINING", "CATALOGUE", "ORDER", "Finding", "Rule", "Threshold", "rank", "rule"]
