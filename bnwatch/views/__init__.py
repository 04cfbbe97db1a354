"""A run as JSON for pictures: what the TensorBoard tab and the HTML report show, without TensorBoard.

`RunViews` finds the runs below a directory, `RunView` answers for one of them, and `RunViews.answer` is both by route
and parameters. Every answer is made of JSON's types and carries ``"schema": 1``.

How it reads: of an event file everything but the samples is read once and kept; of a sample its step, what is known of
the training, and its place in the file (`bnwatch.sinks.tensorboard.file`). A refresh reads what was added. A table
reads one sample, a line the rows of one layer in every sample, and a heatmap folds every sample once into at most 400
columns, for half a second a request: ``complete`` says which share of the samples is in it.
"""

from __future__ import annotations

from bnwatch.views.run import RunView, UnknownError
from bnwatch.views.runs import ROUTES, MisuseError, RunViews, find_records, rule_answer

__all__ = ["ROUTES", "MisuseError", "RunView", "RunViews", "UnknownError", "find_records", "rule_answer"]
