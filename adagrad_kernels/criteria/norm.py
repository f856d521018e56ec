"""The norm test, and the gradient noise scale as a target."""

from __future__ import annotations

from dataclasses import dataclass, field

from ..statistics import GradientStatistics
from .base import Comparison, GradientTest, check_positive


@dataclass(frozen=True)
class NormTest(GradientTest):
    """The norm test: the gradient's expected squared error is at most η² of its square.

        passes if  tr Σ̂ / b ≤ η² ‖ḡ‖²,  otherwise  b⁺ = ⌈tr Σ̂ / (η² ‖ḡ‖²)⌉

    In pure noise (‖ḡ‖² ≈ tr Σ̂/b) a test multiplies the batch by about 1/η². The batch settles
    where tests pass on average, at (1/η² − 1) times the gradient noise scale, or above: it never
    shrinks, and estimates scatter, the more so the fewer directions the gradients have.

    Args:
        eta: η > 0, the allowed relative error; 0.05 to 0.5 in the papers. Smaller means larger
            batches; from 1 on they hardly grow.
        debiased: see `GradientTest`; dataset_size likewise.

    Raises:
        ValueError: if eta is not a positive finite number.

    Source:
        Byrd, Chin, Nocedal, Wu 2012; with AdaGrad in arXiv 2402.11215.

    Example:
        >>> s = GradientStatistics(batch_size=4, sum_norms_sq=40.0, mean_norm_sq=1.0)
        >>> NormTest(eta=0.5).evaluate(s)  # tr Σ̂ = (40 - 4)/3 = 12
        Decision(passed=False, batch_size=48, ratio=12.0, reason='')
    """

    eta: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self, eta=self.eta)

    def _compare(self, statistics: GradientStatistics) -> tuple[Comparison, ...]:
        s = statistics
        return (Comparison(s.variance, s.mean_norm_sq, self.eta**2),)


@dataclass(frozen=True)
class NoiseScaleTarget(GradientTest):
    """Grows the batch to the gradient noise scale B = tr Σ / ‖∇F‖², or a multiple of it.

        passes if  b ≥ multiple · B,  otherwise  b⁺ = ⌈multiple · B⌉,
        B = tr Σ̂ / (‖ḡ‖² − tr Σ̂/b)

    A norm test with η² = 1/multiple and debiased denominator. One batch's estimate of B is
    rough (infinite where the denominator is not positive): wrap it, `Averaged(NoiseScaleTarget())`.

    Args:
        multiple: > 0; batches much larger than B gain little per sample, smaller ones lose
            little (McCandlish et al. 2018, section 2).
        debiased: see `GradientTest`; True here by default. dataset_size likewise.

    Raises:
        ValueError: if multiple is not a positive finite number.

    Source:
        McCandlish, Kaplan, Amodei et al. 2018, "An empirical model of large-batch training".

    Example:
        >>> s = GradientStatistics(batch_size=4, sum_norms_sq=40.0, mean_norm_sq=4.0)
        >>> NoiseScaleTarget().evaluate(s)  # tr Σ̂ = 8, so B = 8/(4 - 2)
        Decision(passed=True, batch_size=4, ratio=1.0, reason='')
    """

    multiple: float = 1.0
    debiased: bool = field(default=True, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self, multiple=self.multiple)

    def _compare(self, statistics: GradientStatistics) -> tuple[Comparison, ...]:
        s = statistics
        return (Comparison(s.variance, s.mean_norm_sq, 1 / self.multiple),)
