"""The formulas of the AdAdaGrad authors' public code, beside the library's.

They are restated here on materialised per-sample gradients. On one process, without accumulation
and without coupled samples, their norm test is the library's. Elsewhere their code departs from
the mathematics of the paper; each test says by how much, and that the library does not.
"""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from per_sample import PerSample, per_sample
from torch import Tensor, nn
from training import batches, network

import adagrad_kernels as ak

STANDARD_ERRORS = 5  # a mean of many draws is farther from its expectation once in 10⁶ times


def squares(out: Tensor, y: Tensor) -> Tensor:
    return (out - y).square().mean()


def measure(model: nn.Module, x: Tensor, y: Tensor) -> tuple[ak.GradientStatistics, PerSample]:
    """The library's statistics, and the gradients that the formulas below take."""
    truth = per_sample(model, squares, x, y)
    observer = ak.observe(model, inner_products=True)
    squares(model(x), y).backward()
    return observer.statistics(), truth


def tensors_of(truth: PerSample) -> list[Tensor]:
    """Per-sample gradients tensor by tensor, [b, P_k]."""
    return list(truth.g.split([shape.numel() for shape in truth.shapes.values()], dim=1))


# The authors' formulas, their batch size staying where it is if the suggestion is not larger.


def raised(batch_size: int, suggestion: float) -> int:
    return math.ceil(suggestion if suggestion > batch_size else batch_size)


def their_norm_test(grads: list[Tensor], eta: float) -> int:
    variance = sum(g.var(0).sum().item() for g in grads)
    norm_sq = sum(g.mean(0).square().sum().item() for g in grads)
    return raised(len(grads[0]), variance / (eta**2 * norm_sq))


def their_inner_product_variance(grads: list[Tensor]) -> Tensor:
    """Tensor by tensor: Σ_k Var ⟨g_i^k, ḡ^k⟩."""
    return torch.stack([(g @ g.mean(0)).var() for g in grads]).sum()


def their_orthogonal_variance(grads: list[Tensor]) -> Tensor:
    """Tensor by tensor, what is left across each tensor's own ḡ^k."""
    rest = []
    for g in grads:
        mean = g.mean(0)
        along = torch.outer(g @ mean, mean) / mean.square().sum()
        rest.append((g - along).var(0).sum())
    return torch.stack(rest).sum()


def their_variance_under_accumulation(g: Tensor) -> Tensor:
    """Of micro-batches g [M, m, P]: mean of the variances plus variance of the means."""
    means = g.mean(1)
    return (g.var(1).mean(0) + means.square().mean(0) - means.mean(0).square()).sum()


def their_norm_step(w: Tensor, grad: Tensor, v: float, lr: float, weight_decay: float) -> Tensor:
    """AdaGradNorm of one matrix: an accumulator a row, the decay applied to the gradient."""
    rows = v + grad.square().sum(1, keepdim=True)
    return w - lr * grad / rows.sqrt() - lr * weight_decay * grad


# Where they agree


@pytest.mark.parametrize("eta", [0.1, 0.5, 3.0])
def test_norm_test_on_one_process_is_the_same(eta: float) -> None:
    for x, y in batches(5, 12):
        s, truth = measure(network(), x, y)
        theirs = their_norm_test(tensors_of(truth), eta)
        decision = ak.NormTest(eta).evaluate(s)
        assert max(decision.batch_size, len(x)) == theirs
        assert decision.passed == (theirs == len(x))


# Where they do not


def test_inner_products_of_each_tensor_lack_the_covariances_between_tensors() -> None:
    ((x, y),) = batches(1, 12)
    s, truth = measure(network(), x, y)
    grads = tensors_of(truth)
    products = torch.stack([g @ g.mean(0) for g in grads])  # [tensors, b]
    covariances = products.cov()
    between = covariances.sum() - covariances.trace()
    theirs = their_inner_product_variance(grads)
    ours = s.inner_product_variance
    torch.testing.assert_close(ours, theirs + between, rtol=1e-10, atol=0)
    torch.testing.assert_close(ours, truth.inner_products.var(), rtol=1e-10, atol=0)
    assert between.abs() > 0.1 * ours


class Copies(nn.Module):
    """k layers that see the same input: each has the same per-sample gradients."""

    def __init__(self, k: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(5, 2, bias=False) for _ in range(k)).double()

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([layer(x) for layer in self.layers]).sum(0)


@pytest.mark.parametrize("k", [2, 5])
def test_k_equal_tensors_get_a_suggestion_k_times_too_small(k: int) -> None:
    ((x, y),) = batches(1, 12)
    s, truth = measure(Copies(k), x, y)
    theirs = their_inner_product_variance(tensors_of(truth)) / s.grad_norm_sq**2
    ours = s.inner_product_variance / s.grad_norm_sq**2
    torch.testing.assert_close(ours, k * theirs, rtol=1e-10, atol=0)
    theta = (ours.item() / 1000) ** 0.5 * (1 + 1e-9)  # so that 1000 samples are needed
    assert ak.InnerProductTest(theta).evaluate(s).batch_size == 1000
    assert raised(len(x), theirs.item() / theta**2) == 1000 // k


