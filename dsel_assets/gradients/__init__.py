"""Per-example gradients of the trainable parameters, or their sketches without the gradients."""

from dsel_assets.gradients.factored import SketchBlock, sketch_blocks
from dsel_assets.gradients.objectives import (
    Objective,
    loss_at_drawn,
    loss_at_predicted,
    output_directions,
    outputs_along,
)
from dsel_assets.gradients.per_example import GradientBlock, gradient_blocks

__all__ = [
    "GradientBlock",
    "Objective",
    "SketchBlock",
    "gradient_blocks",
    "loss_at_drawn",
    "loss_at_predicted",
    "output_directions",
    "outputs_along",
    "sketch_blocks",
]
