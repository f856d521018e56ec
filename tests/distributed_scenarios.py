"""What processes with copies of the parameters do: `DistributedDataParallel`, local steps."""

import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from distributed_training import (
    CLIP,
    KINDS,
    MICRO_BATCHES,
    batch,
    figures,
    optimizer,
    part,
    raised,
    train,
)
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.distributed.tensor.debug import CommDebugMode
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint
from training import dataset, network, weights

import adagrad_kernels as ak


def data_parallel(rank: int, world: int) -> dict[str, Any]:
    return {
        "one backward": _one_backward(rank, world),
        "compiled": _one_backward(rank, world, compiled=True),
        "micro-batches": _micro_batches(rank, world),
        "workers": _workers(rank, world),
        "training": {
            (kind, wrapped): train_data_parallel(kind, wrapped)
            for kind in KINDS
            for wrapped in (True, False)
        },
        "coordinates": train_data_parallel(
            "AdAdaGrad", True, ak.CoordinateNormTest(2.0, "quantile")
        ),
        "inner products": train_data_parallel("AdAdaGrad", True, ak.InnerProductTest(0.3)),
        "all inner products": train_data_parallel(
            "AdAdaGrad", True, ak.InnerProductTest(0.3, every_sample=True)
        ),
        "loss": train_data_parallel("AdaptiveBatch", True, ak.CABS()),
        "clipped": {
            kind: train_data_parallel(kind, True, max_grad_norm=CLIP) for kind in KINDS
        },
        "collectives": {
            name: _collectives(make, **options) for name, (make, options) in COUNTED.items()
        },
        "unused": _unused_parameters(rank, world),
        "overflow": _overflow(rank, world),
        "variants": {
            "checkpoint": _variant(rank, world, Checkpointed()),
            "static graph": _variant(rank, world, network(), static_graph=True),
            "bucket views": _variant(rank, world, network(), gradient_as_bucket_view=True),
        },
        "local": _local(),
        "alone": _alone(rank),
        "not averaged": _not_averaged(rank, world),
        "unequal": _unequal(rank),
        "unmeasured": _unmeasured(rank, world),
    }  # fmt: skip


def _one_backward(rank: int, world: int, compiled: bool = False) -> dict[str, Any]:
    ddp = DistributedDataParallel(network())
    observer = ak.observe(ddp, coordinates=True, inner_products=True)
    x, y = (part(t, rank, world) for t in batch(12))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the compiler's, of itself
        forward = torch.compile(ddp, backend="aot_eager") if compiled else ddp
        F.mse_loss(forward(x), y).backward()
    found = figures(observer.statistics())
    found["names"] = [record.name for record in observer.coverage()]
    observer.detach()
    return found


def _micro_batches(rank: int, world: int) -> dict[str, Any]:
    """Averaged after each; the module itself is observed."""
    model = network()
    ddp = DistributedDataParallel(model)
    observer = ak.observe(model, coordinates=True)
    for micro_batch in zip(*(t.chunk(MICRO_BATCHES) for t in batch(24)), strict=True):
        x, y = (part(t, rank, world) for t in micro_batch)
        F.mse_loss(ddp(x), y).backward()
    return figures(observer.statistics(gradient_scale=1 / MICRO_BATCHES))


