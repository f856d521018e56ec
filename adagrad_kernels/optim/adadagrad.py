"""AdAdaGrad: AdaGrad with a batch size that grows by the gradient's own noise."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from .. import ops
from ..criteria import Criterion
from ..distributed import local
from ..selfcheck import parameter_name
from .base import AdaptiveAdagrad, Updated, Work, pooled_reductions
from .cycled import LossScale
from .in_backward import InBackward, check_supported
from .work import laid_out_as, sum_dtype


class AdAdaGrad(AdaptiveAdagrad):
    """AdaGrad (diagonal) with adaptive batch sizes.

        v ← v + d²        w ← w − lr_k · d / (√v + eps)        lr_k = lr / (1 + (k − 1) lr_decay)

    with d = ḡ + weight_decay · w (−ḡ if maximize), ḡ the mean gradient of the batch. The same
    trajectory as `torch.optim.Adagrad` while the batch size does not change. After each update
    the criterion looks at the per-sample gradients and may raise the size of the next batch.

    Use `loss.backward(); opt.step(); opt.zero_grad()` after every micro-batch, with a loss that
    is a mean over its samples: `step` updates when `batch_size` samples have come together,
    with the mean over the micro-batches, and `zero_grad` waits for that. Do not change the
    gradients in between: the test compares them with those of the samples.

    Under `DistributedDataParallel` or `fully_shard` every process runs this loop; batch sizes are
    those of all processes together. Give it the model as it is called, wrapped: then processes
    average once a batch; if the wrapped module itself is given, once a micro-batch. With
    `fully_shard` gradients are averaged in every micro-batch, since they would take as much
    memory as the whole model otherwise; where there is room,
    `model.set_requires_gradient_sync(False)` before all but the last saves that.

    A loss that is not finite changes the weights as in torch, but not the batch size, and the
    log (`logging`, "adagrad_kernels") says so.

    Args:
        model: the whole model; it is observed (see `observe`) from now on.
        lr: learning rate.
        criterion: the test, `NormTest(0.1)` by default.
        batch_size: first global batch size; at least 2 to grow.
        max_batch_size: cap of the batch size.
        lr_decay: see the formula.
        weight_decay: see the formula. The criterion looks at ḡ, without the decay.
        initial_accumulator_value: v before the first step.
        eps: added after the root.
        maximize: ascend.
        params: parameter groups as in torch, if not all parameters are alike; together they must
            hold every trainable parameter of the model.
        max_grad_norm: clips ḡ: d is made of ḡ · min(1, max_grad_norm/(‖ḡ‖ + 1e-6)) instead, ‖ḡ‖
            the norm over all parameters, as by `torch.nn.utils.clip_grad_norm_`. Statistics and
            tests stay those of ḡ itself. Reads the gradients once more. Do not clip by hand
            between `backward` and `step`: ‖ḡ‖ would be that of the clipped gradient, Σ‖g_i‖²
            not. Not part of the state.
        update: "after_backward", in `step`; or "in_backward": from the second batch on, weights
            change during `backward()`, each as soon as its gradient is there (for linear layers in
            the kernel that forms it), and no gradient outlives its layer's backward pass; `step`
            then only tests. The same weights; faster where a step is bound by memory. For one
            process, batches of one backward pass, eager models, criteria that look at norms, and
            without a GradScaler. After `backward()` has raised, some weights may have changed.
        **controller: `growth_limit`, `lr_policy` and the other options of
            `BatchSizeController`, `fallback`, `folded` and `process_group` of `observe`, and
            `observe_layers`, its `layers`: the test then looks at these layers' gradients only,
            while all parameters are updated.

    Raises:
        ValueError: arguments out of range, or what `observe` raises.

    Source:
        arXiv 2402.11215.

    Example:
        >>> model = nn.Linear(4, 1)
        >>> opt = AdAdaGrad(model, lr=0.1, criterion=NormTest(0.5), batch_size=8)
        >>> model(torch.randn(8, 4)).square().mean().backward()
        >>> opt.step(); opt.zero_grad()
        >>> opt.statistics.batch_size
        8
    """

    _in_backward: InBackward | None = None

    def __init__(
        self,
        model: nn.Module,
        lr: float = 1e-2,
        criterion: Criterion | None = None,
        batch_size: int = 8,
        max_batch_size: int = 60000,
        lr_decay: float = 0,
        weight_decay: float = 0,
        initial_accumulator_value: float = 0,
        eps: float = 1e-10,
        maximize: bool = False,
        *,
        params: Iterable[Any] | None = None,
        max_grad_norm: float | None = None,
        update: str = "after_backward",
        **controller: Any,
    ) -> None:
        if update not in ("after_backward", "in_backward"):
            raise ValueError(f'update must be "after_backward" or "in_backward", got {update!r}')
        defaults = {
            "lr_decay": lr_decay,
            "eps": eps,
            "weight_decay": weight_decay,
            "initial_accumulator_value": initial_accumulator_value,
            "maximize": maximize,
        }
        super().__init__(
            model, lr, criterion, batch_size, max_batch_size, params, controller, defaults,
            max_grad_norm,
        )  # fmt: skip
        for group in self.param_groups:
            for p in group["params"]:
                self._init_state(p, group)
        if update == "in_backward":
            try:
                check_supported(self, model)
            except ValueError:
                self.cycle.detach()
                raise
            self._in_backward = InBackward(self)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As in torch; the parameters must be the model's, for example unfrozen ones."""
        super().add_param_group(param_group)
        if self._in_backward is not None:
            self._in_backward.watch(self.param_groups[-1]["params"])

    def _given_loss_scale(self) -> LossScale | None:
        loss_scale = super()._given_loss_scale()
        if loss_scale is not None and self._in_backward is not None:
            raise RuntimeError(
                'update="in_backward" cannot take a loss scale out of the gradients: use '
                'update="after_backward" with a GradScaler, or bfloat16 without one'
            )
        return loss_scale

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As in torch, but does nothing while a batch is being accumulated."""
        if self._in_backward is not None:
            self._in_backward.forget()
        super().zero_grad(set_to_none)

    def _apply(self) -> tuple[float, Updated]:
        if self._in_backward is None:
            return super()._apply()
        if self._in_backward.active:
            return self._in_backward.take()
        self._in_backward.check_first(self.cycle.observer.micro_batches)
        found = super()._apply()
        self._in_backward.activate()
        return found

    def _init_state(self, p: Tensor, group: dict[str, Any]) -> dict[str, Any]:
        state = self.state[p]
        if not state:
            state["step"] = torch.tensor(0.0)
            state["sum"] = torch.full_like(
                p,
                group["initial_accumulator_value"],
                dtype=sum_dtype(p),
                memory_format=torch.preserve_format,
            )
        return state

    def _update(self, work: list[Work], gradient_scale: float) -> Updated:
        runs: dict[tuple[Any, ...], list[Work]] = {}
        alone = self.ranks.size == 1
        for w in work:
            group = w.group
            copies = 1 if alone else self.ranks.copies(w.param)
            options = w.lr, group["eps"], group["weight_decay"], group["maximize"], copies
            runs.setdefault(options, []).append(w)
        if len(runs) > 1:  # each is checked for itself
            self._fit_sums(work)
        samples = sum(self.cycle.observer.rows())
        norms, reductions = [], []
        for (lr, eps, weight_decay, maximize, copies), run in runs.items():
            norm_sq, found = ops.adagrad_(
                [local(w.param) for w in run],
                [local(w.grad) for w in run],
                [local(w.state["sum"]) for w in run],
                self._coordinate_sums(run),
                lr=lr, eps=eps, weight_decay=weight_decay, maximize=maximize,
                grad_scale=gradient_scale, samples=max(samples, 2),
            )  # fmt: skip
            reductions.append(found)
            norms.append(norm_sq if copies == 1 else norm_sq / copies)
        torch._foreach_add_([w.state["step"] for w in work], 1)
        norm_sq = norms[0] if len(norms) == 1 else torch.stack(norms).sum()
        return norm_sq, pooled_reductions(reductions)

    def _check_sum(self, p: Tensor, saved: Tensor) -> None:
        if saved.shape != p.shape:
            name = parameter_name(self._model, p)
            raise ValueError(
                f"the state is of another model or optimizer: parameter {name!r} has "
                f"shape {list(p.shape)}, its saved accumulator {list(saved.shape)}"
            )

    def _restore_sum(self, p: Tensor, saved: Tensor) -> None:
        """In this parameter's layout, in float32 or better."""
        self.state[p]["sum"] = laid_out_as(p, saved, sum_dtype(p))
