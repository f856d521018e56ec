"""What the integrations share."""

from __future__ import annotations

import math
from typing import Any, TypeAlias

from ..data import AdaptiveDataLoader
from ..optim.adaptive_batch import AdaptiveBatch
from ..optim.base import AdaptiveAdagrad

AdaptiveOptimizer: TypeAlias = AdaptiveAdagrad | AdaptiveBatch


def adaptive_optimizer(optimizer: Any) -> AdaptiveOptimizer:
    """The optimizer of this package inside a library's wrappers.

    Raises:
        TypeError: there is none.
    """
    inner = optimizer
    while not isinstance(inner, AdaptiveOptimizer) and hasattr(inner, "optimizer"):
        inner = inner.optimizer
    if not isinstance(inner, AdaptiveOptimizer):
        raise TypeError(
            "expected an optimizer of adagrad_kernels (AdAdaGrad, AdAdaGradNorm, or AdaptiveBatch "
            f"around any other), got {type(optimizer).__name__}"
        )
    return inner


def take_over_clipping(optimizer: AdaptiveOptimizer, value: float | None, setting: str) -> None:
    """Makes the optimizer clip to `value`, which the library would have done by itself.

    Clipping belongs into the update: the tests need the gradient as it was.

    Args:
        optimizer: clips from now on, inside its update.
        value: largest norm of the mean gradient; None or 0 for no clipping.
        setting: what the library calls it, for the error.

    Raises:
        ValueError: the optimizer clips already to another norm, or cannot clip.
    """
    if not value:
        return
    if getattr(optimizer, "_in_backward", None) is not None:
        raise ValueError(
            f'{setting}={value} is incompatible with update="in_backward": turn one of them off'
        )
    if optimizer.max_grad_norm not in (None, value):
        raise ValueError(
            f"{setting}={value}, but the optimizer was given max_grad_norm="
            f"{optimizer.max_grad_norm}: give one of them, or the same to both"
        )
    optimizer.max_grad_norm = value


def check_loader(loader: Any, optimizer: AdaptiveOptimizer, setting: str) -> AdaptiveDataLoader:
    """The loader, if it is one of this package and follows this optimizer.

    Args:
        loader: what the library trains on.
        optimizer: says how large the batches are.
        setting: where the loader came from, for the error.

    Raises:
        TypeError: another kind of loader.
        ValueError: it follows another optimizer.
    """
    if not isinstance(loader, AdaptiveDataLoader):
        raise TypeError(
            f"{setting} must be an adagrad_kernels.AdaptiveDataLoader, whose batches grow, got "
            f"{type(loader).__name__}"
        )
    if loader.controller is not optimizer.controller:
        raise ValueError(f"{setting} follows another optimizer than the one that is trained with")
    return loader


def scalars(optimizer: AdaptiveOptimizer) -> dict[str, float]:
    """What is worth a curve: the next batch size, samples so far, noise scale if it is finite."""
    found = {"batch_size": float(optimizer.batch_size), "samples": float(optimizer.samples)}
    if optimizer.statistics is not None:
        noise_scale = float(optimizer.statistics.noise_scale)
        if math.isfinite(noise_scale):
            found["noise_scale"] = noise_scale
    return found
