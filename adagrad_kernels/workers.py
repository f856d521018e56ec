"""Mean gradients of micro-batches, as they come out of the backward pass, in place of samples'."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from . import faults
from .distributed import (
    Group,
    Ranks,
    check_same_gradient,
    data_parallel_group,
    is_sharded,
    sharded_modules,
)
from .eager import outside_graphs
from .gradient_watch import GradientWatch, at_the_end
from .statistics import GradientStatistics


class WorkerObserver:
    """Measures ‖·‖² of what each backward pass adds to the gradient, for `WorkerNormTest`.

    One hook a parameter, told of the gradient before it is accumulated or averaged over
    processes. Layers stay as they are. While a module of `fully_shard` runs, its parameters are
    whole tensors of their own, which live as long as the model: these have the hooks.

    Args:
        model: any model; dimension 0 of the first tensor it is called with counts the samples.
        process_group: see `observe`.

    Raises:
        ValueError: a model without trainable parameters.
    """

    def __init__(self, model: nn.Module, process_group: Group | None = None) -> None:
        if not any(p.requires_grad for p in model.parameters()):
            raise ValueError("the model has no trainable parameters: there is nothing to observe")
        self.model = model
        self.ranks = Ranks(process_group or data_parallel_group(model))
        self._handles: list[RemovableHandle] = [
            model.register_forward_pre_hook(self._called, with_kwargs=True)
        ]
        self._watched: set[nn.Parameter] = set()
        self._measured: set[int] = set()  # numbers of those that ever had a gradient
        self._sharded: set[nn.Module] = set()
        self._task = -1  # the backward pass that _norms belong to
        self._samples = 0
        self._gradients = GradientWatch()
        self.reset()

    def _called(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not torch.is_grad_enabled():
            return
        self._watch(model)
        for module in sharded_modules(model):
            if module not in self._sharded:
                self._sharded.add(module)
                if module is not model:
                    # fully_shard's own hook comes before it
                    self._handles.append(module.register_forward_pre_hook(self._unsharded))
        first = _first_tensor((*args, *kwargs.values()))
        if first is None:
            raise ValueError("the model was called without a tensor whose rows count the samples")
        self._samples = first.shape[0]
        self._sizes.add(self._samples)
        self._calls += 1

    def _unsharded(self, module: nn.Module, _: Any) -> None:
        if torch.is_grad_enabled():
            self._watch(module)

    def _watch(self, module: nn.Module) -> None:
        """Hooks for parameters that have none yet; some may have been unfrozen."""
        for p in module.parameters():
            if p.requires_grad and p not in self._watched and not is_sharded(p):
                hook = partial(self._take, len(self._watched))
                self._watched.add(p)
                self._handles.append(p.register_hook(hook))

    @torch.no_grad()
    def _take(self, number: int, grad: Tensor) -> None:
        """The gradient of the parameter with this number in one backward pass."""
        self._measured.add(number)
        task = torch._C._current_graph_task_id()
        if task != self._task:
            self._task = task
            if self._micro_batches and self._gradients.changed():
                self._fault = faults.CLEARED
            if self.ranks.size == 1:  # otherwise they are still to be averaged
                at_the_end(self._note_gradients)
            self._micro_batches.append((self._samples, []))
        self._micro_batches[-1][1].append(torch.linalg.vector_norm(grad, dtype=torch.float64))

    @outside_graphs
    def _note_gradients(self) -> None:
        self._gradients.note(p for _, p in self.parameters())

    def check_unchanged(self) -> None:
        """Raises RuntimeError if the gradients have been changed since the backward pass."""
        self._gradients.check()

    def accept_changes(self) -> None:
        """The gradients have been written to since the backward pass, as they may be."""
        self._gradients.accept()

    @property
    def micro_batches(self) -> int:
        """Backward passes since the last reset."""
        return len(self._micro_batches)

    def rows(self) -> list[int]:
        """The number of samples of each micro-batch since the last reset."""
        return [samples for samples, _ in self._micro_batches]

    def check(self) -> None:
        """Raises RuntimeError where it is not known whose gradient was measured.

        After several backward passes of one forward pass, gradients that were cleared between
        them, forward passes of other sizes without one.
        """
        if self._fault:
            raise RuntimeError(self._fault)
        if self.micro_batches < self._calls and len(self._sizes) > 1:
            raise RuntimeError(
                f"the model was called with {' and '.join(map(str, sorted(self._sizes)))} samples, "
                "and not each time for a backward pass of its own, so that the number of samples "
                "in the batch is not known: call it once for each backward pass, and evaluate "
                "under torch.no_grad()"
            )
        if self.micro_batches > self._calls:
            raise RuntimeError(
                "more backward passes than calls of the model: run backward() once for each. With "
                "torch.utils.checkpoint, use use_reentrant=False"
            )

    def parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """(name, parameter) of the trainable parameters."""
        return ((name, p) for name, p in self.model.named_parameters() if p.requires_grad)

    def reset(self) -> None:
        """Forgets what was measured, for the next step."""
        self._micro_batches: list[tuple[int, list[Tensor]]] = []
        self._calls = 0
        self._sizes: set[int] = set()  # of the calls
        self._gradients.forget()
        self._fault = ""

    def detach(self) -> None:
        """Removes the hooks."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self.reset()

    def statistics(
        self, grad_norm_sq: Tensor | None = None, gradient_scale: float = 1.0
    ) -> GradientStatistics:
        """The variance between micro-batches, as that of one sample; on all ranks together.

        Arguments as `Observer.statistics`. With J workers' gradients g_j of N/J samples,
        tr Σ̂ = N/J · (Σ_j‖g_j‖² − J‖ḡ‖²)/(J − 1); NaN for J = 1.

        Raises:
            RuntimeError: no backward pass, gradients that were not measured, ranks whose gradients
                have not been averaged, or what `check` raises.
        """
        if not self._micro_batches:
            raise RuntimeError("no statistics: no backward pass since the last reset()")
        self.check()
        grads = [p.grad for _, p in self.parameters() if p.grad is not None]
        if len(grads) > len(self._measured):
            raise RuntimeError(
                f"{len(grads) - len(self._measured)} parameters got a gradient that was not "
                "measured: call the modules that hold them, inside the model's own call"
            )
        if grad_norm_sq is None:
            grad_norm_sq = self.ranks.norm_sq(grads) * gradient_scale**2
        norms = torch.stack([norm for _, norms in self._micro_batches for norm in norms])
        pooled = self.ranks.pool(norms.square().sum(), grad_norm_sq, sum(self.rows())).tolist()
        sum_sq, mean_norm_sq, samples, shares_sq = pooled
        if not any(is_sharded(grad) for grad in grads):
            check_same_gradient(self.ranks, mean_norm_sq, shares_sq)
        # g_j is J times what worker j added to the gradient, 1/W of what it measured.
        sum_sq *= (self.micro_batches * gradient_scale) ** 2
        return GradientStatistics.between_workers(
            self.micro_batches * self.ranks.size, int(samples), sum_sq, mean_norm_sq, gradient_scale
        )


def _first_tensor(found: Any) -> Tensor | None:
    """The first one with a dimension, in nested sequences and dictionaries."""
    if isinstance(found, Tensor):
        return found if found.dim() else None
    if isinstance(found, Mapping):
        found = found.values()
    elif not isinstance(found, list | tuple):
        return None
    return next((t for t in map(_first_tensor, found) if t is not None), None)
