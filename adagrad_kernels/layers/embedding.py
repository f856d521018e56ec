"""`torch.nn.Embedding`, observed: indices [b, …], or positions that all samples share."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import functional
from .base import ObservedLayer
from .shared_sources import Once


class ObservedEmbedding(ObservedLayer, nn.Embedding):
    """An embedding that measures; dimension 0 of its indices counts the samples.

    Other indices are positions, [T], [1, T] or [T, T]: they measure where they meet the samples,
    in the module around this one.
    """

    observed_parameters = ("weight",)
    observed_method = "sorted tokens"

    @classmethod
    def refusal(cls, module: nn.Module) -> str:
        """See `ObservedLayer`."""
        assert isinstance(module, nn.Embedding)
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
        return measure_tokens(
            self, input, lambda: F.embedding(input, self.weight, self.padding_idx), self._measure
        )

    def _measure(self, tokens: Tensor) -> Tensor:
        probe, weight_probe, _, call = self.probes(tokens)
        return functional.embedding(
            tokens, self.weight, self.padding_idx, probe, weight_probe, call, self.sparse
        )

    def factors(self, call: functional.Call, name: str) -> tuple[str, int]:
        """See `ObservedLayer`."""
        return "embedding", -1 if self.padding_idx is None else self.padding_idx

    def respond(
        self, call: functional.Call, operands: tuple[Tensor, ...], params: Mapping[str, Any]
    ) -> Tensor:
        """See `ObservedLayer`."""
        return embedding_response(operands[0], params["weight"], self.factors(call, "weight")[1])


def embedding_response(indices: Tensor, weight: Tensor, padding: int) -> Tensor:
    """Rows of the weight, zero for the row `padding` (-1: none)."""
    if weight.layout == torch.sparse_coo:  # a gradient, which has the rows that occur
        weight = weight.coalesce()
        known = weight.indices()[0]
        places = torch.searchsorted(known, indices.long().contiguous())
        rows = F.embedding(places.clamp(max=len(known) - 1), weight.values())
    else:
        rows = F.embedding(indices, weight)
    if padding < 0:
        return rows
    return rows.masked_fill((indices == padding).unsqueeze(-1), 0)


def measure_tokens(
    layer: ObservedLayer,
    indices: Tensor,
    plain: Callable[[], Tensor],
    measure: Callable[[Tensor], Tensor],
) -> Tensor:
    """The output of an embedding of tokens [b, …], or of positions that all samples share.

    Args:
        layer: whose embedding it is.
        indices: of any shape.
        plain: the output without measuring.
        measure: that of tokens [b, T, …], measured.
    """
    values = layer.shared_values
    samples = None if values is None else values.samples
    if _are_positions(layer, indices, samples):
        if values is None:
            raise ValueError(
                f"layer {layer.observed_name!r}: indices of shape {list(indices.shape)} look like "
                "positions that all samples share, and no module of the model takes both samples "
                "and positions. Give positions.expand(samples, -1); of one token for each sample, "
                "indices.unsqueeze(1)"
            )
        shape = indices.shape
        rows = Once(lambda samples: measure(indices.unsqueeze(0).expand(samples, *shape)))
        values.begin()
        return values.add(plain(), rows)
    return measure(indices.unsqueeze(1)).squeeze(1) if indices.dim() == 1 else measure(indices)


def _are_positions(layer: ObservedLayer, indices: Tensor, samples: int | None) -> bool:
    """Whether the indices are shared by all samples, as dimension 0 tells, or once has told.

    One dimension of b indices may be either. Then their order decides, and whatever they were
    before: a batch may grow to as many samples as there are positions.
    """
    if not indices.dim() or (samples is not None and indices.shape[0] != samples):
        if not torch.compiler.is_compiling() and layer.takes_positions is False:
            raise ValueError(
                f"layer {layer.observed_name!r}: {indices.shape[0]} indices for {samples} samples, "
                "but before it took one for each: give positions.expand(samples, -1), or "
                "indices.unsqueeze(1)"
            )
        layer.takes_positions = True
        return True
    if layer.takes_positions is not None:
        return layer.takes_positions
    if indices.dim() > 1 or len(indices) == 1:
        return False
    if torch.compiler.is_compiling():
        raise ValueError(
            f"layer {layer.observed_name!r}: {len(indices)} indices may be positions, or a token "
            "for each sample. Run one forward pass before compiling, or give "
            "positions.expand(samples, -1) or indices.unsqueeze(1)"
        )
    layer.takes_positions = bool((indices.diff() == 1).all())
    return layer.takes_positions
