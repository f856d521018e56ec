"""Training on problems whose gradient and noise are known exactly.

Two functions of d coordinates, both with Lipschitz constant L = 1 of the gradient:

    F(w) = ½ Σ_j φ(√λ_j w_j),   φ(u) = u²  or, not convex,  φ(u) = u²/(1 + u²)

with curvatures λ_j spread evenly over several decades: gradient descent then *attains* the rate
1/K of the theorem, where on fewer decades it would soon be faster. A sample is a function of its
own, with standard normal ζ and ξ,

    f(w; ζ, ξ) = (1 + ρζ) F(w) + σ⟨ξ, w⟩,   E f = F,   Σ = ρ² ∇F ∇Fᵀ + σ² I

so that the noise grows with the gradient but does not vanish where the gradient does. Since ∇F
and Σ are known, so is whether a test of the samples' own statistics has kept its promise.

The training is the library's: a linear layer holds w, the loader serves samples, the optimizer
observes, tests and steps.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from ..criteria import CoordinateNormTest, NormTest
from ..data import AdaptiveDataLoader
from ..optim import AdAdaGrad, AdAdaGradNorm

FIRST = 10
"""Slopes are fitted from this step on."""

Numbers = np.ndarray[Any, np.dtype[np.float64]]


@dataclass(frozen=True)
class Problem:
    """F and the noise of its samples.

    Args:
        convex: which φ.
        coordinates: d.
        decades: λ_j runs from 1 down to 10^-decades.
        gradient_noise: ρ.
        noise: σ.
    """

    convex: bool
    coordinates: int = 16
    decades: float = 4.0
    gradient_noise: float = 0.5
    noise: float = 0.3

    @property
    def roots(self) -> Tensor:
        """√λ_j."""
        exponents = torch.linspace(0, -self.decades / 2, self.coordinates, dtype=torch.float64)
        return 10**exponents

    def start(self) -> Tensor:
        """w with √λ_j w_j = 1 for all j; there the second φ curves downwards."""
        return 1 / self.roots

    def value(self, w: Tensor) -> Tensor:
        """F of each row."""
        squares = (self.roots * w).square()
        return 0.5 * (squares if self.convex else squares / (1 + squares)).sum(-1)

    def gradient(self, w: Tensor) -> Tensor:
        """∇F of each row."""
        u = self.roots * w
        return self.roots * (u if self.convex else u / (1 + u.square()).square())

    def variance(self, w: Tensor) -> Tensor:
        """The diagonal of Σ."""
        return self.gradient_noise**2 * self.gradient(w).square() + self.noise**2

    def losses(self, w: Tensor, sample: Tensor) -> Tensor:
        """f of each row of w, with the sample (ζ, ξ) in the same row."""
        common, own = sample[:, 0], sample[:, 1:]
        return (1 + self.gradient_noise * common) * self.value(w) + self.noise * (own * w).sum(1)


@dataclass(frozen=True)
class Setting:
    """One training run.

    Args:
        problem: what is minimised.
        optimizer: "adadagradnorm" with the norm test, or "adadagrad" with the coordinate test.
        adaptive: whether the batch may grow.
        lr: learning rate.
        batch_size: the first batch, or all of them.
        eta: η of the test.
        steps: K.
        samples: the run also ends after the step that has used up so many samples.
        seed: of the samples.
    """

    problem: Problem
    optimizer: str = "adadagradnorm"
    adaptive: bool = True
    lr: float = 2.0
    batch_size: int = 16
    eta: float = 0.5
    steps: int = 300
    samples: int = 4_000_000
    seed: int = 0

    def build(self, model: nn.Module) -> AdAdaGradNorm | AdAdaGrad:
        """The optimizer. A single unlucky batch may double the batch size, not raise it to the cap.

        The norm test is debiased, so that it comes to rest where the exact test holds.
        """
        cap = self.samples if self.adaptive else self.batch_size
        options: dict[str, Any] = {
            "lr": self.lr,
            "batch_size": self.batch_size,
            "max_batch_size": cap,
            "growth_limit": 2.0,
        }
        if self.optimizer == "adadagradnorm":
            return AdAdaGradNorm(model, criterion=NormTest(self.eta, debiased=True), **options)
        return AdAdaGrad(model, criterion=CoordinateNormTest(self.eta), **options)


@dataclass(frozen=True)
class Descent:
    """What happened in a run, one entry a step.

    Attributes:
        grad_norm_sq: ‖∇F‖², the true one, at the point where the step begins.
        batch_size: samples of the step.
        ratio: left side over right side of the exact test, with the true ∇F and Σ; it holds
            up to 1.
    """

    grad_norm_sq: Numbers
    batch_size: Numbers
    ratio: Numbers

    @property
    def least(self) -> Numbers:
        """min_{k≤K} ‖∇F‖² for K = 1, 2, …"""
        return np.minimum.accumulate(self.grad_norm_sq)

    @property
    def held(self) -> float:
        """The share of the steps at which the exact test held."""
        return float((self.ratio <= 1).mean())

    @property
    def held_from(self) -> int:
        """The step from which on it held at every step; one past the end if not at the last."""
        return 1 + max((int(k) + 1 for k in np.flatnonzero(self.ratio > 1)), default=0)

    def slope(self, first: int = FIRST) -> float:
        """The exponent s of min_{k≤K} ‖∇F‖² ∝ K^s, fitted from K = first to the end."""
        k = np.unique(np.geomspace(first, len(self.least), 50).astype(int))
        return float(np.polyfit(np.log(k), np.log(self.least[k - 1]), 1)[0])


class _Samples(Dataset[Tensor]):
    """Independent standard normal (ζ, ξ), new ones at every call: no batch holds any twice."""

    def __init__(self, coordinates: int, length: int, seed: int) -> None:
        self._width = 1 + coordinates
        self._length = length
        self._generator = torch.Generator().manual_seed(seed)

    def __len__(self) -> int:
        return self._length

    def __getitems__(self, indices: Sequence[int]) -> Tensor:
        shape = len(indices), self._width
        return torch.randn(shape, dtype=torch.float64, generator=self._generator)


def descend(
    setting: Setting, watch: Callable[[AdAdaGradNorm | AdAdaGrad], None] | None = None
) -> Descent:
    """Trains.

    Args:
        setting: what and how.
        watch: called with the optimizer after each of its steps.
    """
    problem = setting.problem
    # For the input 1 a linear layer returns its weight: each sample has w as its own row.
    model = nn.Linear(1, problem.coordinates, bias=False, dtype=torch.float64)
    w = model.weight.detach().squeeze(1)
    w.copy_(problem.start())
    opt = setting.build(model)
    samples = _Samples(problem.coordinates, setting.samples, setting.seed)
    loader = AdaptiveDataLoader(
        samples, opt, max_micro_batch_size=4096, shuffle=False, collate_fn=lambda drawn: drawn
    )
    steps: list[tuple[float, float, float]] = []
    gradient, variance, size = problem.gradient(w), problem.variance(w), opt.batch_size
    for sample in itertools.chain.from_iterable(itertools.repeat(loader)):
        rows = model(sample.new_ones(len(sample), 1))
        problem.losses(rows, sample).mean().backward()
        opt.step()
        opt.zero_grad()
        if not opt.updated:
            continue
        steps.append((float(gradient @ gradient), size, _ratio(setting, gradient, variance, size)))
        if watch is not None:
            watch(opt)
        if len(steps) == setting.steps or opt.samples >= setting.samples:
            break
        gradient, variance, size = problem.gradient(w), problem.variance(w), opt.batch_size
    return Descent(*np.array(steps).T)


def _ratio(setting: Setting, gradient: Tensor, variance: Tensor, size: int) -> float:
    """Of the exact test: var/b over η² (∂F)², in the norm or the worst of the coordinates."""
    noise, signal = variance, gradient.square()
    if setting.optimizer == "adadagradnorm":
        noise, signal = noise.sum(), signal.sum()
    return float((noise / signal).max()) / (size * setting.eta**2)
