"""max_grad_norm: the update follows the clipped gradient, the test looks at the whole one."""

import copy
from typing import Any

import pytest
import torch
from tolerance import assert_close_to_truth
from torch import Tensor, nn
from training import accumulators, batches, mse, network, train, weights

import adagrad_kernels as ak

FIXED = {"batch_size": 8, "max_batch_size": 8}
OPTIONS = {"lr": 0.1, "weight_decay": 0.02, "lr_decay": 0.01, "eps": 1e-8}
STEPS = 50

every_optimizer = pytest.mark.parametrize("kind", ["AdAdaGrad", "AdAdaGradNorm", "AdaptiveBatch"])


def make(kind: str, model: nn.Module, **options: Any) -> Any:
    options = {**FIXED, **options}
    if kind == "AdaptiveBatch":
        return ak.AdaptiveBatch(model, torch.optim.Adagrad(model.parameters(), lr=0.1), **options)
    return getattr(ak, kind)(model, lr=0.1, **options)


def norms(dtype: torch.dtype = torch.float64) -> list[float]:
    """Gradient norms without clipping: the limits below lie among them."""
    model, found = network(dtype), []
    opt = ak.AdAdaGrad(model, **OPTIONS, **FIXED)
    train(model, opt, batches(STEPS, 8, dtype), lambda: found.append(opt.statistics.mean_norm_sq))
    return sorted(norm_sq**0.5 for norm_sq in found)


