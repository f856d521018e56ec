"""The coordinate-wise norm test, strict and aggregated, and the one in AdaGrad's own metric."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..distributed import local
from ..shards import pooled
from ..statistics import GradientStatistics
from .base import Comparison, Decision, GradientTest, check_positive

_AGGREGATES = ("max", "quantile", "fraction", "adagrad")


@dataclass(frozen=True)
class CoordinateNormTest(GradientTest):
    """The coordinate-wise norm test: what the guarantee for (diagonal) AdAdaGrad needs.

        passes if  var_j / b ≤ η² ḡ_j²  for every coordinate j,
        otherwise  b⁺ = ⌈max_j var_j / (η² ḡ_j²)⌉

    A coordinate with var_j = ḡ_j = 0 (a dead ReLU) passes; one with var_j > 0 = ḡ_j asks for
    the cap. The strict maximum is ruled by the coordinates with ḡ_j ≈ 0 and soon jumps to the
    cap; the other aggregates are for practice:

    - "quantile": b⁺ from the quantile of the coordinates' own suggestions;
    - "fraction": as many coordinates may fail as `fraction` of them; the quantile 1 − fraction;
    - "adagrad": errors measured as AdaGrad's step measures gradients,
      Σ_j var_j/(√v_j + eps) ≤ b η² Σ_j ḡ_j²/(√v_j + eps) with its accumulators v and its eps
      (`AdAdaGrad` supplies them).

    Where `fully_shard` has sharded the parameters, each rank sums the squares of its own samples
    in buffers as large as the whole model, and all together then keep shards of the sums. "max"
    and "adagrad" compare shard by shard; "quantile" and "fraction" gather the ratios of all
    coordinates on every rank.

    Args:
        eta: η > 0, the allowed relative error.
        aggregate: "max", "quantile", "fraction" or "adagrad".
        quantile: in (0, 1], for "quantile".
        fraction: in [0, 1), for "fraction".
        debiased: see `GradientTest`; dataset_size likewise.

    Raises:
        ValueError: arguments out of range; in `evaluate`, statistics without coordinates (or
            accumulators).

    Source:
        arXiv 2402.11215; 2412.21124, proposition 1. The aggregates are this library's.

    Example:
        >>> s = GradientStatistics(
        ...     4, sum_norms_sq=40.0, mean_norm_sq=5.0,
        ...     coordinate_variance={"w": torch.tensor([2.0, 3.0])},
        ...     coordinate_mean={"w": torch.tensor([1.0, 2.0])},
        ... )
        >>> CoordinateNormTest(eta=0.5).evaluate(s)  # 2/(0.25 · 1) and 3/(0.25 · 4)
        Decision(passed=False, batch_size=8, ratio=2.0, reason='')
        >>> CoordinateNormTest(0.5, aggregate="fraction", fraction=0.5).evaluate(s).passed
        True
    """

    eta: float = 0.1
    aggregate: str = "max"
    quantile: float = 0.9
    fraction: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self, eta=self.eta)
        if self.aggregate not in _AGGREGATES:
            raise ValueError(
                f"CoordinateNormTest: aggregate must be one of {', '.join(_AGGREGATES)}, got "
                f"{self.aggregate!r}"
            )
        if not 0 < self.quantile <= 1:
            raise ValueError(f"CoordinateNormTest: quantile not in (0, 1]: {self.quantile!r}")
        if not 0 <= self.fraction < 1:
            raise ValueError(f"CoordinateNormTest: fraction not in [0, 1): {self.fraction!r}")

    @property
    def needs(self) -> frozenset[str]:
        """Coordinates, and for "adagrad" the accumulators."""
        more = {"accumulators"} if self.aggregate == "adagrad" else set()
        return frozenset({"coordinates", *more})

    def evaluate(self, statistics: GradientStatistics) -> Decision:
        """Applies the test, without looking at the coordinates where the update's kernel has."""
        r = statistics.coordinate_reductions
        sides = None
        if r is not None and not self.undecidable(statistics):
            known = {"max": (r.max_ratio, 1.0), "adagrad": (r.variance_metric, r.grad_metric)}
            sides = known.get(self.aggregate)
        if sides is None:
            return super().evaluate(statistics)
        comparisons = self._corrected((Comparison(*sides, self.eta**2),), statistics)
        return self.decide(statistics.batch_size, comparisons)

    def _compare(self, statistics: GradientStatistics) -> tuple[Comparison, ...]:
        variance, mean = statistics.coordinate_variance, statistics.coordinate_mean
        if variance is None or mean is None:
            raise ValueError("the statistics have no coordinates: observe(coordinates=True)")
        squares = {name: mean[name].double().square() for name in variance}
        noise = {name: v.double() for name, v in variance.items()}
        if self.aggregate == "adagrad":
            return (self._in_metric(noise, squares, statistics),)
        parts = {"max": 1.0, "quantile": self.quantile, "fraction": 1 - self.fraction}
        return (Comparison(noise, squares, self.eta**2, parts[self.aggregate]),)

    def _in_metric(
        self,
        noise: dict[str, Tensor],
        squares: dict[str, Tensor],
        statistics: GradientStatistics,
    ) -> Comparison:
        accumulators, eps = statistics.accumulators, statistics.eps or {}
        if accumulators is None:
            raise ValueError(
                'aggregate="adagrad" needs the accumulators of AdAdaGrad; with another optimizer '
                "choose another aggregate"
            )
        sums = []
        for name, variance in noise.items():
            root = local(accumulators[name]).double().sqrt() + eps.get(name, 0.0)
            sides = [
                # 0/0, a coordinate that never had a gradient, counts as 0
                torch.where(x > 0, x / root, 0.0).sum()
                for x in (local(variance), local(squares[name]))
            ]
            sums.append(torch.stack(sides))
        values = pooled(sums, list(noise.values()), "sum").tolist()
        return Comparison(values[0], values[1], self.eta**2)
