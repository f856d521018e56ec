"""What the processes of `test_modules_distributed` do: own parameters, positions, a tied head."""

from typing import Any

import torch
from module_cases import Positions, RMSNorm
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import adagrad_kernels as ak


class Model(Positions):
    """Normalised by a module of its own."""

    def __init__(self) -> None:
        super().__init__("tied")
        self.norm = RMSNorm(11, around_one=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(super().forward(x))


def model() -> nn.Module:
    torch.manual_seed(2)
    return Model().double()


def batch() -> Tensor:
    return torch.randint(11, (8, 6), generator=torch.Generator().manual_seed(3))


def loss(y: Tensor) -> Tensor:
    return y.sin().flatten(1).sum(1).mean()


class Folded(nn.Module):
    """Its first layer sees the numbers of a sample one by one."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(1, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x.double().reshape(-1, 1)).unflatten(0, x.shape)
        return self.head(y.sin().mean(1))


def folded(rank: int, world: int) -> dict[str, Any]:
    """Statistics of a model that is copied, wrapped before it is observed."""
    torch.manual_seed(2)
    own = Folded().double()
    run = DistributedDataParallel(own) if world > 1 else own
    names = ["module.first"] if world > 1 else ["first"]
    opt = ak.AdAdaGrad(run, lr=0.1, batch_size=8, max_batch_size=8, folded=names)
    loss(run(batch().chunk(world)[rank])).backward()
    opt.step()
    assert opt.statistics is not None
    weights = torch.cat([p.detach().flatten() for p in own.parameters()])
    return {"norms": opt.statistics.sample_norms_sq, "weights": weights}


def trained(rank: int, world: int, kind: str) -> dict[str, Any]:
    """Three steps; the statistics of the last one, and the weights."""
    own = model()
    if kind == "sharded":
        mesh = init_device_mesh("cpu", (world,))
        fully_shard(own.norm, mesh=mesh)
        fully_shard(own, mesh=mesh)
    opt = ak.AdAdaGrad(
        own, lr=0.1, criterion=ak.InnerProductTest(0.5), batch_size=8, max_batch_size=8,
        fallback="vmap",
    )  # fmt: skip
    run = DistributedDataParallel(own) if kind == "copies" else own
    for _ in range(3):
        loss(run(batch().chunk(world)[rank])).backward()
        opt.step()
        opt.zero_grad()
    s = opt.statistics
    weights = [p.full_tensor() if kind == "sharded" else p for p in own.parameters()]
    return {
        "norms": s.sample_norms_sq,
        "inner_products": s.inner_products,
        "variance_trace": s.variance_trace,
        "weights": torch.cat([w.detach().flatten() for w in weights]),
    }


def both(rank: int, world: int) -> dict[str, Any]:
    found = {kind: trained(rank, world, kind) for kind in ("copies", "sharded")}
    return found | {"folded": folded(rank, world)}
