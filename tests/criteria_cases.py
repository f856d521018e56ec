"""Statistics of explicit per-sample gradients, and every criterion."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

import adagrad_kernels as ak
from adagrad_kernels.criteria import Criterion


def statistics(g: Tensor, **more: Any) -> ak.GradientStatistics:
    """What an observer would measure of the per-sample gradients g [n, d]."""
    n, mean = len(g), g.mean(0)
    return ak.GradientStatistics(
        batch_size=n,
        sum_norms_sq=g.square().sum().item(),
        mean_norm_sq=mean.square().sum().item(),
        contribution_norms_sq=(g / n).square().sum(1),
        coordinate_mean={"a": mean[:2], "b": mean[2:]},
        coordinate_variance={"a": g.var(0)[:2], "b": g.var(0)[2:]},
        accumulators={"a": torch.full((2,), 4.0), "b": 9.0 + torch.zeros(g.shape[1] - 2)},
        **{"inner_products": g @ mean, "loss": 0.5, "lr": 0.25, "workers": n, **more},
    )


@st.composite
def gradients(draw: st.DrawFn, max_samples: int = 30) -> Tensor:
    n, d = draw(st.integers(2, max_samples)), draw(st.integers(3, 12))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10**6)))
    direction = draw(st.floats(0, 3)) * torch.randn(d, generator=generator, dtype=torch.float64)
    return torch.randn(n, d, generator=generator, dtype=torch.float64) + direction


bounds = st.floats(0.05, 3.0)

CRITERIA: dict[str, Callable[[], Criterion]] = {
    "norm": lambda: ak.NormTest(0.5),
    "norm, debiased": lambda: ak.NormTest(0.5, debiased=True),
    "norm, finite": lambda: ak.NormTest(0.5, dataset_size=1000),
    "inner product": lambda: ak.InnerProductTest(0.5),
    "orthogonality": lambda: ak.OrthogonalityTest(0.5),
    "inner product, all": lambda: ak.InnerProductTest(0.5, every_sample=True),
    "augmented, all": lambda: ak.AugmentedInnerProductTest(0.5, 0.7, every_sample=True),
    "augmented": lambda: ak.AugmentedInnerProductTest(0.5, 0.7),
    "coordinate, max": lambda: ak.CoordinateNormTest(0.5),
    "coordinate, quantile": lambda: ak.CoordinateNormTest(0.5, "quantile", quantile=0.7),
    "coordinate, fraction": lambda: ak.CoordinateNormTest(0.5, "fraction", fraction=0.4),
    "coordinate, adagrad": lambda: ak.CoordinateNormTest(0.5, "adagrad"),
    "noise scale": lambda: ak.NoiseScaleTarget(2.0),
    "averaged": lambda: ak.Averaged(ak.NormTest(0.5)),
    "averaged, augmented": lambda: ak.Averaged(ak.AugmentedInnerProductTest(0.5, 0.7)),
    "averaged, coordinate": lambda: ak.Averaged(ak.CoordinateNormTest(0.5)),
    "CABS": ak.CABS,
}
EVERY_CRITERION = {
    **CRITERIA,
    "workers": lambda: ak.WorkerNormTest(0.5),
    "workers, printed": lambda: ak.WorkerNormTest(0.5, printed=True),
}
every_criterion = pytest.mark.parametrize(
    "make", EVERY_CRITERION.values(), ids=EVERY_CRITERION.keys()
)
scale_free = pytest.mark.parametrize(
    "make", [make for name, make in EVERY_CRITERION.items() if name != "CABS"]
)


def assert_decides(decision: ak.Decision, n: int, needed: float) -> None:
    """Passes with n samples or more than needed; otherwise asks for ⌈needed⌉."""
    assert decision.tested
    assert decision.ratio == pytest.approx(needed / n, rel=1e-9)
    assert decision.passed == (decision.ratio <= 1)
    if decision.passed:
        assert decision.batch_size == n
    else:
        assert abs(decision.batch_size - math.ceil(needed)) <= (needed % 1 < 1e-6 or needed > 1e6)
        assert decision.batch_size > n
