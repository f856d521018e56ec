"""`batch_norm`."""

from __future__ import annotations

import torch
from torch import Tensor

from ._affine import affine_grads, check_channels
from ._call import NO_LISTENER, Call, check_probe, refuse_double_backward


class _BatchNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, x, weight, bias, probe, weight_probe, bias_probe, call,
        running_mean, running_var, training, momentum, eps,
    ):  # fmt: skip
        y, mean, rstd = torch.native_batch_norm(
            x, weight, bias, running_mean, running_var, training, momentum, eps
        )
        if not training:
            mean, rstd = running_mean.clone(), (running_var + eps).rsqrt()
        ctx.save_for_backward(x, mean, rstd, weight, bias, probe)
        ctx.call, ctx.training = call, training
        return y

    @staticmethod
    def backward(ctx, grad_out):
        refuse_double_backward()
        x, mean, rstd, *affine = ctx.saved_tensors
        view, one = (x.shape[0], 1, x.shape[1], x.shape[2:].numel()), (1, 1, x.shape[1], 1)
        grad_x, *grads = affine_grads(
            ctx, affine, view, grad_out, x, mean.reshape(one), rstd.reshape(one), ctx.training
        )
        if ctx.needs_input_grad[0] and not ctx.training:
            scale = rstd * affine[0]
            grad_x = grad_out * scale.reshape(1, -1, *(1,) * (x.dim() - 2)).to(x.dtype)
        return grad_x, *grads, *(None,) * 6


def batch_norm(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
    probe: Tensor,
    weight_probe: Tensor | None = None,
    bias_probe: Tensor | None = None,
    call: Call = NO_LISTENER,
) -> Tensor:
    """`torch.nn.functional.batch_norm` that measures; x [b, C, …].

    In training mode the samples of a batch are coupled, and no gradient belongs to one alone:
    measured is sample i's contribution c_i to the batch's gradient, whose sum that gradient is.

    Raises:
        ValueError: an input without channels, or more samples than columns.

    Example:
        >>> x = torch.tensor([[1.], [3.]])  # normalised: -1, 1
        >>> w, probe = torch.ones(1).requires_grad_(), torch.zeros(2, 2).requires_grad_()
        >>> (batch_norm(x, None, None, w, None, True, 0.1, 0.0, probe) * x).sum().backward()
        >>> [round(n, 3) for n in probe.grad[0].tolist()]
        [1.0, 9.0]
    """
    check_channels(x, "batch_norm")
    check_probe(x.shape[0], probe, "batch_norm")
    return _BatchNorm.apply(
        x, weight, bias, probe, weight_probe, bias_probe, call,
        running_mean, running_var, training, momentum, eps,
    )  # type: ignore[return-value]  # fmt: skip
