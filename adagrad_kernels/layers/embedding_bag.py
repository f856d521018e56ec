"""`torch.nn.EmbeddingBag`, observed: sums, means or maxima of a sample's rows."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .base import unwatched
from .embedding import ObservedTable


class ObservedEmbeddingBag(ObservedTable, nn.EmbeddingBag):
    """A bag of embeddings that measures; each bag is a sample.

    An embedding [b, L, D], where L is the longest bag, and its sum, mean or maximum over L: more
    memory than the plain layer takes, which forms the sums alone.
    """

    @unwatched
    def forward(
        self,
        input: Tensor,
        offsets: Tensor | None = None,
        per_sample_weights: Tensor | None = None,
    ) -> Tensor:
        """As `torch.nn.EmbeddingBag`; bags of different lengths read their lengths from the device.

        Raises:
            RuntimeError: bags of different lengths in a compiled model.
        """
        if not self.measures():
            return super().forward(input, offsets, per_sample_weights)
        tokens, weights, inside = self._bags(input, offsets, per_sample_weights)
        self.renormalise(input)
        rows = self.rows_of(tokens)
        if self.padding_idx is not None:
            padding = tokens == self.padding_idx
            inside = ~padding if inside is None else inside & ~padding
        if self.mode == "max":
            return _maxima(rows, inside)
        if weights is not None:
            rows = rows * weights.unsqueeze(-1)
        if inside is not None:
            rows = rows * inside.unsqueeze(-1)
        total = rows.sum(1)
        if self.mode == "sum":
            return total
        if inside is None:
            return total / max(1, tokens.shape[1])
        return total / inside.sum(1, keepdim=True).clamp(min=1)

    def _bags(
        self, input: Tensor, offsets: Tensor | None, weights: Tensor | None
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Tokens, their weights, and whether they are any: [b, L] each, the latter None for all."""
        if weights is not None and (self.mode != "sum" or weights.shape != input.shape):
            raise ValueError(
                f"layer {self.observed_name!r}: per_sample_weights need mode='sum' and the shape "
                f"of the input {list(input.shape)}, got mode={self.mode!r} and "
                f"{list(weights.shape)}"
            )
        if input.dim() == 2 and offsets is None:
            return input, weights, None
        if input.dim() != 1 or offsets is None:
            raise ValueError(
                f"layer {self.observed_name!r}: expected an input [b, L], or [n] and offsets, got "
                f"{list(input.shape)} and {'no' if offsets is None else list(offsets.shape)} "
                "offsets"
            )
        if torch.compiler.is_compiling():
            raise RuntimeError(
                f"layer {self.observed_name!r}: bags of different lengths cannot be compiled; "
                "give them as [b, L] with padding_idx"
            )
        if not self.include_last_offset:
            offsets = torch.cat([offsets, offsets.new_full((1,), len(input))])
        lengths = offsets.diff()
        first, least, longest = (
            torch.stack([offsets[0], lengths.min(), lengths.max()]).tolist()
            if len(lengths)
            else (0, 0, 0)
        )
        if first != 0 or least < 0:
            raise ValueError(
                f"layer {self.observed_name!r}: offsets must begin with 0, not decrease, and end "
                f"within the {len(input)} tokens"
            )
        places = torch.arange(longest, device=input.device)
        inside = places < lengths.unsqueeze(1)
        where = (offsets[:-1].unsqueeze(1) + places)[inside]
        tokens = input.new_zeros(inside.shape)
        tokens[inside] = input[where]
        if weights is not None:
            weights = weights.new_zeros(inside.shape).index_put((inside,), weights[where])
        return tokens, weights, inside


def _maxima(rows: Tensor, inside: Tensor | None) -> Tensor:
    """Over dimension 1, of those inside; 0 where there are none."""
    if not rows.shape[1]:
        return rows.sum(1)
    if inside is None:
        return rows.max(1).values
    found = rows.masked_fill(~inside.unsqueeze(-1), -torch.inf).max(1).values
    return found.masked_fill(~inside.any(1, keepdim=True), 0.0)
