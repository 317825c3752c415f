"""Random linear operators R^p -> R^D that preserve inner products, and their adjoints.

    sketch = make_sketch("affd", in_features=p, out_features=1024, seed=0, name="conv1.weight")
    y = sketch(x)           # [..., p] -> [..., D]
    z = sketch.adjoint(y)   # [..., D] -> [..., p]

| kind          | cost a row    | D * relative variance of the squared norm                       |
|---------------|---------------|-----------------------------------------------------------------|
| `countsketch` | p             | 2 at most; less when the energy lies within few runs of D       |
| `affd`        | p log p       | about 2 (1 + 2 D/block), below 8 on structured inputs           |
| `gaussian`    | p D           | 2 exactly; the reference, slow                                  |
"""

from dsel_assets.sketching.kinds import KINDS, make_sketch
from dsel_assets.sketching.model import ModelSketch
from dsel_assets.sketching.operator import Sketch

__all__ = ["KINDS", "ModelSketch", "Sketch", "make_sketch"]
