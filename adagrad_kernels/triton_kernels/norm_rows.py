"""The whole backward pass of LayerNorm and RMSNorm in one reading of g and x.

A program holds whole rows: it forms their means, so the input's gradient, and keeps Σ g x̂ and Σ g
of its rows by channel, as norm.py's first pass does. That is 12 bytes a float32 element, where
torch's two kernels move 20. A sample's rows are divided over programs until the device is full, but
into no more chunks than finish.py adds up by itself, if those suffice. Not measured on a GPU.
"""

# Kernels are written in Triton's language, not in Python's types.
# pyright: reportArgumentType=false, reportCallIssue=false, reportAssignmentType=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import common
from .finish import MOST_CHUNKS

ELEMENTS = 2048
"""Of a program's tile, if rows are not longer."""
LONGEST_ROW = 8192
"""Channels that a program can hold."""


@triton.jit(do_not_specialize=common.BATCH)
def norm_rows_kernel(
    p_g, p_x, p_mean, p_rstd, p_scale, p_grad, p_weight, p_bias,
    T, C, count, part, g_i, g_t, x_i, x_t, y_i, y_t, m_i, m_t, r_i, r_t,
    MEAN: tl.constexpr, BT: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """Everything for `count` tiles of positions of a sample, each with a statistic of its own.

    The input's gradient as in `norm_input_kernel`, and as in `scale_chunk_kernel` weight[i, chunk,
    c] = Σ g x̂ and bias[i, chunk, c] = Σ g; rows of C ≤ BC channels, part = 1/C.
    """
    i, i_chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
    o_c = tl.arange(0, BC)
    m_c = o_c < C
    b_scale = tl.load(p_scale + o_c, mask=m_c, other=0.0).to(tl.float32)[None, :]
    b_weight = tl.zeros([BT, BC], dtype=tl.float32)
    b_bias = tl.zeros([BT, BC], dtype=tl.float32)
    first = i_chunk * count
    for k in range(first, tl.minimum(first + count, tl.cdiv(T, BT))):
        o_t = k * BT + tl.arange(0, BT)
        inside = o_t < T
        m = inside[:, None] & m_c[None, :]
        t = o_t.to(tl.int64)
        b_g = tl.load(p_g + i * g_i + t[:, None] * g_t + o_c[None, :], mask=m, other=0.0)
        b_x = tl.load(p_x + i * x_i + t[:, None] * x_t + o_c[None, :], mask=m, other=0.0)
        b_g, b_hat = b_g.to(tl.float32), b_x.to(tl.float32)
        b_rstd = tl.load(p_rstd + i * r_i + t * r_t, mask=inside, other=0.0).to(tl.float32)[:, None]
        if MEAN:
            b_mean = tl.load(p_mean + i * m_i + t * m_t, mask=inside, other=0.0).to(tl.float32)
            b_hat -= b_mean[:, None]
        b_hat = tl.where(m, b_hat * b_rstd, 0.0)
        b_h = b_g * b_scale
        b_grad = b_h - b_hat * (tl.sum(b_h * b_hat, axis=1) * part)[:, None]
        if MEAN:
            b_grad -= (tl.sum(b_h, axis=1) * part)[:, None]
        p_rows = p_grad + i * y_i + t[:, None] * y_t + o_c[None, :]
        tl.store(p_rows, b_rstd * b_grad, mask=m)
        b_weight += b_g * b_hat
        b_bias += b_g
    o_out = (i * tl.num_programs(1) + i_chunk) * C + o_c
    tl.store(p_weight + o_out, tl.sum(b_weight, axis=0), mask=m_c)
    tl.store(p_bias + o_out, tl.sum(b_bias, axis=0), mask=m_c)


def norm_rows(
    g: Tensor, x: Tensor, mean: Tensor | None, rstd: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor]:
    """(the input's gradient, Σ_t g x̂ and Σ_t g by chunks, [2, b, chunks, C]).

    Args:
        g: gradient of the output, [b, T, C, 1].
        x: the input, likewise.
        mean: [b, T, 1, 1], or None.
        rstd: [b, T, 1, 1].
        scale: [C].
    """
    samples, positions, channels, _ = x.shape
    block_c = max(16, common.next_power_of_2(channels))
    block_t = min(max(1, ELEMENTS // block_c), common.next_power_of_2(positions))
    tiles, processors = common.cdiv(positions, block_t), common.multiprocessors(x.device)
    chunks = min(tiles, common.cdiv(4 * processors, samples))
    if chunks > MOST_CHUNKS and samples * MOST_CHUNKS >= processors:
        chunks = MOST_CHUNKS
    count = common.cdiv(tiles, chunks)
    chunks = common.cdiv(tiles, count)
    g = g if g.stride(2) == 1 else g.contiguous()
    x_rows = x if x.stride(2) == 1 else x.contiguous()
    grad = torch.empty_like(x_rows)
    made = torch.empty(2, samples, chunks, channels, dtype=torch.float32, device=x.device)
    strides = [
        n for t in (g, x_rows, grad, rstd if mean is None else mean, rstd) for n in t.stride()[:2]
    ]
    norm_rows_kernel[(samples, chunks)](
        g, x_rows, rstd if mean is None else mean, rstd, scale, grad, made[0], made[1],
        positions, channels, count, 1.0 / channels, *strides,
        MEAN=mean is not None, BT=block_t, BC=block_c,
        num_warps=min(16, max(4, block_t * block_c // 256)), **common.OPTIONS,
    )  # fmt: skip
    return grad if x_rows is x else torch.empty_like(x).copy_(grad), made
