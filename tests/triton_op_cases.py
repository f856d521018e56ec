"""Triton kernels of the other ops against float64, and what all of them refuse."""

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from tolerance import assert_close_to_truth
from torch import Tensor
from triton_cases import (  # noqa: F401
    BF16,
    F32,
    compare,
    double,
    pytestmark,
    where_the_kernels_run,
)

from adagrad_kernels import reference, triton_kernels
from adagrad_kernels.triton_kernels import (
    adagrad,
    common,
    conv,
    embedding,
    linear,
    norm,
    statistics,
)


@pytest.mark.parametrize("coordinates", [False, True])
@pytest.mark.parametrize(
    ("shape", "tokens", "width", "padding_idx"),
    [
        ((3, 10), 7, 20, 2),
        ((2,), 5, 300, -1),
        ((4, 3, 11), 6, 16, 0),
        ((35, 12), 2, 5, 1),  # samples are split
    ],
)
def test_embedding(
    shape: tuple[int, ...], tokens: int, width: int, padding_idx: int, coordinates: bool
) -> None:
    g, indices = torch.randn(*shape, width), torch.randint(tokens, shape)
    arguments = (g, indices, tokens + 1, padding_idx, shape[0] + 2, coordinates)
    compare(embedding.embedding_weight_grad, reference.embedding_weight_grad, *arguments)


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("shape", [(5, 3), (70, 30), (3, 1000), (40, 1)])
def test_sample_statistics(shape: tuple[int, int], dtype: torch.dtype) -> None:
    g = torch.rand(shape, dtype=dtype)
    compare(statistics.sample_statistics, reference.sample_statistics, g)


@pytest.mark.parametrize("rows", [[5], [3, 0, 40], [0, 1100], [2000, 1], [0, 0]])
@pytest.mark.parametrize("spare", [0, 3])
def test_pool_samples(rows: list[int], spare: int) -> None:
    probes = [torch.rand(2, n + spare) for n in rows]
    for probe in probes:
        probe[1] = torch.randint(1, 4, probe.shape[1:]).float()
    norms, totals = statistics.pool_samples(probes, rows)
    expected_norms, expected = reference.pool_samples(probes, rows)
    assert torch.equal(norms, expected_norms)
    assert totals.dtype == torch.float64
    torch.testing.assert_close(totals[0], expected[0], rtol=1e-14, atol=0)
    assert torch.equal(totals[1:], expected[1:])


def parameters() -> list[Tensor]:
    image = torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last)
    return [torch.randn(3, 5), image, torch.randn(3000), torch.randn(()), torch.randn(0)]


def updated(update: Callable[..., Any], params: Any, grads: Any, sums: Any, *rest: Any) -> Any:
    """Everything that an update changes or returns, from copies of its arguments; float32."""
    params = [p.clone() for p in params]
    sums = [v.clone() for v in sums] if isinstance(sums, list) else sums.clone()
    norm_sq, reductions = update(params, grads, sums, *rest)
    sums = sums if isinstance(sums, list) else [sums]
    return [norm_sq, *reductions, *params, *sums]


@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize("coordinates", [False, True])
@pytest.mark.parametrize("scalar", [False, True])
def test_adagrad(scalar: bool, coordinates: bool, maximize: bool) -> None:
    params = parameters()
    grads = [torch.randn(p.shape) for p in params]  # of another layout than the image
    squares = [g.square() / 7 + torch.rand(g.shape) for g in grads] if coordinates else []
    if scalar:
        sums: Any = torch.tensor(0.5, dtype=torch.float64)
        rest: Sequence[Any] = ([0.1, 0.2, 0.3, 0.4, 0.5], 1e-10, [0.01, 0.0, 0.0, 0.1, 0.0])
        kernel, plain = adagrad.adagrad_norm_, reference.adagrad_norm_
    else:
        sums = [torch.rand_like(p) for p in params]
        rest = (0.1, 1e-10, 0.01)
        kernel, plain = adagrad.adagrad_, reference.adagrad_
    arguments = (params, grads, sums, squares, *rest, maximize, 0.5, 9)
    results = updated(kernel, *arguments)
    plains, truths = updated(plain, *arguments), updated(plain, *double(arguments))
    for result, expected, truth in zip(results, plains, truths, strict=True):
        # Sums come in float64 but of float32 terms.
        assert_close_to_truth(result.float(), truth, expected.float())


def test_adagrad_says_what_does_not_fit() -> None:
    w, v = [torch.ones(2, 3)], [torch.ones(2, 3)]
    rest = (0.1, 1e-10, 0.0, False, 1.0, 2)
    with pytest.raises(RuntimeError, match="differ in length"):
        adagrad.adagrad_(w, w, v * 2, [], *rest)
    with pytest.raises(RuntimeError, match="the shape of gradient 0"):
        adagrad.adagrad_(w, [torch.ones(3, 2)], v, [], *rest)
    with pytest.raises(RuntimeError, match="accumulator 0"):
        adagrad.adagrad_(w, w, [torch.ones(3, 2).T], [], *rest)
    with pytest.raises(RuntimeError, match="gaps"):
        adagrad.adagrad_([torch.ones(2, 6)[:, ::2]], w, v, [], *rest)


