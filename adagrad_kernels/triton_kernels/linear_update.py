"""A linear layer's AdaGrad update inside its weight-gradient kernel: no gradient in memory.

A program forms its whole tile of ḡ = Σ_i c_i as linear.py does (never in pieces: a tile must be
complete), then updates w and v of that tile: 16 bytes a float32 parameter, where writing the
gradient and a fused step move 24. Per-sample norms and coordinate sums come out as always; ‖ḡ‖² and
the reductions of the coordinate tests too, without another pass. Worth it where the update is
memory-bound: small b·T against the layer. Tiles are smaller than in linear.py, because w and v of a
tile are in registers beside its sums. Not measured on a GPU.
"""

# Kernels are written in Triton's language, not in Python's types.
# pyright: reportArgumentType=false, reportCallIssue=false, reportAssignmentType=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import common
from .adagrad import adagrad_block, pool_terms, store_terms, variance_block, variance_factors
from .finish import check_capacity
from .linear import direct_tile, finish_layer, is_even, operands, outer_tile
from .tiles import matmul_precision, tile_for, tile_index


@triton.jit(do_not_specialize=common.BATCH)
def linear_adagrad_kernel(
    p_g, p_x, p_w, p_v, p_square, p_partials, p_table,
    samples, T, O, I, parts, lr, eps, weight_decay, sign, grad_scale, of_sums, of_square,
    EVEN: tl.constexpr, OUTER: tl.constexpr, SQUARES: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Updates w and v on one tile, and writes the tile's row of the table (see adagrad.py)."""
    i_tile = tl.program_id(0)
    i_m, i_n = tile_index(i_tile, tl.cdiv(O, BM), tl.cdiv(I, BN))
    o_m, o_n = i_m * BM + tl.arange(0, BM), i_n * BN + tl.arange(0, BN)
    m = (o_m < O)[:, None] & (o_n < I)[None, :]
    o = o_m[:, None].to(tl.int64) * I + o_n[None, :]
    # Under way while the tile's gradient is being formed: nothing of it depends on them.
    b_w = tl.load(p_w + o, mask=m, other=0.0)
    b_v = tl.load(p_v + o, mask=m, other=1.0)
    if OUTER:
        b_g, b_c = outer_tile(p_g, p_x, o_m, o_n, 0, samples, O, I, SQUARES, PRECISION, BM, BN, BK)
    else:
        b_g, b_c = direct_tile(
            p_g, p_x, p_partials + i_tile, o_m, o_n, 0, samples, T, O, I, parts,
            EVEN, SQUARES, PRECISION, BM, BN, BK,
        )  # fmt: skip
    if SQUARES:
        tl.store(p_square + o, b_c, mask=m)
    b_g *= grad_scale
    b_w, b_v, b_root = adagrad_block(b_w.to(tl.float32), b_g, b_v, lr, eps, weight_decay, sign)
    tl.store(p_w + o, b_w, mask=m)
    tl.store(p_v + o, b_v, mask=m)
    b_var, b_ratio, b_metric, b_grad = variance_block(b_g, b_c, b_root, of_sums, of_square)
    store_terms(p_table + i_tile * 5, b_g * b_g, b_var, b_ratio, b_metric, b_grad, SQUARES)


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
    """`linear_weight_grad` and `adagrad_` of the weight in one kernel.

    Args:
        grad_out: gradient of the output, [b, …, O].
        input: the layer's input, [b, …, I].
        weight: w [O, I], contiguous; updated.
        sum: the accumulator v [O, I], contiguous, float32; updated.
        capacity: columns of the probe, at least b.
        bias: whether the bias gradient is wanted (the bias itself is not updated).
        coordinates: whether sums of squares and their reductions are wanted.
        lr: as in `ops.adagrad_`; eps, weight_decay, maximize, grad_scale likewise.
        eps: see above.
        weight_decay: see above.
        maximize: see above.
        grad_scale: see above.

    Returns:
        ‖ḡ‖² of the weight (float64, 0-dim), the reductions [4] of `ops.adagrad_` with N = b ([0]
        without coordinates), grad_bias [O], probe [2, capacity], weight_sums [O, I] and bias_sums
        [O] as in `ops.linear_weight_grad`.

    Raises:
        RuntimeError: shapes, dtypes or layouts that do not fit, or b > capacity; nothing was
            updated then.
    """
    g, x = operands("linear_adagrad_", grad_out, input)
    samples, positions, rows = g.shape
    check_capacity(samples, capacity)
    columns = x.shape[2]
    for name, t in (("weight", weight), ("sum", sum)):
        if t.shape != (rows, columns) or not t.is_contiguous():
            raise RuntimeError(
                f"linear_adagrad_: {name} must be a contiguous tensor [{rows}, {columns}], got "
                f"{list(t.shape)}"
            )
    if sum.dtype != torch.float32:
        raise RuntimeError(f"linear_adagrad_: sum must be float32, got {sum.dtype}")
    outer = positions == 1
    tile = tile_for(g, x, coordinates, update=True)
    tiles = common.cdiv(rows, tile.BM) * common.cdiv(columns, tile.BN)
    parts = 0 if outer else tiles

    def empty(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=g.device)

    partials, table = empty(samples, parts), empty(tiles, 5)
    squares = empty(rows, columns) if coordinates else empty(0)
    linear_adagrad_kernel[(tiles,)](
        g, x, weight, sum, squares, partials, table,
        samples, positions, rows, columns, parts,
        lr, eps, weight_decay, -1.0 if maximize else 1.0, grad_scale,
        *variance_factors(samples, grad_scale),
        EVEN=is_even(tile, positions, rows, columns),
        OUTER=outer, SQUARES=coordinates, PRECISION=matmul_precision(),
        **tile._asdict(), **common.OPTIONS,
    )  # fmt: skip
    grad_bias, probe, bias_sums = finish_layer(g, x, partials, capacity, True, bias, coordinates)
    terms = pool_terms(table, 5 if coordinates else 1)
    return terms[0].clone(), terms[1:].clone(), grad_bias, probe, squares, bias_sums
