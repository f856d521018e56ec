"""The stream of samples does not depend on how it is cut, fetched or interrupted."""

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from adagrad_kernels import AdaptiveDataLoader, BatchSizeController, Decision


class Numbers(Dataset[Tensor]):
    def __init__(self, length: int) -> None:
        self.length = length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Tensor:
        return torch.tensor(index)


class Many(Numbers):
    """Fetches a micro-batch in one call."""

    def __getitems__(self, indices: list[int]) -> list[Tensor]:
        return [torch.tensor(1000 + i) for i in indices]


class Negated(TensorDataset):
    """Samples that are not rows of its tensors."""

    def __getitem__(self, index: int) -> Any:
        (x,) = super().__getitem__(index)
        return [-x]


class Dicts(Numbers):
    def __getitem__(self, index: int) -> Any:
        return {"x": torch.full((2,), index), "y": index}


def grow(controller: BatchSizeController, size: int) -> None:
    controller.advance(Decision(False, size, size / controller.batch_size))


def stream(loader: AdaptiveDataLoader, sizes: list[int], samples: int) -> list[int]:
    """Samples in their order; batches grow to the given sizes, one after the other."""
    found: list[int] = []
    growth = iter(sizes)
    done = 0
    while len(found) < samples:
        for micro_batch in loader:
            (x,) = micro_batch if isinstance(micro_batch, list) else (micro_batch,)
            found += x.tolist()
            done += len(x)
            if done >= loader.controller.batch_size:
                done = 0
                grow(loader.controller, next(growth, 0))
            if len(found) >= samples:
                break
    return found[:samples]


def make(length: int, batch_size: int = 2, cap: int = 64, **options: Any) -> AdaptiveDataLoader:
    dataset = TensorDataset(torch.arange(length))
    return AdaptiveDataLoader(dataset, BatchSizeController(batch_size, cap), **options)


lengths = st.integers(1, 40)
sizes = st.lists(st.integers(1, 64), max_size=8)


@given(lengths, sizes, st.integers(1, 20), st.booleans())
def test_every_epoch_is_a_permutation(
    length: int, growth: list[int], micro: int, shuffle: bool
) -> None:
    found = stream(make(length, max_micro_batch_size=micro, shuffle=shuffle), growth, 4 * length)
    epochs = [found[k * length : (k + 1) * length] for k in range(4)]
    for epoch in epochs:
        assert sorted(epoch) == list(range(length))
        assert shuffle or epoch == sorted(epoch)
    if shuffle and length > 20:
        assert len({tuple(epoch) for epoch in epochs}) == 4


@given(lengths, sizes, sizes, st.integers(1, 20))
def test_the_order_does_not_depend_on_batch_sizes(
    length: int, one: list[int], other: list[int], micro: int
) -> None:
    expected = stream(make(length), one, 3 * length)
    assert stream(make(length, max_micro_batch_size=micro), other, 3 * length) == expected


def test_the_order_depends_on_the_seed_alone() -> None:
    torch.manual_seed(1)
    one = stream(make(50, seed=3), [], 150)
    torch.manual_seed(2)
    assert stream(make(50, seed=3), [], 150) == one
    assert stream(make(50, seed=4), [], 150) != one
    epochs = {tuple(stream(make(50, seed=s), [], 150)[k : k + 50]) for s in range(3)
              for k in (0, 50, 100)}  # fmt: skip
    assert len(epochs) == 9, "the second epoch of one seed is the first of the next"


@pytest.mark.parametrize("num_workers", [0, 2])
def test_torchs_random_numbers_are_left_alone(num_workers: int) -> None:
    """Dropout must not depend on how often the workers started over."""
    before = torch.get_rng_state()
    stream(make(20, num_workers=num_workers), [4, 8], 60)
    assert torch.equal(torch.get_rng_state(), before)


