"""Per-example gradients of the trainable parameters."""

from dsel_assets.gradients.per_example import GradientBlock, gradient_blocks

__all__ = ["GradientBlock", "gradient_blocks"]
