"""Weight gradients of layers with their per-sample statistics."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ._common import compute_dtype, probe_of, require
from .update import adagrad_

_PIECE = 1 << 24  # elements of per-sample gradients held at a time


def _per_sample(
    g: Tensor, a: Tensor, weight: bool, bias: bool, coordinates: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """From g [b, G, O, T] and a [b, G, I, T]: sums, squares and norms of g aᵀ, [G, O, I]."""
    b, groups, out_features, _ = g.shape
    shape = (groups, out_features, a.shape[2])
    grad = g.new_zeros(shape if weight else 0)
    grad_sq = g.new_zeros(shape if weight and coordinates else 0)
    norms = [g.new_zeros(0)]
    piece = max(1, _PIECE // max(1, grad.numel()))
    for g_part, a_part in zip(g.split(piece), a.split(piece), strict=True) if b else ():
        part = torch.zeros(g_part.shape[0], dtype=g.dtype, device=g.device)
        if weight:
            sample = g_part @ a_part.mT
            grad = grad + sample.sum(0)
            square = sample * sample
            if coordinates:
                grad_sq = grad_sq + square.sum(0)
            part = square.sum((1, 2, 3))
        if bias:
            part = part + g_part.sum(3).square().sum((1, 2))
        norms.append(part)
    sample_bias = g.sum(3).flatten(1)
    grad_bias = sample_bias.sum(0) if bias else g.new_empty(0)
    bias_sq = sample_bias.square().sum(0) if bias and coordinates else g.new_empty(0)
    return grad, grad_bias, torch.cat(norms), grad_sq, bias_sq


def linear_weight_grad(
    grad_out: Tensor, input: Tensor, capacity: int, weight: bool, bias: bool, coordinates: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    require(
        input.dim() >= 2
        and grad_out.shape[:-1] == input.shape[:-1]
        and grad_out.dtype == input.dtype,
        "linear_weight_grad: expected grad_out [b, ..., O] and input [b, ..., I] of one dtype, "
        "with the same leading dimensions",
    )
    dtype = compute_dtype(grad_out.dtype)
    b, out_features, in_features = grad_out.shape[0], grad_out.shape[-1], input.shape[-1]
    positions = grad_out.shape[1:-1].numel()
    g = grad_out.to(dtype).reshape(b, positions, out_features).mT.unsqueeze(1)
    a = input.to(dtype).reshape(b, positions, in_features).mT.unsqueeze(1)
    grad, grad_bias, norms, grad_sq, bias_sq = _per_sample(g, a, weight, bias, coordinates)
    grad = grad.squeeze(0) if weight else grad
    grad_sq = grad_sq.squeeze(0) if weight and coordinates else grad_sq
    return grad, grad_bias, probe_of(norms, capacity), grad_sq, bias_sq


def linear_adagrad_(
    grad_out: Tensor,
    input: Tensor,
    weight: Tensor,
    sum: Tensor,
    capacity: int,
    bias: bool,
    coordinates: bool,
    lr: float,
    eps: float,
    weight_decay: float,
    maximize: bool,
    grad_scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    shape = [grad_out.shape[-1], input.shape[-1]]
    for name, t in (("weight", weight), ("sum", sum)):
        require(
            list(t.shape) == shape and t.is_contiguous(),
            f"linear_adagrad_: {name} must be a contiguous tensor {shape}",
        )
    require(
        sum.dtype == compute_dtype(weight.dtype),
        "linear_adagrad_: sum must be float32 (float64 where the weight is)",
    )
    grad, grad_bias, probe, weight_sums, bias_sums = linear_weight_grad(
        grad_out, input, capacity, True, bias, coordinates
    )
    norm, reductions = adagrad_(
        [weight], [grad], [sum], [weight_sums] if coordinates else [],
        lr, eps, weight_decay, maximize, grad_scale, grad_out.shape[0],
    )  # fmt: skip
    return norm, reductions, grad_bias, probe, weight_sums, bias_sums


def _unfold(
    a: Tensor,
    size: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    out: list[int],
) -> Tensor:
    """The patches [b, C, *size, *out] of a [b, C, *D]: for any number of spatial dimensions."""
    a = F.pad(a, [amount for p in reversed(padding) for amount in (p, p)])
    index: list[Tensor | slice] = [slice(None), slice(None)]
    dims = len(size)
    for d in range(dims):
        kernel = torch.arange(size[d], device=a.device) * dilation[d]
        output = torch.arange(out[d], device=a.device) * stride[d]
        shape = [1] * (2 * dims)
        shape[d], shape[dims + d] = size[d], out[d]
        index.append((kernel[:, None] + output[None, :]).reshape(shape))
    return a[tuple(index)]


def _as_products(
    op: str,
    grad_out: Tensor,
    input: Tensor,
    kernel_size: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
) -> tuple[Tensor, Tensor]:
    """g [b, G, O/G, T] and a [b, G, C/G · kernel, T], whose products are a convolution's c_i."""
    dims = len(kernel_size)
    require(
        1 <= dims <= 3 and len(stride) == len(padding) == len(dilation) == dims,
        f"{op}: kernel_size, stride, padding and dilation take one number a spatial "
        "dimension, for one to three of them",
    )
    require(
        grad_out.dim() == input.dim() == dims + 2
        and grad_out.shape[0] == input.shape[0]
        and grad_out.dtype == input.dtype,
        f"{op}: expected grad_out [b, O, *D'] and input [b, C, *D] of one dtype, with "
        f"{dims} spatial dimensions",
    )
    require(
        groups > 0 and not input.shape[1] % groups and not grad_out.shape[1] % groups,
        f"{op}: {input.shape[1]} input and {grad_out.shape[1]} output channels do not "
        f"divide into {groups} groups",
    )
    for d in range(dims):
        reach = (grad_out.shape[2 + d] - 1) * stride[d] + (kernel_size[d] - 1) * dilation[d] + 1
        require(
            reach <= input.shape[2 + d] + 2 * padding[d],
            f"{op}: grad_out is larger than this convolution's output",
        )
    dtype = compute_dtype(grad_out.dtype)
    b, out_channels = grad_out.shape[:2]
    channels = input.shape[1] // groups
    g = grad_out.to(dtype).reshape(b, groups, out_channels // groups, grad_out.shape[2:].numel())
    out = list(grad_out.shape[2:])
    a = _unfold(input.to(dtype), kernel_size, stride, padding, dilation, out)
    a = a.reshape(b, groups, channels * math.prod(kernel_size), g.shape[3])
    return g, a


def conv_weight_grad(
    grad_out: Tensor,
    input: Tensor,
    kernel_size: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    capacity: int,
    weight: bool,
    bias: bool,
    coordinates: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    g, a = _as_products(
        "conv_weight_grad", grad_out, input, kernel_size, stride, padding, dilation, groups
    )
    grad, grad_bias, norms, grad_sq, bias_sq = _per_sample(g, a, weight, bias, coordinates)
    shape = (grad_out.shape[1], input.shape[1] // groups, *kernel_size)
    grad = grad.reshape(shape) if weight else grad
    grad_sq = grad_sq.reshape(shape) if weight and coordinates else grad_sq
    return grad, grad_bias, probe_of(norms, capacity), grad_sq, bias_sq


def conv_sample_grads(
    grad_out: Tensor,
    input: Tensor,
    kernel_size: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    weight: bool,
    bias: bool,
) -> tuple[Tensor, Tensor]:
    g, a = _as_products(
        "conv_sample_grads", grad_out, input, kernel_size, stride, padding, dilation, groups
    )
    shape = (*grad_out.shape[:2], input.shape[1] // groups, *kernel_size)
    return (
        (g @ a.mT).reshape(shape) if weight else g.new_empty(0),
        g.sum(3).flatten(1) if bias else g.new_empty(0),
    )


def embedding_weight_grad(
    grad_out: Tensor,
    indices: Tensor,
    num_embeddings: int,
    padding_idx: int,
    capacity: int,
    coordinates: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    dtype = compute_dtype(grad_out.dtype)
    require(
        indices.dim() >= 1 and grad_out.shape[:-1] == indices.shape,
        "embedding_weight_grad: expected grad_out [b, ..., D] and indices [b, ...] with the same "
        "leading dimensions",
    )
    b, width = indices.shape[0], grad_out.shape[-1]
    tokens = indices.reshape(b, indices.shape[1:].numel()).long()
    require(
        tokens.is_cuda or not ((tokens < 0) | (tokens >= num_embeddings)).any(),
        f"embedding_weight_grad: a token is not in [0, {num_embeddings})",
    )
    g = grad_out.to(dtype).reshape(*tokens.shape, width)
    g = g.masked_fill((tokens == padding_idx).unsqueeze(-1), 0)
    # One row for each (sample, token) that occurs: what a sample adds to that token's row.
    samples = torch.arange(b, device=tokens.device).unsqueeze(1)
    pairs, place = (samples * num_embeddings + tokens).unique(return_inverse=True)
    rows = g.new_zeros(pairs.shape[0], width).index_add_(0, place.flatten(), g.flatten(0, 1))
    square, of_token = rows * rows, pairs % num_embeddings
    grad = g.new_zeros(num_embeddings, width).index_add_(0, of_token, rows)
    norms = g.new_zeros(b).index_add_(0, pairs // num_embeddings, square.sum(1))
    sums = torch.zeros_like(grad).index_add_(0, of_token, square) if coordinates else norms[:0]
    return grad, probe_of(norms, capacity), sums
