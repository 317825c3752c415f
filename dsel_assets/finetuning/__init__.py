"""The training loop and evaluation."""

from dsel_assets.finetuning.training import Trained, predict, shuffled_batches, train

__all__ = ["Trained", "predict", "shuffled_batches", "train"]
