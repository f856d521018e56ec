"""The loader of several processes; each part of a test is one of them."""

from typing import Any

import pytest
import torch
from torch.utils.data import TensorDataset

import adagrad_kernels as ak


def parts(world: int, state: dict[str, Any] | None = None, **options: Any) -> list[Any]:
    """Loaders and controllers of all ranks."""
    found = []
    for rank in range(world):
        controller = ak.BatchSizeController(6, 60)
        loader = ak.AdaptiveDataLoader(
            TensorDataset(torch.arange(50)), controller, 8, seed=3, rank=rank, world_size=world,
            **options,
        )  # fmt: skip
        if state is not None:
            loader.load_state_dict(state)
        found.append((loader, controller))
    return found


def serve(loader: Any, controller: Any, number: int) -> list[list[int]]:
    """So many micro-batches, while every finished batch asks for a larger one."""
    served: list[list[int]] = []
    left = controller.micro_batches()[1]
    while True:
        for (indices,) in loader:
            served.append(indices.tolist())
            left -= 1
            if not left:
                controller.advance(ak.Decision(False, controller.batch_size + 5, 2.0))
                left = controller.micro_batches()[1]
            if len(served) == number:
                return served


def stream(length: int) -> list[int]:
    """The samples in order, as one process gets them."""
    ((loader, controller),) = parts(1)
    return [i for micro in serve(loader, controller, length) for i in micro][:length]


@pytest.mark.parametrize(("world", "num_workers"), [(2, 0), (3, 0), (5, 0), (2, 1)])
def test_ranks_share_the_samples_in_order(world: int, num_workers: int) -> None:
    served = [serve(*part, 12) for part in parts(world, num_workers=num_workers)]
    together: list[int] = []
    for micro_batches in zip(*served, strict=True):
        assert len({len(micro) for micro in micro_batches}) == 1, "ranks got unequal parts"
        assert 1 <= len(micro_batches[0]) <= 8
        together += [i for micro in micro_batches for i in micro]
    assert together == stream(len(together))


@pytest.mark.parametrize("world", [2, 3, 4, 7])
def test_batches_divide_among_ranks(world: int) -> None:
    loader, controller = parts(world)[0]
    for _ in range(40):
        size, count = controller.micro_batches()
        assert size * count == controller.batch_size <= 60
        assert size % world == 0
        assert size // world <= 8
        controller.advance(ak.Decision(False, controller.batch_size + 1, 2.0))
    assert controller.batch_size == 60 - 60 % world
    assert len(loader) == -(-50 // controller.batch_size) * controller.micro_batches()[1]


def test_resumed_with_another_number_of_ranks(caplog: pytest.LogCaptureFixture) -> None:
    first = parts(2)
    served = [serve(*part, 5) for part in first]
    together = [i for micro in zip(*served, strict=True) for one in micro for i in one]
    state = first[0][0].state_dict()
    assert state == first[1][0].state_dict()
    together = together[: state["samples"]]
    assert "another number" not in caplog.text
    served = [serve(*part, 5) for part in parts(3, state)]
    assert "another number of processes, 3 instead of 2" in caplog.text
    together += [i for micro in zip(*served, strict=True) for one in micro for i in one]
    assert together == stream(len(together))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, "give rank and world_size together"),
        ({"world_size": 2}, "give rank and world_size together"),
        ({"rank": 2, "world_size": 2}, r"rank must lie in \[0, world_size\), got 2 of 2"),
        ({"rank": -1, "world_size": 2}, "got -1 of 2"),
        ({"rank": 0, "world_size": 16}, r"max_batch_size \(8\) is smaller than one sample for"),
    ],
)
def test_parts_that_do_not_exist(options: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ak.AdaptiveDataLoader(
            TensorDataset(torch.arange(50)), ak.BatchSizeController(8, 8), **options
        )
