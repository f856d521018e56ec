"""The loop that all optimizers here share: micro-batches → batch → test → next batch size."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..batch_size import BatchSizeController
from ..criteria import Averaged, Criterion, Decision, NormTest, StatefulCriterion
from ..distributed import Group, is_data_parallel, local
from ..observer import Observer, observe
from ..selfcheck import parameter_name, parameters_with_grad
from ..statistics import GradientStatistics
from ..workers import WorkerObserver
from .checks import check_criterion, check_options, checked, inner_products_for
from .work import refuse_sparse

logger = logging.getLogger("adagrad_kernels")

LossScale = tuple[Tensor, Tensor]
"""A GradScaler's factor on the loss, and whether any gradient is not finite (> 0)."""


class BatchCycle:
    """Counts samples until the batch is complete, then tests it and sets the next batch size.

    Where several processes share a step, all of them must call it. If the model is a
    `DistributedDataParallel`, its processes average the gradients in the last micro-batch only.

    Args:
        model: observed from now on.
        criterion: the test, `NormTest(0.1)` if None.
        batch_size: first global batch size.
        max_batch_size: its cap.
        fallback: see `observe`.
        process_group: see `observe`.
        observe_layers: see `layers` of `observe`.
        folded: see `observe`.
        options: further arguments of `BatchSizeController`.
    """

    def __init__(
        self,
        model: nn.Module,
        criterion: Criterion | None,
        batch_size: int,
        max_batch_size: int,
        fallback: str = "error",
        process_group: Group | None = None,
        observe_layers: Iterable[str | nn.Module] | None = None,
        folded: Iterable[str | nn.Module] = (),
        **options: Any,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(
                f"expected the model (an nn.Module), got {type(model).__name__}: the optimizer "
                "observes the model's layers, parameters alone are not enough"
            )
        check_criterion(criterion)
        check_options(options)
        self.controller = BatchSizeController(batch_size, max_batch_size, **options)
        self.criterion = criterion if criterion is not None else NormTest(0.1)
        stateful = isinstance(self.criterion, StatefulCriterion)
        self._memory = cast(StatefulCriterion, self.criterion) if stateful else None
        if "workers" in self.criterion.needs:
            refuse_sparse(model, "WorkerNormTest")
        self.observer: Observer | WorkerObserver
        if observe_layers is not None and self.criterion.needs & {"workers", "loss"}:
            raise ValueError(f"{self.criterion!r} needs all layers: leave observe_layers out")
        if "workers" in self.criterion.needs:
            self.observer = WorkerObserver(model, process_group)
        else:
            self.observer = observe(
                model,
                coordinates="coordinates" in self.criterion.needs,
                inner_products=inner_products_for(self.criterion),
                fallback=fallback,
                process_group=process_group,
                layers=observe_layers,
                folded=folded,
            )
        self.ranks = self.observer.ranks
        if isinstance(self.observer, Observer):
            self.observer.owner = weakref.ref(self)
        self._hook: Any = None
        if is_data_parallel(model):
            self._hook = model.register_forward_pre_hook(self._average_in_last_micro_batch)
        self.statistics: GradientStatistics | None = None
        self.decision: Decision | None = None
        self.updated = False
        self.micro_batches = 0  # of the last complete batch
        self.updated_in_backward = False  # whether that leaves no gradients for step()
        self._counted = 0
        self._losses: list[Tensor] = []
        self._loss_scales: list[LossScale] = []
        self._loss_scale = 1.0
        self._scaler_possible = True  # until a step without one
        self._measured: GradientStatistics | None = None
        self._said = ""  # why the last test could not decide
        grads = (cast(Tensor, p.grad) for p in parameters_with_grad(model))
        self._zeroed = not any(grad.is_sparse or bool(local(grad).any()) for grad in grads)
        self._last_grad: weakref.ref[Tensor] | None = None
        self._note_grad()
        if self.controller.batch_size == 1 < self.controller.max_batch_size:
            logger.warning("batch_size=1 never grows: one sample has no variance; start from 2")

    def detach(self) -> None:
        """Gives the model back as it was."""
        self.observer.detach()
        if self._hook is not None:
            self._hook.remove()

    def check_groups(self, groups: Sequence[Mapping[str, Any]]) -> None:
        """The gradient that is tested must be the gradient that is followed.

        Raises:
            ValueError: a trainable parameter of the model in no group, or a parameter in a group
                that is not the model's.
        """
        held = {id(p) for group in groups for p in group["params"]}
        for name, p in self.observer.model.named_parameters():
            if p.requires_grad and id(p) not in held:
                raise ValueError(
                    f"parameter {name!r} is trainable but in none of the param groups: add it, "
                    "or freeze it with requires_grad_(False)"
                )
        own = {id(p) for p in self.observer.model.parameters()}
        strangers = [p for group in groups for p in group["params"] if id(p) not in own]
        if strangers:
            raise ValueError(
                f"a param group holds a parameter of shape {list(strangers[0].shape)} that does "
                "not belong to the model"
            )

    def _average_in_last_micro_batch(self, model: nn.Module, _: Any) -> None:
        """What `no_sync()` is for, without the user's having to know the last micro-batch.

        With a GradScaler they average in each: all of them must see an overflow to lower their
        scales together.
        """
        if torch.is_grad_enabled():
            last = self._counted + 1 >= self.controller.micro_batches()[1]
            model.require_backward_grad_sync = last or self._scaler_possible  # type: ignore[assignment]

    def complete(
        self,
        groups: Sequence[Mapping[str, Any]],
        loss: Any = None,
        loss_scale: LossScale | None = None,
    ) -> bool:
        """Called by step(): counts what was backpropagated; True when the batch is complete.

        Everything that is known to be wrong is raised here, before the weights change; what had
        been accumulated is then forgotten. So it is where the loss scale was too large.
        """
        observer = self.observer
        self.updated = False
        if observer.micro_batches == self._counted:
            raise RuntimeError(
                "step() without statistics: no backward pass has reached an observed layer since "
                "the last step()"
            )
        if self._counted == 0:
            self._check_zeroed()
        try:
            self._count_loss(loss, observer.micro_batches - self._counted)
            observer.check()
            if loss_scale is None:
                observer.check_unchanged()
            else:
                observer.accept_changes()  # a GradScaler writes to the gradients
            rows = observer.rows()
            if rows[-1] != rows[0]:
                raise RuntimeError(
                    f"micro-batches of {rows[0]} and {rows[-1]} samples in one batch of "
                    f"{self.controller.batch_size}: with mean losses their samples would have "
                    "different weights. Use AdaptiveDataLoader, without fetching ahead from it, or "
                    "drop_last=True"
                )
            self._counted = observer.micro_batches
            self._scaler_possible = loss_scale is not None
            if loss_scale is not None:
                self._loss_scales.append(loss_scale)
            if sum(rows) * self.ranks.size < self.controller.batch_size:
                return False
            if not self._settle_loss_scale():
                self.forget()
                return False
            self._check_followed(groups)
            if self.controller.due and "inner_products" in self.criterion.needs:
                # Now, since they may depend on the weights, which are about to change.
                self._measured = self.observer.statistics(None, self.gradient_scale)
        except Exception:
            self.forget()
            raise
        return True

    def _count_loss(self, loss: Any, micro_batches: int) -> None:
        if loss is not None:
            self._losses += [torch.as_tensor(loss).detach()] * micro_batches
        elif "loss" in self.criterion.needs:
            raise ValueError(
                f"{type(self.criterion).__name__} needs the loss: call opt.step(loss=loss)"
            )

    def _settle_loss_scale(self) -> bool:
        """Reads the scale of the complete batch; False if its gradients are of no use."""
        if not self._loss_scales:
            return True
        numbers = [scale for scale, _ in self._loss_scales] + [self._loss_scales[-1][1]]
        *scales, not_finite = torch.stack([t.double().view(()) for t in numbers]).tolist()
        self._loss_scale = scales[-1]
        if not_finite:
            return False
        if len(set(scales)) > 1:
            logger.warning("a batch is left out: the loss scale changed in the middle of it")
            return False
        return True

    def _check_followed(self, groups: Sequence[Mapping[str, Any]]) -> None:
        held = {id(p) for group in groups for p in group["params"]}
        gradients = False
        for p in parameters_with_grad(self.observer.model):
            gradients = True
            if id(p) not in held:
                name = parameter_name(self.observer.model, p)
                raise RuntimeError(
                    f"parameter {name!r} has a gradient but is in none of the param groups: call "
                    "opt.add_param_group after unfreezing it"
                )
            grad = cast(Tensor, p.grad)
            if grad.is_sparse and (self.ranks.size > 1 or grad.sparse_dim() != 1):
                name = parameter_name(self.observer.model, p)
                raise RuntimeError(
                    f"parameter {name!r} has a sparse gradient, which is followed on one process "
                    "and by rows only: build its layer with sparse=False"
                )
        if not gradients and not self.updated_in_backward:
            raise RuntimeError("step() without gradients: they were cleared after backward()")

    @property
    def _partial(self) -> bool:
        return isinstance(self.observer, Observer) and self.observer.partial

    @property
    def gradient_scale(self) -> float:
        """1/M: the mean over the M micro-batches of the batch; less the loss scale, if any."""
        return 1.0 / (self._counted * self._loss_scale)

    def finish(
        self,
        grad_norm_sq: Tensor | None = None,
        lr: float | None = None,
        reductions: Tensor | None = None,
        accumulators: dict[str, Tensor] | None = None,
        eps: dict[str, float] | None = None,
    ) -> None:
        """Tests the complete batch, if that is due, sets the next size and starts counting anew.

        Args:
            grad_norm_sq: this rank's share of ‖ḡ‖² where the update has computed it; otherwise
                read from `.grad`.
            lr: learning rate of the step, for criteria that look at it.
            reductions: of the coordinates, where the update has computed them.
            accumulators: by parameter name, for criteria that look at them; eps likewise.
            eps: see there.
        """
        controller = self.controller
        samples = sum(self.observer.rows()) * self.ranks.size
        try:
            if controller.due:
                statistics = self._measured
                if statistics is None:
                    if self._partial:  # the update has seen all parameters
                        grad_norm_sq = reductions = None
                    known = () if reductions is None else (reductions,)
                    scale = self.gradient_scale
                    statistics = self.observer.statistics(grad_norm_sq, scale, *known)
                if statistics.batch_size != samples:
                    raise RuntimeError(
                        f"{statistics.batch_size} samples on {self.ranks.size} processes, but "
                        f"{samples // self.ranks.size} on this one: averaged gradients would give "
                        "them different weights. Use AdaptiveDataLoader"
                    )
                statistics = replace(
                    statistics, loss=self._mean_loss(), lr=lr, accumulators=accumulators, eps=eps
                )
                self.decision = self._test(statistics)
                self.statistics = statistics
                controller.advance(self.decision, statistics, samples)
            else:
                controller.advance(None, None, samples)
            self.micro_batches = self._counted
        finally:
            self.forget()
        self.updated = True

    def _mean_loss(self) -> float | None:
        """Of all samples of the batch, if step() was given the losses."""
        if not self._losses:
            return None
        mean = torch.stack(self._losses).mean()
        if self.ranks.size > 1:
            grad = self._some_grad()
            mean = self.ranks.sum_(mean.to(grad.device if grad is not None else mean.device))
            mean /= self.ranks.size
        return float(mean)

    def _test(self, statistics: GradientStatistics) -> Decision:
        decision = checked(self.criterion.evaluate(statistics), self.criterion)
        if self._memory is not None:
            self._memory.record(statistics)
        if not decision.tested and statistics.batch_size > 1:
            reason = decision.reason
            if reason != self._said:  # not at every step
                logger.warning("the batch size stays at %d: %s", self.controller.batch_size, reason)
            self._said = reason
        else:
            self._said = ""
        return decision

    def forget(self) -> None:
        """Starts counting anew, with a new batch; the gradients are to be zeroed before a step."""
        self.observer.reset()
        self.controller.ended += 1
        self._counted = 0
        self._losses = []
        self._loss_scales = []
        self._loss_scale = 1.0
        self._measured = None
        self._zeroed = False
        self._note_grad()

    def may_zero(self) -> bool:
        """Called by zero_grad(): False while a batch is being accumulated.

        After a backward pass without a step the gradients are useless: the batch is left out.
        """
        if self.observer.micro_batches > self._counted:
            if self._counted:
                logger.warning(
                    "a batch is left out: zero_grad() instead of step() after backward pass %d "
                    "(if it was for another model's loss: requires_grad_(False) of this one "
                    "meanwhile)",
                    self.observer.micro_batches,
                )
            self.forget()
        elif self._counted:
            return False
        self._zeroed = True
        return True

    def _some_grad(self) -> Tensor | None:
        return next((p.grad for p in parameters_with_grad(self.observer.model)), None)

    def _note_grad(self) -> None:
        grad = self._some_grad()
        self._last_grad = None if grad is None else weakref.ref(grad)

    def _check_zeroed(self) -> None:
        last = self._last_grad() if self._last_grad is not None else None
        if not self._zeroed and last is not None and self._some_grad() is last:
            raise RuntimeError(
                "the gradients still hold another batch: call opt.zero_grad() after opt.step(), "
                "and before the first batch where there have been gradients before"
            )

    def state_dict(self) -> dict[str, Any]:
        """The state of controller and criterion."""
        state: dict[str, Any] = {"controller": self.controller.state_dict()}
        if self._memory is not None:
            if isinstance(self._memory, Averaged):
                self._memory.reserve(dict(self.observer.parameters()))
            state["criterion"] = self._memory.state_dict()
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores `state_dict()`; what had been accumulated is forgotten."""
        self.restore(state)
        self.forget()

    def restore(self, state: dict[str, Any]) -> None:
        """Restores `state_dict()`, but not what had been accumulated, as it may be taken back."""
        self.controller.check_state_dict(state["controller"])
        if self._memory is not None and "criterion" in state:
            self._memory.load_state_dict(state["criterion"])
        self.controller.load_state_dict(state["controller"])


def named_trainable(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """The parameters that an optimizer of this model must hold."""
    return ((name, p) for name, p in model.named_parameters() if p.requires_grad)
