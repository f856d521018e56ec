"""Gradients of scale and shift by channel (normalisation layers) with per-sample statistics.

    c_i[c] = Σ_{t,s} g[i, t, c, s] x̂[i, t, c, s],   x̂ = (x − mean) rstd,   and the bias Σ_{t,s} g

First pass: a program sums up to CHUNK positions of one sample and a block of channels, and writes
two numbers a channel to [b, chunks, C]. It reads g and x once and writes 1/CHUNK of that, or more
where programs are few: memory-bound, with b·chunks·C/block programs. Threads run along channels
where those are contiguous, otherwise along positions. The second pass is that of finish.py over
what is left.

The input's gradient needs just these sums, of GroupNorm by sample and group, of BatchNorm over all
samples. So the whole backward pass reads g and x twice and writes once, like torch's, which forms
such sums for itself. LayerNorm and RMSNorm have their statistics by row: a program that holds whole
rows does all of the first pass, and the input's gradient, in one reading, where torch's takes two.

Not measured on a GPU.
"""

# Kernels are written in Triton's language, not in Python's types.
# pyright: reportArgumentType=false, reportCallIssue=false, reportAssignmentType=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import reference
from . import common
from .finish import MOST_CHUNKS, finish

CHUNK = 512
ELEMENTS = 2048
"""Of the input's gradient in a program's tile."""
LONGEST_ROW = 8192
"""Channels that a program holds at a time."""
LARGEST_GROUP = 32
"""Channels of a group that lies in a tile; sums of larger ones are formed before."""
NONE, CHANNEL, POSITION, ELEMENT = (tl.constexpr(kind) for kind in range(4))