def _workers(rank: int, world: int) -> dict[str, Any]:
    ddp = DistributedDataParallel(network())
    opt = optimizer("AdAdaGrad", ddp, criterion=ak.WorkerNormTest(0.5), batch_size=24)
    opt.controller.limit_micro_batches(24 // MICRO_BATCHES // world, world)
    for micro_batch in zip(*(t.chunk(MICRO_BATCHES) for t in batch(24)), strict=True):
        x, y = (part(t, rank, world) for t in micro_batch)
        F.mse_loss(ddp(x), y).backward()
        opt.step()
        opt.zero_grad()
    assert opt.updated
    return figures(opt.statistics)


def train_data_parallel(
    kind: str, wrapped: bool, criterion: Any = None, **options: Any
) -> dict[str, Any]:
    model = network()
    ddp = DistributedDataParallel(model)
    averaged = 0

    def count(state: Any, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
        nonlocal averaged
        averaged += 1
        return allreduce_hook(state, bucket)

    ddp.register_comm_hook(None, count)
    criterion = criterion or ak.NormTest(0.7)
    opt = optimizer(kind, ddp if wrapped else model, criterion=criterion, **options)
    record = train(ddp, opt, micro=16 // dist.get_world_size())
    return {**record, "weights": weights(model), "averaged": averaged}


COUNTED: dict[str, tuple[Callable[[], Any], dict[str, Any]]] = {
    "norm": (lambda: ak.NormTest(0.7), {}),
    "every second": (lambda: ak.NormTest(0.7), {"every": 2}),
    "coordinates": (lambda: ak.CoordinateNormTest(2.0, "quantile"), {}),
    "inner products": (lambda: ak.InnerProductTest(0.3), {}),
    "workers": (lambda: ak.WorkerNormTest(0.7), {}),
    "clipped": (lambda: ak.NormTest(0.7), {"max_grad_norm": CLIP}),
}


def _collectives(make: Callable[[], Any], **options: Any) -> list[dict[str, int]]:
    """Of every step() of four batches of two micro-batches, by name; backward passes aside."""
    model = DistributedDataParallel(network())
    options = {"batch_size": 16, "max_batch_size": 16, **options}
    opt = optimizer("AdAdaGrad", model, criterion=make(), **options)
    opt.controller.limit_micro_batches(4, dist.get_world_size())
    counts = []
    for k in range(8):
        x, y = (part(t, k % 3, 3) for t in batch(12))
        F.mse_loss(model(x), y).backward()
        with CommDebugMode() as mode:
            opt.step()
        opt.zero_grad()
        counts.append({str(op): number for op, number in mode.get_comm_counts().items()})
    return counts


class WithUnused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.used, self.unused = network(), nn.Linear(5, 2).double()

    def forward(self, x: Tensor) -> Tensor:
        return self.used(x)


def _unused_parameters(rank: int, world: int) -> dict[str, Any]:
    ddp = DistributedDataParallel(WithUnused(), find_unused_parameters=True)
    observer = ak.observe(ddp)
    x, y = (part(t, rank, world) for t in batch(12))
    for _ in range(2):  # the reducer rebuilds its buckets after the first
        observer.reset()
        ddp.zero_grad()
        F.mse_loss(ddp(x), y).backward()
    return figures(observer.statistics())


def _overflow(rank: int, world: int) -> dict[str, Any]:
    """In the first micro-batch, on one rank only; then a batch that is fine."""
    model = network()
    ddp = DistributedDataParallel(model)
    opt = optimizer("AdAdaGrad", ddp, batch_size=16)
    opt.controller.limit_micro_batches(4, world)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    found: dict[str, Any] = {"initial": weights(model), "weights": [], "updated": []}
    for factor in (torch.inf if rank == 0 else 1.0, 1.0, 1.0, 1.0):
        x, y = (part(t, rank, world) for t in batch(8))
        scaler.scale(F.mse_loss(ddp(x), y) * factor).backward()
        scaler.step(opt)
        scaler.update()
        opt.zero_grad()
        found["updated"].append(opt.updated)
        found["weights"].append(weights(model))
    found["scale"] = scaler.get_scale()
    return found


class Checkpointed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = network()

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.net, x, use_reentrant=False)


def _variant(rank: int, world: int, model: nn.Module, **options: Any) -> dict[str, Any]:
    ddp = DistributedDataParallel(model, **options)
    observer = ak.observe(ddp)
    x, y = (part(t, rank, world) for t in batch(12))
    F.mse_loss(ddp(x), y).backward()
    return figures(observer.statistics())


LOCAL_STEPS = 3


def _local() -> dict[str, Any]:
    """Trains with local steps, until a synchronisation."""
    model = network()
    opt = ak.LocalAdaptiveBatch(
        model, torch.optim.SGD(model.parameters(), lr=0.1), LOCAL_STEPS,
        criterion=ak.WorkerNormTest(0.7), batch_size=4, max_batch_size=120,
    )  # fmt: skip
    loader = ak.AdaptiveDataLoader(dataset(), opt, max_micro_batch_size=8, seed=7)
    record: dict[str, Any] = {"sizes": [], "ratios": []}
    while True:
        for x, y in loader:
            size = opt.batch_size
            F.mse_loss(model(x), y).backward()
            opt.step()
            opt.zero_grad()
            if opt.updated:
                record["sizes"].append(size)
            if opt.synchronised:
                record["ratios"].append(opt.decision.ratio)
                if opt.samples >= 600:
                    return {**record, "weights": weights(model)}


def _alone(rank: int) -> dict[str, Any]:
    """Every rank trains a model of its own."""
    own, _ = dist.new_subgroups(1)
    model = network()
    observer = ak.observe(model, process_group=own)
    x, y = batch(4 + rank)
    F.mse_loss(model(x), y).backward()
    return figures(observer.statistics())


def _not_averaged(rank: int, world: int) -> str:
    model = network()
    opt = optimizer("AdAdaGrad", model, batch_size=12)
    x, y = (part(t, rank, world) for t in batch(12))
    F.mse_loss(model(x), y).backward()
    return raised(opt.step)


def _unequal(rank: int) -> str:
    ddp = DistributedDataParallel(network())
    opt = optimizer("AdAdaGrad", ddp, batch_size=8)
    x, y = batch(4 + 2 * rank)
    F.mse_loss(ddp(x), y).backward()
    return raised(opt.step)


class UsesWeightTwice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = network()

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x) + F.linear(x, self.net[0].weight)[:, :2]


def _unmeasured(rank: int, world: int) -> str:
    ddp = DistributedDataParallel(UsesWeightTwice())
    observer = ak.observe(ddp)
    x, y = (part(t, rank, world) for t in batch(12))
    F.mse_loss(ddp(x), y).backward()
    return raised(observer.statistics)
