"""How the tests behave: invariances, fixed points, averages."""

import copy
import math
from collections.abc import Callable

import pytest
import torch
from criteria_cases import (
    CRITERIA,
    assert_decides,
    bounds,
    every_criterion,
    gradients,
    scale_free,
    statistics,
)
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor

import adagrad_kernels as ak
from adagrad_kernels.criteria import UNBOUNDED, Criterion


class TestBehaviour:
    """Facts about the tests: see arXiv 2402.11215, 2109.10933."""

    @given(gradients())
    def test_the_variance_splits_into_along_and_across(self, g: Tensor) -> None:
        """tr Σ̂ = Var(p)/‖ḡ‖² + Σ‖g_i − (p_i/‖ḡ‖²)ḡ‖²/(b − 1), measured by the tests' ratios."""
        s = statistics(g)
        ratios = [
            test.evaluate(s).ratio
            for test in (ak.InnerProductTest(1.0), ak.OrthogonalityTest(1.0), ak.NormTest(1.0))
        ]
        assert ratios[0] + ratios[1] == pytest.approx(ratios[2], rel=1e-9)

    @pytest.mark.parametrize(
        ("make", "reached"),
        [
            (ak.NormTest, True),
            (ak.OrthogonalityTest, True),  # all but one direction lie across ḡ
            (lambda nu: ak.AugmentedInnerProductTest(nu, nu), True),
            (lambda eta: ak.CoordinateNormTest(eta, "adagrad"), True),
            (ak.WorkerNormTest, True),
            (lambda eta: ak.Averaged(ak.NormTest(eta)), True),
            (ak.InnerProductTest, False),  # noise is hardly along ḡ
        ],
        ids=["norm", "orthogonality", "augmented", "adagrad", "workers", "averaged", "inner"],
    )
    @given(seed=st.integers(0, 100), n=st.integers(4, 64), eta=st.floats(0.1, 0.9))
    def test_pure_noise_grows_by_one_over_eta_squared(
        self, make: Callable[[float], Criterion], reached: bool, seed: int, n: int, eta: float
    ) -> None:
        """At most; for the maximum over coordinates and debiased tests there is no bound."""
        d = 4000
        g = torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        growth = make(eta).evaluate(statistics(g)).ratio * eta**2
        six_sigma = 6 * math.sqrt(2 / d)  # of ‖ḡ‖²; tr Σ̂ varies less
        assert growth <= 1 + 2 * six_sigma
        if reached:
            assert growth >= 1 - 2 * six_sigma

    @pytest.mark.parametrize(
        "make",
        [
            ak.NormTest,
            ak.WorkerNormTest,
            lambda eta, debiased: ak.NoiseScaleTarget(1 / eta**2, debiased=debiased),
        ],
        ids=["norm", "workers", "noise scale"],
    )
    @given(eta=st.floats(0.1, 0.9), scale=st.floats(1, 1e4), debiased=st.booleans())
    def test_where_the_batch_size_comes_to_rest(
        self, make: Callable[..., Criterion], eta: float, scale: float, debiased: bool
    ) -> None:
        """Plug-in (1/η² − 1) B, debiased B/η², with B = tr Σ/‖∇F‖² and ‖ḡ‖² as expected."""
        test = make(eta, debiased=debiased)
        rest = scale / eta**2 if debiased else scale * (1 / eta**2 - 1)
        n = 2
        for _ in range(10_000):
            mean = 1 + scale / n
            s = ak.GradientStatistics(n, (n - 1) * scale + n * mean, mean, workers=n)
            decision = test.evaluate(s)
            if decision.passed:
                break
            assert decision.batch_size > n
            n = decision.batch_size
        assert decision.passed
        assert rest - 1e-6 * rest <= n
        assert n == 2 or n <= rest + 1 + 1e-6 * rest

    @given(gradients(), bounds, bounds)
    def test_augmented_asks_for_no_less_than_norm_at_the_same_epsilon(
        self, g: Tensor, theta: float, nu: float
    ) -> None:
        s = statistics(g)
        augmented = ak.AugmentedInnerProductTest(theta, nu).evaluate(s)
        norm = ak.NormTest(ak.epsilon_from_theta_nu(theta, nu)).evaluate(s)
        assert augmented.ratio >= norm.ratio * (1 - 1e-9)
        assert norm.passed or not augmented.passed or norm.ratio < 1 + 1e-9

    @given(gradients(), bounds)
    def test_equal_at_matched_theta_and_nu(self, g: Tensor, epsilon: float) -> None:
        s = statistics(g)
        theta, nu = ak.theta_nu_from_epsilon(epsilon, s)
        assert ak.epsilon_from_theta_nu(theta, nu) == pytest.approx(epsilon, rel=1e-12)
        augmented = ak.AugmentedInnerProductTest(theta, nu).evaluate(s)
        assert augmented.ratio == pytest.approx(ak.NormTest(epsilon).evaluate(s).ratio, rel=1e-7)

    @scale_free
    @given(g=gradients(), exponent=st.integers(-30, 30))
    def test_the_loss_scale_cancels(
        self, make: Callable[[], Criterion], g: Tensor, exponent: int
    ) -> None:
        """Exactly, for powers of two."""
        assert make().evaluate(statistics(g * 2.0**exponent)) == make().evaluate(statistics(g))

    @every_criterion
    @given(g=gradients(), seed=st.integers(0, 100))
    def test_the_order_of_the_samples_does_not_matter(
        self, make: Callable[[], Criterion], g: Tensor, seed: int
    ) -> None:
        order = torch.randperm(len(g), generator=torch.Generator().manual_seed(seed))
        one, other = make().evaluate(statistics(g)), make().evaluate(statistics(g[order]))
        assume(one.ratio < 1e6)  # beyond, the denominator is rounding
        assert other.ratio == pytest.approx(one.ratio, rel=1e-6)

    @every_criterion
    @given(g=gradients())
    def test_evaluate_is_pure(self, make: Callable[[], Criterion], g: Tensor) -> None:
        test, s = make(), statistics(g)
        untouched = copy.deepcopy(s)
        if isinstance(test, ak.Averaged):
            test.record(statistics(g + 1))
        first = test.evaluate(s)
        test.evaluate(statistics(2 * g + 1))
        assert test.evaluate(s) == first
        for name in ("coordinate_mean", "coordinate_variance", "inner_products", "accumulators"):
            torch.testing.assert_close(getattr(s, name), getattr(untouched, name), rtol=0, atol=0)

    @every_criterion
    def test_no_decision_without_variance(self, make: Callable[[], Criterion]) -> None:
        decision = make().evaluate(ak.GradientStatistics(1, 4.0, 4.0, loss=1.0, lr=0.1))
        assert decision.passed
        assert decision.batch_size == 1
        assert "one sample" in decision.reason

    @every_criterion
    @pytest.mark.parametrize("value", [math.nan, math.inf])
    def test_no_decision_without_finite_numbers(
        self, make: Callable[[], Criterion], value: float
    ) -> None:
        s = ak.GradientStatistics(8, value, 1.0, loss=1.0, lr=0.1)
        decision = make().evaluate(s)
        assert decision.passed
        assert decision.batch_size == 8
        assert math.isnan(decision.ratio)
        assert "not finite" in decision.reason

    def test_no_decision_without_finite_inner_products(self) -> None:
        s = statistics(torch.ones(4, 3), inner_products=torch.tensor([1.0, math.nan, 1.0, 1.0]))
        for test in (ak.InnerProductTest(0.5), ak.AugmentedInnerProductTest(0.5, 1.0)):
            decision = test.evaluate(s)
            assert decision.passed
            assert decision.batch_size == 4
            assert "not finite" in decision.reason

    def test_a_zero_gradient(self) -> None:
        """Asks for the cap if the variance is positive, passes if everything is 0."""
        noise = torch.tensor([[1.0, 0.0, 2.0], [-1.0, 0.0, -2.0]], dtype=torch.float64)
        nothing = torch.zeros(2, 3)
        for test in (
            ak.NormTest(0.5), ak.InnerProductTest(0.5), ak.OrthogonalityTest(0.5),
            ak.AugmentedInnerProductTest(0.5, 0.7), ak.CoordinateNormTest(0.5),
        ):  # fmt: skip
            assert test.evaluate(statistics(noise)) == ak.Decision(False, UNBOUNDED, math.inf)
        for make in CRITERIA.values():
            assert make().evaluate(statistics(nothing)).passed

    def test_dead_coordinates(self) -> None:
        g = torch.tensor([[0.0, 1.0, 2.0, 3.0], [0.0, 1.0, 2.0, 3.1]], dtype=torch.float64)
        assert ak.CoordinateNormTest(0.5).evaluate(statistics(g)).passed
        g[:, 0] = torch.tensor([1.0, -1.0])  # its mean is 0, its variance is not
        assert ak.CoordinateNormTest(0.5).evaluate(statistics(g)).batch_size == UNBOUNDED
        assert ak.CoordinateNormTest(0.5, "fraction", fraction=0.25).evaluate(statistics(g)).passed
        assert ak.CoordinateNormTest(0.5, "quantile", quantile=0.75).evaluate(statistics(g)).passed

    def test_a_coordinate_without_history_in_adagrads_metric(self) -> None:
        g = torch.tensor([[0.0, 1.0, 2.0, 3.0], [0.0, 1.0, 2.0, 3.1]], dtype=torch.float64)
        s = statistics(g)
        s.accumulators["a"] = torch.tensor([0.0, 1.0])
        assert 0 < ak.CoordinateNormTest(0.5, "adagrad").evaluate(s).ratio < 1


