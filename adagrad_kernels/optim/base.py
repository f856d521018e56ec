"""What AdAdaGrad and AdAdaGradNorm share: arguments, checks, the shape of a step, state."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..criteria import Criterion
from ..eager import outside_graphs
from ..observer import Observer
from ..reductions import pooled, unscaled
from ..selfcheck import parameter_name
from .cycle import BatchCycle, named_trainable
from .cycled import Cycled, check_state
from .work import Work, laid_out_as, same_layout, sum_dtype, touched

OPTIONS = ("lr", "lr_decay", "eps", "weight_decay", "initial_accumulator_value")
TORCH_OPTIONS = {"foreach": None, "differentiable": False, "fused": None}
"""Those of `torch.optim.Adagrad` that have no meaning here, so that param_groups fit it."""


Updated = tuple[Tensor, Tensor | None]
"""This rank's share of ‖ḡ‖², and the reductions of the coordinate-wise tests if there are any."""


def check_max_grad_norm(owner: str, max_grad_norm: float | None) -> None:
    """Raises ValueError if it is not positive."""
    if max_grad_norm is not None and not max_grad_norm > 0:
        raise ValueError(f"{owner}: max_grad_norm must be positive, got {max_grad_norm}")


def pooled_reductions(parts: list[Tensor]) -> Tensor | None:
    """Those of several calls of `ops.adagrad_` as one; None if any of them had no sums."""
    return pooled(parts) if all(part.numel() for part in parts) else None


