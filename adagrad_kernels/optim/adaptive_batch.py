"""AdaptiveBatch: the same loop around any torch optimizer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from ..criteria import Criterion
from ..eager import outside_graphs
from .base import check_max_grad_norm
from .checks import check_criterion
from .cycle import BatchCycle
from .cycled import Cycled, check_state
from .work import refuse_sparse


class AdaptiveBatch(Cycled):
    """Adaptive batch sizes for any torch optimizer.

    The loop is that of `AdAdaGrad`: `loss.backward(); opt.step(); opt.zero_grad()` after every
    micro-batch. When the batch is complete the gradients become the mean over the micro-batches,
    the optimizer steps, and the criterion may raise the next batch size. Learning rate schedulers
    take the inner optimizer.

    Args:
        model: the whole model; it is observed from now on.
        optimizer: any `torch.optim.Optimizer` of the model's parameters.
        criterion: the test, `NormTest(0.1)` by default.
        batch_size: first global batch size.
        max_batch_size: its cap; equal to batch_size, the batch is fixed and only measured.
        max_grad_norm: clips the mean gradient for the inner optimizer by
            `torch.nn.utils.clip_grad_norm_`; the test looks at the gradient before. Do not clip
            by hand between `backward` and `step`.
        **controller: `growth_limit`, `lr_policy` and the other options of
            `BatchSizeController`, `fallback`, `folded` and `process_group` of `observe`, and
            `observe_layers`, its `layers`: the test then looks at these layers' gradients only,
            while all parameters are updated.

    Attributes:
        optimizer: the inner optimizer.

    Example:
        >>> model = nn.Linear(4, 1)
        >>> adam = torch.optim.AdamW(model.parameters())
        >>> opt = AdaptiveBatch(model, adam, criterion=NormTest(0.5), batch_size=8)
        >>> model(torch.randn(8, 4)).square().mean().backward()
        >>> opt.step(); opt.zero_grad()
        >>> opt.updated
        True
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        criterion: Criterion | None = None,
        batch_size: int = 8,
        max_batch_size: int = 60000,
        *,
        max_grad_norm: float | None = None,
        **controller: Any,
    ) -> None:
        check_max_grad_norm(type(self).__name__, max_grad_norm)
        self.max_grad_norm = max_grad_norm
        if not isinstance(optimizer, Optimizer):
            raise TypeError(f"expected a torch optimizer, got {type(optimizer).__name__}")
        check_criterion(criterion)
        if max_grad_norm is not None:
            refuse_sparse(model, "AdaptiveBatch(max_grad_norm=…)")
        if criterion is not None and "accumulators" in criterion.needs:
            raise ValueError(f"{criterion!r} needs the accumulators of AdAdaGrad or AdAdaGradNorm")
        self.cycle = BatchCycle(model, criterion, batch_size, max_batch_size, **controller)
        self.optimizer = optimizer
        try:
            self.cycle.check_groups(optimizer.param_groups)
        except Exception:
            self.cycle.detach()
            raise

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The inner optimizer's parameter groups."""
        return self.optimizer.param_groups

    @property
    def state(self) -> Any:
        """The inner optimizer's state by parameter."""
        return self.optimizer.state

    @property
    def defaults(self) -> dict[str, Any]:
        """The inner optimizer's default options."""
        return self.optimizer.defaults

    @outside_graphs
    def step(self, closure: Callable[[], Any] | None = None, loss: Any = None) -> Any:
        """Updates and tests when the batch is complete, otherwise only counts the micro-batch.

        Arguments and errors are those of `AdAdaGrad.step`.
        """
        result = None
        if closure is not None:
            loss = result = closure()
        if not self.cycle.complete(self.param_groups, loss, self._given_loss_scale()):
            return result
        factor, scale = self.cycle.controller.lr_factor, self.cycle.gradient_scale
        self.cycle.finish(lr=float(self.param_groups[0]["lr"]) * factor)
        params = [p for g in self.param_groups for p in g["params"] if p.grad is not None]
        if scale != 1:
            torch._foreach_mul_([p.grad for p in params], scale)  # also takes a loss scale out
        if self.max_grad_norm is not None:
            nn.utils.clip_grad_norm_(params, self.max_grad_norm)
        self._inner_step(factor)
        return result

    def _inner_step(self, lr_factor: float) -> None:
        if lr_factor == 1:
            self.optimizer.step()
            return
        rates = [group["lr"] for group in self.param_groups]
        try:
            for group in self.param_groups:
                group["lr"] = group["lr"] * lr_factor
            self.optimizer.step()
        finally:
            for group, rate in zip(self.param_groups, rates, strict=True):
                group["lr"] = rate

    @outside_graphs
    def zero_grad(self, set_to_none: bool = True) -> None:
        """As in torch, but does nothing while a batch is being accumulated."""
        if self.cycle.may_zero():
            self.optimizer.zero_grad(set_to_none)

    def state_dict(self) -> dict[str, Any]:
        """The inner optimizer's state, and the batch size with its history."""
        return {"optimizer": self.optimizer.state_dict(), "adaptive": self.cycle.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores `state_dict()`; gradients that had been accumulated are cleared.

        Raises:
            ValueError: something else, such as the state of the inner optimizer alone, or a
                batch size above this one's cap. Nothing has changed then.
        """
        check_state(self, state_dict, "optimizer", "adaptive")
        before = self.cycle.state_dict()
        self.cycle.restore(state_dict["adaptive"])
        try:
            self.optimizer.load_state_dict(state_dict["optimizer"])
        except Exception:
            self.cycle.restore(before)
            raise
        self.cycle.forget()
        self.zero_grad()
