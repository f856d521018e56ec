"""What trains: the optimizers and tests that the command line can name, each in one table."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, cast

import torch
from torch import nn

from .. import (
    AdAdaGrad,
    AdAdaGradNorm,
    AugmentedInnerProductTest,
    BatchSizeController,
    CoordinateNormTest,
    InnerProductTest,
    NormTest,
)
from ..criteria import Criterion, Decision
from ..statistics import GradientStatistics
from .errors import UsageError
from .settings import TrainingRun


class Trainer(Protocol):
    """An optimizer that knows its batch size, adaptive or fixed."""

    controller: BatchSizeController
    param_groups: list[dict[str, Any]]
    updated: bool
    statistics: GradientStatistics | None
    decision: Decision | None

    def step(self) -> Any:
        """Ends a micro-batch."""

    def zero_grad(self) -> None:
        """Ends a micro-batch."""

    def state_dict(self) -> dict[str, Any]:
        """Everything that a resumed run needs."""
        ...

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores `state_dict()`."""


class FixedBatch:
    """A torch optimizer with a fixed batch size: plain layers, plain backward pass, no statistics.

    Micro-batches are accumulated to the mean, as the adaptive optimizers do.
    """

    statistics: GradientStatistics | None = None
    decision: Decision | None = None

    def __init__(self, optimizer: torch.optim.Optimizer, batch_size: int) -> None:
        self.optimizer = optimizer
        self.controller = BatchSizeController(batch_size, batch_size)
        self.param_groups = optimizer.param_groups
        self.updated = False
        self._micro_batches = 0

    def step(self) -> None:
        """Updates when the batch is complete."""
        self._micro_batches += 1
        count = self.controller.micro_batches()[1]
        self.updated = self._micro_batches == count
        if not self.updated:
            return
        if count > 1:
            grads = [p.grad for group in self.param_groups for p in group["params"]]
            torch._foreach_mul_(grads, 1 / count)
        self.optimizer.step()
        self.controller.advance(None)
        self._micro_batches = 0

    def zero_grad(self) -> None:
        """Does nothing while a batch is being accumulated."""
        if self._micro_batches == 0:
            self.optimizer.zero_grad()

    def state_dict(self) -> dict[str, Any]:
        """The state of both parts."""
        return {
            "optimizer": self.optimizer.state_dict(),
            "controller": self.controller.state_dict(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores `state_dict()`."""
        self.optimizer.load_state_dict(state_dict["optimizer"])
        self.controller.load_state_dict(state_dict["controller"])
        self.param_groups = self.optimizer.param_groups
        self._micro_batches = 0


CRITERIA: dict[str, Callable[[TrainingRun], Criterion]] = {
    "norm": lambda settings: NormTest(settings.eta),
    "inner": lambda settings: InnerProductTest(settings.theta),
    "augmented": lambda settings: AugmentedInnerProductTest(settings.theta, settings.nu),
    "coordinate": lambda settings: CoordinateNormTest(settings.eta, settings.coordinates),
}
"""The tests by their name on the command line."""

_ADAPTIVE: dict[str, Callable[..., Any]] = {
    "adadagrad": AdAdaGrad,
    "adadagradnorm": AdAdaGradNorm,
}
_FIXED: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "adagrad": torch.optim.Adagrad,
    "sgd": torch.optim.SGD,
}
OPTIMIZERS = (*_ADAPTIVE, *_FIXED)
"""The optimizers by their name on the command line."""


def build(settings: TrainingRun, model: nn.Module) -> Trainer:
    """The optimizer of a run.

    Raises:
        UsageError: settings that it does not accept.
    """
    name = settings.optimizer
    if name not in OPTIMIZERS:
        raise UsageError(f"unknown optimizer {name!r}; there are {', '.join(OPTIMIZERS)}")
    if settings.criterion not in CRITERIA:
        raise UsageError(f"unknown test {settings.criterion!r}; there are {', '.join(CRITERIA)}")
    try:
        if name in _FIXED:
            optimizer = _FIXED[name](model.parameters(), lr=settings.lr)
            return cast(Trainer, FixedBatch(optimizer, settings.batch_size))
        return _ADAPTIVE[name](
            model,
            lr=settings.lr,
            criterion=CRITERIA[settings.criterion](settings),
            batch_size=settings.batch_size,
            max_batch_size=settings.max_batch_size,
        )
    except (ValueError, TypeError) as error:
        raise UsageError(str(error)) from error
