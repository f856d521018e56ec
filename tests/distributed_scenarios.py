"""What the processes of the distributed tests do, and the same on one process.

Everything is float64 and drawn from fixed seeds: the tests compare with one process that has all
the samples.
"""

import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint
from torch.utils.data import TensorDataset
from training import network, weights

import adagrad_kernels as ak

KINDS = ("AdAdaGrad", "AdAdaGradNorm", "AdaptiveBatch")
MICRO_BATCHES = 3


def batch(samples: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(samples, 5, generator=generator, dtype=torch.float64)
    return x, torch.randn(samples, 2, generator=generator, dtype=torch.float64)


def dataset() -> TensorDataset:
    """A regression problem that is noise beyond a point: batches must grow."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(500, 5, generator=generator, dtype=torch.float64)
    noise = torch.randn(500, 2, generator=generator, dtype=torch.float64)
    return TensorDataset(x, x[:, 1:3] + noise)


def uneven() -> nn.Sequential:
    """A network whose parameters do not divide among 2 ranks; one has a single row."""
    torch.manual_seed(4)
    return nn.Sequential(
        nn.Linear(5, 3), nn.Tanh(), nn.Linear(3, 1), nn.Tanh(), nn.Linear(1, 2)
    ).double()


def optimizer(kind: str, model: nn.Module, **options: Any) -> Any:
    options = {
        "criterion": ak.NormTest(0.7), "batch_size": 4, "max_batch_size": 120, **options
    }  # fmt: skip
    if kind == "AdaptiveBatch":
        inner = torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=0.01)
        return ak.AdaptiveBatch(model, inner, **options)
    return getattr(ak, kind)(model, lr=0.1, weight_decay=0.01, **options)


def train(model: nn.Module, opt: Any, micro: int, samples: int = 900) -> dict[str, Any]:
    """Trains as a user does; what one process and several must agree on."""
    loader = ak.AdaptiveDataLoader(dataset(), opt, max_micro_batch_size=micro, seed=7)
    record: dict[str, Any] = {"sizes": [], "ratios": [], "losses": [], "norms": []}
    while loader.samples < samples:
        for x, y in loader:
            loss = F.mse_loss(model(x), y)
            loss.backward()
            opt.step(loss=loss)
            opt.zero_grad()
            if opt.updated:
                s = opt.statistics
                record["sizes"].append(s.batch_size)
                record["ratios"].append(opt.decision.ratio)
                record["losses"].append(s.loss)
                record["norms"].append(s.mean_norm_sq)
    record["samples"] = opt.samples
    return record


def part(t: Tensor, rank: int, world: int) -> Tensor:
    return t.chunk(world)[rank]


def raised(function: Callable[[], Any]) -> str:
    """The message of the error that the function must raise."""
    try:
        function()
    except (RuntimeError, ValueError) as error:
        return str(error)
    return "nothing was raised"


def figures(s: ak.GradientStatistics) -> dict[str, Any]:
    return {
        "batch_size": s.batch_size,
        "workers": s.workers,
        "grad_norm_sq": s.grad_norm_sq,
        "variance_trace": s.variance_trace,
        "noise_scale": s.noise_scale,
        "sample_norms_sq": None if s.workers else s.sample_norms_sq,
        "coordinate_variance": s.coordinate_variance,
        "coordinate_mean": s.coordinate_mean,
        "inner_products": s.inner_products,
        "inner_product_variance": s.inner_product_variance,
    }


# DistributedDataParallel


def data_parallel(rank: int, world: int) -> dict[str, Any]:
    return {
        "one backward": _one_backward(rank, world),
        "micro-batches": _micro_batches(rank, world),
        "workers": _workers(rank, world),
        "training": {
            (kind, wrapped): _train_data_parallel(kind, wrapped)
            for kind in KINDS
            for wrapped in (True, False)
        },
        "coordinates": _train_data_parallel(
            "AdAdaGrad", True, ak.CoordinateNormTest(2.0, "quantile")
        ),
        "inner products": _train_data_parallel("AdAdaGrad", True, ak.InnerProductTest(0.3)),
        "loss": _train_data_parallel("AdaptiveBatch", True, ak.CABS()),
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


def _one_backward(rank: int, world: int) -> dict[str, Any]:
    ddp = DistributedDataParallel(network())
    observer = ak.observe(ddp, coordinates=True, inner_products=True)
    x, y = (part(t, rank, world) for t in batch(12))
    F.mse_loss(ddp(x), y).backward()
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


def _train_data_parallel(kind: str, wrapped: bool, criterion: Any = None) -> dict[str, Any]:
    model = network()
    ddp = DistributedDataParallel(model)
    averaged = 0

    def count(state: Any, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
        nonlocal averaged
        averaged += 1
        return allreduce_hook(state, bucket)

    ddp.register_comm_hook(None, count)
    opt = optimizer(kind, ddp if wrapped else model, criterion=criterion or ak.NormTest(0.7))
    record = train(ddp, opt, micro=8)
    return {**record, "weights": weights(model), "averaged": averaged}


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


# fully_shard


def sharded(rank: int, world: int) -> dict[str, Any]:
    mesh = init_device_mesh("cpu", (world,))
    # Hybrid: shards over the second dimension, which has one rank, copies over the first.
    copies = init_device_mesh("cpu", (world, 1), mesh_dim_names=("copies", "shards"))
    return {
        "statistics": {first: _sharded_statistics(rank, world, mesh, first) for first in ORDERS},
        "training": {kind: _train_sharded(kind, mesh) for kind in KINDS},
        "copies": {kind: _train_sharded(kind, copies) for kind in KINDS[:2]},
        "inner products": _train_sharded("AdAdaGrad", mesh, ak.InnerProductTest(0.3)),
        "coordinates": _coordinates_refused(rank, world, mesh),
        "workers": _workers_refused(mesh),
        "state": _sharded_state(mesh),
    }


ORDERS = ("observe", "fully_shard")


def _shard(model: nn.Sequential, mesh: Any) -> None:
    for layer in model:
        if isinstance(layer, nn.Linear):
            fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)


def _sharded_statistics(rank: int, world: int, mesh: Any, first: str) -> dict[str, Any]:
    model = uneven()
    if first == "fully_shard":
        _shard(model, mesh)
    plain = [type(m) for m in model]
    observer = ak.observe(model, inner_products=True)
    if first == "observe":
        _shard(model, mesh)
    x, y = (part(t, rank, world) for t in batch(12))
    F.mse_loss(model(x), y).backward()
    found = figures(observer.statistics())
    found["names"] = [name for name, _ in observer.parameters()]
    observer.detach()
    found["layers are sharded still"] = all(
        isinstance(m, FSDPModule) for m in model if isinstance(m, nn.Linear)
    )
    found["layers are plain again"] = all(
        type(m) is kind or issubclass(type(m), kind) for m, kind in zip(model, plain, strict=True)
    ) and not any("Observed" in cls.__name__ for m in model for cls in type(m).__mro__)
    model(x).sum().backward()  # still a model that trains
    return found


def whole_weights(model: nn.Module) -> Tensor:
    parts = [p.full_tensor() if hasattr(p, "full_tensor") else p for p in model.parameters()]
    return torch.cat([p.detach().flatten() for p in parts])


def _train_sharded(kind: str, mesh: Any, criterion: Any = None) -> dict[str, Any]:
    model = uneven()
    _shard(model, mesh)
    opt = optimizer(kind, model, criterion=criterion or ak.NormTest(0.7))
    record = train(model, opt, micro=16 // mesh.size(), samples=500)
    record["accumulator"] = opt.accumulator if kind == "AdAdaGradNorm" else None
    return {**record, "weights": whole_weights(model)}


def _workers_refused(mesh: Any) -> str:
    model = uneven()
    _shard(model, mesh)
    return raised(lambda: optimizer("AdAdaGrad", model, criterion=ak.WorkerNormTest(1.0)))


def _coordinates_refused(rank: int, world: int, mesh: Any) -> str:
    model = uneven()
    _shard(model, mesh)
    opt = optimizer("AdAdaGrad", model, criterion=ak.CoordinateNormTest(1.0), batch_size=12)
    x, y = (part(t, rank, world) for t in batch(12))
    F.mse_loss(model(x), y).backward()
    return raised(opt.step)


def _sharded_state(mesh: Any) -> dict[str, Tensor]:
    """Goes on from a state, and without the interruption."""
    model = uneven()
    _shard(model, mesh)
    opt = optimizer("AdAdaGrad", model)
    train(model, opt, micro=8, samples=300)
    other = uneven()
    _shard(other, mesh)
    other.load_state_dict(model.state_dict())
    resumed = optimizer("AdAdaGrad", other)
    resumed.load_state_dict(copy.deepcopy(opt.state_dict()))
    for pair in ((model, opt), (other, resumed)):
        train(*pair, micro=8, samples=300)
    return {"whole": whole_weights(model), "resumed": whole_weights(other)}


# one process


def train_alone(
    kind: str, model: nn.Module, world: int, criterion: Any = None, samples: int = 900
) -> dict[str, Any]:
    """The same training on one process, with the batches that `world` processes can share."""
    opt = optimizer(kind, model, criterion=criterion or ak.NormTest(0.7), multiple_of=world)
    record = train(model, opt, micro=16, samples=samples)
    record["accumulator"] = opt.accumulator if kind == "AdAdaGradNorm" else None
    return {**record, "weights": weights(model)}
