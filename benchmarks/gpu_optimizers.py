"""The optimizer kernels of benchmarks/gpu.py, and one pass over materialised gradients."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from adagrad_kernels import ops, reference
from adagrad_kernels.benchmark.engine import require_equal

from .gpu_bench import Bench
from .gpu_ways import LR, convolution
from .models import resnet18


def optimizer_kernels(bench: Bench) -> None:
    """Updates of one large tensor, and of the many tensors of a ResNet-18."""
    large = [(1 << 12,)] if bench.small else [(1 << 27,)]
    many = [p.shape for p in (convolution if bench.small else resnet18)().parameters()]
    for what, shapes in (("one tensor", large), ("model's tensors", many)):
        for dtype in (torch.float32, torch.bfloat16):
            _updates(bench, what, shapes, dtype)


def _updates(bench: Bench, what: str, shapes: Sequence[Any], dtype: torch.dtype) -> None:
    make = [torch.randn(shape, device=bench.device) for shape in shapes]
    params = [t.to(dtype) for t in make]
    grads = [torch.randn_like(p) for p in params]
    sums = [torch.ones_like(p, dtype=torch.float32) for p in params]
    squares = [torch.ones_like(v) for v in sums]
    scalar = torch.ones((), dtype=torch.float64, device=bench.device)
    steps = [torch.ones((), device=bench.device) for _ in params]
    _check_updates(params, grads, sums)
    n = sum(p.numel() for p in params)
    size = params[0].element_size()
    label = f"{what}, {n / 1e6:.3g} M {str(dtype).removeprefix('torch.')}"
    options = {"lr": LR, "weight_decay": 0.0, "eps": 1e-10, "maximize": False}
    ways: dict[str, Callable[[], Any]] = {"ours": lambda: ops.adagrad_(params, grads, sums, lr=LR)}
    if dtype == torch.float32:  # otherwise its accumulators are as short as the parameters
        ways["torch._fused_adagrad_"] = lambda: torch._fused_adagrad_(
            params, grads, sums, steps, lr_decay=0.0, **options
        )
    bench.kernel(f"adagrad_ {label}", n * (3 * size + 8), ways)
    bench.kernel(
        f"adagrad_ + coordinates {label}", n * (3 * size + 12),
        {"ours": lambda: ops.adagrad_(params, grads, sums, squares, lr=LR, samples=8)},
    )  # fmt: skip
    bench.kernel(
        f"adagrad_norm_ {label}", n * 4 * size,
        {"ours": lambda: ops.adagrad_norm_(params, grads, scalar, lr=LR)},
    )  # fmt: skip
    bench.kernel(
        f"grad_norm_sq {label}", n * size,
        {
            "ours": lambda: ops.grad_norm_sq(grads),
            "torch._foreach_norm": lambda: torch.stack(torch._foreach_norm(grads)).norm(),
        },
    )  # fmt: skip


def _check_updates(params: list[Tensor], grads: list[Tensor], sums: list[Tensor]) -> None:
    p, v = [t.clone() for t in params], [t.clone() for t in sums]
    ops.adagrad_(p, grads, v, lr=LR)
    for i in range(len(p)):
        results = []
        for dtype in (torch.float64, None):
            q, w = params[i].clone().to(dtype), sums[i].clone().to(dtype)
            g = grads[i].to(dtype)
            reference.adagrad_([q], [g], [w], [], LR, 1e-10, 0.0, False, 1.0, 2)
            results.append(q)
        require_equal("adagrad_", p[i], results[1], results[0])


def sample_statistics(bench: Bench) -> None:
    """One pass over materialised per-sample gradients, beside three expressions."""
    shapes = [(8, 300)] if bench.small else [(256, 1 << 20), (256, 541_094), (4096, 10_000)]
    for b, p in shapes:
        for dtype in (torch.float32, torch.bfloat16):
            g = torch.randn(b, p, device=bench.device).to(dtype)
            truth = reference.sample_statistics(g[:, :4096].double())
            plain = reference.sample_statistics(g[:, :4096])
            for found, t, q in zip(ops.sample_statistics(g)[:2], truth, plain, strict=False):
                scale = g[:, :4096].double().abs().sum(0)
                require_equal("sample_statistics", found[:4096], q, t, scale)
            name = f"sample_statistics [{b}, {p}] {str(dtype).removeprefix('torch.')}"
            bench.kernel(
                name, g.numel() * g.element_size(),
                {
                    "ours": lambda g=g: ops.sample_statistics(g),
                    "three expressions": lambda g=g: reference.sample_statistics(g),
                },
            )  # fmt: skip
