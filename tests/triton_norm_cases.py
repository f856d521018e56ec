"""Triton kernels of normalisations, and the last launch of every op, against float64."""

import pytest
import torch
from tolerance import assert_close_to_truth
from triton_cases import (  # noqa: F401
    BF16,
    F32,
    compare,
    double,
    pytestmark,
    where_the_kernels_run,
)

from adagrad_kernels import reference
from adagrad_kernels.triton_kernels import (
    finish,
    norm,
)


@pytest.mark.parametrize(("weight", "bias"), [(True, True), (True, False), (False, True)])
@pytest.mark.parametrize(
    ("shape", "statistics_shape"),
    [
        ((3, 7, 140, 1), (3, 7, 1, 1)),  # LayerNorm
        ((3, 1, 20, 600), (3, 1, 20, 1)),  # GroupNorm, more than one chunk
        ((2, 1, 5, 9), (1, 1, 5, 1)),  # BatchNorm
        ((2, 530, 3, 1), None),  # no mean
        ((3, 5, 6, 1), (3, 5, 6, 1)),  # statistics of each element
    ],
)
def test_scale(
    shape: tuple[int, ...], statistics_shape: tuple[int, ...] | None, weight: bool, bias: bool
) -> None:
    g, x = torch.randn(shape), torch.randn(shape)
    mean = torch.randn(statistics_shape) if statistics_shape else None
    rstd = torch.rand(statistics_shape or (*shape[:2], 1, 1))
    arguments = (g, x, mean, rstd, shape[0] + 2, weight, bias, True)
    compare(norm.scale_weight_grad, reference.scale_weight_grad, *arguments)


@pytest.mark.parametrize(
    ("shape", "statistics_shape"),
    [
        ((3, 7, 40, 1), (3, 7, 1, 1)),  # LayerNorm
        ((2, 300, 33, 1), (2, 300, 1, 1)),  # in more chunks than are added up at once
        ((5, 1, 1500, 1), (5, 1, 1, 1)),
        ((2, 2, 8200, 1), (2, 2, 1, 1)),  # rows too long for a program
        ((3, 1, 20, 30), (3, 1, 5, 1)),  # GroupNorm
        ((3, 1, 18, 30), (3, 1, 6, 1)),  # of three channels each
        ((2, 1, 80, 6), (2, 1, 2, 1)),  # of forty
        ((2, 1, 5, 1100), (2, 1, 1, 1)),  # more positions than in a tile
        ((2, 1, 7, 9), (2, 1, 7, 1)),  # InstanceNorm
        ((2, 1, 6, 6), (2, 1, 6, 1)),  # with as many pixels as channels
        ((3, 1, 20, 30), (1, 1, 20, 1)),  # BatchNorm
        ((40, 1, 70, 1), (1, 1, 70, 1)),  # without pixels
        ((2, 3, 4, 5), (2, 3, 2, 1)),  # GroupNorm of three rows a sample
    ],
)
@pytest.mark.parametrize("centred", [True, False])
def test_norm_backward(
    shape: tuple[int, ...], statistics_shape: tuple[int, ...], centred: bool
) -> None:
    g, x, scale = torch.randn(shape), torch.randn(shape), torch.randn(shape[2])
    blocks = (*statistics_shape[:3], -1)  # true moments: torch's kernels may use that they are
    seen = x.transpose(0, 2) if statistics_shape[0] == 1 else x
    variance, mean = torch.var_mean(seen.reshape(blocks), 3, correction=0, keepdim=True)
    mean, rstd = mean.reshape(statistics_shape), variance.rsqrt().reshape(statistics_shape)
    if not centred and statistics_shape[0] == 1:
        return  # no layer has that
    given = mean if centred else None
    arguments = (g, x, given, rstd, scale, shape[0] + 2)
    compare(norm.norm_backward, reference.norm_backward, *arguments, *[True] * 4)
    channels_last = [t.transpose(2, 3).contiguous().transpose(2, 3) for t in (g, x)]
    compare(
        norm.norm_backward, reference.norm_backward, *channels_last, *arguments[2:], *[True] * 4
    )


@pytest.mark.parametrize("statistics_shape", [(3, 1, 2, 1), (1, 1, 6, 1)])
@pytest.mark.parametrize(("weight", "bias"), [(True, False), (False, True), (False, False)])
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_norm_backward_with_frozen_parts(
    statistics_shape: tuple[int, ...], weight: bool, bias: bool, dtype: torch.dtype
) -> None:
    """The input's gradient is the same, and frozen parts are not in the norms."""
    g, x, scale = torch.randn(3, 1, 6, 5), torch.randn(3, 1, 6, 5), torch.randn(6)
    blocks = (3, 2, 15) if statistics_shape[0] == 3 else (3, 6, 5)
    over = 2 if statistics_shape[0] == 3 else (0, 2)
    variance, mean = torch.var_mean(x.reshape(blocks), over, correction=0, keepdim=True)
    mean, rstd = mean.reshape(statistics_shape), variance.rsqrt().reshape(statistics_shape)
    arguments = (g.to(dtype), x.to(dtype), mean, rstd, scale, 3, weight, bias, False, False)
    compare(norm.norm_backward, reference.norm_backward, *arguments)


@pytest.mark.parametrize("squares", [True, False])
@pytest.mark.parametrize(
    ("samples", "parts", "vectors", "chunks", "n"),
    [
        (3, 4, 0, 1, 0),
        (2, 1030, 1, 1, 140),  # more parts and elements than a program takes at a time
        (3, 0, 2, 5, 20),
        (2, 3, 2, 32, 130),
        (3, 2, 1, 33, 7),  # added up before
        (300, 1, 2, 1, 20),  # samples are split
        (1, 0, 0, 1, 0),
    ],
)
def test_finish(samples: int, parts: int, vectors: int, chunks: int, n: int, squares: bool) -> None:
    partials = torch.rand(samples, parts) if parts else None
    v = torch.randn(vectors, samples, chunks, n) if vectors else None
    for capacity in (samples, samples + 200, samples + 1500):
        done = finish.finish(torch.zeros(0).device, partials, v, samples, capacity, squares)
        truth = torch.zeros(2, capacity, dtype=torch.float64)
        truth[1, :samples] = 1
        if partials is not None:
            truth[0, :samples] += partials.double().sum(1)
        whole = torch.zeros(0, samples, n).double() if v is None else v.double().sum(2)
        truth[0, :samples] += whole.square().sum((0, 2))
        assert_close_to_truth(done.probe, truth, truth.float())
        assert len(done.sums) == vectors
        for of_k, (total, square) in zip(whole, done.sums, strict=True):
            expected = of_k.sum(0), of_k.square().sum(0) if squares else torch.zeros(0).double()
            assert_close_to_truth(total, expected[0], of_k.float().sum(0))
            assert_close_to_truth(square, expected[1], expected[1].float())
    with pytest.raises(RuntimeError, match="do not fit a probe of capacity"):
        finish.finish(torch.zeros(0).device, partials, v, samples, samples - 1, squares)
