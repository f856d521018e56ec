"""`embedding`."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import ops
from ._call import NO_LISTENER, Call, check_probe, counted, notify, refuse_double_backward


class _Embedding(torch.autograd.Function):
    @staticmethod
    def forward(ctx, indices, weight, padding_idx, probe, weight_probe, call):
        ctx.save_for_backward(indices, probe)
        ctx.call, ctx.padding_idx = call, padding_idx
        ctx.rows, ctx.dtype = weight.shape[0], weight.dtype
        return F.embedding(indices, weight)

    @staticmethod
    def backward(ctx, grad_out):
        refuse_double_backward()
        indices, probe = ctx.saved_tensors
        notify(ctx.call, indices, grad_out)
        grad_w, grad_p, sums_w = ops.embedding_weight_grad(
            grad_out, indices, ctx.rows, ctx.padding_idx, probe.shape[1], ctx.needs_input_grad[4]
        )
        return (
            None,
            grad_w.to(ctx.dtype),
            None,
            counted(grad_p, probe, ctx.call, indices, grad_out),
            sums_w if ctx.needs_input_grad[4] else None,
            None,
        )


def embedding(
    indices: Tensor,
    weight: Tensor,
    padding_idx: int | None,
    probe: Tensor,
    weight_probe: Tensor | None = None,
    call: Call = NO_LISTENER,
) -> Tensor:
    """`torch.nn.functional.embedding` that measures.

    Args:
        indices: tokens [b, T, …]; dimension 0 counts the samples.
        weight: [V, D].
        padding_idx: the token without gradient, or None.
        probe: see the package, as the others below.
        weight_probe: as there.
        call: as there.

    Raises:
        ValueError: indices of one dimension: they might be positions, shared by all samples,
            and nothing distinguishes them from one token for each sample.

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
    row = -1 if padding_idx is None else padding_idx % weight.shape[0]
    return _Embedding.apply(indices, weight, row, probe, weight_probe, call)  # type: ignore[return-value]
