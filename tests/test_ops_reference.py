"""`reference/`, the truth of all op tests, against torch's own functions and autograd."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from adagrad_kernels import reference
from adagrad_kernels.reductions import MAX_RATIO, CoordinateReductions


def close(actual: Tensor, expected: Tensor) -> None:
    """Both are float64 and differ by rounding alone."""
    assert actual.dtype == expected.dtype == torch.float64
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


def randn(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def check_layer(
    grads: tuple[Tensor, ...], expected: dict[str, Tensor | None], capacity: int, coordinates: bool
) -> None:
    """`expected`: per-sample gradients [b, *shape] of weight and bias, None if not wanted."""
    grad_w, grad_b, probe, sums_w, sums_b = grads
    given = [g for g in expected.values() if g is not None]
    b = given[0].shape[0]
    close(probe[0, :b], sum(g.flatten(1).square().sum(1) for g in given))
    assert probe.shape == (2, capacity)
    assert torch.equal(probe[1], (torch.arange(capacity) < b).double())
    assert not probe[0, b:].any()
    for g, grad, sums in zip(expected.values(), (grad_w, grad_b), (sums_w, sums_b), strict=True):
        if g is None:
            assert grad.shape == sums.shape == (0,)
            continue
        close(grad, g.sum(0))
        if coordinates:
            close(sums, g.square().sum(0))
        else:
            assert sums.shape == (0,)


def autograd(function, x: Tensor, params: list[Tensor | None], grad_out: Tensor) -> list:
    """Each sample's gradients of `params` by autograd, one sample at a time, [b, *shape]."""
    found = [[] for _ in params]
    for i in range(x.shape[0]):
        wanted = [p.detach().requires_grad_() for p in params if p is not None]
        rest = iter(wanted)
        full = [None if p is None else next(rest) for p in params]
        out = function(x[i : i + 1], *full)
        grads = iter(torch.autograd.grad(out, wanted, grad_out[i : i + 1]))
        for rows, p in zip(found, params, strict=True):
            if p is not None:
                rows.append(next(grads))
    return [torch.stack(rows) if rows else None for rows in found]


FLAGS = [(True, True, True), (True, False, True), (False, True, True), (True, True, False)]


@pytest.mark.parametrize(("weight", "bias", "coordinates"), FLAGS)
@pytest.mark.parametrize("positions", [(), (3,), (2, 2)])
def test_linear(positions, weight: bool, bias: bool, coordinates: bool) -> None:
    x, g = randn(4, *positions, 5), randn(4, *positions, 3)
    w, v = autograd(F.linear, x, [randn(3, 5), randn(3)], g)
    found = reference.linear_weight_grad(g, x, 6, weight, bias, coordinates)
    expected = {"weight": w if weight else None, "bias": v if bias else None}
    check_layer(found, expected, 6, coordinates)


