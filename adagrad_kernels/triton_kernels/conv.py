"""A convolution's weight gradient with per-sample norms and coordinate sums: implicit GEMM.

For one to three spatial dimensions; fewer are three with leading sizes of 1. A sample's gradient is
    c_i[o, r] = Σ_p g_i[o, p] x_i[c, stride·p + dilation·k − padding],      r = (c, k)
a product over P output pixels of g_i with patches of x_i that are gathered on the way to the tensor
cores and never written. As in linear.py, a tile of c_i grows in registers, then goes to the sum,
its square to the coordinate sum and its squared length to a [b, tiles] table: multiply-adds as for
the gradient alone. Positions of all samples form one loop.

Where a tile's columns can be channels of one kernel element (ONE_K, r counts channels fastest),
gathering costs an element of the patch tile [BK, BN] little more than its address, otherwise the
comparisons with the image's bounds as well; against BM multiply-adds, so BM (output channels) is
128 where there are as many. Threads run along the dimension that is contiguous: channels for
channels-last tensors, pixels otherwise; 16-bit inputs are made channels-last first where a tile
then lies in one kernel element, and is gathered 16 bytes at a time. A pass of the loop (machine
code for sm_90, 128 channels of 16×16 pixels) takes 0.8 to 1.4 times the issue slots of what the
tensor cores need for it. With few output pixels the vector operations, two or three a coordinate
and sample, outweigh the product: norms alone then come from conv_gram.py, and the sum of all
samples from cuDNN. What the kernel does badly: depthwise convolutions waste most of their 16×16
tile. Not measured on a GPU.
"""

# Kernels are written in Triton's language, not in Python's types.
# pyright: reportArgumentType=false, reportCallIssue=false, reportAssignmentType=false

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import common, conv_gram
from .finish import finish
from .patches import corners, divide, divisor, geometry, patch_index, patches
from .pieces import TileSums, piece, store_tile
from .tiles import Tile, tile_index


