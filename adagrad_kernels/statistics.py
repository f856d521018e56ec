"""What one step measured: `GradientStatistics`, pooled over micro-batches (and ranks)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from .reductions import CoordinateReductions

VANISHING = 1e-32
"""Least mean of the samples' ‖c_i‖² that float32 measures: below 1.2e-38 squares lose digits."""


def _scalar(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64)


class LazyCoordinates(Mapping[str, Tensor]):
    """A tensor for each parameter by name, computed when the first one is asked for.

    Args:
        gradients: what they are computed from, by name.
        compute: computes them.
    """

    def __init__(
        self, gradients: Mapping[str, Tensor], compute: Callable[[], dict[str, Tensor]]
    ) -> None:
        self._gradients = dict(gradients)
        self._versions = [grad._version for grad in gradients.values()]
        self._compute: Callable[[], dict[str, Tensor]] | None = compute
        self._values: dict[str, Tensor] = {}

    def keep(self) -> None:
        """Computes them now, before the gradients that they come from are written to."""
        versions = [grad._version for grad in self._gradients.values()]
        if self._compute is not None and versions == self._versions:
            self._values = self._compute()
            self._compute = None

    def __getitem__(self, name: str) -> Tensor:
        self.keep()
        if self._compute is not None:
            raise RuntimeError(
                "the gradients have been written to since the step, and means and variances of "
                "the coordinates with them: read these, or call keep_coordinates() of the "
                "statistics, before; zero_grad() of the optimizer does so"
            )
        return self._values[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._gradients)

    def __len__(self) -> int:
        return len(self._gradients)

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickles as a dictionary."""
        return dict, (dict(self),)


@dataclass(frozen=True, eq=False)
class GradientStatistics:
    """Statistics of the per-sample gradients g_i of one step with N samples.

    g_i = N·c_i, where c_i is what sample i added to the gradient, so that their mean ḡ is the
    gradient itself. Every sample must have the same weight in the loss. Units: those of the
    gradient (squared where a square is named).

    The sums over samples were pooled and read from the device once, when the object was made;
    the properties are computed from them, 0-dim float64 tensors unless another type is named, and
    none synchronises but `inner_variance`.

    Attributes:
        batch_size: N, over all micro-batches and ranks.
        sum_norms_sq: Σ_i ‖g_i‖², a Python number.
        mean_norm_sq: ‖ḡ‖², a Python number.
        contribution_norms_sq: ‖c_i‖² in the order of the samples on this rank, [N] on one rank.
        gradient_scale: factor that the optimizer applies to the accumulated gradient (1/M after
            M micro-batches with mean losses); the other figures include it.
        coordinate_mean: ḡ_j for each parameter by name, or None if not asked for; `DTensor`s laid
            out like the parameters, where these are sharded.
        coordinate_variance: var_j likewise.
        coordinate_reductions: what the update's kernel has computed of them, or None.
        inner_products: ⟨g_i, ḡ⟩ of the samples of the last micro-batch, or of all that were asked
            for (of all ranks, one after another), [m], or None if not asked for.
        accumulators: AdaGrad's v_j by parameter name, this step's gradient included, where the
            criterion asked an optimizer of this package for them.
        eps: what AdaGrad adds to √v_j, by parameter name, likewise.
        loss: mean loss of the samples, where the optimizer's step was given it.
        lr: learning rate of the step (of the first parameter group), where an optimizer took it.
        workers: J, where the variance was measured between the mean gradients of J parts of the
            batch (`WorkerNormTest`), otherwise 0.
        subset: names of the parameters that g_i and ḡ consist of, where `observe` was given
            layers; None for all.

    Example:
        >>> s = GradientStatistics(batch_size=4, sum_norms_sq=40.0, mean_norm_sq=4.0)
        >>> s.variance, s.noise_scale.item()  # (40 - 4·4)/3,  8/(4 - 8/4)
        (8.0, 4.0)
    """

    batch_size: int
    sum_norms_sq: float
    mean_norm_sq: float
    contribution_norms_sq: Tensor | None = field(default=None, repr=False)
    gradient_scale: float = 1.0
    coordinate_mean: Mapping[str, Tensor] | None = field(default=None, repr=False)
    coordinate_variance: Mapping[str, Tensor] | None = field(default=None, repr=False)
    coordinate_reductions: CoordinateReductions | None = None
    inner_products: Tensor | None = field(default=None, repr=False)
    accumulators: dict[str, Tensor] | None = field(default=None, repr=False)
    eps: dict[str, float] | None = field(default=None, repr=False)
    loss: float | None = None
    lr: float | None = None
    workers: int = 0
    subset: tuple[str, ...] | None = None

    @classmethod
    def between_workers(
        cls,
        workers: int,
        samples: int,
        sum_norms_sq: float,
        mean_norm_sq: float,
        gradient_scale: float = 1.0,
    ) -> GradientStatistics:
        """Statistics whose variance is that between the mean gradients g_j of J workers.

            tr Σ̂ = N/J · (Σ_j‖g_j‖² − J‖ḡ‖²)/(J − 1),  NaN for J = 1

        Args:
            workers: J, parts of the batch with N/J samples each.
            samples: N.
            sum_norms_sq: Σ_j ‖g_j‖².
            mean_norm_sq: ‖ḡ‖².
            gradient_scale: see the class.
        """
        variance = math.nan
        if workers > 1:
            between = (sum_norms_sq - workers * mean_norm_sq) / (workers - 1)
            variance = samples / workers * (max(between, 0.0) if between < math.inf else between)
        return cls(
            batch_size=samples,
            sum_norms_sq=(samples - 1) * variance + samples * mean_norm_sq,
            mean_norm_sq=mean_norm_sq,
            gradient_scale=gradient_scale,
            workers=workers,
        )

    def keep_coordinates(self) -> None:
        """Makes means and variances independent of the gradients, if they are not yet."""
        for coordinates in (self.coordinate_mean, self.coordinate_variance):
            if isinstance(coordinates, LazyCoordinates):
                coordinates.keep()

    @property
    def variance(self) -> float:
        """tr Σ̂ as a Python number: (Σ‖g_i‖² − N‖ḡ‖²)/(N−1), at least 0; NaN for N = 1."""
        n = self.batch_size
        if n < 2:
            return math.nan
        value = (self.sum_norms_sq - n * self.mean_norm_sq) / (n - 1)
        return max(value, 0.0) if math.isfinite(value) else value

    @property
    def finite(self) -> bool:
        """Whether all sums are finite."""
        return math.isfinite(self.sum_norms_sq) and math.isfinite(self.mean_norm_sq)

    @property
    def vanishing(self) -> bool:
        """Whether the samples' gradients are so small that their squares are lost in float32."""
        norms, factor = self.contribution_norms_sq, self.batch_size * self.gradient_scale
        if norms is None or norms.dtype == torch.float64 or factor == 0:
            return False
        mean = self.sum_norms_sq / factor / factor / self.batch_size  # of ‖c_i‖²
        return mean < VANISHING and max(self.sum_norms_sq, self.mean_norm_sq) > 0

    @property
    def grad_norm_sq(self) -> Tensor:
        """‖ḡ‖², the squared norm of the mean gradient over all observed parameters."""
        return _scalar(self.mean_norm_sq)

    @property
    def variance_trace(self) -> Tensor:
        """tr Σ̂, the sum of the coordinates' sample variances (1/(N−1)); NaN for N = 1."""
        return _scalar(self.variance)

    @property
    def variance_standard_error(self) -> Tensor:
        """The standard error of tr Σ̂: what another draw of N samples would change in it.

            √(Var(d)/N),   d_i = ‖g_i − ḡ‖² = ‖g_i‖² − 2⟨g_i, ḡ⟩ + ‖ḡ‖²

        from the spread (1/(N−1)) over the samples, to first order in 1/N. Without the inner
        products of all samples d_i = ‖g_i‖² is taken: the same while the noise of a sample is much
        larger than the gradient, and an upper bound in expectation for noise that is symmetric. On
        several ranks without inner products from the samples of this rank, so that ranks differ:
        for reading, not for decisions. NaN for N = 1.
        """
        n, d = self.batch_size, self.sample_norms_sq.double()
        if self.inner_products is not None and len(self.inner_products) == len(d) == n:
            d = d - 2 * self.inner_products.double()
        if len(d) < 2:
            return torch.full_like(d.sum(), math.nan)
        return (d.var() / n).sqrt()

    @property
    def sample_norms_sq(self) -> Tensor:
        """‖g_i‖² in the order of the samples on this rank, [N] on one rank."""
        if self.contribution_norms_sq is None:
            raise RuntimeError("these statistics were made from sums alone, without samples")
        return self.contribution_norms_sq * (self.batch_size * self.gradient_scale) ** 2

    @property
    def noise_scale(self) -> Tensor:
        """The gradient noise scale tr Σ̂ / (‖ḡ‖² − tr Σ̂/N), with the debiased ‖∇F‖² below.

        Infinite where the debiased square is not positive: the batch shows noise alone
        (McCandlish et al. 2018).
        """
        variance, n = self.variance, self.batch_size
        signal = self.mean_norm_sq - variance / n
        if signal > 0 or math.isnan(signal):
            return _scalar(variance / signal)
        return _scalar(math.inf if variance > 0 else math.nan)

    @cached_property
    def inner_variance(self) -> float | None:
        """`inner_product_variance` as a Python number, which is read from the device once."""
        variance = self.inner_product_variance
        return None if variance is None else float(variance)

    @property
    def inner_product_variance(self) -> Tensor | None:
        """Var(⟨g_i, ḡ⟩) with 1/(N−1), or None without inner products."""
        return None if self.inner_products is None else self.inner_products.double().var()
