"""Updates inside the backward pass, `AdAdaGrad(…, update="in_backward")`: no gradient in memory.

The backward pass of a linear layer hands its operands to `ops.linear_adagrad_`, which updates the
weight where its gradient is formed. Every other parameter, and a weight with several uses, is
updated by a hook as soon as its gradient is complete, and the gradient is dropped.

The first batch is updated after its backward pass, as by default: whatever can be found wrong with
a model or a loop is then found before a weight has changed.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .. import ops
from ..functional import Call
from ..layers import ObservedLayer
from ..selfcheck import parameter_name
from .base import AdaptiveAdagrad, Updated
from .work import refuse_sparse

_COMPILED = (
    'update="in_backward" cannot run in a compiled model: it must see the backward pass of the '
    'layers. Leave out torch.compile, or use update="after_backward"'
)
_WHOLE = (
    'update="in_backward" needs the whole batch in one backward pass. To accumulate, use '
    'update="after_backward"'
)


class Options(NamedTuple):
    """What a parameter's update needs beside its gradient."""

    sum: Tensor
    step: Tensor
    lr: float
    eps: float
    weight_decay: float
    maximize: bool

    def keywords(self) -> dict[str, Any]:
        """As the ops take them."""
        return {
            "lr": self.lr,
            "eps": self.eps,
            "weight_decay": self.weight_decay,
            "maximize": self.maximize,
        }


class InBackward:
    """Updates the parameters of one optimizer during `backward()`.

    The observer notifies it of every backward pass through a layer, a hook on each parameter of
    every complete gradient. It holds the optimizer weakly: without the optimizer, gradients are
    plain ones again.

    Attributes:
        active: whether the coming backward pass updates; not the first one.
    """

    def __init__(self, optimizer: AdaptiveAdagrad) -> None:
        self._optimizer = weakref.ref(optimizer)
        self._observer = optimizer.cycle.observer
        self._hooks: dict[Tensor, Any] = {}
        self.active = False
        self._samples, self._pass = 0, -1  # of the last layer call
        self.forget()
        for group in optimizer.param_groups:
            self.watch(group["params"])
        self._observer.updater = self  # type: ignore[union-attr]

    def watch(self, params: Iterable[Tensor]) -> None:
        """Updates these parameters, too."""
        this = weakref.ref(self)

        def complete(p: Tensor) -> None:
            updater = this()
            if updater is not None:
                updater.complete(p)

        for p in params:
            if p not in self._hooks and p.requires_grad:
                self._hooks[p] = p.register_post_accumulate_grad_hook(complete)

    def remove(self) -> None:
        """Leaves the parameters alone from now on; called when the observer is detached."""
        for hook in self._hooks.values():
            hook.remove()
        self._hooks = {}
        self.active = False

    # Called during the backward pass

    def on_backward(self, samples: int) -> None:
        """A layer call with so many samples takes part in this backward pass."""
        self._samples, self._pass = samples, torch._C._current_graph_task_id()

    def update_of(self, layer: ObservedLayer, weight: Tensor) -> LinearUpdate:
        """What may update a linear layer's weight in the backward pass of a coming call."""
        return LinearUpdate(self, layer, weight)

    def takes(self, weight: Tensor, edge: Any) -> bool:
        """Whether `update_linear` is to update a weight that gets gradient along this edge alone.

        Not in a pass such as `autograd.grad`'s that does not accumulate into the weight.
        """
        return (
            self.active
            and weight in self._hooks
            and self._optimizer() is not None
            and weight.is_contiguous()
            and torch._C._will_engine_execute_node(edge)
        )

    def update_linear(
        self, weight: Tensor, grad_out: Tensor, input: Tensor, capacity: int, bias: bool
    ) -> tuple[Tensor, Tensor]:
        """The update of a linear layer's weight; returns (grad_bias, probe)."""
        options = self._claim(weight)
        norm, _, grad_bias, probe, _, _ = ops.linear_adagrad_(
            grad_out, input, weight, options.sum, capacity, bias, **options.keywords()
        )
        self._updated(weight, options, norm)
        return grad_bias, probe

    def complete(self, p: Tensor) -> None:
        """The hook: a gradient is complete."""
        if not self.active or self._optimizer() is None:
            return
        grad, p.grad = p.grad, None
        if grad is None:  # the backward pass of its layer has updated it
            return
        if grad.is_sparse:
            raise RuntimeError(
                f"parameter {self._name(p)!r} has a sparse gradient, which is not supported: build "
                "its layer with sparse=False"
            )
        options = self._claim(p)
        norm, _ = ops.adagrad_([p], [grad], [options.sum], **options.keywords())
        self._updated(p, options, norm)

    def _claim(self, p: Tensor) -> Options:
        """What this parameter's update needs; raises where it must not be updated now."""
        optimizer = self._optimizer()
        assert optimizer is not None
        this_pass = torch._C._current_graph_task_id()
        if not self._done:
            self._check(optimizer, this_pass)
            self._updating = this_pass
            self._groups = {q: g for g in optimizer.param_groups for q in g["params"]}
        elif this_pass != self._updating:
            raise RuntimeError(
                'a second backward pass before opt.step(): update="in_backward" changes the '
                "weights in each, so a batch must be one backward pass. Nothing was changed by "
                "the second one"
            )
        elif p in self._done:
            raise RuntimeError(
                f"parameter {self._name(p)!r} was updated already in this backward pass: it is "
                "also used outside its layer's forward. Call the layer instead; put weight "
                "penalties into weight_decay"
            )
        group = self._groups[p]
        state, lr = optimizer.state_and_rate(p, group)
        weight_decay = float(group["weight_decay"])
        return Options(
            state["sum"], state["step"], lr, group["eps"], weight_decay, group["maximize"]
        )

    def _check(self, optimizer: AdaptiveAdagrad, this_pass: int) -> None:
        refuse_processes(optimizer)
        if self._pass != this_pass or this_pass == -1:
            raise RuntimeError(_COMPILED)
        controller = optimizer.controller
        micro = controller.max_micro_batch_size
        if micro is not None and micro < controller.max_batch_size:
            raise RuntimeError(
                f"the loader's max_micro_batch_size ({micro}) is below max_batch_size "
                f"({controller.max_batch_size}): larger batches would come in parts, and "
                'update="in_backward" needs each in one backward pass. Set both alike, or use '
                'update="after_backward"'
            )
        if self._samples < controller.batch_size:
            raise RuntimeError(
                f"a backward pass of {self._samples} samples in a batch of "
                f"{controller.batch_size}: {_WHOLE}"
            )

    def _updated(self, p: Tensor, options: Options, norm: Tensor) -> None:
        options.step.add_(1)
        self._done[p] = norm, options.lr

    def _name(self, p: Tensor) -> str:
        return parameter_name(self._observer.model, p)

    # Called by the optimizer

    def check_first(self, micro_batches: int) -> None:
        """Raises for a first batch whose like could not be updated during a backward pass."""
        optimizer = self._optimizer()
        assert optimizer is not None
        if micro_batches > 1:
            raise RuntimeError(
                f"{micro_batches} backward passes in a batch of {optimizer.batch_size}: {_WHOLE}"
            )
        self._check(optimizer, self._pass)

    def activate(self) -> None:
        """The first batch is complete and was updated: from now on during the backward pass."""
        optimizer = self._optimizer()
        assert optimizer is not None
        self.active = optimizer.cycle.updated_in_backward = True
        for p in self._hooks:
            p.grad = None

    def take(self) -> tuple[float, Updated]:
        """What `AdaptiveAdagrad._apply` returns, of the updates in the backward pass."""
        if not self._done:
            raise RuntimeError(
                "step() without gradients: no parameter was updated in the backward pass"
            )
        # In the optimizer's order, whatever that of the backward pass was.
        params = [p for p in self._groups if p in self._done]
        norm_sq = torch.stack([self._done[p][0] for p in params]).sum()
        lr = self._done[params[0]][1]
        self.forget()
        return lr, (norm_sq, None)

    def forget(self) -> None:
        """Ready for the next batch."""
        self._updating = -1  # the backward pass that updates this batch
        self._done: dict[Tensor, tuple[Tensor, float]] = {}  # ‖g‖² and lr_k of what is updated
        self._groups: dict[Tensor, dict[str, Any]] = {}


