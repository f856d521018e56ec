"""`torch.nn.Linear`, observed: inputs [b, …, I]."""

from __future__ import annotations

from torch import Tensor, nn

from .. import functional
from .base import ObservedLayer


class ObservedLinear(ObservedLayer, nn.Linear):
    """A linear layer that measures; dimension 0 of its input counts the samples."""

    observed_method = "outer product (one position a sample), direct (more)"

    def forward(self, input: Tensor) -> Tensor:
        """y = x Wᵀ + bias."""
        if not self.measures():
            return super().forward(input)
        return functional.linear(input, self.weight, self.bias, *self.probes(input))
