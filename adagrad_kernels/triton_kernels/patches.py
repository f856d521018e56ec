"""Patches of an image, gathered on the way to the tensor cores and never written.

Column r of a convolution's weight as a matrix is a channel c and a kernel element k; at the output
position p it sees x[c, stride·p + dilation·k − padding]. Offset and coordinates split into a part
of p and a part of r: an element of a patch tile costs about eight integer operations, two
additions and a comparison for each dimension, and the address.
"""

# Kernels are written in Triton's language, not in Python's types.
# pyright: reportArgumentType=false, reportCallIssue=false, reportAssignmentType=false

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

GATHER_COST = 8
"""Integer operations for an element of a patch tile."""


@triton.jit
def patch_index(o_r, C, KD, KH, KW, CHANNELS_LAST: tl.constexpr):
    """(c, kd, kh, kw) of the columns o_r of the weight as a matrix; c = C beyond the last."""
    K = KD * KH * KW
    if CHANNELS_LAST:
        o_c, o_k = o_r % C, o_r // C
    else:
        o_c, o_k = o_r // K, o_r % K
    o_c = tl.where(o_r < C * K, o_c, C)
    return o_c, o_k // (KW * KH), o_k // KW % KH, o_k % KW


@triton.jit
def patches(
    p_x, o_p, o_c, o_kd, o_kh, o_kw, D, H, W, OH, OW, x_c, x_d, x_h, x_w,
    SD, SH, SW, PD, PH, PW, DD, DH, DW, P, C, DIMS: tl.constexpr,
):  # fmt: skip
    """x at the positions o_p seen through the kernel elements o_k, zero outside the image.

    o_p (and p_x, if it is not one pointer) and the o_c, o_k broadcast against each other: either
    may run along either axis.
    """
    o_w, d_w = o_p % OW * SW - PW, o_kw * DW
    at_p, at_r = o_w * x_w, o_c * x_c + d_w * x_w
    mask = (o_p < P) & (o_c < C) & (o_w + d_w >= 0) & (o_w + d_w < W)
    if DIMS > 1:
        o_h, d_h = o_p // OW % OH * SH - PH, o_kh * DH
        at_p += o_h * x_h
        at_r += d_h * x_h
        mask = mask & (o_h + d_h >= 0) & (o_h + d_h < H)
    if DIMS > 2:
        o_d, d_d = o_p // (OW * OH) * SD - PD, o_kd * DD
        at_p += o_d * x_d
        at_r += d_d * x_d
        mask = mask & (o_d + d_d >= 0) & (o_d + d_d < D)
    return tl.load(p_x + (at_p + at_r), mask=mask, other=0.0)


def geometry(g: Tensor, x: Tensor, options: Sequence[Sequence[int]], groups: int) -> list[int]:
    """P, O, …, x_w: what the kernels are told of g [b, O, D', H', W'] and x [b, C, D, H, W].

    `options` are kernel_size, stride, padding and dilation, three numbers each; O and C count a
    group's channels.
    """
    sizes = [g.shape[2:].numel(), g.shape[1] // groups, x.shape[1] // groups]
    given = [number for option in options for number in option]
    strides = [g.stride(0), g.stride(1), g.stride(4), *x.stride()]
    return [*sizes, *x.shape[2:], *g.shape[3:], *given, *strides]
