"""What all tests share: the decision, the comparison behind it, and the corrections to it."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from ..distributed import local, whole
from ..shards import in_layout, pooled
from ..statistics import GradientStatistics

UNBOUNDED = sys.maxsize
"""The suggestion where no finite batch would do: zero mean gradient, positive variance."""

NEEDS = frozenset(
    {"coordinates", "inner_products", "all_inner_products", "accumulators", "loss", "workers"}
)
"""What `Criterion.needs` may hold."""

Quantity = float | dict[str, Tensor]
"""One number, or one a coordinate, by parameter name."""


@dataclass(frozen=True)
class Decision:
    """What a test said.

    Attributes:
        passed: the gradient is accurate enough; also True where nothing was tested.
        batch_size: the suggested batch size: the step's own if it passed, otherwise b⁺ (`CABS`
            also suggests fewer samples than the step had).
        ratio: left side over right side of the test; > 1 fails, NaN where nothing was tested.
        reason: empty, or why no decision was possible.

    Example:
        >>> s = GradientStatistics(batch_size=4, sum_norms_sq=40.0, mean_norm_sq=1.0)
        >>> d = NormTest(0.5).evaluate(s)
        >>> d.passed, d.batch_size, d.tested
        (False, 48, True)
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

    @property
    def needs(self) -> frozenset[str]:
        """Beyond norms: of "coordinates", "inner_products", "accumulators", "loss".

        Beside "inner_products" also "all_inner_products": of all micro-batches, not the last one.
        Or "workers" alone: mean gradients of micro-batches, none of single samples.
        """
        ...

    def evaluate(self, statistics: GradientStatistics) -> Decision:
        """The decision for these statistics; must not change anything."""
        ...


@runtime_checkable
class StatefulCriterion(Criterion, Protocol):
    """A criterion with a memory, which only `record` changes."""

    def record(self, statistics: GradientStatistics) -> None:
        """Takes in the statistics of a step; the optimizers call it after `evaluate`."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """The memory."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores `state_dict()`."""
        ...


@dataclass(frozen=True)
class Comparison:
    """The inequality of a test with b samples: noise / b ≤ bound · signal.

    Attributes:
        noise: a variance of one sample, such as tr Σ̂.
        signal: a square that it is compared with, such as ‖ḡ‖².
        bound: the allowed squared relative error, such as η².
        quantile: for coordinates, which part of them must pass; 1 for all.
    """

    noise: Quantity
    signal: Quantity
    bound: float
    quantile: float = 1.0

    def needed(self) -> float:
        """The batch size from which on it holds; 0/0 is 0, infinite where none does."""
        if isinstance(self.noise, dict):
            assert isinstance(self.signal, dict)
            return _ratio_of_coordinates(self.noise, self.signal, self.quantile) / self.bound
        assert not isinstance(self.signal, dict)
        if self.noise <= 0:
            return 0.0
        allowed = self.bound * self.signal
        return self.noise / allowed if allowed > 0 else math.inf


def apply(function: Callable[..., Any], *quantities: Quantity) -> Quantity:
    """A function of numbers, of each coordinate where there are coordinates."""
    first = quantities[0]
    if not isinstance(first, dict):
        return function(*quantities)
    return {name: function(*(q[name] for q in quantities)) for name in first}  # type: ignore[index]


def _ratio_of_coordinates(
    noise: dict[str, Tensor], signal: dict[str, Tensor], quantile: float
) -> float:
    """The quantile of noise_j / signal_j: the least value that covers this part of all j."""
    ratios = []
    for name, n in noise.items():
        variance, square = local(n), local(signal[name])
        ratio = torch.where(square > 0, variance / square, torch.inf)
        ratios.append(torch.where(variance > 0, ratio, 0.0))
    if not ratios:
        return 0.0
    like = list(noise.values())
    if quantile == 1:
        own = [r.max() if r.numel() else r.new_zeros(()) for r in ratios]
        return float(pooled(own, like, "max"))
    ratios = [whole(in_layout(r, t)).flatten() for r, t in zip(ratios, like, strict=True)]
    everything = torch.cat(ratios)
    covered = math.ceil(quantile * everything.numel() - 1e-9)  # 0.55 · 100 is 55.00…01
    return float(everything.kthvalue(max(1, covered)).values)


