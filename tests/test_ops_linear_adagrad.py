"""`linear_adagrad_` with every option against float64."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from layouts import DTYPES, dtypes, laid_out, layouts, sizes
from tolerance import assert_close_to_truth
from torch import Tensor

from adagrad_kernels import ops, reference

pytestmark = pytest.mark.usefixtures("nan_memory")

NAMES = ("norm", "reductions", "grad_bias", "probe", "weight_sums", "bias_sums", "weight", "sum")
OPTIONS = {"lr": 0.1, "eps": 1e-10, "weight_decay": 0.0, "maximize": False, "grad_scale": 1.0}


def run(
    where: Any, tensors: list[Tensor], rest: tuple[Any, ...], options: dict[str, Any]
) -> dict[str, Tensor]:
    """Everything returned and changed; the arguments themselves are left alone."""
    grad_out, x, w, v = tensors
    w, v = w.clone(), v.clone()
    found = where.linear_adagrad_(grad_out, x, w, v, *rest, *options.values())
    return dict(zip(NAMES, (*found, w, v), strict=True))


def check(
    grad_out: Tensor, x: Tensor, weight_dtype: torch.dtype, rest: tuple, options: dict[str, Any]
) -> None:
    """The op equals its reference in float64; the size of a sum is that of its terms."""
    b, (capacity, bias, coordinates) = grad_out.shape[0], rest
    shape = grad_out.shape[-1], x.shape[-1]
    w = torch.randn(shape, device=x.device).to(weight_dtype)
    exact = torch.float64 if weight_dtype == torch.float64 else torch.float32
    v = torch.rand(shape, device=x.device, dtype=exact) + 0.01
    tensors = [grad_out, x, w, v]
    found = run(torch.ops.adagrad_kernels, tensors, rest, options)
    truth = run(reference, [t.double() for t in tensors], rest, options)
    plain = run(reference, tensors, rest, options)
    size = run(reference, [t.double().abs() for t in tensors], rest, {**options, "maximize": False})
    step = (size["sum"] - v.double()).clamp(min=0).sqrt()  # the terms of d, added up
    size["weight"] = w.double().abs() + options["lr"] * step / v.double().sqrt()
    grad_dtype = torch.float64 if grad_out.dtype == torch.float64 else torch.float32
    for name in NAMES:
        if name == "reductions":
            continue
        a, t, p, s = (results[name] for results in (found, truth, plain, size))
        if name == "norm":
            a, p = a.to(grad_dtype), p.to(grad_dtype)
        if name == "probe":
            assert a.shape == (2, capacity)
            assert torch.equal(a[1].double(), t[1])
            assert not a[0, b:].any()
            a, t, p, s = a[0], t[0], p[0], s[0]
        assert_close_to_truth(a, t, p, s, name)
    assert found["norm"].dtype == found["reductions"].dtype == torch.float64
    if coordinates and b > 1:
        check_reductions(grad_out, x, v, found, truth, plain, options)
    assert found["grad_bias"].shape == (shape[0] if bias else 0,)


def check_reductions(
    grad_out: Tensor, x: Tensor, v: Tensor, found, truth, plain, options: dict[str, Any]
) -> None:
    b, scale = grad_out.shape[0], options["grad_scale"]
    g, terms = (
        torch.einsum("bto,bti->oi", d.flatten(1, -2) if d.dim() > 2 else d[:, None], a) * scale
        for d, a in ((_wide(grad_out), _wide(x)), (_wide(grad_out).abs(), _wide(x).abs()))
    )
    first = truth["weight_sums"] * (scale * b) ** 2 / (b - 1)
    ratio = torch.where(g != 0, first / g**2 * (1 + terms / g.abs()), 0.0)
    root = v.double().sqrt()
    largest = torch.cat([ratio.flatten(), ratio.new_zeros(1)]).max()
    sizes = [first.sum(), largest, (first / root).sum(), (terms**2 / root).sum()]
    dtype = torch.float64 if grad_out.dtype == torch.float64 else torch.float32
    for k, s in enumerate(sizes):
        a, t, p = (r["reductions"][k] for r in (found, truth, plain))
        assert_close_to_truth(a.to(dtype), t, p.to(dtype), s, f"reduction {k}")


def _wide(t: Tensor) -> Tensor:
    return t.double().reshape(t.shape[0], t.shape[1:-1].numel(), t.shape[-1])


@settings(max_examples=60)
@given(
    sizes, st.lists(st.integers(0, 3), max_size=2), sizes, sizes,
    st.tuples(st.booleans(), st.booleans()), dtypes, layouts, layouts,
    st.fixed_dictionaries({
        "lr": st.sampled_from([0.0, 0.1, 3.0]),
        "eps": st.sampled_from([1e-10, 1e-3]),
        "weight_decay": st.sampled_from([0.0, 0.2]),
        "maximize": st.booleans(),
        "grad_scale": st.sampled_from([1.0, 0.25]),
    }),
)  # fmt: skip
def test_every_option(
    device: torch.device, b, positions, out, features, wanted, dtype, layout, layout_2, options
) -> None:
    grad_out = laid_out(torch.randn(b, *positions, out, device=device).to(dtype), layout)
    x = laid_out(torch.randn(b, *positions, features, device=device).to(dtype), layout_2)
    check(grad_out, x, dtype, (b + 2, *wanted), options)


@pytest.mark.parametrize("coordinates", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "shape",
    [
        (3, 1, 300, 200),
        (600, 1, 40, 70),  # more samples than are packed at a time, the last chunk not full
        (40, 1, 37, 9000),  # so large an input that tasks take several tiles
        (12, 3, 300, 500),  # few positions: one product over all of them
        (3, 40, 30, 33),  # many
    ],
)
def test_over_tiles_chunks_and_threads(
    device: torch.device, shape, dtype: torch.dtype, coordinates: bool
) -> None:
    b, positions, out, features = shape
    grad_out = torch.randn(b, positions, out, device=device).to(dtype)
    x = torch.randn(b, positions, features, device=device).to(dtype)
    check(grad_out, x, dtype, (b, True, coordinates), {**OPTIONS, "weight_decay": 0.1})


def test_low_precision_operands_of_a_float32_weight(device: torch.device) -> None:
    """As autocast has it."""
    grad_out = torch.randn(8, 20, device=device).bfloat16()
    x = torch.randn(8, 30, device=device).bfloat16()
    check(grad_out, x, torch.float32, (8, True, False), OPTIONS)


@pytest.mark.parametrize("where", ["kernel", "reference"])
@pytest.mark.parametrize(
    ("weight", "sum", "capacity", "message"),
    [
        (torch.ones(3, 2), torch.ones(2, 3), 4, "weight must be a contiguous tensor"),
        (torch.ones(2, 3), torch.ones(2, 1).expand(2, 3), 4, "sum must be a contiguous tensor"),
        (torch.ones(3, 2).t(), torch.ones(2, 3), 4, "weight must be a contiguous tensor"),
        (torch.ones(2, 3), torch.ones(2, 3).double(), 4, "sum must be float32"),
        (torch.ones(2, 3).bfloat16(), torch.ones(2, 3).bfloat16(), 4, "sum must be float32"),
        (torch.ones(2, 3), torch.ones(2, 3), 3, "do not fit a probe of capacity 3"),
    ],
)
def test_wrong_tensors_change_nothing(
    where: str, weight: Tensor, sum: Tensor, capacity: int, message: str
) -> None:
    of = torch.ops.adagrad_kernels if where == "kernel" else reference
    with pytest.raises(RuntimeError, match=message):
        of.linear_adagrad_(
            torch.ones(4, 2), torch.ones(4, 3), weight, sum, capacity, True, False,
            *OPTIONS.values(),
        )  # fmt: skip
    assert (weight == 1).all()
    assert (sum == 1).all()


def test_operands_that_do_not_fit() -> None:
    w, v = torch.ones(2, 3), torch.ones(2, 3)
    with pytest.raises(RuntimeError, match="expected grad_out"):
        ops.linear_adagrad_(torch.ones(4, 2), torch.ones(5, 3), w, v, 5)
    assert (w == 1).all()