@given(lengths, sizes, st.integers(1, 20), st.integers(0, 30), st.integers(0, 30))
def test_interruptions_lose_nothing(
    length: int, growth: list[int], micro: int, first: int, second: int
) -> None:
    """A state that is saved in a batch goes on at the beginning of that batch."""
    samples = 3 * length
    expected = stream(make(length, max_micro_batch_size=micro), growth, samples + 60 * 20)
    controller_state, state, begun = None, None, 0
    for stop in (first, second):
        loader = make(length, max_micro_batch_size=micro)
        if state is not None:
            loader.controller.load_state_dict(controller_state)
            loader.load_state_dict(state)
        at = loader.samples
        for count, micro_batch in zip(range(stop), endless(loader), strict=False):
            (x,) = micro_batch
            assert x.tolist() == expected[at : at + len(x)]
            at += len(x)
            if loader.state_dict()["samples"] == at:  # a batch has ended
                begun = at
                grow(loader.controller, growth[count % len(growth)] if growth else 0)
        assert loader.samples == at
        controller_state, state = loader.controller.state_dict(), loader.state_dict()
        assert state["samples"] == begun


def endless(loader: AdaptiveDataLoader) -> Iterator[Any]:
    while True:
        yield from loader


def test_a_pass_goes_on_in_the_middle_of_a_batch() -> None:
    loader = make(10, batch_size=6, shuffle=False, max_micro_batch_size=2)
    assert [x.tolist() for (x,) in itertools.islice(loader, 2)] == [[0, 1], [2, 3]]
    assert loader.state_dict()["samples"] == 0
    rest = [x.tolist() for (x,) in loader]
    assert rest == [[4, 5], [6, 7], [8, 9], [0, 1]]


def test_loading_in_the_middle_of_a_batch_begins_a_whole_one() -> None:
    loader = make(12, batch_size=6, shuffle=False, max_micro_batch_size=2)
    start = loader.state_dict()
    assert len(list(itertools.islice(loader, 4))) == 4  # one of the second batch's three
    loader.load_state_dict(start)
    pieces = [(x.tolist(), loader.batch_complete) for (x,) in itertools.islice(loader, 3)]
    assert pieces == [([0, 1], False), ([2, 3], False), ([4, 5], True)]


@pytest.mark.parametrize(("length", "last"), [(12, [8, 9, 10, 11]), (10, [8, 9, 0, 1])])
def test_the_last_micro_batch_of_an_epoch(length: int, last: list[int]) -> None:
    """Where batches divide the dataset, and where the last one goes on into the next epoch."""
    loader = make(length, batch_size=4, shuffle=False, max_micro_batch_size=4)
    told = [(loader.epoch_complete, x.tolist()) for (x,) in loader]
    assert told == [(False, [0, 1, 2, 3]), (False, [4, 5, 6, 7]), (True, last)]


