"""`scale`: the affine part of a normalisation by itself."""

from __future__ import annotations

import torch
from torch import Tensor

from ._affine import affine_grads
from ._call import NO_LISTENER, Call, check_probe, refuse_double_backward


class _Scale(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, probe, weight_probe, bias_probe, call, axis):
        shape = (1,) * axis + tuple(weight.shape) + (1,) * (x.dim() - axis - weight.dim())
        ctx.save_for_backward(x, weight, bias, probe)
        ctx.call, ctx.axis, ctx.shape = call, axis, shape
        y = x * weight.reshape(shape)
        return y if bias is None else y + bias.reshape(shape)

    @staticmethod
    def backward(ctx, grad_out):
        refuse_double_backward()
        x, *affine = ctx.saved_tensors
        weight = affine[0]
        grad_x = grad_out * weight.reshape(ctx.shape) if ctx.needs_input_grad[0] else None
        channels = weight.numel()
        positions = x.shape[1 : ctx.axis].numel() if channels > 1 else 1
        inner = x.shape[1:].numel() // max(1, positions * channels)
        _, *grads = affine_grads(ctx, affine, (x.shape[0], positions, channels, inner), grad_out, x)
        return grad_x, *grads, None, None


def scale(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    axis: int,
    probe: Tensor,
    weight_probe: Tensor | None = None,
    bias_probe: Tensor | None = None,
    call: Call = NO_LISTENER,
) -> Tensor:
    """y = x · weight + bias that measures.

    Args:
        x: input [b, …]; weight and bias lie along the dimensions from `axis` on.
        weight: any shape that fits there, or one element for all.
        bias: of the weight's shape, or None.
        axis: at least 1.
        probe: see the package, as the others below.
        weight_probe: as there.
        bias_probe: as there.
        call: as there.

    Example:
        >>> x = torch.tensor([[1., 2.], [3., 0.]])
        >>> w, probe = torch.ones(2).requires_grad_(), torch.zeros(2, 2).requires_grad_()
        >>> scale(x, w, None, 1, probe).sum().backward()
        >>> probe.grad[0].tolist()
        [5.0, 9.0]
    """
    check_probe(x.shape[0], probe, "scale")
    return _Scale.apply(x, weight, bias, probe, weight_probe, bias_probe, call, axis)  # type: ignore[return-value]
