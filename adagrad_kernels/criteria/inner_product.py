"""The inner-product tests: errors along the gradient and across it, told apart."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

from ..statistics import GradientStatistics
from .base import Comparison, GradientTest, check_positive


def _along(s: GradientStatistics) -> float:
    """Var(p)/‖ḡ‖², the variance along ḡ, p_i = ⟨g_i, ḡ⟩; all of it where ḡ = 0 has no direction."""
    variance = s.inner_variance
    if variance is None:
        raise ValueError("the statistics have no inner products: observe(inner_products=True)")
    return variance / s.mean_norm_sq if s.mean_norm_sq > 0 else s.variance


def _across(s: GradientStatistics) -> float:
    """Σ‖g_i − (p_i/‖ḡ‖²)ḡ‖²/(b−1), the variance across ḡ: what is left of tr Σ̂, or all of it."""
    along = _along(s)
    return max(s.variance - along, 0.0) if s.mean_norm_sq > 0 else s.variance


@dataclass(frozen=True)
class _NeedsInnerProducts(GradientTest):
    every_sample: bool = field(default=False, kw_only=True)

    @property
    def needs(self) -> frozenset[str]:
        """The inner products ⟨g_i, ḡ⟩."""
        more = {"all_inner_products"} if self.every_sample else set()
        return frozenset({"inner_products", *more})

    def undecidable(self, statistics: GradientStatistics) -> str:
        """Also needs the inner products of two samples."""
        p = statistics.inner_products
        if p is not None and len(p) < 2:
            return "fewer than two inner products were measured"
        if reason := super().undecidable(statistics):
            return reason
        variance = statistics.inner_variance
        finite = variance is None or math.isfinite(variance)
        return "" if finite else "the inner products are not finite"

    def _debiased(
        self, comparisons: tuple[Comparison, ...], statistics: GradientStatistics
    ) -> tuple[Comparison, ...]:
        """All compare with ‖ḡ‖², in which the whole variance is, not only the part they look at."""
        share = self._variance_of_mean(statistics.batch_size)
        signal = statistics.mean_norm_sq - statistics.variance * share
        return tuple(replace(c, signal=signal) for c in comparisons)


@dataclass(frozen=True)
class InnerProductTest(_NeedsInnerProducts):
    """The inner-product test: −ḡ is a descent direction in most batches.

        passes if  Var(p) / b ≤ θ² ‖ḡ‖⁴,  otherwise  b⁺ = ⌈Var(p) / (θ² ‖ḡ‖⁴)⌉,  p_i = ⟨g_i, ḡ⟩

    It looks at the error along ḡ only, so it asks for smaller batches than the norm test, and
    guarantees nothing about the error across ḡ.

    Args:
        theta: θ > 0; 0.9 in the source, 0.5 in the AdAdaGrad experiments.
        every_sample: where a batch is accumulated from micro-batches, ḡ is known in the last one
            only. False measures p_i of its samples: exact for them, an estimate from fewer samples
            for the batch. True measures all: what the layers' backward passes need is kept until
            the batch is complete, so that its memory grows with the batch.
        debiased: see `GradientTest`; dataset_size likewise.

    Raises:
        ValueError: if theta is not a positive finite number; in `evaluate`, statistics without
            inner products.

    Source:
        Bollapragada, Byrd, Nocedal 2018, "Adaptive sampling strategies for stochastic
        optimization".

    Example:
        >>> p = torch.tensor([0.0, 4.0])  # mean 2 = ‖ḡ‖², variance 8
        >>> s = GradientStatistics(2, sum_norms_sq=20.0, mean_norm_sq=2.0, inner_products=p)
        >>> InnerProductTest(theta=0.5).evaluate(s)
        Decision(passed=False, batch_size=8, ratio=4.0, reason='')
    """

    theta: float = 0.9

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self, theta=self.theta)

    def _compare(self, statistics: GradientStatistics) -> tuple[Comparison, ...]:
        s = statistics
        return (Comparison(_along(s), s.mean_norm_sq, self.theta**2),)


@dataclass(frozen=True)
class OrthogonalityTest(_NeedsInnerProducts):
    """The orthogonality test: bounds the error across ḡ.

        passes if  o / b ≤ ν² ‖ḡ‖²,  otherwise  b⁺ = ⌈o / (ν² ‖ḡ‖²)⌉,
        o = Σ‖g_i − (p_i/‖ḡ‖²) ḡ‖² / (b − 1) = tr Σ̂ − Var(p)/‖ḡ‖²

    (With inner products of only some of the samples, the last form holds on average.)

    Args:
        nu: ν > 0; 5.84 in the source (which calls it tan 80°), 1 in the AdAdaGrad experiments.
        every_sample: see `InnerProductTest`.
        debiased: see `GradientTest`; dataset_size likewise.

    Raises:
        ValueError: as `InnerProductTest`.

    Source:
        Bollapragada, Byrd, Nocedal 2018.

    Example:
        >>> p = torch.tensor([0.0, 4.0])
        >>> s = GradientStatistics(2, sum_norms_sq=20.0, mean_norm_sq=2.0, inner_products=p)
        >>> OrthogonalityTest(nu=1.0).evaluate(s)  # tr Σ̂ = 16, of which 8/2 lie along ḡ
        Decision(passed=False, batch_size=6, ratio=3.0, reason='')
    """

    nu: float = 5.84

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self, nu=self.nu)

    def _compare(self, statistics: GradientStatistics) -> tuple[Comparison, ...]:
        s = statistics
        return (Comparison(_across(s), s.mean_norm_sq, self.nu**2),)


@dataclass(frozen=True)
class AugmentedInnerProductTest(_NeedsInnerProducts):
    """Inner-product and orthogonality test together: both must pass, b⁺ is the larger one.

    With ε² = θ² + ν² it implies the norm test with η = ε and never asks for less; where
    (θ, ν) = `theta_nu_from_epsilon(ε, statistics)` the two are the same. A loose ν makes it
    cheaper because it demands less.

    Args:
        theta: see `InnerProductTest`.
        nu: see `OrthogonalityTest`.
        every_sample: see `InnerProductTest`.
        debiased: see `GradientTest`; dataset_size likewise.

    Raises:
        ValueError: as `InnerProductTest`.

    Source:
        Bollapragada, Byrd, Nocedal 2018; with AdaGrad in arXiv 2402.11215.

    Example:
        >>> p = torch.tensor([0.0, 4.0])
        >>> s = GradientStatistics(2, sum_norms_sq=20.0, mean_norm_sq=2.0, inner_products=p)
        >>> AugmentedInnerProductTest(theta=0.5, nu=1.0).evaluate(s)
        Decision(passed=False, batch_size=8, ratio=4.0, reason='')
    """

    theta: float = 0.9
    nu: float = 5.84

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self, theta=self.theta, nu=self.nu)

    def _compare(self, statistics: GradientStatistics) -> tuple[Comparison, ...]:
        s = statistics
        return (
            Comparison(_along(s), s.mean_norm_sq, self.theta**2),
            Comparison(_across(s), s.mean_norm_sq, self.nu**2),
        )


def theta_nu_from_epsilon(epsilon: float, statistics: GradientStatistics) -> tuple[float, float]:
    """The (θ, ν) for which the augmented test is the norm test with η = ε, on these statistics.

        θ² = ε² a/(a + o),  ν² = ε² o/(a + o)

    with a = Var(p)/‖ḡ‖⁴ and o = (tr Σ̂ − Var(p)/‖ḡ‖²)/‖ḡ‖², the squared relative errors of one
    sample along and across ḡ. For any (θ, ν) with θ² + ν² = ε² the augmented test asks for
    max(a/θ², o/ν²) ≥ (a + o)/ε² samples, what the norm test asks for; equal exactly here.

    Raises:
        ValueError: statistics without inner products, without variance or with zero gradient;
            epsilon ≤ 0.

    Source:
        Espath, Krumscheid, Tempone, Vilanova 2021 (arXiv 2109.10933).

    Example:
        >>> p = torch.tensor([0.0, 4.0])
        >>> s = GradientStatistics(2, sum_norms_sq=20.0, mean_norm_sq=2.0, inner_products=p)
        >>> theta_nu_from_epsilon(1.0, s)  # a quarter of the variance lies along ḡ
        (0.5, 0.8660254037844386)
    """
    if not epsilon > 0:
        raise ValueError(f"epsilon must be positive, got {epsilon!r}")
    along, across = _along(statistics), _across(statistics)
    if not (along + across > 0 and statistics.mean_norm_sq > 0):
        raise ValueError("without variance or gradient these statistics do not determine θ and ν")
    share = along / (along + across)
    return epsilon * math.sqrt(share), epsilon * math.sqrt(1 - share)


def epsilon_from_theta_nu(theta: float, nu: float) -> float:
    """ε = √(θ² + ν²): the augmented test with (θ, ν) implies the norm test with η = ε.

    Example:
        >>> epsilon_from_theta_nu(3.0, 4.0)
        5.0
    """
    return math.hypot(theta, nu)
