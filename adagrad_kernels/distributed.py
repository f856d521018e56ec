"""Several processes: which of them share a step, and how their measurements are pooled.

Under data parallelism the gradient of a step is the mean of the gradients on W ranks. What
sample i added to it is c_i, 1/W of what it added on its own rank before the ranks averaged. With
g_i = N·c_i and N the samples of all ranks, the statistics are those of one process that has
all samples. Raw sums are pooled, in one `all_reduce` of a few numbers; every rank gets the same
bits and takes the same decision.

Nothing here communicates, or costs anything, where there is one process.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

if dist.is_available():
    # Functions there have the default group among their defaults: imported later, as by
    # DistributedDataParallel, they would keep it, and gloo's threads, beyond
    # destroy_process_group(), and a thread at work while the interpreter ends aborts the process.
    import torch.distributed.nn

from . import ops

Group = Any
"""A `torch.distributed.ProcessGroup`, which builds of torch without distributed do not have."""


def uses_processes() -> bool:
    """Whether `torch.distributed` is in use, if only with one process."""
    return dist.is_available() and dist.is_initialized()


class Ranks:
    """The processes that share a step.

    Args:
        group: None for all processes (one, while `torch.distributed` is not initialised).
    """

    def __init__(self, group: Group | None = None) -> None:
        self.group = group

    @property
    def size(self) -> int:
        """W, the number of processes."""
        if not uses_processes():
            return 1
        return dist.get_world_size(self.group)

    @property
    def index(self) -> int:
        """The number of this process, from 0."""
        return dist.get_rank(self.group) if self.size > 1 else 0

    def sum_(self, t: Tensor) -> Tensor:
        """Replaces a tensor by its sum over the ranks, the same bits on all."""
        if self.size > 1:
            dist.all_reduce(t, group=self.group)
        return t

    def gather(self, t: Tensor) -> Tensor:
        """The tensors of all ranks, of one shape, joined along dimension 0."""
        if self.size == 1:
            return t
        parts = [torch.empty_like(t) for _ in range(self.size)]
        dist.all_gather(parts, t.contiguous(), group=self.group)
        return torch.cat(parts)

    def barrier(self) -> None:
        """Waits for all ranks."""
        if self.size > 1:
            dist.barrier(group=self.group)

    def copies(self, t: Tensor) -> int:
        """How many ranks hold what this rank holds of a tensor: all, or fewer of a `DTensor`."""
        if not is_sharded(t):
            return self.size
        mesh, copies = t.device_mesh, 1  # type: ignore[attr-defined]
        for dimension, placement in enumerate(t.placements):  # type: ignore[attr-defined]
            if placement.is_replicate():
                copies *= mesh.size(dimension)
        return copies * (self.size // mesh.size())

    def norm_sq(self, tensors: Sequence[Tensor]) -> Tensor:
        """This rank's share of Σ‖t‖², float64: the sum of all ranks' shares is the whole."""
        alike: dict[int, list[Tensor]] = {}
        for t in tensors:
            alike.setdefault(self.copies(t), []).append(local(t))
        norms = [
            _norm_sq(found) if copies == 1 else _norm_sq(found) / copies
            for copies, found in alike.items()
        ]
        return norms[0] if len(norms) == 1 else torch.stack(norms).sum()

    def pool(self, sum_norms_sq: Tensor, norm_share: Tensor, samples: int) -> Tensor:
        """[Σ‖c_i‖² before averaging, ‖ḡ‖², N, Σ_r share_r²] over all ranks, in float64."""
        share = norm_share.view(())
        own = torch.stack([sum_norms_sq, share, torch.full_like(share, samples), share.square()])
        return self.sum_(own)


def data_parallel_group(model: nn.Module) -> Group | None:
    """The process group of a `DistributedDataParallel`, None for any other module."""
    return model.process_group if isinstance(model, _DDP) else None


def is_data_parallel(model: nn.Module) -> bool:
    """Whether the model is wrapped in `DistributedDataParallel`."""
    return isinstance(model, _DDP)


def is_sharded(t: Tensor) -> bool:
    """Whether this is a `DTensor`, of which a rank may hold a part only."""
    return type(t) not in (Tensor, nn.Parameter) and hasattr(t, "device_mesh")


def local(t: Tensor) -> Tensor:
    """What this rank holds of a tensor."""
    if t.layout == torch.sparse_coo:
        return t.coalesce().values()
    return t.to_local() if is_sharded(t) else t  # type: ignore[attr-defined]


def whole(t: Tensor) -> Tensor:
    """The whole of a tensor; all ranks must ask for it."""
    return t.full_tensor() if is_sharded(t) else t  # type: ignore[attr-defined]


def sharded_modules(model: nn.Module) -> list[nn.Module]:
    """The modules that `fully_shard` was applied to."""
    if not dist.is_available():
        return []
    from torch.distributed.fsdp import FSDPModule  # not in a torch without distributed

    return [module for module in model.modules() if isinstance(module, FSDPModule)]


def check_same_gradient(ranks: Ranks, norm_sq: float, sum_shares_sq: float) -> None:
    """That the ranks follow one gradient.

    Args:
        ranks: they share the step.
        norm_sq: Σ_r share_r, with share_r = ‖ḡ_r‖²/W.
        sum_shares_sq: Σ_r share_r². W times it is norm_sq² where all shares are the same.

    Raises:
        RuntimeError: on every rank alike.
    """
    if ranks.size * sum_shares_sq > norm_sq**2 * (1 + 1e-9):
        raise RuntimeError(
            "the gradients differ between the ranks: nothing has averaged them. Wrap the model in "
            "DistributedDataParallel (outside its no_sync() at the last micro-batch); ranks that "
            "train models of their own need process_group=torch.distributed.new_subgroups(1)[0]"
        )


_DDP = nn.parallel.DistributedDataParallel


def _norm_sq(tensors: list[Tensor]) -> Tensor:
    if all(type(t) is Tensor for t in tensors):
        return ops.grad_norm_sq(tensors)
    norms = [torch.linalg.vector_norm(t, dtype=torch.float64) for t in tensors]
    return torch.stack(norms).square().sum()  # subclasses that kernels cannot read
