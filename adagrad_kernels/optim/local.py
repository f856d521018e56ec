"""LocalAdaptiveBatch: local steps between synchronisations, with adaptive batch sizes."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..batch_size import BatchSizeController
from ..criteria import Decision, StatefulCriterion, VarianceTest, WorkerNormTest
from ..criteria.averaged import Averaged
from ..distributed import Group, Ranks
from ..eager import outside_graphs
from ..statistics import GradientStatistics
from .cycled import check_state
from .work import refuse_sparse

logger = logging.getLogger("adagrad_kernels")


class LocalAdaptiveBatch:
    """Local gradient methods with adaptive batch sizes, around any torch optimizer.

    Each of W processes takes `local_steps` steps of its own on its own samples, without any
    communication; then they average their parameters, and the worker-level norm test on the last
    local gradients g_r (of b samples each) sets the batch size of the next round:

        tr Σ̂ = b/(W − 1) · Σ_r‖g_r − ḡ‖²,    b⁺ = ⌈tr Σ̂ / (W η² ‖ḡ‖²)⌉ on each process

    The loop is that of `AdAdaGrad`, with a plain model (no `DistributedDataParallel`; the same
    initial weights everywhere) and an `AdaptiveDataLoader`. Batch sizes are those of all processes
    together. The optimizer's own state stays local. End training with a synchronisation: after a
    multiple of `local_steps` steps.

    Args:
        model: any model; its layers stay as they are.
        optimizer: any `torch.optim.Optimizer` of the model's parameters.
        local_steps: H ≥ 1, steps between synchronisations.
        criterion: `WorkerNormTest(0.1)` by default, also `Averaged`.
        batch_size: first global batch size.
        max_batch_size: its cap.
        process_group: the processes, by default all.
        **controller: `growth_limit` and the other options of `BatchSizeController`, except
            `every` (each synchronisation tests) and `lr_policy`.

    Attributes:
        statistics: those of the last synchronisation, None before.
        decision: likewise.
        updated: whether the last step() completed a local batch and updated the weights.
        synchronised: whether it also averaged them.
        micro_batches: those of the last complete batch, on this process; 0 before.

    Raises:
        ValueError: local_steps < 1, what `BatchSizeController` raises, or a criterion that needs
            more than the mean gradients of workers.

    Source:
        arXiv 2406.13936.

    Example:
        >>> model = nn.Linear(4, 1)
        >>> sgd = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> opt = LocalAdaptiveBatch(model, sgd, local_steps=2, batch_size=8)
        >>> for _ in range(2):
        ...     model(torch.randn(8, 4)).square().mean().backward()
        ...     opt.step(); opt.zero_grad()
        >>> opt.synchronised, opt.decision.reason  # one process has nobody to compare with
        (True, 'one micro-batch on one process has no variance between workers: ...')
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        local_steps: int,
        criterion: VarianceTest | Averaged | None = None,
        batch_size: int = 8,
        max_batch_size: int = 60000,
        process_group: Group | None = None,
        **controller: Any,
    ) -> None:
        if local_steps < 1:
            raise ValueError(f"local_steps must be at least 1, got {local_steps}")
        for name in ("every", "lr_policy"):
            if name in controller:
                raise ValueError(f"LocalAdaptiveBatch has no option {name}")
        criterion = criterion if criterion is not None else WorkerNormTest(0.1)
        if criterion.needs != {"workers"}:
            raise ValueError(
                f"LocalAdaptiveBatch measures mean gradients of workers only, which {criterion!r} "
                "does not take: use WorkerNormTest"
            )
        refuse_sparse(model, "LocalAdaptiveBatch")
        self.model, self.optimizer, self.local_steps = model, optimizer, local_steps
        self.criterion = criterion
        self.controller = BatchSizeController(batch_size, max_batch_size, **controller)
        self.ranks = Ranks(process_group)
        self.statistics: GradientStatistics | None = None
        self.decision: Decision | None = None
        self.updated = self.synchronised = False
        self.micro_batches = 0
        self._micro_batches = 0
        self._left = self._gradients()

    @property
    def batch_size(self) -> int:
        """Global batch size of the next batch (of this one, while it is accumulated)."""
        return self.controller.batch_size

    @property
    def samples(self) -> int:
        """Samples of all updates so far, of all processes."""
        return self.controller.samples

    @outside_graphs
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Updates when the local batch is complete; every `local_steps` updates synchronises.

        Raises:
            RuntimeError: no gradients; what had been accumulated is then forgotten.
        """
        result = None
        if closure is not None:
            result = closure()
        self.updated = self.synchronised = False
        grads = [p.grad for p in self.model.parameters() if p.grad is not None]
        if not grads:
            self._begin()
            raise RuntimeError("step() without gradients: call backward() before it")
        self._micro_batches += 1
        size, count = self.controller.micro_batches()
        if self._micro_batches < count:
            self._left = self._gradients()
            return result
        if count > 1:
            torch._foreach_mul_(grads, 1 / count)
        self.micro_batches = count
        self._begin()
        self.synchronised = (self.controller.steps + 1) % self.local_steps == 0
        decision = self._test(grads, size * count) if self.synchronised else None
        self.optimizer.step()
        if self.synchronised:
            self._average()
        self.controller.advance(decision)
        self.updated = True
        self._left = self._gradients()
        return result

    def _begin(self) -> None:
        """Starts counting anew, with a new batch."""
        self._micro_batches = 0
        self.controller.ended += 1

    def _gradients(self) -> list[tuple[int, int] | None]:
        """What tells whether there has been a backward pass since."""
        grads = (p.grad for p in self.model.parameters())
        return [None if grad is None else (id(grad), grad._version) for grad in grads]

    @torch.no_grad()
    def _test(self, grads: list[Tensor], samples: int) -> Decision:
        """Compares the local gradients of all processes: an all_reduce as large as the model."""
        workers = self.ranks.size
        mean = torch.cat([grad.flatten() for grad in grads])
        own = torch.linalg.vector_norm(mean, dtype=torch.float64).square()
        self.ranks.sum_(mean).div_(workers)
        norm_sq = torch.linalg.vector_norm(mean, dtype=torch.float64).square()
        sum_sq, mean_norm_sq = torch.stack([self.ranks.sum_(own), norm_sq]).tolist()
        self.statistics = GradientStatistics.between_workers(workers, samples, sum_sq, mean_norm_sq)
        self.decision = self.criterion.evaluate(self.statistics)
        if isinstance(self.criterion, StatefulCriterion):
            self.criterion.record(self.statistics)
        return self.decision

    def _average(self) -> None:
        if self.ranks.size > 1:
            # Here, since a torch without distributed does not have it.
            from torch.distributed.algorithms.model_averaging import utils

            utils.average_parameters(iter(self.model.parameters()), self.ranks.group)  # type: ignore[arg-type]

    @outside_graphs
    def zero_grad(self, set_to_none: bool = True) -> None:
        """As in torch, but does nothing while a batch is being accumulated.

        After a backward pass without a step the gradients are useless: the batch is left out.
        """
        if self._gradients() != self._left:
            if self._micro_batches:
                logger.warning("a batch is left out: zero_grad() instead of step()")
            self._begin()
        elif self._micro_batches:
            return
        self.optimizer.zero_grad(set_to_none)
        self._left = self._gradients()

    def state_dict(self) -> dict[str, Any]:
        """The inner optimizer's state, of this process, and the batch size with its history."""
        state = {
            "optimizer": self.optimizer.state_dict(),
            "controller": self.controller.state_dict(),
        }
        if isinstance(self.criterion, StatefulCriterion):
            state["criterion"] = self.criterion.state_dict()
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores `state_dict()`; gradients that had been accumulated are cleared.

        Raises:
            ValueError: something else, such as the state of the inner optimizer alone.
        """
        check_state(self, state_dict, "optimizer", "controller")
        self.optimizer.load_state_dict(state_dict["optimizer"])
        self.controller.load_state_dict(state_dict["controller"])
        if isinstance(self.criterion, StatefulCriterion):
            self.criterion.load_state_dict(state_dict["criterion"])
        self._begin()
        self.zero_grad()
