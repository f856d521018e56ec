"""`layer_norm`, `rms_norm`, `group_norm`, `batch_norm`, and `scale`, their affine part by itself.

The backward pass of a normalisation is one op, `ops.norm_backward`, and that of the affine part
`ops.scale_weight_grad`; both take views [b, T, C, S] of the tensors (channels C, positions T before
and S after them).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import ops
from ._call import NOBODY, Call, as_grad, check_probe, counted, refuse_double_backward, tell


def _grads(
    ctx: Any,
    affine: list[Tensor],
    view: tuple[int, ...],
    grad_out: Tensor,
    x: Tensor,
    mean: Tensor | None = None,
    rstd: Tensor | None = None,
    input_grad: bool = True,
) -> tuple[Tensor | None, ...]:
    """Gradients of (x, weight, bias, probe, weight_probe, bias_probe), a forward's first arguments.

    Args:
        ctx: of the autograd function.
        affine: weight, bias and probe.
        view: [b, T, C, S], as which grad_out and x are seen.
        grad_out: gradient of the output.
        x: the input.
        mean: the statistics [b, T, G, 1] or [1, 1, C, 1] by which x is normalised, if any.
        rstd: likewise.
        input_grad: False if they are not taken from x: then x's gradient is left to the caller.
    """
    weight, bias, probe = affine
    need_x, need_w, need_b, _, need_ws, need_bs = ctx.needs_input_grad[:6]
    wanted = (probe.shape[1], need_w, need_b, need_ws or need_bs)
    g, a = grad_out.reshape(view), x.reshape(view)
    statistics = (t.expand(view[0], -1, -1, -1) for t in (mean, rstd) if t is not None)
    saved = (a, *statistics, g)
    tell(ctx.call, *saved)
    grad_x = None
    if need_x and input_grad and rstd is not None:
        grad_x, *found = ops.norm_backward(g, a, mean, rstd, weight.reshape(-1), *wanted)
        grad_x = grad_x.reshape(x.shape)
    else:
        m, r = (t if t is None else by_channel(t, view[2]) for t in (mean, rstd))
        found = ops.scale_weight_grad(g, a, m, r, *wanted)
    grad_w, grad_b, grad_p, sums_w, sums_b = found
    return (
        grad_x,
        as_grad(grad_w.reshape(weight.shape), weight.dtype, True) if need_w else None,
        as_grad(grad_b.reshape(bias.shape), bias.dtype, True) if need_b else None,
        counted(grad_p, probe, ctx.call, *saved),
        sums_w.reshape(weight.shape) if need_ws else None,
        sums_b.reshape(bias.shape) if need_bs else None,
    )


def by_channel(statistic: Tensor, channels: int) -> Tensor:
    """[b, T, G, 1] for each of the channels, where there are groups of them."""
    groups = statistic.shape[2]
    return (
        statistic.repeat_interleave(channels // groups, 2) if 1 < groups < channels else statistic
    )


class _LayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, probe, weight_probe, bias_probe, call, shape, eps):
        y, mean, rstd = torch.native_layer_norm(x, shape, weight, bias, eps)
        ctx.save_for_backward(x, mean, rstd, weight, bias, probe)
        ctx.call, ctx.dims = call, len(shape)
        return y

    @staticmethod
    def backward(ctx, grad_out):
        refuse_double_backward()
        x, mean, rstd, *affine = ctx.saved_tensors
        view = _rows(x, ctx.dims)
        one = (*view[:2], 1, 1)
        grads = _grads(ctx, affine, view, grad_out, x, mean.reshape(one), rstd.reshape(one))
        return *grads, None, None, None


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, probe, weight_probe, bias_probe, call, shape, eps):
        y, rstd = torch.ops.aten._fused_rms_norm.default(x, shape, weight, eps)
        ctx.save_for_backward(x, rstd, weight, bias, probe)
        ctx.call, ctx.dims = call, len(shape)
        return y

    @staticmethod
    def backward(ctx, grad_out):
        refuse_double_backward()
        x, rstd, *affine = ctx.saved_tensors
        view = _rows(x, ctx.dims)
        grads = _grads(ctx, affine, view, grad_out, x, None, rstd.reshape(*view[:2], 1, 1))
        return *grads, None, None, None


def _rows(x: Tensor, dims: int) -> tuple[int, ...]:
    """[b, T, C, 1], the last `dims` dimensions being the channels."""
    outer = x.dim() - dims
    return x.shape[0], x.shape[1:outer].numel(), x.shape[outer:].numel(), 1


class _GroupNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, probe, weight_probe, bias_probe, call, groups, eps):
        x = x.contiguous(memory_format=_memory_format(x))
        b, channels = x.shape[:2]
        inner = x.shape[2:].numel()
        y, mean, rstd = torch.native_group_norm(x, weight, bias, b, channels, inner, groups, eps)
        ctx.save_for_backward(x, mean, rstd, weight, bias, probe)
        ctx.call = call
        return y

    @staticmethod
    def backward(ctx, grad_out):
        refuse_double_backward()
        x, mean, rstd, *affine = ctx.saved_tensors
        view = (x.shape[0], 1, x.shape[1], x.shape[2:].numel())
        one = (x.shape[0], 1, mean.shape[1], 1)
        grads = _grads(ctx, affine, view, grad_out, x, mean.reshape(one), rstd.reshape(one))
        return *grads, None, None, None


def _memory_format(x: Tensor) -> torch.memory_format:
    """Channels last where x is and torch's kernel for groups takes it: on the CPU."""
    last = {4: torch.channels_last, 5: torch.channels_last_3d}.get(x.dim())
    if last is None or x.device.type != "cpu" or not x.is_contiguous(memory_format=last):
        return torch.contiguous_format
    return torch.contiguous_format if x.is_contiguous() else last


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
        grad_x, *grads = _grads(
            ctx, affine, view, grad_out, x, mean.reshape(one), rstd.reshape(one), ctx.training
        )
        if ctx.needs_input_grad[0] and not ctx.training:
            scale = rstd * affine[0]
            grad_x = grad_out * scale.reshape(1, -1, *(1,) * (x.dim() - 2)).to(x.dtype)
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
        inner = x.shape[1:].numel() // max(1, positions * channels)
        _, *grads = _grads(ctx, affine, (x.shape[0], positions, channels, inner), grad_out, x)
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
    """`torch.nn.functional.layer_norm` that measures; x [b, …, *normalized_shape].

    Example:
        >>> x = torch.tensor([[1., 3.], [2., 6.]])  # normalised: [-1, 1] twice
        >>> w, probe = torch.ones(2).requires_grad_(), torch.zeros(2, 2).requires_grad_()
        >>> (layer_norm(x, [2], w, None, 0.0, probe) * x).sum().backward()
        >>> [round(n, 3) for n in probe.grad[0].tolist()]
        [10.0, 40.0]
    """
    if x.dim() <= len(normalized_shape):
        raise ValueError(f"layer_norm: an input of shape {list(x.shape)} has no sample dimension")
    check_probe(x.shape[0], probe, "layer_norm")
    return _LayerNorm.apply(
        _full_precision(x), weight, bias, probe, weight_probe, bias_probe, call,
        list(normalized_shape), eps,
    )  # type: ignore[return-value]  # fmt: skip


