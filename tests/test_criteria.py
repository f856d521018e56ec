"""Every test against its formula on explicit per-sample gradients."""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from criteria_cases import assert_decides, bounds, gradients, statistics
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor
from training import network

import adagrad_kernels as ak
from adagrad_kernels.criteria import UNBOUNDED, Criterion
from adagrad_kernels.stream import SampleStream


class TestFormulas:
    """The inequalities of the papers, written out on the per-sample gradients."""

    @given(gradients(), bounds)
    def test_norm(self, g: Tensor, eta: float) -> None:
        n, mean = len(g), g.mean(0)
        trace = (g - mean).square().sum().item() / (n - 1)
        needed = trace / (eta**2 * mean.square().sum().item())
        assert_decides(ak.NormTest(eta).evaluate(statistics(g)), n, needed)

    @given(gradients(), bounds)
    def test_norm_debiased(self, g: Tensor, eta: float) -> None:
        n, mean = len(g), g.mean(0)
        trace = (g - mean).square().sum().item() / (n - 1)
        signal = mean.square().sum().item() - trace / n
        decision = ak.NormTest(eta, debiased=True).evaluate(statistics(g))
        if signal > 1e-9:
            assert_decides(decision, n, trace / (eta**2 * signal))
        elif signal < -1e-9:
            assert decision == ak.Decision(False, UNBOUNDED, math.inf)

    @given(gradients(), bounds)
    def test_inner_product(self, g: Tensor, theta: float) -> None:
        mean = g.mean(0)
        p = [float(row @ mean) for row in g]
        average = sum(p) / len(p)
        variance = sum((x - average) ** 2 for x in p) / (len(p) - 1)
        needed = variance / (theta**2 * average**2)
        assert_decides(ak.InnerProductTest(theta).evaluate(statistics(g)), len(g), needed)

    @given(gradients(), bounds, bounds)
    def test_inner_products_debiased(self, g: Tensor, theta: float, nu: float) -> None:
        """The signal is without all of its noise, not only without that along or across it."""
        s, n = statistics(g), len(g)
        plain = ak.AugmentedInnerProductTest(theta, nu)
        signal = s.mean_norm_sq - s.variance / n
        assume(abs(signal) > 1e-6 * s.mean_norm_sq)
        for comparison, debiased in zip(
            plain.compare(s), replace(plain, debiased=True).compare(s), strict=True
        ):
            assert debiased.signal == pytest.approx(signal)
            assert debiased.noise == comparison.noise
        for test in (ak.InnerProductTest(theta), ak.OrthogonalityTest(nu)):
            decision = replace(test, debiased=True).evaluate(s)
            if signal > 0:
                needed = test.evaluate(s).ratio * n * s.mean_norm_sq / signal
                assert_decides(decision, n, needed)

    @given(gradients(), bounds)
    def test_orthogonality(self, g: Tensor, nu: float) -> None:
        mean = g.mean(0)
        square = mean.square().sum()
        across = g - (g @ mean / square).unsqueeze(1) * mean
        needed = (across.square().sum() / ((len(g) - 1) * nu**2 * square)).item()
        assert_decides(ak.OrthogonalityTest(nu).evaluate(statistics(g)), len(g), needed)

    @given(gradients(), bounds, bounds)
    def test_augmented_is_both(self, g: Tensor, theta: float, nu: float) -> None:
        s = statistics(g)
        parts = ak.InnerProductTest(theta).evaluate(s), ak.OrthogonalityTest(nu).evaluate(s)
        both = ak.AugmentedInnerProductTest(theta, nu).evaluate(s)
        assert both.passed == all(part.passed for part in parts)
        assert both.batch_size == max(part.batch_size for part in parts)
        assert both.ratio == max(part.ratio for part in parts)

    @given(gradients(), bounds)
    def test_every_coordinate(self, g: Tensor, eta: float) -> None:
        needed = (g.var(0) / (eta**2 * g.mean(0).square())).max().item()
        assert_decides(ak.CoordinateNormTest(eta).evaluate(statistics(g)), len(g), needed)

    @given(gradients(), bounds, st.floats(0.01, 1.0))
    def test_quantile(self, g: Tensor, eta: float, quantile: float) -> None:
        """The least batch that satisfies this part of the coordinates, each by itself."""
        decision = ak.CoordinateNormTest(eta, "quantile", quantile=quantile).evaluate(statistics(g))
        each = g.var(0) / (eta**2 * g.mean(0).square())
        enough = quantile * g.shape[1] - 1e-6
        satisfied = [(each <= b).sum().item() >= enough for b in each.sort().values]
        needed = each.sort().values[satisfied.index(True)].item()
        assert_decides(decision, len(g), needed)

    @pytest.mark.parametrize(
        "options",
        [
            {"aggregate": "quantile", "quantile": 0.55},  # 0.55 · 100 is 55.00…01
            {"aggregate": "fraction", "fraction": 0.45},
        ],
    )
    def test_a_part_that_is_a_whole_number_of_coordinates(self, options: dict[str, Any]) -> None:
        """Coordinate j of 100 is satisfied from j samples on: 55 of them by 55."""
        s = ak.GradientStatistics(
            2, sum_norms_sq=5250.0, mean_norm_sq=100.0,
            coordinate_mean={"w": torch.ones(100)},
            coordinate_variance={"w": torch.arange(1.0, 101.0)},
        )  # fmt: skip
        assert ak.CoordinateNormTest(1.0, **options).evaluate(s).batch_size == 55

    @given(gradients(), bounds, st.floats(0.0, 0.99))
    def test_fraction(self, g: Tensor, eta: float, fraction: float) -> None:
        decision = ak.CoordinateNormTest(eta, "fraction", fraction=fraction).evaluate(statistics(g))
        failing = (g.var(0) / len(g) > eta**2 * g.mean(0).square()).sum().item()
        assert decision.passed == (failing <= fraction * g.shape[1] + 1e-6)

    @given(gradients(), bounds)
    def test_adagrad_metric(self, g: Tensor, eta: float) -> None:
        s = statistics(g)
        root = torch.cat(list(s.accumulators.values())).sqrt()
        needed = (g.var(0) / root).sum() / (eta**2 * (g.mean(0).square() / root).sum())
        decision = ak.CoordinateNormTest(eta, "adagrad").evaluate(s)
        assert_decides(decision, len(g), needed.item())

    def test_adagrad_metric_with_eps(self) -> None:
        s = replace(
            statistics(torch.tensor([[1.0, 4.0], [3.0, 0.0]])),
            coordinate_mean={"a": torch.tensor([2.0]), "b": torch.tensor([2.0])},
            coordinate_variance={"a": torch.tensor([2.0]), "b": torch.tensor([8.0])},
            accumulators={"a": torch.tensor([4.0]), "b": torch.tensor([9.0])},
            eps={"a": 0.5, "b": 1.0},
        )
        needed = (2 / 2.5 + 8 / 4) / (4 / 2.5 + 4 / 4)
        assert ak.CoordinateNormTest(1.0, "adagrad").evaluate(s).ratio == needed / 2

    @given(gradients(), bounds)
    def test_one_accumulator_for_all_is_the_norm_test(self, g: Tensor, eta: float) -> None:
        s = statistics(g)
        one = torch.tensor(5.0, dtype=torch.float64)
        s.accumulators.update(a=one, b=one)
        metric = ak.CoordinateNormTest(eta, "adagrad").evaluate(s)
        assert metric.ratio == pytest.approx(ak.NormTest(eta).evaluate(s).ratio, rel=1e-9)

    @given(gradients(), st.floats(0.1, 5))
    def test_noise_scale(self, g: Tensor, multiple: float) -> None:
        s = statistics(g)
        scale = s.noise_scale.item()
        assume(abs(s.mean_norm_sq - s.variance / len(g)) > 1e-6)
        decision = ak.NoiseScaleTarget(multiple).evaluate(s)
        if scale < math.inf:
            assert_decides(decision, len(g), multiple * scale)
        else:
            assert decision.batch_size == UNBOUNDED

    @given(gradients(), st.floats(1e-3, 10), st.floats(1e-3, 10))
    def test_cabs(self, g: Tensor, lr: float, loss: float) -> None:
        trace = g.var(0).sum().item()
        decision = ak.CABS().evaluate(statistics(g, lr=lr, loss=loss))
        assert abs(decision.batch_size - max(1, lr * trace / loss)) <= 0.5 + 1e-6
        assert decision.passed == (decision.batch_size <= len(g))
        assert decision.ratio == pytest.approx(lr * trace / loss / len(g), rel=1e-9)

    def test_cabs_without_a_learning_rate(self) -> None:
        """As in the first update of a warm-up: a step of length 0 needs no accuracy."""
        s = ak.GradientStatistics(4, sum_norms_sq=40.0, mean_norm_sq=1.0, loss=0.5, lr=0.0)
        assert ak.CABS().evaluate(s) == ak.Decision(True, 1, 0.0)

    def test_theta_and_nu_where_the_last_micro_batch_varies_more_than_the_batch(self) -> None:
        """Var(p)/‖ḡ‖² = 2 of tr Σ̂ = 1: nothing is left across ḡ."""
        s = ak.GradientStatistics(
            4, sum_norms_sq=7.0, mean_norm_sq=1.0, inner_products=torch.tensor([0.0, 2.0])
        )
        assert ak.theta_nu_from_epsilon(0.5, s) == (0.5, 0.0)


