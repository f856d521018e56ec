"""How tiles are divided over a GPU, and the kernels whose tiles are."""

import heapq
import itertools
from typing import Any

import pytest
import torch
from triton_cases import (  # noqa: F401
    F32,
    LAST2,
    compare,
    conv_arguments,
    pytestmark,
    where_the_kernels_run,
)

from adagrad_kernels import reference
from adagrad_kernels.triton_kernels import (
    common,
    conv,
    linear,
    pieces,
)


@pytest.mark.parametrize("slots", [3, 7, 30])
@pytest.mark.parametrize("coordinates", [False, True])
def test_tiles_whole_and_in_pieces(
    monkeypatch: pytest.MonkeyPatch, slots: int, coordinates: bool
) -> None:
    """As on a device that is full with so few programs: of 12 to 24 tiles some are cut."""
    monkeypatch.setattr(common, "multiprocessors", lambda device: slots)
    monkeypatch.setattr(pieces, "resident", lambda *_: 1)
    monkeypatch.setattr(pieces, "JOIN_COST", 0)
    seen, cut_tiles = [], pieces.cut

    def record(*arguments: int) -> pieces.Pieces:
        seen.append(cut_tiles(*arguments))
        return seen[-1]

    monkeypatch.setattr(pieces, "cut", record)
    options = (True, False, coordinates)
    g, x = torch.randn(5, 20, 300), torch.randn(5, 20, 250)

    def direct(*arguments: Any) -> Any:
        return linear.linear_weight_grad(*arguments, method="direct")

    compare(direct, reference.linear_weight_grad, g, x, 5, *options)
    if coordinates:  # the outer product; norms alone need no kernel
        g, x = torch.randn(90, 1, 300), torch.randn(90, 1, 250)
        compare(linear.linear_weight_grad, reference.linear_weight_grad, g, x, 90, *options)
    for memory_format in (torch.contiguous_format, LAST2):
        case = ((5, 66, 4, 3), 130, (3, 2), (1, 1), (1, 1), (1, 1), 2, memory_format)
        arguments = conv_arguments(case, F32)
        compare(conv.conv_weight_grad, reference.conv_weight_grad, *arguments, *options)
    assert any(cut.rest for cut in seen)
    assert any(cut.whole and cut.rest for cut in seen) or slots == 30


@pytest.mark.parametrize("slots", [1, 7, 132])
@pytest.mark.parametrize("samples", [1, 2, 8, 1000])
def test_pieces_hold_every_sample_of_every_tile_once(slots: int, samples: int) -> None:
    for tiles, steps in itertools.product([*range(1, 150, 7), 36, 108, 144], [1, 16]):
        cut = pieces.cut(tiles, samples, steps, slots)
        assert cut.whole + cut.rest == tiles
        assert (cut.count - 1) * cut.size < samples <= cut.count * cut.size
        assert cut.whole % slots == 0 or not cut.rest
        assert cut.rest * cut.count <= 2 * slots + cut.rest  # the memory that they take


def time_on_a_device(samples: int, steps: int, slots: int, cut: pieces.Pieces) -> float:
    """Programs begin in order, each in the slot that is free first."""
    ends = [0] * slots
    full, last = divmod(samples, cut.size)
    for number, length in ((cut.whole, samples), (cut.rest * full, cut.size), (cut.rest, last)):
        for _ in range(number if length else 0):
            heapq.heapreplace(ends, ends[0] + length)
    joined = pieces.JOIN_COST * (1 + cut.rest * cut.count / slots) if cut.rest else 0
    return max(ends) * steps + joined


@pytest.mark.parametrize(("slots", "steps"), [(5, 1), (13, 16), (132, 1), (132, 64), (148, 16)])
def test_no_other_size_of_pieces_is_much_better(slots: int, steps: int) -> None:
    for tiles, samples in itertools.product(
        [1, slots // 3, slots // 2 + 1, slots * 2 // 3, slots - 1, slots + 7], [1, 2, 7, 16, 50]
    ):
        uncut, rest = pieces.Pieces(tiles, 0, samples, 1), tiles % slots
        times = [time_on_a_device(samples, steps, slots, uncut)]
        for size in range(1, samples):
            other = pieces.Pieces(tiles - rest, rest, size, common.cdiv(samples, size))
            if rest * other.count <= 2 * slots + rest:
                times.append(time_on_a_device(samples, steps, slots, other))
        cut = pieces.cut(tiles, samples, steps, slots)
        assert time_on_a_device(samples, steps, slots, cut) <= 1.05 * min(times), cut


def test_pieces_make_the_last_wave_short() -> None:
    """The tiles of a transformer's layers (768 wide) on an H100, 16 passes a sample."""
    assert pieces.cut(36, 8, 16, 132) == pieces.Pieces(0, 36, 3, 3)
    assert pieces.cut(108, 16, 16, 132) == pieces.Pieces(0, 108, 14, 2)
    assert pieces.cut(144, 8, 16, 132) == pieces.Pieces(132, 12, 1, 8)
    assert pieces.cut(132, 8, 16, 132) == pieces.Pieces(132, 0, 8, 1)
    assert pieces.cut(108, 8, 16, 132) == pieces.Pieces(108, 0, 8, 1)  # not worth it
    assert pieces.cut(1, 2, 1, 132) == pieces.Pieces(1, 0, 2, 1)


def test_splits_fill_the_device_and_stay_in_bounds() -> None:
    def splits(tiles: int, steps: int, size: int) -> int:
        return common.choose_splits(torch.device("cpu"), tiles, steps, size)

    assert splits(1, 4, 100) == 1  # nothing to divide
    assert splits(1, 40, 100) == 10
    assert splits(1000, 10**6, 100) == 1  # the device is full
    assert splits(1, 10**6, 1 << 26) == 1  # the parts would take too much memory
