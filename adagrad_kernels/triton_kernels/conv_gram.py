"""A convolution's per-sample norms without per-sample gradients, where positions are few.

As gram.py for linear layers, with rows of patches in the place of inputs: for P output pixels,
    ‖c_i‖² = Σ_{p,p'} ⟨g_p, g_p'⟩ ⟨x_p, x_p'⟩,      x_p the patch [R] that pixel p sees, R = C·K
and the weight gradient is one product over the pixels of all samples. Beyond that product a sample
costs P²(O + R) multiply-adds and one gathering of its P·R patch elements (patches.py; two for each
pair of BLOCK pixels, if there are more), where the direct form takes two vector operations for each
of its O·R coordinates: the last stages of a ResNet, 512 channels and 16 to 64 pixels. Not measured
on a GPU.
"""

# Kernels are written in Triton's language, not in Python's types.
# pyright: reportArgumentType=false, reportCallIssue=false, reportAssignmentType=false

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from . import common, gram
from .patches import GATHER_COST, geometry, patch_index, patches


@triton.jit
def conv_gram_kernel(
    p_g, p_x, p_partials,
    P, O, C, D, H, W, OH, OW, KD, KH, KW, SD, SH, SW, PD, PH, PW, DD, DH, DW,
    g_i, g_c, g_p, x_i, x_c, x_d, x_h, x_w, parts, tiles, groups,
    DIMS: tl.constexpr, X_LAST: tl.constexpr, ONE: tl.constexpr, PRECISION: tl.constexpr,
    BT: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """partials[i, group, tile] = Σ over the tile of both Gram matrices' product, as in gram.py.

    O and C count a group's channels; ONE says that there is one tile, the whole triangle.
    """
    i_tile, i_rest = tl.program_id(0) % tiles, tl.program_id(0) // tiles
    i_group, i = (i_rest % groups).to(tl.int64), (i_rest // groups).to(tl.int64)
    row, column = gram.triangle_tile(i_tile, tl.cdiv(P, BT))
    p_g += i * g_i + i_group * O * g_c
    p_x += i * x_i + i_group * C * x_c
    o_r, o_q = row * BT + tl.arange(0, BT), column * BT + tl.arange(0, BT)
    o_k = tl.arange(0, BK)
    b_g = tl.zeros([BT, BT], dtype=tl.float32)
    for k in range(0, O, BK):
        m_k = (k + o_k < O)[None, :]
        p_k = p_g + (k + o_k)[None, :] * g_c
        b_r = tl.load(p_k + o_r[:, None] * g_p, mask=m_k & (o_r < P)[:, None], other=0.0)
        b_q = b_r
        if not ONE:
            b_q = tl.load(p_k + o_q[:, None] * g_p, mask=m_k & (o_q < P)[:, None], other=0.0)
        b_g = tl.dot(b_r, tl.trans(b_q), b_g, input_precision=PRECISION)
    b_x = tl.zeros([BT, BT], dtype=tl.float32)
    for k in range(0, C * KD * KH * KW, BK):
        o_c, o_kd, o_kh, o_kw = patch_index(k + o_k, C, KD, KH, KW, X_LAST)
        b_r = position_patches(
            p_x, o_r, o_c, o_kd, o_kh, o_kw, D, H, W, OH, OW, x_c, x_d, x_h, x_w,
            SD, SH, SW, PD, PH, PW, DD, DH, DW, P, C, DIMS, X_LAST,
        )  # fmt: skip
        b_q = b_r
        if not ONE:
            b_q = position_patches(
                p_x, o_q, o_c, o_kd, o_kh, o_kw, D, H, W, OH, OW, x_c, x_d, x_h, x_w,
                SD, SH, SW, PD, PH, PW, DD, DH, DW, P, C, DIMS, X_LAST,
            )  # fmt: skip
        b_x = tl.dot(b_r, tl.trans(b_q), b_x, input_precision=PRECISION)
    times = tl.where(row == column, 1.0, 2.0)
    p_out = p_partials + i * parts + i_group * tiles + i_tile
    tl.store(p_out, tl.sum(b_g * b_x) * times)


@triton.jit
def position_patches(
    p_x, o_p, o_c, o_kd, o_kh, o_kw, D, H, W, OH, OW, x_c, x_d, x_h, x_w,
    SD, SH, SW, PD, PH, PW, DD, DH, DW, P, C, DIMS: tl.constexpr, X_LAST: tl.constexpr,
):  # fmt: skip
    """`patches` as [positions, columns]; threads run along what is contiguous."""
    if X_LAST:
        b = patches(
            p_x, o_p[:, None], o_c[None, :], o_kd[None, :], o_kh[None, :], o_kw[None, :],
            D, H, W, OH, OW, x_c, x_d, x_h, x_w, SD, SH, SW, PD, PH, PW, DD, DH, DW, P, C, DIMS,
        )  # fmt: skip
    else:
        b = patches(
            p_x, o_p[None, :], o_c[:, None], o_kd[:, None], o_kh[:, None], o_kw[:, None],
            D, H, W, OH, OW, x_c, x_d, x_h, x_w, SD, SH, SW, PD, PH, PW, DD, DH, DW, P, C, DIMS,
        )  # fmt: skip
        b = tl.trans(b)
    return b


def block(positions: int) -> int:
    """Pixels of a tile of the Gram matrices."""
    return min(gram.BLOCK, max(16, common.next_power_of_2(positions)))


def parts(positions: int) -> int:
    """Tiles of the upper triangle of a sample's Gram matrix."""
    tiles = common.cdiv(positions, block(positions))
    return tiles * (tiles + 1) // 2


def prefers_gram(positions: int, rows: int, columns: int, coordinates: bool) -> bool:
    """Whether a sample's norm is cheaper from two Gram matrices than from c_i [rows, columns].

    In vector operations; both forms gather every patch once for the weight gradient.
    """
    tiles, size = parts(positions), block(positions)
    products = tiles * size**2 * (rows + columns) // gram.VECTOR_COST
    gathers = (1 if tiles == 1 else 2 * tiles) * size * columns * GATHER_COST
    return not coordinates and products + gathers < 2 * rows * columns


def conv_norms(
    g: Tensor,
    x: Tensor,
    options: Sequence[Sequence[int]],
    dims: int,
    groups: int,
    partials: Tensor,
    precision: str,
) -> None:
    """Writes the parts of ‖c_i‖² to partials[:, :groups · parts(P)]; arguments as in conv.py."""
    positions = g.shape[2:].numel()
    tiles, size = parts(positions), block(positions)
    block_k = 64 if g.itemsize == 2 else 16 if precision == "tf32x3" else 32
    conv_gram_kernel[(g.shape[0] * groups * tiles,)](
        g, x, partials, *geometry(g, x, options, groups), partials.shape[1], tiles, groups,
        DIMS=dims, X_LAST=x.stride(1) == 1, ONE=tiles == 1, PRECISION=precision,
        BT=size, BK=block_k, num_warps=4, num_stages=3, **common.OPTIONS,
    )  # fmt: skip
