"""Tiles of the weight-gradient kernels: how large, and in which order.

An accumulator of 128×128 takes 64 registers of a thread at 256 threads, of 128×64 or (at 128
threads) 64×64 half of that; a thread has 255, and 128 at 512 threads. Two of 128×128 fit beside the
operands' addresses, if rows begin at 16 bytes; three (with coordinate sums) only on Hopper, in 512
threads, and for such 16-bit operands. Otherwise with coordinate sums, operands in halves, or w and
v of an update, tiles shrink until ptxas spills nothing, which is tested for sm_80, sm_90 and
sm_100; but smaller tiles read the operands more often: 16 bits at 600 TFLOP/s take 9.4 TB/s from L2
in tiles of 128×128, 14 in 128×64. Not measured on a GPU.
"""

# Kernels are written in Triton's language, not in Python's types.
# pyright: reportArgumentType=false, reportCallIssue=false, reportAssignmentType=false

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import common


class Tile(NamedTuple):
    """How a weight-gradient kernel is compiled."""

    BM: int
    BN: int
    BK: int
    num_warps: int
    num_stages: int


def choose_tile(rows: int, columns: int, accumulators: int, itemsize: int) -> Tile:
    """The tile for a weight of rows × columns: smaller only where the weight is, or registers are.

    Args:
        rows: O.
        columns: I.
        accumulators: how many a program holds, more where operands are split in registers.
        itemsize: bytes of an operand.
    """
    block_k = 16 if accumulators > 3 else 64 if itemsize == 2 else 32
    if min(rows, columns) <= 32 or accumulators > 3:
        bm, bn = min(64, _power(rows)), min(64, _power(columns))
        small = min(bm, bn) < 64
        return Tile(bm, bn, min(block_k, 32) if small else block_k, 4, 2 if small else 3)
    if min(rows, columns) <= 64 or accumulators == 3:
        bm, bn = (128, 64) if rows > 64 else (64, 128)
        return Tile(min(bm, _power(rows)), min(bn, _power(columns)), block_k, 8, 3)
    return Tile(128, 128, block_k, 8, 3)


def tile_for(g: Tensor, x: Tensor, coordinates: bool, update: bool = False) -> Tile:
    """`choose_tile` for g [b, T, O] and x [b, T, I]; the update holds w and v, too."""
    outer = g.shape[1] == 1
    aligned = [t.shape[2] * t.itemsize % 16 == 0 for t in (g, x)]  # otherwise addresses are many
    large = g.itemsize == 2 and min(g.shape[2], x.shape[2]) > 64
    hopper = common.capability(g.device) == (9, 0)
    if large and hopper and all(aligned) and coordinates and not outer and not update:
        return Tile(128, 128, 64, 16, 3)
    accumulators = 2 + (coordinates or not (outer or any(aligned))) + update
    accumulators += in_halves(g.dtype, outer)
    tile = choose_tile(g.shape[2], x.shape[2], accumulators, g.itemsize)
    if update and outer:  # memory-bound: many small programs, w and v on their way from the start
        return Tile(64, min(32, tile.BN), 16, 4, 3)
    return tile._replace(num_warps=8) if update else tile


def in_halves(dtype: torch.dtype, outer: bool) -> bool:
    """Whether a linear layer's operands are split in registers; 16-bit ones for their squares."""
    return matmul_precision() == "tf32x3" and (dtype == torch.float32 or outer)


def resident(tile: Tile, accumulators: int) -> int:
    """How many programs a multiprocessor runs at a time, by its 65,536 registers.

    A thread takes those of the accumulators and some 80 more.
    """
    threads = 32 * tile.num_warps
    registers = 80 + accumulators * tile.BM * tile.BN // threads
    return max(1, min(8, 65536 // (threads * registers)))


def _power(n: int) -> int:
    return max(16, common.next_power_of_2(n))


def matmul_precision() -> str:
    """How PyTorch's matrix products of float32 are set, see `common.precision`."""
    return common.precision(torch.backends.cuda.matmul)


@triton.jit
def tile_index(i_tile, tiles_m, tiles_n):
    """(row, column) of a tile, 8 rows of tiles at a time so that neighbours share operands."""
    i_group = i_tile // (8 * tiles_n)
    height = tl.minimum(tiles_m - i_group * 8, 8)
    i_inner = i_tile % (8 * tiles_n)
    return i_group * 8 + i_inner % height, i_inner // height
