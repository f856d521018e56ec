"""What the families share: precision, checks, the probe."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64, float32 for everything lower."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def require(condition: bool, message: str) -> None:
    """Raises RuntimeError, as the compiled kernels do, unless the condition holds."""
    if not condition:
        raise RuntimeError(message)


def probe_of(norms: Tensor, capacity: int) -> Tensor:
    """The probe's gradient [2, capacity]: the norms of the samples, and a call for each."""
    if norms.shape[0] > capacity:
        raise RuntimeError(f"{norms.shape[0]} samples do not fit a probe of capacity {capacity}")
    return F.pad(torch.stack([norms, torch.ones_like(norms)]), (0, capacity - norms.shape[0]))
