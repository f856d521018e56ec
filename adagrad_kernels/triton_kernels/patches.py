"""Patches of an image, gathered on the way to the tensor cores and never written.

Column r of a convolution's weight as a matrix is a channel c and a kernel element k; at the output
position p it sees x[c, stride·p + dilation·k − padding]. Offset and coordinates split into a part
of p and a part of r: an element of a patch tile costs an addition and a comparison for each
dimension, and the address. Where all columns of a tile have one k, only its positions are compared,
and an element costs little more than its address.

p is divided into rows and planes at every pass, as the number of a pass is into samples: by a
multiplication (`divisor`), since GPUs have no instruction for integer division and take some twenty
others.
"""

# Kernels are written in Triton's language, not in Python's types.
# pyright: reportArgumentType=false, reportCallIssue=false, reportAssignmentType=false

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor


def divisor(d: int) -> tuple[int, int]:
    """(magic, shift) by which `divide` divides by d ≥ 1.

    With ℓ = ⌈log2 d⌉ and magic = ⌈2^(31+ℓ)/d⌉, between 2^31 and 2^32, n // d is
    n·magic // 2^(31+ℓ) for 0 ≤ n < 2^31 (Granlund and Montgomery, PLDI 1994).
    """
    shift = (d - 1).bit_length()
    return -(-(1 << (31 + shift)) // d), shift


@triton.jit
def divide(n, magic, shift):
    """n // d, see `divisor`."""
    doubled = tl.cast(n, tl.uint32) * 2
    high = tl.umulhi(doubled, tl.cast(magic, tl.uint32))
    return tl.cast(high >> tl.cast(shift, tl.uint32), tl.int32)


@triton.jit
def patch_index(o_r, C, KD, KH, KW, BY_CHANNEL: tl.constexpr):
    """(c, kd, kh, kw) of the columns o_r of the weight as a matrix; c = C beyond the last."""
    K = KD * KH * KW
    if BY_CHANNEL:
        o_c, o_k = o_r % C, o_r // C
    else:
        o_c, o_k = o_r // K, o_r % K
    o_c = tl.where(o_r < C * K, o_c, C)
    return o_c, o_k // (KW * KH), o_k // KW % KH, o_k % KW


@triton.jit
def corners(
    o_p, OH, OW, SD, SH, SW, PD, PH, PW, w_magic, w_shift, hw_magic, hw_shift, DIMS: tl.constexpr
):
    """(d, h, w) where the patches of the output positions o_p begin, perhaps outside the image."""
    o_d, o_h, o_w = o_p * 0, o_p * 0, o_p
    if DIMS > 1:
        o_h = divide(o_p, w_magic, w_shift)
        o_w = o_p - o_h * OW
    if DIMS > 2:
        o_d = divide(o_p, hw_magic, hw_shift)
        o_h -= o_d * OH
    return o_d * SD - PD, o_h * SH - PH, o_w * SW - PW


@triton.jit
def patches(
    p_x, m, o_d, o_h, o_w, o_c, o_kd, o_kh, o_kw, D, H, W, x_c, x_d, x_h, x_w, DD, DH, DW,
    DIMS: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """x from the corners o_d, o_h, o_w on, at the kernel elements o_k; zero outside the image.

    Corners and the o_c, o_k broadcast against each other: those run along axis 1 that lie side by
    side in memory, channels for channels-last images, otherwise corners. MASKED says that `m` must
    hold as well.
    """
    d_w = o_kw * DW
    at_p, at_r = o_w * x_w, o_c * x_c + d_w * x_w
    mask = inside(o_w + d_w, W)
    if DIMS > 1:
        d_h = o_kh * DH
        at_p += o_h * x_h
        at_r += d_h * x_h
        mask = mask & inside(o_h + d_h, H)
    if DIMS > 2:
        d_d = o_kd * DD
        at_p += o_d * x_d
        at_r += d_d * x_d
        mask = mask & inside(o_d + d_d, D)
    if MASKED:
        mask = mask & m
    # Axis 1 is what lies side by side in memory, but for strides and the ends of rows. The
    # compiler cannot see that, and would have threads run along axis 0. It joins loads only where
    # it sees that their masks are the same, which is where they are contiguous indeed.
    at = tl.max_contiguous(at_p + at_r, (1, 16))
    return tl.load(p_x + at, mask=mask, other=0.0)


@triton.jit
def inside(o, n):
    """0 ≤ o < n in one comparison."""
    return tl.cast(o, tl.uint32) < tl.cast(n, tl.uint32)


def geometry(g: Tensor, x: Tensor, options: Sequence[Sequence[int]], groups: int) -> list[int]:
    """P, O, …, hw_shift: what the kernels are told of g [b, O, D', H', W'] and x [b, C, D, H, W].

    `options` are kernel_size, stride, padding and dilation, three numbers each; O and C count a
    group's channels.
    """
    sizes = [g.shape[2:].numel(), g.shape[1] // groups, x.shape[1] // groups]
    given = [number for option in options for number in option]
    strides = [g.stride(0), g.stride(1), g.stride(4), *x.stride()]
    divisors = *divisor(g.shape[4]), *divisor(g.shape[3] * g.shape[4])
    return [*sizes, *x.shape[2:], *g.shape[3:], *given, *strides, *divisors]
