"""`torch.nn.Embedding`, observed: indices [b, …], or positions that all samples share."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import functional
from .base import ObservedLayer, unwatched
from .contributions import Form
from .shared_sources import Once
from .shared_values import SharedValues


class ObservedTable(ObservedLayer):
    """What `ObservedEmbedding` and `ObservedEmbeddingBag` share: rows of a weight, by tokens."""

    observed_parameters = ("weight",)
    observed_method = "sorted tokens"
    weight: Tensor
    padding_idx: int | None
    max_norm: float | None
    norm_type: float
    sparse: bool

    @classmethod
    def refusal(cls, module: nn.Module) -> str:
        """See `ObservedLayer`."""
        if module.scale_grad_by_freq:
            return (
                "scale_grad_by_freq=True: it divides by counts over the whole batch, so that no "
                "sample has a gradient of its own"
            )
        return ""

    def renormalise(self, indices: Tensor) -> None:
        """Scales the rows that are too long, as `max_norm` asks for."""
        if self.max_norm is not None:
            with torch.no_grad():
                torch.embedding_renorm_(
                    self.weight.detach(), indices.contiguous(), self.max_norm, self.norm_type
                )

    def rows_of(self, tokens: Tensor) -> Tensor:
        """The rows of tokens [b, T, …], measured."""
        tokens = self.by_samples(tokens)
        probe, weight_probe, _, call = self.probes(tokens)
        return self.as_rows(
            functional.embedding(
                tokens, self.weight, self.padding_idx, probe, weight_probe, call, self.sparse
            )
        )

    @property
    def sparse_gradient(self) -> bool:
        """See `ObservedLayer`."""
        return self.sparse

    def form(self, call: functional.Call, name: str, saved: tuple[Tensor, ...]) -> Form:
        """See `ObservedLayer`."""
        return Form("embedding", padding=self.padding)

    @property
    def padding(self) -> int:
        """The token without gradient, or -1."""
        return -1 if self.padding_idx is None else self.padding_idx

    def respond(
        self, call: functional.Call, operands: tuple[Tensor, ...], params: Mapping[str, Any]
    ) -> Tensor:
        """See `ObservedLayer`."""
        return embedding_response(operands[0], params["weight"], self.padding)


class ObservedEmbedding(ObservedTable, nn.Embedding):
    """An embedding that measures; dimension 0 of its indices counts the samples.

    Other indices are positions, [T], [1, T] or [T, T]: they measure where they meet the samples,
    in the module around this one.
    """

    @unwatched
    def forward(self, input: Tensor) -> Tensor:
        """The rows of the weight that the indices name."""
        if not self.measures():
            return super().forward(input)
        self.renormalise(input)
        return measure_tokens(
            self, input, lambda: F.embedding(input, self.weight, self.padding_idx), self.rows_of
        )


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
    if layer.observed_folded and (values is None or not values.folded):
        _check_folded(layer, indices, values)
    elif _are_positions(layer, indices, values):
        if values is None:
            raise ValueError(
                f"layer {layer.observed_name!r}: {_AMBIGUOUS.format(shape=list(indices.shape))}"
            )
        shape = indices.shape
        rows = Once(lambda samples: measure(indices.unsqueeze(0).expand(samples, *shape)), layer)
        return values.add(plain(), rows)
    return measure(indices.unsqueeze(1)).squeeze(1) if indices.dim() == 1 else measure(indices)


_AMBIGUOUS = (
    "indices of shape {shape} may be positions that all samples share, or a token for each sample. "
    "Positions: give positions.expand(samples, -1); tokens: indices.unsqueeze(1)"
)


def _check_folded(layer: ObservedLayer, indices: Tensor, values: SharedValues | None) -> None:
    """That the indices of an embedding that is folded by itself are no positions.

    Raises:
        ValueError: they are computed of constants and differ, or are 0, 1, 2, … at first.
    """
    if torch.compiler.is_compiling():
        return
    constant = values is not None and values.is_constant(indices)
    shared = constant and bool((indices != indices[:1]).any())
    if layer.takes_positions is None and indices.dim() == 1 and len(indices) > 1:
        shared = shared or bool((indices.diff() == 1).all())
    if shared:
        raise ValueError(
            f"layer {layer.observed_name!r} is folded, but its indices of shape "
            f"{list(indices.shape)} are positions that all samples share: name the module around "
            "it with folded=, too"
        )
    layer.takes_positions = False


def _are_positions(layer: ObservedLayer, indices: Tensor, values: SharedValues | None) -> bool:
    """Whether the indices are shared by all samples.

    They are if dimension 0 does not count the samples. If it could, those that were computed of
    constants (`torch.arange`) are, unless they have equal rows, one for each sample. One dimension
    of b given indices may be either: then what they were before decides, with another b; the first
    time 0, 1, 2, … are refused.
    """
    samples = None if values is None else values.samples
    constant = values is not None and values.is_constant(indices)
    compiling = torch.compiler.is_compiling()
    if layer.observed_folded and not constant and samples and indices.dim() > 1:
        again = indices.shape[0] // samples  # rows that are cut further
        if again > 1 and again * samples == indices.shape[0]:
            return False
    if not indices.dim() or (samples is not None and indices.shape[0] != samples):
        if not compiling and not constant and layer.takes_positions is False:
            raise ValueError(
                f"layer {layer.observed_name!r}: {indices.shape[0]} indices for {samples} samples, "
                "but before it took one for each: give positions.expand(samples, -1), or "
                "indices.unsqueeze(1)"
            )
        layer.takes_positions = True
        return True
    if len(indices) == 1 or (indices.dim() > 1 and not constant):
        return False
    if layer.takes_positions is None:
        if constant and indices.dim() == 1:
            return True
        if compiling and constant and indices.shape[0] != indices.shape[1]:
            return False
        if compiling or (indices.dim() == 1 and bool((indices.diff() == 1).all())):
            raise ValueError(
                f"layer {layer.observed_name!r}: {_AMBIGUOUS.format(shape=list(indices.shape))}"
                + ("; or run one forward pass before compiling" if compiling else "")
            )
        layer.takes_positions = constant and bool((indices != indices[:1]).any())
    return layer.takes_positions
