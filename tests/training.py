"""Small problems and loops that the optimizer tests share."""

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import adagrad_kernels as ak

Batch = tuple[Tensor, Tensor]
Make = Callable[..., Any]


def diagonal(model: nn.Module, **options: Any) -> ak.AdAdaGrad:
    return ak.AdAdaGrad(model, lr=0.1, **options)


def scalar(model: nn.Module, **options: Any) -> ak.AdAdaGradNorm:
    return ak.AdAdaGradNorm(model, lr=0.1, **options)


def wrapped(model: nn.Module, **options: Any) -> ak.AdaptiveBatch:
    params = [p for p in model.parameters() if p.requires_grad]
    return ak.AdaptiveBatch(model, torch.optim.SGD(params, lr=0.1), **options)


all_optimizers = pytest.mark.parametrize("make", [diagonal, scalar, wrapped])
own_optimizers = pytest.mark.parametrize("make", [diagonal, scalar])


def network(dtype: torch.dtype = torch.float64) -> nn.Sequential:
    """Two layers; every call gives the same weights."""
    generator = torch.Generator().manual_seed(1)
    model = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 2)).to(dtype)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=generator, dtype=torch.float64) / 2)
    return model


def batches(number: int, size: int, dtype: torch.dtype = torch.float64) -> list[Batch]:
    """Regression data with noise, the same in every call."""
    generator = torch.Generator().manual_seed(2)
    found = []
    for _ in range(number):
        x = torch.randn(size, 5, generator=generator, dtype=torch.float64)
        noise = torch.randn(size, 2, generator=generator, dtype=torch.float64)
        found.append((x.to(dtype), (x[:, :2] + noise).to(dtype)))
    return found


def dataset() -> TensorDataset:
    """A regression problem that is noise beyond a point: batches must grow."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(500, 5, generator=generator, dtype=torch.float64)
    noise = torch.randn(500, 2, generator=generator, dtype=torch.float64)
    return TensorDataset(x, x[:, 1:3] + noise)


def optimizer(
    kind: str, model: nn.Module, lr: float = 0.1, weight_decay: float = 0.0, **options: Any
) -> Any:
    """One of ours, or ours around PyTorch's SGD."""
    if kind == "AdaptiveBatch":
        inner = torch.optim.SGD(model.parameters(), lr=lr, weight_decay=weight_decay)
        return ak.AdaptiveBatch(model, inner, **options)
    return getattr(ak, kind)(model, lr=lr, weight_decay=weight_decay, **options)


def mse(model: nn.Module, batch: Batch) -> Tensor:
    x, y = batch
    return (model(x) - y).square().mean()


def train(
    model: nn.Module,
    opt: object,
    data: list[Batch],
    after: Callable[[], None] | None = None,
    loss: Callable[[nn.Module, Batch], Tensor] = mse,
) -> None:
    """The loop of a user: backward, step, zero_grad for every batch."""
    for batch in data:
        loss(model, batch).backward()
        opt.step()  # type: ignore[attr-defined]
        opt.zero_grad()  # type: ignore[attr-defined]
        if after is not None:
            after()


def resumed(
    fresh: Callable[[], tuple[nn.Module, Any]], data: list[Batch]
) -> tuple[nn.Module, Any, nn.Module, Any]:
    """Model and optimizer after all batches; and others that were given their state half-way."""
    straight, opt = fresh()
    train(straight, opt, data)
    first, opt1 = fresh()
    half = len(data) // 2
    train(first, opt1, data[:half])
    second, opt2 = fresh()
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    opt2.load_state_dict(copy.deepcopy(opt1.state_dict()))
    train(second, opt2, data[half:])
    assert torch.equal(weights(second), weights(straight))
    return straight, opt, second, opt2


def weights(model: nn.Module) -> Tensor:
    """All parameters as one vector."""
    return torch.cat([p.detach().flatten() for p in model.parameters()]).clone()


def accumulators(opt: torch.optim.Optimizer) -> Tensor:
    """AdaGrad's accumulators as one vector."""
    found = [opt.state[p]["sum"].flatten() for g in opt.param_groups for p in g["params"]]
    return torch.cat(found).clone()


def snapshot(model: nn.Module, opt: torch.optim.Optimizer) -> dict[str, object]:
    """Weights and accumulators, to see whether a failed step changed them."""
    state = {i: copy.deepcopy(dict(opt.state[p])) for i, p in enumerate(model.parameters())}
    return {"weights": weights(model), "state": state}


def assert_unchanged(
    model: nn.Module, opt: torch.optim.Optimizer, before: dict[str, object]
) -> None:
    now = snapshot(model, opt)
    torch.testing.assert_close(now, before, rtol=0, atol=0)


def pairs(model: nn.Module, other: nn.Module) -> Iterator[tuple[Tensor, Tensor]]:
    return zip(model.parameters(), other.parameters(), strict=True)