class TestFiniteDataSet:
    """The factor 1 − x + x²/3 of stretches of permutations, 1/(3x) beyond the data set."""

    @given(gradients(20), st.floats(0.05, 1.0), st.integers(10, 500), st.booleans())
    def test_the_suggestion_is_the_least_batch_that_passes(
        self, g: Tensor, eta: float, size: int, debiased: bool
    ) -> None:
        decision = ak.NormTest(eta, dataset_size=size, debiased=debiased).evaluate(statistics(g))
        mean = g.mean(0).square().sum().item()
        trace = g.var(0).sum().item()

        def error(b: int) -> float:
            x = b / size
            return trace / b * (1 - x + x**2 / 3 if x <= 1 else 1 / (3 * x))

        if debiased:
            mean -= error(len(g))
        expected = error(len(g)) / (eta**2 * mean) if mean > 0 else math.inf
        assert decision.ratio == pytest.approx(expected if trace else 0.0, rel=1e-6)
        assert decision.passed == (decision.ratio <= 1)
        if decision.batch_size < UNBOUNDED and not decision.passed:
            b = decision.batch_size
            assert error(b) <= eta**2 * mean * (1 + 1e-6)
            assert b == len(g) + 1 or error(b - 1) > eta**2 * mean * (1 - 1e-6)

    def test_a_batch_that_just_passes_is_suggested(self) -> None:
        """And not one sample more, for all that rounding makes of the solution."""
        for b in range(3, 300):
            x = b / 100
            share = (1 - x + x * x / 3 if x <= 1 else 1 / (3 * x)) / b
            s = ak.GradientStatistics(2, sum_norms_sq=1 / share + 2, mean_norm_sq=1.0)
            assert ak.NormTest(1.0, dataset_size=100).evaluate(s).batch_size == b

    @pytest.mark.parametrize("batch_size", [30, 80, 101, 150, 250])
    def test_the_variance_of_the_loaders_batches(self, batch_size: int) -> None:
        """Of the mean of many batches that begin anywhere in an epoch."""
        n = 101
        values = torch.randn(n, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        controller = ak.BatchSizeController(batch_size, batch_size)
        stream = SampleStream(n, controller, shuffle=True, seed=3)
        means = []
        for k in range(4000):
            stream.samples = 5 * n * k + k % n
            means.append(values[stream.indices(stream.next())].mean())
            stream.take()
        share = ak.NormTest(1.0, dataset_size=n)._variance_of_mean(batch_size)
        expected = share * values.var().item()
        assert torch.stack(means).var().item() == pytest.approx(expected, rel=0.08)


class TestErrors:
    """Arguments out of range, and statistics that lack what the test needs."""

    @pytest.mark.parametrize("value", [0, -0.1, math.nan, math.inf])
    @pytest.mark.parametrize(
        ("make", "name"),
        [
            (ak.NormTest, "eta"),
            (ak.InnerProductTest, "theta"),
            (ak.OrthogonalityTest, "nu"),
            (ak.AugmentedInnerProductTest, "theta"),
            (ak.AugmentedInnerProductTest, "nu"),
            (ak.CoordinateNormTest, "eta"),
            (ak.NoiseScaleTarget, "multiple"),
        ],
    )
    def test_bounds(self, make: Callable[..., Criterion], name: str, value: float) -> None:
        with pytest.raises(ValueError, match=f"{name} must be a positive number"):
            make(**{name: value})

    def test_other_arguments(self) -> None:
        with pytest.raises(ValueError, match="aggregate must be one of max, quantile"):
            ak.CoordinateNormTest(0.5, aggregate="mean")
        with pytest.raises(ValueError, match="quantile"):
            ak.CoordinateNormTest(0.5, quantile=0.0)
        with pytest.raises(ValueError, match="fraction"):
            ak.CoordinateNormTest(0.5, fraction=1.0)
        for make in (ak.NormTest, ak.NoiseScaleTarget, ak.InnerProductTest, ak.CoordinateNormTest):
            with pytest.raises(ValueError, match="dataset_size must be at least 2"):
                make(dataset_size=1)
        with pytest.raises(ValueError, match="decay"):
            ak.Averaged(ak.NormTest(), decay=1.0)
        with pytest.raises(TypeError, match="Averaged"):
            ak.Averaged(ak.Averaged(ak.NormTest()))
        with pytest.raises(ValueError, match="epsilon"):
            ak.theta_nu_from_epsilon(0.0, statistics(torch.randn(4, 3)))
        with pytest.raises(ValueError, match="do not determine"):
            ak.theta_nu_from_epsilon(1.0, statistics(torch.zeros(4, 3)))

    @pytest.mark.parametrize(
        ("test", "message"),
        [
            (ak.InnerProductTest(), "inner_products=True"),
            (ak.AugmentedInnerProductTest(), "inner_products=True"),
            (ak.CoordinateNormTest(), "coordinates=True"),
            (ak.CABS(), "loss"),
        ],
    )
    def test_missing_statistics(self, test: Criterion, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            test.evaluate(ak.GradientStatistics(8, 20.0, 1.0))

    def test_missing_accumulators(self) -> None:
        model = network()
        sgd = torch.optim.SGD(model.parameters())
        test = ak.CoordinateNormTest(0.5, "adagrad")
        with pytest.raises(ValueError, match="accumulators of AdAdaGrad"):
            ak.AdaptiveBatch(model, sgd, criterion=test)
        s = ak.GradientStatistics(2, 2.0, 0.5, coordinate_mean={}, coordinate_variance={})
        with pytest.raises(ValueError, match="accumulators"):
            test.evaluate(s)

    def test_one_inner_product(self) -> None:
        """The last micro-batch had one sample: nothing to take a variance of."""
        s = ak.GradientStatistics(8, 20.0, 1.0, inner_products=torch.tensor([1.0]))
        decision = ak.AugmentedInnerProductTest().evaluate(s)
        assert decision.passed
        assert "inner products" in decision.reason

    @pytest.mark.parametrize("loss", [0.0, -1.0, math.nan, math.inf])
    def test_a_loss_that_is_not_positive(self, loss: float) -> None:
        decision = ak.CABS().evaluate(ak.GradientStatistics(8, 20.0, 1.0, loss=loss, lr=0.1))
        assert decision.passed
        assert "loss" in decision.reason
