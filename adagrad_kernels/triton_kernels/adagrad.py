"""AdaGrad's updates with the reductions of the tests: the fallback where no CUDA was compiled.

One launch a tensor, one more for the reductions of all. Memory-bound: reads w, g, v, writes w, v,
20 bytes a float32 parameter (24 with coordinate sums). Each program sums BLOCK elements in float32
and writes one row of a table; the last kernel adds the table in float64, in order. The scalar
method reads w and g once more, for the norm comes before the update. Not measured on a GPU.
"""

# Kernels are written in Triton's language, not in Python's types.
# pyright: reportArgumentType=false, reportCallIssue=false, reportAssignmentType=false

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..reductions import COUNT
from . import common

BLOCK = 1024
TERMS = 1 + COUNT  # ‖g‖², and the reductions: Σ var, max var/g², Σ var/root, Σ g²/root


@triton.jit
def adagrad_block(b_w, b_g, b_v, lr, eps, weight_decay, sign):
    """(w, v, √v + eps) after the update with the gradient g."""
    b_d = sign * b_g + weight_decay * b_w
    b_v += b_d * b_d
    b_root = tl.sqrt_rn(b_v) + eps
    return b_w - tl.div_rn(lr * b_d, b_root), b_v, b_root


@triton.jit
def variance_block(b_g, b_c, b_root, of_sums, of_square):
    """(var, var/g² with 0/0 = 0, var/root, g²/root), where var = of_sums·c − of_square·g² ≥ 0."""
    b_gg = b_g * b_g
    b_var = of_sums * b_c - of_square * b_gg
    b_var = tl.where(b_var > 0, b_var, 0.0)
    b_ratio = b_var / tl.where(b_var > 0, b_gg, 1.0)  # of two roundings: these are only added
    b_inverse = 1.0 / b_root
    return b_var, b_ratio, b_var * b_inverse, b_gg * b_inverse


@triton.jit
def store_terms(p_row, b_gg, b_var, b_ratio, b_metric, b_grad, COORDINATES: tl.constexpr):
    """One row of the table."""
    tl.store(p_row, tl.sum(b_gg))
    if COORDINATES:
        tl.store(p_row + 1, tl.sum(b_var))
        tl.store(p_row + 2, tl.max(b_ratio))
        tl.store(p_row + 3, tl.sum(b_metric))
        tl.store(p_row + 4, tl.sum(b_grad))


