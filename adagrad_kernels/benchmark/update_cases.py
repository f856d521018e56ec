"""The kernels that update, each beside PyTorch's own update."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import ops
from .engine import Case, Variant, check_results

MLP = ((1024, 784), (1024,), (1024, 1024), (1024,), (10, 1024), (10,))
"""Parameters of the MLP 784-1024-1024-10."""


# adagrad_: against PyTorch's own update


class _Update(NamedTuple):
    params: list[Tensor]
    grads: list[Tensor]
    squares: list[Tensor]
    plain: list[Tensor]
    truth: list[Tensor]


LR = 1e-3


def adagrad(what: str, shapes: Sequence[tuple[int, ...]]) -> Case:
    """`adagrad_` of parameters of these shapes."""

    def inputs() -> _Update:
        random = torch.Generator().manual_seed(0)
        params = [torch.randn(shape, generator=random) for shape in shapes]
        grads = [torch.randn(shape, generator=random) for shape in shapes]
        squares = [g.square() for g in grads]
        plain = _after_one_step(params, grads)
        truth = _after_one_step([p.double() for p in params], [g.double() for g in grads])
        return _Update(params, grads, squares, plain, truth)

    def optimizer(**options: Any) -> Callable[[_Update], Variant]:
        def make(x: _Update) -> Variant:
            params = [p.clone().requires_grad_() for p in x.params]
            for p, g in zip(params, x.grads, strict=True):
                p.grad = g
            step = torch.optim.Adagrad(params, lr=LR, **options).step
            return Variant(step, check_results(lambda: (step(), params)[1], x.plain, x.truth))

        return make

    def op(update: Callable[..., Any], coordinates: bool = False) -> Callable[[_Update], Variant]:
        def make(x: _Update) -> Variant:
            params = [p.clone() for p in x.params]
            sums = [torch.zeros_like(p) for p in params]
            extra = (x.squares,) if coordinates else ()

            def run() -> Any:
                return update(params, x.grads, sums, *extra)

            return Variant(run, check_results(lambda: (run(), params)[1], x.plain, x.truth))

        return make

    def fused(params: list[Tensor], grads: list[Tensor], sums: list[Tensor]) -> None:
        steps = [torch.tensor(0.0) for _ in params]
        torch._fused_adagrad_(
            params, grads, sums, steps, lr=LR, lr_decay=0.0, weight_decay=0.0, eps=1e-10,
            maximize=False,
        )  # fmt: skip

    def ours(*tensors: list[Tensor]) -> Any:
        return ops.adagrad_(*tensors, lr=LR)

    count = sum(torch.Size(shape).numel() for shape in shapes)
    return Case(
        f"adagrad_/{what}", f"{count} float32 parameters in {len(shapes)} tensors", 0, inputs,
        plain={
            "_fused_adagrad_": op(fused),
            "Adagrad(fused=True).step": optimizer(fused=True),
            "Adagrad(foreach=True).step": optimizer(foreach=True),
        },
        variants={
            "adagrad_ + norm": op(ours),
            "adagrad_ + norm + coordinate test": op(ours, coordinates=True),
        },
    )  # fmt: skip


def _after_one_step(params: Sequence[Tensor], grads: Sequence[Tensor]) -> list[Tensor]:
    """AdaGrad's first step from an empty accumulator."""
    return [p - LR * g / (g.square().sqrt() + 1e-10) for p, g in zip(params, grads, strict=True)]


# linear_adagrad_: against PyTorch's weight gradient and its fused update


class _LinearUpdate(NamedTuple):
    grad_out: Tensor
    input: Tensor
    weight: Tensor
    plain: list[Tensor]
    truth: list[Tensor]


def linear_adagrad(b: int, in_features: int, out_features: int) -> Case:
    """`linear_adagrad_` of one layer, its samples of one position."""

    def inputs() -> _LinearUpdate:
        random = torch.Generator().manual_seed(0)
        d = torch.randn(b, out_features, generator=random)
        x = torch.randn(b, in_features, generator=random)
        w = torch.randn(out_features, in_features, generator=random)
        plain, truth = ([_updated(*t), t[0].sum(0)] for t in ((d, x, w), _double(d, x, w)))
        return _LinearUpdate(d, x, w, plain, truth)

    def two_steps(x: _LinearUpdate) -> Variant:
        weight, v, steps = x.weight.clone(), torch.ones_like(x.weight), torch.tensor(0.0)

        def run() -> list[Tensor]:
            grad, grad_bias = x.grad_out.t().mm(x.input), x.grad_out.sum(0)
            torch._fused_adagrad_(
                [weight], [grad], [v], [steps], lr=LR, lr_decay=0.0, weight_decay=0.0, eps=1e-10,
                maximize=False,
            )  # fmt: skip
            return [weight, grad_bias]

        return Variant(run, check_results(run, x.plain, x.truth))

    def fused(coordinates: bool) -> Callable[[_LinearUpdate], Variant]:
        def make(x: _LinearUpdate) -> Variant:
            weight, v = x.weight.clone(), torch.ones_like(x.weight)

            def run() -> list[Tensor]:
                found = ops.linear_adagrad_(
                    x.grad_out, x.input, weight, v, b, True, coordinates, lr=LR
                )
                return [weight, found[2]]

            return Variant(run, check_results(run, x.plain, x.truth))

        return make

    return Case(
        f"linear_adagrad_/{b}x{in_features}to{out_features}",
        f"{b} samples, {in_features} → {out_features}", b, inputs,
        plain={"weight gradient, then _fused_adagrad_": two_steps},
        variants={
            "one kernel + norms": fused(False),
            "one kernel + norms + coordinates": fused(True),
        },
    )  # fmt: skip


def _double(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(t.double() for t in tensors)


def _updated(grad_out: Tensor, input: Tensor, weight: Tensor) -> Tensor:
    """The weight after AdaGrad's first step from an accumulator of ones."""
    grad = grad_out.t().mm(input)
    return weight - LR * grad / ((1 + grad.square()).sqrt() + 1e-10)
