"""Every op in plain PyTorch: the truth in tests (in float64) and the fallback elsewhere.

Each function has the name and the signature of its op in `ops/`, where formulas, shapes and
errors are documented.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

_PIECE = 1 << 24  # elements of per-sample gradients held at a time


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64, float32 for everything lower."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise RuntimeError(message)


def sample_statistics(g: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    _require(g.dim() == 2, f"sample_statistics: expected g [b, P], got {g.dim()} dimensions")
    g = g.to(compute_dtype(g.dtype))
    square = g * g
    return g.sum(0), square.sum(0), square.sum(1)


def pool_samples(probes: list[Tensor], rows: list[int]) -> tuple[Tensor, Tensor]:
    if not probes or len(probes) != len(rows):
        raise RuntimeError("pool_samples: expected one row count for each probe")
    for probe, n in zip(probes, rows, strict=True):
        if probe.dim() != 2 or probe.shape[0] != 2 or probe.dtype != probes[0].dtype:
            raise RuntimeError("pool_samples: expected probes [2, capacity] of one dtype")
        if not 0 <= n <= probe.shape[1]:
            capacity = probe.shape[1]
            raise RuntimeError(f"pool_samples: {n} rows in a probe of capacity {capacity}")
    norms = torch.cat([probe[0, :n] for probe, n in zip(probes, rows, strict=True)])
    calls = torch.cat([probe[1, :n] for probe, n in zip(probes, rows, strict=True)])
    outside = torch.cat([F.pad(p[1, n:], (0, 1)) for p, n in zip(probes, rows, strict=True)])
    least, most = (calls.min(), calls.max()) if calls.numel() else (calls.sum() - 1, calls.sum())
    totals = torch.stack([norms.double().sum(), least.double(), most.double(), outside.max()])
    return norms, totals.double()


def _reductions(
    g: Tensor, coordinate_sums: Tensor, denominator: Tensor, grad_scale: float, samples: int
) -> Tensor:
    n = float(samples)
    g, scale = g.double(), grad_scale**2
    square = g * g
    variance = (n * n * scale * coordinate_sums.double() - n * square) / (n - 1)
    variance = variance.clamp(min=0)
    ratio = torch.where(variance > 0, variance / square, 0.0)
    largest = ratio.max() if ratio.numel() else ratio.sum()
    root = denominator.double()
    return torch.stack([variance.sum(), largest, (variance / root).sum(), (square / root).sum()])


def _pool_reductions(parts: list[Tensor], like: Tensor) -> Tensor:
    if not parts:
        return torch.empty(0, dtype=torch.float64, device=like.device)
    table = torch.stack(parts)
    pooled = table.sum(0)
    pooled[1] = table[:, 1].max()
    return pooled


def _check_update(
    params: list[Tensor],
    grads: list[Tensor],
    sums: list[Tensor] | None,
    coordinate_sums: list[Tensor],
) -> None:
    if not params:
        raise RuntimeError("adagrad: no parameters")
    lists = {"gradient": grads, "accumulator": sums, "coordinate sum": coordinate_sums or None}
    for what, tensors in lists.items():
        if tensors is None:
            continue
        if len(tensors) != len(params):
            raise RuntimeError(f"adagrad: {len(tensors)} {what}s for {len(params)} parameters")
        for i, (t, p) in enumerate(zip(tensors, params, strict=True)):
            if t.shape != p.shape:
                raise RuntimeError(f"adagrad: the shape of {what} {i} is not that of its parameter")
            if what == "accumulator" and t.dtype != compute_dtype(p.dtype):
                raise RuntimeError(
                    f"adagrad: accumulator {i} must be float32 (float64 where the parameter is)"
                )


def adagrad_(
    params: list[Tensor],
    grads: list[Tensor],
    sums: list[Tensor],
    coordinate_sums: list[Tensor],
    lr: float,
    eps: float,
    weight_decay: float,
    maximize: bool,
    grad_scale: float,
    samples: int,
) -> tuple[Tensor, Tensor]:
    _check_update(params, grads, sums, coordinate_sums)
    norm = torch.zeros((), dtype=torch.float64, device=params[0].device)
    parts = []
    for i, (p, grad, v) in enumerate(zip(params, grads, sums, strict=True)):
        g = grad.to(v.dtype) * grad_scale
        norm += g.double().square().sum()
        step = (-g if maximize else g) + weight_decay * p.to(v.dtype)
        v.add_(step * step)
        root = v.sqrt() + eps
        p.copy_(p.to(v.dtype) - lr * step / root)
        if coordinate_sums:
            parts.append(_reductions(g, coordinate_sums[i], root, grad_scale, samples))
    return norm, _pool_reductions(parts, norm)


def adagrad_norm_(
    params: list[Tensor],
    grads: list[Tensor],
    sum: Tensor,
    coordinate_sums: list[Tensor],
    lr: list[float],
    eps: float,
    weight_decay: list[float],
    maximize: bool,
    grad_scale: float,
    samples: int,
) -> tuple[Tensor, Tensor]:
    _check_update(params, grads, None, coordinate_sums)
    if sum.numel() != 1 or sum.dtype != torch.float64:
        raise RuntimeError("adagrad_norm_: sum must be one float64 number")
    if len(lr) != len(params) or len(weight_decay) != len(params):
        raise RuntimeError("adagrad_norm_: expected one lr and one weight_decay for each parameter")
    norm = torch.zeros((), dtype=torch.float64, device=params[0].device)
    steps, scaled = [], []
    for p, grad, decay in zip(params, grads, weight_decay, strict=True):
        dtype = compute_dtype(p.dtype)
        g = grad.to(dtype) * grad_scale
        norm += g.double().square().sum()
        scaled.append(g)
        steps.append((-g if maximize else g) + decay * p.to(dtype))
        sum.add_(steps[-1].double().square().sum())
    root = sum.sqrt() + eps
    parts = []
    for i, (p, step, rate) in enumerate(zip(params, steps, lr, strict=True)):
        p.copy_(p.to(step.dtype) - (rate / root).to(step.dtype) * step)
        if coordinate_sums:
            parts.append(_reductions(scaled[i], coordinate_sums[i], root, grad_scale, samples))
    return norm, _pool_reductions(parts, norm)


def grad_norm_sq(tensors: list[Tensor]) -> Tensor:
    _require(len(tensors) > 0, "grad_norm_sq: no tensors")
    return torch.stack([t.double().square().sum() for t in tensors]).sum()


def _probe(norms: Tensor, capacity: int) -> Tensor:
    if norms.shape[0] > capacity:
        raise RuntimeError(f"{norms.shape[0]} samples do not fit a probe of capacity {capacity}")
    return F.pad(torch.stack([norms, torch.ones_like(norms)]), (0, capacity - norms.shape[0]))


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
    _require(
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
    return grad, grad_bias, _probe(norms, capacity), grad_sq, bias_sq


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
        _require(
            list(t.shape) == shape and t.is_contiguous(),
            f"linear_adagrad_: {name} must be a contiguous tensor {shape}",
        )
    _require(
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
    dims = len(kernel_size)
    _require(
        1 <= dims <= 3 and len(stride) == len(padding) == len(dilation) == dims,
        "conv_weight_grad: kernel_size, stride, padding and dilation take one number a spatial "
        "dimension, for one to three of them",
    )
    _require(
        grad_out.dim() == input.dim() == dims + 2
        and grad_out.shape[0] == input.shape[0]
        and grad_out.dtype == input.dtype,
        "conv_weight_grad: expected grad_out [b, O, *D'] and input [b, C, *D] of one dtype, with "
        f"{dims} spatial dimensions",
    )
    _require(
        groups > 0 and not input.shape[1] % groups and not grad_out.shape[1] % groups,
        f"conv_weight_grad: {input.shape[1]} input and {grad_out.shape[1]} output channels do not "
        f"divide into {groups} groups",
    )
    for d in range(dims):
        reach = (grad_out.shape[2 + d] - 1) * stride[d] + (kernel_size[d] - 1) * dilation[d] + 1
        _require(
            reach <= input.shape[2 + d] + 2 * padding[d],
            "conv_weight_grad: grad_out is larger than this convolution's output",
        )
    dtype = compute_dtype(grad_out.dtype)
    b, out_channels = grad_out.shape[:2]
    channels = input.shape[1] // groups
    g = grad_out.to(dtype).reshape(b, groups, out_channels // groups, grad_out.shape[2:].numel())
    out = list(grad_out.shape[2:])
    a = _unfold(input.to(dtype), kernel_size, stride, padding, dilation, out)
    a = a.reshape(b, groups, channels * math.prod(kernel_size), g.shape[3])
    grad, grad_bias, norms, grad_sq, bias_sq = _per_sample(g, a, weight, bias, coordinates)
    shape = (out_channels, channels, *kernel_size)
    grad = grad.reshape(shape) if weight else grad
    grad_sq = grad_sq.reshape(shape) if weight and coordinates else grad_sq
    return grad, grad_bias, _probe(norms, capacity), grad_sq, bias_sq


def embedding_weight_grad(
    grad_out: Tensor,
    indices: Tensor,
    num_embeddings: int,
    padding_idx: int,
    capacity: int,
    coordinates: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    dtype = compute_dtype(grad_out.dtype)
    _require(
        indices.dim() >= 1 and grad_out.shape[:-1] == indices.shape,
        "embedding_weight_grad: expected grad_out [b, ..., D] and indices [b, ...] with the same "
        "leading dimensions",
    )
    b, width = indices.shape[0], grad_out.shape[-1]
    tokens = indices.reshape(b, indices.shape[1:].numel()).long()
    _require(
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
    return grad, _probe(norms, capacity), sums


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
    _require(
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
    return grad, grad_bias, _probe(norms, capacity), grad_sq, bias_sq


def check_norm(
    grad_out: Tensor, input: Tensor, mean: Tensor | None, rstd: Tensor, scale: Tensor
) -> None:
    _require(
        grad_out.dim() == 4 and grad_out.shape == input.shape and scale.shape == input.shape[2:3],
        "norm_backward: expected grad_out and input of one shape [b, T, C, S] and a scale [C]",
    )
    b, positions, channels, _ = input.shape
    groups = rstd.shape[2] if rstd.dim() == 4 else 0
    divides = groups == channels or (groups > 0 and channels % groups == 0)
    by_sample = rstd.shape == (b, positions, groups, 1) and divides
    of_batch = rstd.shape == (1, 1, channels, 1) and positions == 1 and mean is not None
    _require(
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
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    check_norm(grad_out, input, mean, rstd, scale)
    channels, groups = input.shape[2], rstd.shape[2]
    dtype = compute_dtype(input.dtype)
    m, r = (
        None if t is None else t.to(dtype).repeat_interleave(channels // max(1, groups), dim=2)
        for t in (mean, rstd)
    )
    g, x = grad_out.to(dtype), input.to(dtype)
    rest = scale_weight_grad(g, x, m, r, capacity, weight, bias, coordinates)
    grad_input = norm_input_grad(g, x, mean, rstd, scale)
    return torch.empty_like(input).copy_(grad_input), *rest


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
