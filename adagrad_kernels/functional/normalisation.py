"""`layer_norm`, `group_norm`, `batch_norm`, and `scale`: what their affine part is by itself.

Each keeps torch's kernel for the gradient of its input and measures the affine parameters with
`ops.scale_weight_grad`, on views [b, T, C, S] of its tensors (channels C, positions T before and
S after them).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import ops
from ._call import NOBODY, Call, as_grad, check_probe, counted, refuse_double_backward, tell

_aten = torch.ops.aten
_View = Callable[[Tensor], Tensor]


def _affine_grads(
    ctx: Any,
    affine: list[Tensor],
    grad_out: Tensor,
    x: Tensor,
    mean: Tensor | None = None,
    rstd: Tensor | None = None,
) -> tuple[Tensor | None, ...]:
    """Gradients of (weight, bias, probe, weight_probe, bias_probe), arguments 1 to 5 of a forward.

    `affine` is (weight, bias, probe); the other tensors are four-dimensional.
    """
    weight, bias, probe = affine
    need_w, need_b, _, need_ws, need_bs = ctx.needs_input_grad[1:6]
    statistics = [t.expand(len(x), *t.shape[1:]) for t in (mean, rstd) if t is not None]
    tell(ctx.call, x, *statistics, grad_out)
    grad_w, grad_b, grad_p, sums_w, sums_b = ops.scale_weight_grad(
        grad_out, x, mean, rstd, probe.shape[1], need_w, need_b, need_ws or need_bs
    )
    return (
        as_grad(grad_w.reshape(weight.shape), weight, True) if need_w else None,
        as_grad(grad_b.reshape(bias.shape), bias, True) if need_b else None,
        counted(grad_p, probe, ctx.call),
        sums_w.reshape(weight.shape) if need_ws else None,
        sums_b.reshape(bias.shape) if need_bs else None,
    )


class _LayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, probe, weight_probe, bias_probe, call, shape, eps):
        y, mean, rstd = torch.native_layer_norm(x, shape, weight, bias, eps)
        ctx.save_for_backward(x, mean, rstd, weight, bias, probe)
        ctx.call, ctx.shape = call, shape
        return y

    @staticmethod
    def backward(ctx, grad_out):
        refuse_double_backward()
        x, mean, rstd, *affine = ctx.saved_tensors
        weight, bias, _ = affine
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = _aten.native_layer_norm_backward.default(
                grad_out.contiguous(), x, ctx.shape, mean, rstd, weight, bias, [True, False, False]
            )[0]
        samples, channels = x.shape[0], weight.numel()
        positions = x.shape[1 : x.dim() - len(ctx.shape)].numel()
        view = (samples, positions, channels, 1)
        one = (samples, positions, 1, 1)
        grads = _affine_grads(
            ctx,
            affine,
            grad_out.reshape(view),
            x.reshape(view),
            mean.reshape(one),
            rstd.reshape(one),
        )
        return grad_x, *grads, None, None, None


class _GroupNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, probe, weight_probe, bias_probe, call, groups, eps):
        x = x.contiguous()
        b, channels = x.shape[:2]
        inner = x.shape[2:].numel()
        y, mean, rstd = torch.native_group_norm(x, weight, bias, b, channels, inner, groups, eps)
        ctx.save_for_backward(x, mean, rstd, weight, bias, probe)
        ctx.call, ctx.groups = call, groups
        return y

    @staticmethod
    def backward(ctx, grad_out):
        refuse_double_backward()
        x, mean, rstd, *affine = ctx.saved_tensors
        weight = affine[0]
        b, channels = x.shape[:2]
        inner = x.shape[2:].numel()
        grad_out = grad_out.contiguous()
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = _aten.native_group_norm_backward.default(
                grad_out, x, mean, rstd, weight, b, channels, inner, ctx.groups,
                [True, False, False],
            )[0]  # fmt: skip
        view, one = (b, 1, channels, inner), (b, 1, channels, 1)
        each = channels // ctx.groups
        by_channel = [s.reshape(b, ctx.groups, 1).expand(b, ctx.groups, each) for s in (mean, rstd)]
        grads = _affine_grads(
            ctx,
            affine,
            grad_out.reshape(view),
            x.reshape(view),
            *(s.reshape(one) for s in by_channel),
        )
        return grad_x, *grads, None, None, None


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
        ctx.save_for_backward(x, mean, rstd, running_mean, running_var, weight, bias, probe)
        ctx.call, ctx.training, ctx.eps = call, training, eps
        return y

    @staticmethod
    def backward(ctx, grad_out):
        refuse_double_backward()
        x, mean, rstd, running_mean, running_var, *affine = ctx.saved_tensors
        weight = affine[0]
        grad_x = None
        if ctx.needs_input_grad[0]:
            if ctx.training:
                grad_x = _aten.native_batch_norm_backward.default(
                    grad_out, x, weight, running_mean, running_var, mean, rstd, True, ctx.eps,
                    [True, False, False],
                )[0]  # fmt: skip
            else:  # the buffers may have changed since; the saved ones have not
                scale = rstd if weight is None else rstd * weight
                grad_x = grad_out * scale.reshape(1, -1, *(1,) * (x.dim() - 2)).to(x.dtype)
        view = (x.shape[0], 1, x.shape[1], x.shape[2:].numel())
        one = (1, 1, x.shape[1], 1)
        grads = _affine_grads(
            ctx,
            affine,
            grad_out.reshape(view),
            x.reshape(view),
            mean.reshape(one),
            rstd.reshape(one),
        )
        return grad_x, *grads, *(None,) * 6


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
        view = (
            x.shape[0],
            positions,
            channels,
            x.shape[1:].numel() // max(1, positions * channels),
        )
        grads = _affine_grads(ctx, affine, grad_out.reshape(view), x.reshape(view))
        return grad_x, *grads, None, None


def _full_precision(x: Tensor) -> Tensor:
    """Autocast computes normalisations in float32 on a GPU."""
    if x.is_cuda and torch.is_autocast_enabled("cuda") and x.dtype != torch.float64:
        return x.float()
    return x


def layer_norm(
    x: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    probe: Tensor,
    weight_probe: Tensor | None = None,
    bias_probe: Tensor | None = None,
    call: Call = NOBODY,
) -> Tensor:
    """`torch.nn.functional.layer_norm` that measures; x [b, …, *normalized_shape]."""
    if x.dim() <= len(normalized_shape):
        raise ValueError(f"layer_norm: an input of shape {list(x.shape)} has no sample dimension")
    check_probe(x.shape[0], probe, "layer_norm")
    return _LayerNorm.apply(
        _full_precision(x), weight, bias, probe, weight_probe, bias_probe, call,
        list(normalized_shape), eps,
    )  # type: ignore[return-value]  # fmt: skip


def group_norm(
    x: Tensor,
    groups: int,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    probe: Tensor,
    weight_probe: Tensor | None = None,
    bias_probe: Tensor | None = None,
    call: Call = NOBODY,
) -> Tensor:
    """`torch.nn.functional.group_norm` that measures; x [b, C, …]."""
    check_probe(x.shape[0], probe, "group_norm")
    return _GroupNorm.apply(
        _full_precision(x), weight, bias, probe, weight_probe, bias_probe, call, groups, eps
    )  # type: ignore[return-value]


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
    call: Call = NOBODY,
) -> Tensor:
    """`torch.nn.functional.batch_norm` that measures; x [b, C, …].

    In training mode the samples of a batch are coupled, and no gradient belongs to one alone:
    measured is sample i's contribution c_i to the batch's gradient, whose sum that gradient is.
    """
    check_probe(x.shape[0], probe, "batch_norm")
    return _BatchNorm.apply(
        x, weight, bias, probe, weight_probe, bias_probe, call,
        running_mean, running_var, training, momentum, eps,
    )  # type: ignore[return-value]  # fmt: skip


def scale(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    axis: int,
    probe: Tensor,
    weight_probe: Tensor | None = None,
    bias_probe: Tensor | None = None,
    call: Call = NOBODY,
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
    """
    check_probe(x.shape[0], probe, "scale")
    return _Scale.apply(x, weight, bias, probe, weight_probe, bias_probe, call, axis)  # type: ignore[return-value]