@pytest.mark.parametrize("quantile", [0.0, 0.5, 1.0])
def test_follows_torch_adagrad_with_clip_grad_norm(quantile: float) -> None:
    """Clipped at every step, at some, and (almost) at none."""
    known = norms()
    limit = 0.9 * known[0] if quantile == 0 else known[int(quantile * (STEPS - 1))]
    clipped = 0

    def run(dtype: torch.dtype, ours: bool) -> tuple[Tensor, Tensor]:
        nonlocal clipped
        model = network(dtype)
        data = batches(STEPS, 8, dtype)
        if ours:
            opt: torch.optim.Optimizer = ak.AdAdaGrad(
                model, max_grad_norm=limit, **OPTIONS, **FIXED
            )
            train(model, opt, data)
            return weights(model), accumulators(opt)
        opt, clipped = torch.optim.Adagrad(model.parameters(), **OPTIONS), 0
        for batch in data:
            mse(model, batch).backward()
            clipped += nn.utils.clip_grad_norm_(model.parameters(), limit).item() > limit
            opt.step()
            opt.zero_grad()
        return weights(model), accumulators(opt)

    truth = run(torch.float64, ours=False)
    assert clipped > {0.0: STEPS // 2, 0.5: 1, 1.0: -1}[quantile]
    for dtype in (torch.float64, torch.float32):
        ours, plain = run(dtype, ours=True), run(dtype, ours=False)
        for name, a, t, p in zip(("weights", "accumulators"), ours, truth, plain, strict=True):
            scale = STEPS * t.abs().max()  # rounding of all steps
            assert_close_to_truth(a, t, p, scale=scale, what=f"{name} in {dtype}")


def test_the_norm_is_that_of_the_mean_over_micro_batches_and_all_groups() -> None:
    ours, theirs = network(), network()
    groups = [{"params": ours[0].parameters(), "lr": 0.3}, {"params": ours[2].parameters()}]
    opt = ak.AdAdaGrad(ours, lr=0.1, params=groups, max_grad_norm=0.05, **FIXED)
    reference = torch.optim.Adagrad(
        [{"params": theirs[0].parameters(), "lr": 0.3}, {"params": theirs[2].parameters()}], lr=0.1
    )
    data = batches(24, 2)
    train(ours, opt, data)
    for first in range(0, 24, 4):
        for batch in data[first : first + 4]:
            (mse(theirs, batch) / 4).backward()
        nn.utils.clip_grad_norm_(theirs.parameters(), 0.05)
        reference.step()
        reference.zero_grad()
    torch.testing.assert_close(weights(ours), weights(theirs), rtol=1e-10, atol=1e-12)


def test_adagrad_norm() -> None:
    """One accumulator: v + ‖clipped ḡ‖²."""
    model, v, limit = network(), 1e-2, 0.1
    opt = ak.AdAdaGradNorm(model, lr=0.1, eps=0, max_grad_norm=limit, **FIXED)
    for batch in batches(10, 8):
        mse(model, batch).backward()
        before, grad = weights(model), torch.cat([p.grad.flatten() for p in model.parameters()])
        opt.step()
        opt.zero_grad()
        grad = grad * min(1, limit / (grad.norm().item() + 1e-6))
        v += grad.square().sum().item()
        torch.testing.assert_close(weights(model), before - 0.1 * grad / v**0.5, rtol=1e-10, atol=0)
        assert opt.accumulator.item() == pytest.approx(v, rel=1e-12)


@every_optimizer
def test_statistics_and_batch_sizes_are_those_of_the_whole_gradient(kind: str) -> None:
    def first(max_grad_norm: float | None) -> Any:
        model = network()
        opt = make(kind, model, max_grad_norm=max_grad_norm, max_batch_size=1000)
        train(model, opt, batches(1, 8))
        return opt

    plain, clipped = first(None), first(1e-3)
    for name in ("sum_norms_sq", "mean_norm_sq", "variance"):
        found, expected = (getattr(opt.statistics, name) for opt in (clipped, plain))
        assert found == pytest.approx(expected, rel=1e-12)
    assert clipped.batch_size == plain.batch_size > 8


@pytest.mark.parametrize("aggregate", ["max", "quantile", "adagrad"])
def test_coordinate_tests_look_at_the_whole_gradient(aggregate: str) -> None:
    """In AdaGrad's metric both sides are divided by the √v of the step that was taken."""
    decisions, reductions = [], []
    for limit in (None, 1e-2):
        model = network()
        criterion = ak.CoordinateNormTest(0.5, aggregate=aggregate)
        # The same v of all coordinates: the metric then does not depend on it.
        opt = ak.AdAdaGrad(
            model, criterion=criterion, initial_accumulator_value=1e12, max_grad_norm=limit, **FIXED
        )
        train(model, opt, batches(1, 8))
        decisions.append(opt.decision)
        reductions.append(opt.statistics.coordinate_reductions)
    assert decisions[1].ratio == pytest.approx(decisions[0].ratio, rel=1e-9)
    assert decisions[1].batch_size == decisions[0].batch_size
    assert reductions[0] is not None
    assert reductions[1] == pytest.approx(reductions[0], rel=1e-9)  # the update's own figures


def test_adaptive_batch_clips_what_its_optimizer_sees() -> None:
    ours, theirs = network(), network()
    opt = ak.AdaptiveBatch(
        ours, torch.optim.SGD(ours.parameters(), lr=0.1), max_grad_norm=0.1, **FIXED
    )
    sgd = torch.optim.SGD(theirs.parameters(), lr=0.1)
    train(ours, opt, batches(10, 8))
    for batch in batches(10, 8):
        mse(theirs, batch).backward()
        nn.utils.clip_grad_norm_(theirs.parameters(), 0.1)
        sgd.step()
        sgd.zero_grad()
    torch.testing.assert_close(weights(ours), weights(theirs), rtol=1e-10, atol=1e-12)


@every_optimizer
def test_clipping_by_hand_is_refused(kind: str) -> None:
    model = network()
    opt = make(kind, model)
    before = copy.deepcopy(model.state_dict())
    (batch,) = batches(1, 8)
    mse(model, batch).backward()
    nn.utils.clip_grad_norm_(model.parameters(), 0.1)
    with pytest.raises(RuntimeError, match="max_grad_norm"):
        opt.step()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    opt.zero_grad()
    train(model, opt, [batch])
    assert opt.updated


@every_optimizer
def test_clipping_by_hand_is_refused_in_every_micro_batch(kind: str) -> None:
    model = network()
    opt = make(kind, model)
    first, second = batches(2, 4)
    train(model, opt, [first])
    mse(model, second).backward()
    nn.utils.clip_grad_value_(model.parameters(), 0.1)
    with pytest.raises(RuntimeError, match="changed between"):
        opt.step()


@every_optimizer
@pytest.mark.parametrize("limit", [0.0, -1.0, float("nan")])
def test_invalid_limits(kind: str, limit: float) -> None:
    model = network()
    with pytest.raises(ValueError, match=f"{kind}: max_grad_norm must be positive"):
        make(kind, model, max_grad_norm=limit)
    ak.observe(model).detach()  # nothing was attached


def test_a_gradient_that_is_not_finite() -> None:
    """As in torch the weights become NaN; the batch size stays."""
    model = network()
    opt = ak.AdAdaGrad(model, max_grad_norm=1.0, batch_size=8, max_batch_size=100)
    x, y = batches(1, 8)[0]
    train(model, opt, [(x * float("inf"), y)])
    assert weights(model).isnan().any()
    assert opt.batch_size == 8
