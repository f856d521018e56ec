"""Which program adds up which samples of which tile, so that the device is full to the end.

A device runs so many programs at a time: its slots. As long as there is a tile for every slot, a
program does one for all samples, and all of a wave walk through the samples in step: operands of a
sample are read from memory once and from L2 by everyone else. The tiles that are left over would
keep few slots busy, so they are cut along the samples. Pieces of `size` samples come first, what
remains of each tile then fills the slots that are still free. Programs write their pieces beside
each other, tile by tile, and a second kernel adds them in order: the same bits every time.

Time in passes through a program's loop, with `JOIN_COST` for writing a piece and reading it again:

    samples · steps · (whole tiles / slots) + span · steps + JOIN_COST · (1 + pieces / slots)

`span` is how many samples long the slots are busy with pieces, 1 the second kernel's launch. For
example 108 tiles of 16 samples in 132 slots: 16 samples long uncut, 14 in pieces of 14 and 2, where
108 · 16 / 132 = 13.1 is the least. Not measured on a GPU.
"""

# Kernels are written in Triton's language, not in Python's types.
# pyright: reportArgumentType=false, reportCallIssue=false, reportAssignmentType=false

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import common
from .tiles import Tile, resident, tile_index

JOIN_COST = 8
"""Passes in the time in which a tile is written and read again, or a kernel begins and ends."""


class Pieces(NamedTuple):
    """How tiles are divided: program i < whole does tile i, the others do pieces of the rest.

    Attributes:
        whole: tiles that are not cut.
        rest: tiles that are.
        size: samples of a piece, all but the last of a tile.
        count: pieces of a tile.
    """

    whole: int
    rest: int
    size: int
    count: int

    @property
    def programs(self) -> int:
        """All of them."""
        return self.whole + self.rest * self.count


