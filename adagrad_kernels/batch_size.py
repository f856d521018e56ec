"""From suggestions to the next batch size: cap, growth limit, rounding, interval, smoothing."""

from __future__ import annotations

import math
from typing import Any

from .criteria import UNBOUNDED, Decision


class BatchSizeController:
    """Holds the global batch size and grows it as the tests suggest. It never shrinks.

    After a failed test with suggestion b⁺ the next batch has
    min(max_batch_size, growth_limit · b, b⁺) samples, at least as many as before, rounded up to
    what can be served: a multiple of `multiple_of`, and equal micro-batches of at most
    `max_micro_batch_size` samples once a loader has set that. (Rounded down where rounding up
    would pass the cap.)

    Args:
        batch_size: b₀ ≥ 1, the first global batch. From 1 it cannot grow (one sample has no
            variance).
        max_batch_size: the cap, ≥ batch_size.
        growth_limit: largest factor of one growth step, > 1; None for no limit.
        multiple_of: batches are multiples of this; batch_size itself must be one.
        every: test every so many steps; the first step is tested.
        smoothing: weight in [0, 1) of the past in an exponential average of the suggestions;
            0, the default, takes each as it is.

    Attributes:
        batch_size: samples of the next batch.
        max_micro_batch_size: largest micro-batch, or None; set by the loader.

    Raises:
        ValueError: for arguments out of range.
    """

    def __init__(
        self,
        batch_size: int,
        max_batch_size: int,
        growth_limit: float | None = None,
        multiple_of: int = 1,
        every: int = 1,
        smoothing: float = 0.0,
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        if max_batch_size < batch_size:
            raise ValueError(
                f"max_batch_size ({max_batch_size}) is smaller than batch_size ({batch_size})"
            )
        if growth_limit is not None and not growth_limit > 1:
            raise ValueError(f"growth_limit must be greater than 1, got {growth_limit}")
        if multiple_of < 1 or batch_size % multiple_of:
            raise ValueError(
                f"batch_size ({batch_size}) must be a multiple of multiple_of ({multiple_of})"
            )
        if every < 1:
            raise ValueError(f"every must be at least 1, got {every}")
        if not 0 <= smoothing < 1:
            raise ValueError(f"smoothing must lie in [0, 1), got {smoothing}")
        self.batch_size = int(batch_size)
        self.max_batch_size = int(max_batch_size)
        self.growth_limit = growth_limit
        self.multiple_of = multiple_of
        self.every = every
        self.smoothing = smoothing
        self.max_micro_batch_size: int | None = None
        self.steps = 0
        self._average: float | None = None

    @property
    def due(self) -> bool:
        """Whether the step now being finished is to be tested."""
        return self.steps % self.every == 0

    def advance(self, decision: Decision | None) -> int:
        """Ends a step, with the decision of its test if it was tested; returns the next size."""
        self.steps += 1
        if decision is None or not decision.tested:
            return self.batch_size
        suggestion = self._smooth(decision.batch_size)
        if suggestion > self.batch_size:
            if self.growth_limit is not None:
                suggestion = min(suggestion, math.floor(self.growth_limit * self.batch_size))
            target = max(self.batch_size, min(suggestion, self.max_batch_size))
            self.batch_size = max(self.batch_size, self._servable(target))
        return self.batch_size

    def micro_batches(self) -> tuple[int, int]:
        """(m, M): the current batch as M equal micro-batches of m samples."""
        return _split(self.batch_size, self.max_micro_batch_size, self.multiple_of, None)

    def limit_micro_batches(self, max_micro_batch_size: int) -> None:
        """Called by a loader: from now on batches divide into equal micro-batches of this size."""
        if max_micro_batch_size < 1:
            raise ValueError(f"max_micro_batch_size must be at least 1, got {max_micro_batch_size}")
        if max_micro_batch_size < self.multiple_of:
            raise ValueError(
                f"max_micro_batch_size ({max_micro_batch_size}) is smaller than multiple_of "
                f"({self.multiple_of})"
            )
        self.max_micro_batch_size = max_micro_batch_size
        self.batch_size = self._servable(self.batch_size)

    def _smooth(self, suggestion: int) -> int:
        if not self.smoothing:
            return suggestion
        value = float(min(suggestion, self.max_batch_size))
        past = self._average if self._average is not None else float(self.batch_size)
        self._average = self.smoothing * past + (1 - self.smoothing) * value
        return min(math.ceil(self._average), UNBOUNDED)

    def _servable(self, target: int) -> int:
        size, count = _split(
            target, self.max_micro_batch_size, self.multiple_of, self.max_batch_size
        )
        return size * count

    def state_dict(self) -> dict[str, Any]:
        """Everything that a resumed run needs."""
        return {
            "batch_size": self.batch_size,
            "max_batch_size": self.max_batch_size,
            "max_micro_batch_size": self.max_micro_batch_size,
            "steps": self.steps,
            "average": self._average,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores `state_dict()`; the cap and options stay those of this object.

        Raises:
            ValueError: if the saved batch size is larger than this controller's cap.
        """
        if state["batch_size"] > self.max_batch_size:
            raise ValueError(
                f"the saved batch size {state['batch_size']} is larger than max_batch_size "
                f"({self.max_batch_size})"
            )
        self.batch_size = state["batch_size"]
        self.steps = state["steps"]
        self._average = state["average"]
        if self.max_micro_batch_size is not None:
            self.batch_size = self._servable(self.batch_size)


def _split(target: int, limit: int | None, multiple: int, cap: int | None) -> tuple[int, int]:
    """(m, M) with m ≤ limit, m a multiple, and m·M the least total ≥ target and ≤ cap.

    A few counts beyond the least are tried: 60000 is 120 micro-batches of 500, but 118 of at
    most 512 cannot give it. Where every total passes the cap, the largest below it is taken.
    """
    limit = target if limit is None else min(limit, target)
    largest = max(limit // multiple * multiple, multiple)
    least = math.ceil(target / largest)
    best: tuple[int, int] | None = None
    for count in range(least, least + least // 4 + 2):
        size = math.ceil(target / count / multiple) * multiple
        if cap is not None and size * count > cap:
            continue
        if best is None or size * count < best[0] * best[1]:
            best = size, count
    if best is None:
        size = target // least // multiple * multiple
        best = (size, least) if size else (multiple, max(1, target // multiple))
    return best
