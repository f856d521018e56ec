"""The four numbers of the coordinate-wise tests: what the updates return, and in which order.

The kernels write them in this order, too: `csrc/cpu/reductions.h`, `AdagradRow` of
`csrc/cuda/kernels.h`, and behind ‖g‖² `triton_kernels/adagrad.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class CoordinateReductions(NamedTuple):
    """What the coordinate-wise tests need of all coordinates, from the update's own pass.

    The ops return a tensor of them, [4] in float64.

    Attributes:
        variance_sum: Σ_j var_j.
        max_ratio: max_j var_j / ḡ_j², 0/0 counting as 0.
        variance_metric: Σ_j var_j / (√v_j + eps), v AdaGrad's accumulator.
        grad_metric: Σ_j ḡ_j² / (√v_j + eps).
    """

    variance_sum: float
    max_ratio: float
    variance_metric: float
    grad_metric: float


COUNT = len(CoordinateReductions._fields)
"""How many there are."""
MAX_RATIO = CoordinateReductions._fields.index("max_ratio")
"""Where the one that is a maximum lies; the others are sums over coordinates."""


def pooled(parts: Sequence[Tensor]) -> Tensor:
    """Those of several sets of coordinates, at least one, as one."""
    if len(parts) == 1:
        return parts[0]
    table = torch.stack(list(parts))
    found = table.sum(0)
    found[MAX_RATIO] = table[:, MAX_RATIO].max()
    return found


def unscaled(reductions: Tensor, scale: float) -> Tensor:
    """Those of g, from those of scale · g: the sums are of squares, the ratio is the same."""
    found = reductions / scale**2
    found[MAX_RATIO] = reductions[MAX_RATIO]
    return found
