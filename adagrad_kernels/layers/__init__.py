"""The registry: which layer classes can be observed, and their observed classes."""

from __future__ import annotations

from functools import cache

from torch import nn

from .base import ObservedLayer
from .conv import ObservedConv2d
from .linear import ObservedLinear

OBSERVED: dict[type[nn.Module], type[ObservedLayer]] = {
    nn.Linear: ObservedLinear,
    nn.Conv2d: ObservedConv2d,
}
"""Plain class to observed class. A subclass that keeps the plain `forward` is supported too."""

# What forward() itself relies on: a subclass that overrides one of these computes something else.
_METHODS = ("forward", "_conv_forward")


@cache
def observed_class(plain: type[nn.Module]) -> type[ObservedLayer] | None:
    """The observed class for instances of `plain`, or None if it is not supported."""
    for known, observed in OBSERVED.items():
        if plain is known:
            return observed
        if issubclass(plain, known) and all(
            getattr(plain, method, None) is getattr(known, method, None) for method in _METHODS
        ):
            return type(f"Observed{plain.__name__}", (observed, plain), {})
    return None


__all__ = ["OBSERVED", "ObservedConv2d", "ObservedLayer", "ObservedLinear", "observed_class"]