@given(lengths, st.integers(1, 64), st.integers(1, 20))
def test_epoch_ends_do_not_shrink_a_batch(length: int, batch: int, micro: int) -> None:
    """Also where the batch is larger than the dataset."""
    loader = make(length, batch_size=batch, max_micro_batch_size=micro)
    size, count = loader.controller.micro_batches()
    for epoch in range(3):
        before = loader.samples
        pieces = [len(x) for (x,) in loader]
        assert pieces == [size] * (len(pieces) // count * count)
        assert len(pieces) >= count
        assert loader.epoch > epoch
        assert loader.samples - before == sum(pieces)
        assert loader.samples % loader.controller.batch_size == 0


@given(lengths, st.integers(1, 64), st.integers(1, 20))
def test_len_is_that_of_an_epoch(length: int, batch: int, micro: int) -> None:
    loader = make(length, batch_size=batch, max_micro_batch_size=micro)
    assert len(loader) == len(list(loader))


@pytest.mark.parametrize("dataset", [Numbers(17), TensorDataset(torch.arange(17))])
def test_workers_give_the_same_micro_batches(dataset: Dataset[Any]) -> None:
    def pieces(num_workers: int) -> list[list[int]]:
        controller = BatchSizeController(2, 24)
        loader = AdaptiveDataLoader(
            dataset, controller, max_micro_batch_size=5, num_workers=num_workers
        )
        found = []
        for size in (0, 0, 3, 0, 7, 8, 12, 24):
            micro_batches = controller.micro_batches()[1]
            for item in itertools.islice(endless(loader), micro_batches):
                found.append((item[0] if isinstance(item, list) else item).tolist())
            grow(controller, size)
        return found

    assert pieces(2) == pieces(0)


def test_workers_resume_in_the_middle_of_an_epoch() -> None:
    first = make(30, batch_size=4, num_workers=2, max_micro_batch_size=2)
    head = [x.tolist() for (x,) in itertools.islice(first, 5)]  # two batches and a half
    second = make(30, batch_size=4, num_workers=2, max_micro_batch_size=2)
    second.load_state_dict(first.state_dict())
    tail = [x.tolist() for (x,) in second]
    assert head[:4] + tail == [
        x.tolist() for (x,) in make(30, batch_size=4, max_micro_batch_size=2)
    ]


def test_growth_during_a_pass_takes_effect_at_the_next_batch() -> None:
    loader = make(100, batch_size=4, max_micro_batch_size=2, shuffle=False)
    sizes = []
    for number, (x,) in enumerate(loader):
        sizes.append(len(x))
        if number == 0:
            grow(loader.controller, 6)
        if number == 4:
            break
    assert sizes == [2] * 5
    assert loader.samples == 10
    assert loader.state_dict()["samples"] == 10, "2 micro-batches of the first batch, 3 of the next"


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize(
    ("dataset", "collate", "expected"),
    [
        (Numbers(4), None, torch.tensor([0, 1])),
        (Many(4), None, torch.tensor([1000, 1001])),
        (Dicts(4), None, {"x": torch.tensor([[0, 0], [1, 1]]), "y": torch.tensor([0, 1])}),
        (Numbers(4), sum, torch.tensor(1)),
        (TensorDataset(torch.arange(4)), len, 2),
        (Negated(torch.arange(4)), None, [torch.tensor([0, -1])]),
    ],
    ids=["plain", "getitems", "dict", "collate_fn", "collate_fn of tensors", "subclass of tensors"],
)
def test_datasets(dataset: Dataset[Any], collate: Any, expected: Any, num_workers: int) -> None:
    loader = AdaptiveDataLoader(
        dataset,
        BatchSizeController(2, 2),
        shuffle=False,
        collate_fn=collate,
        num_workers=num_workers,
    )
    torch.testing.assert_close(next(iter(loader)), expected)


class TestWeights:
    """Draws with replacement; `WeightedRandomSampler`, resumable and shared among processes."""

    def test_frequencies(self) -> None:
        """Within 5 standard errors of the binomial distribution, and never where a weight is 0."""
        weights = torch.tensor([0.0, 1.0, 2.0, 0.0, 5.0, 0.0])
        drawn = torch.tensor(stream(make(6, weights=weights), [], 6000)).bincount(minlength=6)
        p = weights.double() / weights.sum()
        error = (6000 * p * (1 - p)).sqrt()
        assert ((drawn - 6000 * p).abs() <= 5 * error).all()

    @given(lengths, sizes, sizes, st.integers(1, 20))
    def test_the_order_depends_on_seed_and_weights_alone(
        self, length: int, one: list[int], other: list[int], micro: int
    ) -> None:
        weights = [1.0 + k % 3 for k in range(length)]
        expected = stream(make(length, weights=weights), one, 3 * length)
        loader = make(length, weights=weights, max_micro_batch_size=micro)
        assert stream(loader, other, 3 * length) == expected

    def test_resumed_and_shared(self) -> None:
        weights = torch.arange(1.0, 31.0)
        expected = stream(make(30, batch_size=4, weights=weights), [], 60)
        served: list[int] = []
        state = None
        for _ in range(5):
            parts = [
                make(30, batch_size=4, weights=weights, rank=r, world_size=2) for r in range(2)
            ]
            for loader in parts:
                if state is not None:
                    loader.load_state_dict(state)
            for micro_batches in itertools.islice(zip(*map(endless, parts), strict=True), 3):
                served += [i for (x,) in micro_batches for i in x.tolist()]
            state = parts[0].state_dict()
        assert served == expected

    def test_equal_weights_are_not_a_permutation(self) -> None:
        assert len(set(stream(make(50, weights=[1.0] * 50), [], 50))) < 50

    @pytest.mark.parametrize(
        ("weights", "message"),
        [
            ([1.0, 2.0], r"shape \[3\], got \[2\]"),
            ([1.0, -1.0, 1.0], "none negative"),
            ([1.0, float("nan"), 1.0], "finite"),
            ([0.0, 0.0, 0.0], "not all zero"),
            ([1e308, 1e308, 1e308], "float64.s range"),
            ([5e-324, 5e-324, 0.0], "float64.s range"),
        ],
    )
    def test_no_distribution(self, weights: list[float], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            make(3, weights=weights)

    def test_contradictions(self) -> None:
        with pytest.raises(ValueError, match="shuffle=False rules out"):
            make(3, weights=[1.0, 1.0, 1.0], shuffle=False)
        state = make(3, weights=[1.0, 1.0, 1.0]).state_dict()
        for other in (None, [1.0, 1.0, 2.0]):
            with pytest.raises(ValueError, match="weights"):
                make(3, weights=other).load_state_dict(state)


class TestErrors:
    """Wrong datasets and states are refused, with the reason."""

    def test_iterable_dataset(self) -> None:
        class Endless(IterableDataset[int]):
            def __iter__(self) -> Iterator[int]:
                return itertools.count()

        with pytest.raises(TypeError, match="map-style dataset with a length, got Endless"):
            AdaptiveDataLoader(Endless(), BatchSizeController(2, 2))

    def test_dataset_without_a_length(self) -> None:
        with pytest.raises(TypeError, match="length"):
            AdaptiveDataLoader(Dataset(), BatchSizeController(2, 2))

    def test_another_loader(self) -> None:
        with pytest.raises(TypeError, match="map-style dataset with a length, got DataLoader"):
            AdaptiveDataLoader(DataLoader(Numbers(4)), BatchSizeController(2, 2))

    @pytest.mark.parametrize("name", ["sampler", "batch_sampler", "batch_size", "drop_last"])
    def test_what_the_loader_decides_itself(self, name: str) -> None:
        with pytest.raises(TypeError, match=f"unexpected keyword argument '{name}'"):
            AdaptiveDataLoader(Numbers(4), BatchSizeController(2, 2), **{name: None})

    def test_empty_dataset(self) -> None:
        with pytest.raises(ValueError, match="empty"):
            make(0)

    def test_no_controller(self) -> None:
        optimizer = torch.optim.SGD(nn.Linear(1, 1).parameters())
        with pytest.raises(TypeError, match=r"optimizer of this package.*SGD"):
            AdaptiveDataLoader(Numbers(3), optimizer)

    def test_micro_batches(self) -> None:
        with pytest.raises(ValueError, match="max_micro_batch_size must be at least 1"):
            make(3, max_micro_batch_size=0)
        controller = BatchSizeController(8, 8, multiple_of=4)
        with pytest.raises(ValueError, match="smaller than multiple_of"):
            AdaptiveDataLoader(Numbers(3), controller, max_micro_batch_size=3)

    def test_workers(self) -> None:
        with pytest.raises(ValueError, match="num_workers"):
            make(3, num_workers=-1)

    @pytest.mark.parametrize(
        "other", [{"seed": 1}, {"shuffle": False}, {"length": 11}], ids=["seed", "order", "length"]
    )
    def test_state_of_another_loader(self, other: dict[str, Any]) -> None:
        loader = make(**{"length": 10, **other})
        with pytest.raises(ValueError, match=next(iter(other))):
            loader.load_state_dict(make(10).state_dict())


def test_a_batch_larger_than_the_dataset_is_told_once(caplog: pytest.LogCaptureFixture) -> None:
    controller = BatchSizeController(4, max_batch_size=64)
    loader = AdaptiveDataLoader(Numbers(10), controller)
    list(loader)
    assert not caplog.text
    grow(controller, 16)
    list(loader), list(loader)
    assert caplog.text.count("the batch size (16) exceeds the dataset's 10 samples") == 1


@pytest.mark.skipif(torch.accelerator.is_available(), reason="there is an accelerator")
@pytest.mark.parametrize("num_workers", [0, 1])
def test_pinned_memory_without_an_accelerator(num_workers: int) -> None:
    """As torch's loader: a warning."""
    loader = AdaptiveDataLoader(
        TensorDataset(torch.arange(16)), BatchSizeController(8, 8), num_workers=num_workers
    )
    with pytest.warns(UserWarning, match="accelerator"):
        found = pinned_sizes(num_workers)
    assert found == [len(x) for (x,) in loader] == [8, 8]


def pinned_sizes(num_workers: int) -> list[int]:
    loader = AdaptiveDataLoader(
        TensorDataset(torch.arange(16)), BatchSizeController(8, 8), pin_memory=True,
        num_workers=num_workers,
    )  # fmt: skip
    return [len(x) for (x,) in loader]
