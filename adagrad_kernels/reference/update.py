"""The updates, and the reductions of many tensors."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..reductions import CoordinateReductions, pooled
from ._common import compute_dtype, require


def sample_statistics(g: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    require(g.dim() == 2, f"sample_statistics: expected g [b, P], got {g.dim()} dimensions")
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
    root = denominator.double()
    found = {
        "variance_sum": variance.sum(),
        "max_ratio": ratio.max() if ratio.numel() else ratio.sum(),
        "variance_metric": (variance / root).sum(),
        "grad_metric": (square / root).sum(),
    }
    return torch.stack([found[name] for name in CoordinateReductions._fields])


def _pooled(parts: list[Tensor], like: Tensor) -> Tensor:
    return pooled(parts) if parts else like.new_empty(0)


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
    return norm, _pooled(parts, norm)


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
    return norm, _pooled(parts, norm)


def grad_norm_sq(tensors: list[Tensor]) -> Tensor:
    require(len(tensors) > 0, "grad_norm_sq: no tensors")
    return torch.stack([t.double().square().sum() for t in tensors]).sum()
