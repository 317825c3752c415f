"""Scores, paired statistics, verdicts and plots."""

from dsel_assets.evaluation.paired import Difference, holm, paired_difference, verdict
from dsel_assets.evaluation.scores import scores

__all__ = ["Difference", "holm", "paired_difference", "scores", "verdict"]
