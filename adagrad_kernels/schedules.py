"""Learning rate schedules that count samples, since steps no longer mean the same work.

Each is a torch `LRScheduler` of an optimizer of this package. Call its `step()` after every
`opt.step()`; while a batch is being accumulated nothing changes. An `lr_policy` multiplies what
these set.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from .optim.cycled import Cycled


class SampleSchedule(LRScheduler):
    """Base class: lr = initial lr · factor(samples of all updates so far).

    Subclasses implement `factor`.

    Args:
        optimizer: an optimizer of this package.

    Raises:
        TypeError: any other optimizer, since it counts no samples.

    Example:
        >>> class HalfAfter100(SampleSchedule):
        ...     def factor(self, samples):
        ...         return 0.5 if samples >= 100 else 1.0
        >>> opt = AdAdaGrad(nn.Linear(4, 1), lr=0.1, batch_size=8)
        >>> HalfAfter100(opt).factor(200)
        0.5
    """

    def __init__(self, optimizer: Cycled) -> None:
        if not isinstance(optimizer, Cycled):
            raise TypeError(
                f"{type(self).__name__} needs an optimizer of this package, got "
                f"{type(optimizer).__name__}, which does not count samples"
            )
        self._adaptive = optimizer
        inner = getattr(optimizer, "optimizer", optimizer)  # AdaptiveBatch's
        assert isinstance(inner, Optimizer)
        super().__init__(inner)

    def factor(self, samples: int) -> float:
        """The factor on the initial learning rates after so many samples."""
        raise NotImplementedError

    def get_lr(self) -> list[Any]:
        """The learning rate of each param group."""
        factor = self.factor(self._adaptive.samples)
        return [lr * factor for lr in self.base_lrs]

    def state_dict(self) -> dict[str, Any]:
        """As in torch; the samples are counted by the optimizer."""
        return {key: value for key, value in super().state_dict().items() if key != "_adaptive"}


class _Decay(SampleSchedule):
    def __init__(
        self, optimizer: Cycled, total: int, warmup: int = 0, final_factor: float = 0.0
    ) -> None:
        name = type(self).__name__
        if not 0 <= warmup < total:
            raise ValueError(
                f"{name}: warmup must lie in [0, total), got warmup={warmup}, total={total}"
            )
        if not final_factor >= 0:
            raise ValueError(f"{name}: final_factor must not be negative, got {final_factor}")
        self.total, self.warmup, self.final_factor = total, warmup, final_factor
        super().__init__(optimizer)

    def factor(self, samples: int) -> float:
        """Warm-up, decay, then constant."""
        if samples < self.warmup:
            return samples / self.warmup
        progress = min((samples - self.warmup) / (self.total - self.warmup), 1.0)
        return self.final_factor + (1 - self.final_factor) * self._shape(progress)

    def _shape(self, progress: float) -> float:
        raise NotImplementedError


class CosineDecay(_Decay):
    """Linear warm-up, then half a cosine down to final_factor.

        s/warmup,  then  f + (1 − f)(1 + cos πt)/2  with t = (s − warmup)/(total − warmup) ≤ 1

    With a warm-up the very first update has learning rate 0, as in the formula.

    Args:
        optimizer: an optimizer of this package.
        total: samples at the end of the decay.
        warmup: samples of the warm-up, less than total.
        final_factor: f, the part of the initial learning rate that remains.

    Raises:
        ValueError: warmup outside [0, total), a negative final_factor.

    Example:
        >>> opt = AdAdaGrad(nn.Linear(4, 1), lr=0.1, batch_size=8)
        >>> schedule = CosineDecay(opt, total=1000)
        >>> schedule.factor(500), schedule.factor(2000)
        (0.5, 0.0)
    """

    def _shape(self, progress: float) -> float:
        return (1 + math.cos(math.pi * progress)) / 2


class LinearDecay(_Decay):
    """Linear warm-up, then a straight line down to final_factor; arguments of `CosineDecay`.

    Example:
        >>> opt = AdAdaGrad(nn.Linear(4, 1), lr=0.1, batch_size=8)
        >>> schedule = LinearDecay(opt, total=1000, warmup=200, final_factor=0.5)
        >>> schedule.factor(100), schedule.factor(600), schedule.factor(1000)
        (0.5, 0.75, 0.5)
    """

    def _shape(self, progress: float) -> float:
        return 1 - progress


class StepDecay(SampleSchedule):
    """The learning rate times gamma at each milestone.

    Args:
        optimizer: an optimizer of this package.
        milestones: numbers of samples, in increasing order.
        gamma: factor at each.

    Raises:
        ValueError: milestones that do not increase.

    Example:
        >>> opt = AdAdaGrad(nn.Linear(4, 1), lr=0.1, batch_size=8)
        >>> schedule = StepDecay(opt, milestones=[100, 200], gamma=0.5)
        >>> schedule.factor(99), schedule.factor(100), schedule.factor(200)
        (1.0, 0.5, 0.25)
    """

    def __init__(self, optimizer: Cycled, milestones: Sequence[int], gamma: float = 0.1) -> None:
        if any(a >= b for a, b in pairwise(milestones)):
            raise ValueError(f"StepDecay: milestones must increase, got {list(milestones)}")
        self.milestones, self.gamma = list(milestones), gamma
        super().__init__(optimizer)

    def factor(self, samples: int) -> float:
        """Gamma to the number of milestones passed."""
        return float(self.gamma ** sum(samples >= milestone for milestone in self.milestones))
