"""The models of benchmarks/gpu.py, and the ways to update them."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

import adagrad_kernels as ak
from adagrad_kernels.benchmark.engine import Unavailable

from .models import Transformer, resnet18

LR = 1e-3

Way = Callable[..., Callable[[], None]]
"""Called with (model, x, y, bf16): the update after the backward pass."""


def mean_loss(output: Tensor, y: Tensor) -> Tensor:
    """The cross-entropy, meaned over samples and positions."""
    return F.cross_entropy(output.flatten(0, -2), y.flatten())


def mlp() -> nn.Module:
    """784-1024-1024-10."""
    sizes = (784, 1024, 1024)
    layers: list[nn.Module] = []
    for inputs, outputs in itertools.pairwise(sizes):
        layers += [nn.Linear(inputs, outputs), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(1024, 10))


def convolution() -> nn.Module:
    """In the place of ResNet-18 where sizes are small."""
    features = [nn.Conv2d(3, 8, 3), nn.GroupNorm(2, 8), nn.ReLU(), nn.AdaptiveAvgPool2d(1)]
    return nn.Sequential(*features, nn.Flatten(), nn.Linear(8, 10))


def models(
    device: torch.device, small: bool
) -> Iterator[tuple[str, Callable[[], nn.Module], Tensor, Tensor, bool]]:
    """(name, model, inputs, targets, whether in bf16) of each training step."""

    def classes(*shape: int) -> Tensor:
        return torch.randint(10, shape, device=device)

    for b in (4, 8) if small else (32, 4096):
        yield f"mlp {b}", mlp, torch.randn(b, 784, device=device), classes(b), False
    b, name, net = (4, "convolution", convolution) if small else (1024, "resnet18", resnet18)
    yield f"{name} {b}", net, torch.randn(b, 3, 32, 32, device=device), classes(b), False
    width, depth, length, b = (48, 1, 16, 2) if small else (768, 12, 1024, 8)
    vocabulary = 100 if small else 25_000  # 124 M parameters

    def transformer() -> nn.Module:
        return Transformer(vocabulary, width, depth, heads=12, length=length)

    tokens = torch.randint(vocabulary, (b, length + 1), device=device)
    yield f"transformer T={length} {b}", transformer, tokens[:, :-1], tokens[:, 1:], True


def plain_foreach(model: nn.Module, *_: Any) -> Callable[[], None]:
    """`torch.optim.Adagrad(foreach=True)`."""
    optimizer = torch.optim.Adagrad(model.parameters(), lr=LR, foreach=True)

    def update() -> None:
        optimizer.step()
        optimizer.zero_grad()

    return update


def plain_fused(model: nn.Module, *_: Any) -> Callable[[], None]:
    """The fused op, as the optimizer calls it where it may."""
    params = list(model.parameters())
    sums = [torch.zeros_like(p) for p in params]
    steps = [torch.zeros((), device=p.device) for p in params]

    @torch.no_grad()
    def update() -> None:
        grads = [p.grad for p in params if p.grad is not None]
        torch._foreach_add_(steps, 1)
        torch._fused_adagrad_(
            params, grads, sums, steps,
            lr=LR, lr_decay=0.0, weight_decay=0.0, eps=1e-10, maximize=False,
        )  # fmt: skip
        model.zero_grad()

    return update


def plain_compiled(model: nn.Module, *_: Any) -> Callable[[], None]:
    """The same formulas, compiled by Inductor into few kernels."""
    params = list(model.parameters())
    sums = [torch.zeros_like(p) for p in params]

    @torch.compile(dynamic=False)
    def formulas(params: list[Tensor], grads: list[Tensor], sums: list[Tensor]) -> None:
        torch._foreach_addcmul_(sums, grads, grads)
        roots = torch._foreach_add(torch._foreach_sqrt(sums), 1e-10)
        torch._foreach_addcdiv_(params, grads, roots, -LR)

    @torch.no_grad()
    def update() -> None:
        formulas(params, [p.grad for p in params if p.grad is not None], sums)
        model.zero_grad()

    return update


def ours(criterion: Any, **options: Any) -> Way:
    """`AdAdaGrad` that tests in every step; the batch size is held."""

    def prepare(model: nn.Module, x: Tensor, y: Tensor, bf16: bool) -> Callable[[], None]:
        sizes = {"batch_size": len(x), "max_batch_size": len(x)}
        optimizer = ak.AdAdaGrad(model, lr=LR, criterion=criterion, **sizes, **options)

        def update() -> None:
            optimizer.step()
            optimizer.zero_grad()

        return update

    return prepare


def official_vmap(model: nn.Module, x: Tensor, y: Tensor, bf16: bool) -> Callable[[], None]:
    """Per-sample gradients by vmap(grad) and their norms, then the plain step."""
    plain = plain_fused(model)

    def sample_loss(params: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        with torch.autocast(x.device.type, torch.bfloat16, enabled=bf16):
            return mean_loss(functional_call(model, params, (x[None],)), y[None])

    per_sample = vmap(grad(sample_loss), (None, 0, 0), randomness="different")

    def update() -> None:
        params = {name: p.detach().clone() for name, p in model.named_parameters()}
        grads = per_sample(params, x, y).values()
        torch.stack([g.flatten(1).square().sum(1) for g in grads]).sum(0)
        plain()

    return update


def opacus(model: nn.Module, x: Tensor, y: Tensor, bf16: bool) -> Callable[[], None]:
    """Per-sample gradients by Opacus' hooks and their norms, then the plain step."""
    try:
        from opacus import GradSampleModule  # type: ignore[import-not-found]
    except ImportError as error:
        raise Unavailable("Opacus is not installed") from error
    GradSampleModule(model)
    plain = plain_fused(model)

    def update() -> None:
        torch.stack([p.grad_sample.flatten(1).square().sum(1) for p in model.parameters()]).sum(0)
        for p in model.parameters():
            p.grad_sample = None
        plain()

    return update


PLAIN: dict[str, Way] = {
    "plain, foreach": plain_foreach,
    "plain, fused op": plain_fused,
    "plain, compiled update": plain_compiled,
}
OURS: dict[str, Way] = {
    "ours, norm test": ours(ak.NormTest(0.1)),
    "ours, norms + coordinates": ours(ak.CoordinateNormTest(0.1)),
}
IN_BACKWARD: dict[str, Way] = {  # of eager models
    "ours, norm test, in backward": ours(ak.NormTest(0.1), update="in_backward"),
}
PEERS: dict[str, Way] = {
    "vmap as in the official code": official_vmap,
    "Opacus": opacus,
}
