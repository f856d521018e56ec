"""What the processes of the distributed tests do, and the same on one process.

Everything is float64 and drawn from fixed seeds: the tests compare with one process that has all
the samples.
"""

import copy
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
import training
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint
from training import dataset, network, weights

import adagrad_kernels as ak
from adagrad_kernels.distributed import Ranks
from adagrad_kernels.shards import sums_over_ranks

KINDS = ("AdAdaGrad", "AdAdaGradNorm", "AdaptiveBatch")
MICRO_BATCHES = 3


def batch(samples: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(samples, 5, generator=generator, dtype=torch.float64)
    return x, torch.randn(samples, 2, generator=generator, dtype=torch.float64)


def uneven() -> nn.Sequential:
    """A network whose parameters do not divide among 2 ranks; one has a single row."""
    torch.manual_seed(4)
    return nn.Sequential(
        nn.Linear(5, 3), nn.Tanh(), nn.Linear(3, 1), nn.Tanh(), nn.Linear(1, 2)
    ).double()


def optimizer(kind: str, model: nn.Module, **options: Any) -> Any:
    defaults = {"criterion": ak.NormTest(0.7), "batch_size": 4, "max_batch_size": 120}
    return training.optimizer(kind, model, weight_decay=0.01, **{**defaults, **options})


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
        "compiled": _one_backward(rank, world, compiled=True),
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
        "all inner products": _train_data_parallel(
            "AdAdaGrad", True, ak.InnerProductTest(0.3, every_sample=True)
        ),
        "loss": _train_data_parallel("AdaptiveBatch", True, ak.CABS()),
        "clipped": {
            kind: _train_data_parallel(kind, True, max_grad_norm=CLIP) for kind in KINDS
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


def _train_data_parallel(
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


CLIP = 1.0  # above some of the gradients' norms, below others

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
        "clipped": {kind: _train_sharded(kind, mesh, max_grad_norm=CLIP) for kind in KINDS},
        "coordinates": {
            (name, kind): _train_sharded(kind, mesh, make())
            for name, (kinds, make) in COORDINATES.items()
            for kind in kinds
        },
        "coordinates of copies": _train_sharded("AdAdaGrad", copies, COORDINATES["quantile"][1]()),
        "by coordinate": {
            name: _sharded_coordinates(rank, world, mesh, make())
            for name, make in {"uneven": uneven, "tied": Tied}.items()
        },
        "batch": {
            (name, every): _sharded_batch(rank, world, mesh, every, criterion)
            for name, criterion in (("norm", ak.NormTest(0.5)), ("workers", ak.WorkerNormTest(0.5)))
            for every in (True, False)
        },
        "worker training": _train_sharded("AdAdaGrad", mesh, ak.WorkerNormTest(0.7), micro=4),
        "the same, not sharded": _train_workers(),
        "states": {name: _sharded_state(mesh, make()) for name, make in STATES.items()},
    }


COORDINATES: dict[str, tuple[tuple[str, ...], Callable[[], Any]]] = {
    "max": (KINDS[:1], lambda: ak.CoordinateNormTest(8.0)),
    "quantile": (KINDS[::2], lambda: ak.CoordinateNormTest(2.0, "quantile")),
    "fraction": (
        KINDS[:1],
        lambda: ak.CoordinateNormTest(2.0, "fraction", fraction=0.2),
    ),
    "adagrad": (KINDS[:2], lambda: ak.CoordinateNormTest(0.7, "adagrad")),
    "averaged": (KINDS[:1], lambda: ak.Averaged(ak.CoordinateNormTest(2.0, "quantile"), 0.5)),
}


STATES: dict[str, Callable[[], Any]] = {
    "norm": lambda: ak.NormTest(0.7),
    "averages of coordinates": lambda: ak.Averaged(ak.CoordinateNormTest(2.0, "quantile")),
}
ORDERS = ("observe", "fully_shard")
SHARDED_SAMPLES = 300


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


def _train_sharded(
    kind: str, mesh: Any, criterion: Any = None, micro: int = 16, **options: Any
) -> dict[str, Any]:
    model = uneven()
    _shard(model, mesh)
    opt = optimizer(kind, model, criterion=criterion or ak.NormTest(0.7), **options)
    record = train(model, opt, micro=micro // mesh.size(), samples=SHARDED_SAMPLES)
    record["accumulator"] = opt.accumulator if kind == "AdAdaGradNorm" else None
    return {**record, "weights": whole_weights(model)}


def _train_workers() -> dict[str, Any]:
    """With copies of the parameters; the same micro-batches as where they are sharded."""
    model = uneven()
    ddp = DistributedDataParallel(model)
    opt = optimizer("AdAdaGrad", ddp, criterion=ak.WorkerNormTest(0.7))
    record = train(ddp, opt, micro=4 // dist.get_world_size(), samples=SHARDED_SAMPLES)
    return {**record, "accumulator": None, "weights": weights(model)}


def _sharded_batch(rank: int, world: int, mesh: Any, every: bool, criterion: Any) -> dict[str, Any]:
    """Gradients averaged after every micro-batch, or after the last one only."""
    model = uneven()
    _shard(model, mesh)
    opt = optimizer("AdAdaGrad", model, criterion=criterion, batch_size=24)
    opt.controller.limit_micro_batches(24 // MICRO_BATCHES // world, world)
    parts = list(zip(*(t.chunk(MICRO_BATCHES) for t in batch(24)), strict=True))
    for k, micro_batch in enumerate(parts):
        x, y = (part(t, rank, world) for t in micro_batch)
        model.set_requires_gradient_sync(every or k == MICRO_BATCHES - 1)
        F.mse_loss(model(x), y).backward()
        opt.step()
        opt.zero_grad()
    assert opt.updated
    return figures(opt.statistics)


class Tied(nn.Sequential):
    """A pair of layers with one weight, called twice; sharded as the other layers are."""

    def __init__(self) -> None:
        torch.manual_seed(6)
        pair = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3))
        pair[2].weight = pair[0].weight
        super().__init__(nn.Linear(5, 3), pair, nn.Tanh(), pair, nn.Linear(3, 2))
        self.double()


def _sharded_coordinates(rank: int, world: int, mesh: Any, model: nn.Sequential) -> dict[str, Any]:
    """Of two micro-batches; laid out as the parameters are."""
    for layer in dict.fromkeys(model):
        if not isinstance(layer, nn.Tanh):
            fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    observer = ak.observe(model, coordinates=True)
    for micro_batch in zip(*(t.chunk(2) for t in batch(12)), strict=True):
        x, y = (part(t, rank, world) for t in micro_batch)
        F.mse_loss(model(x), y).backward()
    with CommDebugMode() as mode:
        s = observer.statistics(gradient_scale=0.5)
    found = figures(s)
    found["collectives"] = {str(op): n for op, n in mode.get_comm_counts().items()}
    for key in ("coordinate_variance", "coordinate_mean"):
        values = found[key]
        assert {name: v.placements for name, v in values.items()} == {
            name: p.placements for name, p in model.named_parameters()
        }
        found[key] = {name: v.full_tensor() for name, v in values.items()}
    return found


def _sharded_state(mesh: Any, criterion: Any) -> dict[str, Any]:
    """Goes on from a state, also through torch.distributed.checkpoint, and uninterrupted."""

    def fresh() -> tuple[nn.Module, Any]:
        model = uneven()
        _shard(model, mesh)
        return model, optimizer("AdAdaGrad", model, criterion=copy.deepcopy(criterion))

    runs = [fresh() for _ in range(3)]
    (model, opt), (other, resumed), (third, loaded) = runs
    train(model, opt, micro=8, samples=200)
    other.load_state_dict(model.state_dict())
    resumed.load_state_dict(copy.deepcopy(opt.state_dict()))
    with tempfile.TemporaryDirectory() as own:
        folder = [own]
        dist.broadcast_object_list(folder)
        dcp.save({"model": model, "optimizer": opt}, checkpoint_id=folder[0])
        dcp.load({"model": third, "optimizer": loaded}, checkpoint_id=folder[0])
        files = {path.name: path.read_bytes() for path in Path(folder[0]).iterdir()}
        dist.barrier()
    sizes = [train(*run, micro=8, samples=200)["sizes"] for run in runs]
    return {"weights": [whole_weights(m) for m, _ in runs], "sizes": sizes, "files": files}


# four processes


def four(rank: int, world: int) -> dict[str, Any]:
    """Copies, shards of which some are empty, and two copies of two shards."""
    shards = init_device_mesh("cpu", (world,))
    both = init_device_mesh("cpu", (2, world // 2), mesh_dim_names=("copies", "shards"))
    quantile = COORDINATES["quantile"][1]
    return {
        "copies": _train_data_parallel("AdAdaGrad", True),
        "shards": _train_sharded("AdAdaGrad", shards, quantile()),
        "both": _train_sharded("AdAdaGradNorm", both),
        "both, coordinates": _train_sharded("AdAdaGrad", both, quantile()),
        "sharded twice": _sharded_twice(both),
    }


def single(rank: int, world: int) -> dict[str, Any]:
    """One process of its own group, whose gradients are views of buckets: DDP exchanges them."""
    record = {}
    for views in (False, True):
        model = network()
        ddp = DistributedDataParallel(model, gradient_as_bucket_view=views)
        record[views] = train(ddp, optimizer("AdAdaGrad", ddp), micro=16)
        record[views]["weights"] = weights(model)
    mesh = init_device_mesh("cpu", (world,))
    record["sharded"] = _train_sharded("AdAdaGrad", mesh)
    return record


def _sharded_twice(mesh: Any) -> str:
    """As with tensor parallelism."""
    whole = torch.zeros(4, 4)
    like = distribute_tensor(whole, mesh, [Shard(0), Shard(1)])
    return raised(lambda: sums_over_ranks([whole], [like], Ranks()))


# one process


def train_alone(
    kind: str,
    model: nn.Module,
    world: int,
    criterion: Any = None,
    samples: int = 900,
    **options: Any,
) -> dict[str, Any]:
    """The same training on one process, with the batches that `world` processes can share."""
    criterion = criterion or ak.NormTest(0.7)
    opt = optimizer(kind, model, criterion=criterion, multiple_of=world, **options)
    record = train(model, opt, micro=16, samples=samples)
    record["accumulator"] = opt.accumulator if kind == "AdAdaGradNorm" else None
    return {**record, "weights": weights(model)}
