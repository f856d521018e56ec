"""Triton kernels of linear layers, with the update in them too, against float64."""

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tolerance import assert_close_to_truth
from torch import Tensor
from triton_cases import (  # noqa: F401
    BF16,
    F16,
    F32,
    compare,
    double,
    pytestmark,
    where_the_kernels_run,
)

from adagrad_kernels import reference
from adagrad_kernels.triton_kernels import (
    linear,
    linear_update,
)

# b, T, O, I: one position and several, below and beyond one tile, one split and several
LINEAR = [(5, 1, 7, 9), (40, 1, 130, 70), (3, 5, 17, 20), (4, 70, 33, 140), (9, 65, 20, 1)]


@pytest.mark.parametrize(("shape", "dtype", "coordinates"), [
    *itertools.product(LINEAR, [F32], [False, True]),
    (LINEAR[1], BF16, True), (LINEAR[3], BF16, True), (LINEAR[3], F16, False),
])  # fmt: skip
def test_linear(shape: tuple[int, ...], dtype: torch.dtype, coordinates: bool) -> None:
    b, positions, rows, columns = shape
    g = torch.randn(b, positions, rows, dtype=dtype)
    x = torch.randn(b, positions, columns, dtype=dtype)
    for method in ("direct", None) if positions > 1 else (None,):

        def kernel(*arguments: Any, method: str | None = method) -> Any:
            return linear.linear_weight_grad(*arguments, method=method)

        compare(kernel, reference.linear_weight_grad, g, x, b + 3, True, True, coordinates)


@pytest.mark.parametrize("positions", [2, 64, 65, 130])
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_gram(positions: int, dtype: torch.dtype) -> None:
    g = torch.randn(2, positions, 20, dtype=dtype)
    x = torch.randn(2, positions, 70, dtype=dtype)

    def kernel(*arguments: Any) -> Any:
        return linear.linear_weight_grad(*arguments, method="gram")

    compare(kernel, reference.linear_weight_grad, g, x, 2, True, True, False)


@pytest.mark.parametrize("positions", [1, 4])
@pytest.mark.parametrize(("weight", "bias"), [(True, False), (False, True)])
def test_linear_with_one_frozen(positions: int, weight: bool, bias: bool) -> None:
    g = torch.randn(3, positions, 6).expand(3, positions, 6)
    x = torch.randn(4, positions, 3).transpose(0, 2)  # not contiguous
    compare(linear.linear_weight_grad, reference.linear_weight_grad, g, x, 3, weight, bias, True)


def test_linear_takes_more_dimensions() -> None:
    g, x = torch.randn(3, 2, 4, 6), torch.randn(3, 2, 4, 5)
    compare(linear.linear_weight_grad, reference.linear_weight_grad, g, x, 3, True, True, True)


def test_the_gram_form_is_for_norms_of_few_positions_alone() -> None:
    def method(positions: int, coordinates: bool) -> str:
        g = torch.empty(8, positions, 1024, device="meta")
        return linear.choose_method(g, g, coordinates)

    assert method(1, False) == "outer"
    assert method(16, False) == "gram"
    assert method(16, True) == "direct"
    assert method(2048, False) == "direct"


@pytest.mark.parametrize(("coordinates", "bias", "maximize"), [
    (False, False, False), (False, True, True), (True, True, False)
])  # fmt: skip
@pytest.mark.parametrize("shape", [(5, 1, 30, 70), (4, 33, 20, 150), (70, 1, 140, 70)])
def test_linear_update(
    shape: tuple[int, ...], coordinates: bool, bias: bool, maximize: bool
) -> None:
    b, positions, rows, columns = shape
    g, x = torch.randn(b, positions, rows), torch.randn(b, positions, columns)
    w, v = torch.randn(rows, columns), torch.rand(rows, columns)
    rest = (b + 3, bias, coordinates, 0.1, 1e-9, 0.02, maximize, 0.5)

    def everything(update: Callable[..., Any], *tensors: Tensor) -> list[Tensor]:
        g, x, w, v = (t.clone() for t in tensors)
        norm_sq, reductions, *others = update(g, x, w, v, *rest)
        return [norm_sq, *reductions, *others, w, v]

    plain = reference.linear_adagrad_
    results = everything(linear_update.linear_adagrad_, g, x, w, v)
    truths, plains = everything(plain, *double([g, x, w, v])), everything(plain, g, x, w, v)
    for k, (result, truth, expected) in enumerate(zip(results, truths, plains, strict=True)):
        assert_close_to_truth(result.float(), truth, expected.float(), what=f"result {k}")


def test_linear_update_changes_nothing_before_it_raises() -> None:
    w, v = torch.ones(2, 3), torch.ones(2, 3)
    with pytest.raises(RuntimeError, match="4 samples do not fit a probe of capacity 3"):
        linear_update.linear_adagrad_(
            torch.ones(4, 2), torch.ones(4, 3), w, v, 3, True, False, 0.1, 0.0, 0.0, False, 1.0
        )
    assert (w == 1).all()
    assert (v == 1).all()
