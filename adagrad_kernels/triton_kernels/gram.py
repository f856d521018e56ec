"""Per-sample squared norms without per-sample gradients: two Gram matrices.

    ‖c_i‖² = Σ_{t,t'} ⟨g_t, g_t'⟩ ⟨x_t, x_t'⟩      for c_i = Σ_t g_t ⊗ x_t

A program forms one BLOCK×BLOCK tile of both T×T matrices of one sample in registers and stores the
sum of their product: T×T never reaches memory. Tiles above the diagonal count twice, those below
are not computed: T²(O + I)/2 multiply-adds a sample. Operands are read T/BLOCK times, from L2 when
a sample's T(O + I) numbers fit there. Two 64×64 accumulators take 64 registers a thread at 128
threads. Not measured on a GPU.
"""

# Kernels are written in Triton's language, not in Python's types.
# pyright: reportArgumentType=false, reportCallIssue=false, reportAssignmentType=false

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from . import common

BLOCK = 64
VECTOR_COST = 16
"""Tensor-core multiply-adds in the time of one fp32 vector operation (H100, 16 bits: 990 over 67
TFLOP/s; 7 in tf32)."""


@triton.jit
def gram_tile(p_v, row, column, T, n, PRECISION: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr):
    """V Vᵀ of v [T, n] on the tile that begins at (row, column)."""
    b_gram = tl.zeros([BT, BT], dtype=tl.float32)
    o_r, o_c, o_k = row + tl.arange(0, BT), column + tl.arange(0, BT), tl.arange(0, BK)
    for k in range(0, n, BK):
        m_k = (k + o_k < n)[None, :]
        b_r = tl.load(
            p_v + o_r[:, None] * n + k + o_k[None, :], mask=m_k & (o_r < T)[:, None], other=0.0
        )
        b_c = tl.load(
            p_v + o_c[:, None] * n + k + o_k[None, :], mask=m_k & (o_c < T)[:, None], other=0.0
        )
        b_gram = tl.dot(b_r, tl.trans(b_c), b_gram, input_precision=PRECISION)
    return b_gram


@triton.jit
def triangle_tile(i_tile, length):
    """(row, column) of a tile of an upper triangle, row by row: `length` tiles, one less, …"""
    row, column = 0, i_tile
    while column >= length:
        column -= length
        length -= 1
        row += 1
    return row, column + row


@triton.jit
def linear_gram_kernel(
    p_g, p_x, p_partials, T, O, I, parts, tiles,
    PRECISION: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """partials[i, tile] = Σ over the tile of (G_iG_iᵀ) ⊙ (X_iX_iᵀ), twice off the diagonal."""
    i_tile = tl.program_id(0) % tiles
    i = (tl.program_id(0) // tiles).to(tl.int64)  # a grid's other axes end at 65535
    row, column = triangle_tile(i_tile, tl.cdiv(T, BT))
    b_g = gram_tile(p_g + i * T * O, row * BT, column * BT, T, O, PRECISION, BT, BK)
    b_x = gram_tile(p_x + i * T * I, row * BT, column * BT, T, I, PRECISION, BT, BK)
    times = tl.where(row == column, 1.0, 2.0)
    tl.store(p_partials + i * parts + i_tile, tl.sum(b_g * b_x) * times)


def parts(positions: int) -> int:
    """Tiles of the upper triangle of a sample's Gram matrix."""
    tiles = common.cdiv(positions, BLOCK)
    return tiles * (tiles + 1) // 2


def linear_norms(g: Tensor, x: Tensor, partials: Tensor, precision: str) -> None:
    """Writes the parts of ‖c_i‖² to partials[:, :parts(T)] for g [b, T, O] and x [b, T, I]."""
    samples, positions, rows = g.shape
    tiles = parts(positions)
    linear_gram_kernel[(samples * tiles,)](
        g, x, partials, positions, rows, x.shape[2], partials.shape[1], tiles,
        PRECISION=precision, BT=BLOCK, BK=64 if g.itemsize == 2 else 32,
        num_warps=4, num_stages=3, **common.OPTIONS,
    )  # fmt: skip
