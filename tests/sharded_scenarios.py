"""What processes with sharded parameters do, and with copies of shards: `fully_shard`."""

import copy
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from distributed_scenarios import train_data_parallel
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
    uneven,
)
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.nn.parallel import DistributedDataParallel
from training import network, weights

import adagrad_kernels as ak
from adagrad_kernels.distributed import Ranks
from adagrad_kernels.shards import sums_over_ranks


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
    observer.check()  # of the first pass, once
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


def four(rank: int, world: int) -> dict[str, Any]:
    """Copies, shards of which some are empty, and two copies of two shards."""
    shards = init_device_mesh("cpu", (world,))
    both = init_device_mesh("cpu", (2, world // 2), mesh_dim_names=("copies", "shards"))
    quantile = COORDINATES["quantile"][1]
    return {
        "copies": train_data_parallel("AdAdaGrad", True),
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