@triton.jit(do_not_specialize=[*common.BATCH, *common.MAGIC])
def conv_weight_grad_kernel(
    p_g, p_x, p_partials, p_sum, p_square, p_pieces, p_squares, whole, rest, size,
    samples, P, O, C, D, H, W, OH, OW, KD, KH, KW, SD, SH, SW, PD, PH, PW, DD, DH, DW,
    g_i, g_c, g_p, x_i, x_c, x_d, x_h, x_w, w_magic, w_shift, hw_magic, hw_shift,
    magic, shift, parts,
    DIMS: tl.constexpr, G_LAST: tl.constexpr, X_LAST: tl.constexpr, ONE_K: tl.constexpr,
    EVEN: tl.constexpr, SQUARES: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Σ_i c_i, and with SQUARES Σ_i c_i², of one tile or piece (pieces.py).

    O and C count a group's channels; strides are those of p_g [b, O, P] and p_x [b, C, D, H, W].
    EVEN says that tiles and passes end where the operands do.
    """
    i_program = tl.program_id(0)
    i_tile, first, last = piece(i_program, samples, whole, rest, size)
    R = C * KD * KH * KW
    tiles_m, tiles_n = tl.cdiv(O, BM), tl.cdiv(R, BN)
    i_group = i_tile // (tiles_m * tiles_n)
    i_m, i_n = tile_index(i_tile % (tiles_m * tiles_n), tiles_m, tiles_n)
    o_m, o_n, o_k = i_m * BM + tl.arange(0, BM), i_n * BN + tl.arange(0, BN), tl.arange(0, BK)
    if ONE_K:  # the tile's columns are channels of one kernel element
        o_c = tl.multiple_of(i_n * BN % C, BN) + tl.arange(0, BN)
        k = i_n * BN // C
        o_kd, o_kh, o_kw = k // (KW * KH), k // KW % KH, k % KW
    else:
        o_c, o_kd, o_kh, o_kw = patch_index(o_n, C, KD, KH, KW, X_LAST)
    o_r = o_c * (KD * KH * KW) + (o_kd * KH + o_kh) * KW + o_kw
    o_cx = tl.expand_dims(o_c, 0 if X_LAST else 1)
    if not ONE_K:
        o_kd = tl.expand_dims(o_kd, 0 if X_LAST else 1)
        o_kh = tl.expand_dims(o_kh, 0 if X_LAST else 1)
        o_kw = tl.expand_dims(o_kw, 0 if X_LAST else 1)
    p_g += i_group.to(tl.int64) * O * g_c
    p_x += i_group.to(tl.int64) * C * x_c
    p_partials += i_tile

    b_c = tl.zeros([BM, BN], dtype=tl.float32)
    b_sum = tl.zeros([BM, BN], dtype=tl.float32)
    b_square = tl.zeros([BM, BN], dtype=tl.float32)
    steps = tl.cdiv(P, BK)
    for step in range(first * steps, last * steps):
        i = divide(step, magic, shift)
        o_p = tl.multiple_of((step - i * steps) * BK, BK) + o_k
        p_gi, p_xi = p_g + tl.cast(i, tl.int64) * g_i, p_x + tl.cast(i, tl.int64) * x_i
        o_pg = tl.expand_dims(o_p, 1 if G_LAST else 0)
        o_mg = tl.expand_dims(o_m, 0 if G_LAST else 1)
        if EVEN:
            b_g = tl.load(p_gi + o_pg * g_p + o_mg * g_c)
        else:
            m_g = (o_pg < P) & (o_mg < O)
            b_g = tl.load(p_gi + o_pg * g_p + o_mg * g_c, mask=m_g, other=0.0)
        o_px = tl.expand_dims(o_p, 1 if X_LAST else 0)
        o_d, o_h, o_w = corners(
            o_px, OH, OW, SD, SH, SW, PD, PH, PW, w_magic, w_shift, hw_magic, hw_shift, DIMS
        )
        b_x = patches(
            p_xi, (o_px < P) & (o_cx < C), o_d, o_h, o_w, o_cx, o_kd, o_kh, o_kw,
            D, H, W, x_c, x_d, x_h, x_w, DD, DH, DW, DIMS, MASKED=not EVEN,
        )  # fmt: skip
        if G_LAST:
            b_g = tl.trans(b_g)
        if not X_LAST:
            b_x = tl.trans(b_x)
        b_c = tl.dot(b_g, b_x, b_c, input_precision=PRECISION)
        if (step - i * steps + 1) * BK >= P:
            b_sum += b_c
            if SQUARES:
                b_square += b_c * b_c
            tl.store(p_partials + tl.cast(i, tl.int64) * parts, tl.sum(b_c * b_c))
            b_c = tl.zeros([BM, BN], dtype=tl.float32)

    o_out = (i_group * O + o_m)[:, None].to(tl.int64) * R + o_r[None, :]
    m_out = (o_m < O)[:, None] & (o_n < R)[None, :]
    store_tile(p_sum, p_pieces, i_program, whole, b_sum, o_out, m_out, BM, BN)
    if SQUARES:
        store_tile(p_square, p_squares, i_program, whole, b_square, o_out, m_out, BM, BN)


def conv_precision() -> str:
    """How PyTorch's convolutions of float32 are set, see `common.precision`."""
    return common.precision(torch.backends.cudnn.conv)  # type: ignore[attr-defined]


def in_halves(dtype: torch.dtype) -> bool:
    """Whether operands are split in registers."""
    return conv_precision() == "tf32x3" and dtype == torch.float32


def method_of(positions: int, rows: int, columns: int, coordinates: bool, itemsize: int = 4) -> str:
    """Which of "direct" and "gram" serves samples of so many pixels, O = rows, C·K = columns."""
    gram = conv_gram.prefers_gram(positions, rows, columns, coordinates, itemsize)
    return "gram" if gram else "direct"


def tile_for(
    g: Tensor, rows: int, channels: int, columns: int, dims: int, coordinates: bool
) -> Tile:
    """The tile for g's pixels and a weight of rows × columns, `channels` for a kernel element.

    Addresses take registers as well, operands in halves most; small tiles need fewer stages. A pass
    should be long: some hundred instructions are the same for any number of pixels. In a cycle a
    multiprocessor issues four, one a scheduler, and does 2048 multiply-adds of 16 bits.
    """

    def power(n: int, largest: int) -> int:
        return min(largest, max(16, common.next_power_of_2(n)))

    exact = in_halves(g.dtype)
    bm = power(rows, 128)
    large = bm == 128 and channels % 128 == 0 and not coordinates and not exact and dims < 3
    bn = 128 if large else power(columns, 64)
    longest = 16 if dims == 3 or exact else 64 if g.itemsize == 2 or bm * bn <= 64 * 64 else 32
    block_k = power(g.shape[2:].numel(), longest)
    return Tile(bm, bn, block_k, 8 if bm == 128 else 4, 2 if min(bm, bn) < 64 else 3)


def weight_grad(
    g: Tensor,
    x: Tensor,
    options: tuple[Sequence[int], ...],
    dims: int,
    groups: int,
    partials: Tensor,
    tile: Tile,
    squares: bool,
) -> tuple[Tensor, Tensor]:
    """Σ c_i and Σ c_i² [O, C·K] of g [b, O, D', H', W'] and x [b, C, D, H, W], and tiles' norms.

    Args:
        g: three spatial dimensions, contiguous or channels-last.
        x: three spatial dimensions, any strides.
        options: kernel_size, stride, padding and dilation, three numbers each.
        dims: how many of the three are in use, the last ones.
        groups: of channels.
        partials: [b, at least groups · tiles].
        tile: from `tile_for`.
        squares: whether Σ c_i² is wanted.
    """
    samples, rows, channels = g.shape[0], g.shape[1] // groups, x.shape[1] // groups
    elements, steps = math.prod(options[0]), common.cdiv(g.shape[2:].numel(), tile.BK)
    last, one_k = x.stride(1) == 1, channels % tile.BN == 0
    even = g.shape[2:].numel() % tile.BK == rows % tile.BM == channels * elements % tile.BN == 0
    exact = in_halves(g.dtype)
    sums = TileSums(
        g.device, tile, samples, steps, rows, channels, elements, groups, squares, exact
    )
    conv_weight_grad_kernel[(sums.pieces.programs,)](
        g, x, partials, *sums.arguments,
        samples, *geometry(g, x, options, groups), *divisor(steps), partials.shape[1],
        DIMS=dims, G_LAST=g.stride(1) == 1, X_LAST=last, ONE_K=one_k, EVEN=even,
        SQUARES=squares, PRECISION=conv_precision(),
        **tile._asdict(), **common.OPTIONS,
    )  # fmt: skip
    return sums.finish(channels_last=last or one_k)


def conv_weight_grad(
    grad_out: Tensor,
    input: Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    capacity: int,
    weight: bool,
    bias: bool,
    coordinates: bool,
    method: str | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`ops.conv_weight_grad`; `method` is "direct" or "gram", chosen if None."""
    dims = len(kernel_size)
    _check(grad_out, input, kernel_size, stride, padding, dilation, groups)
    samples, rows = grad_out.shape[0], grad_out.shape[1] // groups
    missing = 3 - dims
    options = (
        (1,) * missing + tuple(kernel_size),
        (1,) * missing + tuple(stride),
        (0,) * missing + tuple(padding),
        (1,) * missing + tuple(dilation),
    )
    g, x = common.operand(grad_out), common.operand(input)
    for _ in range(missing):
        g, x = g.unsqueeze(2), x.unsqueeze(2)
    if not _one_stride(g):
        g = g.contiguous()
    positions, columns = g.shape[2:].numel(), x.shape[1] // groups * math.prod(kernel_size)
    method = method or method_of(positions, rows, columns, coordinates, grad_out.itemsize)
    tile = tile_for(g, rows, x.shape[1] // groups, columns, dims, coordinates)
    parts = 0
    if weight and method == "gram":
        parts = groups * conv_gram.parts(positions)
    elif weight:
        parts = groups * common.cdiv(rows, tile.BM) * common.cdiv(columns, tile.BN)
    partials = torch.empty(samples, parts, dtype=torch.float32, device=g.device)
    grad, sums = common.nothing(g, 2)
    vectors = None
    if bias:
        vectors = torch.sum(g, (2, 3, 4), dtype=torch.float32).view(1, samples, 1, -1)
    shape = (grad_out.shape[1], x.shape[1] // groups, *kernel_size)
    if weight and method == "direct":
        if x.itemsize == 2 and x.shape[1] // groups % tile.BN == 0:
            g, x = (t.contiguous(memory_format=torch.channels_last_3d) for t in (g, x))
        grad, sums = weight_grad(g, x, options, dims, groups, partials, tile, coordinates)
        grad, sums = grad.view(shape), sums.view(shape) if coordinates else sums
    elif weight:
        grad = sum_of_samples(grad_out, input, shape, stride, padding, dilation, groups)
        conv_gram.conv_norms(g, x, options, dims, groups, partials, conv_precision())
    done = finish(g.device, partials, vectors, samples, capacity, coordinates)
    grad_bias, bias_sums = done.sums[0] if bias else common.nothing(g, 2)
    return grad, grad_bias, done.probe, sums, bias_sums


def sum_of_samples(
    grad_out: Tensor,
    input: Tensor,
    shape: tuple[int, ...],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    """PyTorch's own weight gradient of this shape, without statistics.

    In float32, whatever the operands are: 16-bit ones fit into TF32 without rounding. By the same
    bits each time.
    """
    backend: Any = torch.backends.cudnn
    conv = backend.conv
    before = backend.deterministic, conv.fp32_precision
    backend.deterministic = True
    if grad_out.itemsize == 2:
        conv.fp32_precision = "tf32"
    try:
        return torch.ops.aten.convolution_backward.default(
            grad_out.float(), input.float(), input.new_empty(shape, dtype=torch.float32), None,
            stride, padding, dilation, False, [0] * len(stride), groups, [False, True, False],
        )[1]  # fmt: skip
    finally:
        backend.deterministic, conv.fp32_precision = before


def _one_stride(g: Tensor) -> bool:
    """Whether the positions of g [b, O, D, H, W] lie at equal distances."""
    (_, _, depth, height, width), (_, _, d, h, w) = g.shape, g.stride()
    return (height == 1 or h == width * w) and (depth == 1 or d == height * width * w)


def _check(
    grad_out: Tensor,
    input: Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> None:
    dims = len(kernel_size)
    if (
        not 1 <= dims <= 3
        or not len(stride) == len(padding) == len(dilation) == dims
        or not grad_out.dim() == input.dim() == dims + 2
        or grad_out.shape[0] != input.shape[0]
        or grad_out.dtype != input.dtype
    ):
        raise RuntimeError(
            "conv_weight_grad: expected grad_out [b, O, *D'] and input [b, C, *D] of one dtype "
            "with one to three spatial dimensions, and kernel_size, stride, padding and dilation "
            f"with a number for each, got {list(grad_out.shape)} {grad_out.dtype}, "
            f"{list(input.shape)} {input.dtype} and kernel_size {list(kernel_size)}"
        )
    if groups < 1 or input.shape[1] % groups or grad_out.shape[1] % groups:
        raise RuntimeError(
            f"conv_weight_grad: {input.shape[1]} input and {grad_out.shape[1]} output channels "
            f"do not divide into {groups} groups"
        )
    for d in range(dims):
        reach = (grad_out.shape[2 + d] - 1) * stride[d] + (kernel_size[d] - 1) * dilation[d] + 1
        if reach > input.shape[2 + d] + 2 * padding[d]:
            raise RuntimeError(
                "conv_weight_grad: grad_out is larger than this convolution's output"
            )
