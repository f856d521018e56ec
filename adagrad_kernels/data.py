"""AdaptiveDataLoader: serves batches of a size that changes while training."""

from __future__ import annotations

import logging
import math
import operator
import warnings
from collections.abc import Callable, Iterator, Sequence, Sized
from typing import Any, Protocol, cast

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset, default_collate
from torch.utils.data._utils.pin_memory import pin_memory as pin_memory_of

from .batch_size import BatchSizeController
from .distributed import Ranks
from .stream import MicroBatch, SampleStream

logger = logging.getLogger("adagrad_kernels")


class HasController(Protocol):
    """An optimizer of this package."""

    @property
    def controller(self) -> BatchSizeController:
        """What holds the batch size."""
        ...


class AdaptiveDataLoader:
    """Serves the micro-batches of batches whose size the controller may change at each step.

    The samples form one endless stream: a permutation of the dataset for each epoch, one after
    the other. A batch takes the next `controller.batch_size` samples of the stream, as M equal
    micro-batches of at most `max_micro_batch_size`, so that mean losses weigh all samples alike.
    Batches may reach over the end of an epoch, so none is short. One pass of `for` serves the
    batches up to the first batch end at or after the end of the epoch; the next pass goes on
    where the last one left off, also in the middle of a batch. A loaded state goes on at the
    beginning of the batch that was being served when it was saved, since the gradients that had
    been accumulated are not part of any state: save after `opt.step()`. Where the optimizer ends a
    batch before all of it was served (after an error, or `opt.zero_grad()` in place of a step), or
    completes it with samples of the next one (after a micro-batch that was not backpropagated),
    a new batch begins with the next micro-batch.

    Under `torch.distributed` batch sizes are global: of each micro-batch every process is served an
    equal part, and the parts of all processes together are the samples that one process would
    get. So batches become multiples of the number of processes. A state may be loaded on another
    number of processes.

    The order of the samples depends on `seed` (and `weights`) alone, not on batch sizes, workers,
    processes or interruptions; torch's global random numbers are not used. So there is no
    `sampler`, whose order could be neither resumed nor shared: take `weights`, or
    `torch.utils.data.Subset` for a part of the dataset. Workers fetch ahead at the present batch
    size; when it changes, what they fetched at the old one is dropped and fetched anew.

    Args:
        dataset: a map-style dataset with `len`.
        controller: an optimizer of this package, or a `BatchSizeController`. In an optimizer's
            observer room is made for max_micro_batch_size, which compiled models need beforehand.
        max_micro_batch_size: largest micro-batch of one process, by memory; that of all loaders of
            the controller.
        shuffle: a new permutation each epoch, or the dataset's order.
        num_workers: processes that fetch, 0 for none.
        seed: of the permutations, a whole number.
        weights: [len(dataset)], as of `WeightedRandomSampler`: each epoch is len(dataset) draws
            with replacement, sample i in proportion to weights[i] ≥ 0. Statistics and tests are
            those of the distribution that is drawn from.
        collate_fn: joins samples to a micro-batch, torch's by default.
        pin_memory: as in `torch.utils.data.DataLoader`.
        rank: which part of each micro-batch to serve, from 0; by default that of this process
            among those that share the optimizer's steps, or in `torch.distributed`.
        world_size: the number of parts, likewise; given together with rank.

    Attributes:
        samples: samples served so far, to all processes.
        epoch: complete passes over the dataset so far.

    Raises:
        TypeError: an iterable-style dataset, or a seed that is no whole number.
        ValueError: an empty dataset, weights that are no distribution over it or not shuffled,
            max_micro_batch_size < 1, num_workers < 0, a rank outside [0, world_size), or what
            `BatchSizeController.limit_micro_batches` raises.

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
        weights: Tensor | Sequence[float] | None = None,
        collate_fn: Callable[[list[Any]], Any] | None = None,
        pin_memory: bool = False,
        rank: int | None = None,
        world_size: int | None = None,
    ) -> None:
        map_style = hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")
        if isinstance(dataset, IterableDataset) or not map_style:
            raise TypeError(
                f"AdaptiveDataLoader needs a map-style dataset with a length, got "
                f"{type(dataset).__name__}"
            )
        length = len(cast(Sized, dataset))
        if length == 0:
            raise ValueError("the dataset is empty")
        if weights is not None:
            weights = _distribution(weights, length, shuffle)
        try:
            seed = operator.index(seed)
        except TypeError:
            raise TypeError(f"seed must be a whole number, got {seed!r}") from None
        if num_workers < 0:
            raise ValueError(f"num_workers must not be negative, got {num_workers}")
        rank, world_size = _part(rank, world_size, getattr(controller, "ranks", None) or Ranks())
        reserve = getattr(controller, "reserve", None)
        if not isinstance(controller, BatchSizeController):
            controller = _controller_of(controller)
        controller.limit_micro_batches(max_micro_batch_size, world_size)
        if reserve is not None:
            reserve(min(max_micro_batch_size, controller.max_batch_size))
        self.dataset = dataset
        self.controller = controller
        self.num_workers = num_workers
        self._stream = SampleStream(length, controller, shuffle, seed, rank, weights)
        self._end = 0  # samples at the end of the epoch that is being served
        self._fetch = _Fetch(dataset, collate_fn)
        # As torch's loader, which says so itself where there are workers.
        if pin_memory and not torch.accelerator.is_available() and not num_workers:
            warnings.warn("pin_memory=True, but there is no accelerator: ignored", stacklevel=2)
        self._pin_memory = pin_memory and torch.accelerator.is_available()
        self._told = False
        self._workers: DataLoader[Any] | None = None
        if num_workers:
            self._workers = DataLoader(
                cast("Dataset[Any]", self._fetch),
                batch_size=None,
                sampler=_Plan(self._stream),
                num_workers=num_workers,
                persistent_workers=True,
                pin_memory=pin_memory,
                generator=torch.Generator().manual_seed(seed % (1 << 63)),  # not the global one
            )

    @property
    def samples(self) -> int:
        """Samples served so far, to all processes."""
        return self._stream.samples

    @property
    def epoch(self) -> int:
        """Complete passes over the dataset so far."""
        return self._stream.epoch

    @property
    def batch_complete(self) -> bool:
        """Whether the micro-batch that was served last is the last one of its batch."""
        return not self._stream.inside_batch

    @property
    def epoch_complete(self) -> bool:
        """Whether the micro-batch that was served last is the last one of its pass of `for`."""
        return self.batch_complete and self._stream.samples >= self._end

    def __len__(self) -> int:
        """Micro-batches of one epoch at the present batch size."""
        size, count = self.controller.micro_batches()
        return -(-self._stream.length // (size * count)) * count

    def __iter__(self) -> Iterator[Any]:
        """One epoch of micro-batches, from where the stream stands."""
        stream = self._stream
        self._end = end = (stream.epoch + 1) * stream.length
        fetch = self._fetch_here if self._workers is None else _from_workers(self._workers)
        while stream.inside_batch or stream.samples < end:
            if not self._told and self.controller.batch_size > stream.length:
                self._told = True
                logger.warning(
                    "the batch size (%d) exceeds the dataset's %d samples, so that a batch holds "
                    "samples twice: lower max_batch_size",
                    self.controller.batch_size, stream.length,
                )  # fmt: skip
            micro_batch = fetch(stream.next())
            stream.take()
            yield micro_batch

    def _fetch_here(self, work: MicroBatch) -> Any:
        micro_batch = self._fetch[self._stream.indices(work)]
        return pin_memory_of(micro_batch) if self._pin_memory else micro_batch

    def state_dict(self) -> dict[str, Any]:
        """The position in the stream: the next batch, or the beginning of an unfinished one."""
        return self._stream.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes to a saved position.

        Raises:
            ValueError: the state of a loader with another seed, order, dataset length or weights.
        """
        self._stream.load_state_dict(state)