def rms_norm(
    x: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor,
    eps: float | None,
    probe: Tensor,
    weight_probe: Tensor | None = None,
    bias_probe: Tensor | None = None,
    call: Call = NOBODY,
) -> Tensor:
    """`torch.nn.functional.rms_norm` that measures; x [b, …, *normalized_shape]; no bias.

    Example:
        >>> x = torch.tensor([[1., 7.], [5., 5.]])  # normalised: [0.2, 1.4], [1, 1]
        >>> w, probe = torch.ones(2).requires_grad_(), torch.zeros(2, 2).requires_grad_()
        >>> rms_norm(x, [2], w, 0.0, probe).sum().backward()
        >>> [round(n, 3) for n in probe.grad[0].tolist()]
        [2.0, 2.0]
    """
    if x.dim() <= len(normalized_shape):
        raise ValueError(f"rms_norm: an input of shape {list(x.shape)} has no sample dimension")
    check_probe(x.shape[0], probe, "rms_norm")
    return _RMSNorm.apply(
        _full_precision(x), weight, None, probe, weight_probe, None, call,
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
    """`torch.nn.functional.group_norm` that measures; x [b, C, …].

    Example:
        >>> x = torch.tensor([[1., 3.], [2., 6.]])  # normalised: [-1, 1] twice
        >>> w, probe = torch.ones(2).requires_grad_(), torch.zeros(2, 2).requires_grad_()
        >>> (group_norm(x, 1, w, None, 0.0, probe) * x).sum().backward()
        >>> [round(n, 3) for n in probe.grad[0].tolist()]
        [10.0, 40.0]
    """
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

    Example:
        >>> x = torch.tensor([[1.], [3.]])  # normalised: -1, 1
        >>> w, probe = torch.ones(1).requires_grad_(), torch.zeros(2, 2).requires_grad_()
        >>> (batch_norm(x, None, None, w, None, True, 0.1, 0.0, probe) * x).sum().backward()
        >>> [round(n, 3) for n in probe.grad[0].tolist()]
        [1.0, 9.0]
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

    Example:
        >>> x = torch.tensor([[1., 2.], [3., 0.]])
        >>> w, probe = torch.ones(2).requires_grad_(), torch.zeros(2, 2).requires_grad_()
        >>> scale(x, w, None, 1, probe).sum().backward()
        >>> probe.grad[0].tolist()
        [5.0, 9.0]
    """
    check_probe(x.shape[0], probe, "scale")
    return _Scale.apply(x, weight, bias, probe, weight_probe, bias_probe, call, axis)  # type: ignore[return-value]
