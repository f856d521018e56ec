"""An embedding's weight gradient with per-sample norms and coordinate sums.

    c_i[v] = Σ over positions t with token v of g_i[t]

Tokens are sorted once, stably (torch), so that all positions of a token lie together, sample by
sample. A program owns one token and BLOCK columns, walks along its positions, adds rows, and closes
a run where the sample changes: the run's square goes to the coordinate sum, its squared length to
the place of its last position in a [b, T, column blocks] table. So g is read once, every row of the
gradient is written once (zeros included), and nothing is added atomically. Where tokens are few and
positions many, the samples are split over programs too. A single very frequent token is a long
walk; its loads do not depend on each other. Not measured on a GPU.
"""

# Kernels are written in Triton's language, not in Python's types.
# pyright: reportArgumentType=false, reportCallIssue=false, reportAssignmentType=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import common
from .finish import finish


@triton.jit(do_not_specialize=common.BATCH)
def embedding_weight_grad_kernel(
    p_g, p_order, p_first, p_sum, p_square, p_partials, T, n, parts, padding_idx,
    splits, split_stride,
    SQUARES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Row v of Σ_i c_i, with SQUARES of Σ_i c_i², and partials of ‖c_i[v]‖² by position.

    Of one split of the samples: its positions with token v are first[q] to first[q + 1].
    """
    q, i_n = tl.program_id(0).to(tl.int64), tl.program_id(1)
    v, i_s = q // splits, q % splits
    o_n = i_n * BLOCK + tl.arange(0, BLOCK)
    m_n = o_n < n
    m_g = o_n < tl.where(v == padding_idx, 0, n)
    first, last = tl.load(p_first + q), tl.load(p_first + q + 1)
    b_run = tl.zeros([BLOCK], dtype=tl.float32)  # c_i[v] of the sample at hand
    b_sum = tl.zeros([BLOCK], dtype=tl.float32)
    b_square = tl.zeros([BLOCK], dtype=tl.float32)
    for j in range(first, last):
        position = tl.load(p_order + j)
        following = tl.load(p_order + tl.minimum(j + 1, last - 1))
        b_run += tl.load(p_g + position * n + o_n, mask=m_g, other=0.0).to(tl.float32)
        ends = (j + 1 == last) | (following // T != position // T)
        b_closed = tl.where(ends, b_run, 0.0)
        b_run = tl.where(ends, 0.0, b_run)
        b_sum += b_closed
        if SQUARES:
            b_square += b_closed * b_closed
        tl.store(p_partials + position * parts + i_n, tl.sum(b_closed * b_closed))
    o_out = i_s * split_stride + v * n + o_n
    tl.store(p_sum + o_out, b_sum, mask=m_n)
    if SQUARES:
        tl.store(p_square + o_out, b_square, mask=m_n)


def embedding_weight_grad(
    grad_out: Tensor,
    indices: Tensor,
    num_embeddings: int,
    padding_idx: int,
    capacity: int,
    coordinates: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """`ops.embedding_weight_grad`; that tokens lie in [0, V) was the forward pass' business."""
    if grad_out.shape[:-1] != indices.shape or indices.dim() < 1:
        raise RuntimeError(
            f"embedding_weight_grad: expected grad_out [b, ..., D] and indices [b, ...], got "
            f"{list(grad_out.shape)} and {list(indices.shape)}"
        )
    samples, n = indices.shape[0], grad_out.shape[-1]
    positions = indices.shape[1:].numel()
    tokens, order = indices.flatten().sort(stable=True)
    block = min(256, max(16, common.next_power_of_2(n)))
    parts = common.cdiv(n, block)
    steps = samples * positions // num_embeddings
    size = 4 * num_embeddings * n * (1 + coordinates)
    splits = common.choose_splits(tokens.device, num_embeddings * parts, steps, size)
    split_samples = common.cdiv(samples, splits)
    splits = common.cdiv(samples, split_samples)
    keys = tokens.long() * splits + order // (positions * split_samples)  # ascending as well
    every = torch.arange(num_embeddings * splits + 1, device=keys.device)
    first = torch.searchsorted(keys, every)  # positions of (v, s): first[q] to first[q + 1]
    g = grad_out.contiguous()
    partials = torch.empty(samples, positions * parts, dtype=torch.float32, device=g.device)
    sums = common.SplitSums(g, (num_embeddings, n), splits, coordinates)
    p_sum, p_square, split_stride = sums.arguments
    embedding_weight_grad_kernel[(num_embeddings * splits, parts)](
        g, order, first, p_sum, p_square, partials, positions, n, parts, padding_idx,
        splits, split_stride,
        SQUARES=coordinates, BLOCK=block, num_warps=max(1, block // 64), **common.OPTIONS,
    )  # fmt: skip
    total, square = sums.finish()
    return total, finish(g.device, partials, None, samples, capacity, False).probe, square
