"""Random linear operators R^p -> R^D that preserve inner products, and their adjoints.

    sketch = make_sketch("affd", in_features=p, out_features=1024, seed=0, name="conv1.weight")
    y = sketch(x)           # [..., p] -> [..., D]
    z = sketch.adjoint(y)   # [..., D] -> [..., p]

| kind          | cost a row | V = D * relative variance of |Sx|^2           | fails on            |
|---------------|------------|-----------------------------------------------|---------------------|
| `countsketch` | p          | 2 (1 - sum of the squared shares of its runs) | nothing             |
| `sjlt`        | c p        | 2 (1 - sum x_i^4)                             | nothing             |
| `srht`        | p log n    | 2 at most                                     | nothing             |
| `affd`        | p log n    | about 2 (1 + 2 D/n), below 8                  | nothing             |
| `affd_whole`  | p log p    | the same with n = p; the paper's form         | nothing (*)         |
| `fjl`         | p log p    | 8 - 6 sum x_i^4                               | nothing (*)         |
| `afjl`        | p          | about 8 on spread inputs                      | strides of D        |
| `ffd`         | p log D    | 2 on spread inputs                            | few frequencies     |
| `qk`          | p sqrt(D)  | 2 on spread inputs                            | rows, columns, rank |
| `tensorsketch`| T D log D  | 2 to 8; of a matrix, by its factors           | nothing             |
| `logra`       | T sqrt(D)s | 2 + 4 sqrt(D) / effective rank; likewise      | rank one            |
| `rademacher`  | p D        | 2 (1 - sum x_i^4); a reference, slow          | nothing             |
| `gaussian`    | p D        | 2; the reference, slow                        | nothing             |

|x| = 1, n is the size of a block, 2^14 at least; T the tokens of a layer, s its rows and columns;
c the nonzeros. Where a kind fails, V grows with D; such a kind
promises no `variance`. (*) But few coordinates with the preconditioner "orthogonal".
"""

from typing import TYPE_CHECKING

from dsel_assets.lazily import lazily

if TYPE_CHECKING:
    from dsel_assets.sketching.kinds import KINDS, make_sketch
    from dsel_assets.sketching.matrix import MatrixSketch
    from dsel_assets.sketching.model import ModelSketch
    from dsel_assets.sketching.operator import Sketch

# torch loads when one of these is first asked for
__getattr__ = lazily(
    __name__,
    {
        "KINDS": "kinds",
        "MatrixSketch": "matrix",
        "ModelSketch": "model",
        "Sketch": "operator",
        "make_sketch": "kinds",
    },
)


__all__ = ["KINDS", "MatrixSketch", "ModelSketch", "Sketch", "make_sketch"]
