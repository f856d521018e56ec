"""A linear layer's weight gradient with per-sample norms and coordinate sums, in one pass.

Cost for b samples of T positions, I inputs, O outputs; a tile is BM×BN of the weight.

T = 1: c_i = g_i ⊗ x_i, so Σ c_i = GᵀX and Σ c_i² = (G²)ᵀ(X²), 2·b·O·I multiply-adds, with both
products from one read of the operands (`outer_tile`); ‖c_i‖² = ‖g_i‖²(‖x_i‖² + 1) is a pass over
rows. Squares of 16-bit operands multiply as float32 does (below); where that is tf32, squares of
bf16 are rounded to bf16 again. Without coordinate sums the product alone is left: cuBLAS.

T > 1, direct (`direct_tile`): the tile of c_i = G_iᵀX_i grows in registers over the sample's
positions, then it is added to the sum, its square to the coordinate sum, and its squared length
goes to a [b, tiles] table. The multiply-adds are those of the gradient alone, b·T·O·I; the vector
units add two or three operations a sample and coordinate. Positions of all samples form ONE loop,
so that loads of the next sample are under way while the last one is being squared.

T > 1, Gram (gram.py), norms only and T small against O·I/(O + I): no c_i at all.

float32 multiplies as tf32 if PyTorch's matrix products may, otherwise as three tf32 products of
halves (22 bits of the 24), several times faster than without tensor cores.

Tiles: tiles.py; which program does which, so that the device is full: pieces.py. Not measured on a
GPU.
"""

# Kernels are written in Triton's language, not in Python's types.
# pyright: reportArgumentType=false, reportCallIssue=false, reportAssignmentType=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import common, gram
from .finish import Outer, finish
from .pieces import TileSums, piece, store_tile
from .tiles import Tile, in_halves, matmul_precision, tile_for, tile_index


@triton.jit
def square_operand(b, PRECISION: tl.constexpr):
    """b², in bf16 again only if the user gave up precision for speed."""
    b_square = b.to(tl.float32) * b.to(tl.float32)
    if PRECISION == "tf32" and b.dtype == tl.bfloat16:
        b_square = b_square.to(tl.bfloat16)
    return b_square


