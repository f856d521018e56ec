"""Digits, a small network, and the loop of plain torch that the integrations must agree with."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import TensorDataset
from training import weights

import adagrad_kernels as ak

Batch = list[tuple[Tensor, Tensor]]
"""The micro-batches of one step."""

CLOSE = {"rtol": 1e-9, "atol": 1e-12}  # float64; sums in another order
MICRO = 32  # largest micro-batch
KINDS = ("AdAdaGrad", "AdAdaGradNorm", "AdaptiveBatch")


def digits(samples: int = 600, dtype: torch.dtype = torch.float64) -> TensorDataset:
    import sklearn.datasets

    x, y = sklearn.datasets.load_digits(return_X_y=True)
    return TensorDataset(torch.tensor(x[:samples] / 16, dtype=dtype), torch.tensor(y[:samples]))


def network(dtype: torch.dtype = torch.float64) -> nn.Sequential:
    """Every call gives the same weights."""
    generator = torch.Generator().manual_seed(1)
    model = nn.Sequential(nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 10)).to(dtype)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=generator, dtype=torch.float64) / 5)
    return model


def options(**changed: Any) -> dict[str, Any]:
    """Of a problem whose batches grow from one micro-batch to several."""
    return {"criterion": ak.NormTest(0.5), "batch_size": 8, "max_batch_size": 192, **changed}


def plain_optimizer(model: nn.Module) -> torch.optim.Optimizer:
    """What `AdaptiveBatch` is put around."""
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.5)


def optimizer(kind: str, model: nn.Module, **changed: Any) -> Any:
    if kind == "AdaptiveBatch":
        return ak.AdaptiveBatch(model, plain_optimizer(model), **options(**changed))
    return getattr(ak, kind)(model, lr=0.05, **options(**changed))


def assert_plain_training(
    batches: list[Batch],
    model: nn.Module,
    kind: str = "AdAdaGrad",
    max_grad_norm: float | None = None,
) -> None:
    """That plain torch, stepping on the mean loss of each whole batch, ends at the same weights.

    And that the batches show what the tests are for: they grow, to several micro-batches.
    """
    plain = network()
    if kind == "AdaptiveBatch":
        torch_optimizer = plain_optimizer(plain)
    else:
        assert kind == "AdAdaGrad"
        torch_optimizer = torch.optim.Adagrad(plain.parameters(), lr=0.05)
    clipped = 0
    for batch in batches:
        x, y = (torch.cat(parts) for parts in zip(*batch, strict=True))
        torch_optimizer.zero_grad()
        F.cross_entropy(plain(x), y).backward()
        if max_grad_norm is not None:
            norm = nn.utils.clip_grad_norm_(plain.parameters(), max_grad_norm)
            clipped += int(norm > max_grad_norm)
        torch_optimizer.step()
    sizes = [sum(len(x) for x, _ in batch) for batch in batches]
    assert sizes == sorted(sizes)
    assert len(set(sizes)) > 2
    assert len(batches[0]) == 1 < len(batches[-1])
    assert all(len(x) <= MICRO for batch in batches for x, _ in batch)
    assert max_grad_norm is None or clipped
    torch.testing.assert_close(weights(model), weights(plain), **CLOSE)


def our_loop(
    model: nn.Module,
    opt: Any,
    loader: ak.AdaptiveDataLoader,
    enough: Callable[[], bool],
    autocast: bool = False,
) -> None:
    """The loop of the README: the integrations must give the same bits."""
    while not enough():
        for x, y in loader:
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                loss = F.cross_entropy(model(x), y)
            loss.backward()
            opt.step()
            opt.zero_grad()
            if opt.updated and enough():
                break