class LinearUpdate(NamedTuple):
    """Passed through `functional.linear`: what may update the weight in the backward pass."""

    updater: InBackward
    layer: ObservedLayer
    weight: Tensor

    def takes(self, call: Call, edge: Any) -> bool:
        """Whether to update it, rather than to return its gradient along `edge`."""
        return self.layer.used_once(call) and self.updater.takes(self.weight, edge)

    def __call__(
        self, grad_out: Tensor, input: Tensor, capacity: int, bias: bool
    ) -> tuple[Tensor, Tensor]:
        """Updates the weight; returns (grad_bias, probe)."""
        return self.updater.update_linear(self.weight, grad_out, input, capacity, bias)


def refuse_processes(optimizer: AdaptiveAdagrad) -> None:
    """Gradients are averaged over processes after the backward pass of a layer."""
    if optimizer.ranks.size > 1:
        raise ValueError(
            f'update="in_backward" works in a single process, not in {optimizer.ranks.size}: '
            "gradients would have to be averaged before the update"
        )


def check_supported(optimizer: AdaptiveAdagrad, model: nn.Module) -> None:
    """Raises ValueError for what cannot be updated during the backward pass."""
    refuse_processes(optimizer)
    criterion = optimizer.cycle.criterion
    for need in ("coordinates", "inner_products", "workers"):
        if need in criterion.needs:
            raise ValueError(
                f'update="in_backward" keeps no gradient after the backward pass, but '
                f"{type(criterion).__name__} needs {need.replace('_', ' ')}: use NormTest, or "
                'update="after_backward"'
            )
    if optimizer.cycle.observer.partial:  # type: ignore[union-attr]
        raise ValueError('update="in_backward" measures all layers: leave observe_layers out')
    if optimizer.max_grad_norm is not None:
        raise ValueError(
            'update="in_backward" cannot clip: the norm of the gradient is not known before the '
            "backward pass ends"
        )
    refuse_sparse(model, 'update="in_backward"')
    for module in model.modules():
        if isinstance(module, torch._dynamo.OptimizedModule) or module._compiled_call_impl:
            raise ValueError(_COMPILED)
    for name, p in model.named_parameters():
        if p.grad is not None:
            raise ValueError(
                f'update="in_backward": parameter {name!r} has a gradient already; call '
                "zero_grad() first"
            )
