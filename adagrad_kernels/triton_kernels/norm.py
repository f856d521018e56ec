"""Gradients of scale and shift by channel (normalisation layers) with per-sample statistics.

    c_i[c] = Σ_{t,s} g[i, t, c, s] x̂[i, t, c, s],   x̂ = (x − mean) rstd,   and the bias Σ_{t,s} g

First pass: a program sums up to CHUNK positions of one sample and a block of channels, and writes
two numbers a channel to [b, chunks, C]. It reads g and x once and writes 1/CHUNK of that, or more
where programs are few: memory-bound, with b·chunks·C/block programs. Threads run along channels
where those are contiguous, otherwise along positions. The second pass is that of finish.py over
what is left.

The input's gradient needs just these sums, of GroupNorm by sample and group, of BatchNorm over all
samples (norm_input.py). So the whole backward pass reads g and x twice and writes once, like
torch's, which forms such sums for itself. LayerNorm and RMSNorm do all of it in one reading
(norm_rows.py).

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
from .norm_input import broadcast_strides, input_grad
from .norm_rows import LONGEST_ROW, norm_rows

CHUNK = 512
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


def _kind(t: Tensor | None) -> int:
    """What a statistic [b, T, C or groups, S], with ones where it is the same, depends on."""
    if t is None:
        return NONE.value
    if t.shape[1] == t.shape[3] == 1:
        return CHANNEL.value
    return (POSITION if t.shape[2] == 1 else ELEMENT).value


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
        strides += [0] * 4 if t is None else broadcast_strides(t, g.shape)
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


def _sample_grads(vectors: Tensor | None, input: Tensor) -> Tensor:
    """[b, 2, C] from sums by chunks [2, b, chunks, C]; [0, 2, C] without."""
    if vectors is None:
        return torch.empty(0, 2, input.shape[2], dtype=torch.float32, device=input.device)
    return vectors.sum(2).transpose(0, 1).contiguous()


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
    samples: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`ops.norm_backward`."""
    reference.check_norm(grad_out, input, mean, rstd, scale)
    b, positions, channels, inner = input.shape
    each = channels // rstd.shape[2]
    by_row = inner == rstd.shape[2] == 1 and rstd.shape[0] == b
    if by_row and channels <= LONGEST_ROW:
        grad, vectors = norm_rows(grad_out, input, mean, rstd, scale)
    elif by_row or mean is None or positions > 1:
        grad = _other_input_grad(grad_out, input, mean, rstd, scale, by_row)
        if _kind(rstd) == ELEMENT.value:
            mean, rstd = (t if t is None else t.repeat_interleave(each, 2) for t in (mean, rstd))
        return (
            torch.empty_like(input).copy_(grad.reshape(input.shape)),
            *scale_weight_grad(grad_out, input, mean, rstd, capacity, weight, bias, coordinates),
            _sample_grads(
                chunk_sums(grad_out, input, mean, rstd, True) if samples else None, input
            ),
        )
    else:
        grad, vectors = None, chunk_sums(grad_out, input, mean, rstd, True)
    kept = vectors[1 - weight : 1 + bias] if weight or bias else None
    done = finish(input.device, None, kept, b, capacity, coordinates)
    grad_weight, sums = done.sums[0] if weight else common.nothing(input, 2)
    grad_bias, bias_sums = done.sums[-1] if bias else common.nothing(input, 2)
    own = _sample_grads(vectors if samples else None, input)
    if grad is not None:
        return grad, grad_weight, grad_bias, done.probe, sums, bias_sums, own
    products, totals, count = vectors[0], vectors[1], each * inner
    if rstd.shape[0] < b:  # the statistics are of all samples together
        count *= b
        both = (grad_weight, grad_bias) if weight and bias else vectors.sum((1, 2))
        products, totals = (t.view(1, 1, channels) for t in both)
    grad = input_grad(grad_out, input, mean, rstd, scale, products, totals, count)
    return grad, grad_weight, grad_bias, done.probe, sums, bias_sums, own
