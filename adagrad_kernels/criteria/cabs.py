"""CABS: the batch size coupled to the learning rate, which may also shrink."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from ..statistics import GradientStatistics
from .base import UNBOUNDED, Comparison, Decision, VarianceTest


@dataclass(frozen=True)
class CABS(VarianceTest):
    """Coupled adaptive batch size: b⁺ = round(lr · tr Σ̂ / F), F the loss (at least 0).

    Unlike the tests it also suggests smaller batches; the controller follows with
    `monotone=False`. The source clips to [16, 2048] (`min_batch_size`, `max_batch_size`) and
    averages tr Σ̂ and F: `Averaged(CABS(), 0.95)`. The loss comes from `opt.step(loss=loss)` or a
    closure.

    Raises:
        ValueError: in `evaluate`, statistics without loss or learning rate.

    Source:
        Balles, Romero, Hennig 2017, "Coupling adaptive batch sizes with learning rates".

    Example:
        >>> s = GradientStatistics(4, sum_norms_sq=40.0, mean_norm_sq=1.0, loss=0.5, lr=0.25)
        >>> CABS().evaluate(s)  # tr Σ̂ = 12
        Decision(passed=False, batch_size=6, ratio=1.5, reason='')
    """

    @property
    def needs(self) -> frozenset[str]:
        """The loss."""
        return frozenset({"loss"})

    def undecidable(self, statistics: GradientStatistics) -> str:
        """Also needs a positive loss."""
        loss = statistics.loss
        if loss is not None and not (loss > 0 and math.isfinite(loss)):
            return f"the loss is not a positive number ({loss})"
        return super().undecidable(statistics)

    def compare(self, statistics: GradientStatistics) -> tuple[Comparison, ...]:
        """Tr Σ̂ / b ≤ F / lr."""
        if statistics.loss is None or statistics.lr is None:
            raise ValueError("CABS needs the loss: call opt.step(loss=loss)")
        bound = 1 / statistics.lr if statistics.lr > 0 else math.inf
        return (Comparison(statistics.variance, statistics.loss, bound),)

    def decide(self, batch_size: int, comparisons: Sequence[Comparison]) -> Decision:
        """The nearest number of samples to what is needed, also where that is fewer."""
        needed = comparisons[0].needed()
        suggestion = max(1, round(needed)) if needed < UNBOUNDED else UNBOUNDED
        return Decision(suggestion <= batch_size, suggestion, needed / batch_size)
