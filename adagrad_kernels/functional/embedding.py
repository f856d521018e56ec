"""`embedding`."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import ops
from ._call import NO_LISTENER, Call, check_probe, counted, notify, refuse_double_backward


class _Embedding(torch.autograd.Function):
    @staticmethod
    def forward(ctx, indices, weight, padding_idx, probe, weight_probe, call, sparse):
        ctx.save_for_backward(indices, probe)
        ctx.call, ctx.padding_idx, ctx.sparse = call, padding_idx, sparse
        ctx.rows, ctx.dtype = weight.shape[0], weight.dtype
        return F.embedding(indices, weight)

    @staticmethod
    def backward(ctx, grad_out):
        refuse_double_backward()
        indices, probe = ctx.saved_tensors
        notify(ctx.call, indices, grad_out)
        capacity, coordinates = probe.shape[1], ctx.needs_input_grad[4]
        if ctx.sparse:
            grad_w, grad_p = _sparse(ctx, grad_out, indices, capacity)
            sums_w = None
        else:
            grad_w, grad_p, sums_w = ops.embedding_weight_grad(
                grad_out, indices, ctx.rows, ctx.padding_idx, capacity, coordinates
            )
        return (
            None,
            grad_w.to(ctx.dtype),
            None,
            counted(grad_p, probe, ctx.call, indices, grad_out),
            sums_w if coordinates else None,
            None,
            None,
        )


def _sparse(ctx: Any, grad_out: Tensor, indices: Tensor, capacity: int) -> tuple[Tensor, Tensor]:
    """The gradient of the rows that occur, sorted, as a sparse tensor; and that of the probe."""
    if ctx.padding_idx >= 0:
        padding = (indices == ctx.padding_idx).unsqueeze(-1)
        grad_out = grad_out.masked_fill(padding, 0)
    rows, inverse = torch.unique(indices, return_inverse=True)
    values, grad_p, _ = ops.embedding_weight_grad(grad_out, inverse, len(rows), -1, capacity)
    grad = torch.sparse_coo_tensor(
        rows.long().unsqueeze(0), values, (ctx.rows, values.shape[1]), is_coalesced=True,
        check_invariants=False,
    )  # fmt: skip
    return grad, grad_p


def embedding(
    indices: Tensor,
    weight: Tensor,
    padding_idx: int | None,
    probe: Tensor,
    weight_probe: Tensor | None = None,
    call: Call = NO_LISTENER,
    sparse: bool = False,
) -> Tensor:
    """`torch.nn.functional.embedding` that measures.

    Args:
        indices: tokens [b, T, …]; dimension 0 counts the samples.
        weight: [V, D].
        padding_idx: the token without gradient, or None.
        probe: see the package, as the others below.
        weight_probe: as there.
        call: as there.
        sparse: whether the weight's gradient is a sparse tensor (coalesced) of the rows that occur;
            without coordinate sums, and not compiled.

    Raises:
        ValueError: indices of one dimension: they might be positions, shared by all samples,
            and nothing distinguishes them from one token for each sample; `sparse` with
            `weight_probe`.
        RuntimeError: `sparse` in a compiled model.

    Example:
        >>> tokens = torch.tensor([[0, 0], [1, 0]])
        >>> w, probe = torch.zeros(2, 1).requires_grad_(), torch.zeros(2, 2).requires_grad_()
        >>> embedding(tokens, w, None, probe).sum().backward()
        >>> probe.grad[0].tolist()
        [4.0, 2.0]
    """
    if indices.dim() < 2:
        raise ValueError(
            f"embedding: indices of shape {list(indices.shape)} do not distinguish samples from "
            "positions. One token for each sample: give indices.unsqueeze(1); positions shared by "
            "all samples: give positions.expand(samples, -1)"
        )
    check_probe(indices.shape[0], probe, "embedding")
    if sparse and weight_probe is not None:
        raise ValueError("embedding: coordinate sums of a sparse gradient are not measured")
    if sparse and torch.compiler.is_compiling():
        raise RuntimeError(
            "embedding: a sparse gradient cannot be compiled; build the layer with sparse=False"
        )
    row = -1 if padding_idx is None else padding_idx % weight.shape[0]
    return _Embedding.apply(indices, weight, row, probe, weight_probe, call, sparse)  # type: ignore[return-value]
