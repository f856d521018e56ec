"""The kernels one by one, each beside what PyTorch does of the same work."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple

import torch
from torch import Tensor

from .. import ops
from .engine import Case, Variant, check_results
from .update_cases import MLP, adagrad, linear_adagrad

LINEAR = (  # samples, positions, in, out
    (32, 1, 784, 1024),
    (32, 1, 1024, 1024),
    (512, 1, 1024, 1024),
    (32, 1, 4096, 4096),
    (16, 64, 256, 1024),
)
CONV = (  # samples, in, out, kernel, height, padding
    (256, 1, 16, 5, 28, 2),
    (256, 16, 32, 5, 14, 2),
    (256, 3, 16, 3, 32, 1),
    (256, 16, 32, 3, 16, 1),
    (256, 32, 64, 3, 8, 1),
    (16, 64, 64, 3, 32, 1),
    (16, 128, 128, 3, 16, 1),
    (16, 256, 256, 3, 8, 1),
    (16, 512, 512, 3, 4, 1),
)


def cases() -> list[Case]:
    """All of them."""
    return [
        *(_sample_statistics(b, p) for b, p in ((256, 100_000), (32, 1_000_000), (1024, 10_000))),
        adagrad("mlp", MLP),
        adagrad("10M", [(2500, 1000)] * 4),
        *(_linear(*sizes) for sizes in LINEAR),
        *(linear_adagrad(b, i, o) for b, positions, i, o in LINEAR if positions == 1),
        *(_conv(*sizes) for sizes in CONV),
    ]


# sample_statistics: against reading g once


class _Block(NamedTuple):
    g: Tensor
    plain: tuple[Tensor, ...]
    truth: tuple[Tensor, ...]


def _three_expressions(g: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return g.sum(0), g.square().sum(0), g.square().sum(1)


def _sample_statistics(b: int, p: int) -> Case:
    def inputs() -> _Block:
        g = torch.randn(b, p, generator=torch.Generator().manual_seed(0))
        return _Block(g, _three_expressions(g), _three_expressions(g.double()))

    def read(reduce: Callable[[Tensor], Tensor]) -> Callable[[_Block], Variant]:
        return lambda x: Variant(lambda: reduce(x.g), lambda: None)

    def all_three(op: Callable[[Tensor], tuple[Tensor, ...]]) -> Callable[[_Block], Variant]:
        return lambda x: Variant(lambda: op(x.g), check_results(lambda: op(x.g), x.plain, x.truth))

    return Case(
        f"sample_statistics/{b}x{p}", f"g [{b}, {p}] float32", b, inputs,
        plain={
            "read: sum": read(torch.sum),
            "read: vector_norm": read(torch.linalg.vector_norm),
            "read: dot": read(lambda g: torch.dot(g.view(-1), g.view(-1))),
        },
        variants={
            "sample_statistics": all_three(ops.sample_statistics),
            "three expressions": all_three(_three_expressions),
        },
    )  # fmt: skip


# linear_weight_grad and conv_weight_grad: against PyTorch's weight gradient without statistics


class _Layer(NamedTuple):
    grad_out: Tensor
    input: Tensor
    plain: list[Tensor]
    truth: list[Tensor]


GradOfSamples = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""(grad_out, input) → (gradient of the weight, of the bias), summed over the samples."""

Op = Callable[[Tensor, Tensor], tuple[Tensor, ...]]
"""(grad_out, input) → what `ops.linear_weight_grad` returns."""


def _one_by_one(grad: GradOfSamples, grad_out: Tensor, input: Tensor) -> list[Tensor]:
    """Sums, squared norms and sums of squares, from one sample's gradient after the other."""
    sums: list[Tensor] = []
    norms = []
    for i in range(len(input)):
        c = grad(grad_out[i : i + 1], input[i : i + 1])
        squares = [t.square() for t in c]
        norms.append(squares[0].sum() + squares[1].sum())
        if not sums:
            sums = [torch.zeros_like(t) for t in (*c, *squares)]
        torch._foreach_add_(sums, [*c, *squares])
    weight, bias, weight_squares, bias_squares = sums
    return [weight, bias, torch.stack(norms), weight_squares, bias_squares]


