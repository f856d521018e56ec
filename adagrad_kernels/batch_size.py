"""From suggestions to the next batch size: cap, growth limit, rounding, interval, hysteresis."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from typing import Any

from .criteria import Decision
from .lr_policy import LRPolicy
from .micro_batches import check_divides, divide
from .statistics import GradientStatistics

logger = logging.getLogger("adagrad_kernels")


class BatchSizeController:
    """Holds the global batch size and changes it as the tests suggest; by default it only grows.

    After a failed test with suggestion b⁺ the next batch has
    min(max_batch_size, ⌈growth_limit · b⌉, b⁺) samples, at least as many as before, rounded up to
    what can be served: a multiple of `multiple_of`, and, once a loader has set that, equal
    micro-batches of at most `max_micro_batch_size` samples on each of `processes` processes.
    (Rounded down where rounding up would pass the cap.) With `sizes` it is rounded up to the next
    of these instead.

    Args:
        batch_size: b₀ ≥ 1, the first global batch. From 1 it cannot grow (one sample has no
            variance).
        max_batch_size: the cap, ≥ batch_size.
        growth_limit: largest factor of one change, > 1, before rounding up; None for no limit.
        multiple_of: batches are multiples of this; batch_size itself must be one.
        sizes: the only batch sizes that there are, batch_size among them; the largest is the cap.
            A size that one micro-batch can hold is one; each larger one must divide into equal
            micro-batches on all processes. So there are at most as many micro-batch shapes as
            sizes, and compiled models as many graphs: what static shapes (CUDA graphs,
            `torch.compile(dynamic=False)`) need. Multiples of the largest micro-batch share one
            shape: [8, 64, 512, 4096, 32768] has 3 with micro-batches of at most 512.
        every: test every so many steps; the first step is tested.
        smoothing: weight in [0, 1) of the past in an exponential average of the suggestions;
            0, the default, takes each as it is.
        patience: hysteresis: change after so many consecutive tests that all ask for it, by the
            smallest of their suggestions; 1, the default, follows each test.
        monotone: whether batches never shrink. False follows criteria that suggest fewer samples
            (`CABS`).
        min_batch_size: floor if monotone is False; 2 keeps the variance defined.
        lr_policy: factor on the optimizer's learning rate as the batch grows, see `LRPolicy`:
            None, "sqrt", "linear", "adascale" or "adascale_sqrt".

    Attributes:
        batch_size: samples of the next batch.
        max_batch_size: the cap.
        initial_batch_size: b₀, as it was served.
        max_micro_batch_size: largest micro-batch of one process, or None; set by the loader.
        processes: how many share a batch; set by the loader.
        samples: samples of all finished steps.
        steps: finished steps.
        ended: batches that an optimizer has finished or left out; loaders then begin a new one,
            also if they have not served all of the last one.

    Raises:
        ValueError: for arguments out of range.

    Example:
        >>> controller = BatchSizeController(8, max_batch_size=100, multiple_of=4)
        >>> controller.advance(Decision(passed=False, batch_size=21, ratio=21 / 8))
        24
        >>> controller.advance(Decision(passed=True, batch_size=24, ratio=0.9))
        24
        >>> controller = BatchSizeController(8, max_batch_size=4096, sizes=[8, 64, 512, 4096])
        >>> controller.advance(Decision(passed=False, batch_size=65, ratio=65 / 8))
        512
    """

    def __init__(
        self,
        batch_size: int,
        max_batch_size: int,
        growth_limit: float | None = None,
        multiple_of: int = 1,
        sizes: Sequence[int] | None = None,
        every: int = 1,
        smoothing: float = 0.0,
        patience: int = 1,
        monotone: bool = True,
        min_batch_size: int = 2,
        lr_policy: str | None = None,
    ) -> None:
        self.batch_size = _count("batch_size", batch_size)
        self.max_batch_size = _count("max_batch_size", max_batch_size)
        if self.max_batch_size < self.batch_size:
            raise ValueError(
                f"max_batch_size ({max_batch_size}) is smaller than batch_size ({batch_size})"
            )
        if growth_limit is not None and not growth_limit > 1:
            raise ValueError(f"growth_limit must be greater than 1, got {growth_limit}")
        self.multiple_of = _count("multiple_of", multiple_of)
        if self.batch_size % self.multiple_of:
            raise ValueError(
                f"batch_size ({batch_size}) must be a multiple of multiple_of ({multiple_of})"
            )
        self.sizes = None if sizes is None else self._checked(sizes)
        if not 0 <= smoothing < 1:
            raise ValueError(f"smoothing must lie in [0, 1), got {smoothing}")
        self.growth_limit = None if growth_limit == math.inf else growth_limit
        self.every = _count("every", every)
        self.smoothing = smoothing
        self.patience = _count("patience", patience)
        self.monotone = monotone
        self.min_batch_size = _count("min_batch_size", min_batch_size)
        self.lr_policy = LRPolicy(lr_policy)
        self.initial_batch_size = self.batch_size
        self.max_micro_batch_size: int | None = None
        self.processes = 1
        self.steps = 0
        self.samples = 0
        self.ended = 0
        self._average: float | None = None
        self._waiting: list[int] = []  # suggestions that agree and have not been followed yet

    @property
    def due(self) -> bool:
        """Whether the step now being finished is to be tested."""
        return self.steps % self.every == 0

    @property
    def lr_factor(self) -> float:
        """The learning rate policy's factor for the present batch size."""
        return self.lr_policy.factor(self.batch_size / self.initial_batch_size)

    def advance(
        self,
        decision: Decision | None,
        statistics: GradientStatistics | None = None,
        samples: int | None = None,
    ) -> int:
        """Ends a step; returns the next batch size.

        Args:
            decision: of the step's test, None if it was not tested.
            statistics: of the step, if it was tested, for the learning rate policy.
            samples: of the step; the present batch size by default.
        """
        self.steps += 1
        self.samples += self.batch_size if samples is None else samples
        if statistics is not None:
            self.lr_policy.record(statistics, self.initial_batch_size)
        if decision is None or not decision.tested:
            return self.batch_size
        keep = decision.passed and (self.monotone or decision.batch_size > self.batch_size)
        suggestion = self._smooth(self.batch_size if keep else decision.batch_size)
        suggestion = self._agreed(suggestion)
        if suggestion > self.batch_size:
            self.batch_size = max(self.batch_size, self._servable(self._limited(suggestion)))
        elif suggestion < self.batch_size and not self.monotone:
            self.batch_size = min(self.batch_size, self._servable(self._limited(suggestion)))
        return self.batch_size

    def micro_batches(self) -> tuple[int, int]:
        """(m, M): the current batch as M equal micro-batches of m samples, of all processes."""
        split = self._split(self.batch_size)
        assert split is not None  # every batch size was made servable
        return split

    def limit_micro_batches(self, max_micro_batch_size: int, processes: int = 1) -> None:
        """Called by a loader: from now on batches divide into equal micro-batches.

        Args:
            max_micro_batch_size: the largest that one process takes at a time.
            processes: how many processes share a batch, in equal parts.

        Raises:
            ValueError: micro-batches smaller than `multiple_of`, a cap below one sample for
                each process, or one of `sizes` that does not divide into such micro-batches.
        """
        limit = _count("max_micro_batch_size", max_micro_batch_size)
        multiple = math.lcm(self.multiple_of, _count("processes", processes))
        if limit * processes < multiple:
            raise ValueError(
                f"max_micro_batch_size ({max_micro_batch_size}) is smaller than multiple_of "
                f"({self.multiple_of})"
            )
        if self.max_batch_size < multiple:
            raise ValueError(
                f"max_batch_size ({self.max_batch_size}) is smaller than one sample for each of "
                f"{processes} processes"
                + (f" in multiples of {self.multiple_of}" if self.multiple_of > 1 else "")
            )
        for size in self.sizes or ():
            check_divides(size, limit, processes, self.multiple_of)
        if self.max_micro_batch_size is not None and self.max_micro_batch_size != limit:
            logger.warning(
                "micro-batches of at most %d samples, for all loaders of this optimizer; an "
                "earlier one allowed %d. To evaluate, take a torch.utils.data.DataLoader",
                limit, self.max_micro_batch_size,
            )  # fmt: skip
        self.max_micro_batch_size, self.processes = limit, processes
        self.batch_size = self._servable(self.batch_size)
        if not self.steps:
            self.initial_batch_size = self.batch_size

    def _checked(self, sizes: Sequence[int]) -> tuple[int, ...]:
        """The sizes in increasing order; the largest becomes the cap."""
        found = tuple(sorted({_count("sizes", size) for size in sizes}))
        if self.batch_size not in found:
            raise ValueError(f"batch_size ({self.batch_size}) must be one of sizes, got {sizes}")
        if found[-1] > self.max_batch_size:
            raise ValueError(
                f"the largest of sizes ({found[-1]}) is larger than max_batch_size "
                f"({self.max_batch_size})"
            )
        if odd := [size for size in found if size % self.multiple_of]:
            raise ValueError(
                f"sizes must be multiples of multiple_of ({self.multiple_of}), got {odd[0]}"
            )
        self.max_batch_size = found[-1]
        return found

    def _smooth(self, suggestion: int) -> int:
        if not self.smoothing:
            return suggestion
        value = float(min(suggestion, self.max_batch_size))
        past = self._average if self._average is not None else float(self.batch_size)
        self._average = past + (1 - self.smoothing) * (value - past)  # exact if they are equal
        return math.ceil(self._average)

    def _agreed(self, suggestion: int) -> int:
        """The mildest of the last `patience` suggestions if all are on one side, otherwise b."""
        b = self.batch_size
        if suggestion == b or any((s > b) != (suggestion > b) for s in self._waiting):
            self._waiting = []
        if suggestion == b:
            return b
        self._waiting.append(suggestion)
        if len(self._waiting) < self.patience:
            return b
        agreed = min(self._waiting) if suggestion > b else max(self._waiting)
        self._waiting = []
        return agreed

    def _limited(self, suggestion: int) -> int:
        b, limit = self.batch_size, self.growth_limit
        most, least = self.max_batch_size, min(b, self.min_batch_size)
        if limit is not None:
            rounding = 1e-12 * b  # 1.1 · 100 is 110.00…01
            grown = max(math.ceil(limit * b - rounding), b + 1)
            shrunk = math.floor(b / limit + rounding)
            most, least = min(most, grown), max(least, shrunk)
        return max(b if self.monotone else least, min(suggestion, most))

    @property
    def _multiple(self) -> int:
        return math.lcm(self.multiple_of, self.processes)

    def _split(self, batch_size: int) -> tuple[int, int] | None:
        limit = self.max_micro_batch_size
        limit = None if limit is None else limit * self.processes
        return divide(batch_size, limit, self._multiple)

    def _servable(self, target: int) -> int:
        """The least size from target on that divides into micro-batches, the next below the cap."""
        if self.sizes is not None:
            return next((size for size in self.sizes if size >= target), self.sizes[-1])
        multiple = self._multiple
        first = -(-target // multiple) * multiple
        for size in range(first, self.max_batch_size + 1, multiple):
            if self._split(size):
                return size
        size = min(first, self.max_batch_size // multiple * multiple)
        while not self._split(size):
            size -= multiple
        return size

    def state_dict(self) -> dict[str, Any]:
        """Everything that a resumed run needs."""
        return {
            "batch_size": self.batch_size,
            "initial_batch_size": self.initial_batch_size,
            "steps": self.steps,
            "samples": self.samples,
            "average": self._average,
            "waiting": list(self._waiting),
            "lr_policy": self.lr_policy.state_dict(),
        }

    def check_state_dict(self, state: dict[str, Any]) -> None:
        """Raises ValueError if `load_state_dict` would."""
        if state["batch_size"] > self.max_batch_size:
            raise ValueError(
                f"the saved batch size {state['batch_size']} is larger than max_batch_size "
                f"({self.max_batch_size})"
            )

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores `state_dict()`; the cap and options stay those of this object.

        Raises:
            ValueError: if the saved batch size is larger than this controller's cap.
        """
        self.check_state_dict(state)
        self.batch_size = self._servable(state["batch_size"])
        self.initial_batch_size = state["initial_batch_size"]
        self.steps = state["steps"]
        self.samples = state["samples"]
        self._average = state["average"]
        self._waiting = list(state["waiting"])
        self.lr_policy.load_state_dict(state["lr_policy"])


def _count(name: str, value: float) -> int:
    """The value as an integer of at least 1."""
    if not math.isfinite(value) or value != int(value):
        raise ValueError(f"{name} must be a whole number, got {value}")
    if value < 1:
        raise ValueError(f"{name} must be at least 1, got {value}")
    return int(value)