def _from_workers(workers: DataLoader[Any]) -> Callable[[MicroBatch], Any]:
    """A function that returns the asked-for micro-batch, starting over on a new plan."""
    running = iter(workers)

    def get(work: MicroBatch) -> Any:
        nonlocal running
        planned, micro_batch = next(running)
        if tuple(planned) != work:
            running = iter(workers)  # persistent workers: drops what was fetched ahead
            planned, micro_batch = next(running)
        assert tuple(planned) == work
        return micro_batch

    return get


def _controller_of(optimizer: object) -> BatchSizeController:
    controller = getattr(optimizer, "controller", None)
    if not isinstance(controller, BatchSizeController):
        raise TypeError(
            "AdaptiveDataLoader needs an optimizer of this package or a BatchSizeController, got "
            f"{type(optimizer).__name__}"
        )
    return controller


def _distribution(weights: Tensor | Sequence[float], length: int, shuffle: bool) -> Tensor:
    """The weights as a tensor, if samples can be drawn by them."""
    found = torch.as_tensor(weights, dtype=torch.float64, device="cpu")
    if found.shape != (length,):
        raise ValueError(f"weights must have shape [{length}], got {list(found.shape)}")
    if not (found.isfinite().all() and (found >= 0).all() and found.any()):
        raise ValueError("weights must be finite, none negative, and not all zero")
    if not 1e-300 < float(found.sum()) < math.inf:
        raise ValueError(f"weights must have a sum in float64's range, got {float(found.sum())}")
    if not shuffle:
        raise ValueError("weights draw samples at random, which shuffle=False rules out")
    return found


def _part(rank: int | None, world_size: int | None, ranks: Ranks) -> tuple[int, int]:
    """(rank, world_size), inferred where they are not given."""
    if (rank is None) != (world_size is None):
        raise ValueError("give rank and world_size together, or neither")
    if rank is None or world_size is None:
        return ranks.index, ranks.size
    if not 0 <= rank < world_size:
        raise ValueError(f"rank must lie in [0, world_size), got {rank} of {world_size}")
    return rank, world_size


class _Plan:
    """The sampler of the worker processes: the planned micro-batches with their indices.

    It holds the stream, not the loader: in a reference cycle with the worker processes, these
    would be stopped by the garbage collector, which takes seconds a worker.
    """

    def __init__(self, stream: SampleStream) -> None:
        self._stream = stream

    def __iter__(self) -> Iterator[tuple[MicroBatch, Tensor]]:
        return ((work, self._stream.indices(work)) for work in self._stream.plan())


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
