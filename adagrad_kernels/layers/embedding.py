"""`torch.nn.Embedding`, observed: indices [b, T, …]."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import functional
from .base import ObservedLayer


class ObservedEmbedding(ObservedLayer, nn.Embedding):
    """An embedding that measures; dimension 0 of its indices counts the samples."""

    observed_parameters = ("weight",)
    observed_method = "sorted tokens"

    @classmethod
    def refusal(cls, module: nn.Module) -> str:
        """See `ObservedLayer`."""
        assert isinstance(module, nn.Embedding)
        if module.sparse:
            return "sparse=True: its gradient is sparse; build it with sparse=False"
        if module.scale_grad_by_freq:
            return (
                "scale_grad_by_freq=True: it divides by counts over the whole batch, so that no "
                "sample has a gradient of its own"
            )
        return ""

    def forward(self, input: Tensor) -> Tensor:
        """The rows of the weight that the indices name."""
        if not self.measures():
            return super().forward(input)
        if self.max_norm is not None:
            with torch.no_grad():
                torch.embedding_renorm_(
                    self.weight.detach(), input.contiguous(), self.max_norm, self.norm_type
                )
        probe, weight_probe, _, call = self.probes(input)
        return functional.embedding(input, self.weight, self.padding_idx, probe, weight_probe, call)

    def respond(
        self, call: functional.Call, operands: tuple[Tensor, ...], params: Mapping[str, Any]
    ) -> Tensor:
        """See `ObservedLayer`."""
        (indices,) = operands
        rows = F.embedding(indices, params["weight"])
        if self.padding_idx is None:
            return rows
        return rows.masked_fill((indices == self.padding_idx).unsqueeze(-1), 0)
