"""Other ways to the same statistics: the official code's, BackPACK's, Opacus's.

Each does what `ours` in adagrad_kernels/benchmark/step_cases.py does: one training step with
`torch.optim.Adagrad(fused=True)`, the samples' squared gradient norms, and where its name says so
the variance of every coordinate. BackPACK and Opacus are optional; a model that one of them does
not cover is reported as such.
"""

import warnings
from collections.abc import Callable

import torch
from torch import Tensor, nn

from adagrad_kernels.benchmark.engine import Unavailable, Variant
from adagrad_kernels.benchmark.official import vmap_grad
from adagrad_kernels.benchmark.step_cases import OPTIONS, Measured, Task, loss, step_variant

Maker = Callable[[Task], Variant]

ROUNDINGS = 2**13
"""Allowed in BackPACK's and Opacus's statistics, a relative error of 1e-3: the same quantities, but
torch's norm over a row of millions adds in float32 (2.4e-4 off in a deep layer of ResNet-18)."""


def _optimizer(model: nn.Module) -> torch.optim.Adagrad:
    return torch.optim.Adagrad(model.parameters(), **OPTIONS, fused=True)


def _ignore_warnings() -> None:
    """The peers use what torch deprecates, and hook layers whose input needs no gradient."""
    warnings.filterwarnings("ignore", module="backpack|opacus")
    warnings.filterwarnings("ignore", message="Full backward hook is firing")


def _norms(per_sample: list[Tensor]) -> Tensor:
    """‖g_i‖² of gradients [b, …], a tensor a parameter."""
    return torch.stack([g.flatten(1).square().sum(1) for g in per_sample]).sum(0)


def backpack(coordinates: bool) -> Maker:
    """BackPACK: BatchL2, and Variance where the coordinates are wanted."""

    def make(task: Task) -> Variant:
        _ignore_warnings()
        try:
            from backpack import backpack as extensions
            from backpack import extend
            from backpack.extensions import BatchL2Grad, Variance
        except ImportError as error:
            raise Unavailable("not installed: pip install backpack-for-pytorch") from error
        if task.y.dim() > 1:
            raise Unavailable("no losses of several positions a sample")
        model = task.model()
        _require_modules(
            model, "BackPACK",
            (nn.Linear, nn.Conv2d, nn.ReLU, nn.MaxPool2d, nn.Flatten, nn.Sequential),
        )  # fmt: skip
        model, criterion = extend(model), extend(nn.CrossEntropyLoss())
        optimizer, b = _optimizer(model), len(task.x)
        wanted = (BatchL2Grad(), Variance()) if coordinates else (BatchL2Grad(),)
        seen: dict = {}

        def step() -> None:
            with extensions(*wanted):
                criterion(model(task.x), task.y).backward()
            norms = torch.stack([p.batch_l2 for p in model.parameters()]).sum(0)
            seen["sample_norms_sq"] = norms * b**2
            if coordinates:  # theirs is that of g_i / b, with 1/b
                named, factor = model.named_parameters(), b**3 / (b - 1)
                seen["coordinate_variance"] = {name: p.variance * factor for name, p in named}
            optimizer.step()

        return step_variant(task, model, optimizer, step, lambda: Measured(**seen), ROUNDINGS)

    return make


def _require_modules(model: nn.Module, who: str, supported: tuple[type[nn.Module], ...]) -> None:
    others = {type(m).__name__ for m in model.modules() if not isinstance(m, supported)}
    if others:
        raise Unavailable(f"{who} does not cover {', '.join(sorted(others))}")


def opacus(coordinates: bool) -> Maker:
    """Opacus: materialised per-sample gradients and their variance, or ghost norms alone."""

    def make(task: Task) -> Variant:
        _ignore_warnings()
        try:
            from opacus import GradSampleModule
            from opacus.grad_sample import GradSampleModuleFastGradientClipping as Ghost
        except ImportError as error:
            raise Unavailable("not installed: pip install opacus") from error
        model = task.model()
        optimizer = _optimizer(model)
        wrapped = (
            GradSampleModule(model)
            if coordinates
            else Ghost(model, max_grad_norm=1.0, use_ghost_clipping=True)
        )
        try:
            loss(wrapped(task.x), task.y).backward()
        except RuntimeError as error:
            raise Unavailable(f"Opacus cannot run it: {error}") from error
        wrapped.zero_grad()
        seen: dict = {}

        def step() -> None:
            loss(wrapped(task.x), task.y).backward()
            if coordinates:
                named = {name: p.grad_sample for name, p in model.named_parameters()}
                seen["sample_norms_sq"] = _norms(list(named.values()))
                seen["coordinate_variance"] = {name: g.var(0) for name, g in named.items()}
                for p in model.parameters():
                    p.grad_sample = None
            else:
                norms = torch.stack([p._norm_sample for p in model.parameters()])
                seen["sample_norms_sq"] = norms.square().sum(0)
            optimizer.step()

        return step_variant(task, model, optimizer, step, lambda: Measured(**seen), ROUNDINGS)

    return make


PEERS: dict[str, Maker] = {
    "vmap(grad), norm test": vmap_grad(coordinates=False),
    "vmap(grad), norms + coordinates": vmap_grad(coordinates=True),
    "BackPACK, norm test": backpack(coordinates=False),
    "BackPACK, norms + coordinates": backpack(coordinates=True),
    "Opacus ghost, norm test": opacus(coordinates=False),
    "Opacus, norms + coordinates": opacus(coordinates=True),
}
