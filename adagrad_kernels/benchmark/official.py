"""The statistics as the official code of AdAdaGrad (arXiv 2402.11215) computes them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.func import functional_call, grad, vmap

from .engine import Variant
from .step_cases import OPTIONS, Measured, Task, loss, step_variant


def vmap_grad(coordinates: bool) -> Callable[[Task], Variant]:
    """A training step: vmap(grad) of a copy of the weights, then an ordinary step.

    Args:
        coordinates: also the variance of every coordinate.
    """

    def make(task: Task) -> Variant:
        model = task.model()
        optimizer = torch.optim.Adagrad(model.parameters(), **OPTIONS, fused=True)
        seen: dict = {}

        def sample_loss(params: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
            return loss(functional_call(model, params, (x[None],)), y[None])

        per_sample = vmap(grad(sample_loss), (None, 0, 0))

        def step() -> None:
            params = {name: p.detach().clone() for name, p in model.named_parameters()}
            grads = per_sample(params, task.x, task.y)
            squares = [g.flatten(1).square().sum(1) for g in grads.values()]
            seen["sample_norms_sq"] = torch.stack(squares).sum(0)
            if coordinates:
                seen["coordinate_variance"] = {name: g.var(0) for name, g in grads.items()}
            del grads
            loss(model(task.x), task.y).backward()
            optimizer.step()

        return step_variant(task, model, optimizer, step, lambda: Measured(**seen))

    return make
