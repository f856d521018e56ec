"""The last launch of a layer's op: sums of what is a vector for each sample, and all squared norms.

Biases, scales and shifts have a vector v_ki for each sample i (k = 0, 1), perhaps in chunks that
are still to be added up; weights have left parts of ‖c_i‖² in a table. Programs are of three kinds:

    columns    Σ_i v_ki and Σ_i v_ki² of BLOCK elements, for one split of the samples
    rows       probe[0, i] = Σ parts + Σ_k ‖v_ki‖² and probe[1, i] = 1 of AT_ONCE samples
    the last   FILL zeros beyond the samples, in both rows

A linear layer of one position a sample has no table (OUTER): v_i is the row of g itself, and
probe[0, i] = ‖v_i‖² (‖x_i‖² + 1). Mostly these are kilobytes, so that a launch is what it costs:
hence one for all, in which rows and columns both read the vectors. Where columns are split, another
launch for each k adds up the splits. Not measured on a GPU.
"""

# Kernels are written in Triton's language, not in Python's types.
# pyright: reportArgumentType=false, reportCallIssue=false, reportAssignmentType=false
# pyright: reportGeneralTypeIssues=false, reportOperatorIssue=false

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import common

MOST_CHUNKS = 32
"""More are added up before."""
ELEMENTS = 2048
"""That a program loads at a time of rows, up to four times as many where they come in chunks."""
FILL = 1024
"""Zeros that a program writes to each row of the probe."""


@triton.jit
def load_vectors(p_v, o_i, m_i, o_j, n, chunks, CHUNKS: tl.constexpr):
    """v[i, j], from all chunks, for some samples and elements."""
    o_k = tl.arange(0, CHUNKS)
    o = (o_i.to(tl.int64)[:, None] * chunks + o_k[None, :])[:, :, None] * n + o_j[None, None, :]
    m = (m_i[:, None] & (o_k < chunks)[None, :])[:, :, None] & (o_j < n)[None, None, :]
    return tl.sum(tl.load(p_v + o, mask=m, other=0.0).to(tl.float32), axis=1)


@triton.jit
def row_norms(p_v, o_i, m_i, n, chunks, CHUNKS: tl.constexpr, ROW_BLOCK: tl.constexpr):
    """‖v_i‖² of some samples."""
    b_norm = tl.zeros([o_i.shape[0], ROW_BLOCK], dtype=tl.float32)
    for j in range(0, n, ROW_BLOCK):
        b = load_vectors(p_v, o_i, m_i, j + tl.arange(0, ROW_BLOCK), n, chunks, CHUNKS)
        b_norm += b * b
    return tl.sum(b_norm, axis=1)


@triton.jit
def row_sums(p_partials, o_i, m_i, parts, ROW_BLOCK: tl.constexpr):
    """Σ of some rows of the table."""
    b_sum = tl.zeros([o_i.shape[0], ROW_BLOCK], dtype=tl.float32)
    for j in range(0, parts, ROW_BLOCK):
        o_j = j + tl.arange(0, ROW_BLOCK)
        o = o_i.to(tl.int64)[:, None] * parts + o_j[None, :]
        b_sum += tl.load(p_partials + o, mask=m_i[:, None] & (o_j < parts)[None, :], other=0.0)
    return tl.sum(b_sum, axis=1)


@triton.jit(do_not_specialize=common.BATCH)
def finish_kernel(
    p_v, p_x, p_partials, p_probe, p_sum_0, p_square_0, p_sum_1, p_square_1,
    samples, capacity, columns, n, I, chunks, parts, split_stride, split_samples,
    VECTORS: tl.constexpr, SQUARES: tl.constexpr,
    OUTER: tl.constexpr, WEIGHT: tl.constexpr, BIAS: tl.constexpr,
    CHUNKS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
    AT_ONCE: tl.constexpr, ROW_BLOCK: tl.constexpr, FILL: tl.constexpr,
):  # fmt: skip
    """What the module says, of v [VECTORS, samples, chunks, n]; `columns` programs come first.

    A program takes CHUNKS × ROWS × BLOCK or CHUNKS × AT_ONCE × ROW_BLOCK elements at a time.
    """
    COUNT: tl.constexpr = VECTORS if VECTORS > 0 else 1
    i = tl.program_id(0)
    length = tl.cast(samples, tl.int64) * chunks * n
    if i < columns:
        blocks = tl.cdiv(n, BLOCK)
        i_k, i_s = i // blocks % COUNT, i // blocks // COUNT
        o_j = i % blocks * BLOCK + tl.arange(0, BLOCK)
        b_sum = tl.zeros([ROWS, BLOCK], dtype=tl.float32)
        b_square = tl.zeros([ROWS, BLOCK], dtype=tl.float32)
        last = tl.minimum((i_s + 1) * split_samples, samples)
        for row in range(i_s * split_samples, last, ROWS):
            o_i = row + tl.arange(0, ROWS)
            b = load_vectors(p_v + i_k * length, o_i, o_i < last, o_j, n, chunks, CHUNKS)
            b_sum += b
            b_square += b * b
        p_sum, p_square = p_sum_0, p_square_0
        if i_k == 1:
            p_sum, p_square = p_sum_1, p_square_1
        o_out = tl.cast(i_s, tl.int64) * split_stride + o_j
        tl.store(p_sum + o_out, tl.sum(b_sum, axis=0), mask=o_j < n)
        if SQUARES:
            tl.store(p_square + o_out, tl.sum(b_square, axis=0), mask=o_j < n)
    elif i < columns + tl.cdiv(samples, AT_ONCE):
        o_i = (i - columns) * AT_ONCE + tl.arange(0, AT_ONCE)
        m_i = o_i < samples
        b_norm = tl.zeros([AT_ONCE], dtype=tl.float32)
        for k in tl.static_range(VECTORS):
            b_norm += row_norms(p_v + k * length, o_i, m_i, n, chunks, CHUNKS, ROW_BLOCK)
        if OUTER:
            b_input = tl.zeros([AT_ONCE], dtype=tl.float32)
            if WEIGHT:
                b_input = row_norms(p_x, o_i, m_i, I, 1, 1, ROW_BLOCK)
            b_norm *= b_input + (1.0 if BIAS else 0.0)
        else:
            b_norm += row_sums(p_partials, o_i, m_i, parts, ROW_BLOCK)
        tl.store(p_probe + o_i, b_norm, mask=m_i)
        tl.store(p_probe + capacity + o_i, tl.full([AT_ONCE], 1.0, dtype=tl.float32), mask=m_i)
    else:
        o_c = samples + (i - columns - tl.cdiv(samples, AT_ONCE)) * FILL + tl.arange(0, FILL)
        b_zero = tl.zeros([FILL], dtype=tl.float32)
        tl.store(p_probe + o_c, b_zero, mask=o_c < capacity)
        tl.store(p_probe + capacity + o_c, b_zero, mask=o_c < capacity)