def test_what_is_left_across_each_tensors_gradient_is_too_small() -> None:
    """Each tensor takes its own direction out, where one direction is to be taken out of all."""
    ((x, y),) = batches(1, 12)
    s, truth = measure(network(), x, y)
    theirs = their_orthogonal_variance(tensors_of(truth))
    ours = s.variance_trace - s.inner_product_variance / s.grad_norm_sq
    along = torch.outer(truth.inner_products, truth.mean) / truth.mean_norm_sq
    torch.testing.assert_close(ours, (truth.g - along).var(0).sum(), rtol=1e-10, atol=0)
    assert theirs < ours
    nu = 0.1
    decision = ak.OrthogonalityTest(nu).evaluate(s)
    assert decision.batch_size == math.ceil(ours / (nu**2 * s.grad_norm_sq))
    assert decision.batch_size > raised(len(x), (theirs / (nu**2 * s.grad_norm_sq)).item())


@pytest.mark.parametrize(("m", "micro_batches"), [(2, 4), (3, 2), (8, 5)])
def test_the_variance_under_accumulation_is_too_large(m: int, micro_batches: int) -> None:
    """By 1 + (1 − 1/M)/m on average, 1.375 for 4 micro-batches of 2; the library's by nothing."""
    draws, size = 1500, 20
    deviations = torch.linspace(0.5, 2, size, dtype=torch.float64)
    truth = deviations.square().sum()
    ours, theirs = [], []
    for _ in range(draws):
        g = 0.3 + deviations * torch.randn(micro_batches, m, size, dtype=torch.float64)
        total, _, norms_sq = ak.ops.sample_statistics(g.flatten(0, 1))
        n = m * micro_batches
        mean_norm_sq = (total / n).square().sum().item()
        ours.append(ak.GradientStatistics(n, norms_sq.sum().item(), mean_norm_sq).variance_trace)
        theirs.append(their_variance_under_accumulation(g))

    def assert_mean(found: list[Tensor], expected: Tensor) -> float:
        values = torch.stack(found)
        error = values.std() / draws**0.5
        assert (values.mean() - expected).abs() < STANDARD_ERRORS * error
        return error.item()

    factor = 1 + (1 - 1 / micro_batches) / m
    assert_mean(ours, truth)
    error = assert_mean(theirs, truth * factor)
    assert truth * (factor - 1) > 2 * STANDARD_ERRORS * error  # the two can be told apart


def test_accumulated_statistics_are_those_of_the_whole_batch() -> None:
    model = network()
    data = batches(4, 2)
    x, y = (torch.cat(parts) for parts in zip(*data, strict=True))
    truth = per_sample(model, squares, x, y)
    opt = ak.AdAdaGrad(model, batch_size=8, max_batch_size=100)
    for part in data:
        squares(model(part[0]), part[1]).backward()
        opt.step()
        opt.zero_grad()
    assert opt.statistics is not None
    ours = opt.statistics.variance_trace
    torch.testing.assert_close(ours, truth.variance_trace, rtol=1e-10, atol=0)
    # The variance of the means is divided by 4 there, by 4 − 1 here.
    g = truth.g.view(4, 2, -1)
    expected = g.var(1).sum(1).mean() + g.mean(1).var(0).sum() * 3 / 4
    theirs = their_variance_under_accumulation(g)
    torch.testing.assert_close(theirs, expected, rtol=1e-10, atol=0)
    assert (theirs - ours).abs() > 0.05 * ours


@pytest.mark.parametrize("rows", [2, 9])
def test_adagrad_norm_by_row_steps_farther(rows: int) -> None:
    """√O times as far for O rows of equal norm: it is one accumulator a row, not a scalar."""
    lr, v = 0.1, 1e-8
    model = nn.Linear(3, rows, bias=False).double()
    before = model.weight.detach().clone()
    opt = ak.AdAdaGradNorm(
        model, lr, batch_size=4, max_batch_size=4, initial_accumulator_value=v, eps=0
    )
    model(torch.randn(4, 3, dtype=torch.float64)).sum(1).mean().backward()
    grad = model.weight.grad.clone()
    opt.step()
    scalar = lr * grad / (v + grad.square().sum()).sqrt()
    torch.testing.assert_close(before - model.weight, scalar, rtol=1e-10, atol=1e-15)
    theirs = before - their_norm_step(before, grad, v, lr, 0)
    torch.testing.assert_close(
        theirs, scalar * rows**0.5, rtol=10 * v / grad[0].norm() ** 2, atol=0
    )