def _layer(
    name: str, shape: str, grad_out_shape: Sequence[int], input_shape: Sequence[int],
    grad: GradOfSamples, op: Callable[[bool], Op], others: Mapping[str, Op] = MappingProxyType({}),
) -> Case:  # fmt: skip
    """`op` without and with coordinates, and others with them."""

    def inputs() -> _Layer:
        random = torch.Generator().manual_seed(0)
        d = torch.randn(*grad_out_shape, generator=random)
        x = torch.randn(*input_shape, generator=random)
        plain, truth = _one_by_one(grad, d, x), _one_by_one(grad, d.double(), x.double())
        plain[:2] = grad(d, x)
        return _Layer(d, x, plain, truth)

    def alone(x: _Layer) -> Variant:
        return Variant(lambda: grad(x.grad_out, x.input), lambda: None)

    def ours(op: Op, coordinates: bool) -> Callable[[_Layer], Variant]:
        def make(x: _Layer) -> Variant:
            def run() -> tuple[Tensor, ...]:
                return op(x.grad_out, x.input)

            def results() -> list[Tensor]:
                weight, bias, probe, weight_squares, bias_squares = run()
                found = [weight, bias, probe[0], weight_squares, bias_squares]
                return found if coordinates else found[:3]

            count = 5 if coordinates else 3
            return Variant(run, check_results(results, x.plain[:count], x.truth[:count]))

        return make

    return Case(
        name, shape, input_shape[0], inputs,
        plain={"weight gradient alone": alone},
        variants={
            "+ norms": ours(op(False), False),
            "+ norms + coordinates": ours(op(True), True),
            **{variant: ours(other, True) for variant, other in others.items()},
        },
    )  # fmt: skip


def _linear(b: int, positions: int, in_features: int, out_features: int) -> Case:
    def grad(grad_out: Tensor, input: Tensor) -> tuple[Tensor, Tensor]:
        d, x = grad_out.flatten(0, -2), input.flatten(0, -2)
        return d.t().mm(x), d.sum(0)

    def op(coordinates: bool) -> Op:
        return lambda g, x: ops.linear_weight_grad(g, x, b, True, True, coordinates)

    middle = (positions,) if positions > 1 else ()
    what = f"{b}x{positions}x{in_features}to{out_features}"
    return _layer(
        f"linear_weight_grad/{what}",
        f"{b} samples, {positions} positions, {in_features} → {out_features}",
        (b, *middle, out_features), (b, *middle, in_features), grad, op,
    )  # fmt: skip


def _conv(b: int, channels: int, out: int, kernel: int, height: int, padding: int) -> Case:
    @functools.cache
    def weight(dtype: torch.dtype) -> Tensor:
        return torch.zeros(out, channels, kernel, kernel, dtype=dtype)

    def grad(grad_out: Tensor, input: Tensor) -> tuple[Tensor, Tensor]:
        _, grad_weight, grad_bias = torch.ops.aten.convolution_backward.default(
            grad_out, input, weight(input.dtype), [out], [1, 1], [padding] * 2, [1, 1],
            False, [0, 0], 1, [False, True, True],
        )  # fmt: skip
        return grad_weight, grad_bias

    shape = [kernel] * 2, [1, 1], [padding] * 2, [1, 1], 1

    def op(coordinates: bool) -> Op:
        return lambda g, x: ops.conv_weight_grad(g, x, *shape, b, True, True, coordinates)

    def by_samples(grad_out: Tensor, input: Tensor) -> tuple[Tensor, ...]:
        of_weight, of_bias = ops.conv_sample_grads(grad_out, input, *shape)
        weight, weight_squares, norms = ops.sample_statistics(of_weight.flatten(1))
        bias, bias_squares, bias_norms = ops.sample_statistics(of_bias)
        weight, weight_squares = (t.view(of_weight.shape[1:]) for t in (weight, weight_squares))
        return weight, bias, (norms + bias_norms).unsqueeze(0), weight_squares, bias_squares

    return _layer(
        f"conv_weight_grad/{b}x{channels}to{out}k{kernel}h{height}",
        f"{b} samples, {channels} → {out} channels, {kernel}×{kernel}, {height}×{height} pixels",
        (b, out, height, height), (b, channels, height, height), grad, op,
        {"c_i, then their statistics": by_samples},
    )  # fmt: skip
