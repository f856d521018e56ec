"""Learning rate policies: the factor on the learning rate when the batch has grown."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from .statistics import GradientStatistics

_FACTORS: dict[str, Callable[[float, float], float]] = {
    "sqrt": lambda growth, gain: math.sqrt(growth),
    "linear": lambda growth, gain: growth,
    "adascale": lambda growth, gain: gain,
    "adascale_sqrt": lambda growth, gain: math.sqrt(gain),
}
NAMES = tuple(_FACTORS)


class LRPolicy:
    """The factor on the learning rate for a batch S = b/b₀ times as large as the first.

    - None: 1, as in the papers of AdAdaGrad;
    - "sqrt": √S, for adaptive optimizers;
    - "linear": S, for SGD;
    - "adascale": the gain r = (σ² + μ²)/(σ²/S + μ²), between 1 and S, with
      σ² = tr Σ̂/b₀ the variance of the first batch size's gradient and μ² the debiased ‖∇F‖²;
      for SGD;
    - "adascale_sqrt": √r, for adaptive optimizers.

    σ² and μ² are averaged over the tested steps, each by itself, with the weight
    max(1 − S/1000, 0) for the past. Until then r is 1.

    Source:
        Johnson, Agrawal, Gu, Guestrin 2020, "AdaScale SGD".

    Raises:
        ValueError: an unknown name.
    """

    def __init__(self, name: str | None) -> None:
        if name is not None and name not in _FACTORS:
            raise ValueError(f"lr_policy must be None or one of {', '.join(NAMES)}, got {name!r}")
        self.name = name
        self._averages: tuple[float, float] | None = None  # σ², μ²

    def record(self, statistics: GradientStatistics, initial_batch_size: int) -> None:
        """Takes up the statistics of a tested step."""
        n, variance = statistics.batch_size, statistics.variance
        if n < 2 or not statistics.finite:
            return
        new = variance / initial_batch_size, statistics.mean_norm_sq - variance / n
        past = max(1 - n / initial_batch_size / 1000, 0.0)
        old = self._averages or new
        self._averages = (
            past * old[0] + (1 - past) * new[0],
            past * old[1] + (1 - past) * new[1],
        )

    def factor(self, growth: float) -> float:
        """The factor for a batch `growth` times the first."""
        if self.name is None:
            return 1.0
        return _FACTORS[self.name](growth, self._gain(growth))

    def _gain(self, growth: float) -> float:
        if self._averages is None:
            return 1.0
        noise, signal = self._averages[0], max(self._averages[1], 0.0)
        total = noise / growth + signal
        return (noise + signal) / total if total > 0 else 1.0

    def state_dict(self) -> dict[str, Any]:
        """The averages."""
        return {"averages": self._averages}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores `state_dict()`."""
        averages = state["averages"]
        self._averages = (averages[0], averages[1]) if averages is not None else None
