"""The registry: which layer classes can be observed, and their observed classes."""

from __future__ import annotations

from functools import cache

from torch import nn

from .attention import ObservedMultiheadAttention
from .base import ObservedLayer
from .cells import ObservedGRUCell, ObservedLSTMCell, ObservedRNNCell
from .conv import (
    ObservedConv1d,
    ObservedConv2d,
    ObservedConv3d,
    ObservedConvTranspose1d,
    ObservedConvTranspose2d,
    ObservedConvTranspose3d,
)
from .embedding import ObservedEmbedding
from .embedding_bag import ObservedEmbeddingBag
from .fallback import ObservedFallback, fallback_class
from .folded import CountedModel, counted_class
from .linear import ObservedConv1D, ObservedLinear
from .module import (
    PARAMETER_LISTS,
    ObservedModule,
    module_class,
    own_parameters,
    refusal_of,
    why_fixed,
)
from .normalisation import (
    ObservedBatchNorm1d,
    ObservedBatchNorm2d,
    ObservedBatchNorm3d,
    ObservedGroupNorm,
    ObservedInstanceNorm1d,
    ObservedInstanceNorm2d,
    ObservedInstanceNorm3d,
    ObservedLayerNorm,
    ObservedPReLU,
    ObservedRMSNorm,
)
from .recurrent import ObservedGRU, ObservedLSTM, ObservedRNN

OBSERVED: dict[type[nn.Module], type[ObservedLayer]] = {
    nn.Linear: ObservedLinear,
    nn.Conv1d: ObservedConv1d,
    nn.Conv2d: ObservedConv2d,
    nn.Conv3d: ObservedConv3d,
    nn.ConvTranspose1d: ObservedConvTranspose1d,
    nn.ConvTranspose2d: ObservedConvTranspose2d,
    nn.ConvTranspose3d: ObservedConvTranspose3d,
    nn.Embedding: ObservedEmbedding,
    nn.EmbeddingBag: ObservedEmbeddingBag,
    nn.LayerNorm: ObservedLayerNorm,
    nn.RMSNorm: ObservedRMSNorm,
    nn.GroupNorm: ObservedGroupNorm,
    nn.BatchNorm1d: ObservedBatchNorm1d,
    nn.BatchNorm2d: ObservedBatchNorm2d,
    nn.BatchNorm3d: ObservedBatchNorm3d,
    nn.InstanceNorm1d: ObservedInstanceNorm1d,
    nn.InstanceNorm2d: ObservedInstanceNorm2d,
    nn.InstanceNorm3d: ObservedInstanceNorm3d,
    nn.PReLU: ObservedPReLU,
    nn.MultiheadAttention: ObservedMultiheadAttention,
    nn.LSTM: ObservedLSTM,
    nn.GRU: ObservedGRU,
    nn.RNN: ObservedRNN,
    nn.LSTMCell: ObservedLSTMCell,
    nn.GRUCell: ObservedGRUCell,
    nn.RNNCell: ObservedRNNCell,
}
"""Plain class to observed class. A subclass that keeps the plain `forward` is supported too."""

FOREIGN = {"transformers.pytorch_utils.Conv1D": ObservedConv1D}
"""Classes of packages that need not be installed, by their qualified name."""

TRUSTED = "transformers."
"""Package whose modules are observed by `ObservedModule` without being asked for: tests train many
of its architectures."""

# What forward() itself relies on: a subclass that overrides one of these computes something else.
_METHODS = ("forward", "_conv_forward", "_output_padding", "_check_input_dim")


@cache
def observed_class(plain: type[nn.Module]) -> type[ObservedLayer] | None:
    """The observed class for instances of `plain`, or None if it is not supported."""
    foreign = FOREIGN.get(f"{plain.__module__}.{plain.__qualname__}")
    if foreign is not None:
        return type(foreign.__name__, (foreign, plain), {})
    for known, observed in OBSERVED.items():
        if plain is known:
            return observed
        if issubclass(plain, known) and all(
            getattr(plain, method, None) is getattr(known, method, None) for method in _METHODS
        ):
            return type(f"Observed{plain.__name__}", (observed, plain), {})
    return None


__all__ = [
    "OBSERVED",
    "PARAMETER_LISTS",
    "TRUSTED",
    "CountedModel",
    "ObservedEmbedding",
    "ObservedFallback",
    "ObservedLayer",
    "ObservedModule",
    "counted_class",
    "fallback_class",
    "module_class",
    "observed_class",
    "own_parameters",
    "refusal_of",
    "why_fixed",
]