class AdaptiveAdagrad(Cycled, Optimizer):
    """Base class: subclasses implement `_init_state(p, group)` and `_update(work, scale)`."""

    def __init__(
        self,
        model: nn.Module,
        lr: float,
        criterion: Criterion | None,
        batch_size: int,
        max_batch_size: int,
        params: Iterable[Any] | None,
        controller_options: dict[str, Any],
        defaults: dict[str, Any],
        max_grad_norm: float | None,
    ) -> None:
        self._check_options({"lr": lr, **defaults})
        check_max_grad_norm(type(self).__name__, max_grad_norm)
        self.max_grad_norm = max_grad_norm
        self.cycle = BatchCycle(model, criterion, batch_size, max_batch_size, **controller_options)
        self._model = model
        chosen = params if params is not None else (p for _, p in named_trainable(model))
        try:
            Optimizer.__init__(self, chosen, {"lr": lr, **defaults, **TORCH_OPTIONS})
            self.cycle.check_groups(self.param_groups)
        except Exception:
            self.cycle.detach()
            raise

    def _check_options(self, options: dict[str, Any]) -> None:
        for name in OPTIONS:
            if name in options and not options[name] >= 0:
                raise ValueError(f"{type(self).__name__}: invalid {name}: {options[name]}")

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As in torch; the parameters must be the model's, for example unfrozen ones."""
        self._check_options(param_group)
        super().add_param_group(param_group)
        own = {id(p) for p in self._model.parameters()}
        for p in self.param_groups[-1]["params"]:
            if id(p) not in own:
                self.param_groups.pop()
                raise ValueError(
                    f"the param group holds a parameter of shape {list(p.shape)} that does not "
                    "belong to the model"
                )
        if self.state:  # not while __init__ adds the first groups
            for p in self.param_groups[-1]["params"]:
                self._init_state(p, self.param_groups[-1])

    @outside_graphs
    @torch.no_grad()
    def step(  # type: ignore[override]
        self, closure: Callable[[], Any] | None = None, loss: Any = None
    ) -> Any:
        """Updates and tests when the batch is complete, otherwise only counts the micro-batch.

        Where it raises, weights and accumulators have not changed, and what had been accumulated
        is forgotten: call `zero_grad()` and go on.

        With a `torch.amp.GradScaler`, call `scaler.step(opt)` and `scaler.update()` after every
        micro-batch. A batch whose gradients overflow changes neither weights and accumulators nor
        the batch size.

        Args:
            closure: computes the loss and its gradients; called once.
            loss: the micro-batch's mean loss, for criteria that look at it (`CABS`).

        Raises:
            RuntimeError: no backward pass since the last step, gradients that were not zeroed,
                micro-batches of different sizes, and what `Observer.statistics` raises.
        """
        result = None
        if closure is not None:
            with torch.enable_grad():
                loss = result = closure()
        if self.cycle.complete(self.param_groups, loss, self._given_loss_scale()):
            lr, (norm_sq, reductions) = self._apply()
            accumulators = eps = None
            if "accumulators" in self.cycle.criterion.needs:
                accumulators, eps = self._metric()
            self.cycle.finish(norm_sq, lr, reductions, accumulators, eps)
        return result

    def _metric(self) -> tuple[dict[str, Tensor], dict[str, float]]:
        """The accumulators of the measured parameters and their eps, by name."""
        names = {id(p): name for name, p in self.cycle.observer.parameters()}
        accumulators, eps = {}, {}
        for group in self.param_groups:
            for p in group["params"]:
                if id(p) in names and "sum" in self.state[p]:
                    accumulators[names[id(p)]] = self.state[p]["sum"]
                    eps[names[id(p)]] = group["eps"]
        return accumulators, eps

    def _apply(self) -> tuple[float, Updated]:
        """Updates; returns lr_k of the first parameter, and what `_update` returns."""
        work, sparse = touched(list(self._work()))
        update = self._update if self.max_grad_norm is None else self._clipped_update
        try:
            found = update(work, self.cycle.gradient_scale)
        except RuntimeError:
            if not self._fit_sums(work):
                raise
            found = update(work, self.cycle.gradient_scale)  # the first had changed nothing
        for rows in sparse:
            rows.write_back()
        return work[0].lr, found

    def _fit_sums(self, work: list[Work]) -> bool:
        """Lays the accumulators out as their parameters, where the model was changed under them.

        Returns:
            Whether any had to be.

        Raises:
            RuntimeError: parameters of another dtype or on another device than before.
        """
        changed = False
        for w in work:
            total, dtype = w.state.get("sum"), sum_dtype(w.param)
            if total is None or total.dim() < w.param.dim():
                continue  # AdAdaGradNorm's, one number for all
            if total.dtype != dtype or total.device != w.param.device:
                name = parameter_name(self._model, w.param)
                raise RuntimeError(
                    f"parameter {name!r} is {w.param.dtype} on {w.param.device} "
                    f"now, its accumulator {total.dtype} on {total.device}: change the model's "
                    "dtype and device before the optimizer is made, or load its state_dict() into "
                    "a new one"
                )
            if not same_layout(total, w.param):
                w.state["sum"], changed = laid_out_as(w.param, total), True
        return changed

    def state_and_rate(self, p: Tensor, group: dict[str, Any]) -> tuple[dict[str, Any], float]:
        """A parameter's state, made where it is missing, and its lr_k."""
        return self._state_and_rate(p, group, self._rate(group))

    def _rate(self, group: dict[str, Any]) -> float:
        """Of the parameters in a group, before its decay."""
        return float(group["lr"]) * self.cycle.controller.lr_factor

    def _state_and_rate(
        self, p: Tensor, group: dict[str, Any], rate: float
    ) -> tuple[dict[str, Any], float]:
        state = self._init_state(p, group)
        if group["lr_decay"]:
            rate /= 1 + float(state["step"]) * group["lr_decay"]
        return state, rate

    def _work(self) -> Iterator[Work]:
        for group in self.param_groups:
            rate = self._rate(group)
            for p in group["params"]:
                grad = p.grad
                if grad is None or not p.requires_grad:
                    continue  # frozen: an old gradient is not followed
                yield Work(group, p, grad, *self._state_and_rate(p, group, rate))

    def _coordinate_sums(self, work: list[Work]) -> list[Tensor]:
        """Σ_i c_i² for the update's kernel, where the coming test looks at coordinates."""
        observer = self.cycle.observer
        if isinstance(observer, Observer) and self.controller.due:
            return observer.coordinate_sums([w.param for w in work])
        return []

    @outside_graphs
    def zero_grad(self, set_to_none: bool = True) -> None:
        """As in torch, but does nothing while a batch is being accumulated."""
        if self.cycle.may_zero():
            if not set_to_none and self.statistics is not None:
                self.statistics.keep_coordinates()
            super().zero_grad(set_to_none)

    def _init_state(self, p: Tensor, group: dict[str, Any]) -> dict[str, Any]:
        """state[p] with "step" and "sum", made where it is missing."""
        raise NotImplementedError

    def _update(self, work: list[Work], gradient_scale: float) -> Updated:
        """Updates the parameters and returns what the kernel has found out on the way."""
        raise NotImplementedError

    def _clipped_update(self, work: list[Work], gradient_scale: float) -> Updated:
        """The update by ḡ · min(1, max_grad_norm/‖ḡ‖); what is returned is that of ḡ itself."""
        assert self.max_grad_norm is not None
        share = self.ranks.norm_sq([w.grad for w in work]) * gradient_scale**2
        norm = math.sqrt(self.ranks.sum_(share.clone()).item())
        factor = self.max_grad_norm / (norm + 1e-6)  # as torch.nn.utils.clip_grad_norm_
        if factor >= 1:
            return self._update(work, gradient_scale)
        _, reductions = self._update(work, gradient_scale * factor)
        if reductions is not None:
            reductions = unscaled(reductions, factor)
        return share, reductions

    def state_dict(self) -> dict[str, Any]:
        """torch's dictionary, and under "adaptive" the batch size and its history."""

        def add(_: Optimizer, state: dict[str, Any]) -> None:
            state["adaptive"] = self.cycle.state_dict()

        hook = self.register_state_dict_post_hook(add, prepend=True)
        try:
            return super().state_dict()
        finally:
            hook.remove()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores `state_dict()`, also one of `torch.optim.Adagrad` (the batch size stays then).

        Gradients that had been accumulated are cleared.

        Raises:
            ValueError: the state of another model or optimizer: groups or shapes that do not fit,
                or a batch size above this optimizer's cap. Nothing has changed then.
        """
        check_state(self, state_dict, "state", "param_groups")
        saved: list[tuple[Tensor, Tensor]] = []

        def check(_: Optimizer, state: dict[str, Any]) -> None:  # as other hooks have left it
            saved.extend(self._saved_sums(state))
            for p, value in saved:
                self._check_sum(p, value)
            if "adaptive" in state:
                self.cycle.restore(state["adaptive"])

        def restore(_: Optimizer) -> None:  # torch has cast them to the parameter's dtype
            for p, value in saved:
                self._restore_sum(p, value)

        hooks = (
            self.register_load_state_dict_pre_hook(check),
            self.register_load_state_dict_post_hook(restore, prepend=True),
        )
        try:
            super().load_state_dict(state_dict)
        finally:
            for hook in hooks:
                hook.remove()
        self.cycle.forget()
        self.zero_grad()

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Called by `load_state_dict`: with what states of older torch versions lack."""
        super().__setstate__(state)
        for group in self.param_groups:
            for name, default in {"maximize": False, **TORCH_OPTIONS}.items():
                group.setdefault(name, default)
            for p in group["params"]:
                own = self.state.get(p, {})
                if "step" in own:
                    own["step"] = torch.as_tensor(own["step"], dtype=torch.float32)

    def _saved_sums(self, state_dict: dict[str, Any]) -> list[tuple[Tensor, Tensor]]:
        """(parameter, saved accumulator), after checking that the groups fit."""
        groups = state_dict["param_groups"]
        own = [len(group["params"]) for group in self.param_groups]
        theirs = [len(group["params"]) for group in groups]
        if own != theirs:
            raise ValueError(
                f"the state is of another model: its param groups hold {theirs} parameters, "
                f"those of this one {own}"
            )
        params = [p for group in self.param_groups for p in group["params"]]
        indices = [i for group in groups for i in group["params"]]
        states = state_dict["state"]
        return [
            (p, states[i]["sum"])
            for p, i in zip(params, indices, strict=True)
            if "sum" in states.get(i, {})
        ]

    def _check_sum(self, p: Tensor, saved: Tensor) -> None:
        raise NotImplementedError

    def _restore_sum(self, p: Tensor, saved: Tensor) -> None:
        raise NotImplementedError