@triton.jit
def adagrad_kernel(
    p_w, p_g, p_v, p_c, p_table, n, lr, eps, weight_decay, sign, grad_scale, of_sums, of_square,
    COORDINATES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The update of one tensor, and its rows of the table."""
    i = tl.program_id(0)
    o = i.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    m = o < n
    b_g = tl.load(p_g + o, mask=m, other=0.0).to(tl.float32) * grad_scale
    b_w = tl.load(p_w + o, mask=m, other=0.0).to(tl.float32)
    b_v = tl.load(p_v + o, mask=m, other=1.0)
    b_w, b_v, b_root = adagrad_block(b_w, b_g, b_v, lr, eps, weight_decay, sign)
    tl.store(p_w + o, b_w, mask=m)
    tl.store(p_v + o, b_v, mask=m)
    b_c = tl.zeros([BLOCK], dtype=tl.float32)
    if COORDINATES:
        b_c = tl.load(p_c + o, mask=m, other=0.0).to(tl.float32)
    b_var, b_ratio, b_metric, b_grad = variance_block(b_g, b_c, b_root, of_sums, of_square)
    store_terms(p_table + i * 5, b_g * b_g, b_var, b_ratio, b_metric, b_grad, COORDINATES)


@triton.jit
def norms_kernel(
    p_w, p_g, p_table, n, weight_decay, sign, grad_scale, UPDATE: tl.constexpr, BLOCK: tl.constexpr
):
    """table[i, 0] = ‖g‖² and, with UPDATE, table[i, 1] = ‖±g + weight_decay·w‖² of a block."""
    i = tl.program_id(0)
    o = i.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    m = o < n
    b_g = tl.load(p_g + o, mask=m, other=0.0).to(tl.float32) * grad_scale
    tl.store(p_table + i * 5, tl.sum(b_g * b_g))
    if UPDATE:
        b_w = tl.load(p_w + o, mask=m, other=0.0).to(tl.float32)
        b_d = sign * b_g + weight_decay * b_w
        tl.store(p_table + i * 5 + 1, tl.sum(b_d * b_d))


@triton.jit
def adagrad_norm_kernel(
    p_w, p_g, p_c, p_root, p_table, n, lr, weight_decay, sign, grad_scale, of_sums, of_square,
    COORDINATES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """w ← w − lr·d/root with one root (float64) for all, and the rows of the table."""
    i = tl.program_id(0)
    o = i.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    m = o < n
    b_g = tl.load(p_g + o, mask=m, other=0.0).to(tl.float32) * grad_scale
    b_w = tl.load(p_w + o, mask=m, other=0.0).to(tl.float32)
    root = tl.load(p_root).to(tl.float32)
    b_w -= tl.div_rn(lr, root) * (sign * b_g + weight_decay * b_w)
    tl.store(p_w + o, b_w, mask=m)
    if COORDINATES:
        b_c = tl.load(p_c + o, mask=m, other=0.0).to(tl.float32)
        b_root = tl.zeros([BLOCK], dtype=tl.float32) + root
        b_var, b_ratio, b_metric, b_grad = variance_block(b_g, b_c, b_root, of_sums, of_square)
        store_terms(p_table + i * 5, b_g * b_g, b_var, b_ratio, b_metric, b_grad, COORDINATES)


@triton.jit
def pool_terms_kernel(p_table, p_out, rows, BLOCK: tl.constexpr):
    """out[k] = Σ_i table[i, k] in float64, but the maximum for k = 2."""
    i_k = tl.program_id(0)
    b_pooled = tl.zeros([BLOCK], dtype=tl.float64)
    for i in range(0, rows, BLOCK):
        o_i = i + tl.arange(0, BLOCK)
        b = tl.load(p_table + o_i.to(tl.int64) * 5 + i_k, mask=o_i < rows, other=0.0).to(tl.float64)
        b_pooled = tl.where(i_k == 2, tl.maximum(b_pooled, b), b_pooled + b)
    tl.store(p_out + i_k, tl.where(i_k == 2, tl.max(b_pooled), tl.sum(b_pooled)))


class Table:
    """Rows of partial terms [rows, 5] of many tensors, BLOCK elements a row."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._rows = [common.cdiv(t.numel(), BLOCK) for t in tensors]
        size = (sum(self._rows), TERMS)
        self._table = torch.empty(size, dtype=torch.float32, device=tensors[0].device)

    def parts(self) -> list[tuple[tuple[int], Tensor]]:
        """(grid, rows of the table) of each tensor."""
        grids = [(rows,) for rows in self._rows]
        return list(zip(grids, self._table.split(self._rows), strict=True))

    def pooled(self, terms: int) -> Tensor:
        """The first so many terms over all tensors, float64."""
        return pool_terms(self._table, terms)


def pool_terms(table: Tensor, terms: int) -> Tensor:
    """The first so many terms of a table [rows, 5], float64."""
    out = torch.empty(terms, dtype=torch.float64, device=table.device)
    pool_terms_kernel[(terms,)](
        table, out, table.shape[0], BLOCK=1024, num_warps=4, **common.OPTIONS
    )
    return out


def variance_factors(samples: int, grad_scale: float) -> tuple[float, float]:
    """(of_sums, of_square) such that var = of_sums·c − of_square·g²; infinite for one sample."""
    if samples < 2:
        return math.inf, math.inf
    return samples**2 * grad_scale**2 / (samples - 1), samples / (samples - 1)


def laid_out_as(t: Tensor, model: Tensor, what: str, index: int) -> Tensor:
    """t, or a copy of it whose elements lie in memory in the model's order."""
    if t.shape != model.shape:
        raise RuntimeError(f"adagrad: the shape of {what} {index} is not that of its parameter")
    if _order(t) == _order(model):
        return t
    return torch.empty_like(model, dtype=t.dtype).copy_(t)


def _order(t: Tensor) -> list[tuple[int, int]]:
    return [(d, s) for d, (s, size) in enumerate(zip(t.stride(), t.shape, strict=True)) if size > 1]


def _check(params: Sequence[Tensor], *lists: Sequence[object]) -> None:
    if not params:
        raise RuntimeError("adagrad: no parameters")
    if any(len(others) not in (0, len(params)) for others in lists):
        raise RuntimeError("adagrad: params, grads, sums and coordinate_sums differ in length")
    for index, p in enumerate(params):
        if not torch.ops.aten.is_non_overlapping_and_dense.default(p):
            raise RuntimeError(f"adagrad: parameter {index} has gaps or overlaps in memory")


def adagrad_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    sums: Sequence[Tensor],
    coordinate_sums: Sequence[Tensor],
    lr: float,
    eps: float,
    weight_decay: float,
    maximize: bool,
    grad_scale: float,
    samples: int,
) -> tuple[Tensor, Tensor]:
    """`ops.adagrad_`."""
    _check(params, grads, sums, coordinate_sums)
    coordinates = len(coordinate_sums) > 0
    table = Table(params)
    factors = variance_factors(samples, grad_scale)
    sign = -1.0 if maximize else 1.0
    for i, (grid, rows) in enumerate(table.parts()):
        w, v = params[i], sums[i]
        if v.dtype != torch.float32 or v.shape != w.shape or _order(v) != _order(w):
            raise RuntimeError(
                f"adagrad: accumulator {i} must have its parameter's shape and layout, in float32"
            )
        if not w.numel():
            continue
        g = laid_out_as(grads[i], w, "gradient", i)
        c = laid_out_as(coordinate_sums[i], w, "coordinate sum", i) if coordinates else v
        adagrad_kernel[grid](
            w, g, v, c, rows, w.numel(), lr, eps, weight_decay, sign, grad_scale, *factors,
            COORDINATES=coordinates, BLOCK=BLOCK, num_warps=4, **common.OPTIONS,
        )  # fmt: skip
    return _results(table.pooled(TERMS if coordinates else 1))


