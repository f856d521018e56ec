"""x Wᵀ + bias by the faster of the two libraries that PyTorch brings for float32 on the CPU.

`torch.nn.functional.linear` takes MKL for float32, and oneDNN for low precision only. Measured on
an AMD EPYC with AVX-512, one thread, torch 2.13: MKL 88 to 112 GFLOP/s, oneDNN 148 to 244. (MKL
probably leaves AVX-512 unused on processors of other makers than Intel; on Intel's nothing was
measured.) A call costs some 10 µs more, so that small products stay where they are. Compiled graphs
keep what Inductor makes of them.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

LEAST = 1 << 19
"""Multiplications from which on oneDNN is the faster one: 64·64·64 is not, 256·784·10 is."""


def _find() -> Any:
    """The op by which Inductor calls oneDNN's product, or None."""
    if not torch.backends.mkldnn.is_available():
        return None
    packet = getattr(torch.ops.mkldnn, "_linear_pointwise", None)
    return None if packet is None else packet.default


_onednn = _find()


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x Wᵀ + bias, not differentiable; x [..., I], weight [O, I] with any strides, bias [O].

    Example:
        >>> product(torch.ones(2, 3), torch.ones(1, 3), torch.ones(1)).tolist()
        [[4.0], [4.0]]
    """
    if (
        _onednn is None
        or x.numel() * weight.shape[0] < LEAST
        or x.dtype != torch.float32
        or x.device.type != "cpu"
        or torch.compiler.is_compiling()
        or not torch.backends.mkldnn.enabled  # pyright: ignore[reportAttributeAccessIssue]
    ):
        return F.linear(x, weight, bias)
    return _onednn(x, weight, bias, "none", [], "")