class TestAveraged:
    """Averages of the two sides, not of their ratio."""

    @given(st.lists(gradients(), min_size=1, max_size=5), st.floats(0, 0.95))
    def test_ratio_of_averages(self, found: list[Tensor], decay: float) -> None:
        test = ak.Averaged(ak.NormTest(0.5), decay)
        noise = signal = 0.0
        for g in found:
            noise = decay * noise + (1 - decay) * g.var(0).sum().item()
            signal = decay * signal + (1 - decay) * g.mean(0).square().sum().item()
            s = statistics(g)
            assert_decides(test.evaluate(s), len(g), noise / (0.25 * signal))
            test.record(s)

    @given(gradients(), st.floats(0, 0.95))
    def test_of_equal_statistics_is_the_test_itself(self, g: Tensor, decay: float) -> None:
        s = statistics(g)
        for make in (lambda: ak.CoordinateNormTest(0.5), ak.CABS):
            test = ak.Averaged(make(), decay)
            for _ in range(3):
                assert test.evaluate(s).ratio == pytest.approx(make().evaluate(s).ratio, rel=1e-9)
                test.record(s)

    def test_steps_without_a_learning_rate_count_in_cabs(self) -> None:
        """The first step of a warm-up asks for nothing, but its variance is one like any other."""
        test, g = ak.Averaged(ak.CABS(), 0.5), torch.tensor([[4.0, 0.0, 0.0], [0.0, 4.0, 0.0]])
        still = statistics(g, lr=0.0, loss=0.25)
        assert test.evaluate(still) == ak.Decision(True, 1, 0.0)
        test.record(still)
        moving = statistics(g, lr=0.25, loss=0.25)
        assert test.evaluate(moving).batch_size == ak.CABS().evaluate(moving).batch_size

    def test_a_negative_signal_now_and_then_does_no_harm(self) -> None:
        test = ak.Averaged(ak.NoiseScaleTarget(), 0.9)
        clear = ak.GradientStatistics(4, sum_norms_sq=7 * 4.0, mean_norm_sq=4.0)  # tr Σ̂ = 4
        noisy = ak.GradientStatistics(4, sum_norms_sq=3 * 4.0 + 2.0, mean_norm_sq=0.5)
        assert ak.NoiseScaleTarget().evaluate(noisy).batch_size == UNBOUNDED
        for _ in range(20):
            test.record(clear)
        past = 0.9 * (1 - 0.9**20)
        scale = (past * 4 + 0.1 * 4) / (past * 3 - 0.1 * 0.5)
        assert test.evaluate(noisy).ratio == pytest.approx(scale / 4, rel=1e-12)

    def test_state_dict(self) -> None:
        g = torch.randn(6, 5, dtype=torch.float64)
        for name in ("averaged", "averaged, augmented", "averaged, coordinate"):
            first, second = CRITERIA[name](), CRITERIA[name]()
            first.record(statistics(g + 0.3))
            second.load_state_dict(copy.deepcopy(first.state_dict()))
            first.record(statistics(g))  # must not reach the second through the state
            second.record(statistics(g))
            assert first.evaluate(statistics(-g)) == second.evaluate(statistics(-g))
            assert first.evaluate(statistics(-g)) != CRITERIA[name]().evaluate(statistics(-g))

    def test_what_is_undecidable_is_not_recorded(self) -> None:
        test = ak.Averaged(ak.NormTest(0.5))
        test.record(ak.GradientStatistics(8, math.nan, 1.0))
        test.record(ak.GradientStatistics(1, 1.0, 1.0))
        assert test.state_dict()["averages"] is None