def test_terms_of_many_blocks() -> None:
    table = torch.rand(2500, 5)
    table[100, 2] = 7
    truth = table.double().sum(0)
    truth[2] = 7
    assert_close_to_truth(adagrad.pool_terms(table, 5).float(), truth, truth.float())


def test_grad_norm_sq() -> None:
    tensors = [*parameters(), torch.randn(4, 6)[:, ::2], torch.randn(3).bfloat16()]
    truth = reference.grad_norm_sq(tensors)
    found = adagrad.grad_norm_sq(tensors)
    assert_close_to_truth(found.float(), truth, truth.float())


@pytest.mark.parametrize("kernel", [linear.linear_weight_grad, conv.conv_weight_grad])
def test_shapes_that_do_not_fit(kernel: Callable[..., Any]) -> None:
    options = () if kernel is linear.linear_weight_grad else ([1], [1], [0], [1], 1)
    with pytest.raises(RuntimeError, match="expected grad_out"):
        kernel(torch.ones(2, 3, 4), torch.ones(3, 3, 4), *options, 3, True, True, False)
    with pytest.raises(RuntimeError, match="do not fit a probe of capacity 1"):
        kernel(torch.ones(2, 3, 4), torch.ones(2, 3, 4), *options, 1, True, True, False)


def test_embedding_and_scale_shapes_that_do_not_fit() -> None:
    tokens = torch.zeros(2, 3, dtype=torch.int64)
    with pytest.raises(RuntimeError, match="expected grad_out"):
        embedding.embedding_weight_grad(torch.ones(2, 4, 5), tokens, 5, -1, 2, False)
    with pytest.raises(RuntimeError, match="expected grad_out"):
        norm.scale_weight_grad(
            torch.ones(2, 1, 3, 1), torch.ones(2, 3), None, None, 2, True, True, False
        )
    with pytest.raises(RuntimeError, match="expected g"):
        statistics.sample_statistics(torch.ones(3))
    with pytest.raises(RuntimeError, match="4 rows in a probe of capacity 3"):
        statistics.pool_samples([torch.ones(2, 3)], [4])


@pytest.mark.parametrize("name", triton_kernels.FAMILIES)
def test_registered_functions_take_what_the_schemas_give(
    monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Kernels, or for float64 the reference: both get an op's arguments by position."""
    if common.interpreting():
        monkeypatch.setattr(triton_kernels, "_capable", lambda device: True)
        monkeypatch.setattr(torch.cuda, "device", contextlib.nullcontext)
    p, g, sequence = [torch.ones(3)], [torch.rand(3)], (torch.randn(2, 3, 4), torch.randn(2, 3, 5))
    v = torch.ones((), dtype=torch.float64)
    weight = torch.ones(4, 5), torch.rand(4, 5)
    rest = (True, True, True)
    arguments = {
        "sample_statistics": (torch.randn(3, 4),),
        "pool_samples": ([torch.rand(2, 4)], [3]),
        "adagrad_": (p, g, [torch.ones(3)], [], 0.1, 1e-10, 0.0, False, 1.0, 2),
        "adagrad_norm_": (p, g, v, [], [0.1], 1e-10, [0.0], False, 1.0, 2),
        "grad_norm_sq": (g,),
        "linear_weight_grad": (*sequence, 2, *rest),
        "linear_adagrad_": (*sequence, *weight, 2, True, False, 0.1, 1e-10, 0.0, False, 1.0),
        "conv_weight_grad": (*sequence, [1], [1], [0], [1], 1, 2, *rest),
        "embedding_weight_grad": (sequence[0], torch.tensor([[0, 1, 0]] * 2), 2, -1, 2, True),
        "scale_weight_grad": (*[torch.randn(2, 3, 4, 1)] * 2, None, None, 2, *rest),
        "norm_backward": (
            *[torch.randn(2, 3, 4, 1)] * 2,
            None,
            torch.rand(2, 3, 1, 1),
            torch.ones(4),
            2,
            *rest,
            True,
        ),
    }[name]
    if name == "conv_weight_grad":
        arguments = (sequence[0].transpose(1, 2), sequence[1].transpose(1, 2), *arguments[2:])
    for these in (arguments, tuple(double(arguments))):
        truth = getattr(reference, name)(*double(these))
        result = triton_kernels._kernel(name)(*[a.clone() if a is v else a for a in these])
        for found, wanted in zip(
            [result] if isinstance(result, Tensor) else result,
            [truth] if isinstance(truth, Tensor) else truth,
            strict=True,
        ):
            assert_close_to_truth(found.float(), wanted, wanted.float())
