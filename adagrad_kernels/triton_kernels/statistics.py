"""Per-sample statistics of a materialised block [b, P] in one read, and those of the probes joined.

Reads 4·b·P bytes (2·b·P in 16 bits) and writes next to nothing: memory-bound, so the tile only has
to keep enough loads in flight. A program owns BLOCK columns and walks down the samples ROWS at a
time; the columns' sums stay in registers, each row's squared length goes to [b, column blocks].
Where there are few columns, the samples are split over programs too.

`pool_samples` reads some kilobytes: its cost is the launch, one a micro-batch where plain PyTorch
needs fourteen a step. One program walks over a probe and adds to what the launch before it found.

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

ROWS = 8


@triton.jit(do_not_specialize=common.BATCH)
def sample_statistics_kernel(
    p_v, p_sum, p_square, p_partials,
    samples, n, split_stride, split_samples, parts, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """sum[j] = Σ_i v[i, j], square[j] = Σ_i v[i, j]², partials[i, ·] = Σ_j in block v[i, j]²."""
    i_j, i_s = tl.program_id(0), tl.program_id(1).to(tl.int64)
    o_j = i_j * BLOCK + tl.arange(0, BLOCK)
    m_j = o_j < n
    b_sum = tl.zeros([ROWS, BLOCK], dtype=tl.float32)
    b_square = tl.zeros([ROWS, BLOCK], dtype=tl.float32)
    last = tl.minimum((i_s + 1) * split_samples, samples)
    for i in range(i_s * split_samples, last, ROWS):
        o_i = i + tl.arange(0, ROWS)
        p_block = p_v + o_i[:, None].to(tl.int64) * n + o_j[None, :]
        b_v = tl.load(p_block, mask=(o_i < last)[:, None] & m_j[None, :], other=0.0)
        b_v = b_v.to(tl.float32)
        b_sum += b_v
        b_square += b_v * b_v
        p_norm = p_partials + o_i.to(tl.int64) * parts + i_j
        tl.store(p_norm, tl.sum(b_v * b_v, axis=1), mask=o_i < last)
    tl.store(p_sum + i_s * split_stride + o_j, tl.sum(b_sum, axis=0), mask=m_j)
    tl.store(p_square + i_s * split_stride + o_j, tl.sum(b_square, axis=0), mask=m_j)


@triton.jit(do_not_specialize=common.BATCH)
def pool_samples_kernel(
    p_probe, p_norms, p_totals, rows, capacity, FIRST: tl.constexpr, BLOCK: tl.constexpr
):
    """norms[i] = probe[0, i] for i < rows; totals (see `ops`) of these rows and those before."""
    b_sum = tl.zeros([BLOCK], dtype=tl.float64)
    b_least = tl.full([BLOCK], float("inf"), dtype=tl.float32)
    b_most = tl.full([BLOCK], float("-inf"), dtype=tl.float32)
    b_outside = tl.zeros([BLOCK], dtype=tl.float32)
    for i in range(0, capacity, BLOCK):
        o_i = i + tl.arange(0, BLOCK)
        m_i = o_i < rows
        b_norm = tl.load(p_probe + o_i, mask=m_i, other=0.0)
        tl.store(p_norms + o_i, b_norm, mask=m_i)
        b_sum += b_norm.to(tl.float64)
        b_calls = tl.load(p_probe + capacity + o_i, mask=o_i < capacity, other=0.0)
        b_least = tl.minimum(b_least, tl.where(m_i, b_calls, float("inf")))
        b_most = tl.maximum(b_most, tl.where(m_i, b_calls, float("-inf")))
        b_outside = tl.maximum(b_outside, tl.where(m_i, 0.0, b_calls))
    total = tl.sum(b_sum, axis=0)
    least = tl.min(b_least, axis=0)
    most = tl.max(b_most, axis=0)
    outside = tl.max(b_outside, axis=0)
    if not FIRST:
        total += tl.load(p_totals)
        least = tl.minimum(least, tl.load(p_totals + 1))
        most = tl.maximum(most, tl.load(p_totals + 2))
        outside = tl.maximum(outside, tl.load(p_totals + 3))
    tl.store(p_totals, total)
    tl.store(p_totals + 1, least)
    tl.store(p_totals + 2, most)
    tl.store(p_totals + 3, outside)


def sample_statistics(g: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`ops.sample_statistics`."""
    if g.dim() != 2:
        raise RuntimeError(f"sample_statistics: expected g [b, P], got {g.dim()} dimensions")
    samples, n = g.shape
    block = min(512, max(16, common.next_power_of_2(n)))
    tiles = common.cdiv(n, block)
    partials = torch.empty(samples, tiles, dtype=torch.float32, device=g.device)
    splits = common.choose_splits(g.device, tiles, common.cdiv(samples, ROWS), 4 * n)
    split_samples = common.cdiv(common.cdiv(samples, splits), ROWS) * ROWS
    sums = common.SplitSums(g, (n,), splits, True)
    p_sum, p_square, split_stride = sums.arguments
    sample_statistics_kernel[(tiles, splits)](
        g.contiguous(), p_sum, p_square, partials,
        samples, n, split_stride, split_samples, tiles,
        ROWS=ROWS, BLOCK=block, num_warps=max(1, block // 64), **common.OPTIONS,
    )  # fmt: skip
    total, square = sums.finish()
    return total, square, partials.sum(1) if tiles > 1 else partials[:, 0].contiguous()


def pool_samples(probes: list[Tensor], rows: list[int]) -> tuple[Tensor, Tensor]:
    """`ops.pool_samples`."""
    fits = len(probes) == len(rows) and all(
        probe.dim() == 2
        and probe.shape[0] == 2
        and probe.dtype == torch.float32
        and 0 <= n <= probe.shape[1]
        for probe, n in zip(probes, rows, strict=False)
    )
    if not fits or not sum(rows):  # says what is wrong; no samples at all
        return reference.pool_samples(probes, rows)
    norms = torch.empty(sum(rows), dtype=torch.float32, device=probes[0].device)
    totals = torch.empty(4, dtype=torch.float64, device=probes[0].device)
    done = 0
    for k, (probe, n) in enumerate(zip(probes, rows, strict=True)):
        capacity = probe.shape[1]
        block = min(1024, max(16, common.next_power_of_2(capacity)))
        pool_samples_kernel[(1,)](
            probe.contiguous(), norms[done:], totals, n, capacity,
            FIRST=k == 0, BLOCK=block, num_warps=4, **common.OPTIONS,
        )  # fmt: skip
        done += n
    return norms, totals