@lru_cache(1 << 12)
def cut(tiles: int, samples: int, steps: int, slots: int) -> Pieces:
    """How to divide so many tiles over so many slots.

    Args:
        tiles: of the weight, of all groups.
        samples: that every tile adds up.
        steps: passes through a program's loop for one sample.
        slots: programs that run at a time.
    """
    whole, rest = tiles // slots * slots, tiles % slots

    def time(size: int) -> float:
        full, last = divmod(samples, size)
        waves, begun = divmod(rest * full, slots)
        after = common.cdiv(rest, slots - begun) * last  # in slots where no full piece runs
        span = waves * size + max(size if begun else 0, after)
        count = common.cdiv(samples, size)
        return span * steps + (JOIN_COST * (1 + rest * count / slots) if count > 1 else 0)

    if not rest:
        return Pieces(tiles, 0, samples, 1)
    sizes = set[int]()
    for count in range(1, min(samples, 2 * slots // rest + 1) + 1):  # about two pieces a slot
        sizes.add(common.cdiv(samples, count))  # all of a tile as long as each other
        free = slots - rest * (count - 1) % slots  # for the last pieces, so many in a row:
        row = common.cdiv(rest, free)
        sizes.add(common.cdiv(row * samples, row * (count - 1) + 1))  # together as long as another
    size = min(sorted(sizes, reverse=True), key=time)
    if size == samples:
        return Pieces(tiles, 0, samples, 1)
    return Pieces(whole, rest, size, common.cdiv(samples, size))


@triton.jit
def piece(i, samples, whole, rest, size):
    """(tile, first sample, end of the samples) of program i."""
    i_tile, first, last = i, 0, samples
    if i >= whole:
        i_piece = (i - whole) // rest
        i_tile = whole + (i - whole) % rest
        first = i_piece * size
        last = tl.minimum(first + size, samples)
    return i_tile, first, last


@triton.jit
def store_tile(p_out, p_pieces, i, whole, b, o_out, m_out, BM: tl.constexpr, BN: tl.constexpr):
    """Writes program i's tile to its place, or its piece to where the next kernel finds it."""
    if i < whole:
        tl.store(p_out + o_out, b, mask=m_out)
    else:
        o_piece = tl.arange(0, BM)[:, None] * BN + tl.arange(0, BN)[None, :]
        tl.store(p_pieces + (i - whole).to(tl.int64) * (BM * BN) + o_piece, b)


@triton.jit(do_not_specialize=[*common.BATCH, "tiles_m", "tiles_n", "O"])
def join_pieces_kernel(
    p_pieces, p_squares, p_sum, p_square, whole, rest, count, tiles_m, tiles_n, O, C, K,
    SQUARES: tl.constexpr, CHANNELS_LAST: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Adds up the pieces of some rows of a tile; O, C and K as in conv.py."""
    i_rest, i_rows = tl.program_id(0), tl.program_id(1)
    i_tile = whole + i_rest
    i_group = i_tile // (tiles_m * tiles_n)
    i_m, i_n = tile_index(i_tile % (tiles_m * tiles_n), tiles_m, tiles_n)
    o_row, o_n = i_rows * ROWS + tl.arange(0, ROWS), i_n * BN + tl.arange(0, BN)
    o = i_rest.to(tl.int64) * (BM * BN) + o_row[:, None] * BN + tl.arange(0, BN)[None, :]
    b_sum = tl.zeros([ROWS, BN], dtype=tl.float32)
    b_square = tl.zeros([ROWS, BN], dtype=tl.float32)
    for _ in range(count):
        b_sum += tl.load(p_pieces + o)
        if SQUARES:
            b_square += tl.load(p_squares + o)
        o += tl.cast(rest, tl.int64) * (BM * BN)
    o_m, R = i_m * BM + o_row, C * K
    o_r = o_n
    if CHANNELS_LAST:
        o_r = o_n % C * K + o_n // C
    m_out = (o_m < O)[:, None] & (o_n < R)[None, :]
    o_out = (i_group * O + o_m)[:, None].to(tl.int64) * R + o_r[None, :]
    tl.store(p_sum + o_out, b_sum, mask=m_out)
    if SQUARES:
        tl.store(p_square + o_out, b_square, mask=m_out)


class TileSums:
    """Σ_i c_i and Σ_i c_i² of a weight [groups · rows, channels · elements], tile by tile.

    Attributes:
        sum: the first, complete after `finish`.
        square: the second, of shape [0] if not wanted.
        pieces: who does what.
        arguments: (p_sum, p_square, p_pieces, p_squares, whole, rest, size) for the kernel.
    """

    def __init__(
        self,
        device: torch.device,
        tile: Tile,
        samples: int,
        steps: int,
        rows: int,
        channels: int,
        elements: int = 1,
        groups: int = 1,
        squares: bool = False,
        exact: bool = False,
    ) -> None:
        """Args:
        device: where it is.
        tile: of the weight.
        samples: that every tile adds up.
        steps: passes through a program's loop for one sample.
        rows: O, output channels of a group.
        channels: C, input channels of a group.
        elements: K, of the kernel.
        groups: of channels.
        squares: whether Σ c_i² is wanted.
        exact: whether operands are split into halves, in registers.
        """

        def empty(*size: int) -> Tensor:
            return torch.empty(size, dtype=torch.float32, device=device)

        self._tile, self._squares = tile, squares
        self._sizes = rows, channels, elements
        self._tiles = common.cdiv(rows, tile.BM), common.cdiv(channels * elements, tile.BN)
        slots = common.multiprocessors(device) * resident(tile, 2 + squares + exact)
        tiles = groups * self._tiles[0] * self._tiles[1]
        self.pieces = pieces = cut(tiles, samples, steps, slots)
        self.sum = empty(groups * rows, channels * elements)
        self.square = torch.empty_like(self.sum) if squares else empty(0)
        self._parts = self._square_parts = self.sum
        if pieces.rest:
            size = pieces.rest * pieces.count * tile.BM * tile.BN
            self._parts, *rest = empty(1 + squares, size)
            self._square_parts = rest[0] if squares else self._parts
        self.arguments = (
            self.sum, self.square, self._parts, self._square_parts,
            pieces.whole, pieces.rest, pieces.size,
        )  # fmt: skip

    def finish(self, channels_last: bool = False) -> tuple[Tensor, Tensor]:
        """Adds up the pieces and returns (sum, square).

        Args:
            channels_last: whether the kernel's columns count channels fastest.
        """
        whole, rest, _, count = self.pieces
        if rest:
            bm, bn = self._tile.BM, self._tile.BN
            rows = min(bm, max(1, 1024 // bn))
            join_pieces_kernel[(rest, bm // rows)](
                self._parts, self._square_parts, self.sum, self.square,
                whole, rest, count, *self._tiles, *self._sizes,
                SQUARES=self._squares, CHANNELS_LAST=channels_last,
                BM=bm, BN=bn, ROWS=rows, num_warps=4, **common.OPTIONS,
            )  # fmt: skip
        return self.sum, self.square