def _results(terms: Tensor) -> tuple[Tensor, Tensor]:
    return terms[0].clone(), terms[1:].clone()


def adagrad_norm_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    sum: Tensor,
    coordinate_sums: Sequence[Tensor],
    lr: Sequence[float],
    eps: float,
    weight_decay: Sequence[float],
    maximize: bool,
    grad_scale: float,
    samples: int,
) -> tuple[Tensor, Tensor]:
    """`ops.adagrad_norm_`."""
    _check(params, grads, coordinate_sums, lr, weight_decay)
    if sum.numel() != 1 or sum.dtype != torch.float64:
        raise RuntimeError("adagrad_norm_: sum must be one float64 number")
    coordinates = len(coordinate_sums) > 0
    table = Table(params)
    sign = -1.0 if maximize else 1.0
    laid_out = [laid_out_as(grads[i], w, "gradient", i) for i, w in enumerate(params)]
    for i, (grid, rows) in enumerate(table.parts()):
        if params[i].numel():
            norms_kernel[grid](
                params[i], laid_out[i], rows, params[i].numel(), weight_decay[i], sign, grad_scale,
                UPDATE=True, BLOCK=BLOCK, num_warps=4, **common.OPTIONS,
            )  # fmt: skip
    norms = table.pooled(2)
    sum.add_(norms[1].view(sum.shape))
    root = sum.sqrt().add_(eps)
    factors = variance_factors(samples, grad_scale)
    for i, (grid, rows) in enumerate(table.parts()):
        w, g = params[i], laid_out[i]
        if not w.numel():
            continue
        c = laid_out_as(coordinate_sums[i], w, "coordinate sum", i) if coordinates else g
        adagrad_norm_kernel[grid](
            w, g, c, root, rows, w.numel(), lr[i], weight_decay[i], sign, grad_scale, *factors,
            COORDINATES=coordinates, BLOCK=BLOCK, num_warps=4, **common.OPTIONS,
        )  # fmt: skip
    return _results(table.pooled(TERMS) if coordinates else norms[:1])


def grad_norm_sq(tensors: Sequence[Tensor]) -> Tensor:
    """`ops.grad_norm_sq`."""
    if not tensors:
        raise RuntimeError("grad_norm_sq: no tensors")
    table = Table(tensors)
    for t, (grid, rows) in zip(tensors, table.parts(), strict=True):
        if t.numel():
            dense = t if torch.ops.aten.is_non_overlapping_and_dense.default(t) else t.contiguous()
            norms_kernel[grid](
                dense, dense, rows, t.numel(), 0.0, 1.0, 1.0,
                UPDATE=False, BLOCK=BLOCK, num_warps=4, **common.OPTIONS,
            )  # fmt: skip
    return table.pooled(1)[0]
