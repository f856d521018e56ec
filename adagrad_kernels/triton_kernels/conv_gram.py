"""A convolution's per-sample norms without per-sample gradients, where positions are few.

As gram.py for linear layers, with rows of patches in the place of inputs: for P output pixels,
    ‖c_i‖² = Σ_{p,p'} ⟨g_p, g_p'⟩ ⟨x_p, x_p'⟩,      x_p the patch [R] that pixel p sees, R = C·K
and the weight gradient is one product over the pixels of all samples. Beyond that product a sample
costs P²(O + R) multiply-adds and one gathering of its P·R patch elements (patches.py; two for each
pair of BLOCK pixels, if there are more), where the direct form takes three vector operations for
each of its O·R coordinates: the last stage of a ResNet, 512 channels and 16 pixels. Not measured on
a GPU.
"""

# Kernels are written in Triton's language, not in Python's types.
# pyright: reportArgumentType=false, reportCallIssue=false, reportAssignmentType=false

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from . import common, gram
from .patches import corners, divide, divisor, geometry, patch_index, patches


@triton.jit(do_not_specialize=common.MAGIC)
def conv_gram_kernel(
    p_g, p_x, p_partials,
    P, O, C, D, H, W, OH, OW, KD, KH, KW, SD, SH, SW, PD, PH, PW, DD, DH, DW,
    g_i, g_c, g_p, x_i, x_c, x_d, x_h, x_w, w_magic, w_shift, hw_magic, hw_shift,
    c_magic, c_shift, kw_magic, kw_shift, khw_magic, khw_shift, parts, tiles, groups,
    DIMS: tl.constexpr, X_LAST: tl.constexpr, ONE: tl.constexpr, ONE_K: tl.constexpr,
    PRECISION: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr,
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
    AXIS: tl.constexpr = 1 if X_LAST else 0  # of positions; threads run along what is contiguous
    o_rx, o_qx = tl.expand_dims(o_r, AXIS), tl.expand_dims(o_q, AXIS)
    r_d, r_h, r_w = corners(
        o_rx, OH, OW, SD, SH, SW, PD, PH, PW, w_magic, w_shift, hw_magic, hw_shift, DIMS
    )
    q_d, q_h, q_w = corners(
        o_qx, OH, OW, SD, SH, SW, PD, PH, PW, w_magic, w_shift, hw_magic, hw_shift, DIMS
    )
    for k in range(0, C * KD * KH * KW, BK):
        if ONE_K:  # the columns are channels of one kernel element
            i_k = divide(k, c_magic, c_shift)
            o_c = tl.multiple_of(k - i_k * C, BK) + o_k
            o_kd, o_kh = divide(i_k, khw_magic, khw_shift), divide(i_k, kw_magic, kw_shift)
            o_kh, o_kw = o_kh - o_kd * KH, i_k - o_kh * KW
        else:
            o_c, o_kd, o_kh, o_kw = patch_index(k + o_k, C, KD, KH, KW, X_LAST)
            o_kd, o_kh = tl.expand_dims(o_kd, 1 - AXIS), tl.expand_dims(o_kh, 1 - AXIS)
            o_kw = tl.expand_dims(o_kw, 1 - AXIS)
        o_c = tl.expand_dims(o_c, 1 - AXIS)
        m_c = o_c < C
        b_r = patches(
            p_x, (o_rx < P) & m_c, r_d, r_h, r_w, o_c, o_kd, o_kh, o_kw,
            D, H, W, x_c, x_d, x_h, x_w, DD, DH, DW, DIMS, MASKED=True,
        )  # fmt: skip
        b_q = b_r
        if not ONE:
            b_q = patches(
                p_x, (o_qx < P) & m_c, q_d, q_h, q_w, o_c, o_kd, o_kh, o_kw,
                D, H, W, x_c, x_d, x_h, x_w, DD, DH, DW, DIMS, MASKED=True,
            )  # fmt: skip
        if X_LAST:
            b_x = tl.dot(b_r, tl.trans(b_q), b_x, input_precision=PRECISION)
        else:
            b_x = tl.dot(tl.trans(b_r), b_q, b_x, input_precision=PRECISION)
    times = tl.where(row == column, 1.0, 2.0)
    p_out = p_partials + i * parts + i_group * tiles + i_tile
    tl.store(p_out, tl.sum(b_g * b_x) * times)


def block(positions: int) -> int:
    """Pixels of a tile of the Gram matrices."""
    return min(gram.BLOCK, max(16, common.next_power_of_2(positions)))


def parts(positions: int) -> int:
    """Tiles of the upper triangle of a sample's Gram matrix."""
    tiles = common.cdiv(positions, block(positions))
    return tiles * (tiles + 1) // 2


def prefers_gram(
    positions: int, rows: int, columns: int, coordinates: bool, itemsize: int = 4
) -> bool:
    """Whether a sample's norm is cheaper from two Gram matrices than from c_i [rows, columns].

    In instructions of one lane beyond the weight gradient's, roughly as in the machine code for
    sm_90: 8 for an element of a patch and 300 for a row of BLOCK pixels at every pass, against 3
    for a coordinate of c_i. 16-bit operands' sum over the samples then is a product in TF32, which
    takes twice the time (`sum_of_samples`).
    """
    tiles, size = parts(positions), block(positions)
    gathers = (1 if tiles == 1 else 2 * tiles) * columns * (8 * size + 300)
    slower = positions * rows * columns // 10 if itemsize == 2 else 0
    return not coordinates and gathers + slower < 3 * rows * columns


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
    channels, (_, height, width) = x.shape[1] // groups, options[0]
    divisors = *divisor(channels), *divisor(width), *divisor(height * width)
    conv_gram_kernel[(g.shape[0] * groups * tiles,)](
        g, x, partials, *geometry(g, x, options, groups), *divisors,
        partials.shape[1], tiles, groups,
        DIMS=dims, X_LAST=x.stride(1) == 1, ONE=tiles == 1,
        ONE_K=channels % block_k == 0, PRECISION=precision,
        BT=size, BK=block_k, num_warps=4, num_stages=3, **common.OPTIONS,
    )  # fmt: skip
