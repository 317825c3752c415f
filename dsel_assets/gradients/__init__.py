"""Per-example gradients of the trainable parameters, or their sketches without the gradients."""

from dsel_assets.gradients.factored import SketchBlock, sketch_blocks
from dsel_assets.gradients.per_example import GradientBlock, gradient_blocks

__all__ = ["GradientBlock", "SketchBlock", "gradient_blocks", "sketch_blocks"]
