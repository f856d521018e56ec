"""`layer_norm`, `rms_norm`, `group_norm`: each sample is normalised by itself."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ._affine import affine_grads, check_channels
from ._call import NO_LISTENER, Call, check_probe, refuse_double_backward


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
        grads = affine_grads(ctx, affine, view, grad_out, x, mean.reshape(one), rstd.reshape(one))
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
        grads = affine_grads(ctx, affine, view, grad_out, x, None, rstd.reshape(*view[:2], 1, 1))
        return *grads, None, None, None


def _rows(x: Tensor, dims: int) -> tuple[int, ...]:
    """[b, T, C, 1], the last `dims` dimensions being the channels."""
    outer = x.dim() - dims
    return x.shape[0], x.shape[1:outer].numel(), x.shape[outer:].numel(), 1


class _GroupNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, probe, weight_probe, bias_probe, call, groups, eps, k):
        x = x.contiguous(memory_format=_memory_format(x))
        rows, channels = x.shape[:2]
        inner = x.shape[2:].numel()
        y, mean, rstd = torch.native_group_norm(x, weight, bias, rows, channels, inner, groups, eps)
        ctx.save_for_backward(x, mean, rstd, weight, bias, probe)
        ctx.call, ctx.k = call, k
        return y

    @staticmethod
    def backward(ctx, grad_out):
        refuse_double_backward()
        x, mean, rstd, *affine = ctx.saved_tensors
        view = (x.shape[0] // ctx.k, ctx.k, x.shape[1], x.shape[2:].numel())
        one = (*view[:2], mean.shape[1], 1)
        grads = affine_grads(ctx, affine, view, grad_out, x, mean.reshape(one), rstd.reshape(one))
        return *grads, *(None,) * 4


def _memory_format(x: Tensor) -> torch.memory_format:
    """Channels last where x is and torch's kernel for groups takes it: on the CPU."""
    last = {4: torch.channels_last, 5: torch.channels_last_3d}.get(x.dim())
    if last is None or x.device.type != "cpu" or not x.is_contiguous(memory_format=last):
        return torch.contiguous_format
    return torch.contiguous_format if x.is_contiguous() else last


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
    call: Call = NO_LISTENER,
) -> Tensor:
    """`torch.nn.functional.layer_norm` that measures; x [b, …, *normalized_shape].

    Raises:
        ValueError: an input without the sample dimension, or more samples than columns.

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
    call: Call = NO_LISTENER,
) -> Tensor:
    """`torch.nn.functional.rms_norm` that measures; x [b, …, *normalized_shape].

    It has no bias, and so takes no `bias_probe`.

    Raises:
        ValueError: an input without the sample dimension, or more samples than columns.

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
    call: Call = NO_LISTENER,
    axis: int = 1,
) -> Tensor:
    """`torch.nn.functional.group_norm` that measures.

    Args:
        x: input [b, C, …], or [b, k, C, …] where k rows, each normalised by itself, are a sample.
        groups: divide the channels.
        weight: [C].
        bias: [C] or None.
        eps: added to the variances.
        probe: see the package, as the others below.
        weight_probe: as there.
        bias_probe: as there.
        call: as there.
        axis: the dimension of the channels, 1 or 2.

    Raises:
        ValueError: an input without channels, or more samples than columns.

    Example:
        >>> x = torch.tensor([[1., 3.], [2., 6.]])  # normalised: [-1, 1] twice
        >>> w, probe = torch.ones(2).requires_grad_(), torch.zeros(2, 2).requires_grad_()
        >>> (group_norm(x, 1, w, None, 0.0, probe) * x).sum().backward()
        >>> [round(n, 3) for n in probe.grad[0].tolist()]
        [10.0, 40.0]
    """
    check_channels(x, "group_norm")
    check_probe(x.shape[0], probe, "group_norm")
    lead = x.shape[:axis]
    x = _full_precision(x) if axis == 1 else _full_precision(x.flatten(0, 1))
    y: Any = _GroupNorm.apply(
        x, weight, bias, probe, weight_probe, bias_probe, call, groups, eps, lead[1:].numel()
    )
    return y if axis == 1 else y.unflatten(0, lead)
