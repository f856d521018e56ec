"""The endless stream of samples that a loader serves, and how far it has come."""

from __future__ import annotations

import logging
import zlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .batch_size import BatchSizeController

logger = logging.getLogger("adagrad_kernels")


class MicroBatch(NamedTuple):
    """A stretch of the stream, which the processes share in equal parts."""

    start: int
    size: int


class SampleStream:
    """A permutation of the dataset for each epoch, one after the other, cut into micro-batches.

    The order depends on seed and length alone. Of every micro-batch each process takes its part,
    one after another in the order of their ranks. It knows nothing of loaders, so that a loader's
    worker processes can hold it without holding the loader.

    Args:
        length: samples of the dataset.
        controller: says how large the batches are.
        shuffle: a new permutation each epoch, or the dataset's order.
        seed: of the permutations.
        rank: which of the controller's processes this is.
        weights: an epoch is then as many draws with replacement, sample i in proportion to
            weights[i].

    Attributes:
        samples: samples taken so far, by all processes.
    """

    def __init__(
        self,
        length: int,
        controller: BatchSizeController,
        shuffle: bool,
        seed: int,
        rank: int = 0,
        weights: Tensor | None = None,
    ) -> None:
        self.length = length
        self.controller = controller
        self.shuffle = shuffle
        self.seed = seed
        self.rank = rank
        self._up_to = None if weights is None else weights.double().cumsum(0)
        self.samples = 0
        self._batch: tuple[int, int] | None = None  # (m, micro-batches left) inside a batch
        self._begun = 0  # batches that the controller had ended when it began
        self._batch_start = 0  # where the batch that was served last begins
        self._orders: dict[int, Tensor] = {}

    @property
    def epoch(self) -> int:
        """Complete passes over the dataset so far."""
        return self.samples // self.length

    @property
    def inside_batch(self) -> bool:
        """Whether a batch has been taken in part, and the optimizer has not ended it before."""
        return self._batch is not None and self._begun == self.controller.ended

    def next(self) -> MicroBatch:
        """The micro-batch that comes next; `take` goes past it."""
        if self._batch is None or not self.inside_batch:
            self._batch = self.controller.micro_batches()
            self._batch_start, self._begun = self.samples, self.controller.ended
        return MicroBatch(self.samples, self._batch[0])

    def take(self) -> None:
        """Goes past the next micro-batch."""
        size = self.next().size
        assert self._batch is not None
        left = self._batch[1] - 1
        self.samples += size
        self._batch = (size, left) if left else None

    def plan(self) -> Iterator[MicroBatch]:
        """The micro-batches to come if the batch size stays as it is; endless."""
        position, batch = self.samples, self._batch if self.inside_batch else None
        while True:
            size, count = batch or self.controller.micro_batches()
            batch = None
            for _ in range(count):
                yield MicroBatch(position, size)
                position += size

    def indices(self, work: MicroBatch) -> Tensor:
        """The dataset indices of this process's part of a stretch of the stream."""
        parts = []
        left = work.size // self.controller.processes
        position = work.start + self.rank * left
        while left:
            epoch, offset = divmod(position, self.length)
            part = self._order(epoch)[offset : offset + left]
            parts.append(part)
            position, left = position + len(part), left - len(part)
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _order(self, epoch: int) -> Tensor:
        if epoch not in self._orders:
            now = self.epoch
            self._orders = {e: o for e, o in self._orders.items() if e >= now}
            seed = (self.seed * 1_000_003 + epoch) % (1 << 63)
            generator = torch.Generator().manual_seed(seed)
            if self._up_to is not None:
                drawn = torch.rand(self.length, generator=generator, dtype=torch.float64)
                order = torch.searchsorted(self._up_to, drawn * self._up_to[-1], right=True)
            elif self.shuffle:
                order = torch.randperm(self.length, generator=generator)
            else:
                order = torch.arange(self.length)
            self._orders[epoch] = order
        return self._orders[epoch]

    @property
    def weights(self) -> int | None:
        """A checksum of the weights, None without any."""
        return None if self._up_to is None else zlib.crc32(self._up_to.numpy().tobytes())

    def state_dict(self) -> dict[str, Any]:
        """The position: the next batch, or the beginning of an unfinished one."""
        return {
            "samples": self._batch_start if self.inside_batch else self.samples,
            "seed": self.seed,
            "shuffle": self.shuffle,
            "length": self.length,
            "weights": self.weights,
            "processes": self.controller.processes,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes to a saved position.

        Raises:
            ValueError: the state of a stream with another seed, order or length, or other weights.
        """
        for name in ("seed", "shuffle", "length", "weights"):
            own, theirs = getattr(self, name), state.get(name)
            if theirs != own:
                raise ValueError(
                    f"the loader's state has {name}={theirs!r}, this loader {own!r}: its "
                    "samples would come in another order"
                )
        before, now = state.get("processes", 1), self.controller.processes
        if before != now:
            logger.warning(
                "resumed on another number of processes, %d instead of %d: the samples keep their "
                "order, batch sizes become multiples of %d",
                now,
                before,
                now,
            )
        self.samples = state["samples"]
        self._batch = None
        self._orders = {}
