"""AdAdaGradNorm: the scalar variant, one accumulator for all parameters."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from .. import ops
from ..criteria import Criterion, NormTest
from .base import AdaptiveAdagrad


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
        **controller: Any,
    ) -> None:
        if not initial_accumulator_value > 0:
            raise ValueError(
                "AdAdaGradNorm: initial_accumulator_value must be positive, got "
                f"{initial_accumulator_value}"
            )
        defaults = {
            "lr_decay": lr_decay,
            "eps": eps,
            "weight_decay": weight_decay,
            "initial_accumulator_value": initial_accumulator_value,
            "maximize": maximize,
        }
        criterion = criterion if criterion is not None else NormTest(0.1)
        super().__init__(
            model, lr, criterion, batch_size, max_batch_size, params, controller, defaults
        )
        device = next(iter(self.param_groups[0]["params"])).device
        self.accumulator = torch.tensor(
            initial_accumulator_value, dtype=torch.float64, device=device
        )
        for group in self.param_groups:
            for p in group["params"]:
                self._init_state(p)

    def _init_state(self, p: Tensor) -> dict[str, Any]:
        state = self.state[p]
        if not state:
            state["step"] = torch.tensor(0.0)
            state["sum"] = self.accumulator
        return state

    def _update(self, gradient_scale: float) -> Tensor:
        params: list[Tensor] = []
        grads: list[Tensor] = []
        rates: list[float] = []
        decays: list[float] = []
        steps: list[Tensor] = []
        common = self.param_groups[0]
        for group in self.param_groups:
            if (group["eps"], group["maximize"]) != (common["eps"], common["maximize"]):
                raise ValueError("AdAdaGradNorm: eps and maximize must be the same in all groups")
            for p in group["params"]:
                if p.grad is None:
                    continue
                step = self._init_state(p)["step"]
                params.append(p)
                grads.append(self._gradient(p))
                rates.append(float(group["lr"]) / (1 + float(step) * group["lr_decay"]))
                decays.append(float(group["weight_decay"]))
                steps.append(step)
        torch._foreach_add_(steps, 1)
        norm_sq, _ = ops.adagrad_norm_(
            params, grads, self.accumulator, lr=rates, eps=common["eps"], weight_decay=decays,
            maximize=common["maximize"], grad_scale=gradient_scale,
        )  # fmt: skip
        return norm_sq

    def _restore_precision(self, state_dict: dict[str, Any]) -> None:
        """All parameters share the one accumulator again, in float64."""
        sums = [s["sum"] for s in state_dict["state"].values() if "sum" in s]
        if any(value.numel() != 1 for value in sums):
            raise ValueError(
                "AdAdaGradNorm: the state holds an accumulator for each coordinate; it is that of "
                "AdAdaGrad or torch.optim.Adagrad"
            )
        if sums:
            self.accumulator.copy_(sums[0].double().reshape(()))
        for group in self.param_groups:
            for p in group["params"]:
                self._init_state(p)["sum"] = self.accumulator
