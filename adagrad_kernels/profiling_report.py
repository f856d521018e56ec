"""What `profiling` has found, and how it prints."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .costs import Cost
from .coverage import Coverage, percent

QUICK = 1e-3
"""Seconds of a layer below which some tens of microseconds more are a matter of percents."""
NOISE = 0.1
"""How far the measured overhead of a layer must exceed the estimated one to be spoken of."""
FIXED = """\
Where a layer takes less than about a millisecond, measured is more than estimated: beside its work
each call of an observed layer has a fixed cost, some tens of microseconds of Python."""


@dataclass(frozen=True)
class LayerProfile:
    """One layer's forward and backward pass, by itself, without and with observation.

    Attributes:
        name: the layer's name in the model.
        layer: its class.
        cost: the estimate, see `adagrad_kernels.costs`; None for modules measured by vmap.
        plain: seconds without, the median.
        observed: seconds with.
    """

    name: str
    layer: str
    cost: Cost | None
    plain: float
    observed: float

    @property
    def overhead(self) -> float:
        """observed / plain − 1."""
        return self.observed / self.plain - 1

    @property
    def fixed(self) -> bool:
        """Whether a fixed overhead shows: a quick layer that costs more than estimated."""
        if self.cost is None or self.plain > QUICK:
            return False
        return self.overhead > max(self.cost.flops_ratio, self.cost.bytes_ratio) + NOISE


@dataclass(frozen=True)
class StepProfile:
    """A whole training step: forward, loss, backward, update, test.

    Attributes:
        name: what the step does.
        plain: seconds of the plain step, the median; the same for all steps of a profile.
        seconds: of this step.
        ratios: this step's seconds over the plain one's, of each turn.
    """

    name: str
    plain: float
    seconds: float
    ratios: tuple[float, ...]

    @property
    def quartiles(self) -> tuple[float, float, float]:
        """Of the ratios: a quarter of the turns lies below the first, half below the second."""
        low, middle, high = np.quantile(self.ratios, (0.25, 0.5, 0.75))
        return float(low), float(middle), float(high)

    @property
    def ratio(self) -> float:
        """The median of the ratios."""
        return self.quartiles[1]


@dataclass(frozen=True)
class Profile:
    """What `profile` found; prints as tables.

    Attributes:
        coverage: how each parameter is measured, with the estimated costs.
        layers: measured by themselves, in the model's order.
        steps: whole steps.
        baseline: the plain optimizer of the steps.
    """

    coverage: Coverage
    layers: list[LayerProfile]
    steps: list[StepProfile]
    baseline: str

    def __str__(self) -> str:
        """Coverage, layers, steps."""
        lines = [str(self.coverage), ""]
        width = max(len(name) for name in ["layer", *(p.name or p.layer for p in self.layers)])
        kind = max(len(p.layer) for p in self.layers)
        lines.append(
            f"{'layer':{width}}  {'':{kind}}  {'estimated':>22}  {'measured':>9}  "
            f"{'plain ms':>9}  {'observed ms':>11}"
        )
        for p in self.layers:
            estimate = "unknown"
            if p.cost is not None:
                estimate = f"{percent(p.cost.flops_ratio)}, bytes {percent(p.cost.bytes_ratio)}"
            lines.append(
                f"{p.name or p.layer:{width}}  {p.layer:{kind}}  {estimate:>22}  "
                f"{p.overhead:>+9.1%}  {p.plain * 1e3:9.3f}  {p.observed * 1e3:11.3f}"
            )
        if any(p.fixed for p in self.layers):
            lines.append(FIXED)
        width = max(len(step.name) for step in self.steps)
        plain = self.steps[0].plain * 1e3
        lines += [
            "",
            f"whole step, as a ratio to {plain:.3f} ms of the plain one ({self.baseline})",
        ]
        lines.append(f"{'':{width}}  {'ratio':>5}  {'quartiles':>12}  {'ms':>9}")
        for step in self.steps:
            low, middle, high = step.quartiles
            spread = f"{low:.2f} to {high:.2f}"
            lines.append(
                f"{step.name:{width}}  {middle:5.2f}  {spread:>12}  {step.seconds * 1e3:9.3f}"
            )
        return "\n".join(lines)
