"""The loop that all optimizers here share: micro-batches → batch → test → next batch size."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from ..batch_size import BatchSizeController
from ..criteria import Criterion, Decision
from ..observer import observe
from ..statistics import GradientStatistics

logger = logging.getLogger("adagrad_kernels")


class BatchCycle:
    """Counts samples until the batch is complete, then tests it and sets the next batch size.

    Args:
        model: observed from now on.
        criterion: the test.
        batch_size: first global batch size.
        max_batch_size: its cap.
        options: further arguments of `BatchSizeController`.
    """

    def __init__(
        self,
        model: nn.Module,
        criterion: Criterion,
        batch_size: int,
        max_batch_size: int,
        **options: Any,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(
                f"expected the model (an nn.Module), got {type(model).__name__}: the optimizer "
                "observes the model's layers, parameters alone do not do"
            )
        self.controller = BatchSizeController(batch_size, max_batch_size, **options)
        self.criterion = criterion
        self.observer = observe(
            model,
            coordinates="coordinates" in criterion.needs,
            inner_products="inner_products" in criterion.needs,
        )
        self.statistics: GradientStatistics | None = None
        self.decision: Decision | None = None
        self.updated = False
        self._counted = 0
        self._zeroed = True
        self._last_grad: weakref.ref[Tensor] | None = None
        if batch_size == 1 < max_batch_size:
            logger.warning("batch_size=1 never grows: one sample has no variance; start from 2")

    def complete(self) -> bool:
        """Called by step(): counts what was backpropagated; True when the batch is complete."""
        observer = self.observer
        self.updated = False
        if observer.micro_batches == self._counted:
            raise RuntimeError(
                "step() without statistics: no backward pass has reached an observed layer since "
                "the last step()"
            )
        if self._counted == 0:
            self._check_zeroed()
        self._counted = observer.micro_batches
        rows = observer.rows()
        total = sum(rows)
        if len(rows) > 1 and rows[-1] != rows[0]:
            raise RuntimeError(
                f"micro-batches of {rows[0]} and {rows[-1]} samples in one batch of "
                f"{self.controller.batch_size}: with mean losses their samples would have "
                "different weights. Use AdaptiveDataLoader, or drop_last=True"
            )
        return total >= self.controller.batch_size

    @property
    def gradient_scale(self) -> float:
        """1/M: the mean over the M micro-batches of the batch."""
        return 1.0 / self._counted

    def measure(self, grad_norm_sq: Tensor | None = None) -> None:
        """Statistics and decision of the complete batch, if its step is to be tested.

        Args:
            grad_norm_sq: ‖ḡ‖² where the update has computed it; otherwise read from `.grad`.
        """
        if not self.controller.due:
            return
        self.statistics = self.observer.statistics(grad_norm_sq, self.gradient_scale)
        self.decision = self.criterion.evaluate(self.statistics)
        if not self.decision.tested and self.statistics.batch_size > 1:
            size, reason = self.controller.batch_size, self.decision.reason
            logger.warning("the batch size stays at %d: %s", size, reason)

    def advance(self) -> None:
        """Ends the batch: sets the next batch size and starts counting anew."""
        controller = self.controller
        controller.advance(self.decision if controller.due else None)
        self.observer.reset()
        self._counted = 0
        self._zeroed = False
        grad = self._some_grad()
        self._last_grad = weakref.ref(grad) if grad is not None else None
        self.updated = True

    def may_zero(self) -> bool:
        """Called by zero_grad(): False while a batch is being accumulated."""
        if self._counted:
            return False
        self._zeroed = True
        return True

    def _some_grad(self) -> Tensor | None:
        return next((p.grad for _, p in self.observer.parameters() if p.grad is not None), None)

    def _check_zeroed(self) -> None:
        last = self._last_grad() if self._last_grad is not None else None
        if not self._zeroed and last is not None and self._some_grad() is last:
            raise RuntimeError(
                "the gradients still hold the last batch: call opt.zero_grad() after opt.step()"
            )

    def state_dict(self) -> dict[str, Any]:
        """The controller's state."""
        return {"controller": self.controller.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores `state_dict()`; what had been accumulated is forgotten."""
        self.controller.load_state_dict(state["controller"])
        self.observer.reset()
        self._counted = 0
        self._zeroed = True


class Cycled:
    """What the optimizers show of their cycle."""

    cycle: BatchCycle

    @property
    def batch_size(self) -> int:
        """Global batch size of the next batch (of this one, while it is accumulated)."""
        return self.cycle.controller.batch_size

    @property
    def controller(self) -> BatchSizeController:
        """What holds and grows the batch size; loaders take it."""
        return self.cycle.controller

    @property
    def statistics(self) -> GradientStatistics | None:
        """Statistics of the last tested step, None before."""
        return self.cycle.statistics

    @property
    def decision(self) -> Decision | None:
        """What the test said of the last tested step, None before."""
        return self.cycle.decision

    @property
    def updated(self) -> bool:
        """Whether the last step() completed a batch and updated the weights."""
        return self.cycle.updated


def named_trainable(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """The parameters that an optimizer of this model must hold."""
    return ((name, p) for name, p in model.named_parameters() if p.requires_grad)
