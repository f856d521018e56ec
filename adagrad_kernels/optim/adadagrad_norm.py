"""AdAdaGradNorm: the scalar variant, one accumulator for all parameters."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from .. import ops
from ..criteria import Criterion
from ..distributed import is_sharded, local
from .base import AdaptiveAdagrad, Updated, Work, pooled_reductions


class AdAdaGradNorm(AdaptiveAdagrad):
    """AdaGrad-Norm with adaptive batch sizes: ONE accumulator v for all parameters.

        v ← v + ‖d‖²        w ← w − lr_k · d / (√v + eps)        lr_k = lr / (1 + (k − 1) lr_decay)

    with d = ḡ + weight_decay · w (−ḡ if maximize) over all parameter groups together; the
    current gradient is in v. For smooth nonconvex functions min_k ‖∇F‖² falls as 1/K with high
    probability while the norm test holds (arXiv 2402.11215).

    Arguments, loop and errors are those of `AdAdaGrad`; only `initial_accumulator_value`, v
    before the first step, must be positive here, and belongs to all groups. The accumulator is
    one float64 number, `state[p]["sum"]` of every parameter.

    Source:
        Ward, Wu, Bottou 2019; arXiv 2402.11215.

    Example:
        >>> model = nn.Linear(4, 1)
        >>> opt = AdAdaGradNorm(model, lr=0.1, batch_size=8)
        >>> model(torch.randn(8, 4)).square().mean().backward()
        >>> opt.step(); opt.zero_grad()
        >>> bool(opt.accumulator > 1e-2)
        True
    """

    def __init__(
        self,
        model: nn.Module,
        lr: float = 1e-2,
        criterion: Criterion | None = None,
        batch_size: int = 8,
        max_batch_size: int = 60000,
        lr_decay: float = 0,
        weight_decay: float = 0,
        initial_accumulator_value: float = 1e-2,
        eps: float = 1e-10,
        maximize: bool = False,
        *,
        params: Iterable[Any] | None = None,
        max_grad_norm: float | None = None,
        **controller: Any,
    ) -> None:
        if not initial_accumulator_value > 0:
            raise ValueError(
                "AdAdaGradNorm: initial_accumulator_value must be positive, got "
                f"{initial_accumulator_value}"
            )
        if controller.pop("update", "after_backward") != "after_backward":
            raise ValueError(
                "AdAdaGradNorm cannot update during the backward pass: each weight's step needs "
                "the norm of the whole gradient"
            )
        defaults = {
            "lr_decay": lr_decay,
            "eps": eps,
            "weight_decay": weight_decay,
            "initial_accumulator_value": initial_accumulator_value,
            "maximize": maximize,
        }
        self.accumulator = torch.tensor(initial_accumulator_value, dtype=torch.float64)
        super().__init__(
            model, lr, criterion, batch_size, max_batch_size, params, controller, defaults,
            max_grad_norm,
        )  # fmt: skip
        self.accumulator = self.accumulator.to(self.param_groups[0]["params"][0].device)
        for group in self.param_groups:
            for p in group["params"]:
                self._init_state(p, group)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As in torch; eps and maximize must be those of the other groups."""
        for name in ("eps", "maximize"):
            value = param_group.get(name, self.defaults[name])
            if any(group[name] != value for group in self.param_groups[:1]):
                raise ValueError(f"AdAdaGradNorm: {name} must be the same in all param groups")
        super().add_param_group(param_group)

    def _init_state(self, p: Tensor, group: dict[str, Any]) -> dict[str, Any]:
        state = self.state[p]
        if not state:
            state["step"] = torch.tensor(0.0)
            state["sum"] = self.accumulator
        return state

    def _update(self, work: list[Work], gradient_scale: float) -> Updated:
        group = self.param_groups[0]
        sharded = any(is_sharded(w.param) for w in work)
        total = self._add_other_shards(work, gradient_scale) if sharded else None
        norm_sq, reductions = ops.adagrad_norm_(
            [local(w.param) for w in work], [local(w.grad) for w in work], self.accumulator,
            self._coordinate_sums(work),
            lr=[w.lr for w in work], eps=group["eps"],
            weight_decay=[float(w.group["weight_decay"]) for w in work],
            maximize=group["maximize"], grad_scale=gradient_scale,
            samples=max(sum(self.cycle.observer.rows()), 2),
        )  # fmt: skip
        torch._foreach_add_([w.state["step"] for w in work], 1)
        if total is None:
            copies = self.ranks.size
            norm_sq = norm_sq if copies == 1 else norm_sq / copies
            return norm_sq, pooled_reductions([reductions])
        self.accumulator.copy_(total)  # without the rounding in which ranks differ
        return self.ranks.norm_sq([w.grad for w in work]) * gradient_scale**2, None

    def _add_other_shards(self, work: list[Work], gradient_scale: float) -> Tensor:
        """Adds to v what the update, which sees this rank's shards, will not; returns the new v."""
        steps = []
        for w in work:
            factor = -gradient_scale if w.group["maximize"] else gradient_scale
            steps.append(torch.add(w.grad * factor, w.param, alpha=w.group["weight_decay"]))
        own = ops.grad_norm_sq([local(step) for step in steps])
        total = self.accumulator + self.ranks.sum_(self.ranks.norm_sq(steps))
        self.accumulator.copy_(total - own)
        return total

    def _check_sum(self, p: Tensor, saved: Tensor) -> None:
        if saved.numel() != 1:
            raise ValueError(
                "AdAdaGradNorm: the state holds an accumulator for each coordinate; it is that of "
                "AdAdaGrad or torch.optim.Adagrad"
            )

    def _restore_sum(self, p: Tensor, saved: Tensor) -> None:
        """The one accumulator again for all parameters, in float64."""
        self.accumulator.copy_(saved.reshape(()))
        self.state[p]["sum"] = self.accumulator
