"""Averaged: a test on exponential averages of its two sides."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..statistics import GradientStatistics
from .base import Comparison, Decision, Quantity, VarianceTest

_Sides = list[tuple[Quantity, Quantity]]


class Averaged:
    """A test whose noise (numerator) and signal (denominator) are averaged over the steps.

        x̄ ← decay · x̄ + (1 − decay) · x   for each of the two, then the test on the averages

    Ratios of averages, not averages of ratios, which would be biased. `evaluate` includes its
    statistics in the averages without storing them; `record`, which the optimizers call once a
    tested step, stores them. For coordinate-wise tests the averages are as large as twice the
    model.

    Args:
        criterion: a test of this package.
        decay: in [0, 1); 0.9 averages over about 10 tests.

    Raises:
        TypeError: something else than a test of this package.
        ValueError: decay out of range.

    Example:
        >>> quiet = GradientStatistics(batch_size=4, sum_norms_sq=8.0, mean_norm_sq=2.0)
        >>> noisy = GradientStatistics(batch_size=4, sum_norms_sq=40.0, mean_norm_sq=1.0)
        >>> test = Averaged(NormTest(eta=1.0), decay=0.9)
        >>> test.record(quiet)
        >>> test.evaluate(noisy).ratio  # (0.09 · 0 + 0.1 · 12) / 4 over 0.09 · 2 + 0.1 · 1
        1.0714285714285716
    """

    def __init__(self, criterion: VarianceTest, decay: float = 0.9) -> None:
        if not isinstance(criterion, VarianceTest):
            raise TypeError(
                f"Averaged: expected a test of this package, got {type(criterion).__name__}"
            )
        if not 0 <= decay < 1:
            raise ValueError(f"Averaged: decay must lie in [0, 1), got {decay!r}")
        self.criterion = criterion
        self.decay = decay
        self._averages: _Sides | None = None

    def __repr__(self) -> str:
        return f"Averaged({self.criterion!r}, decay={self.decay})"

    @property
    def needs(self) -> frozenset[str]:
        """What the inner test needs."""
        return self.criterion.needs

    def evaluate(self, statistics: GradientStatistics) -> Decision:
        """The inner test's decision on the averages, with these statistics in them."""
        n = statistics.batch_size
        if reason := self.criterion.undecidable(statistics):
            return Decision(True, n, math.nan, reason)
        comparisons = self.criterion.compare(statistics)
        sides = self._with(comparisons)
        averaged = [
            replace(comparison, noise=noise, signal=signal)
            for comparison, (noise, signal) in zip(comparisons, sides, strict=True)
        ]
        return self.criterion.decide(n, averaged)

    def record(self, statistics: GradientStatistics) -> None:
        """Takes the statistics of a step into the averages, unless they allow no decision."""
        if not self.criterion.undecidable(statistics):
            self._averages = self._with(self.criterion.compare(statistics))

    def _with(self, comparisons: Sequence[Comparison]) -> _Sides:
        """The averages including these. Both sides start from 0: their ratio is right at once."""
        new = [(c.noise, c.signal) for c in comparisons]
        old = self._averages or [(0.0, 0.0)] * len(new)
        return [
            (self._mix(old_noise, noise), self._mix(old_signal, signal))
            for (old_noise, old_signal), (noise, signal) in zip(old, new, strict=True)
        ]

    def _mix(self, old: Quantity, new: Quantity) -> Quantity:
        if isinstance(new, dict):
            past = old if isinstance(old, dict) else {}
            return {name: self._average(past.get(name, 0.0), value) for name, value in new.items()}
        return self._average(old, new)

    def _average(self, old: Any, new: Any) -> Any:
        return self.decay * old + (1 - self.decay) * new

    def reserve(self, parameters: Mapping[str, Tensor]) -> None:
        """Makes the averages of a coordinate-wise test, zeros for parameters that have none.

        They count as none, but `torch.distributed.checkpoint` only fills tensors that are there:
        the optimizers call it before they give their state.

        Args:
            parameters: those that are measured, by name; averages are laid out like them.
        """
        known = self._averages and self._averages[0][0]
        if "coordinates" not in self.needs or isinstance(known, float):
            return
        if isinstance(known, dict) and parameters.keys() <= known.keys():
            return
        zeros = {name: torch.zeros_like(p, dtype=torch.float64) for name, p in parameters.items()}
        nothing = GradientStatistics(
            2, 0.0, 0.0, coordinate_mean=zeros, coordinate_variance=zeros, accumulators=zeros
        )
        sides = [(c.noise, c.signal) for c in self.criterion.compare(nothing)]
        if not any(isinstance(noise, dict) for noise, _ in sides):
            return
        averages = self._averages or [(0.0, 0.0)] * len(sides)
        self._averages = [
            (_filled(old[0], new[0]), _filled(old[1], new[1]))
            for old, new in zip(averages, sides, strict=True)
        ]

    @property
    def _averaged(self) -> str:
        """Which quantities these are averages of."""
        options = {
            name: getattr(self.criterion, name, None)
            for name in ("aggregate", "debiased", "dataset_size")
        }
        given = [f"{name}={value!r}" for name, value in options.items() if value]
        return f"{type(self.criterion).__name__}({', '.join(given)})"

    def state_dict(self) -> dict[str, Any]:
        """The averages, and what they are of: None, pairs of numbers, or pairs of dictionaries."""
        averages = self._averages and [
            {"noise": noise, "signal": signal} if isinstance(noise, dict) else (noise, signal)
            for noise, signal in self._averages
        ]
        return {"of": self._averaged, "averages": averages}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores `state_dict()`.

        Raises:
            ValueError: these are averages of other quantities.
        """
        averages = state["averages"]
        of = state.get("of", self._averaged)
        if averages is not None and of != self._averaged:
            raise ValueError(
                f"the saved averages are those of {of}, not of {self._averaged}: load "
                "them into the same criterion (its bound may differ)"
            )
        if averages is not None:
            averages = [
                (side["noise"], side["signal"]) if isinstance(side, dict) else tuple(side)
                for side in averages
            ]
        self._averages = averages


def _filled(old: Quantity, new: Quantity) -> Quantity:
    """The old averages, and what new has beyond."""
    if not isinstance(new, dict):
        return old
    return {**new, **(old if isinstance(old, dict) else {})}