@dataclass(frozen=True)
class VarianceTest:
    """Base class of the tests: subclasses say what is compared, in `compare`."""

    @property
    def needs(self) -> frozenset[str]:
        """Nothing beyond norms."""
        return frozenset()

    def compare(self, statistics: GradientStatistics) -> tuple[Comparison, ...]:
        """The inequalities that must all hold."""
        raise NotImplementedError

    def undecidable(self, statistics: GradientStatistics) -> str:
        """Why the statistics allow no decision; empty if they do."""
        if statistics.batch_size < 2:
            return "a batch of one sample has no variance"
        if not statistics.finite:
            return "the gradient statistics are not finite"
        if statistics.vanishing:
            return "the samples' gradients are too small for float32, which loses their squares"
        return ""

    def decide(self, batch_size: int, comparisons: Sequence[Comparison]) -> Decision:
        """Passes if a batch of this size satisfies all inequalities, otherwise suggests b⁺."""
        needed = max(comparison.needed() for comparison in comparisons)
        ratio = needed / batch_size
        if ratio <= 1:
            return Decision(True, batch_size, ratio)
        return Decision(False, max(ceil(needed), batch_size + 1), ratio)

    def evaluate(self, statistics: GradientStatistics) -> Decision:
        """Applies the test; keeps the batch for one sample or non-finite statistics."""
        n = statistics.batch_size
        if reason := self.undecidable(statistics):
            return Decision(True, n, math.nan, reason)
        return self.decide(n, self.compare(statistics))


@dataclass(frozen=True)
class GradientTest(VarianceTest):
    """Base class of the tests that compare the gradient's variance with its own square.

    Args:
        debiased: compare with ‖ḡ‖² − tr Σ̂/b, the unbiased estimate of ‖∇F‖², instead of ‖ḡ‖²
            (coordinates likewise). The plain form, the papers', settles at (1/η² − 1) times the
            gradient noise scale, this one at 1/η² times. Where one batch's estimate is not
            positive, as in pure noise, no finite batch passes: combine it with `Averaged`, or
            limit single changes with `growth_limit`.
        dataset_size: n, for the batches of an `AdaptiveDataLoader` over n samples. They are
            stretches of one permutation after another; those that span the end of an epoch may
            hold samples twice. With x = b/n the variance of their mean then is

                tr Σ / b · (1 − x + x²/3)  for x ≤ 1,    tr Σ / b · 1/(3x)  beyond,

            on average over where in the epoch they begin (tr Σ with 1/(n − 1)), and b⁺ solves the
            test with it. (Each drawn from all n samples without replacement, it would be 1 − x:
            arXiv 2412.21124, eq. 2.) None leaves the factor at 1.
    """

    debiased: bool = field(default=False, kw_only=True)
    dataset_size: int | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        if self.dataset_size is not None and not self.dataset_size >= 2:
            raise ValueError(
                f"{type(self).__name__}: dataset_size must be at least 2, got {self.dataset_size!r}"
            )

    def _compare(self, statistics: GradientStatistics) -> tuple[Comparison, ...]:
        raise NotImplementedError

    def compare(self, statistics: GradientStatistics) -> tuple[Comparison, ...]:
        """The inequalities that must all hold, with a debiased signal if that was chosen."""
        return self._corrected(self._compare(statistics), statistics)

    def _corrected(
        self, comparisons: tuple[Comparison, ...], statistics: GradientStatistics
    ) -> tuple[Comparison, ...]:
        return self._debiased(comparisons, statistics) if self.debiased else comparisons

    def _debiased(
        self, comparisons: tuple[Comparison, ...], statistics: GradientStatistics
    ) -> tuple[Comparison, ...]:
        """With the signals' own share of noise taken off: here that of the same comparison."""
        share = self._variance_of_mean(statistics.batch_size)

        def debias(signal: Any, noise: Any) -> Any:
            return signal - noise * share

        return tuple(replace(c, signal=apply(debias, c.signal, c.noise)) for c in comparisons)

    def _variance_of_mean(self, batch_size: int) -> float:
        """Of b samples, as a multiple of the variance of one."""
        if self.dataset_size is None:
            return 1 / batch_size
        x = batch_size / self.dataset_size
        return (1 - x + x * x / 3 if x <= 1 else 1 / (3 * x)) / batch_size

    def decide(self, batch_size: int, comparisons: Sequence[Comparison]) -> Decision:
        """As in `VarianceTest`, with the factor of a finite data set."""
        n = self.dataset_size
        if n is None:
            return super().decide(batch_size, comparisons)
        needed = max(comparison.needed() for comparison in comparisons)
        ratio = needed * self._variance_of_mean(batch_size)
        if ratio <= 1:
            return Decision(True, batch_size, ratio)
        if needed == math.inf:
            return Decision(False, UNBOUNDED, ratio)
        # With u = n/needed: 1/x − 1 + x/3 = u for x ≤ 1, 1/(3x²) = u beyond.
        u = n / needed
        x = 2 / (1 + u + math.sqrt((1 + u) ** 2 - 4 / 3)) if 3 * u >= 1 else (3 * u) ** -0.5
        return Decision(False, max(ceil(n * x * (1 - 1e-12)), batch_size + 1), ratio)


def ceil(value: float) -> int:
    """⌈value⌉, at most UNBOUNDED."""
    return math.ceil(value) if value < UNBOUNDED else UNBOUNDED


def check_positive(test: object, **values: float) -> None:
    """Raises ValueError for a value that is not a positive finite number."""
    for name, value in values.items():
        if not (value > 0 and math.isfinite(value)):
            raise ValueError(
                f"{type(test).__name__}: {name} must be a positive number, got {value!r}"
            )
