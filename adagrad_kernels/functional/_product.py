"""x Wᵀ + bias by the faster of the two libraries that PyTorch brings for float32 on the CPU.

`torch.nn.functional.linear` takes MKL for float32, and oneDNN for low precision only. Measured on
an AMD EPYC with AVX-512, one thread, torch 2.13: MKL 88 to 112 GFLOP/s, oneDNN 148 to 244. (MKL
probably leaves AVX-512 unused on processors of other makers than Intel; on Intel's nothing was
measured.) A call costs some 10 µs more, so that small products stay where they are. In a compiled
graph Inductor would take MKL as well, and fails on oneDNN's op itself, so that it stands there as
an op of our own.
"""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from .._library import NAMESPACE

LEAST = 1 << 19
"""Multiplications from which on oneDNN is the faster one: 64·64·64 is not, 256·784·10 is."""
LEAST_WEIGHT = 1 << 16
"""Elements of a weight from which on a compiled graph takes oneDNN. A graph is for every size of
the batch, and asking for it would compile anew. A call of the op costs 18 µs more than one of
MKL, which a weight of 512·512 earns from 8 rows on."""


def _find() -> Any:
    """The op by which Inductor calls oneDNN's product, or None."""
    if not torch.backends.mkldnn.is_available():
        return None
    packet = getattr(torch.ops.mkldnn, "_linear_pointwise", None)
    return None if packet is None else packet.default


_onednn = _find()


@torch.library.custom_op(f"{NAMESPACE}::onednn_linear", mutates_args=(), device_types="cpu")
def _in_graph(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return _onednn(x, weight, bias, "none", [], "")


@_in_graph.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x Wᵀ + bias, not differentiable; x [..., I], weight [O, I] with any strides, bias [O].

    Example:
        >>> product(torch.ones(2, 3), torch.ones(1, 3), torch.ones(1)).tolist()
        [[4.0], [4.0]]
    """
    if torch.compiler.is_compiling():
        if weight.numel() >= LEAST_WEIGHT and _suits(x):
            return cast(Tensor, _in_graph(x, weight, bias))
        return F.linear(x, weight, bias)
    if x.numel() * weight.shape[0] < LEAST or not _suits(x):
        return F.linear(x, weight, bias)
    return _onednn(x, weight, bias, "none", [], "")


def product_of_rows(x: Tensor, weight: Tensor) -> Tensor:
    """x W, not differentiable; x [..., O], weight [O, I]. As `product` with Wᵀ.

    Example:
        >>> product_of_rows(torch.ones(2, 1), torch.ones(1, 3)).tolist()
        [[1.0, 1.0, 1.0], [1.0, 1.0, 1.0]]
    """
    if not torch.compiler.is_compiling() and x.numel() * weight.shape[1] < LEAST:
        return x @ weight
    return product(x, weight.t())


def _suits(x: Tensor) -> bool:
    """Whether oneDNN is there for it."""
    return (
        _onednn is not None
        and x.dtype == torch.float32
        and x.device.type == "cpu"
        and bool(torch.backends.mkldnn.enabled)  # pyright: ignore[reportAttributeAccessIssue]
    )
