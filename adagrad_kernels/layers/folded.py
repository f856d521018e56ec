"""Folded layers: dimension 0 of their inputs holds several rows of each sample.

Video frames in a network for images, windows of an image, the choices of a question: models fold
them into dimension 0, `x.flatten(0, 1)` of [b, k, …]. A layer in such a part sees b·k rows, and
measures [b, k, …] once it knows b: that is dimension 0 of the model's first argument, which
`CountedModel` (or `ObservedModule`) notes while the model's forward pass runs. Checkpoints run a
layer again in the backward pass: then b is that of the calls that took part in it so far, or of the
forward passes that it can belong to.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ..faults import layer_name
from .base import ObservedLayer


class CountedModel(ObservedLayer, nn.Module):
    """A model that has folded layers in it: notes how many samples it is given."""

    observed_method = ""
    observed_parameters = ()

    def observed_forward(self, *args: Any, **kwargs: Any) -> Any:
        """The plain model's forward pass."""
        forward = functools.partial(self.plain_class.forward, self)
        return run_counted(self, forward, args, kwargs)


def run_counted(
    layer: ObservedLayer,
    forward: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    """A model's forward pass, during which its observer knows the number of samples.

    Raises:
        ValueError: no argument tells it.
    """
    observer = layer._observer
    if observer.samples is not None or not torch.is_grad_enabled():  # the model calls itself
        return forward(*args, **kwargs)
    samples = samples_of(args, kwargs)
    if samples is None:
        raise ValueError(
            f"layer {layer_name(layer.observed_name)} has folded layers in it, but is given no "
            "tensor whose dimension 0 counts the samples (positions do not count): give it one"
        )
    observer.begin_samples(samples)
    try:
        return forward(*args, **kwargs)
    finally:
        observer.samples = None


@functools.cache
def counted_class(plain: type[nn.Module]) -> type[CountedModel]:
    """The observed class of any model class; under its name, with its forward's signature."""

    @functools.wraps(plain.forward)
    def forward(self: CountedModel, *args: Any, **kwargs: Any) -> Any:
        if "_observer" not in self.__dict__:  # made by code of its own, as a slice of a Sequential
            return plain.forward(self, *args, **kwargs)
        return self.observed_forward(*args, **kwargs)

    names = {"forward": forward, "__module__": plain.__module__, "__doc__": plain.__doc__}
    return type(plain.__name__, (CountedModel, plain), names)


def samples_of(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> int | None:
    """How many samples a module is given: dimension 0 of its first argument, but for positions."""
    named = [value for key, value in kwargs.items() if not _is_of_positions(key)]
    for t in tree_leaves((args, named)):
        if isinstance(t, Tensor) and t.dim():
            return t.shape[0]
    return None


def _is_of_positions(name: str) -> bool:
    return any(part.startswith("position") for part in name.split("_"))