@triton.jit(do_not_specialize=common.BATCH)
def scale_chunk_kernel(
    p_g, p_x, p_mean, p_rstd, p_weight, p_bias, C, S, P, count, each,
    g_i, g_t, g_c, g_s, x_i, x_t, x_c, x_s, m_i, m_t, m_c, m_s, r_i, r_t, r_c, r_s,
    MEAN: tl.constexpr, RSTD: tl.constexpr, WEIGHT: tl.constexpr, LAST: tl.constexpr,
    ONE_T: tl.constexpr, BP: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """weight[i, chunk, c] = Σ g x̂ and bias[i, chunk, c] = Σ g over a chunk of P = T·S positions.

    A chunk is `count` tiles, [positions, channels] with LAST (channels contiguous), [channels,
    positions] else. MEAN and RSTD are kinds (`_kind`).
    """
    i, i_chunk, i_c = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    if LAST:
        o_c = (i_c * BC + tl.arange(0, BC))[None, :]
        o_k = tl.arange(0, BP)[:, None]
    else:
        o_c = (i_c * BC + tl.arange(0, BC))[:, None]
        o_k = tl.arange(0, BP)[None, :]
    b_mean, b_rstd = 0.0, 1.0
    if WEIGHT and MEAN == CHANNEL:
        p_m = p_mean + i * m_i + o_c // each * m_c
        b_mean = tl.load(p_m, mask=o_c < C, other=0.0).to(tl.float32)
    if WEIGHT and RSTD == CHANNEL:
        p_r = p_rstd + i * r_i + o_c // each * r_c
        b_rstd = tl.load(p_r, mask=o_c < C, other=0.0).to(tl.float32)
    b_weight = tl.zeros(tl.broadcast(o_c, o_k)[0].shape, dtype=tl.float32)
    b_bias = tl.zeros(tl.broadcast(o_c, o_k)[0].shape, dtype=tl.float32)
    first = i_chunk * count
    for k in range(first, tl.minimum(first + count, tl.cdiv(P, BP))):
        o_p = k * BP + o_k
        o_t, o_s = o_p * 0, o_p
        if not ONE_T:
            o_t, o_s = o_p // S, o_p % S
        m = (o_p < P) & (o_c < C)
        b_g = tl.load(p_g + i * g_i + o_t * g_t + o_c * g_c + o_s * g_s, mask=m, other=0.0)
        b_g = b_g.to(tl.float32)
        b_bias += b_g
        if WEIGHT:
            b_x = tl.load(p_x + i * x_i + o_t * x_t + o_c * x_c + o_s * x_s, mask=m, other=0.0)
            b_x = b_x.to(tl.float32)
            if MEAN == CHANNEL:
                b_x -= b_mean
            if MEAN == POSITION:
                p_m = p_mean + i * m_i + o_t * m_t + o_s * m_s
                b_x -= tl.load(p_m, mask=o_p < P, other=0.0).to(tl.float32)
            if MEAN == ELEMENT:
                p_m = p_mean + i * m_i + o_t * m_t + o_c * m_c + o_s * m_s
                b_x -= tl.load(p_m, mask=m, other=0.0).to(tl.float32)
            if RSTD == CHANNEL:
                b_x *= b_rstd
            if RSTD == POSITION:
                p_r = p_rstd + i * r_i + o_t * r_t + o_s * r_s
                b_x *= tl.load(p_r, mask=o_p < P, other=0.0).to(tl.float32)
            if RSTD == ELEMENT:
                p_r = p_rstd + i * r_i + o_t * r_t + o_c * r_c + o_s * r_s
                b_x *= tl.load(p_r, mask=m, other=0.0).to(tl.float32)
            b_weight += b_g * b_x
    AXIS: tl.constexpr = 0 if LAST else 1
    o_out = (i * tl.num_programs(1) + i_chunk) * C + i_c * BC + tl.arange(0, BC)
    m_out = i_c * BC + tl.arange(0, BC) < C
    tl.store(p_bias + o_out, tl.sum(b_bias, axis=AXIS), mask=m_out)
    if WEIGHT:
        tl.store(p_weight + o_out, tl.sum(b_weight, axis=AXIS), mask=m_out)


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
    i, i_c, i_s = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
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


def _kind(t: Tensor | None) -> int:
    """What a statistic [b, T, C or groups, S], with ones where it is the same, depends on."""
    if t is None:
        return NONE.value
    if t.shape[1] == t.shape[3] == 1:
        return CHANNEL.value
    return (POSITION if t.shape[2] == 1 else ELEMENT).value


def _broadcast_strides(t: Tensor, shape: torch.Size) -> list[int]:
    """Of t as a tensor of this shape, 0 where it has a one instead."""
    sizes = zip(t.stride(), t.shape, shape, strict=True)
    return [0 if n == 1 != whole else stride for stride, n, whole in sizes]


def chunk_sums(
    g: Tensor, x: Tensor, mean: Tensor | None, rstd: Tensor | None, weight: bool
) -> Tensor:
    """Σ_ts g x̂ and Σ_ts g of samples and channels, by chunks of positions: [2, b, chunks, C]."""
    samples, outer, channels, inner = g.shape
    positions = outer * inner
    last = g.stride(2) == 1 and channels > 1
    size = common.next_power_of_2(channels)
    bp, bc = (8, min(128, size)) if last else (128, min(8, size))
    chunk = CHUNK  # smaller where there would be too few programs
    while chunk > 4 * bp and (
        samples * common.cdiv(positions, chunk) * common.cdiv(channels, bc)
        < 8 * common.multiprocessors(g.device)
    ):
        chunk //= 2
    chunks = common.cdiv(positions, chunk)
    kinds, each = (_kind(mean), _kind(rstd)), 1
    strides = []
    for t, kind in zip((mean, rstd), kinds, strict=True):
        if t is not None and kind == CHANNEL.value:
            each = channels // t.shape[2]
        strides += [0] * 4 if t is None else _broadcast_strides(t, g.shape)
    made = torch.empty(2, samples, chunks, channels, dtype=torch.float32, device=g.device)
    scale_chunk_kernel[(samples, chunks, common.cdiv(channels, bc))](
        g, x, g if mean is None else mean, g if rstd is None else rstd, made[0], made[1],
        channels, inner, positions, chunk // bp, each, *g.stride(), *x.stride(), *strides,
        MEAN=kinds[0], RSTD=kinds[1], WEIGHT=weight, LAST=last, ONE_T=outer == 1,
        BP=bp, BC=bc, num_warps=4, **common.OPTIONS,
    )  # fmt: skip
    return made


def scale_weight_grad(
    grad_out: Tensor,
    input: Tensor,
    mean: Tensor | None,
    rstd: Tensor | None,
    capacity: int,
    weight: bool,
    bias: bool,
    coordinates: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`ops.scale_weight_grad`."""
    if grad_out.dim() != 4 or grad_out.shape != input.shape:
        raise RuntimeError(
            "scale_weight_grad: expected grad_out and input [b, T, C, S], got "
            f"{list(grad_out.shape)} and {list(input.shape)}"
        )
    vectors = None
    if weight or bias:
        vectors = chunk_sums(grad_out, input, mean, rstd, weight)[1 - weight : 1 + bias]
    done = finish(input.device, None, vectors, grad_out.shape[0], capacity, coordinates)
    grad, sums = done.sums[0] if weight else common.nothing(input, 2)
    grad_bias, bias_sums = done.sums[-1] if bias else common.nothing(input, 2)
    return grad, grad_bias, done.probe, sums, bias_sums


def _other_input_grad(
    g: Tensor, x: Tensor, mean: Tensor | None, rstd: Tensor, scale: Tensor, by_row: bool
) -> Tensor:
    """Of long rows, by torch's own kernel if there is one; of what no layer of torch's has."""
    if mean is None or not by_row:
        dtype = torch.float32
        return reference.norm_input_grad(g.to(dtype), x.to(dtype), mean, rstd, scale)
    rows, one = x.shape[:3], (*x.shape[:2], 1)
    return torch.ops.aten.native_layer_norm_backward.default(
        g.reshape(rows).contiguous(), x.reshape(rows).contiguous(), [x.shape[2]],
        mean.reshape(one), rstd.reshape(one), scale, None, [True, False, False],
    )[0]  # fmt: skip


def _rows(
    g: Tensor, x: Tensor, mean: Tensor | None, rstd: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor]:
    """(the input's gradient, what `chunk_sums` returns) by `norm_rows_kernel`.

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
    return grad, made


def _input_grad(
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
    statistics = [n for t in (mean, rstd) for n in _broadcast_strides(t, x.shape)[0:3:2]]
    norm_input_kernel[(samples, common.cdiv(channels, step), common.cdiv(inner, block_s))](
        g, x, mean, rstd, scale, products, sums, grad,
        channels, inner, sums.shape[1], step, each, 1.0 / count,
        *_strides(g), *_strides(x), *_strides(grad), *statistics, by_sample * sums.stride(0),
        EACH=of_each, LAST=last, BC=block_c, BS=block_s, num_warps=4, **common.OPTIONS,
    )  # fmt: skip
    return grad


def _strides(t: Tensor) -> tuple[int, int, int]:
    """Of sample, channel and position of [b, 1, C, S]."""
    return t.stride(0), t.stride(2), t.stride(3)


def norm_backward(
    grad_out: Tensor,
    input: Tensor,
    mean: Tensor | None,
    rstd: Tensor,
    scale: Tensor,
    capacity: int,
    weight: bool,
    bias: bool,
    coordinates: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`ops.norm_backward`."""
    reference.check_norm(grad_out, input, mean, rstd, scale)
    samples, positions, channels, inner = input.shape
    each = channels // rstd.shape[2]
    by_row = each * inner == channels and rstd.shape[0] == samples
    if (not by_row and (mean is None or positions > 1)) or (channels > LONGEST_ROW and by_row):
        grad = _other_input_grad(grad_out, input, mean, rstd, scale, by_row)
        if _kind(rstd) == ELEMENT.value:
            mean, rstd = (t if t is None else t.repeat_interleave(each, 2) for t in (mean, rstd))
        return torch.empty_like(input).copy_(grad.reshape(input.shape)), *scale_weight_grad(
            grad_out, input, mean, rstd, capacity, weight, bias, coordinates
        )
    grad = None
    if by_row:
        grad, vectors = _rows(grad_out, input, mean, rstd, scale)
    else:
        vectors = chunk_sums(grad_out, input, mean, rstd, True)
    kept = vectors[1 - weight : 1 + bias] if weight or bias else None
    done = finish(input.device, None, kept, samples, capacity, coordinates)
    grad_weight, sums = done.sums[0] if weight else common.nothing(input, 2)
    grad_bias, bias_sums = done.sums[-1] if bias else common.nothing(input, 2)
    if grad is not None:
        return grad, grad_weight, grad_bias, done.probe, sums, bias_sums
    products, means, count = vectors[0], vectors[1], each * inner
    if rstd.shape[0] < samples:  # the statistics are of all samples together
        count *= samples
        both = (grad_weight, grad_bias) if weight and bias else vectors.sum((1, 2))
        products, means = (t.view(1, 1, channels) for t in both)
    grad = _input_grad(grad_out, input, mean, rstd, scale, products, means, count)
    return grad, grad_weight, grad_bias, done.probe, sums, bias_sums