class Outer(NamedTuple):
    """That samples have one position each.

    Attributes:
        input: x [b, I].
        weight: whether the weight is trained.
        bias: whether the bias is.
    """

    input: Tensor
    weight: bool
    bias: bool


class Finished(NamedTuple):
    """What `finish` returns.

    Attributes:
        probe: the probe's gradient, [2, capacity].
        sums: (Σ_i v_ki, Σ_i v_ki²) for each k, the second [0] if it is not wanted.
    """

    probe: Tensor
    sums: list[tuple[Tensor, Tensor]]


def check_capacity(samples: int, capacity: int) -> None:
    """That the probe has a column for every sample."""
    if samples > capacity:
        raise RuntimeError(f"{samples} samples do not fit a probe of capacity {capacity}")


def finish(
    device: torch.device,
    partials: Tensor | None,
    vectors: Tensor | None,
    samples: int,
    capacity: int,
    squares: bool,
    outer: Outer | None = None,
) -> Finished:
    """Σ_i v_ki, Σ_i v_ki² and the probe's gradient.

    Args:
        device: where the results are.
        partials: parts of ‖c_i‖², [b, parts], or None if there are none.
        vectors: v [k, b, chunks, n], contiguous, k at most 2, or None if there are none.
        samples: b.
        capacity: columns of the probe.
        squares: whether the sums of squares are wanted.
        outer: of a linear layer with one position a sample, whose `vectors` are g.

    Raises:
        RuntimeError: if the probe has not a column for every sample.
    """
    check_capacity(samples, capacity)
    probe = torch.empty(2, capacity, dtype=torch.float32, device=device)
    count = n = columns = split_stride = 0
    chunks, split_samples, block, sums = 1, samples, 128, []
    if vectors is not None:
        if vectors.shape[2] > MOST_CHUNKS:
            vectors = vectors.sum(2, keepdim=True)
        count, _, chunks, n = vectors.shape
        block = min(block, max(16, common.next_power_of_2(n)))
    padded = common.next_power_of_2(chunks)
    rows = MOST_CHUNKS // padded
    if vectors is not None and (outer is None or outer.bias):
        blocks = count * common.cdiv(n, block)
        loads = common.cdiv(samples, rows)
        splits = common.choose_splits(device, blocks, loads // 2, 4 * n)  # 8 loads for a launch
        split_samples = common.cdiv(common.cdiv(samples, splits), rows) * rows
        columns = blocks * splits
        sums = [common.SplitSums(vectors, (n,), splits, squares) for _ in range(count)]
        split_stride = sums[0].arguments[2]
    inputs = 0 if outer is None else outer.input.shape[1]
    parts = 0 if partials is None else partials.shape[1]
    # Short rows are read many at a time, or else large batches would be as many tiny programs.
    longest = common.next_power_of_2(max(n, inputs, parts, 128))
    larger = 1 if padded == 1 else 4 if padded >= 16 and n % 16 == 0 else 2  # as registers allow
    width = larger * ELEMENTS // padded
    row_block = min(width, longest)
    at_once = width // row_block
    programs = columns + common.cdiv(samples, at_once) + common.cdiv(capacity - samples, FILL)
    results = [t for each in sums for t in each.arguments[:2]]
    finish_kernel[(programs,)](
        probe if vectors is None else vectors,
        probe if outer is None else outer.input,
        probe if partials is None else partials,
        probe, *results, *[probe] * (4 - len(results)),
        samples, capacity, columns, n, inputs, chunks, parts, split_stride, split_samples,
        VECTORS=count, SQUARES=squares,
        OUTER=outer is not None,
        WEIGHT=outer is not None and outer.weight,
        BIAS=outer is not None and outer.bias,
        CHUNKS=padded, ROWS=rows, BLOCK=block,
        AT_ONCE=at_once, ROW_BLOCK=row_block, FILL=FILL,
        num_warps=4 if padded == 1 else 8, **common.OPTIONS,
    )  # fmt: skip
    return Finished(probe, [each.finish() for each in sums])
