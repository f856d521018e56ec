"""What AdAdaGrad and AdAdaGradNorm share: arguments, checks, the shape of a step, state."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..criteria import Criterion
from .cycle import BatchCycle, Cycled, named_trainable


class AdaptiveAdagrad(Cycled, Optimizer):
    """Base class: subclasses implement `_update(gradient_scale) -> ‖ḡ‖²`."""

    def __init__(
        self,
        model: nn.Module,
        lr: float,
        criterion: Criterion,
        batch_size: int,
        max_batch_size: int,
        params: Iterable[Any] | None,
        controller_options: dict[str, Any],
        defaults: dict[str, Any],
    ) -> None:
        for name, value in {"lr": lr, **defaults}.items():
            if not isinstance(value, bool) and not value >= 0:
                raise ValueError(f"{type(self).__name__}: invalid {name}: {value}")
        # The remaining keys are torch.optim.Adagrad's, so that param_groups fit it.
        torch_keys = {"foreach": None, "differentiable": False, "fused": None}
        cycle = BatchCycle(model, criterion, batch_size, max_batch_size, **controller_options)
        self.cycle = cycle
        self._model = model
        chosen = params if params is not None else (p for _, p in named_trainable(model))
        Optimizer.__init__(self, chosen, {"lr": lr, **defaults, **torch_keys})
        self._check_groups()

    def _check_groups(self) -> None:
        """The gradient that is tested must be the gradient that is followed."""
        held = {id(p) for group in self.param_groups for p in group["params"]}
        for name, p in named_trainable(self._model):
            if id(p) not in held:
                raise ValueError(
                    f"parameter {name!r} is trainable but in none of the param groups: add it, "
                    "or freeze it with requires_grad_(False)"
                )
            held.discard(id(p))
        strangers = [
            p for g in self.param_groups for p in g["params"] if id(p) in held and p.requires_grad
        ]
        if strangers:
            raise ValueError(
                f"a param group holds a parameter of shape {list(strangers[0].shape)} that does "
                "not belong to the model"
            )

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Updates and tests when the batch is complete, otherwise only counts the micro-batch.

        Args:
            closure: computes the loss and its gradients; called once.

        Raises:
            RuntimeError: no backward pass since the last step, gradients that were not zeroed,
                micro-batches of different sizes, and what `Observer.statistics` raises.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if self.cycle.complete():
            self.cycle.measure(self._update(self.cycle.gradient_scale))
            self.cycle.advance()
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As in torch, but does nothing while a batch is being accumulated."""
        if self.cycle.may_zero():
            super().zero_grad(set_to_none)

    def _update(self, gradient_scale: float) -> Tensor:
        raise NotImplementedError

    def state_dict(self) -> dict[str, Any]:
        """torch's dictionary, and under "adaptive" the batch size and its history."""
        state = super().state_dict()
        state["adaptive"] = self.cycle.state_dict()
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores `state_dict()`, also one of `torch.optim.Adagrad` (the batch size stays then).

        Raises:
            ValueError: the state of another model: groups or shapes that do not fit.
        """
        self._check_shapes(state_dict)
        super().load_state_dict(state_dict)
        self._restore_precision(state_dict)
        if "adaptive" in state_dict:
            self.cycle.load_state_dict(state_dict["adaptive"])

    def _check_shapes(self, state_dict: dict[str, Any]) -> None:
        own = [p for group in self.param_groups for p in group["params"]]
        names = {id(p): name for name, p in self._model.named_parameters()}
        indices = [i for group in state_dict["param_groups"] for i in group["params"]]
        if len(own) != len(indices):
            raise ValueError(
                f"the state is of another model: it holds {len(indices)} parameters, this one "
                f"has {len(own)}"
            )
        for p, index in zip(own, indices, strict=True):
            saved = state_dict["state"].get(index, {}).get("sum")
            if isinstance(saved, Tensor) and saved.dim() and saved.shape != p.shape:
                raise ValueError(
                    f"the state is of another model: parameter {names.get(id(p), index)!r} has "
                    f"shape {list(p.shape)}, its saved accumulator {list(saved.shape)}"
                )

    def _restore_precision(self, state_dict: dict[str, Any]) -> None:
        """torch casts loaded state to the parameter's dtype; accumulators stay float32."""
        own = [p for group in self.param_groups for p in group["params"]]
        indices = [i for group in state_dict["param_groups"] for i in group["params"]]
        for p, index in zip(own, indices, strict=True):
            saved = state_dict["state"].get(index, {}).get("sum")
            if isinstance(saved, Tensor):
                self.state[p]["sum"] = saved.to(
                    p.device, self._sum_dtype(p), copy=True, memory_format=torch.preserve_format
                )

    @staticmethod
    def _sum_dtype(p: Tensor) -> torch.dtype:
        return torch.float64 if p.dtype == torch.float64 else torch.float32

    def _gradient(self, p: Tensor) -> Tensor:
        assert p.grad is not None
        if p.grad.is_sparse:
            name = next(n for n, q in self._model.named_parameters() if q is p)
            raise RuntimeError(
                f"parameter {name!r} has a sparse gradient, which is not supported: build its "
                "layer with sparse=False"
            )
        return p.grad
