"""Every criterion in the training loop."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from criteria_cases import CRITERIA
from per_sample import per_sample
from torch import Tensor
from training import Batch, batches, mse, network, train

import adagrad_kernels as ak
from adagrad_kernels.criteria import Criterion


def train_with_loss(model: torch.nn.Module, opt: Any, data: list[Batch]) -> None:
    for batch in data:
        loss = mse(model, batch)
        loss.backward()
        opt.step(loss=loss)
        opt.zero_grad()


class TestTraining:
    """Every criterion in the loop."""

    @pytest.mark.parametrize(
        ("name", "kind"),
        [
            (name, kind)
            for name in CRITERIA
            for kind in ("AdAdaGrad", "AdAdaGradNorm", "AdaptiveBatch")
            if (name, kind) != ("coordinate, adagrad", "AdaptiveBatch")  # has no accumulators
        ],
    )
    def test_decides_on_the_true_statistics(self, name: str, kind: str) -> None:
        """The decision of an update is that on per-sample gradients of plain autograd."""
        test, model = CRITERIA[name](), network()
        if kind == "AdaptiveBatch":
            inner = torch.optim.Adagrad(model.parameters(), lr=0.1)
            opt: Any = ak.AdaptiveBatch(model, inner, test, batch_size=12, max_batch_size=12)
        else:
            opt = getattr(ak, kind)(model, 0.1, test, batch_size=12, max_batch_size=12)
        train_with_loss(model, opt, batches(3, 12))
        memory = copy.deepcopy(test)
        x, y = batches(4, 12)[-1]
        truth = per_sample(model, F.mse_loss, x, y)
        loss = mse(model, (x, y)).item()
        train_with_loss(model, opt, [(x, y)])
        accumulators = None
        if kind != "AdaptiveBatch":
            accumulators = {n: opt.state[p]["sum"] for n, p in model.named_parameters()}
        expected = ak.GradientStatistics(
            12,
            truth.norms_sq.sum().item(),
            truth.mean_norm_sq.item(),
            coordinate_mean=truth.by_parameter(truth.mean),
            coordinate_variance=truth.by_parameter(truth.coordinate_variance),
            inner_products=truth.inner_products,
            accumulators=accumulators,
            loss=loss,
            lr=0.1,
        )
        decision = memory.evaluate(expected)
        assert opt.decision.ratio == pytest.approx(decision.ratio, rel=1e-6)
        assert opt.decision.passed == decision.passed

    @pytest.mark.parametrize("aggregate", ["max", "adagrad"])
    def test_the_kernels_reductions_are_those_of_the_criterion(self, aggregate: str) -> None:
        """Of two groups: by the update of each, or from the coordinates where averaged."""
        test = ak.CoordinateNormTest(0.5, aggregate)
        ratios = []
        for criterion in (test, ak.Averaged(test, decay=0.0)):
            model = network()
            groups = [
                {"params": list(model[0].parameters()), "eps": 0.5},
                {"params": list(model[2].parameters()), "eps": 0.1},
            ]
            opt = ak.AdAdaGrad(model, 0.1, criterion, 12, 12, params=groups)
            train(model, opt, batches(3, 12))
            ratios.append(opt.decision.ratio)
        assert ratios[0] == pytest.approx(ratios[1], rel=1e-9)

    @pytest.mark.parametrize(
        "make",
        [
            make
            for make in CRITERIA.values()
            if "inner_products" not in make().needs or "all_inner_products" in make().needs
        ],
    )
    def test_the_split_into_micro_batches_does_not_matter(
        self, make: Callable[[], Criterion]
    ) -> None:
        """To rounding. (Inner products of the last micro-batch's samples alone: see below.)"""
        decisions = []
        for size in (12, 3):
            model = network()
            opt = ak.AdAdaGrad(model, 0.1, make(), batch_size=12, max_batch_size=12)
            pieces = [
                piece
                for x, y in batches(3, 12)
                for piece in zip(x.split(size), y.split(size), strict=True)
            ]
            train_with_loss(model, opt, pieces)
            decisions.append(opt.decision)
        assert decisions[1].ratio == pytest.approx(decisions[0].ratio, rel=1e-6)

    @pytest.mark.parametrize("make", [ak.InnerProductTest, ak.AugmentedInnerProductTest])
    def test_inner_products_under_accumulation(self, make: Callable[[], Criterion]) -> None:
        """p_i of the last micro-batch's samples with the gradient of the whole batch."""
        model = network()
        opt = ak.AdAdaGrad(model, 0.1, make(), batch_size=12, max_batch_size=12)
        x, y = batches(1, 12)[0]
        truth = per_sample(model, F.mse_loss, x, y)
        train(model, opt, list(zip(x.split(4), y.split(4), strict=True)))
        torch.testing.assert_close(opt.statistics.inner_products, truth.inner_products[8:])

    @pytest.mark.parametrize("size", [1, 3, 4])
    def test_inner_products_of_every_sample_under_accumulation(self, size: int) -> None:
        model = network()
        test = ak.InnerProductTest(every_sample=True)
        opt = ak.AdAdaGrad(model, 0.1, test, batch_size=12, max_batch_size=12)
        for batch in batches(2, 12):  # the second: nothing is left of the first
            truth = per_sample(model, F.mse_loss, *batch)
            train(model, opt, list(zip(*(t.split(size) for t in batch), strict=True)))
            torch.testing.assert_close(opt.statistics.inner_products, truth.inner_products)

    def test_cabs_shrinks_and_grows(self) -> None:
        model = network()
        opt = ak.AdAdaGrad(
            model, 0.01, ak.CABS(), batch_size=64, max_batch_size=128, monotone=False
        )
        sizes = [opt.batch_size]
        for lr in (1e-2, 1.0, 30.0):
            opt.param_groups[0]["lr"] = lr
            saved = copy.deepcopy(model.state_dict())
            batch = batches(1, opt.batch_size)[0]
            truth = per_sample(model, F.mse_loss, *batch)
            expected = round(lr * truth.variance_trace.item() / mse(model, batch).item())
            train_with_loss(model, opt, [batch])
            assert opt.batch_size == min(max(expected, 2), 128)
            sizes.append(opt.batch_size)
            model.load_state_dict(saved)
        assert sizes[1] < sizes[0]
        assert sizes[-1] > sizes[1]

    def test_cabs_without_the_loss_changes_nothing(self) -> None:
        model = network()
        opt = ak.AdAdaGrad(model, 0.1, ak.CABS(), batch_size=8, max_batch_size=8)
        before = copy.deepcopy(model.state_dict())
        mse(model, batches(1, 8)[0]).backward()
        with pytest.raises(ValueError, match=r"opt.step\(loss=loss\)"):
            opt.step()
        torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)

    def test_the_loss_is_the_mean_over_micro_batches_or_a_closures(self) -> None:
        model = network()
        opt = ak.AdAdaGrad(model, 0.1, ak.CABS(), batch_size=8, max_batch_size=8)
        x, y = batches(1, 8)[0]
        whole = mse(model, (x, y)).item()
        train_with_loss(model, opt, list(zip(x.split(2), y.split(2), strict=True)))
        assert opt.statistics.loss == pytest.approx(whole, rel=1e-12)

        def closure() -> Tensor:
            loss = mse(model, (x, y))
            loss.backward()
            return loss

        assert opt.step(closure).item() == opt.statistics.loss

    def test_the_memory_is_part_of_the_optimizers_state(self) -> None:
        def fresh() -> tuple[torch.nn.Module, ak.AdAdaGrad]:
            model = network()
            test = ak.Averaged(ak.NormTest(0.5))
            return model, ak.AdAdaGrad(model, 0.1, test, batch_size=8, max_batch_size=8)

        model, opt = fresh()
        train(model, opt, batches(4, 8))
        other, resumed = fresh()
        other.load_state_dict(model.state_dict())
        resumed.load_state_dict(copy.deepcopy(opt.state_dict()))
        for m, o in ((model, opt), (other, resumed)):
            train(m, o, batches(1, 8))
        assert resumed.decision == opt.decision

    def test_fallback_modules(self) -> None:
        """Inner products are taken with the weights before the update."""

        class Scale(torch.nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.factor = torch.nn.Parameter(torch.ones(5, dtype=torch.float64))

            def forward(self, x: Tensor) -> Tensor:
                return (x * self.factor).tanh() * self.factor

        model = torch.nn.Sequential(Scale(), network())
        test = ak.AugmentedInnerProductTest(0.5, 0.7)
        opt = ak.AdAdaGrad(model, 0.5, test, batch_size=8, max_batch_size=8, fallback="vmap")
        x, y = batches(1, 8)[0]
        truth = per_sample(model, F.mse_loss, x, y)
        train(model, opt, [(x, y)])
        torch.testing.assert_close(opt.statistics.inner_products, truth.inner_products)


@pytest.mark.parametrize("set_to_none", [True, False])
def test_coordinates_outlive_zero_grad(set_to_none: bool) -> None:
    model = network()
    opt = ak.AdAdaGrad(model, 0.1, ak.CoordinateNormTest(0.5), batch_size=12, max_batch_size=12)
    x, y = batches(1, 12)[0]
    truth = per_sample(model, F.mse_loss, x, y)
    F.mse_loss(model(x), y).backward()
    opt.step()
    opt.zero_grad(set_to_none)
    s = opt.statistics
    assert s is not None
    assert s.coordinate_reductions is not None
    torch.testing.assert_close(
        dict(s.coordinate_variance or {}), truth.by_parameter(truth.coordinate_variance)
    )
    torch.testing.assert_close(dict(s.coordinate_mean or {}), truth.by_parameter(truth.mean))
