"""The tests: from the statistics of a step to a suggested batch size. Pure functions.

A test asks whether the batch's gradient is accurate enough; where it is not, it says how many
samples would have been. What becomes of the suggestion is the controller's business
(`batch_size.py`).
"""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass
from typing import Protocol

from .statistics import GradientStatistics

UNBOUNDED = sys.maxsize
"""The suggestion where no finite batch would do: zero mean gradient, positive variance."""


@dataclass(frozen=True)
class Decision:
    """What a test said.

    Attributes:
        passed: the gradient is accurate enough; also True where nothing was tested.
        batch_size: the suggested batch size: the step's own if it passed, otherwise b⁺.
        ratio: left side over right side of the test; > 1 fails, NaN where nothing was tested.
        reason: empty, or why no decision was possible.
    """

    passed: bool
    batch_size: int
    ratio: float
    reason: str = ""

    @property
    def tested(self) -> bool:
        """Whether the statistics allowed a decision."""
        return not self.reason


class Criterion(Protocol):
    """Anything with `evaluate` steers a batch size; `needs` says what it must be given."""

    needs: frozenset[str]
    """Beyond norms: of "coordinates", "inner_products"."""

    def evaluate(self, statistics: GradientStatistics) -> Decision:
        """The decision for these statistics; must not change anything."""
        ...


def undecidable(statistics: GradientStatistics) -> Decision | None:
    """The decision to keep the batch where no test is defined, or None where one is."""
    n = statistics.batch_size
    if n < 2:
        return Decision(True, n, math.nan, "a batch of one sample has no variance")
    if not statistics.finite:
        return Decision(True, n, math.nan, "the gradient statistics are not finite")
    return None


def decide(batch_size: int, variance: float, allowed: float) -> Decision:
    """Passes if variance / batch_size ≤ allowed; otherwise suggests ⌈variance / allowed⌉."""
    if variance <= batch_size * allowed:
        ratio = variance / (batch_size * allowed) if allowed > 0 else 0.0
        return Decision(True, batch_size, ratio)
    suggestion = variance / allowed if allowed > 0 else math.inf
    wanted = math.ceil(suggestion) if suggestion < UNBOUNDED else UNBOUNDED
    return Decision(False, wanted, suggestion / batch_size)


@dataclass(frozen=True)
class NormTest:
    """The norm test: the gradient's expected squared error is at most η² of its square.

        passes if  tr Σ̂ / b ≤ η² ‖ḡ‖²,  otherwise  b⁺ = ⌈tr Σ̂ / (η² ‖ḡ‖²)⌉

    In pure noise (‖ḡ‖² ≈ tr Σ̂/b) a test multiplies the batch by at most about 1/η²; it comes
    to rest near (1/η² − 1) times the gradient noise scale.

    Args:
        eta: η > 0, the allowed relative error; 0.05 to 0.5 in the papers. Smaller means larger
            batches; from 1 on a test hardly ever fails.

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
    needs = frozenset[str]()

    def __post_init__(self) -> None:
        if not (self.eta > 0 and math.isfinite(self.eta)):
            raise ValueError(f"NormTest: eta must be a positive number, got {self.eta!r}")

    def evaluate(self, statistics: GradientStatistics) -> Decision:
        """Applies the test; keeps the batch for one sample or non-finite statistics."""
        s = statistics
        return undecidable(s) or decide(s.batch_size, s.variance, self.eta**2 * s.mean_norm_sq)
