"""AdaptiveDataLoader: serves batches of a size that changes while training."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence, Sized
from typing import Any, NamedTuple, Protocol, cast

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset, default_collate
from torch.utils.data._utils.pin_memory import pin_memory as pin_memory_of

from .batch_size import BatchSizeController


class HasController(Protocol):
    """An optimizer of this package."""

    @property
    def controller(self) -> BatchSizeController:
        """What holds the batch size."""
        ...


class _MicroBatch(NamedTuple):
    """One micro-batch of the plan: where it lies in the stream of samples."""

    start: int
    size: int


class AdaptiveDataLoader:
    """Serves the micro-batches of batches whose size the controller may change at each step.

    The samples form one endless stream: a permutation of the dataset for each epoch, one after
    the other. A batch takes the next `controller.batch_size` samples of the stream, as M equal
    micro-batches of at most `max_micro_batch_size`, so that mean losses weigh all samples alike.
    Batches may reach over the end of an epoch, so none is short. One pass of `for` serves the
    batches up to the first batch end at or after the end of the epoch; it goes on where the last
    pass, or a loaded state, left off, also in the middle of a batch.

    The order of the samples depends on `seed` alone, not on batch sizes, workers or
    interruptions. Workers fetch ahead at the present batch size; when it changes, what they
    fetched at the old one is dropped and fetched anew.

    Args:
        dataset: a map-style dataset with `len`.
        controller: an optimizer of this package, or a `BatchSizeController`.
        max_micro_batch_size: largest micro-batch, by memory.
        shuffle: a new permutation each epoch, or the dataset's order.
        num_workers: processes that fetch, 0 for none.
        seed: of the permutations.
        collate_fn: joins samples to a micro-batch, torch's by default.
        pin_memory: as in `torch.utils.data.DataLoader`.

    Attributes:
        samples: samples served so far.

    Raises:
        TypeError: an iterable-style dataset.
        ValueError: an empty dataset, or max_micro_batch_size < 1.

    Example:
        >>> dataset = TensorDataset(torch.arange(10.0))
        >>> loader = AdaptiveDataLoader(dataset, BatchSizeController(4, 8), shuffle=False)
        >>> [x.tolist() for (x,) in loader]
        [[0.0, 1.0, 2.0, 3.0], [4.0, 5.0, 6.0, 7.0], [8.0, 9.0, 0.0, 1.0]]
        >>> loader.samples, loader.epoch
        (12, 1)
    """

    def __init__(
        self,
        dataset: Dataset[Any],
        controller: HasController | BatchSizeController,
        max_micro_batch_size: int = 512,
        shuffle: bool = True,
        num_workers: int = 0,
        seed: int = 0,
        collate_fn: Callable[[list[Any]], Any] | None = None,
        pin_memory: bool = False,
    ) -> None:
        if isinstance(dataset, IterableDataset) or not hasattr(dataset, "__len__"):
            raise TypeError(
                f"AdaptiveDataLoader needs a map-style dataset with a length, got "
                f"{type(dataset).__name__}"
            )
        self._length = len(cast(Sized, dataset))
        if self._length == 0:
            raise ValueError("the dataset is empty")
        if not isinstance(controller, BatchSizeController):
            controller = controller.controller
        controller.limit_micro_batches(max_micro_batch_size)
        self.dataset = dataset
        self.controller = controller
        self.shuffle = shuffle
        self.num_workers = num_workers
        self.seed = seed
        self.samples = 0
        self._batch: tuple[int, int] | None = None  # (m, micro-batches left) inside a batch
        self._orders: dict[int, Tensor] = {}
        fetch = _Fetch(dataset, collate_fn)
        self._workers = (
            DataLoader(
                cast("Dataset[Any]", fetch),
                batch_size=None,
                sampler=_Plan(self),
                num_workers=num_workers,
                persistent_workers=True,
                pin_memory=pin_memory,
            )
            if num_workers
            else None
        )
        self._fetch = fetch
        self._pin_memory = pin_memory

    @property
    def epoch(self) -> int:
        """Complete passes over the dataset so far."""
        return self.samples // self._length

    def __len__(self) -> int:
        """Micro-batches of one epoch at the present batch size."""
        size, count = self.controller.micro_batches()
        return -(-self._length // (size * count)) * count

    def __iter__(self) -> Iterator[Any]:
        """One epoch of micro-batches, from where the stream stands."""
        end = (self.epoch + 1) * self._length
        fetched = self._from_workers() if self._workers is not None else None
        while self._batch is not None or self.samples < end:
            if self._batch is None:
                self._batch = self.controller.micro_batches()
            size, left = self._batch
            work = _MicroBatch(self.samples, size)
            if fetched is None:
                micro_batch = self._fetch[self.indices(work)]
                if self._pin_memory:
                    micro_batch = pin_memory_of(micro_batch)
            else:
                micro_batch = fetched(work)
            self.samples += size
            self._batch = (size, left - 1) if left > 1 else None
            yield micro_batch

    def indices(self, work: _MicroBatch) -> Tensor:
        """The dataset indices of a stretch of the stream."""
        parts = []
        position, left = work
        while left:
            epoch, offset = divmod(position, self._length)
            part = self._order(epoch)[offset : offset + left]
            parts.append(part)
            position, left = position + len(part), left - len(part)
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _order(self, epoch: int) -> Tensor:
        if epoch not in self._orders:
            now = self.epoch
            self._orders = {e: o for e, o in self._orders.items() if e >= now}
            if self.shuffle:
                generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
                order = torch.randperm(self._length, generator=generator)
            else:
                order = torch.arange(self._length)
            self._orders[epoch] = order
        return self._orders[epoch]

    def plan(self) -> Iterator[_MicroBatch]:
        """The micro-batches to come if the batch size stays as it is; endless."""
        position, batch = self.samples, self._batch
        while True:
            size, count = batch or self.controller.micro_batches()
            batch = None
            for _ in range(count):
                yield _MicroBatch(position, size)
                position += size

    def _from_workers(self) -> Callable[[_MicroBatch], Any]:
        """A function that returns the asked-for micro-batch, starting over on a new plan."""
        assert self._workers is not None
        workers = self._workers
        running = iter(workers)

        def get(work: _MicroBatch) -> Any:
            nonlocal running
            planned, micro_batch = next(running)
            if tuple(planned) != work:
                running = iter(workers)  # persistent workers: drops what was fetched ahead
                planned, micro_batch = next(running)
            assert tuple(planned) == work
            return micro_batch

        return get

    def state_dict(self) -> dict[str, Any]:
        """The position in the stream, also inside a batch."""
        return {
            "samples": self.samples,
            "batch": self._batch,
            "seed": self.seed,
            "shuffle": self.shuffle,
            "length": self._length,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes to a saved position.

        Raises:
            ValueError: the state of a loader with another seed, order or dataset length.
        """
        own = {"seed": self.seed, "shuffle": self.shuffle, "length": self._length}
        for name, value in own.items():
            if state[name] != value:
                raise ValueError(
                    f"the loader's state has {name}={state[name]!r}, this loader {value!r}: its "
                    "samples would come in another order"
                )
        self.samples = state["samples"]
        self._batch = tuple(state["batch"]) if state["batch"] is not None else None
        self._orders = {}


class _Plan:
    """The sampler of the worker processes: the planned micro-batches with their indices."""

    def __init__(self, loader: AdaptiveDataLoader) -> None:
        self._loader = loader

    def __iter__(self) -> Iterator[tuple[_MicroBatch, Tensor]]:
        return ((work, self._loader.indices(work)) for work in self._loader.plan())


class _Fetch:
    """From indices to a micro-batch; in a worker, from (work, indices) to (work, micro-batch)."""

    def __init__(
        self, dataset: Dataset[Any], collate_fn: Callable[[list[Any]], Any] | None
    ) -> None:
        self._dataset = dataset
        # Whole tensors are indexed at once: what default_collate would build, much faster.
        self._tensors = type(dataset) is TensorDataset and collate_fn is None
        self._collate = collate_fn if collate_fn is not None else default_collate

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, tuple):
            work, indices = index
            return tuple(work), self[indices]
        if self._tensors:
            return [tensor[index] for tensor in cast(TensorDataset, self._dataset).tensors]
        return self._collate(self._samples(index.tolist()))

    def _samples(self, indices: Sequence[int]) -> list[Any]:
        many = getattr(self._dataset, "__getitems__", None)
        return many(indices) if many is not None else [self._dataset[i] for i in indices]
