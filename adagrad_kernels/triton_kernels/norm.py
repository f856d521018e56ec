"""Gradients of scale and shift by channel (normalisation layers) with per-sample statistics.

    c_i[c] = Σ_{t,s} g[i, t, c, s] x̂[i, t, c, s],   x̂ = (x − mean) rstd,   and the bias Σ_{t,s} g

First pass: a program sums up to CHUNK positions of one sample and a block of channels, and writes
two numbers a channel to [b, chunks, C]. It reads g and x once and writes 1/CHUNK of that, or more
where programs are few: memory-bound, with b·chunks·C/block programs. Threads run along channels
where those are contiguous, otherwise along positions. The second pass is that of finish.py over
what is left.

The input's gradient needs just these sums, of GroupNorm by sample and group, of BatchNorm over all
samples. So the whole backward pass reads g and x twice and writes once, like torch's, which forms
such sums for itself. (LayerNorm's are over channels: there torch's kernel forms the input's
gradient, and the first pass here takes the place of its second.)

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
from .finish import finish

CHUNK = 512
ELEMENTS = 2048
"""Of the input's gradient in a program's tile."""
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


def _torch_input_grad(
    g: Tensor, x: Tensor, mean: Tensor | None, rstd: Tensor, scale: Tensor
) -> Tensor:
    """For statistics of positions: by torch's own kernel where it has one."""
    b, positions, channels, inner = x.shape
    if mean is None or rstd.shape[0] != b or rstd.shape[2] * inner > 1:
        dtype = torch.float32
        return reference.norm_input_grad(g.to(dtype), x.to(dtype), mean, rstd, scale)
    rows, one = (b, positions, channels), (b, positions, 1)
    return torch.ops.aten.native_layer_norm_backward.default(
        g.reshape(rows).contiguous(), x.reshape(rows).contiguous(), [channels],
        mean.reshape(one), rstd.reshape(one), scale, None, [True, False, False],
    )[0]  # fmt: skip


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
    if mean is None or positions > 1 or (rstd.shape[0] == samples and each * inner == channels):
        grad = _torch_input_grad(grad_out, input, mean, rstd, scale).reshape(input.shape)
        if grad.dtype != input.dtype or grad.stride() != input.stride():
            grad = torch.empty_like(input).copy_(grad)
        if _kind(rstd) == ELEMENT.value:  # of no layer of torch's
            mean, rstd = (t if t is None else t.repeat_interleave(each, 2) for t in (mean, rstd))
        return grad, *scale_weight_grad(
            grad_out, input, mean, rstd, capacity, weight, bias, coordinates
        )
    vectors = chunk_sums(grad_out, input, mean, rstd, True)
    kept = vectors[1 - weight : 1 + bias] if weight or bias else None
    done = finish(input.device, None, kept, samples, capacity, coordinates)
    grad_weight, sums = done.sums[0] if weight else common.nothing(input, 2)
    grad_bias, bias_sums = done.sums[-1] if bias else common.nothing(input, 2)
    products, means, count = vectors[0], vectors[1], each * inner
    if rstd.shape[0] < samples:  # the statistics are of all samples together
        count *= samples
        both = (grad_weight, grad_bias) if weight and bias else vectors.sum((1, 2))
        products, means = (t.view(1, 1, channels) for t in both)
    grad = _input_grad(grad_out, input, mean, rstd, scale, products, means, count)
    return grad, grad_weight, grad_bias, done.probe, sums, bias_sums
