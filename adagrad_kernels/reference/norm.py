"""Affine parts and backward passes of normalisations."""

from __future__ import annotations

import torch
from torch import Tensor

from ._common import compute_dtype, probe_of, require


def scale_weight_grad(
    grad_out: Tensor,
    input: Tensor,
    mean: Tensor | None,
    rstd: Tensor | None,
    capacity: int,
    weight: bool,
    bias: bool,
    coordinates: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    require(
        grad_out.dim() == 4 and grad_out.shape == input.shape,
        "scale_weight_grad: expected grad_out and input of one shape [b, T, C, S]",
    )
    g = grad_out.to(compute_dtype(grad_out.dtype))
    x = input.to(g.dtype)
    x = x if mean is None else x - mean
    x = x if rstd is None else x * rstd
    norms = g.new_zeros(g.shape[0])
    grad, grad_sq, grad_bias, bias_sq = (g.new_empty(0) for _ in range(4))  # none twice
    if weight:
        sample = (g * x).sum((1, 3))
        grad, norms = sample.sum(0), norms + sample.square().sum(1)
        grad_sq = sample.square().sum(0) if coordinates else grad_sq
    if bias:
        sample = g.sum((1, 3))
        grad_bias, norms = sample.sum(0), norms + sample.square().sum(1)
        bias_sq = sample.square().sum(0) if coordinates else bias_sq
    return grad, grad_bias, probe_of(norms, capacity), grad_sq, bias_sq


def check_norm(
    grad_out: Tensor, input: Tensor, mean: Tensor | None, rstd: Tensor, scale: Tensor
) -> None:
    require(
        grad_out.dim() == 4 and grad_out.shape == input.shape and scale.shape == input.shape[2:3],
        "norm_backward: expected grad_out and input of one shape [b, T, C, S] and a scale [C]",
    )
    b, positions, channels, _ = input.shape
    groups = rstd.shape[2] if rstd.dim() == 4 else 0
    divides = groups == channels or (groups > 0 and channels % groups == 0)
    by_sample = rstd.shape == (b, positions, groups, 1) and divides
    of_batch = rstd.shape == (1, 1, channels, 1) and positions == 1 and mean is not None
    require(
        (by_sample or of_batch) and (mean is None or mean.shape == rstd.shape),
        "norm_backward: expected mean and rstd [b, T, groups, 1], or both [1, 1, C, 1] of the "
        "batch",
    )


def norm_backward(
    grad_out: Tensor,
    input: Tensor,
    mean: Tensor | None,
    rstd: Tensor,
    scale: Tensor,
    capacity: int,
    weight: bool,
    bias: bool,
    coordinates: bool,
    samples: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    check_norm(grad_out, input, mean, rstd, scale)
    channels, groups = input.shape[2], rstd.shape[2]
    dtype = compute_dtype(input.dtype)
    each = channels // max(1, groups)
    m = None if mean is None else mean.to(dtype).repeat_interleave(each, dim=2)
    r = rstd.to(dtype).repeat_interleave(each, dim=2)
    g, x = grad_out.to(dtype), input.to(dtype)
    rest = scale_weight_grad(g, x, m, r, capacity, weight, bias, coordinates)
    own = g.new_empty(0, 2, channels)
    if samples:
        hat = (x if m is None else x - m) * r
        own = torch.stack([(g * hat).sum((1, 3)), g.sum((1, 3))], dim=1)
    grad_input = norm_input_grad(g, x, mean, rstd, scale)
    return torch.empty_like(input).copy_(grad_input), *rest, own


def norm_input_grad(
    grad_out: Tensor, input: Tensor, mean: Tensor | None, rstd: Tensor, scale: Tensor
) -> Tensor:
    b, positions, channels, inner = input.shape
    groups = rstd.shape[2]
    blocks = (b, positions, groups, channels // max(1, groups), inner)
    over = (3, 4) if rstd.shape[0] == b else (0, 3, 4)
    r = rstd.to(input.dtype).unsqueeze(4)
    x = input.reshape(blocks)
    hat = (x if mean is None else x - mean.to(input.dtype).unsqueeze(4)) * r
    h = (grad_out * scale.to(input.dtype).reshape(1, 1, -1, 1)).reshape(blocks)
    grad = h - hat * (h * hat).mean(over, keepdim=True)
    grad = grad if mean is None else grad - h.mean(over, keepdim=True)
    return (r * grad).reshape(input.shape)