@triton.jit
def outer_tile(
    p_g, p_x, o_m, o_n, first, last, O, I,
    SQUARES: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """(Σ_i c_i, Σ_i c_i²) on one tile for samples first ≤ i < last with one position each."""
    b_sum = tl.zeros([BM, BN], dtype=tl.float32)
    b_square = tl.zeros([BM, BN], dtype=tl.float32)
    o_k = tl.arange(0, BK)
    for k in range(first, last, BK):
        m_k = (k + o_k < last)[:, None]
        p_gk = p_g + tl.cast(k, tl.int64) * O + o_k[:, None] * O + o_m[None, :]
        p_xk = p_x + tl.cast(k, tl.int64) * I + o_k[:, None] * I + o_n[None, :]
        b_g = tl.load(p_gk, mask=m_k & (o_m < O)[None, :], other=0.0)
        b_x = tl.load(p_xk, mask=m_k & (o_n < I)[None, :], other=0.0)
        b_sum = tl.dot(tl.trans(b_g), b_x, b_sum, input_precision=PRECISION)
        if SQUARES:
            b_gg, b_xx = square_operand(b_g, PRECISION), square_operand(b_x, PRECISION)
            b_square = tl.dot(tl.trans(b_gg), b_xx, b_square, input_precision=PRECISION)
    return b_sum, b_square


@triton.jit
def direct_tile(
    p_g, p_x, p_partials, o_m, o_n, first, last, T, O, I, parts,
    EVEN: tl.constexpr, SQUARES: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """The same for samples with T positions; writes ‖c_i‖² on the tile to p_partials[i·parts].

    EVEN says that tiles and passes end where the operands do: then rows follow each other, and
    nothing is masked. Half of the instructions of a pass were for that.
    """
    b_c = tl.zeros([BM, BN], dtype=tl.float32)
    b_sum = tl.zeros([BM, BN], dtype=tl.float32)
    b_square = tl.zeros([BM, BN], dtype=tl.float32)
    o_k = tl.arange(0, BK)
    o_gk, o_xk = o_k[:, None] * O + o_m[None, :], o_k[:, None] * I + o_n[None, :]
    steps = tl.cdiv(T, BK)
    p_partials += tl.cast(first, tl.int64) * parts
    t = 0
    for step in range(first * steps, last * steps):
        if EVEN:
            row = tl.cast(step, tl.int64) * BK
            b_g = tl.load(p_g + row * O + o_gk)
            b_x = tl.load(p_x + row * I + o_xk)
        else:
            i = step // steps
            o_t = (step - i * steps) * BK
            row = tl.cast(i, tl.int64) * T + o_t
            m_k = (o_t + o_k < T)[:, None]
            b_g = tl.load(p_g + row * O + o_gk, mask=m_k & (o_m < O)[None, :], other=0.0)
            b_x = tl.load(p_x + row * I + o_xk, mask=m_k & (o_n < I)[None, :], other=0.0)
        b_c = tl.dot(tl.trans(b_g), b_x, b_c, input_precision=PRECISION)
        t += BK
        if t >= T:
            b_sum += b_c
            if SQUARES:
                b_square += b_c * b_c
            tl.store(p_partials, tl.sum(b_c * b_c))
            b_c = tl.zeros([BM, BN], dtype=tl.float32)
            p_partials += parts
            t = 0
    return b_sum, b_square


@triton.jit(do_not_specialize=common.BATCH)
def linear_weight_grad_kernel(
    p_g, p_x, p_partials, p_sum, p_square, p_pieces, p_squares,
    whole, rest, size, samples, T, O, I, parts,
    UNIT_O: tl.constexpr, UNIT_I: tl.constexpr, EVEN: tl.constexpr,
    OUTER: tl.constexpr, SQUARES: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Σ_i c_i, and with SQUARES Σ_i c_i², of one tile or piece (pieces.py); OUTER counts in BK."""
    O, I = O * UNIT_O, I * UNIT_I  # so that the compiler knows how rows are aligned
    i = tl.program_id(0)
    i_tile, first, last = piece(i, tl.cdiv(samples, BK) if OUTER else samples, whole, rest, size)
    i_m, i_n = tile_index(i_tile, tl.cdiv(O, BM), tl.cdiv(I, BN))
    o_m, o_n = i_m * BM + tl.arange(0, BM), i_n * BN + tl.arange(0, BN)
    if OUTER:
        first, last = first * BK, tl.minimum(last * BK, samples)
        b_sum, b_square = outer_tile(
            p_g, p_x, o_m, o_n, first, last, O, I, SQUARES, PRECISION, BM, BN, BK
        )
    else:
        b_sum, b_square = direct_tile(
            p_g, p_x, p_partials + i_tile, o_m, o_n, first, last, T, O, I, parts,
            EVEN, SQUARES, PRECISION, BM, BN, BK,
        )  # fmt: skip
    m_out = (o_m < O)[:, None] & (o_n < I)[None, :]
    o_out = o_m[:, None].to(tl.int64) * I + o_n[None, :]
    store_tile(p_sum, p_pieces, i, whole, b_sum, o_out, m_out, BM, BN)
    if SQUARES:
        store_tile(p_square, p_squares, i, whole, b_square, o_out, m_out, BM, BN)


def matmul(g: Tensor, x: Tensor) -> Tensor:
    """gᵀx of g [n, O] and x [n, I], in float32 whatever the operands are."""
    if g.dtype == torch.float32 or g.device.type == "cpu":
        return g.float().T @ x.float()
    return torch.mm(g.T, x, out_dtype=torch.float32)


def prefers_gram(positions: int, rows: int, columns: int, coordinates: bool) -> bool:
    """Whether ‖c_i‖² is cheaper from two Gram matrices than from c_i itself.

    In tensor-core multiply-adds a sample: T²(O + I)/2 more than the gradient (half of T², by
    symmetry), against two vector operations a coordinate.
    """
    tiles = positions * (positions + gram.BLOCK) // 2
    return not coordinates and tiles * (rows + columns) < 2 * gram.VECTOR_COST * rows * columns


def operands(name: str, grad_out: Tensor, input: Tensor) -> tuple[Tensor, Tensor]:
    """grad_out [b, T, O] and input [b, T, I], contiguous.

    Raises:
        RuntimeError: shapes or dtypes that do not fit.
    """
    if input.dim() < 2 or grad_out.shape[:-1] != input.shape[:-1] or grad_out.dtype != input.dtype:
        raise RuntimeError(
            f"{name}: expected grad_out [b, ..., O] and input [b, ..., I] of one dtype, with the "
            f"same leading dimensions, got {list(grad_out.shape)} {grad_out.dtype} and "
            f"{list(input.shape)} {input.dtype}"
        )
    shape = (input.shape[0], input.shape[1:-1].numel())
    g = common.operand(grad_out).reshape(*shape, grad_out.shape[-1])
    x = common.operand(input).reshape(*shape, input.shape[-1])
    return g.contiguous(), x.contiguous()


def method_of(positions: int, rows: int, columns: int, coordinates: bool) -> str:
    """Which of "outer", "direct" and "gram" serves samples [T, O] and [T, I]."""
    if positions == 1:
        return "outer"
    return "gram" if prefers_gram(positions, rows, columns, coordinates) else "direct"


def choose_method(g: Tensor, x: Tensor, coordinates: bool) -> str:
    """Which of them serves g [b, T, O] and x [b, T, I]."""
    return method_of(g.shape[1], g.shape[2], x.shape[2], coordinates)


def unit(n: int) -> int:
    """The largest power of 2 up to 16 that divides n."""
    return min(16, n & -n)


def is_even(tile: Tile, positions: int, rows: int, columns: int) -> bool:
    """Whether the tile divides a weight of rows × columns, and a pass the positions."""
    return positions % tile.BK == rows % tile.BM == columns % tile.BN == 0


def weight_grad(
    g: Tensor, x: Tensor, partials: Tensor, tile: Tile, squares: bool
) -> tuple[Tensor, Tensor]:
    """Σ c_i and Σ c_i² of g [b, T, O] and x [b, T, I]; for T > 1 the tiles' norms, too."""
    samples, positions, rows = g.shape
    columns = x.shape[2]
    outer = positions == 1
    units = common.cdiv(samples, tile.BK) if outer else samples
    steps = common.cdiv(positions, tile.BK)
    exact = in_halves(g.dtype, outer)
    sums = TileSums(g.device, tile, units, steps, rows, columns, squares=squares, exact=exact)
    linear_weight_grad_kernel[(sums.pieces.programs,)](
        g, x, partials, *sums.arguments,
        samples, positions, rows // unit(rows), columns // unit(columns), partials.shape[1],
        UNIT_O=unit(rows), UNIT_I=unit(columns), EVEN=is_even(tile, positions, rows, columns),
        OUTER=outer, SQUARES=squares, PRECISION=matmul_precision(),
        **tile._asdict(), **common.OPTIONS,
    )  # fmt: skip
    return sums.finish()


def finish_layer(
    g: Tensor, x: Tensor, partials: Tensor, capacity: int, weight: bool, bias: bool, squares: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """(grad_bias, probe, bias_sums) of g [b, T, O] and x [b, T, I]; see `finish`."""
    samples, positions, rows = g.shape
    if positions == 1:
        outer = Outer(x[:, 0], weight, bias)
        vectors = g.view(1, samples, 1, rows)
        done = finish(g.device, None, vectors, samples, capacity, squares, outer)
    else:
        vectors = None
        if bias:
            vectors = torch.sum(g, 1, dtype=torch.float32).view(1, samples, 1, rows)
        done = finish(g.device, partials, vectors, samples, capacity, squares)
    grad_bias, bias_sums = done.sums[0] if bias else common.nothing(g, 2)
    return grad_bias, done.probe, bias_sums


def linear_weight_grad(
    grad_out: Tensor,
    input: Tensor,
    capacity: int,
    weight: bool,
    bias: bool,
    coordinates: bool,
    method: str | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`ops.linear_weight_grad`; `method` is "outer", "direct" or "gram", chosen if None."""
    g, x = operands("linear_weight_grad", grad_out, input)
    samples, positions, rows = g.shape
    columns = x.shape[2]
    method = (method or choose_method(g, x, coordinates)) if weight else "none"
    grad, sums = common.nothing(g, 2)
    parts, tile = 0, None
    if method == "direct" or (method == "outer" and coordinates):
        tile = tile_for(g, x, coordinates)
    if tile is not None and method == "direct":
        parts = common.cdiv(rows, tile.BM) * common.cdiv(columns, tile.BN)
    elif method == "gram":
        parts = gram.parts(positions)
    partials = torch.empty(samples, parts, dtype=torch.float32, device=g.device)
    if tile is not None:
        grad, sums = weight_grad(g, x, partials, tile, coordinates)
    elif weight:
        grad = matmul(g.flatten(0, 1), x.flatten(0, 1))
    if method == "gram":
        gram.linear_norms(g, x, partials, matmul_precision())
    grad_bias, probe, bias_sums = finish_layer(g, x, partials, capacity, weight, bias, coordinates)
    return grad, grad_bias, probe, sums, bias_sums
