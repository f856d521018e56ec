"""The input's gradient of GroupNorm and BatchNorm, from the sums that the statistics need anyway.

    rstd (h − mean(h) − x̂ mean(h x̂)),   h = scale · g

Means are over what has one statistic: the channels of a group and all pixels of a sample, or a
channel of all samples. They follow from Σ g and Σ g x̂ by channel, a few numbers that a program
reads for its tile: the kernel reads g and x once and writes once. Not measured on a GPU.
"""

# Kernels are written in Triton's language, not in Python's types.
# pyright: reportArgumentType=false, reportCallIssue=false, reportAssignmentType=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import common

ELEMENTS = 2048
"""Of a program's tile."""
LARGEST_GROUP = 32
"""Channels of a group that lies in a tile; sums of larger ones are formed before."""


@triton.jit(do_not_specialize=common.BATCH)
def norm_input_kernel(
    p_g, p_x, p_mean, p_rstd, p_scale, p_products, p_sums, p_grad,
    C, S, chunks, step, each, part,
    g_i, g_c, g_s, x_i, x_c, x_s, o_i, o_c, o_s, m_i, m_c, r_i, r_c, sums_i,
    EACH: tl.constexpr, LAST: tl.constexpr, BC: tl.constexpr, BS: tl.constexpr,
):  # fmt: skip
    """rstd (h − mean(h) − x̂ mean(h x̂)) with h = scale · g, means over what has one statistic.

    Those are groups of `each` channels, EACH in the tile; `part` is one element's share. A program
    has `step` channels, which are whole groups, and BS positions. With EACH = 0 the sums are those
    of h by group, otherwise of g by channel.
    """
    blocks = tl.cdiv(S, BS)  # on the first axis of the grid, the others end at 65535
    i, i_s = (tl.program_id(0) // blocks).to(tl.int64), tl.program_id(0) % blocks
    i_c = tl.program_id(1)
    o_n = tl.arange(0, BC)
    channel = i_c * step + o_n
    m_n = (channel < C) & (o_n < step)
    b_scale = tl.load(p_scale + channel, mask=m_n, other=0.0).to(tl.float32)
    if EACH == 0:
        o = i * sums_i + channel // each
        b_product = tl.load(p_products + o, mask=m_n, other=0.0) * part
        b_sum = tl.load(p_sums + o, mask=m_n, other=0.0) * part
    else:
        b_product = tl.zeros([BC], dtype=tl.float32)
        b_sum = tl.zeros([BC], dtype=tl.float32)
        for k in range(chunks):
            o = i * sums_i + k * C + channel
            b_product += tl.load(p_products + o, mask=m_n, other=0.0)
            b_sum += tl.load(p_sums + o, mask=m_n, other=0.0)
        b_product = group_sums(b_product * b_scale, EACH, BC) * part
        b_sum = group_sums(b_sum * b_scale, EACH, BC) * part
    p_m, p_r = p_mean + i * m_i + channel // each * m_c, p_rstd + i * r_i + channel // each * r_c
    b_mean = tl.load(p_m, mask=m_n, other=0.0).to(tl.float32)
    b_rstd = tl.load(p_r, mask=m_n, other=0.0).to(tl.float32)
    AXIS: tl.constexpr = 0 if LAST else 1  # of positions
    position = tl.expand_dims(i_s * BS + tl.arange(0, BS), 1 - AXIS)
    channel = tl.expand_dims(channel, AXIS)
    m = tl.expand_dims(m_n, AXIS) & (position < S)
    b_g = tl.load(p_g + i * g_i + channel * g_c + position * g_s, mask=m, other=0.0).to(tl.float32)
    b_x = tl.load(p_x + i * x_i + channel * x_c + position * x_s, mask=m, other=0.0).to(tl.float32)
    b_rstd = tl.expand_dims(b_rstd, AXIS)
    b_hat = (b_x - tl.expand_dims(b_mean, AXIS)) * b_rstd
    b_h = b_g * tl.expand_dims(b_scale, AXIS) - tl.expand_dims(b_sum, AXIS)
    b_grad = b_rstd * (b_h - b_hat * tl.expand_dims(b_product, AXIS))
    tl.store(p_grad + i * o_i + channel * o_c + position * o_s, b_grad, mask=m)


@triton.jit
def group_sums(b, EACH: tl.constexpr, BC: tl.constexpr):
    """For each element the sum over its group of EACH that lie side by side."""
    if EACH == 1:
        return b
    b_of_group = tl.sum(tl.reshape(b, [BC // EACH, EACH]), axis=1)
    return tl.reshape(tl.broadcast_to(b_of_group[:, None], [BC // EACH, EACH]), [BC])


def input_grad(
    g: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    scale: Tensor,
    products: Tensor,
    sums: Tensor,
    count: int,
) -> Tensor:
    """By `norm_input_kernel`, for statistics of channels.

    Args:
        g: gradient of the output, [b, 1, C, S].
        x: the input, [b, 1, C, S].
        mean: [b or 1, 1, groups, 1].
        rstd: likewise.
        scale: [C].
        products: Σ g x̂, [b or 1, chunks, C].
        sums: Σ g, likewise.
        count: elements that a statistic is of.
    """
    samples, _, channels, inner = x.shape
    groups = rstd.shape[2]
    each = channels // groups
    last = x.stride(2) == 1 and channels > 1
    block_s = min(16 if last else 1024, common.next_power_of_2(inner))
    block_c = min(common.next_power_of_2(channels), 64 if last else ELEMENTS // block_s)
    of_each, step = common.next_power_of_2(each), block_c
    if each > LARGEST_GROUP:
        products, sums = (
            (t.sum(1) * scale).view(-1, groups, each).sum(2) for t in (products, sums)
        )
        of_each = 0
    elif of_each == each:  # groups side by side in a tile
        block_c = step = max(block_c, each)
    else:  # one in it
        block_c, step = of_each, each
    grad, by_sample = torch.empty_like(x), sums.shape[0] == samples
    statistics = [n for t in (mean, rstd) for n in broadcast_strides(t, x.shape)[0:3:2]]
    norm_input_kernel[(samples * common.cdiv(inner, block_s), common.cdiv(channels, step))](
        g, x, mean, rstd, scale, products, sums, grad,
        channels, inner, sums.shape[1], step, each, 1.0 / count,
        *_strides(g), *_strides(x), *_strides(grad), *statistics, by_sample * sums.stride(0),
        EACH=of_each, LAST=last, BC=block_c, BS=block_s, num_warps=4, **common.OPTIONS,
    )  # fmt: skip
    return grad


def broadcast_strides(t: Tensor, shape: torch.Size) -> list[int]:
    """Of t as a tensor of this shape, 0 where it has a one instead."""
    sizes = zip(t.stride(), t.shape, shape, strict=True)
    return [0 if n == 1 != whole else stride for stride, n, whole in sizes]


def _strides(t: Tensor) -> tuple[int, int, int]:
    """Of sample, channel and position of [b, 1, C, S]."""
    return t.stride(0), t.stride(2), t.stride(3)