def test_weight_decay_of_the_gradient_does_not_decay_the_weights() -> None:
    lr, v, decay = 0.1, 1e-2, 0.3
    model = nn.Linear(3, 4, bias=False).double()
    opt = ak.AdAdaGradNorm(
        model, lr, batch_size=4, max_batch_size=4, initial_accumulator_value=v, eps=0,
        weight_decay=decay,
    )  # fmt: skip
    for factor in (1.0, 0.0):  # a gradient, and none
        before = model.weight.detach().clone()
        v = opt.accumulator.item()
        (model(torch.randn(4, 3, dtype=torch.float64)).square().mean() * factor).backward()
        grad = model.weight.grad.clone()
        opt.step()
        opt.zero_grad()
        d = grad + decay * before
        expected = before - lr * d / (v + d.square().sum()).sqrt()
        torch.testing.assert_close(model.weight.detach(), expected, rtol=1e-10, atol=0)

        with_decay = their_norm_step(before, grad, v, lr, decay)
        without = their_norm_step(before, grad, v, lr, 0)
        torch.testing.assert_close(with_decay, without - lr * decay * grad, rtol=1e-10, atol=0)
    assert torch.equal(with_decay, before)
    assert model.weight.norm() < before.norm()


def test_a_partial_last_batch_does_not_shrink_the_batch_size() -> None:
    model = network()
    s, truth = measure(model, *batches(1, 3)[0])
    assert their_norm_test(tensors_of(truth), eta=100) == 3  # though 8 samples a batch had come

    controller = ak.BatchSizeController(8, 100)
    assert controller.advance(ak.NormTest(100).evaluate(s), s, 3) == 8
    opt = ak.AdAdaGrad(network(), batch_size=8, max_batch_size=100, criterion=ak.NormTest(100))
    dataset = torch.utils.data.TensorDataset(*batches(1, 11)[0])
    loader = ak.AdaptiveDataLoader(dataset, opt)
    assert [len(x) for x, _ in loader] == [8, 8]  # the second reaches over the end


@pytest.mark.filterwarnings("ignore:var\\(\\). degrees of freedom is <= 0")
def test_a_batch_of_one_is_not_tested() -> None:
    s, truth = measure(network(), *batches(1, 1)[0])
    assert all(torch.isnan(g.var(0)).all() for g in tensors_of(truth))
    assert their_norm_test(tensors_of(truth), eta=0.1) == 1  # NaN passes for a small variance
    decision = ak.NormTest(0.1).evaluate(s)
    assert not decision.tested
    assert decision.reason


def test_batch_norm_on_batches_of_one_is_another_function() -> None:
    """Its gradients do not add up to that of the batch; the library's contributions do."""
    model = nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4, track_running_stats=False),
        nn.ReLU(), nn.Flatten(), nn.Linear(4 * 25, 3),
    ).double()  # fmt: skip
    x = torch.randn(6, 2, 5, 5, dtype=torch.float64) * torch.arange(1, 7).view(-1, 1, 1, 1)
    y = torch.arange(6) % 3
    alone = per_sample(model, F.cross_entropy, x, y)  # as vmap(grad) does
    coupled = copy.deepcopy(model)
    observer = ak.observe(coupled, inner_products=True)
    F.cross_entropy(coupled(x), y).backward()
    s = observer.statistics()
    grad = torch.cat([p.grad.flatten() for p in coupled.parameters()])
    assert (alone.mean - grad).norm() > 0.1 * grad.norm()

    # mean ⟨g_i, ḡ⟩ = ⟨mean g_i, ḡ⟩ = ‖ḡ‖²
    torch.testing.assert_close(s.inner_products.mean(), grad.square().sum(), rtol=1e-10, atol=0)
    assert (alone.g @ grad).mean() != pytest.approx(grad.square().sum().item(), rel=0.05)


def test_inner_products_under_accumulation_are_not_refused() -> None:
    """Their code stops with an error; here those of the last micro-batch are exact."""
    model = network()
    data = batches(4, 3)
    x, y = (torch.cat(parts) for parts in zip(*data, strict=True))
    truth = per_sample(model, squares, x, y)
    opt = ak.AdAdaGrad(
        model, criterion=ak.AugmentedInnerProductTest(), batch_size=12, max_batch_size=100
    )
    for part in data:
        squares(model(part[0]), part[1]).backward()
        opt.step()
        opt.zero_grad()
    assert opt.statistics is not None
    torch.testing.assert_close(opt.statistics.inner_products, truth.inner_products[9:])
    assert opt.decision is not None
    assert opt.decision.tested


@pytest.mark.parametrize("num_workers", [0, 1])
def test_another_micro_batch_goes_on_in_the_data(num_workers: int) -> None:
    """Their loader starts a new permutation: samples come twice, or not at all, in an epoch."""
    controller = ak.BatchSizeController(4, 60)
    dataset = torch.utils.data.TensorDataset(torch.arange(60))
    loader = ak.AdaptiveDataLoader(dataset, controller, 16, num_workers=num_workers)
    served: list[int] = []
    for (indices,) in loader:
        served += indices.tolist()
        controller.advance(ak.Decision(False, controller.batch_size + 8, 2.0))
    assert controller.batch_size > 16, "nothing was accumulated"
    assert sorted(served[:60]) == list(range(60))