@pytest.mark.parametrize(("weight", "bias", "coordinates"), FLAGS)
@pytest.mark.parametrize(
    ("shape", "kernel", "stride", "padding", "dilation", "groups"),
    [
        ((7,), [3], [2], [1], [1], 1),
        ((5, 6), [3, 2], [1, 2], [1, 0], [2, 1], 1),
        ((4, 4), [1, 3], [2, 1], [0, 2], [1, 1], 2),
        ((4, 3, 5), [2, 1, 3], [1, 1, 2], [1, 0, 1], [1, 1, 2], 2),
    ],
)
def test_conv(
    shape, kernel, stride, padding, dilation, groups, weight: bool, bias: bool, coordinates: bool
) -> None:
    conv = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}[len(kernel)]

    def function(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return conv(x, w, b, stride, padding, dilation, groups)

    x, params = randn(3, 4, *shape), [randn(6, 4 // groups, *kernel), randn(6)]
    g = randn(*function(x, *params).shape)
    w, v = autograd(function, x, params, g)
    found = reference.conv_weight_grad(
        g, x, kernel, stride, padding, dilation, groups, 3, weight, bias, coordinates
    )
    expected = {"weight": w if weight else None, "bias": v if bias else None}
    check_layer(found, expected, 3, coordinates)
    options = stride, padding, dilation, groups
    samples = reference.conv_sample_grads(g, x, kernel, *options, weight, bias)
    for own, of in zip(samples, expected.values(), strict=True):
        close(own, own.new_empty(0) if of is None else of)


@pytest.mark.parametrize("coordinates", [True, False])
@pytest.mark.parametrize("padding_idx", [-1, 2])
def test_embedding(padding_idx: int, coordinates: bool) -> None:
    tokens, g = torch.tensor([[0, 2, 0, 4], [2, 2, 2, 2], [1, 4, 4, 3]]), randn(3, 4, 3)
    index = None if padding_idx < 0 else padding_idx

    def function(x: Tensor, w: Tensor) -> Tensor:
        return F.embedding(x, w, padding_idx=index)

    (w,) = autograd(function, tokens, [randn(6, 3)], g)
    grad, probe, sums = reference.embedding_weight_grad(g, tokens, 6, padding_idx, 4, coordinates)
    empty = grad.new_empty(0)
    check_layer((grad, empty, probe, sums, empty), {"w": w, "b": None}, 4, coordinates)


@pytest.mark.parametrize(("weight", "bias", "coordinates"), FLAGS)
@pytest.mark.parametrize("normalised", [True, False])
def test_scale(normalised: bool, weight: bool, bias: bool, coordinates: bool) -> None:
    x, g = randn(3, 2, 4, 5), randn(3, 2, 4, 5)
    mean = randn(3, 2, 1, 1) if normalised else None
    rstd = randn(1, 1, 4, 1).exp() if normalised else None

    def function(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return x * w[:, None] + b[:, None]

    x_hat = (x - mean) * rstd if normalised else x
    w, v = autograd(function, x_hat, [randn(4), randn(4)], g)
    found = reference.scale_weight_grad(g, x, mean, rstd, 5, weight, bias, coordinates)
    expected = {"weight": w if weight else None, "bias": v if bias else None}
    check_layer(found, expected, 5, coordinates)


Norm = Callable[[Tensor, Tensor, Tensor], Tensor]  # (x, weight, bias) → y
NORMS: dict[str, tuple[Norm, tuple[int, ...], Callable[[Tensor], tuple]]] = {
    # what torch computes, the shape of x, and (view, mean, rstd) of x
    "layer": (
        lambda x, w, b: F.layer_norm(x, (6,), w, b), (3, 4, 6),
        lambda x: ((3, 4, 6, 1), *moments(x.view(3, 4, 6, 1), 2, 3)),
    ),
    "rms": (
        lambda x, w, b: F.rms_norm(x, (6,), w, 1e-5) + b, (3, 4, 6),
        lambda x: ((3, 4, 6, 1), None, (x.square().mean(2) + 1e-5).rsqrt().view(3, 4, 1, 1)),
    ),
    "group": (
        lambda x, w, b: F.group_norm(x, 2, w, b), (3, 6, 5),
        lambda x: ((3, 1, 6, 5), *(t.view(3, 1, 2, 1) for t in moments(x.view(3, 2, 15), 2))),
    ),
    "batch": (
        lambda x, w, b: F.batch_norm(x, None, None, w, b, training=True), (3, 6, 5),
        lambda x: ((3, 1, 6, 5), *moments(x.view(3, 1, 6, 5), 0, 3)),
    ),
}  # fmt: skip


def moments(x: Tensor, *dims: int) -> tuple[Tensor, Tensor]:
    """Mean and reciprocal standard deviation over some dimensions."""
    variance, mean = torch.var_mean(x, dims, correction=0, keepdim=True)
    return mean, (variance + 1e-5).rsqrt()


@pytest.mark.parametrize(("weight", "bias", "coordinates"), FLAGS)
@pytest.mark.parametrize("name", NORMS)
def test_norm(name: str, weight: bool, bias: bool, coordinates: bool) -> None:
    function, shape, statistics = NORMS[name]
    x, g, w, b = randn(*shape).requires_grad_(), randn(*shape), randn(6), randn(6)
    view, mean, rstd = statistics(x.detach())
    leaves = [t.requires_grad_() for t in (w, b)]
    y = function(x, *leaves)
    (expected,) = torch.autograd.grad(y, x, g, retain_graph=True)
    samples = [
        torch.autograd.grad(y, leaves, g * (torch.arange(3) == i).view(3, 1, 1), retain_graph=True)
        for i in range(3)
    ]
    grad_x, *rest, own = reference.norm_backward(
        g.view(view), x.detach().view(view), mean, rstd, w.detach(), 5,
        weight, bias, coordinates, True,
    )  # fmt: skip
    close(grad_x.view(shape), expected)
    of_w, of_b = (torch.stack(t) for t in zip(*samples, strict=True))
    close(own, torch.stack([of_w, of_b], dim=1))
    check_layer(
        tuple(rest), {"w": of_w if weight else None, "b": of_b if bias else None}, 5, coordinates
    )


def test_per_sample_gradients_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    x, g = randn(7, 3, 4), randn(7, 3, 2)
    whole = reference.linear_weight_grad(g, x, 7, True, True, True)
    monkeypatch.setattr(reference.layers, "_PIECE", 2 * 8)  # two samples at a time
    pieces = reference.linear_weight_grad(g, x, 7, True, True, True)
    for a, b in zip(pieces, whole, strict=True):
        close(a, b)


def test_sample_statistics() -> None:
    g = randn(5, 7)
    total, total_sq, norms = reference.sample_statistics(g)
    close((total_sq - total**2 / 5) / 4, g.var(0))
    close(norms, torch.linalg.vector_norm(g, dim=1) ** 2)
    close(total, 5 * g.mean(0))


@pytest.mark.parametrize("weight_decay", [0.0, 0.3])
@pytest.mark.parametrize("maximize", [True, False])
def test_adagrad_is_torchs(weight_decay: float, maximize: bool) -> None:
    p = torch.nn.Parameter(randn(4, 3))
    torch_optimizer = torch.optim.Adagrad(
        [p], lr=0.1, weight_decay=weight_decay, initial_accumulator_value=0.2, maximize=maximize
    )
    w, v = p.detach().clone(), torch.full((4, 3), 0.2, dtype=torch.float64)
    for _ in range(3):
        p.grad = randn(4, 3)
        norm, rest = reference.adagrad_(
            [w], [2 * p.grad], [v], [], 0.1, 1e-10, weight_decay, maximize, 0.5, 2
        )
        torch_optimizer.step()
        close(w, p.detach())
        close(v, torch_optimizer.state[p]["sum"])
        close(norm, p.grad.square().sum())
        assert rest.shape == (0,)


def test_adagrad_norm_by_hand() -> None:
    w, v = [randn(3), randn(2)], torch.tensor(0.5, dtype=torch.float64)
    g = [randn(3), randn(2)]
    before = [p.clone() for p in w]
    d = [-0.5 * g[0] + 0.1 * w[0], -0.5 * g[1] + 0.2 * w[1]]
    norm, rest = reference.adagrad_norm_(w, g, v, [], [0.3, 0.4], 1e-3, [0.1, 0.2], True, 0.5, 2)
    close(norm, 0.25 * sum(x.square().sum() for x in g))
    close(v, 0.5 + sum(x.square().sum() for x in d))
    for p, q, x, lr in zip(w, before, d, (0.3, 0.4), strict=True):
        close(p, q - lr * x / (v.sqrt() + 1e-3))
    assert rest.shape == (0,)


@pytest.mark.parametrize("scalar", [False, True])
def test_reductions_are_those_of_the_samples(scalar: bool) -> None:
    """From per-sample contributions: N samples, accumulated gradient scaled by 1/M."""
    n, scale = 6, 0.5
    c = [randn(n, 4) / n, randn(n, 2, 2) / n]
    g = [n * scale * x for x in c]  # per-sample gradients of the scaled batch
    w, grads = [randn(4), randn(2, 2)], [x.sum(0) for x in c]
    squares = [x.square().sum(0) for x in c]
    eps = 1e-2
    if scalar:
        v = torch.tensor(0.1, dtype=torch.float64)
        _, found = reference.adagrad_norm_(
            w, grads, v, squares, [0.1, 0.1], eps, [0, 0], False, scale, n
        )
        roots = [v.sqrt() + eps] * 2
    else:
        vs = [torch.full_like(x, 0.1) for x in w]
        _, found = reference.adagrad_(w, grads, vs, squares, 0.1, eps, 0, False, scale, n)
        roots = [x.sqrt() + eps for x in vs]
    variance, mean = [x.var(0) for x in g], [x.mean(0) for x in g]
    expected = CoordinateReductions(
        variance_sum=sum(x.sum() for x in variance),
        max_ratio=max((x / m**2).max() for x, m in zip(variance, mean, strict=True)),
        variance_metric=sum((x / r).sum() for x, r in zip(variance, roots, strict=True)),
        grad_metric=sum((m**2 / r).sum() for m, r in zip(mean, roots, strict=True)),
    )
    close(found, torch.stack(expected))


def test_zero_variance_over_zero_mean_counts_as_zero() -> None:
    zero, one = randn(2) * 0, torch.ones(2, dtype=torch.float64)
    _, found = reference.adagrad_([one], [zero], [one.clone()], [zero], 0.1, 0, 0, False, 1, 4)
    assert not found.any()
    # contributions ±1 of four samples: variance without a mean
    squares = torch.tensor([4.0, 0.0], dtype=torch.float64)
    _, found = reference.adagrad_([one], [zero], [one.clone()], [squares], 0.1, 0, 0, False, 1, 4)
    assert found[MAX_RATIO] == torch.inf


def test_pool_samples() -> None:
    probes = [randn(2, 5).square(), randn(2, 4).square()]
    probes[0][1] = torch.tensor([2, 1, 2, 0, 0])
    probes[1][1] = torch.tensor([3, 1, 4, 0, 5])[:4]
    norms, totals = reference.pool_samples(probes, [3, 2])
    close(norms, torch.cat([probes[0][0, :3], probes[1][0, :2]]))
    close(totals, torch.stack([norms.sum(), *torch.tensor([1.0, 3.0, 4.0]).double()]))
