"""The catalogue: every rule, in id order, listed by hand."""

from __future__ import annotations

from bnwatch.rules._base import Finding, Rule, Threshold, rule
from bnwatch.rules.bn101_shared_batch_norm import shared_batch_norm
from bnwatch.rules.bn102_wrong_channel_axis import wrong_channel_axis
from bnwatch.rules.bn103_training_mode_evaluation import training_mode_evaluation
from bnwatch.rules.bn104_inference_mode_training import inference_mode_training
from bnwatch.rules.bn105_frozen_layer_in_training_mode import frozen_layer_in_training_mode
from bnwatch.rules.bn106_unintended_statistics_update import unintended_statistics_update
from bnwatch.rules.bn107_left_in_evaluation_mode import left_in_evaluation_mode
from bnwatch.rules.bn108_dropout_before_batch_norm import dropout_before_batch_norm
from bnwatch.rules.bn109_batch_norm_on_output import batch_norm_on_output
from bnwatch.rules.bn110_redundant_bias import redundant_bias
from bnwatch.rules.bn201_unsettled_running_statistics import unsettled_running_statistics
from bnwatch.rules.bn202_decay_out_of_range import decay_out_of_range
from bnwatch.rules.bn203_never_updated_statistics import never_updated_statistics
from bnwatch.rules.bn204_too_few_samples import too_few_samples
from bnwatch.rules.bn205_single_sample_batch import single_sample_batch
from bnwatch.rules.bn206_trailing_batch import trailing_batch
from bnwatch.rules.bn207_unrepresentative_batches import unrepresentative_batches
from bnwatch.rules.bn208_alternating_batches import alternating_batches
from bnwatch.rules.bn209_outlier_batches import outlier_batches
from bnwatch.rules.bn210_stale_statistics import stale_statistics
from bnwatch.rules.bn211_statistics_not_restored import statistics_not_restored
from bnwatch.rules.bn212_unsynchronized_replicas import unsynchronized_replicas
from bnwatch.rules.bn213_micro_batch_statistics import micro_batch_statistics
from bnwatch.rules.bn214_padding_in_statistics import padding_in_statistics
from bnwatch.rules.bn301_evaluation_gap_from_batch_norm import evaluation_gap_from_batch_norm
from bnwatch.rules.bn302_chance_level_accuracy import chance_level_accuracy
from bnwatch.rules.bn303_erratic_evaluation import erratic_evaluation
from bnwatch.rules.bn304_evaluation_input_shift import evaluation_input_shift
from bnwatch.rules.bn305_gap_not_from_batch_norm import gap_not_from_batch_norm
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
    inference_mode_training,
    frozen_layer_in_training_mode,
    unintended_statistics_update,
    left_in_evaluation_mode,
    dropout_before_batch_norm,
    batch_norm_on_output,
    redundant_bias,
    unsettled_running_statistics,
    decay_out_of_range,
    never_updated_statistics,
    too_few_samples,
    single_sample_batch,
    trailing_batch,
    unrepresentative_batches,
    alternating_batches,
    outlier_batches,
    stale_statistics,
    statistics_not_restored,
    unsynchronized_replicas,
    micro_batch_statistics,
    padding_in_statistics,
    evaluation_gap_from_batch_norm,
    chance_level_accuracy,
    erratic_evaluation,
    evaluation_input_shift,
    gap_not_from_batch_norm,
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
    micro_batch_statistics,
    padding_in_statistics,
    nothing_watched,
)
"""The rules that have something to say before the first step."""

__all__ = ["BEFORE_TRAINING", "CATALOGUE", "Finding", "Rule", "Threshold", "rule"]
